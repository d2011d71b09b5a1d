//! What plans for a group have to keep.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::constraints::Constraints;
use crate::state::Shared;

/// What is to be kept.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewConstraints {
    constraints: Constraints,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// What every plan for a group has to keep: ranks that are to leave, speeds of ranks, and pins of experts.
#[utoipa::path(get, path = "/api/v1/groups/{group}/constraints", params(("group" = String, Path)),
    responses((status = 200, body = Constraints), (status = 404, body = Problem)))]
pub(super) async fn constraints(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<Constraints>, ApiError> {
    register_of(&state.fleet(), &group)?;
    Ok(Json(state.store.setting(&group).await?))
}

/// Changes what plans for a group have to keep. Nothing moves by that: the next proposal does what is needed.
#[utoipa::path(put, path = "/api/v1/groups/{group}/constraints", params(("group" = String, Path)),
    request_body = NewConstraints, security(("token" = ["operator"])),
    responses((status = 200, body = Constraints), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn set_constraints(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewConstraints>,
) -> Result<Json<Constraints>, ApiError> {
    let register = register_of(&state.fleet(), &group)?.clone();
    let NewConstraints { constraints, reason: why } = new;
    let entry = caller.entry("constraints.set", reason(&why)?);
    constraints.check(&register)?;
    state.store.set(&group, &constraints, entry).await?;
    Ok(Json(constraints))
}
