//! The HTTP API: reads for operators, and the door for workers' sessions. Its OpenAPI document is
//! generated from these handlers; `control/openapi.json` is checked in.

mod balancedness;
mod error;
mod metrics;
mod placements;
mod tag;
mod views;
mod windows;

use std::collections::BTreeMap;
use std::ops::Bound;

use axum::Json;
use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use axum::routing::get;
use protocol::session::SESSION_PATH;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::error::{ApiError, Problem};
use self::views::{GroupView, LayerView, ModelView, Page, WorkerView, layers_of};
use crate::fleet::Worker;
use crate::limits::{MESSAGE_BYTES_MAX, PAGE_DEFAULT, PAGE_MAX};
use crate::session;
use crate::state::{Shared, now_ms};

#[derive(OpenApi)]
#[openapi(
    info(title = "moeplane control", description = "What the control plane sees."),
    components(schemas(Problem))
)]
struct Document;

fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(workers))
        .routes(routes!(worker))
        .routes(routes!(groups))
        .routes(routes!(layers))
        .routes(routes!(models))
        .routes(routes!(placements::placements))
        .routes(routes!(placements::placement))
        .routes(routes!(placements::epochs))
        .routes(routes!(windows::windows, windows::close))
        .routes(routes!(balancedness::balancedness))
        .routes(routes!(metrics::metrics))
        .routes(routes!(healthz))
        .routes(routes!(readyz))
}

/// The OpenAPI document, JSON.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn document() -> Result<String, serde_json::Error> {
    Ok(described().get_openapi().to_pretty_json()? + "\n")
}

pub(crate) fn router(state: Shared) -> Router {
    let (router, document) = described().split_for_parts();
    router
        .route("/api/v1/openapi.json", get(async move || Json(document)))
        .route(SESSION_PATH, get(open_session))
        .fallback(async |uri: axum::http::Uri| ApiError::NotFound {
            what: "path",
            name: uri.path().to_owned(),
        })
        .method_not_allowed_fallback(async || ApiError::Method)
        .with_state(state)
}

/// Extractors whose rejections are problems, too.
#[derive(FromRequestParts)]
#[from_request(via(Path), rejection(ApiError))]
struct PathOf<T>(T);

#[derive(FromRequestParts)]
#[from_request(via(Query), rejection(ApiError))]
struct QueryOf<T>(T);

/// Which part of a list.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Part {
    /// Only workers of this group.
    group: Option<String>,
    /// Most items, 1 to 500.
    limit: Option<usize>,
    /// `next` of the part before.
    cursor: Option<String>,
}

fn checked_limit(limit: Option<usize>) -> Result<usize, ApiError> {
    match limit {
        None => Ok(PAGE_DEFAULT),
        Some(limit) if (1..=PAGE_MAX).contains(&limit) => Ok(limit),
        Some(limit) => {
            let expected = format!("1 to {PAGE_MAX}");
            Err(ApiError::Value { name: "limit", value: limit.to_string(), expected })
        }
    }
}

impl Part {
    /// Group and rank of the last item before the part: `GROUP:RANK`.
    fn after(&self) -> Result<Option<(String, u32)>, ApiError> {
        let Some(cursor) = &self.cursor else { return Ok(None) };
        let place = cursor
            .rsplit_once(':')
            .and_then(|(group, rank)| Some((group.to_owned(), rank.parse().ok()?)));
        place.map(Some).ok_or_else(|| ApiError::cursor(cursor))
    }
}

/// Every worker that has registered, by group and rank.
#[utoipa::path(get, path = "/api/v1/workers", params(Part),
    responses((status = 200, body = Page<WorkerView>), (status = 400, body = Problem)))]
async fn workers(
    State(state): State<Shared>,
    QueryOf(part): QueryOf<Part>,
) -> Result<Json<Page<WorkerView>>, ApiError> {
    let (limit, after) = (checked_limit(part.limit)?, part.after()?);
    let (now, patience) = (now_ms(), state.patience_ms());
    let fleet = state.fleet();
    let from = after.as_ref().map_or(Bound::Unbounded, |(group, _)| Bound::Included(group.clone()));
    let groups = fleet.groups.range::<String, _>((from, Bound::Unbounded));
    let wanted = groups.filter(|(name, _)| part.group.as_ref().is_none_or(|group| group == *name));
    let workers = wanted.flat_map(|(_, ranks)| ranks.values()).filter(|worker| {
        let register = &worker.register;
        after.as_ref().is_none_or(|(group, rank)| register.group != *group || register.rank > *rank)
    });
    let mut found: Vec<_> = workers.take(limit + 1).collect();
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more);
    let next = last.map(|last| format!("{}:{}", last.register.group, last.register.rank));
    let view = |worker: &Worker| WorkerView::new(worker, worker.presence(now, patience));
    Ok(Json(Page { items: found.into_iter().map(view).collect(), next }))
}

