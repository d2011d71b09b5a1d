//! Policies: versions that were uploaded beside those that come with moeplane, which of them names stand for, and what went wrong
//! with them.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use policy_host::{Component, shipped};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, Reason, reason};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::limits::VERDICTS_SHOWN;
use crate::policies::AskError;
use crate::registry::{
    Outcome, Tried, described, is_digest, is_shipped, key, policy as policy_of, try_on_groups,
};
use crate::state::{Shared, State as Whole, now_ms};
use crate::store::policies::{Active, Failed, RegistryError, Uploaded};

/// Who uploaded what comes with moeplane.
const SHIPPED: &str = "moeplane";

/// A policy, and its versions.
#[derive(Serialize, ToSchema)]
pub(super) struct PolicyView {
    /// What it is asked for by.
    name: String,
    /// What it decides: `placement`, `routing` or `tactics`.
    kind: String,
    /// Digest of the version that the name stands for; null if none is activated, or it is absent.
    active: Option<String>,
    /// Newest first.
    versions: Vec<VersionView>,
}

/// A version of a policy.
#[derive(Clone, Serialize, ToSchema)]
struct VersionView {
    /// SHA-256 of the component.
    digest: String,
    /// The policy's own words.
    version: String,
    /// What it does, in a sentence of its own.
    summary: String,
    /// JSON Schema of its settings, as text.
    settings_schema: String,
    /// Whether the name stands for it.
    active: bool,
    /// Whether it comes with moeplane.
    shipped: bool,
    /// When it was uploaded, in milliseconds since 1970; null for one that comes with moeplane.
    uploaded_ms: Option<u64>,
    /// Who uploaded it.
    actor: String,
}

/// A policy with what went wrong with it.
#[derive(Serialize, ToSchema)]
pub(super) struct PolicyInFull {
    #[serde(flatten)]
    policy: PolicyView,
    /// The newest calls that gave no usable answer, newest first.
    verdicts: Vec<VerdictView>,
}

/// A call of a policy that gave no usable answer.
#[derive(Serialize, ToSchema)]
struct VerdictView {
    /// When, in milliseconds since 1970.
    at_ms: u64,
    /// Which version.
    digest: String,
    /// The group that it was asked about.
    group: String,
    /// What went wrong, with its limit where there is one.
    #[schema(value_type = Object)]
    verdict: serde_json::Value,
    /// The same in words.
    text: String,
}

/// A version that was uploaded, and what it would do.
#[derive(Serialize, ToSchema)]
pub(super) struct UploadedView {
    /// SHA-256 of the component.
    digest: String,
    /// What it is asked for by once it is activated.
    name: String,
    /// What it decides: `placement`, `routing` or `tactics`.
    kind: String,
    /// The policy's own words.
    version: String,
    /// Whether it was not there before.
    new: bool,
    /// What it would do with each group now; nothing for a policy that decides something else than placements.
    tried: Vec<TriedView>,
}

/// What a policy would do with a group.
#[derive(Serialize, ToSchema)]
struct TriedView {
    /// The group.
    group: String,
    /// Whether the group is balanced by the policy's name, and so with its own settings.
    uses: bool,
    /// Layers that would change; null if there is no plan.
    layers: Option<usize>,
    /// The policy's own words.
    explanation: Option<String>,
    /// Units of fuel that the plan took.
    fuel: Option<u64>,
    /// Why there is no plan.
    problem: Option<String>,
}

impl From<Tried> for TriedView {
    fn from(Tried { group, uses, outcome }: Tried) -> Self {
        let (plan, problem) = match outcome {
            Outcome::Plan(answer) => (Some(answer), None),
            Outcome::Verdict(verdict) => (None, Some(verdict.to_string())),
            Outcome::Unaskable(reason) => (None, Some(reason)),
        };
        let layers = plan.as_ref().map(|plan| plan.value.changes.len());
        let fuel = plan.as_ref().map(|plan| plan.fuel);
        let explanation = plan.map(|plan| plan.value.explanation);
        Self { group, uses, layers, explanation, fuel, problem }
    }
}

/// Why something is changed.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Why {
    /// Kept in the audit log; not empty.
    reason: String,
}

