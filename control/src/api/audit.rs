//! The audit log.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::ask::{Part, QueryOf};
use super::error::ApiError;
use super::views::Page;
use crate::state::Shared;
use crate::store::audit::Audited;

/// Something that was changed.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditView {
    id: u64,
    /// When, in milliseconds since 1970.
    at_ms: u64,
    /// Name of the token.
    actor: String,
    /// Role of the token.
    role: String,
    /// What was done, such as `token.revoke`.
    action: String,
    /// To what.
    target: String,
    /// Why.
    reason: String,
    /// What of it was before; null if it was not there.
    #[schema(value_type = Option<Object>)]
    before: Option<Value>,
    /// What of it is after; null if nothing of it is stored.
    #[schema(value_type = Option<Object>)]
    after: Option<Value>,
    /// `x-request-id` of the request, which the log has too.
    request_id: String,
}

impl From<Audited> for AuditView {
    fn from(entry: Audited) -> Self {
        let Audited { id, at_ms, actor, role, action, target, reason, before, after, request_id } =
            entry;
        Self { id, at_ms, actor, role, action, target, reason, before, after, request_id }
    }
}

/// What was changed, by whom and why, newest first.
#[utoipa::path(get, path = "/api/v1/audit", params(Part), security(("token" = ["operator"])),
    responses((status = 200, body = Page<AuditView>)))]
pub(super) async fn audit(
    State(state): State<Shared>,
    QueryOf(part): QueryOf<Part>,
) -> Result<Json<Page<AuditView>>, ApiError> {
    let limit = part.limit()?;
    let before = part.cursor()?.unwrap_or(u64::MAX);
    let found = state.store.audit(before, limit + 1).await?;
    Ok(Json(Page::of(found, limit, |entry| entry.id.to_string(), AuditView::from)))
}
