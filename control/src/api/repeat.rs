//! Repeats an answer under its idempotency key instead of doing the same thing twice.

use std::sync::Arc;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::document::reads;
use super::error::ApiError;
use super::gate::Caller;
use crate::access::sha256;
use crate::limits::{COMPONENT_BYTES_MAX, IDEMPOTENCY_KEY_BYTES_MAX, KEYED_AT_ONCE_MAX};
use crate::state::{Shared, now_ms};
use crate::store::answers::Answer;

const KEY: &str = "idempotency-key";
const REPLAYED: &str = "idempotency-replayed";

/// Holds a key while its request runs.
struct Running {
    state: Shared,
    name: (u64, String),
}

impl Running {
    fn begin(state: &Shared, name: (u64, String)) -> Result<Self, ApiError> {
        let mut running = state.running();
        if running.len() >= KEYED_AT_ONCE_MAX {
            return Err(ApiError::TooMany { wait_ms: 1_000 });
        }
        if !running.insert(name.clone()) {
            let reason = "its request is not answered yet".to_owned();
            return Err(ApiError::Conflict { what: KEY, name: name.1, reason });
        }
        Ok(Self { state: Arc::clone(state), name })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.state.running().remove(&self.name);
    }
}

/// The middleware; it stands behind the gate.
pub(super) async fn keyed(
    State(state): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let key = request.headers().get(KEY).map(|key| key.to_str().unwrap_or_default().to_owned());
    let caller = request.extensions().get::<Caller>().map(|caller| caller.actor.token);
    let (Some(key), Some(token), false) = (key, caller, reads(request.method())) else {
        return Ok(next.run(request).await);
    };
    if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES_MAX {
        let value = key.chars().take(IDEMPOTENCY_KEY_BYTES_MAX).collect();
        let expected = format!("1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible characters");
        return Err(ApiError::Value { name: KEY, value, expected });
    }
    let running = Running::begin(&state, (token, key))?;
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, COMPONENT_BYTES_MAX).await.map_err(|error| {
        tracing::debug!(%error, "a body was cut");
        ApiError::Length { max: COMPONENT_BYTES_MAX }
    })?;
    let target = format!("{} {}\n", parts.method, parts.uri);
    let digest = sha256(&[target.as_bytes(), &body].concat());
    if let Some(answer) = state.store.answer(token, &running.name.1).await? {
        return again(&running.name.1, &digest, answer);
    }
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    keep(&running, digest, response).await
}

fn again(key: &str, digest: &str, answer: Answer) -> Result<Response, ApiError> {
    let conflict = |reason: &str| {
        let (name, reason) = (key.to_owned(), reason.to_owned());
        Err(ApiError::Conflict { what: KEY, name, reason })
    };
    if answer.request != digest {
        return conflict("another request had it");
    }
    let Some(body) = answer.body else {
        return conflict("it was answered with a secret, which is not kept");
    };
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let problem = status.is_client_error();
    let kind = if problem { "application/problem+json" } else { "application/json" };
    let headers = [(header::CONTENT_TYPE.as_str(), kind), (REPLAYED, "true")];
    Ok((status, headers, body).into_response())
}

/// Keeps the answer of what was done; after a failure of ours the same key may try again.
async fn keep(
    running: &Running,
    request: String,
    response: Response,
) -> Result<Response, ApiError> {
    let status = response.status();
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Ok(response);
    }
    let (mut parts, body) = response.into_parts();
    let secret = parts.headers.get(header::CACHE_CONTROL).is_some_and(|value| value == "no-store");
    let body: Bytes = match to_bytes(body, usize::MAX).await {
        Ok(body) => body,
        Err(error) => {
            tracing::error!(%error, "an answer could not be read");
            Bytes::new()
        }
    };
    let text = (!secret).then(|| String::from_utf8_lossy(&body).into_owned());
    let answer = Answer { request, status: status.as_u16(), body: text };
    let (token, key) = &running.name;
    running.state.store.keep_answer((*token, key), &answer, now_ms()).await?;
    parts.headers.insert(REPLAYED, HeaderValue::from_static("false"));
    Ok(Response::from_parts(parts, Body::from(body)))
}
