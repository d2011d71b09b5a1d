//! Tokens: listed, made, rotated, revoked. A secret is shown once, when it is made.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{JsonOf, Part, PathOf, QueryOf, Reason, reason};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::views::Page;
use crate::access::{Role, new_secret, sha256};
use crate::limits::{COUNT_MAX, TOKEN_NAME_BYTES_MAX};
use crate::state::{Shared, now_ms};
use crate::store::tokens::{NewToken, Token};

/// A token, without its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenView {
    id: u64,
    /// Who it is for.
    name: String,
    role: Role,
    /// Milliseconds since 1970.
    created_ms: u64,
    expires_ms: Option<u64>,
    revoked_ms: Option<u64>,
}

impl From<Token> for TokenView {
    fn from(token: Token) -> Self {
        let Token { id, name, role, created_ms, expires_ms, revoked_ms } = token;
        Self { id, name, role, created_ms, expires_ms, revoked_ms }
    }
}

/// A token that was just made.
#[derive(Serialize, ToSchema)]
pub(super) struct NewTokenView {
    #[serde(flatten)]
    token: TokenView,
    /// What a request brings as `authorization: Bearer SECRET`. It is stored nowhere and shown now only.
    secret: String,
}

/// Who asks.
#[derive(Serialize, ToSchema)]
pub(super) struct SelfView {
    /// The token's name.
    name: String,
    role: Role,
}

/// What token is wanted.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Who it is for; the audit log shows this name.
    name: String,
    /// `worker` is for the sessions of workers.
    role: Role,
    /// Seconds after which it ends; never if absent.
    #[serde(default)]
    expires_after_s: Option<u64>,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// How a token is to be replaced.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rotation {
    /// Seconds for which the old secret still works; none if absent.
    #[serde(default)]
    keep_s: u64,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// An answer that nobody on the way may keep.
type Secret = (StatusCode, [(HeaderName, &'static str); 1], Json<NewTokenView>);

/// Every token, also those that have ended, oldest first.
#[utoipa::path(get, path = "/api/v1/tokens", params(Part), security(("token" = ["admin"])),
    responses((status = 200, body = Page<TokenView>)))]
pub(super) async fn tokens(
    State(state): State<Shared>,
    QueryOf(part): QueryOf<Part>,
) -> Result<Json<Page<TokenView>>, ApiError> {
    let limit = part.limit()?;
    let after = part.cursor()?.unwrap_or(0);
    let found = state.store.tokens(after, limit + 1).await?;
    Ok(Json(Page::of(found, limit, |token| token.id.to_string(), TokenView::from)))
}

/// Who asks.
#[utoipa::path(get, path = "/api/v1/tokens/self", responses((status = 200, body = SelfView)))]
pub(super) async fn own_token(caller: Caller) -> Json<SelfView> {
    Json(SelfView { name: caller.actor.name, role: caller.actor.role })
}

/// Makes a token.
#[utoipa::path(post, path = "/api/v1/tokens", request_body = Wanted,
    security(("token" = ["admin"])), responses((status = 201, body = NewTokenView)))]
pub(super) async fn make(
    State(state): State<Shared>,
    caller: Caller,
    JsonOf(wanted): JsonOf<Wanted>,
) -> Result<Secret, ApiError> {
    let Wanted { name, role, expires_after_s, reason: why } = &wanted;
    let plain = name.chars().all(|c| !c.is_control());
    if name.trim().is_empty() || name.len() > TOKEN_NAME_BYTES_MAX || !plain {
        let value = name.chars().take(TOKEN_NAME_BYTES_MAX).collect();
        let expected = format!("1 to {TOKEN_NAME_BYTES_MAX} printable bytes");
        return Err(ApiError::Value { name: "name", value, expected });
    }
    let expires_ms = match *expires_after_s {
        None => None,
        Some(after) if (1..=COUNT_MAX / 1_000).contains(&after) => Some(now_ms() + after * 1_000),
        Some(after) => {
            let expected = format!("1 to {}", COUNT_MAX / 1_000);
            let (name, value) = ("expires_after_s", after.to_string());
            return Err(ApiError::Value { name, value, expected });
        }
    };
    let secret = new_secret()?;
    let hash = sha256(secret.as_bytes());
    let new = NewToken { name, role: *role, sha256: &hash, expires_ms };
    let entry = caller.entry("token.make", reason(why)?);
    let token = state.store.make_token(new, entry).await?;
    Ok(answer(token, secret))
}

/// Makes a token of the same name and role in place of one, whose secret ends now or a while later.
#[utoipa::path(post, path = "/api/v1/tokens/{id}/rotate", params(("id" = u64, Path)),
    request_body = Rotation, security(("token" = ["admin"])),
    responses((status = 201, body = NewTokenView), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn rotate(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(id): PathOf<u64>,
    JsonOf(rotation): JsonOf<Rotation>,
) -> Result<Secret, ApiError> {
    let Rotation { keep_s, reason: why } = &rotation;
    if *keep_s > COUNT_MAX / 1_000 {
        let expected = format!("0 to {}", COUNT_MAX / 1_000);
        return Err(ApiError::Value { name: "keep_s", value: keep_s.to_string(), expected });
    }
    let secret = new_secret()?;
    let hash = sha256(secret.as_bytes());
    let (until_ms, entry) = (now_ms() + keep_s * 1_000, caller.entry("token.rotate", reason(why)?));
    let token = state.store.rotate_token(id, &hash, until_ms, entry).await;
    Ok(answer(token.map_err(|error| ApiError::end(id, error))?, secret))
}

/// Ends a token now. The last admin's stays: nobody could make another.
#[utoipa::path(post, path = "/api/v1/tokens/{id}/revoke", params(("id" = u64, Path)),
    request_body = Reason, security(("token" = ["admin"])),
    responses((status = 200, body = TokenView), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn revoke(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(id): PathOf<u64>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<TokenView>, ApiError> {
    let entry = caller.entry("token.revoke", reason(&why.reason)?);
    let token = state.store.revoke_token(id, entry).await;
    Ok(Json(token.map_err(|error| ApiError::end(id, error))?.into()))
}

fn answer(token: Token, secret: String) -> Secret {
    let view = NewTokenView { token: token.into(), secret };
    (StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(view))
}