/// Every policy by name: those that come with moeplane, and those that were uploaded.
#[utoipa::path(get, path = "/api/v1/policies", responses((status = 200, body = Vec<PolicyView>)))]
pub(super) async fn policies(
    State(state): State<Shared>,
) -> Result<Json<Vec<PolicyView>>, ApiError> {
    let uploaded = state.store.policies().await?;
    let mut by_name: BTreeMap<String, Vec<Uploaded>> = BTreeMap::new();
    for version in uploaded {
        by_name.entry(version.name.clone()).or_default().push(version);
    }
    for (name, _) in shipped::POLICIES {
        by_name.entry(name.to_owned()).or_default();
    }
    let mut found = Vec::with_capacity(by_name.len());
    for (name, versions) in by_name {
        found.push(view(&state, name, versions).await?);
    }
    Ok(Json(found))
}

/// One policy, by its name or the digest of a version, with what went wrong with it.
#[utoipa::path(get, path = "/api/v1/policies/{policy}", params(("policy" = String, Path)),
    responses((status = 200, body = PolicyInFull), (status = 404, body = Problem)))]
pub(super) async fn policy(
    State(state): State<Shared>,
    PathOf(of): PathOf<String>,
) -> Result<Json<PolicyInFull>, ApiError> {
    Ok(Json(in_full(&state, name_of(&state, &of).await?).await?))
}

/// The component of a version that was uploaded, by its digest.
#[utoipa::path(get, path = "/api/v1/policies/{policy}/component", params(("policy" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/wasm"),
        (status = 404, body = Problem)))]
pub(super) async fn component(
    State(state): State<Shared>,
    PathOf(digest): PathOf<String>,
) -> Result<Response, ApiError> {
    let none = || ApiError::NotFound { what: "uploaded version", name: digest.clone() };
    let component = state.store.component(&digest).await?.ok_or_else(none)?;
    Ok(([(header::CONTENT_TYPE, "application/wasm")], component).into_response())
}