/// One worker.
#[utoipa::path(get, path = "/api/v1/workers/{group}/{rank}",
    params(("group" = String, Path), ("rank" = u32, Path)),
    responses((status = 200, body = WorkerView), (status = 404, body = Problem)))]
async fn worker(
    State(state): State<Shared>,
    PathOf((group, rank)): PathOf<(String, u32)>,
) -> Result<Json<WorkerView>, ApiError> {
    let fleet = state.fleet();
    let worker = fleet.groups.get(&group).and_then(|ranks| ranks.get(&rank));
    let none = || ApiError::NotFound { what: "worker", name: format!("{group}/{rank}") };
    let worker = worker.ok_or_else(none)?;
    Ok(Json(WorkerView::new(worker, worker.presence(now_ms(), state.patience_ms()))))
}

/// Every group, and the ranks that it lacks.
#[utoipa::path(get, path = "/api/v1/groups", responses((status = 200, body = Vec<GroupView>)))]
async fn groups(State(state): State<Shared>) -> Json<Vec<GroupView>> {
    let fleet = state.fleet();
    let missing = fleet.missing(now_ms(), state.patience_ms());
    let view = |(name, ranks): (&String, &BTreeMap<u32, Worker>)| {
        let register = &ranks.values().next()?.register;
        let lacks = missing.iter().find(|(group, _)| group == name);
        Some(GroupView {
            name: name.clone(),
            model: register.model.name.clone(),
            digest: register.model.digest.clone(),
            ranks: register.ranks,
            missing: lacks.map(|(_, ranks)| ranks.clone()).unwrap_or_default(),
            problem: fleet.problems.get(name).cloned(),
            layers: register.model.layers.len(),
        })
    };
    Json(fleet.groups.iter().filter_map(view).collect())
}

/// The models that groups serve, by digest.
#[utoipa::path(get, path = "/api/v1/models", responses((status = 200, body = Vec<ModelView>)))]
async fn models(State(state): State<Shared>) -> Json<Vec<ModelView>> {
    let fleet = state.fleet();
    let mut models: BTreeMap<&str, ModelView> = BTreeMap::new();
    for (group, ranks) in &fleet.groups {
        let Some(worker) = ranks.values().next() else { continue };
        let model = &worker.register.model;
        let view = models.entry(&model.digest).or_insert_with(|| ModelView::from(model));
        view.groups.push(group.clone());
    }
    Json(models.into_values().collect())
}

/// The layers of a group's model: those that it serves, and the others with the reason.
#[utoipa::path(get, path = "/api/v1/groups/{group}/layers", params(("group" = String, Path)),
    responses((status = 200, body = Vec<LayerView>), (status = 404, body = Problem)))]
async fn layers(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<Vec<LayerView>>, ApiError> {
    let fleet = state.fleet();
    let model = fleet.model_of(&group);
    let model = model.ok_or(ApiError::NotFound { what: "group", name: group })?;
    Ok(Json(layers_of(model)))
}

/// Whether control itself is well: 200 while its database answers.
#[utoipa::path(get, path = "/healthz",
    responses((status = 200, body = String), (status = 503, body = Problem)))]
async fn healthz(State(state): State<Shared>) -> Result<&'static str, ApiError> {
    state.store.answers().await?;
    Ok("ok\n")
}

/// Whether every group that has registered is whole; otherwise the ranks that are missing.
#[utoipa::path(get, path = "/readyz",
    responses((status = 200, body = String), (status = 503, body = Problem)))]
async fn readyz(State(state): State<Shared>) -> Result<&'static str, ApiError> {
    state.store.answers().await?;
    let missing = state.fleet().missing(now_ms(), state.patience_ms());
    if missing.is_empty() {
        return Ok("ok\n");
    }
    let named = missing.iter().map(|(group, ranks)| format!("group {group} lacks ranks {ranks:?}"));
    Err(ApiError::NotReady { missing: named.collect::<Vec<_>>().join(", ") })
}

/// The door for workers.
async fn open_session(
    State(state): State<Shared>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = bearer.and_then(|value| value.strip_prefix("Bearer "));
    // Digests are compared, so that the time taken says nothing of the credential.
    let same = |token: &str| Sha256::digest(token.as_bytes())[..] == state.credential[..];
    if !token.is_some_and(same) {
        return Err(ApiError::Credential);
    }
    let upgrade = upgrade.map_err(|rejection| ApiError::Value {
        name: "the request",
        value: rejection.to_string(),
        expected: "a WebSocket".to_owned(),
    })?;
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(|socket| session::run(state, socket)))
}

#[cfg(test)]
mod tests {
    /// `moeplane-control openapi > control/openapi.json` makes it anew.
    #[test]
    fn the_document_that_is_checked_in_is_the_one_of_these_handlers() {
        assert!(
            super::document().unwrap() == include_str!("../openapi.json"),
            "openapi.json is stale"
        );
    }
}
