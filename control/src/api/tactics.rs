//! Tactics: what was measured, what was chosen by it, and what workers use.

use axum::Json;
use axum::extract::State;
use policy_host::Kind;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::choosing::{Chooser, same, stale};
use crate::policies::{AskError, validate};
use crate::registry::policy;
use crate::state::{Shared, State as Whole};

/// The tactics of a group.
#[derive(Serialize, ToSchema)]
pub(super) struct TacticsView {
    /// Who chooses.
    chooser: Chooser,
    /// What ranks say.
    ranks: Vec<RankTactics>,
    /// What was chosen, newest first; also for devices and kernels that no rank has any more.
    tables: Vec<TableView>,
}

/// What a rank says of its tactics.
#[derive(Serialize, ToSchema)]
struct RankTactics {
    /// The rank.
    rank: u32,
    measured_on: MeasuredOn,
    /// Tactics that can run all of its layers; the first leaves the choice to the device.
    candidates: Vec<String>,
    /// Sizes of calls for which it uses a tactic that was chosen.
    chosen: usize,
    /// Whether that is what was chosen here.
    as_chosen: bool,
}

/// What measurements hold for.
#[derive(Serialize, ToSchema)]
struct MeasuredOn {
    /// The device as it names itself.
    device: String,
    /// The GPU's driver, or the processor.
    driver: String,
    /// Hash of the kernels' source.
    kernels: String,
}

impl From<protocol::tactics::Provenance> for MeasuredOn {
    fn from(of: protocol::tactics::Provenance) -> Self {
        let protocol::tactics::Provenance { device, driver, kernels } = of;
        Self { device, driver, kernels }
    }
}

/// What was chosen for a problem.
#[derive(Serialize, ToSchema)]
struct TableView {
    measured_on: MeasuredOn,
    /// Why no rank uses it: another device, driver or kernel.
    stale: Option<String>,
    /// The layer, ranks and format.
    problem: ProblemView,
    /// By the most tokens of a call.
    choices: Vec<ChoiceView>,
    /// What it was chosen by, by tokens and then the fastest first.
    measurements: Vec<MeasurementView>,
    /// The policy, as it was asked for.
    policy: String,
    /// SHA-256 of the version that answered.
    policy_digest: String,
    /// The policy's own words.
    explanation: String,
    /// When, in milliseconds since 1970.
    made_ms: u64,
}

/// A layer on a device.
#[derive(Serialize, ToSchema)]
struct ProblemView {
    /// Experts of the layer.
    experts: u32,
    /// Experts of a token.
    top_k: u32,
    /// Width of a token.
    hidden: u32,
    /// Width of an expert's intermediate.
    intermediate: u32,
    /// Ranks of the group.
    ranks: u32,
    /// Slots of each rank.
    slots_per_rank: u32,
    /// `bf16` or `nvfp4`.
    act: String,
}

/// The tactic of calls of a size.
#[derive(Serialize, ToSchema)]
struct ChoiceView {
    /// Most tokens of a call.
    tokens: u32,
    /// The tactic.
    tactic: String,
}

/// How long calls took.
#[derive(Serialize, ToSchema)]
struct MeasurementView {
    /// Tokens of a call.
    tokens: u32,
    /// The tactic.
    tactic: String,
    /// Calls that were timed.
    runs: u32,
    /// Median, in microseconds.
    median_us: f32,
    /// What 99 of 100 calls did not exceed, in microseconds.
    p99_us: f32,
    /// When, in milliseconds since 1970.
    measured_ms: u64,
}

/// Who is to choose.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewChooser {
    chooser: Chooser,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// What was measured of a group's tactics, what a policy chose by it, and which workers use that.
#[utoipa::path(get, path = "/api/v1/groups/{group}/tactics", params(("group" = String, Path)),
    responses((status = 200, body = TacticsView), (status = 404, body = Problem)))]
pub(super) async fn tactics(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<TacticsView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    Ok(Json(view(&state, &group).await?))
}

/// Changes who chooses a group's tactics. The policy must be there, decide tactics, and accept its settings; what it chooses by what
/// was measured workers use at once.
#[utoipa::path(put, path = "/api/v1/groups/{group}/tactics", params(("group" = String, Path)),
    request_body = NewChooser, security(("token" = ["operator"])),
    responses((status = 200, body = TacticsView), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn set_chooser(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewChooser>,
) -> Result<Json<TacticsView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewChooser { chooser, reason: why } = new;
    let entry = caller.entry("tactics.set", reason(&why)?);
    let component = policy(&state, &chooser.policy).await?;
    let name = chooser.policy.clone();
    if component.kind() != Kind::Tactics {
        let expected = "a tactics policy".to_owned();
        return Err(ApiError::Value { name: "policy", value: name, expected });
    }
    let accepted = validate(&component, chooser.settings_text()).await;
    accepted.map_err(|verdict| AskError::Verdict { name, verdict })?;
    state.store.set(&group, &chooser, entry).await?;
    Ok(Json(view(&state, &group).await?))
}

async fn view(state: &Whole, group: &str) -> Result<TacticsView, ApiError> {
    let chooser = state.store.setting(group).await?;
    let ranks = state.fleet().tactics(group);
    let here: Vec<_> = ranks.iter().map(|(_, tactics)| tactics.provenance.clone()).collect();
    let chosen = state.store.chosen(group).await?;
    let ranks = ranks.into_iter().map(|(rank, tactics)| {
        let of_rank = chosen.iter().filter(|chosen| {
            chosen.provenance == tactics.provenance && tactics.problems.contains(&chosen.problem)
        });
        let wanted: Vec<_> = of_rank.flat_map(|chosen| chosen.choices.clone()).collect();
        let as_chosen = !wanted.is_empty() && same(&wanted, &tactics.chosen);
        let chosen = tactics.chosen.len();
        let measured_on = tactics.provenance.into();
        RankTactics { rank, measured_on, candidates: tactics.candidates, chosen, as_chosen }
    });
    let ranks = ranks.collect();
    let mut tables = Vec::with_capacity(chosen.len());
    for chosen in chosen {
        let measured = state.store.measurements(&chosen.provenance, &chosen.problem).await?;
        let measurements = measured.into_iter().map(|measured| {
            let protocol::tactics::Measurement { tokens, tactic, runs, .. } = measured;
            let (median_us, p99_us) = (measured.median_us, measured.p99_us);
            let measured_ms = measured.measured_ms;
            MeasurementView { tokens, tactic, runs, median_us, p99_us, measured_ms }
        });
        let of = chosen.problem;
        let choices = chosen.choices.into_iter();
        tables.push(TableView {
            stale: stale(&here, &chosen.provenance),
            measured_on: chosen.provenance.into(),
            problem: ProblemView {
                experts: of.experts,
                top_k: of.top_k,
                hidden: of.hidden,
                intermediate: of.intermediate,
                ranks: of.ranks,
                slots_per_rank: of.slots_per_rank,
                act: of.act.to_string(),
            },
            choices: choices.map(|c| ChoiceView { tokens: c.tokens, tactic: c.tactic }).collect(),
            measurements: measurements.collect(),
            policy: chosen.policy.0,
            policy_digest: chosen.policy.1,
            explanation: chosen.explanation,
            made_ms: chosen.made_ms,
        });
    }
    Ok(TacticsView { chooser, ranks, tables })
}