/// Uploads a version: a component of the contract, which is checked, compiled and tried on examples and on every group. It is
/// not asked by its name before it is activated; by its digest it may be asked at once. The same component again changes nothing.
#[utoipa::path(post, path = "/api/v1/policies", params(Why),
    request_body(content = Vec<u8>, content_type = "application/wasm"),
    security(("token" = ["operator"])),
    responses((status = 201, body = UploadedView), (status = 200, body = UploadedView),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn upload(
    State(state): State<Shared>,
    caller: Caller,
    QueryOf(why): QueryOf<Why>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let entry = caller.entry("policy.upload", reason(&why.reason)?);
    let body = body?;
    let loaded = state.policies.load(body.to_vec()).await;
    let component = loaded.map_err(|verdict| {
        let name = "that was uploaded".to_owned();
        ApiError::Policy(AskError::Verdict { name, verdict })
    })?;
    let version = described(&component, entry.who().0, entry.at_ms);
    let shipped = shipped::POLICIES.iter().find(|(name, _)| *name == version.name);
    if let Some((_, kind)) = shipped.filter(|(_, kind)| *kind != component.kind()) {
        let (found, expected) = (version.kind, kind.world().to_owned());
        return Err(registry(version.name, RegistryError::Kind { found, expected }));
    }
    let kept = state.store.keep_policy(&version, &body, entry).await;
    let new = kept.map_err(|error| registry(version.name.clone(), error))?;
    let tried = tried(&state, &component).await?.into_iter().map(TriedView::from).collect();
    let Uploaded { digest, name, kind, described, .. } = version;
    let view = UploadedView { digest, name, kind, version: described.version, new, tried };
    Ok((if new { StatusCode::CREATED } else { StatusCode::OK }, Json(view)).into_response())
}

/// Has a policy's name stand for a version, by its digest. It is tried before: groups that are balanced by the name must get
/// plans with the settings that they have.
#[utoipa::path(post, path = "/api/v1/policies/{policy}/activate", params(("policy" = String, Path)),
    request_body = Reason, security(("token" = ["operator"])),
    responses((status = 200, body = PolicyInFull), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn activate(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(digest): PathOf<String>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<PolicyInFull>, ApiError> {
    let entry = caller.entry("policy.activate", reason(&why.reason)?);
    if !is_digest(&digest) {
        let expected = "the digest of a version, 64 hexadecimal digits".to_owned();
        return Err(ApiError::Value { name: "policy", value: digest, expected });
    }
    let component = policy_of(&state, &digest).await?;
    let name = key(&component.info().name);
    let obstacles = tried(&state, &component).await?;
    if let Some(reason) = obstacles.iter().find_map(Tried::obstacle) {
        return Err(ApiError::Conflict { what: "policy", name, reason });
    }
    let version = match state.store.policy(&digest).await? {
        Some(_) => Active::Uploaded(digest),
        None => Active::Shipped,
    };
    state.store.activate(&name, &version, entry).await?;
    Ok(Json(in_full(&state, name).await?))
}

/// Has a policy's name stand for what it stood for before it was activated last.
#[utoipa::path(post, path = "/api/v1/policies/{policy}/rollback", params(("policy" = String, Path)),
    request_body = Reason, security(("token" = ["operator"])),
    responses((status = 200, body = PolicyInFull), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub(super) async fn roll_back(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(of): PathOf<String>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<PolicyInFull>, ApiError> {
    let entry = caller.entry("policy.rollback", reason(&why.reason)?);
    let name = name_of(&state, &of).await?;
    let undone = state.store.deactivate(&name, entry).await;
    undone.map_err(|error| registry(name.clone(), error))?;
    Ok(Json(in_full(&state, name).await?))
}

fn registry(name: String, error: RegistryError) -> ApiError {
    match error {
        RegistryError::Store(error) => ApiError::Store(error),
        error => ApiError::Conflict { what: "policy", name, reason: error.to_string() },
    }
}

async fn tried(state: &Whole, policy: &std::sync::Arc<Component>) -> Result<Vec<Tried>, ApiError> {
    match policy.kind() {
        policy_host::Kind::Placement => Ok(try_on_groups(state, policy).await?),
        policy_host::Kind::Routing | policy_host::Kind::Tactics => Ok(Vec::new()),
    }
}

/// The name that a name or a digest is of.
async fn name_of(state: &Whole, of: &str) -> Result<String, ApiError> {
    if is_digest(of) {
        return Ok(key(&policy_of(state, of).await?.info().name));
    }
    let name = key(of);
    let uploaded = state.store.policies().await?;
    if is_shipped(&name) || uploaded.iter().any(|version| version.name == name) {
        return Ok(name);
    }
    Err(ApiError::NotFound { what: "policy", name })
}

async fn in_full(state: &Whole, name: String) -> Result<PolicyInFull, ApiError> {
    let verdicts = state.store.verdicts(&name, VERDICTS_SHOWN).await?;
    let verdicts = verdicts.into_iter().map(VerdictView::try_from).collect::<Result<_, _>>()?;
    let uploaded = state.store.policies().await?;
    let versions = uploaded.into_iter().filter(|version| version.name == name).collect();
    Ok(PolicyInFull { policy: view(state, name, versions).await?, verdicts })
}

impl TryFrom<Failed> for VerdictView {
    type Error = ApiError;

    fn try_from(Failed { at_ms, digest, group_name, verdict }: Failed) -> Result<Self, ApiError> {
        let of: policy_host::Verdict = serde_json::from_str(&verdict).map_err(ApiError::Json)?;
        let verdict = serde_json::from_str(&verdict).map_err(ApiError::Json)?;
        let at_ms = at_ms.unsigned_abs();
        Ok(Self { at_ms, digest, group: group_name, verdict, text: of.to_string() })
    }
}

/// A policy with its uploaded versions, and the one that comes with moeplane if there is one.
async fn view(
    state: &Whole,
    name: String,
    uploaded: Vec<Uploaded>,
) -> Result<PolicyView, ApiError> {
    let active = state.store.active(&name).await?;
    let mut versions: Vec<VersionView> = Vec::with_capacity(uploaded.len() + 1);
    let known = shipped::POLICIES.iter().find(|(known, _)| *known == name);
    let kind = uploaded.first().map(|version| version.kind.clone());
    let kind = kind.or(known.map(|(_, kind)| kind.world().to_owned())).unwrap_or_default();
    for version in uploaded {
        let is = active.as_ref().and_then(Active::digest) == Some(&version.digest[..]);
        let uploaded_ms = Some(version.uploaded_ms);
        versions.push(VersionView { active: is, uploaded_ms, ..version.into() });
    }
    if known.is_some()
        && let Ok(shipped) = state.policies.shipped(&name).await
    {
        let active = active.as_ref().and_then(Active::digest).is_none();
        let version = described(&shipped, SHIPPED, now_ms());
        let (shipped, uploaded_ms) = (true, None);
        versions.push(VersionView { active, shipped, uploaded_ms, ..version.into() });
    }
    let active = versions.iter().find(|version| version.active);
    Ok(PolicyView { name, kind, active: active.map(|version| version.digest.clone()), versions })
}

impl From<Uploaded> for VersionView {
    fn from(version: Uploaded) -> Self {
        let Uploaded { digest, described, actor, .. } = version;
        let (active, shipped, uploaded_ms) = (false, false, None);
        let (version, summary) = (described.version, described.summary);
        let settings_schema = described.settings_schema;
        Self { digest, version, summary, settings_schema, active, shipped, uploaded_ms, actor }
    }
}
