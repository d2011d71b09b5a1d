//! The one error that the API answers, as problem+json. What is internal is logged, not returned.

use axum::extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use policy_host::Verdict;
use serde::Serialize;
use utoipa::ToSchema;

use crate::exchange::ExchangeError;
use crate::policies::AskError;
use crate::propose::{OutOfRange, ProposeError};
use crate::proposing::Unaskable;
use crate::store::StoreError;
use crate::store::tokens::EndError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("there is no {what} {name}")]
    NotFound { what: &'static str, name: String },
    #[error("this path does not know the method")]
    Method,
    #[error("{0}")]
    Query(#[from] QueryRejection),
    #[error("{0}")]
    Path(#[from] PathRejection),
    #[error("{}", .0.body_text())]
    Body(#[from] JsonRejection),
    #[error("{}", .0.body_text())]
    Bytes(#[from] BytesRejection),
    #[error("{name} is {value}, expected {expected}")]
    Value { name: &'static str, value: String, expected: String },
    #[error("the workers' credential is missing or wrong")]
    Credential,
    #[error("there is no token, expected the header authorization: Bearer TOKEN")]
    NoToken,
    #[error("the token is unknown, has expired, or was revoked")]
    BadToken,
    #[error("the token has the role {role}, expected {needed}")]
    Role { needed: &'static str, role: &'static str },
    #[error("too many requests, expected none for {wait_ms} ms")]
    TooMany { wait_ms: u64 },
    #[error("the body is longer than expected, at most {max} bytes")]
    Length { max: usize },
    #[error("{what} {name}: {reason}")]
    Conflict { what: &'static str, name: String, reason: String },
    #[error("{0}")]
    Exchange(#[from] ExchangeError),
    #[error("{0}")]
    Policy(#[from] AskError),
    #[error("there are no random numbers")]
    Random(#[from] getrandom::Error),
    #[error("not every rank is there: {missing}")]
    NotReady { missing: String },
    #[error("the database does not answer")]
    Store(#[from] StoreError),
    #[error("the answer cannot be written")]
    Json(#[source] serde_json::Error),
    #[error("the answer cannot be written")]
    Text(#[source] std::fmt::Error),
}

/// What is wrong (RFC 9457).
#[derive(Serialize, ToSchema)]
pub(crate) struct Problem {
    /// Always `about:blank`: `code` says what it is.
    r#type: &'static str,
    /// As in the status line.
    status: u16,
    /// Stable, for programs.
    code: &'static str,
    /// For people: names the value, and what was expected.
    title: String,
}

impl ApiError {
    /// Why a token does not end.
    pub(crate) fn end(id: u64, error: EndError) -> Self {
        let name = id.to_string();
        match error {
            EndError::Store(error) => Self::Store(error),
            EndError::None => Self::NotFound { what: "token", name },
            error => Self::Conflict { what: "token", name, reason: error.to_string() },
        }
    }

    pub(crate) fn cursor(value: &str) -> Self {
        let expected = "`next` of the part before".to_owned();
        Self::Value { name: "cursor", value: value.to_owned(), expected }
    }

    /// No placement is in force in a group.
    pub(crate) fn nothing_in_force(group: &str) -> Self {
        let (name, reason) = (group.to_owned(), Unaskable::NothingInForce.to_string());
        Self::Conflict { what: "group", name, reason }
    }

    /// Why nothing was proposed for a group.
    pub(crate) fn propose(group: &str, error: ProposeError) -> Self {
        let name = group.to_owned();
        match error {
            ProposeError::NoGroup { .. } => Self::NotFound { what: "group", name },
            ProposeError::Unaskable(error) => {
                Self::Conflict { what: "group", name, reason: error.to_string() }
            }
            ProposeError::Ask(error) => Self::Policy(error),
            ProposeError::Store(error) => Self::Store(error),
            ProposeError::Json(error) => Self::Json(error),
        }
    }

    fn kind(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NotFound { .. } => (StatusCode::NOT_FOUND, "not_found"),
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, "method"),
            Self::Query(_) => (StatusCode::BAD_REQUEST, "query"),
            Self::Path(_) => (StatusCode::BAD_REQUEST, "path"),
            Self::Bytes(rejection) => (rejection.status(), "body"),
            Self::Body(rejection) => (rejection.status(), "body"),
            Self::Value { .. } => (StatusCode::BAD_REQUEST, "value"),
            Self::Credential => (StatusCode::UNAUTHORIZED, "credential"),
            Self::NoToken | Self::BadToken => (StatusCode::UNAUTHORIZED, "token"),
            Self::Role { .. } => (StatusCode::FORBIDDEN, "role"),
            Self::TooMany { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate"),
            Self::Length { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "body"),
            Self::Conflict { .. } => (StatusCode::CONFLICT, "conflict"),
            Self::Policy(AskError::Unknown { .. }) => (StatusCode::NOT_FOUND, "not_found"),
            Self::Policy(AskError::Store(_)) => (StatusCode::SERVICE_UNAVAILABLE, "database"),
            Self::Policy(AskError::Absent { .. }) => (StatusCode::CONFLICT, "policy_absent"),
            Self::Policy(AskError::Verdict { verdict, .. }) => match verdict {
                Verdict::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, "policy_busy"),
                Verdict::Declined { .. } => (StatusCode::CONFLICT, "policy_declined"),
                _ => (StatusCode::UNPROCESSABLE_ENTITY, "policy"),
            },
            Self::Exchange(_) => (StatusCode::UNPROCESSABLE_ENTITY, "placement"),
            Self::Random(_) => (StatusCode::INTERNAL_SERVER_ERROR, "random"),
            Self::NotReady { .. } => (StatusCode::SERVICE_UNAVAILABLE, "not_ready"),
            Self::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "database"),
            Self::Json(_) | Self::Text(_) => (StatusCode::INTERNAL_SERVER_ERROR, "answer"),
        }
    }
}

impl From<OutOfRange> for ApiError {
    fn from(OutOfRange { name, value, expected }: OutOfRange) -> Self {
        Self::Value { name, value, expected }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code) = self.kind();
        if status.is_server_error() && code != "not_ready" {
            tracing::error!(error = &self as &dyn std::error::Error, "a request failed");
        }
        let title = self.to_string();
        let problem = Problem { r#type: "about:blank", status: status.as_u16(), code, title };
        let mut response = (status, axum::Json(problem)).into_response();
        let problem_json = HeaderValue::from_static("application/problem+json");
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, problem_json);
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Self::TooMany { wait_ms } = self {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait_ms.div_ceil(1_000)));
        }
        response
    }
}
