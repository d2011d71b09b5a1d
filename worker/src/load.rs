//! What a rank's engine asks for, counted in windows: for each layer and phase the rows that go to each
//! expert, and how long calls take.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use protocol::message::Phase;
use protocol::session::{LayerWindow, Window};

/// Longest time of a call that is told apart from longer ones, in microseconds.
const LATENCY_US_MAX: u64 = 60_000_000;

/// The window that is open.
#[derive(Debug)]
pub(crate) struct Load {
    start_ms: u64,
    /// Number of the last window that was closed.
    number: u64,
    layers: BTreeMap<(u32, u32), LayerLoad>,
}

#[derive(Debug)]
struct LayerLoad {
    phase: Phase,
    calls: u64,
    tokens: u64,
    distinct_experts: u64,
    expert_tokens: Vec<u64>,
    /// Experts of the call that is counted.
    seen: Vec<bool>,
    /// Microseconds, to two digits; none if the system had no memory for it.
    times: Option<Histogram<u32>>,
}

impl Load {
    /// A window that begins now.
    pub(crate) fn new(now_ms: u64) -> Self {
        Self { start_ms: now_ms, number: 0, layers: BTreeMap::new() }
    }

    /// A call was answered; `ids` are `[tokens, top_k]`, and good.
    pub(crate) fn count(
        &mut self,
        (layer, experts, phase): (u32, u32, Phase),
        (ids, top_k): (&[i32], u32),
        took: Duration,
    ) {
        let load = self.layers.entry((layer, phase as u32)).or_insert_with(|| LayerLoad {
            phase,
            calls: 0,
            tokens: 0,
            distinct_experts: 0,
            expert_tokens: vec![0; experts as usize],
            seen: vec![false; experts as usize],
            times: Histogram::new_with_bounds(1, LATENCY_US_MAX, 2).ok(),
        });
        load.calls += 1;
        load.seen.fill(false);
        for row in ids.chunks(top_k.max(1) as usize) {
            let mut live = false;
            for expert in row.iter().filter_map(|&id| usize::try_from(id).ok()) {
                let Some(count) = load.expert_tokens.get_mut(expert) else { continue };
                *count += 1;
                live = true;
                load.distinct_experts += u64::from(!load.seen[expert]);
                load.seen[expert] = true;
            }
            load.tokens += u64::from(live);
        }
        if let Some(times) = &mut load.times {
            times.saturating_record(u64::try_from(took.as_micros()).unwrap_or(LATENCY_US_MAX));
        }
    }

    /// Ends the window and begins the next. None without calls, unless control asked for its end.
    pub(crate) fn close(&mut self, now_ms: u64, closed_by: Option<u64>) -> Option<Window> {
        // A clock may be set back: a window still does not end before it begins.
        let end_ms = now_ms.max(self.start_ms);
        let start_ms = std::mem::replace(&mut self.start_ms, end_ms);
        let layers = std::mem::take(&mut self.layers);
        if layers.is_empty() && closed_by.is_none() {
            return None;
        }
        self.number += 1;
        let layers = layers.into_iter().map(|((layer, _), load)| {
            let time = |quantile| load.times.as_ref().map_or(0, |t| t.value_at_quantile(quantile));
            LayerWindow {
                layer,
                phase: load.phase,
                calls: load.calls,
                tokens: load.tokens,
                distinct_experts: load.distinct_experts,
                latency_us_p50: time(0.5),
                latency_us_p99: time(0.99),
                expert_tokens: load.expert_tokens,
            }
        });
        let (number, layers) = (self.number, layers.collect());
        Some(Window { number, start_ms, end_ms, closed_by, layers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_assignments_count_once_and_phases_apart() {
        let mut load = Load::new(100);
        let took = Duration::from_micros(50);
        let ids = [0, 2, -1, -1, 2, -1, 0, 3];
        load.count((5, 4, Phase::Decode), (&ids, 2), took);
        load.count((5, 4, Phase::Decode), (&[], 2), took * 4);
        load.count((5, 4, Phase::Prefill), (&[1, 3], 2), took);
        let window = load.close(400, None).unwrap();
        assert_eq!((window.number, window.start_ms, window.end_ms), (1, 100, 400));
        let [prefill, decode] = &window.layers[..] else { panic!("{window:?}") };
        assert_eq!(
            (prefill.phase, &prefill.expert_tokens[..]),
            (Phase::Prefill, &[0, 1, 0, 1][..])
        );
        assert_eq!((decode.phase, &decode.expert_tokens[..]), (Phase::Decode, &[2, 0, 2, 1][..]));
        assert_eq!((decode.calls, decode.tokens, decode.distinct_experts), (2, 3, 3));
        assert_eq!((decode.latency_us_p50, decode.latency_us_p99), (50, 200));
        assert_eq!(load.close(500, None), None, "nothing since");
        load.count((5, 4, Phase::Decode), (&[1, 0], 2), took);
        let window = load.close(600, None).unwrap();
        assert_eq!((window.number, window.start_ms), (2, 500));
        load.count((5, 4, Phase::Decode), (&[1, 0], 2), took);
        let window = load.close(300, None).unwrap();
        assert_eq!((window.start_ms, window.end_ms), (600, 600), "the clock was set back");
        let window = load.close(700, Some(690)).unwrap();
        assert_eq!((window.number, window.closed_by, window.layers.len()), (4, Some(690), 0));
    }
}
