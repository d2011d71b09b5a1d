//! How a group is balanced: its mode, and what came of it.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::balancing::{Balancing, Last};
use crate::state::Shared;

/// How a group is balanced, and what came of it.
#[derive(Serialize, ToSchema)]
pub(super) struct BalancingView {
    #[serde(flatten)]
    balancing: Balancing,
    /// The last question that control asked by itself since its start.
    last: Last,
}

/// How a group is to be balanced.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewBalancing {
    balancing: Balancing,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// How a group is balanced: by hand (`manual`), with proposals that come by themselves when there is new load (`advise`), or
/// with those also approved within limits (`auto`).
#[utoipa::path(get, path = "/api/v1/groups/{group}/balancing", params(("group" = String, Path)),
    responses((status = 200, body = BalancingView), (status = 404, body = Problem)))]
pub(super) async fn balancing(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<BalancingView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let balancing = state.store.setting::<Balancing>(&group).await?;
    let last = state.advice().get(&group).cloned().unwrap_or_default();
    Ok(Json(BalancingView { balancing, last }))
}

/// Changes how a group is balanced. What is not given is as if nobody had ever said anything.
#[utoipa::path(put, path = "/api/v1/groups/{group}/balancing", params(("group" = String, Path)),
    request_body = NewBalancing, security(("token" = ["operator"])),
    responses((status = 200, body = BalancingView), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn set(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewBalancing>,
) -> Result<Json<BalancingView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewBalancing { balancing, reason: why } = new;
    let entry = caller.entry("balancing.set", reason(&why)?);
    balancing.check()?;
    state.store.set(&group, &balancing, entry).await?;
    // Whatever is new is asked at once.
    state.advice().remove(&group);
    Ok(Json(BalancingView { balancing, last: Last::default() }))
}
