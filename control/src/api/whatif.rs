//! What would be if ranks were lost.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{PathOf, QueryOf, register_of};
use super::balancedness::{add, each_load};
use super::error::{ApiError, Problem};
use crate::losing::without;
use crate::proposing::expert_bytes;
use crate::state::{Shared, now_ms};
use crate::store::windows::{Of, Span};

/// Which ranks.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Lost {
    /// Ranks that would be lost together, such as `2` or `2,3`.
    lost: String,
}

/// What would be if ranks were lost.
#[derive(Serialize, ToSchema)]
pub(super) struct LossView {
    /// The ranks.
    lost: Vec<u32>,
    /// Experts that no other rank has, over all layers: calls that need them would fail until others have loaded them.
    gone: usize,
    /// Bytes that others would load.
    bytes: u64,
    /// Whether the others have room for all experts of every layer.
    room: bool,
    /// Every layer.
    layers: Vec<LayerLoss>,
}

/// What a layer would be.
#[derive(Serialize, ToSchema)]
struct LayerLoss {
    /// The model's number of the layer.
    layer: u32,
    /// Experts that no other rank has.
    gone: Vec<u32>,
    /// Whether the others have room for all experts.
    room: bool,
    /// Rows of the busiest of the other ranks beside their mean, by the newest window, without the rows of experts that are gone;
    /// null without rows.
    max_over_mean: Option<f64>,
}

/// What would be if ranks of a group were lost: experts without a replica elsewhere, room, and how even the others would be, by what
/// is in force and the newest window. Changes nothing.
#[utoipa::path(get, path = "/api/v1/groups/{group}/whatif", params(("group" = String, Path), Lost),
    responses((status = 200, body = LossView), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn whatif(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(Lost { lost }): QueryOf<Lost>,
) -> Result<Json<LossView>, ApiError> {
    let register = register_of(&state.fleet(), &group)?.clone();
    let parsed: Result<BTreeSet<u32>, _> = lost.split(',').map(str::parse).collect();
    let ranks = parsed.ok().filter(|ranks| ranks.iter().all(|rank| *rank < register.ranks));
    let Some(ranks) = ranks else {
        let expected = format!("ranks, 0 to {}, with commas between them", register.ranks - 1);
        return Err(ApiError::Value { name: "lost", value: lost, expected });
    };
    let of = Of { group: &group, model: &register.model.digest, span: Span::Window };
    let mut loads = BTreeMap::new();
    if let Some(end_ms) = state.store.newest_end(of, state.settled_ms()).await? {
        let newest = (end_ms.saturating_sub(1), end_ms);
        each_load(&state, of, newest, |load| add(&mut loads, &load)).await?;
    }
    let fleet = state.fleet();
    let in_force = fleet.in_force(&group, now_ms(), state.patience_ms());
    let layers: Vec<LayerLoss> = in_force
        .ok_or_else(|| ApiError::nothing_in_force(&group))?
        .iter()
        .map(|placed| {
            let rows = loads.get(&placed.layer).map(Vec::as_slice).unwrap_or_default();
            let loss = without(&placed.placement, &ranks, rows);
            let (layer, max_over_mean) = (placed.layer, loss.max_over_mean);
            LayerLoss { layer, gone: loss.gone, room: loss.room, max_over_mean }
        })
        .collect();
    let sizes = register.model.layers.iter().map(expert_bytes);
    let bytes = layers.iter().zip(sizes).map(|(layer, bytes)| layer.gone.len() as u64 * bytes);
    Ok(Json(LossView {
        lost: ranks.into_iter().collect(),
        gone: layers.iter().map(|layer| layer.gone.len()).sum(),
        bytes: bytes.sum(),
        room: layers.iter().all(|layer| layer.room),
        layers,
    }))
}
