//! What requests share: extractors whose rejections are problems, parts of lists, groups, and reasons.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query};
use protocol::session::Register;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::error::ApiError;
use crate::fleet::Fleet;
use crate::limits::{PAGE_DEFAULT, PAGE_MAX, REASON_BYTES_MAX};

/// Extractors whose rejections are problems.
#[derive(FromRequestParts)]
#[from_request(via(Path), rejection(ApiError))]
pub(super) struct PathOf<T>(pub(super) T);

#[derive(FromRequestParts)]
#[from_request(via(Query), rejection(ApiError))]
pub(super) struct QueryOf<T>(pub(super) T);

#[derive(FromRequest)]
#[from_request(via(Json), rejection(ApiError))]
pub(super) struct JsonOf<T>(pub(super) T);

/// Why something is to be done.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Reason {
    /// Kept in the audit log; not empty.
    pub(super) reason: String,
}

/// A reason that is worth keeping.
pub(super) fn reason(text: &str) -> Result<&str, ApiError> {
    let text = text.trim();
    if text.is_empty() || text.len() > REASON_BYTES_MAX {
        let expected = format!("1 to {REASON_BYTES_MAX} bytes of text");
        let value = format!("{} bytes long", text.len());
        return Err(ApiError::Value { name: "reason", value, expected });
    }
    Ok(text)
}

/// Which part of a list whose cursor is a number.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Part {
    /// Most items, 1 to 500.
    limit: Option<usize>,
    /// `next` of the part before.
    cursor: Option<String>,
}

impl Part {
    pub(super) fn limit(&self) -> Result<usize, ApiError> {
        checked_limit(self.limit)
    }

    pub(super) fn cursor(&self) -> Result<Option<u64>, ApiError> {
        let number = |text: &String| text.parse().map_err(|_no_number| ApiError::cursor(text));
        self.cursor.as_ref().map(number).transpose()
    }
}

/// What one of a group's workers says of itself.
pub(super) fn register_of<'a>(fleet: &'a Fleet, group: &str) -> Result<&'a Register, ApiError> {
    let none = || ApiError::NotFound { what: "group", name: group.to_owned() };
    fleet.register_of(group).ok_or_else(none)
}

pub(super) fn checked_limit(limit: Option<usize>) -> Result<usize, ApiError> {
    match limit {
        None => Ok(PAGE_DEFAULT),
        Some(limit) if (1..=PAGE_MAX).contains(&limit) => Ok(limit),
        Some(limit) => {
            let expected = format!("1 to {PAGE_MAX}");
            Err(ApiError::Value { name: "limit", value: limit.to_string(), expected })
        }
    }
}
