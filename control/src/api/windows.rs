//! Windows of load, summed over the ranks of a group.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, Reason, checked_limit, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::views::Page;
use crate::fleet::Command;
use crate::limits::{CLOSE_SECONDS_MAX, RANKS_MAX};
use crate::state::{Shared, now_ms};
use crate::store::windows::{Load, Of, Part, Span};

/// The oldest version of a worker that knows how to close a window.
const CLOSES_SINCE: u32 = 2;

/// Which windows.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// Windows as they were closed (`window`), or sums of those of an hour, which older ones become.
    #[serde(default)]
    span: Span,
    /// Only what ended later, in milliseconds since 1970.
    after_ms: Option<u64>,
    /// Only what did not end later.
    until_ms: Option<u64>,
    /// Only this layer.
    layer: Option<u32>,
    /// Newest first, instead of oldest.
    #[serde(default)]
    newest_first: bool,
    /// Only this model, by digest; the one that the group serves otherwise.
    model: Option<String>,
    /// Most items, 1 to 500.
    limit: Option<usize>,
    /// `next` of the part before.
    cursor: Option<String>,
}

impl Wanted {
    fn part(&self) -> Result<Part, ApiError> {
        let (after_ms, until_ms) = (self.after_ms.unwrap_or(0), self.until_ms.unwrap_or(u64::MAX));
        let part = Part::between(after_ms, until_ms, checked_limit(self.limit)?);
        let after = match &self.cursor {
            None if self.newest_first => (u64::MAX, u32::MAX, String::new()),
            None => part.after.clone(),
            Some(cursor) => parse(cursor).ok_or_else(|| ApiError::cursor(cursor))?,
        };
        Ok(Part { after, newest_first: self.newest_first, layer: self.layer, ..part })
    }
}

/// End, layer and phase of the last item before a part: `END:LAYER:PHASE`.
fn parse(cursor: &str) -> Option<(u64, u32, String)> {
    let mut parts = cursor.splitn(3, ':');
    let end_ms = parts.next()?.parse().ok()?;
    Some((end_ms, parts.next()?.parse().ok()?, parts.next()?.to_owned()))
}

/// What the engines of a group asked of a layer in a window, summed over ranks.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WindowView {
    /// Its end, in milliseconds since 1970: a multiple of its length, or when it was asked for.
    end_ms: u64,
    /// The model's number of the layer.
    layer: u32,
    /// `prefill` or `decode`.
    phase: String,
    /// Ranks whose engines called, of those that have told so far.
    ranks: u32,
    /// Calls of all ranks: a step of a whole group is one for each.
    calls: u64,
    /// Rows with at least one expert.
    tokens: u64,
    /// Sum over calls of the different experts that were asked for.
    distinct_experts: u64,
    /// For each expert, the rows that went to it: each (token, expert) once, whatever replicas there are.
    expert_tokens: Vec<u64>,
    /// Median time of a call, in microseconds: the slowest rank's and window's.
    latency_us_p50: u64,
    /// What 99 of 100 calls did not exceed: the slowest rank's and window's.
    latency_us_p99: u64,
}

impl From<Load> for WindowView {
    fn from(load: Load) -> Self {
        Self {
            end_ms: load.end_ms,
            layer: load.layer,
            phase: load.phase,
            ranks: load.ranks.count(),
            calls: load.calls,
            tokens: load.tokens,
            distinct_experts: load.distinct_experts,
            expert_tokens: load.expert_tokens,
            latency_us_p50: load.latency_us_p50,
            latency_us_p99: load.latency_us_p99,
        }
    }
}

/// Windows of a group, in the order of end, layer and phase. Ranks that control has not heard of for a while tell
/// theirs late: what has ended may still grow.
#[utoipa::path(get, path = "/api/v1/groups/{group}/windows",
    params(("group" = String, Path), Wanted),
    responses((status = 200, body = Page<WindowView>), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn windows(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(wanted): QueryOf<Wanted>,
) -> Result<Json<Page<WindowView>>, ApiError> {
    let model = register_of(&state.fleet(), &group)?.model.digest.clone();
    let mut part = wanted.part()?;
    let limit = part.limit;
    part.limit += 1;
    let model = wanted.model.as_ref().unwrap_or(&model);
    let of = Of { group: &group, model, span: wanted.span };
    let loads = state.store.loads(of, &part).await?;
    let cursor = |last: &Load| format!("{}:{}:{}", last.end_ms, last.layer, last.phase);
    Ok(Json(Page::of(loads, limit, cursor, WindowView::from)))
}

/// A window that was closed.
#[derive(Serialize, ToSchema)]
pub(super) struct ClosedView {
    /// `end_ms` of the window.
    end_ms: u64,
    /// Ranks whose load until then is stored.
    ranks: Vec<u32>,
    /// Ranks that are not there, or have not told theirs in time: it is added when they do.
    missing: Vec<u32>,
}

/// Closes the open window of every rank of a group, and waits until what was counted is stored.
#[utoipa::path(post, path = "/api/v1/groups/{group}/windows", params(("group" = String, Path)),
    request_body = Reason, security(("token" = ["operator"])),
    responses((status = 200, body = ClosedView), (status = 404, body = Problem)))]
pub(super) async fn close(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(why): JsonOf<Reason>,
) -> Result<Json<ClosedView>, ApiError> {
    let end_ms = now_ms();
    let entry = caller.entry("windows.close", reason(&why.reason)?);
    let (closed, mut told) = mpsc::channel(RANKS_MAX as usize);
    let command = Command::CloseWindow { mark_ms: end_ms, closed };
    let count = state.fleet().command(&group, CLOSES_SINCE, &command);
    let none = || ApiError::NotFound { what: "group", name: group.clone() };
    let count = count.ok_or_else(none)?;
    state.store.write_audit(entry.of(&group).made(&json!({ "end_ms": end_ms }))).await?;
    // Sessions that end drop theirs: the wait is over when there is nobody left to wait for.
    drop(command);
    let mut ranks = Vec::new();
    let all = async {
        while let Some(rank) = told.recv().await {
            ranks.push(rank);
        }
    };
    if tokio::time::timeout(Duration::from_secs(CLOSE_SECONDS_MAX), all).await.is_err() {
        tracing::warn!(?ranks, "not every rank has closed its window in time");
    }
    ranks.sort_unstable();
    let missing = (0..count).filter(|rank| !ranks.contains(rank)).collect();
    Ok(Json(ClosedView { end_ms, ranks, missing }))
}
