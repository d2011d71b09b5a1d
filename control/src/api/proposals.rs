//! Proposals: what a placement policy would do with a group, and why; an operator approves or rejects them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use policy_host::contract::placer::{Budget, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, Reason, checked_limit, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::views::Page;
use crate::deciding::{Decision, Kept, Present, Standing};
use crate::limits::{PROPOSAL_SECONDS_DEFAULT, PROPOSAL_SECONDS_MAX};
use crate::proposing::{Origin, Proposal, Question, Tradeoff, Unaskable, WINDOWS};
use crate::state::{Shared, now_ms};
use crate::store::audit::Entry;
use crate::store::placements::PlaceError;
use crate::store::proposals::DecideError;
use crate::store::windows::{Of, Part as Loads, Span};

/// What to ask.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    /// A placement policy by its name; `greedy_swap` if not given.
    #[serde(default = "first_policy")]
    policy: String,
    /// Its settings.
    #[serde(default)]
    #[schema(value_type = Object)]
    settings: Map<String, Value>,
    /// What the plan may cost.
    #[serde(default)]
    budget: BudgetOf,
    /// What a layer has to gain in rows of the busiest rank beside the mean to be changed; 0 if not given.
    #[serde(default)]
    minimum_gain: f32,
    /// Seconds for which the proposal may be approved, 1 to 604800; 3600 if not given.
    #[serde(default = "valid_for_s")]
    valid_for_s: u64,
    /// Kept in the audit log; not empty.
    reason: String,
}

fn first_policy() -> String {
    "greedy_swap".to_owned()
}

fn valid_for_s() -> u64 {
    PROPOSAL_SECONDS_DEFAULT
}

/// Upper bounds of a plan; absent is no bound.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BudgetOf {
    /// Layers that may change.
    layers: Option<u32>,
    /// Experts that may come to ranks in one layer.
    moves_per_layer: Option<u32>,
    /// Bytes of all moves.
    bytes: Option<u64>,
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
    request_body = Ask, security(("token" = ["operator"])),
    responses((status = 200, body = ProposalView), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn propose(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(ask): JsonOf<Ask>,
) -> Result<Json<ProposalView>, ApiError> {
    let entry = caller.entry("proposal.make", reason(&ask.reason)?);
    let Ask { minimum_gain, valid_for_s, .. } = ask;
    if !(1..=PROPOSAL_SECONDS_MAX).contains(&valid_for_s) {
        let expected = format!("1 to {PROPOSAL_SECONDS_MAX}");
        let (name, value) = ("valid_for_s", valid_for_s.to_string());
        return Err(ApiError::Value { name, value, expected });
    }
    if !(0.0..=1_024.0).contains(&minimum_gain) {
        let (name, value) = ("minimum_gain", minimum_gain.to_string());
        return Err(ApiError::Value { name, value, expected: "0 to 1024".to_owned() });
    }
    let settings = Value::Object(ask.settings).to_string();
    let BudgetOf { layers, moves_per_layer, bytes } = ask.budget;
    let budget = Budget { layers, moves_per_layer, bytes };
    let (model, request) = request(&state, &group, &settings, budget).await?;
    let request = Arc::new(request);
    let asked = state.policies.ask(&ask.policy, settings, Arc::clone(&request)).await;
    let (policy, answer) = asked?;
    let policy = (&policy.info().name[..], policy.digest());
    let origin = Origin { group: &group, model: &model, policy, minimum_gain };
    let proposal = Proposal::new(origin, &request, &answer, now_ms());
    let proposal = proposal.map_err(ApiError::Json)?;
    let expires_ms = now_ms() + valid_for_s * 1_000;
    let kept = state.store.keep_proposal(proposal, expires_ms, entry).await?;
    let present = state.store.present((&group, &model), now_ms()).await?;
    Ok(Json(ProposalView::new(kept, &present)))
}

/// The digest of a group's model, and what a policy is asked about it.
async fn request(
    state: &Shared,
    group: &str,
    settings: &str,
    budget: Budget,
) -> Result<(String, Request), ApiError> {
    let register = register_of(&state.fleet(), group)?.clone();
    let of = Of { group, model: &register.model.digest, span: Span::Window };
    // Twice as many windows as are wanted: those of two phases may take turns.
    let limit = 2 * 2 * WINDOWS * register.model.layers.len();
    let newest = Loads {
        after: (u64::MAX, u32::MAX, String::new()),
        newest_first: true,
        ..Loads::between(0, state.settled_ms(), limit)
    };
    let mut loads = state.store.loads(of, &newest).await?;
    loads.reverse();
    let fleet = state.fleet();
    let unaskable = |error: Unaskable| {
        let (what, name, reason) = ("group", group.to_owned(), error.to_string());
        ApiError::Conflict { what, name, reason }
    };
    let in_force = fleet.in_force(group, now_ms(), state.patience_ms());
    let in_force = in_force.ok_or_else(|| unaskable(Unaskable::NothingInForce))?;
    let ranks = fleet.groups.get(group).into_iter().flat_map(|ranks| ranks.values());
    let question = Question {
        ranks: ranks.map(|worker| &worker.register).collect(),
        in_force,
        loads: &loads,
        window_ms: state.config.window_ms,
        settings,
        budget,
    };
    let request = question.request().map_err(unaskable)?;
    Ok((register.model.digest, request))
}

/// Budgets of a trade-off, in moves of a layer.
const BUDGETS: [u32; 5] = [0, 1, 2, 4, 8];

/// Which policy.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct By {
    /// A placement policy by its name; `greedy_swap` if not given.
    #[serde(default = "first_policy")]
    policy: String,
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
    let (_, request) = request(&state, &group, NO_SETTINGS, none).await?;
    let mut found = Vec::with_capacity(BUDGETS.len());
    for moves in BUDGETS {
        let budget = Budget { moves_per_layer: Some(moves), ..none };
        let request = Arc::new(Request { budget, ..request.clone() });
        let settings = NO_SETTINGS.to_owned();
        let (_, answer) = state.policies.ask(&policy, settings, Arc::clone(&request)).await?;
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

/// Approves a proposal: its placements are committed, and its group's ranks hold them when all of them start again. One that
/// was decided already, has expired or was superseded is refused with what is in the way.
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
    if approved && !register.asks {
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
