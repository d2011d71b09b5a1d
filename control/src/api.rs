//! The HTTP API: reads for operators, and the door for workers' sessions. Its OpenAPI document is
//! generated from these handlers; `control/openapi.json` is checked in.

mod ask;
mod audit;
mod balancedness;
mod balancing;
mod constraints;
mod document;
mod error;
mod events;
mod exchange;
mod gate;
mod metrics;
mod migration;
mod placements;
mod policies;
mod proposals;
mod recovery;
mod repeat;
mod rollback;
mod shadows;
mod splitting;
mod tactics;
mod tag;
mod tokens;
mod views;
mod whatif;
mod windows;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderName};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router, middleware};
use protocol::session::SESSION_PATH;
use serde::Deserialize;
use tower_http::request_id::{
    MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer,
};
use tower_http::trace::TraceLayer;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::ask::{PathOf, QueryOf, checked_limit, register_of};
use self::document::Roles;
use self::error::{ApiError, Problem};
use self::gate::Gate;
use self::views::{GroupView, LayerView, ModelView, Page, WorkerView, layers_of};
use crate::access::{Role, sha256};
use crate::fleet::Worker;
use crate::limits::{COMPONENT_BYTES_MAX, MESSAGE_BYTES_MAX};
use crate::session;
use crate::state::{Shared, now_ms};

#[derive(OpenApi)]
#[openapi(
    info(title = "moeplane control", description = "What the control plane sees."),
    components(schemas(Problem))
)]
struct Document;

/// The router, and what it is described by.
fn described() -> Result<(Router<Shared>, utoipa::openapi::OpenApi), serde_json::Error> {
    let (router, document) = handlers().split_for_parts();
    Ok((router, document::completed(&document)?))
}

fn handlers() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(workers))
        .routes(routes!(worker))
        .routes(routes!(groups))
        .routes(routes!(layers))
        .routes(routes!(models))
        .routes(routes!(placements::placements))
        .routes(routes!(placements::placement))
        .routes(routes!(placements::epochs))
        .routes(routes!(proposals::proposals, proposals::propose))
        .routes(routes!(proposals::proposal))
        .routes(routes!(proposals::approve))
        .routes(routes!(proposals::reject))
        .routes(routes!(proposals::tradeoffs))
        .routes(routes!(balancing::balancing, balancing::set))
        .routes(routes!(whatif::whatif))
        .routes(routes!(constraints::constraints, constraints::set_constraints))
        .routes(routes!(recovery::recovery, recovery::set_recovery))
        .routes(routes!(shadows::shadows, shadows::set_shadows))
        .routes(routes!(splitting::splitting, splitting::set_splitting))
        .routes(routes!(tactics::tactics, tactics::set_chooser))
        .routes(routes!(policies::policies))
        .routes(routes!(policies::policy))
        .routes(routes!(policies::component))
        .routes(routes!(policies::activate))
        .routes(routes!(policies::roll_back))
        .merge(uploads())
        .routes(routes!(migration::migration, migration::set_pace))
        .routes(routes!(rollback::roll_back))
        .routes(routes!(exchange::export))
        .routes(routes!(exchange::import))
        .routes(routes!(windows::windows, windows::close))
        .routes(routes!(balancedness::balancedness))
        .routes(routes!(metrics::metrics))
        .routes(routes!(tokens::tokens, tokens::make))
        .routes(routes!(tokens::own_token))
        .routes(routes!(tokens::rotate))
        .routes(routes!(tokens::revoke))
        .routes(routes!(audit::audit))
        .routes(routes!(events::events))
        .routes(routes!(healthz))
        .routes(routes!(readyz))
}

/// What has a longer body than others.
fn uploads() -> OpenApiRouter<Shared> {
    let longer = DefaultBodyLimit::max(COMPONENT_BYTES_MAX);
    OpenApiRouter::new().routes(routes!(policies::upload)).layer(longer)
}

/// The OpenAPI document, JSON.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn document() -> Result<String, serde_json::Error> {
    Ok(described()?.1.to_pretty_json()? + "\n")
}

/// The whole API.
///
/// # Errors
/// When its document cannot be made.
pub(crate) fn router(state: Shared) -> Result<Router, serde_json::Error> {
    let (router, document) = described()?;
    let roles = Arc::new(Roles::of(&document)?);
    let gate = Gate { state: Arc::clone(&state), roles };
    let id = HeaderName::from_static("x-request-id");
    let span = |request: &axum::extract::Request| {
        let id = request.extensions().get::<RequestId>();
        let id = id.and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
        tracing::info_span!("request", id, method = %request.method(), path = request.uri().path())
    };
    // The last is the first that a request meets.
    Ok(router
        .route("/api/v1/openapi.json", get(async move || Json(document)))
        .route(SESSION_PATH, get(open_session))
        .fallback(async |uri: axum::http::Uri| ApiError::NotFound {
            what: "path",
            name: uri.path().to_owned(),
        })
        .method_not_allowed_fallback(async || ApiError::Method)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), repeat::keyed))
        .layer(middleware::from_fn_with_state(gate, gate::pass))
        .layer(DefaultBodyLimit::max(MESSAGE_BYTES_MAX))
        .layer(TraceLayer::new_for_http().make_span_with(span))
        .layer(PropagateRequestIdLayer::new(id.clone()))
        .layer(SetRequestIdLayer::new(id, MakeRequestUuid))
        .with_state(state))
}

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
    let found = workers.take(limit + 1).collect();
    let cursor = |last: &&Worker| format!("{}:{}", last.register.group, last.register.rank);
    let view = |worker: &Worker| WorkerView::new(worker, worker.presence(now, patience));
    Ok(Json(Page::of(found, limit, cursor, view)))
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
    Ok(Json(layers_of(&register_of(&fleet, &group)?.model)))
}

/// Whether control itself is well: 200 while its database answers.
#[utoipa::path(get, path = "/healthz", security(()),
    responses((status = 200, body = String), (status = 503, body = Problem)))]
async fn healthz(State(state): State<Shared>) -> Result<&'static str, ApiError> {
    state.store.answers().await?;
    Ok("ok\n")
}

/// Whether every group that has registered is whole; otherwise the ranks that are missing.
#[utoipa::path(get, path = "/readyz", security(()),
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
    let hash = gate::bearer(&headers).map(|token| sha256(token.as_bytes()));
    let hash = hash.ok_or(ApiError::Credential)?;
    let actor = state.store.actor(&hash, now_ms()).await?;
    if !actor.is_some_and(|actor| actor.role == Role::Worker) {
        return Err(ApiError::Credential);
    }
    let upgrade = upgrade.map_err(|rejection| ApiError::Value {
        name: "the request",
        value: rejection.to_string(),
        expected: "a WebSocket".to_owned(),
    })?;
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX);
    let place = Arc::clone(&state.sessions).try_acquire_owned();
    let place = place.map_err(|_all_taken| ApiError::TooMany { wait_ms: 1_000 })?;
    Ok(upgrade.on_upgrade(async move |socket| {
        session::run(state, socket, hash).await;
        drop(place);
    }))
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
