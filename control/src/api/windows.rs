//! Windows of load, summed over the ranks of a group.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, Problem};
use super::views::Page;
use super::{PathOf, QueryOf};
use crate::limits::{PAGE_MAX, WINDOW_ROWS_MAX};
use crate::state::Shared;
use crate::store::windows::RankWindow;

/// Which windows.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Interval {
    /// Only windows that ended later, in milliseconds since 1970; or `next` of the part before.
    after_ms: Option<u64>,
    /// Only windows that did not end later.
    until_ms: Option<u64>,
    /// Only this layer.
    layer: Option<u32>,
}

/// What the engines of a group asked of a layer in a window, summed over ranks.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WindowView {
    /// Its end, in milliseconds since 1970, of the rank whose ended last.
    end_ms: u64,
    /// The model's number of the layer.
    layer: u32,
    /// `prefill` or `decode`.
    phase: String,
    /// Ranks whose engines called.
    ranks: usize,
    /// Calls of all ranks: a step of a whole group is one for each.
    calls: u64,
    /// Rows with at least one expert.
    tokens: u64,
    /// Sum over calls of the different experts that were asked for.
    distinct_experts: u64,
    /// For each expert, the rows that went to it: each (token, expert) once, whatever replicas there are.
    expert_tokens: Vec<u64>,
    /// Median time of a call on the slowest rank, in microseconds.
    latency_us_p50: u64,
    /// What 99 of 100 calls did not exceed, on the slowest rank.
    latency_us_p99: u64,
}

/// Windows of a group, oldest first; ranks' windows that end within half a window of each other are one.
#[utoipa::path(get, path = "/api/v1/groups/{group}/windows",
    params(("group" = String, Path), Interval),
    responses((status = 200, body = Page<WindowView>), (status = 404, body = Problem)))]
pub(super) async fn windows(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(interval): QueryOf<Interval>,
) -> Result<Json<Page<WindowView>>, ApiError> {
    if !state.fleet().groups.contains_key(&group) {
        return Err(ApiError::NotFound { what: "group", name: group });
    }
    let between = (interval.after_ms.unwrap_or(0), interval.until_ms.unwrap_or(u64::MAX));
    let rows = state.store.windows(&group, between, WINDOW_ROWS_MAX).await?;
    let cut = rows.len() == WINDOW_ROWS_MAX as usize;
    Ok(Json(summed(&rows, cut, (state.config.window_ms, interval.layer))))
}

/// Whole windows; if the rows were `cut`, the last window may lack some and is left for the next part.
fn summed(
    rows: &[RankWindow],
    cut: bool,
    (window_ms, layer): (u64, Option<u32>),
) -> Page<WindowView> {
    let mut windows: BTreeMap<u64, Vec<&RankWindow>> = BTreeMap::new();
    for row in rows {
        let end_ms = row.end_ms.unsigned_abs();
        windows.entry((end_ms + window_ms / 2) / window_ms).or_default().push(row);
    }
    if cut && windows.len() > 1 {
        windows.pop_last();
    }
    let mut page = Page { items: Vec::new(), next: None };
    let (mut last_end, total) = (0, windows.len());
    for (position, rows) in windows.into_values().enumerate() {
        let views = views(&rows, layer);
        if !page.items.is_empty() && page.items.len() + views.len() > PAGE_MAX {
            page.next = Some(last_end.to_string());
            return page;
        }
        page.items.extend(views);
        last_end = rows.iter().map(|row| row.end_ms.unsigned_abs()).max().unwrap_or(last_end);
        if cut && position + 1 == total {
            page.next = Some(last_end.to_string());
        }
    }
    page
}

/// One window by layer and phase.
fn views(rows: &[&RankWindow], layer: Option<u32>) -> Vec<WindowView> {
    let mut sums: BTreeMap<(u32, &str), (WindowView, BTreeSet<u32>)> = BTreeMap::new();
    for row in rows.iter().filter(|row| layer.is_none_or(|layer| row.layer == layer)) {
        let counts: Vec<u64> = serde_json::from_str(&row.expert_tokens).unwrap_or_default();
        let (view, ranks) = sums.entry((row.layer, &row.phase)).or_insert_with(|| {
            let view = WindowView {
                end_ms: 0,
                layer: row.layer,
                phase: row.phase.clone(),
                ranks: 0,
                calls: 0,
                tokens: 0,
                distinct_experts: 0,
                expert_tokens: vec![0; counts.len()],
                latency_us_p50: 0,
                latency_us_p99: 0,
            };
            (view, BTreeSet::new())
        });
        ranks.insert(row.rank);
        view.ranks = ranks.len();
        view.end_ms = view.end_ms.max(row.end_ms.unsigned_abs());
        view.calls += row.calls.unsigned_abs();
        view.tokens += row.tokens.unsigned_abs();
        view.distinct_experts += row.distinct_experts.unsigned_abs();
        view.expert_tokens.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        view.latency_us_p50 = view.latency_us_p50.max(row.latency_us_p50.unsigned_abs());
        view.latency_us_p99 = view.latency_us_p99.max(row.latency_us_p99.unsigned_abs());
    }
    sums.into_values().map(|(view, _)| view).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(rank: u32, end_ms: i64, phase: &str, expert_tokens: &str) -> RankWindow {
        RankWindow {
            rank,
            layer: 3,
            phase: phase.to_owned(),
            end_ms,
            calls: 1,
            tokens: 2,
            distinct_experts: 2,
            latency_us_p50: 10 + i64::from(rank),
            latency_us_p99: 20,
            expert_tokens: expert_tokens.to_owned(),
        }
    }

    #[test]
    fn ranks_are_summed_by_window_and_phases_stay_apart() {
        let rows = [
            row(0, 10_000, "decode", "[1,1]"),
            row(1, 10_090, "decode", "[0,5]"),
            row(1, 10_090, "prefill", "[2,0]"),
            row(0, 20_010, "decode", "[7,0]"),
        ];
        let page = summed(&rows, false, (10_000, None));
        let facts: Vec<_> = page
            .items
            .iter()
            .map(|w| (w.end_ms, w.phase.as_str(), w.ranks, w.calls, w.expert_tokens.clone()))
            .collect();
        let expected = [
            (10_090, "decode", 2, 2, vec![1, 6]),
            (10_090, "prefill", 1, 1, vec![2, 0]),
            (20_010, "decode", 1, 1, vec![7, 0]),
        ];
        assert_eq!(facts, expected);
        assert_eq!((page.items[0].latency_us_p50, page.next.as_deref()), (11, None));
        // Where rows were cut off, the last window waits for the next part.
        let page = summed(&rows, true, (10_000, None));
        assert_eq!((page.items.len(), page.next.as_deref()), (2, Some("10090")));
        assert!(summed(&rows, false, (10_000, Some(4))).items.is_empty());
    }
}
