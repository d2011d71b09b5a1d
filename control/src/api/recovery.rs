//! Ranks that are lost, what calls lack without them, and what is done about it.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::losing::without;
use crate::recovering::Recovery;
use crate::state::{Shared, State as Whole, now_ms};

/// What is done when ranks of a group are lost, and who is.
#[derive(Serialize, ToSchema)]
pub(super) struct RecoveryView {
    recovery: Recovery,
    /// Ranks that were there, and are lost.
    lost: Vec<LostView>,
    /// Layers in which calls lack experts: those that all other ranks lack, by what they hold.
    lacking: Vec<LackingView>,
}

/// A rank that is lost.
#[derive(Serialize, ToSchema)]
struct LostView {
    /// The rank.
    rank: u32,
    /// When it was heard of last, in milliseconds since 1970.
    last_seen_ms: u64,
    /// When it is given up, or was; null where that is left to somebody.
    gives_up_ms: Option<u64>,
    /// Whether nobody waits for it any more: what only it has gets a place on the others.
    given_up: bool,
}

/// A layer that lacks experts.
#[derive(Serialize, ToSchema)]
struct LackingView {
    /// The model's number of the layer.
    layer: u32,
    /// Calls that need one of these are refused.
    experts: Vec<u32>,
}

/// What is to be done when ranks are lost.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewRecovery {
    recovery: Recovery,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// What is done when ranks of a group are lost, who is lost, and what calls lack.
#[utoipa::path(get, path = "/api/v1/groups/{group}/recovery", params(("group" = String, Path)),
    responses((status = 200, body = RecoveryView), (status = 404, body = Problem)))]
pub(super) async fn recovery(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<RecoveryView>, ApiError> {
    Ok(Json(view(&state, &group).await?))
}

/// Changes what is done when ranks are lost. What is not given is as if nobody had ever said anything.
#[utoipa::path(put, path = "/api/v1/groups/{group}/recovery", params(("group" = String, Path)),
    request_body = NewRecovery, security(("token" = ["operator"])),
    responses((status = 200, body = RecoveryView), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn set_recovery(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewRecovery>,
) -> Result<Json<RecoveryView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewRecovery { recovery, reason: why } = new;
    let entry = caller.entry("recovery.set", reason(&why)?);
    recovery.check()?;
    state.store.set(&group, &recovery, entry).await?;
    Ok(Json(view(&state, &group).await?))
}

async fn view(state: &Whole, group: &str) -> Result<RecoveryView, ApiError> {
    register_of(&state.fleet(), group)?;
    let recovery: Recovery = state.store.setting(group).await?;
    let (now_ms, patience_ms) = (now_ms(), state.patience_ms());
    let fleet = state.fleet();
    let given_up: BTreeSet<u32> = fleet.given_up(group).collect();
    let lost = fleet.lost(group, now_ms, patience_ms);
    let ranks: BTreeSet<u32> = lost.iter().map(|(rank, _)| *rank).collect();
    let gives_up = |seen_ms| recovery.gives_up_ms(seen_ms, state.started_ms);
    let lost = lost.into_iter().map(|(rank, last_seen_ms)| LostView {
        rank,
        last_seen_ms,
        gives_up_ms: recovery.automatic.then(|| gives_up(last_seen_ms)),
        given_up: given_up.contains(&rank),
    });
    let workers = fleet.groups.get(group).into_iter().flat_map(|ranks| ranks.values());
    let held = workers.filter_map(|worker| worker.held(now_ms, patience_ms)).next();
    let lacks = held.unwrap_or_default().iter().map(|placed| LackingView {
        layer: placed.layer,
        experts: without(&placed.placement, &ranks, &[]).gone,
    });
    let lacking = lacks.filter(|layer| !layer.experts.is_empty()).collect();
    Ok(RecoveryView { recovery, lost: lost.collect(), lacking })
}
