//! How evenly the placement in force spreads a group's load over its ranks.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use protocol::session::LayerPlacement;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{PathOf, QueryOf, register_of};
use super::error::{ApiError, Problem};
use crate::balance::{Balancedness, max_over_mean, rank_tokens};
use crate::limits::{BALANCE_ROWS_MAX, PAGE_MAX};
use crate::state::{Shared, State as Control, now_ms};
use crate::store::windows::{Load, Of, Part, Span};

/// Which load.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// Sum windows (`window`), or hours (`hour`).
    #[serde(default)]
    span: Span,
    /// Only what ended later, in milliseconds since 1970. Without this and `until_ms`, the newest window.
    after_ms: Option<u64>,
    /// Only what did not end later.
    until_ms: Option<u64>,
    /// Only `prefill` or `decode`; both otherwise.
    phase: Option<PhaseName>,
}

/// What engines do.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PhaseName {
    Prefill,
    Decode,
}

impl PhaseName {
    fn is(self, phase: &str) -> bool {
        phase
            == match self {
                Self::Prefill => "prefill",
                Self::Decode => "decode",
            }
    }
}

/// How evenly a group's load is spread over its ranks.
#[derive(Serialize, ToSchema)]
pub(super) struct BalanceView {
    /// When what was summed up began to end, in milliseconds since 1970; exclusive.
    after_ms: u64,
    /// When the last of it ended.
    until_ms: u64,
    /// Every layer that the group serves.
    layers: Vec<LayerBalance>,
    /// Over layers that had traffic; null if none had, or if no placement is in force.
    balancedness: Option<Balancedness>,
    /// The layer whose busiest rank has most beside the mean.
    worst_layer: Option<u32>,
}

/// How evenly a layer's load is spread over ranks.
#[derive(Serialize, ToSchema)]
pub(super) struct LayerBalance {
    /// The model's number of the layer.
    layer: u32,
    /// (token, expert) pairs.
    assignments: u64,
    /// Number of the placement in force; null if none is.
    epoch: Option<u64>,
    /// Pairs of each rank under it, replicas of an expert sharing its pairs evenly.
    rank_assignments: Vec<f64>,
    /// Of the busiest rank, beside the mean over ranks; null without traffic.
    max_over_mean: Option<f64>,
    /// The inverse: the mean over ranks beside the busiest one.
    balancedness: Option<f64>,
}

/// How evenly the placement that is in force now spreads the load of an interval over ranks.
#[utoipa::path(get, path = "/api/v1/groups/{group}/balancedness",
    params(("group" = String, Path), Wanted),
    responses((status = 200, body = BalanceView), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn balancedness(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(wanted): QueryOf<Wanted>,
) -> Result<Json<BalanceView>, ApiError> {
    let model = register_of(&state.fleet(), &group)?.model.digest.clone();
    let of = Of { group: &group, model: &model, span: wanted.span };
    let (after_ms, until_ms) = match (wanted.after_ms, wanted.until_ms) {
        (None, None) => match state.store.newest_end(of, state.settled_ms()).await? {
            Some(end_ms) => (end_ms.saturating_sub(1), end_ms),
            None => (0, 0),
        },
        (after_ms, until_ms) => (after_ms.unwrap_or(0), until_ms.unwrap_or(now_ms())),
    };
    let between = (after_ms, until_ms);
    let mut loads = BTreeMap::new();
    each_load(&state, of, between, |load| {
        if wanted.phase.is_none_or(|only| only.is(&load.phase)) {
            add(&mut loads, &load);
        }
    })
    .await?;
    Ok(Json(judge(&state, &group, between, &loads)))
}

/// Hands on every load of an interval.
pub(super) async fn each_load(
    state: &Control,
    of: Of<'_>,
    (after_ms, until_ms): (u64, u64),
    mut take: impl FnMut(Load),
) -> Result<(), ApiError> {
    let mut part = Part::between(after_ms, until_ms, PAGE_MAX);
    for _ in 0..BALANCE_ROWS_MAX / PAGE_MAX {
        let loads = state.store.loads(of, &part).await?;
        let whole = loads.len() < PAGE_MAX;
        if let Some(last) = loads.last() {
            part.after = (last.end_ms, last.layer, last.phase.clone());
        }
        loads.into_iter().for_each(&mut take);
        if whole {
            return Ok(());
        }
    }
    let (value, expected) = (format!("{after_ms} to {until_ms}"), "a shorter one, or span=hour");
    Err(ApiError::Value { name: "the interval", value, expected: expected.to_owned() })
}

/// Adds the rows of each expert to those of the load's layer.
pub(super) fn add(sums: &mut BTreeMap<u32, Vec<u64>>, load: &Load) {
    let sum = sums.entry(load.layer).or_default();
    sum.resize(load.expert_tokens.len(), 0);
    sum.iter_mut().zip(&load.expert_tokens).for_each(|(sum, count)| *sum += count);
}

/// Holds loads, by layer, against the placement in force.
pub(super) fn judge(
    state: &Control,
    group: &str,
    (after_ms, until_ms): (u64, u64),
    loads: &BTreeMap<u32, Vec<u64>>,
) -> BalanceView {
    let fleet = state.fleet();
    let in_force = fleet.in_force(group, now_ms(), state.patience_ms()).unwrap_or_default();
    let layers = fleet.model_of(group).map(|model| &model.layers[..]).unwrap_or_default();
    let judge = |layer: u32| {
        let placed = in_force.iter().find(|placed| placed.layer == layer);
        let load = loads.get(&layer).map(Vec::as_slice).unwrap_or_default();
        let of_ranks = |placed: &LayerPlacement| rank_tokens(&placed.placement, load);
        let rank_assignments = placed.map(of_ranks).unwrap_or_default();
        let max_over_mean = max_over_mean(&rank_assignments);
        LayerBalance {
            layer,
            assignments: load.iter().sum(),
            epoch: placed.map(|placed| placed.epoch),
            rank_assignments,
            max_over_mean,
            balancedness: max_over_mean.map(f64::recip),
        }
    };
    let layers: Vec<LayerBalance> = layers.iter().map(|layer| judge(layer.number)).collect();
    let judged = || layers.iter().filter_map(|layer| Some((layer.layer, layer.max_over_mean?)));
    let worst = judged().max_by(|a, b| a.1.total_cmp(&b.1));
    let balancedness = Balancedness::of(judged().map(|(_, ratio)| ratio));
    let worst_layer = worst.map(|(layer, _)| layer);
    BalanceView { after_ms, until_ms, layers, balancedness, worst_layer }
}

impl BalanceView {
    pub(super) fn summary(&self) -> Option<Balancedness> {
        self.balancedness
    }
}
