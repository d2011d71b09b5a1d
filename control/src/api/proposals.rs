//! Proposals: what a placement policy would do with a group, and why; an operator approves or rejects them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use policy_host::contract::placer::{Budget, Request};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, Reason, checked_limit, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::views::Page;
use crate::deciding::{Decision, Kept, Present, Standing};
use crate::propose::{Wish, propose as propose_by, request};
use crate::proposing::{Proposal, Tradeoff};
use crate::registry::ask;
use crate::state::{Shared, now_ms};
use crate::store::audit::Entry;
use crate::store::placements::PlaceError;
use crate::store::proposals::DecideError;

/// What to ask.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewProposal {
    #[serde(default)]
    ask: Wish,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// Which proposals.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// Most items, 1 to 500.
    limit: Option<usize>,
    /// `next` of the part before.
    cursor: Option<String>,
}

/// A proposal, and where it stands.
#[derive(Serialize, ToSchema)]
pub(super) struct ProposalView {
    #[serde(flatten)]
    proposal: Proposal,
    standing: Standing,
    /// Until when it may be approved, in milliseconds since 1970.
    expires_ms: u64,
    /// What was decided; null while nobody has.
    decision: Option<Decision>,
}

impl ProposalView {
    fn new(kept: Kept, present: &Present) -> Self {
        let standing = kept.standing(present);
        let Kept { proposal, expires_ms, decision } = kept;
        Self { proposal, standing, expires_ms, decision }
    }
}

/// Asks a placement policy what it would change in a group, by its newest windows and what is in force. The same question
/// to the same policy is the same proposal; one without changes says why.
#[utoipa::path(post, path = "/api/v1/groups/{group}/proposals", params(("group" = String, Path)),
    request_body = NewProposal, security(("token" = ["operator"])),
    responses((status = 200, body = ProposalView), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn propose(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(NewProposal { ask, reason: why }): JsonOf<NewProposal>,
) -> Result<Json<ProposalView>, ApiError> {
    let entry = caller.entry("proposal.make", reason(&why)?);
    ask.check()?;
    let proposal = propose_by(&state, &group, &ask).await;
    let proposal = proposal.map_err(|error| ApiError::propose(&group, error))?;
    let model = proposal.model.clone();
    let expires_ms = now_ms() + ask.valid_for_s * 1_000;
    let kept = state.store.keep_proposal(proposal, expires_ms, entry).await?;
    let present = state.store.present((&group, &model), now_ms()).await?;
    Ok(Json(ProposalView::new(kept, &present)))
}

/// Budgets of a trade-off, in moves of a layer.
const BUDGETS: [u32; 5] = [0, 1, 2, 4, 8];

/// Which policy.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct By {
    /// A placement policy by its name, or the digest of a version; `greedy_swap` if not given.
    policy: Option<String>,
}

/// What evenness costs: the same policy asked with budgets of 0, 1, 2, 4 and 8 moves a layer, its own settings. Keeps
/// nothing.
#[utoipa::path(get, path = "/api/v1/groups/{group}/tradeoffs",
    params(("group" = String, Path), By),
    responses((status = 200, body = Vec<Tradeoff>), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn tradeoffs(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(By { policy }): QueryOf<By>,
) -> Result<Json<Vec<Tradeoff>>, ApiError> {
    let none = Budget { layers: None, moves_per_layer: None, bytes: None };
    let policy = policy.unwrap_or_else(|| Wish::default().policy);
    let request = request(&state, &group, NO_SETTINGS, none).await;
    let (_, request) = request.map_err(|error| ApiError::propose(&group, error))?;
    let mut found = Vec::with_capacity(BUDGETS.len());
    for moves in BUDGETS {
        let budget = Budget { moves_per_layer: Some(moves), ..none };
        let request = Arc::new(Request { budget, ..request.clone() });
        let settings = NO_SETTINGS.to_owned();
        let (_, answer) = ask(&state, &group, (&policy, settings), &request).await?;
        found.extend(Tradeoff::new(moves, &request, &answer.value));
    }
    Tradeoff::mark(&mut found);
    Ok(Json(found))
}

const NO_SETTINGS: &str = "{}";

/// Proposals of a group, newest first.
#[utoipa::path(get, path = "/api/v1/groups/{group}/proposals",
    params(("group" = String, Path), Wanted),
    responses((status = 200, body = Page<ProposalView>), (status = 400, body = Problem)))]
