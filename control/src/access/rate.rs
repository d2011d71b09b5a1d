//! How often a caller may ask: a bucket of requests for each, refilled evenly. Pure, and bounded.

use std::collections::BTreeMap;

use crate::limits::CALLERS_COUNTED_MAX;

/// What callers beyond the bound share.
const OTHERS: &str = "others";

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at_ms: u64,
}

/// The buckets of all callers.
#[derive(Debug)]
pub(crate) struct Rates {
    per_ms: f64,
    burst: f64,
    buckets: BTreeMap<String, Bucket>,
}

impl Rates {
    pub(crate) fn new(per_s: u32, burst: u32) -> Self {
        let (per_ms, burst) = (f64::from(per_s) / 1_000.0, f64::from(burst));
        Self { per_ms, burst, buckets: BTreeMap::new() }
    }

    /// Takes one request of `caller`'s; the milliseconds to wait if none is left.
    pub(crate) fn take(&mut self, caller: &str, now_ms: u64) -> Result<(), u64> {
        let (per_ms, burst) = (self.per_ms, self.burst);
        let left =
            |b: &Bucket| (b.left + now_ms.saturating_sub(b.at_ms) as f64 * per_ms).min(burst);
        if !self.buckets.contains_key(caller) && self.buckets.len() >= CALLERS_COUNTED_MAX {
            // A full bucket says no more than none.
            self.buckets.retain(|_, bucket| left(bucket) < burst);
        }
        let crowded = self.buckets.len() >= CALLERS_COUNTED_MAX;
        let caller = if crowded && !self.buckets.contains_key(caller) { OTHERS } else { caller };
        let full = Bucket { left: burst, at_ms: now_ms };
        let bucket = self.buckets.entry(caller.to_owned()).or_insert(full);
        let left = left(bucket);
        let taken = if left >= 1.0 { 1.0 } else { 0.0 };
        *bucket = Bucket { left: left - taken, at_ms: now_ms };
        if left >= 1.0 {
            return Ok(());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive, and a request is refilled within a second"
        )]
        let wait_ms = ((1.0 - left) / per_ms).ceil() as u64;
        Err(wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds_for_each_caller_apart() {
        let mut rates = Rates::new(10, 3);
        for _ in 0..3 {
            assert_eq!(rates.take("a", 1_000), Ok(()));
        }
        assert_eq!(rates.take("a", 1_000), Err(100));
        assert_eq!(rates.take("b", 1_000), Ok(()));
        assert_eq!(rates.take("a", 1_050), Err(50), "asking costs nothing");
        assert_eq!(rates.take("a", 1_100), Ok(()));
        assert_eq!(rates.take("a", 900), Err(100), "a clock that goes back gives nothing");
    }

    #[test]
    fn callers_beyond_the_bound_share_one_bucket() {
        let mut rates = Rates::new(1, 2);
        for caller in 0..CALLERS_COUNTED_MAX {
            assert_eq!(rates.take(&caller.to_string(), 5), Ok(()));
        }
        assert_eq!(rates.take("x", 5), Ok(()));
        assert_eq!(rates.take("y", 5), Ok(()));
        assert!(rates.take("z", 5).is_err());
        assert!(rates.buckets.len() <= CALLERS_COUNTED_MAX + 1);
        assert_eq!(rates.take("z", 60_000), Ok(()), "full buckets make room");
        assert!(rates.buckets.len() < 10);
    }
}
