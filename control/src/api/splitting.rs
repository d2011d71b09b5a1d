//! Who decides how tokens are split over replicas.

use axum::Json;
use axum::extract::State;
use policy_host::Kind;
use serde::Deserialize;
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::policies::{AskError, validate};
use crate::registry::policy;
use crate::splitting::Splitting;
use crate::state::Shared;

/// Who is to decide.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSplitting {
    splitting: Splitting,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// Who decides how tokens of a group are split over replicas: a routing policy, or nobody, and they are split evenly.
#[utoipa::path(get, path = "/api/v1/groups/{group}/splitting", params(("group" = String, Path)),
    responses((status = 200, body = Splitting), (status = 404, body = Problem)))]
pub(super) async fn splitting(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<Splitting>, ApiError> {
    register_of(&state.fleet(), &group)?;
    Ok(Json(state.store.setting(&group).await?))
}

/// Changes who decides how tokens are split. The policy must be there, decide splits, and accept its settings; it is asked with every
/// proposal from then on, and what it says is in force with that.
#[utoipa::path(put, path = "/api/v1/groups/{group}/splitting", params(("group" = String, Path)),
    request_body = NewSplitting, security(("token" = ["operator"])),
    responses((status = 200, body = Splitting), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn set_splitting(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewSplitting>,
) -> Result<Json<Splitting>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewSplitting { splitting, reason: why } = new;
    let entry = caller.entry("splitting.set", reason(&why)?);
    if let Some(name) = splitting.policy.clone() {
        let component = policy(&state, &name).await?;
        if component.kind() != Kind::Routing {
            let expected = "a routing policy".to_owned();
            return Err(ApiError::Value { name: "policy", value: name, expected });
        }
        let accepted = validate(&component, splitting.settings_text()).await;
        accepted.map_err(|verdict| AskError::Verdict { name, verdict })?;
    }
    state.store.set(&group, &splitting, entry).await?;
    Ok(Json(splitting))
}