pub(super) async fn proposals(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(wanted): QueryOf<Wanted>,
) -> Result<Json<Page<ProposalView>>, ApiError> {
    let limit = checked_limit(wanted.limit)?;
    let parsed = wanted.cursor.as_ref().map(|cursor| {
        let place = cursor.split_once(':').and_then(|(at, id)| Some((at.parse().ok()?, id)));
        place.ok_or_else(|| ApiError::cursor(cursor))
    });
    let before = parsed.transpose()?.unwrap_or((u64::MAX, ""));
    let found = state.store.proposals(&group, before, limit + 1).await?;
    let present = present(&state, &group).await?;
    let cursor = |last: &Kept| format!("{}:{}", last.proposal.made_ms, last.proposal.id);
    Ok(Json(Page::of(found, limit, cursor, |kept| ProposalView::new(kept, &present))))
}

/// What a group is now; one that nobody knows any more serves no model.
async fn present(state: &Shared, group: &str) -> Result<Present, ApiError> {
    let model = state.fleet().model_of(group).map(|model| model.digest.clone());
    Ok(state.store.present((group, &model.unwrap_or_default()), now_ms()).await?)
}

/// One proposal.
#[utoipa::path(get, path = "/api/v1/proposals/{id}", params(("id" = String, Path)),
    responses((status = 200, body = ProposalView), (status = 404, body = Problem)))]
pub(super) async fn proposal(
    State(state): State<Shared>,
    PathOf(id): PathOf<String>,
) -> Result<Json<ProposalView>, ApiError> {
    let kept = kept(&state, id).await?;
    let present = present(&state, &kept.proposal.group).await?;
    Ok(Json(ProposalView::new(kept, &present)))
}

async fn kept(state: &Shared, id: String) -> Result<Kept, ApiError> {
    let found = state.store.proposal(&id).await?;
    found.ok_or_else(|| ApiError::NotFound { what: "proposal", name: id })
}

/// Approves a proposal: its placements are committed, and its group's ranks take them up while calls go on, or when all of
/// them start again where they cannot. One that was decided already, has expired or was superseded is refused with what is in the way.
#[utoipa::path(post, path = "/api/v1/proposals/{id}/approve", params(("id" = String, Path)),
    request_body = Reason, security(("token" = ["operator"])),
    responses((status = 200, body = ProposalView), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn approve(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<ProposalView>, ApiError> {
    decide(&state, id, true, caller.entry("proposal.approve", reason(&why.reason)?)).await
}

/// Rejects a proposal. One that was decided already, has expired or was superseded is refused with what is in the way.
#[utoipa::path(post, path = "/api/v1/proposals/{id}/reject", params(("id" = String, Path)),
    request_body = Reason, security(("token" = ["operator"])),
    responses((status = 200, body = ProposalView), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn reject(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<ProposalView>, ApiError> {
    decide(&state, id, false, caller.entry("proposal.reject", reason(&why.reason)?)).await
}

async fn decide(
    state: &Shared,
    id: String,
    approved: bool,
    entry: Entry<'_>,
) -> Result<Json<ProposalView>, ApiError> {
    let group = kept(state, id.clone()).await?.proposal.group;
    let register = register_of(&state.fleet(), &group)?.clone();
    if approved && !register.is_placed() {
        let (what, reason) = (
            "group",
            "its workers hold placements of their own, expected some \
            that ask control"
                .to_owned(),
        );
        return Err(ApiError::Conflict { what, name: group, reason });
    }
    let decided = state.store.decide(&register, &id, approved, entry).await;
    let decided = decided.map_err(|error| match error {
        DecideError::Store(error) | DecideError::Place(PlaceError::Store(error)) => {
            ApiError::Store(error)
        }
        DecideError::None => ApiError::NotFound { what: "proposal", name: id },
        error => ApiError::Conflict { what: "proposal", name: id, reason: error.to_string() },
    })?;
    let present = present(state, &group).await?;
    Ok(Json(ProposalView::new(decided, &present)))
}
