//! Asks a policy about a group: from what the fleet and the store know to a proposal, which nobody keeps here.

use std::sync::Arc;

use policy_host::contract::placer::{Budget, Request};
use policy_host::contract::types::CostPoint;
use protocol::session::ModelInfo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::choosing::{alone, cost_points};
use crate::constraints::Constraints;
use crate::limits::{PROPOSAL_SECONDS_DEFAULT, PROPOSAL_SECONDS_MAX};
use crate::motion::Pace;
use crate::policies::AskError;
use crate::proposing::{Origin, Proposal, Question, Unaskable, WINDOWS};
use crate::registry::ask;
use crate::splitting::{SplitBy, Splitting, question};
use crate::state::{State, now_ms};
use crate::store::StoreError;
use crate::store::windows::{Of, Part as Loads, Span};

/// What is asked of which policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wish {
    /// A placement policy by its name, or the digest of a version; `greedy_swap` if not given.
    pub(crate) policy: String,
    /// Its settings.
    #[schema(value_type = Object)]
    pub(crate) settings: Map<String, Value>,
    /// What the plan may cost.
    pub(crate) budget: BudgetOf,
    /// What a layer has to gain in rows of the busiest rank beside the mean to be changed; 0 if not given.
    pub(crate) minimum_gain: f32,
    /// Seconds for which the proposal may be approved, 1 to 604800; 3600 if not given.
    pub(crate) valid_for_s: u64,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            policy: "greedy_swap".to_owned(),
            settings: Map::new(),
            budget: BudgetOf::default(),
            minimum_gain: 0.0,
            valid_for_s: PROPOSAL_SECONDS_DEFAULT,
        }
    }
}

/// Upper bounds of a plan; absent is no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BudgetOf {
    /// Layers that may change.
    layers: Option<u32>,
    /// Experts that may come to ranks in one layer.
    moves_per_layer: Option<u32>,
    /// Bytes of all moves.
    bytes: Option<u64>,
}

impl From<BudgetOf> for Budget {
    fn from(BudgetOf { layers, moves_per_layer, bytes }: BudgetOf) -> Self {
        Self { layers, moves_per_layer, bytes }
    }
}

/// A number that is out of its range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutOfRange {
    pub(crate) name: &'static str,
    pub(crate) value: String,
    pub(crate) expected: String,
}

impl Wish {
    /// Settings as policies take them.
    pub(crate) fn settings_text(&self) -> String {
        Value::Object(self.settings.clone()).to_string()
    }

    /// Refuses numbers that are out of their ranges. What settings may be the policy says when it is asked.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        let Self { minimum_gain, valid_for_s, .. } = self;
        if !(1..=PROPOSAL_SECONDS_MAX).contains(valid_for_s) {
            let (name, value) = ("valid_for_s", valid_for_s.to_string());
            let expected = format!("1 to {PROPOSAL_SECONDS_MAX}");
            return Err(OutOfRange { name, value, expected });
        }
        if !(0.0..=1_024.0).contains(minimum_gain) {
            let (name, value) = ("minimum_gain", minimum_gain.to_string());
            return Err(OutOfRange { name, value, expected: "0 to 1024".to_owned() });
        }
        Ok(())
    }
}

