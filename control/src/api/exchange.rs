//! Placements in the forms of vLLM-Ascend, TensorRT-LLM, SGLang and DeepSeek, out and in.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use protocol::placement::Placement;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::exchange::{Form, read, write};
use crate::state::{Shared, now_ms};
use crate::store::placements::Imported;

/// In which form.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Export {
    /// `vllm-ascend`, `tensorrt-llm`, `sglang` or `deepseek`.
    format: Form,
}

/// Placements to be taken over.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Import {
    /// `vllm-ascend`, `tensorrt-llm`, `sglang` or `deepseek`.
    format: Form,
    /// The file's text.
    text: String,
    /// Only checks it, and says what would change.
    #[serde(default)]
    dry_run: bool,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// A layer after an import.
#[derive(Serialize, ToSchema)]
pub(super) struct ImportedView {
    /// The model's number of the layer.
    layer: u32,
    /// The epoch that it has, or would have.
    epoch: u64,
    /// Whether the placement is another than the newest that was committed before.
    changed: bool,
}

impl From<Imported> for ImportedView {
    fn from(imported: Imported) -> Self {
        let Imported { layer, epoch, changed } = imported;
        Self { layer, epoch, changed }
    }
}

/// What is in force in a group, in the form of another engine: YAML for TensorRT-LLM, otherwise JSON.
#[utoipa::path(get, path = "/api/v1/groups/{group}/export", params(("group" = String, Path), Export),
    responses((status = 200, body = String), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn export(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(Export { format }): QueryOf<Export>,
) -> Result<Response, ApiError> {
    let text = {
        let fleet = state.fleet();
        let register = register_of(&fleet, &group)?;
        let in_force = fleet.in_force(&group, now_ms(), state.patience_ms());
        let in_force = in_force.ok_or_else(|| ApiError::Conflict {
            what: "group",
            name: group.clone(),
            reason: "no placement is in force, expected one that all ranks hold".to_owned(),
        })?;
        let layers: Vec<(u32, &Placement)> =
            in_force.iter().map(|placed| (placed.layer, &placed.placement)).collect();
        write(format, register.ranks, &layers)?
    };
    let kind = match format {
        Form::TensorrtLlm => "application/yaml",
        _ => "application/json",
    };
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Commits placements that are in the form of another engine: every layer of the group, or nothing. Its
/// ranks take them up while calls go on, or when all of them start again where they cannot.
#[utoipa::path(post, path = "/api/v1/groups/{group}/import", params(("group" = String, Path)),
    request_body = Import, security(("token" = ["operator"])),
    responses((status = 200, body = Vec<ImportedView>), (status = 404, body = Problem),
        (status = 422, body = Problem)))]
pub(super) async fn import(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(import): JsonOf<Import>,
) -> Result<Json<Vec<ImportedView>>, ApiError> {
    let register = register_of(&state.fleet(), &group)?.clone();
    let placements = read(import.format, &import.text, &register)?;
    let entry = caller.entry("placements.import", reason(&import.reason)?);
    let imported = state.store.import(&register, placements, import.dry_run, entry).await?;
    Ok(Json(imported.into_iter().map(ImportedView::from).collect()))
}
