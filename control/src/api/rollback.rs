//! Back to a placement that was: of layers by their epochs, or of everything that is on its way.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::exchange::ImportedView;
use super::gate::Caller;
use crate::state::{Shared, State as Whole, now_ms};
use crate::store::placements::RollbackError;

/// What is to be as it was.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rollback {
    /// Layers and the epochs whose placements they are to have again. If absent, every layer is to keep what is in force:
    /// what is on its way is given up.
    layers: Option<Vec<To>>,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// A layer, and a placement that it had.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct To {
    /// The model's number of the layer.
    layer: u32,
    /// The epoch of the placement.
    epoch: u64,
}

/// Commits placements that were committed before under new epochs: ranks go back to them as they take up any other. Where one
/// is ready for what is on its way, all take that up first.
#[utoipa::path(post, path = "/api/v1/groups/{group}/rollback", params(("group" = String, Path)),
    request_body = Rollback, security(("token" = ["operator"])),
    responses((status = 200, body = Vec<ImportedView>), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn roll_back(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(rollback): JsonOf<Rollback>,
) -> Result<Json<Vec<ImportedView>>, ApiError> {
    let register = register_of(&state.fleet(), &group)?.clone();
    let entry = caller.entry("placements.rollback", reason(&rollback.reason)?);
    let to = match rollback.layers {
        Some(layers) => layers.into_iter().map(|to| (to.layer, to.epoch)).collect(),
        None => in_force(&state, &group)?,
    };
    let done = state.store.roll_back(&register, &to, entry).await.map_err(|error| match error {
        RollbackError::Store(error) => ApiError::Store(error),
        error => ApiError::Conflict { what: "group", name: group, reason: error.to_string() },
    })?;
    Ok(Json(done.into_iter().map(ImportedView::from).collect()))
}

/// Layers and epochs in force.
fn in_force(state: &Whole, group: &str) -> Result<Vec<(u32, u64)>, ApiError> {
    let fleet = state.fleet();
    let placed = fleet.in_force(group, now_ms(), state.patience_ms());
    let placed = placed.ok_or_else(|| ApiError::nothing_in_force(group))?;
    Ok(placed.iter().map(|layer| (layer.layer, layer.epoch)).collect())
}