/// Why nothing was proposed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProposeError {
    #[error("there is no group {group}")]
    NoGroup { group: String },
    #[error(transparent)]
    Unaskable(#[from] Unaskable),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the proposal cannot be written")]
    Json(#[from] serde_json::Error),
}

/// What a policy says to a wish.
pub(crate) async fn propose(
    state: &State,
    group: &str,
    wish: &Wish,
) -> Result<Proposal, ProposeError> {
    let settings = wish.settings_text();
    let (model, request) = request(state, group, &settings, wish.budget.into()).await?;
    let request = Arc::new(request);
    let (policy, answer) = ask(state, group, (&wish.policy, settings), &request).await?;
    let policy = (&policy.info().name[..], policy.digest());
    let Pace { bytes_per_second, .. } = state.store.setting(group).await?;
    let minimum_gain = wish.minimum_gain;
    let origin = Origin { group, model: &model, policy, minimum_gain, bytes_per_second };
    let proposal = Proposal::new(origin, &request, &answer, now_ms())?;
    let splitting: Splitting = state.store.setting(group).await?;
    match &splitting.policy {
        Some(policy) if state.fleet().splits(group) => {
            let by = (&policy[..], splitting.settings_text());
            split(state, group, by, (proposal, &request)).await
        }
        _ => Ok(proposal),
    }
}

/// Has a routing policy split the tokens of a proposal.
async fn split(
    state: &State,
    group: &str,
    (policy, settings): (&str, String),
    (proposal, request): (Proposal, &Request),
) -> Result<Proposal, ProposeError> {
    let in_force = {
        let fleet = state.fleet();
        let in_force = fleet.in_force(group, now_ms(), state.patience_ms());
        in_force.ok_or(Unaskable::NothingInForce)?.to_vec()
    };
    let asked = Arc::new(question(request, (&proposal.changes, &in_force), &settings));
    let mut by = SplitBy {
        policy: policy.to_owned(),
        policy_digest: String::new(),
        settings: settings.clone(),
        explanation: String::new(),
        problem: None,
    };
    match ask(state, group, (policy, settings), &asked).await {
        Ok((policy, answer)) => {
            policy.digest().clone_into(&mut by.policy_digest);
            by.explanation.clone_from(&answer.value.explanation);
            Ok(proposal.with_splits(by, (request, &in_force), &answer.value))
        }
        Err(AskError::Store(error)) => Err(error.into()),
        Err(error) => {
            by.problem = Some(error.to_string());
            Ok(proposal.without_splits(by))
        }
    }
}

/// The digest of a group's model, and what a policy is asked about it.
pub(crate) async fn request(
    state: &State,
    group: &str,
    settings: &str,
    budget: Budget,
) -> Result<(String, Request), ProposeError> {
    let model = state.fleet().model_of(group).cloned();
    let model = model.ok_or_else(|| ProposeError::NoGroup { group: group.to_owned() })?;
    let of = Of { group, model: &model.digest, span: Span::Window };
    // Twice as many windows as are wanted: those of two phases may take turns.
    let limit = 2 * 2 * WINDOWS * model.layers.len();
    let newest = Loads {
        after: (u64::MAX, u32::MAX, String::new()),
        newest_first: true,
        ..Loads::between(0, state.settled_ms(), limit)
    };
    let mut loads = state.store.loads(of, &newest).await?;
    loads.reverse();
    let costs = costs(state, group, &model).await?;
    let constraints: Constraints = state.store.setting(group).await?;
    let fleet = state.fleet();
    let in_force = fleet.in_force(group, now_ms(), state.patience_ms());
    let in_force = in_force.ok_or(Unaskable::NothingInForce)?;
    let ranks = fleet.groups.get(group).into_iter().flat_map(|ranks| ranks.values());
    let question = Question {
        ranks: ranks.map(|worker| &worker.register).collect(),
        lost: fleet.given_up(group).collect(),
        in_force,
        loads: &loads,
        window_ms: state.config.window_ms,
        settings,
        budget,
        costs,
        constraints: &constraints,
    };
    let request = question.request()?;
    Ok((model.digest, request))
}

/// What a rank's part of a call costs: by what was measured of the first layer on ranks like the first of the group's that has
/// told of its tactics.
async fn costs(
    state: &State,
    group: &str,
    model: &ModelInfo,
) -> Result<Vec<CostPoint>, StoreError> {
    let provenance = state.fleet().tactics(group).into_iter().next().map(|(_, t)| t.provenance);
    let (Some(provenance), Some(layer)) = (provenance, model.layers.first()) else {
        return Ok(Vec::new());
    };
    let problem = alone(layer);
    let measurements = state.store.measurements(&provenance, &problem).await?;
    Ok(cost_points(&problem, &measurements))
}
