//! Server-sent events: what happens, as it happens. Whoever comes back with the last number that it has
//! seen misses nothing and gets nothing twice, also after a restart of control.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Line, KeepAlive, Sse};
use futures_util::stream::{Stream, unfold};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::error::{ApiError, Problem};
use crate::limits::{EVENTS_AT_ONCE, WATCH_SECONDS_MAX};
use crate::state::{Shared, stopped};
use crate::store::events::Event;

/// One who watches.
struct Watcher {
    state: Shared,
    /// Number of the last event that was sent.
    sent: i64,
    /// Events that were read and wait to be sent.
    waiting: std::vec::IntoIter<Event>,
    told: watch::Receiver<u64>,
    stop: watch::Receiver<bool>,
    ends: Instant,
    /// Gives its place back.
    _place: OwnedSemaphorePermit,
}

/// What happens: `worker` (group, rank, state), `placement` (group, epochs in force), `migration` (group, layer, epoch, step, stuck),
/// `window` (group, end_ms), `proposal` (group, id, standing), `audit` (id, action, target, actor). After `last-event-id` nothing is left out or repeated;
/// where that cannot be, because too much has happened since, a `missed` comes first, and everything is to
/// be read again. A comment comes at least every 15 s. The stream ends after a quarter of an hour, so that
/// whoever may not watch any more is told so.
#[utoipa::path(get, path = "/api/v1/events",
    params(("last-event-id" = Option<i64>, Header)),
    responses((status = 200, body = String, content_type = "text/event-stream"),
        (status = 429, body = Problem)))]
pub(super) async fn events(
    State(state): State<Shared>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Line, Infallible>>>, ApiError> {
    let place = state.watchers.clone().try_acquire_owned();
    let _place = place.map_err(|_all_taken| ApiError::TooMany { wait_ms: 1_000 })?;
    // Before anything is read: what happens from now on is not missed.
    let told = state.store.told();
    let newest = state.store.newest_event().await?;
    let sent = match headers.get("last-event-id") {
        None => newest,
        Some(value) => {
            let number = value.to_str().ok().and_then(|value| value.parse().ok());
            let wrong = || ApiError::Value {
                name: "last-event-id",
                value: String::from_utf8_lossy(value.as_bytes()).into_owned(),
                expected: format!("a number up to {newest}"),
            };
            number.filter(|number| (0..=newest).contains(number)).ok_or_else(wrong)?
        }
    };
    let ends = Instant::now() + Duration::from_secs(WATCH_SECONDS_MAX);
    let (stop, waiting) = (state.stop.clone(), Vec::new().into_iter());
    let beat = Duration::from_millis(state.config.keepalive_ms);
    let watcher = Watcher { state, sent, waiting, told, stop, ends, _place };
    Ok(Sse::new(unfold(watcher, next)).keep_alive(KeepAlive::new().interval(beat)))
}

async fn next(mut watcher: Watcher) -> Option<(Result<Line, Infallible>, Watcher)> {
    loop {
        if let Some(event) = watcher.waiting.next() {
            watcher.sent = event.id;
            let Event { id, at_ms, kind, data } = event;
            let text = format!("{{\"at_ms\":{at_ms},\"{kind}\":{data}}}");
            let line = Line::default().id(id.to_string()).event(kind).data(text);
            return Some((Ok(line), watcher));
        }
        watcher.told.mark_unchanged();
        let events = match watcher.state.store.events(watcher.sent, EVENTS_AT_ONCE).await {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "events cannot be read");
                return None;
            }
        };
        if let Some(first) = events.first()
            && first.id > watcher.sent + 1
        {
            let missed = json!({ "after": watcher.sent, "before": first.id });
            watcher.sent = first.id - 1;
            watcher.waiting = events.into_iter();
            let line = Line::default().id(watcher.sent.to_string());
            return Some((Ok(line.event("missed").data(missed.to_string())), watcher));
        }
        if !events.is_empty() {
            watcher.waiting = events.into_iter();
            continue;
        }
        tokio::select! {
            changed = watcher.told.changed() => changed.ok()?,
            () = stopped(&mut watcher.stop) => return None,
            () = tokio::time::sleep_until(watcher.ends) => return None,
        }
    }
}
