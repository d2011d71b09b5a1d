//! What Prometheus reads. `grafana.json` beside this crate's manifest is a dashboard of it.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::atomic::AtomicU64;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, LabelSetEncoder};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::balancedness::{add, each_load, judge};
use super::error::{ApiError, Problem};
use crate::fleet::{Fleet, Presence};
use crate::limits::STALE_MS;
use crate::state::{Shared, State as Control, now_ms};
use crate::store::windows::{Load, Of, Span};

/// The content type of what `encode` writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Names and values.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Labels(Vec<(&'static str, String)>);

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.as_slice().encode(encoder)
    }
}

type Real = Gauge<f64, AtomicU64>;

/// A metric with labels, under its name.
fn family<M>(registry: &mut Registry, name: &str, help: &str) -> Family<Labels, M>
where
    M: Default + Debug + EncodeMetric + TypedMetric + Send + Sync + 'static,
{
    let family = Family::default();
    registry.register(name, help, family.clone());
    family
}

/// Everything that is measured. Made for each reading: what is gone leaves nothing behind.
struct Metrics {
    registry: Registry,
    workers: Family<Labels, Gauge>,
    missing: Family<Labels, Gauge>,
    calls: Family<Labels, Counter>,
    refusals: Family<Labels, Counter>,
    call_seconds: Family<Labels, Real>,
    tokens: Family<Labels, Gauge>,
    balancedness: [Family<Labels, Real>; 4],
}

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::default();
        let of = &mut registry;
        let workers = family(of, "moeplane_workers", "Workers by state");
        let help = "Ranks of the group that are not there, or not ready";
        let missing = family(of, "moeplane_missing_ranks", help);
        let help = "Calls that the worker has answered since its start";
        let calls = family(of, "moeplane_calls", help);
        let help = "Calls that were refused or given up since the worker's start, by code";
        let refusals = family(of, "moeplane_refusals", help);
        let help = "Time of a call in the newest window: of the slowest layer and rank";
        let call_seconds = family(of, "moeplane_call_seconds", help);
        let help = "Rows with an expert in the newest window: of the layer that had most";
        let tokens = family(of, "moeplane_window_tokens", help);
        let help = "Mean rows of a rank beside those of the busiest, over layers with traffic";
        let balancedness = ["min", "p50", "p90", "avg"]
            .map(|name| family(of, &format!("eplb_balancedness_{name}"), help));
        Self { registry, workers, missing, calls, refusals, call_seconds, tokens, balancedness }
    }

    /// What the fleet says of itself.
    fn of_fleet(&self, fleet: &Fleet, patience_ms: u64) {
        let now_ms = now_ms();
        for (name, ranks) in &fleet.groups {
            let group = ("group", name.clone());
            for presence in [Presence::Ready, Presence::Loading, Presence::Lost] {
                let are = ranks.values().map(|worker| worker.presence(now_ms, patience_ms));
                let count = are.filter(|is| *is == presence).count();
                let labels = Labels(vec![group.clone(), ("state", presence.name().to_owned())]);
                self.workers.get_or_create(&labels).set(signed(count));
            }
            self.missing.get_or_create(&Labels(vec![group.clone()])).set(0);
            for (rank, worker) in ranks {
                let Some(beat) = &worker.heartbeat else { continue };
                let labels = vec![group.clone(), ("rank", rank.to_string())];
                self.calls.get_or_create(&Labels(labels.clone())).inc_by(beat.calls);
                for (code, &count) in &beat.refusals {
                    let labels = [&labels[..], &[("code", code.clone())]].concat();
                    self.refusals.get_or_create(&Labels(labels)).inc_by(count);
                }
            }
        }
        for (name, ranks) in fleet.missing(now_ms, patience_ms) {
            self.missing.get_or_create(&Labels(vec![("group", name)])).set(signed(ranks.len()));
        }
    }

    /// What a group's newest window says.
    fn of_window(&self, state: &Control, group: &str, end_ms: u64, loads: &[Load]) {
        let name = ("group", group.to_owned());
        let mut by_layer = BTreeMap::new();
        loads.iter().for_each(|load| add(&mut by_layer, load));
        for phase in ["prefill", "decode"] {
            let of_phase = || loads.iter().filter(|load| load.phase == phase);
            let labels = [name.clone(), ("phase", phase.to_owned())];
            let Some(tokens) = of_phase().map(|load| load.tokens).max() else { continue };
            let tokens = i64::try_from(tokens).unwrap_or(i64::MAX);
            self.tokens.get_or_create(&Labels(labels.to_vec())).set(tokens);
            let times = of_phase().map(|load| (load.latency_us_p50, load.latency_us_p99));
            let (p50, p99) = times.fold((0, 0), |max, us| (max.0.max(us.0), max.1.max(us.1)));
            for (quantile, us) in [("0.5", p50), ("0.99", p99)] {
                let labels = [&labels[..], &[("quantile", quantile.to_owned())]].concat();
                self.call_seconds.get_or_create(&Labels(labels)).set(us as f64 / 1e6);
            }
        }
        let judged = judge(state, group, (end_ms.saturating_sub(1), end_ms), &by_layer);
        let Some(balancedness) = judged.summary() else { return };
        let values = [balancedness.min, balancedness.p50, balancedness.p90, balancedness.avg];
        for (of, value) in self.balancedness.iter().zip(values) {
            of.get_or_create(&Labels(vec![name.clone()])).set(value);
        }
    }
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Workers, calls, refusals, and of each group's newest window times, tokens and balancedness, in the
/// text format of OpenMetrics.
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, body = String), (status = 503, body = Problem)))]
pub(super) async fn metrics(State(state): State<Shared>) -> Result<impl IntoResponse, ApiError> {
    let metrics = Metrics::new();
    metrics.of_fleet(&state.fleet(), state.patience_ms());
    let groups = state.fleet().models();
    for (group, model) in &groups {
        let of = Of { group, model, span: Span::Window };
        let newest = state.store.newest_end(of, state.settled_ms()).await?;
        let fresh = newest.filter(|end_ms| now_ms().saturating_sub(*end_ms) < STALE_MS);
        let Some(end_ms) = fresh else { continue };
        let mut loads = Vec::new();
        each_load(&state, of, (end_ms.saturating_sub(1), end_ms), |load| loads.push(load)).await?;
        metrics.of_window(&state, group, end_ms, &loads);
    }
    let mut text = String::new();
    encode(&mut text, &metrics.registry).map_err(ApiError::Text)?;
    Ok(([(header::CONTENT_TYPE, OPEN_METRICS)], text))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Names in the dashboard's queries are names of metrics, as they are written.
    #[test]
    fn the_dashboard_shows_what_is_measured() {
        let metrics = Metrics::new();
        let mut text = String::new();
        for family in [&metrics.workers, &metrics.missing, &metrics.tokens] {
            family.get_or_create(&Labels::default()).set(1);
        }
        metrics.calls.get_or_create(&Labels::default()).inc();
        metrics.refusals.get_or_create(&Labels::default()).inc();
        for family in metrics.balancedness.iter().chain([&metrics.call_seconds]) {
            family.get_or_create(&Labels::default()).set(1.0);
        }
        encode(&mut text, &metrics.registry).unwrap();
        let measured: BTreeSet<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../grafana.json")).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
        let queries = targets.map(|target| target["expr"].as_str().unwrap());
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = queries.flat_map(|query| query.split(move |c| !word(c)));
        let shown: BTreeSet<&str> = words
            .filter(|word| word.starts_with("moeplane_") || word.starts_with("eplb_"))
            .collect();
        assert_eq!(shown, measured);
    }
}
