//! The OpenAPI document: what the handlers' own descriptions leave out, and the roles read back from it, so
//! that what is documented is what is enforced.

use std::collections::BTreeMap;

use axum::http::Method;
use serde_json::{Value, json};
use utoipa::openapi::OpenApi;

use crate::access::Role;
use crate::limits::IDEMPOTENCY_KEY_BYTES_MAX;

/// Methods that change nothing.
pub(super) fn reads(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Adds what holds for every operation: the role (viewers read, admins do what is not said otherwise), the
/// form of errors, and the key of repetitions.
pub(super) fn completed(document: &OpenApi) -> Result<OpenApi, serde_json::Error> {
    let mut document = serde_json::to_value(document)?;
    document["components"]["securitySchemes"]["token"] = json!({
        "type": "http", "scheme": "bearer",
        "description": "A token of `moeplane-control init` or `POST /api/v1/tokens`; scopes are roles.",
    });
    let paths = document["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    for (method, operation) in paths.filter_map(Value::as_object_mut).flatten() {
        if operation["security"].is_null() {
            let role = if method == "get" { Role::Viewer } else { Role::Admin };
            operation["security"] = json!([{ "token": [role.name()] }]);
        }
        if method != "get" {
            let key = json!({
                "name": "idempotency-key", "in": "header", "required": false,
                "description": "Repeats the answer of the same request, for a day, instead of doing it again.",
                "schema": { "type": "string", "maxLength": IDEMPOTENCY_KEY_BYTES_MAX },
            });
            match operation["parameters"].as_array_mut() {
                Some(parameters) => parameters.push(key),
                None => operation["parameters"] = json!([key]),
            }
        }
        operation["responses"]["default"] = json!({
            "description": "What is wrong, and with which value.",
            "content": {
                "application/problem+json": {
                    "schema": { "$ref": "#/components/schemas/Problem" },
                },
            },
        });
    }
    serde_json::from_value(document)
}

/// The role that each operation needs; none where anybody may ask.
#[derive(Debug, Clone)]
pub(super) struct Roles(BTreeMap<(String, String), Option<Role>>);

impl Roles {
    /// Reads them from a completed document.
    pub(super) fn of(document: &OpenApi) -> Result<Self, serde_json::Error> {
        let document = serde_json::to_value(document)?;
        let mut roles = BTreeMap::new();
        for (path, operations) in document["paths"].as_object().into_iter().flatten() {
            for (method, operation) in operations.as_object().into_iter().flatten() {
                let anybody = operation["security"] == json!([{}]);
                let named = operation["security"][0]["token"][0].as_str().and_then(Role::named);
                let role = if anybody { None } else { Some(named.unwrap_or(Role::Admin)) };
                roles.insert((method.to_uppercase(), path.clone()), role);
            }
        }
        Ok(Self(roles))
    }

    /// What `method` of `path` needs; nothing if the document does not have it.
    pub(super) fn needed(&self, method: &Method, path: &str) -> Option<Option<Role>> {
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        self.0.get(&(method.as_str().to_owned(), path.to_owned())).copied()
    }
}
