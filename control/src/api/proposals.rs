//! Proposals: what a placement policy would do with a group, and why. Nothing moves by them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use policy_host::contract::placer::{Budget, Request};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, checked_limit, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::views::Page;
use crate::proposing::{Proposal, Question, Tradeoff, Unaskable, WINDOWS};
use crate::state::{Shared, now_ms};
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
    /// Kept in the audit log; not empty.
    reason: String,
}

fn first_policy() -> String {
    "greedy_swap".to_owned()
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

/// Asks a placement policy what it would change in a group, by its newest windows and what is in force. The same question
/// to the same policy is the same proposal; one without changes says why.
#[utoipa::path(post, path = "/api/v1/groups/{group}/proposals", params(("group" = String, Path)),
    request_body = Ask, security(("token" = ["operator"])),
    responses((status = 200, body = Proposal), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn propose(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(ask): JsonOf<Ask>,
) -> Result<Json<Proposal>, ApiError> {
    let entry = caller.entry("proposal.make", reason(&ask.reason)?);
    let settings = Value::Object(ask.settings).to_string();
    let BudgetOf { layers, moves_per_layer, bytes } = ask.budget;
    let budget = Budget { layers, moves_per_layer, bytes };
    let request = Arc::new(request(&state, &group, &settings, budget).await?);
    let asked = state.policies.ask(&ask.policy, settings, Arc::clone(&request)).await;
    let (policy, answer) = asked?;
    let named = (&policy.info().name[..], policy.digest());
    let proposal = Proposal::new(&group, named, &request, &answer, now_ms());
    let proposal = proposal.map_err(ApiError::Json)?;
    Ok(Json(state.store.keep_proposal(proposal, entry).await?))
}

/// What a policy is asked about a group.
async fn request(
    state: &Shared,
    group: &str,
    settings: &str,
    budget: Budget,
) -> Result<Request, ApiError> {
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
    question.request().map_err(unaskable)
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
    let request = request(&state, &group, NO_SETTINGS, none).await?;
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
    responses((status = 200, body = Page<Proposal>), (status = 400, body = Problem)))]
pub(super) async fn proposals(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(wanted): QueryOf<Wanted>,
) -> Result<Json<Page<Proposal>>, ApiError> {
    let limit = checked_limit(wanted.limit)?;
    let parsed = wanted.cursor.as_ref().map(|cursor| {
        let place = cursor.split_once(':').and_then(|(at, id)| Some((at.parse().ok()?, id)));
        place.ok_or_else(|| ApiError::cursor(cursor))
    });
    let before = parsed.transpose()?.unwrap_or((u64::MAX, ""));
    let found = state.store.proposals(&group, before, limit + 1).await?;
    let cursor = |last: &Proposal| format!("{}:{}", last.made_ms, last.id);
    Ok(Json(Page::of(found, limit, cursor, |proposal| proposal)))
}

/// One proposal.
#[utoipa::path(get, path = "/api/v1/proposals/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Proposal), (status = 404, body = Problem)))]
pub(super) async fn proposal(
    State(state): State<Shared>,
    PathOf(id): PathOf<String>,
) -> Result<Json<Proposal>, ApiError> {
    let found = state.store.proposal(&id).await?;
    let found = found.ok_or_else(|| ApiError::NotFound { what: "proposal", name: id });
    Ok(Json(found?))
}
