//! Durations as figures.

use std::time::Duration;

/// The duration that `percent` of `times` do not exceed; zero without any.
#[must_use]
pub fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times.get(at).copied().unwrap_or_default()
}
