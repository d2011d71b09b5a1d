//! Entity tags: whoever has read something can ask whether it has changed since.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::error::ApiError;

/// The answer with a tag of its content; 304 without it for who has that already.
pub(super) fn tagged(headers: &HeaderMap, body: &impl Serialize) -> Result<Response, ApiError> {
    let text = serde_json::to_vec(body).map_err(ApiError::Json)?;
    let digest: String =
        Sha256::digest(&text).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let tag = format!("\"{digest}\"");
    let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|all| all.to_str().ok());
    let known = known.flat_map(|all| all.split(',')).any(|one| {
        let one = one.trim();
        one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag
    });
    let json = HeaderValue::from_static("application/json");
    let mut response = match known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(header::CONTENT_TYPE, json)], text).into_response(),
    };
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_it_already_is_told_so() {
        let status = |known: Option<&str>, body: &str| {
            let mut headers = HeaderMap::new();
            if let Some(known) = known {
                headers.insert(header::IF_NONE_MATCH, HeaderValue::from_str(known).unwrap());
            }
            let response = tagged(&headers, &body).unwrap();
            let tag = response.headers()[header::ETAG].to_str().unwrap().to_owned();
            (response.status().as_u16(), tag)
        };
        let (first, tag) = status(None, "a");
        assert_eq!(first, 200);
        let listed = format!("\"x\", W/{tag}");
        for (known, body, expected) in [
            (&tag[..], "a", 304),
            (&listed[..], "a", 304),
            ("*", "a", 304),
            (&tag[..], "b", 200),
            ("\"x\"", "a", 200),
        ] {
            assert_eq!(status(Some(known), body).0, expected, "{known} {body}");
        }
    }
}
