//! Lets requests in: who asks, whether that role may, how often. What a request does is its handler's
//! matter.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State};
use axum::http::{HeaderMap, header, request::Parts};
use axum::middleware::Next;
use axum::response::Response;
use tower_http::request_id::RequestId;

use super::document::Roles;
use super::error::ApiError;
use crate::access::{Actor, sha256};
use crate::state::{Shared, now_ms};
use crate::store::audit::Entry;

#[derive(Clone)]
pub(super) struct Gate {
    pub(super) state: Shared,
    pub(super) roles: Arc<Roles>,
}

/// Who asks, known to every handler behind the gate.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) actor: Actor,
    request_id: String,
}

impl Caller {
    /// An entry of the audit log for what this request does now.
    pub(super) fn entry<'a>(&'a self, action: &'static str, reason: &'a str) -> Entry<'a> {
        let actor = (&self.actor.name[..], self.actor.role);
        Entry::new(actor, action, now_ms(), (reason, &self.request_id))
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or(ApiError::NoToken)
    }
}

/// The bearer token of a request.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// The middleware.
pub(super) async fn pass(
    State(Gate { state, roles }): State<Gate>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let path = request.extensions().get::<MatchedPath>();
    let needed = path.and_then(|path| roles.needed(request.method(), path.as_str()));
    // Outside the document are the workers' sessions, which have their own credential, and the document;
    // probes of the process are open to whoever restarts it.
    let Some(Some(needed)) = needed else { return Ok(next.run(request).await) };
    let actor = match bearer(request.headers()) {
        Some(token) => state.store.actor(&sha256(token.as_bytes()), now_ms()).await?,
        None => None,
    };
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let name = match &actor {
        Some(actor) => format!("token {}", actor.token),
        None => {
            format!("address {}", address.map_or_else(String::new, |peer| peer.ip().to_string()))
        }
    };
    let taken = state.rates().take(&name, now_ms());
    taken.map_err(|wait_ms| ApiError::TooMany { wait_ms })?;
    let actor = actor.ok_or_else(|| match bearer(request.headers()) {
        Some(_) => ApiError::BadToken,
        None => ApiError::NoToken,
    })?;
    if !actor.role.allows(needed) {
        return Err(ApiError::Role { needed: needed.name(), role: actor.role.name() });
    }
    let request_id = request.extensions().get::<RequestId>();
    let request_id = request_id.and_then(|id| id.header_value().to_str().ok());
    let request_id = request_id.unwrap_or_default().to_owned();
    request.extensions_mut().insert(Caller { actor, request_id });
    Ok(next.run(request).await)
}
