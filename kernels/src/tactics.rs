//! Tables of tactics: which one calls of a size get, by what was measured, and what the measurements hold for.
//!
//! A **problem** is a layer's shape on a device, in a format. Calls of it fall into **buckets** by their tokens: a call belongs
//! to the first bucket that it fits in. What no bucket has, and what is larger than the last one, is left to the device.

use serde::{Deserialize, Serialize};

use crate::problem::{ActFormat, LayerShape};

/// The tactic of a device that chooses for each call or expert itself.
pub const BY_TOKENS: &str = "by-tokens";

/// Share of its time by which another tactic must be faster than the device's own choice: less is noise.
const MARGIN: f32 = 0.03;

/// What measurements hold for: another device, driver or kernel may be faster or slower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The device as it names itself.
    pub device: String,
    /// What runs it: the GPU's driver, or the processor.
    pub driver: String,
    /// Hash of the kernels' source.
    pub kernels: String,
}

/// Measurements of another device, driver or kernel than those that are here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {what} is {here}, that of the measurements was {measured}")]
pub struct Stale {
    what: &'static str,
    here: String,
    measured: String,
}

impl Provenance {
    /// Whether what was measured under `measured` holds here.
    ///
    /// # Errors
    /// [`Stale`] with the first difference.
    pub fn holds(&self, measured: &Self) -> Result<(), Stale> {
        let facts = |of: &Self| {
            let Self { device, driver, kernels } = of.clone();
            [("device", device), ("driver", driver), ("hash of kernels", kernels)]
        };
        for ((what, here), (_, measured)) in facts(self).into_iter().zip(facts(measured)) {
            if here != measured {
                return Err(Stale { what, here, measured });
            }
        }
        Ok(())
    }
}

/// What times can be compared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem {
    /// Experts of the layer.
    pub experts: u32,
    /// Experts of a token.
    pub top_k: u32,
    /// Width of a token.
    pub hidden: u32,
    /// Width of an expert's intermediate.
    pub intermediate: u32,
    /// Ranks of the group.
    pub ranks: u32,
    /// Slots of each rank.
    pub slots_per_rank: u32,
    /// Format of the activations.
    pub act: ActFormat,
}

impl Problem {
    /// That of a layer on `ranks` ranks with so many slots each.
    #[must_use]
    pub fn new(shape: &LayerShape, (ranks, slots_per_rank): (u32, u32), act: ActFormat) -> Self {
        let LayerShape { experts, top_k, hidden, intermediate, .. } = *shape;
        Self { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act }
    }
}

/// Calls of one size by one tactic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurement {
    /// The layer.
    pub problem: Problem,
    /// The tactic's name.
    pub tactic: String,
    /// Tokens of a call.
    pub tokens: u32,
    /// Calls that were timed.
    pub runs: u32,
    /// Median, in microseconds.
    pub median_us: f32,
    /// What 99 of 100 calls did not exceed, in microseconds.
    pub p99_us: f32,
}

/// The tactic of a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// The layer.
    pub problem: Problem,
    /// Most tokens of the bucket's calls.
    pub tokens: u32,
    /// The tactic's name.
    pub tactic: String,
}

/// Measurements, and what was chosen by them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TacticTable {
    /// What the measurements hold for.
    pub provenance: Provenance,
    /// When they were made, in milliseconds since 1970.
    pub measured_ms: u64,
    /// What was measured.
    pub measurements: Vec<Measurement>,
    /// Ascending by problem and tokens.
    pub choices: Vec<Choice>,
}

impl TacticTable {
    /// Chooses for every problem and number of tokens that was measured: the tactic with the smallest median, or [`BY_TOKENS`]
    /// unless that is clearly slower.
    #[must_use]
    pub fn fastest(
        provenance: Provenance,
        measured_ms: u64,
        measurements: Vec<Measurement>,
    ) -> Self {
        let mut buckets: Vec<(Problem, u32)> =
            measurements.iter().map(|measured| (measured.problem, measured.tokens)).collect();
        buckets.sort_unstable();
        buckets.dedup();
        let choice = |(problem, tokens): (Problem, u32)| {
            let of = |m: &&Measurement| (m.problem, m.tokens) == (problem, tokens);
            let all = measurements.iter().filter(of);
            let best = all.min_by(|a, b| a.median_us.total_cmp(&b.median_us))?;
            let own = measurements.iter().filter(of).find(|m| m.tactic == BY_TOKENS);
            let best =
                own.filter(|own| own.median_us * (1.0 - MARGIN) <= best.median_us).unwrap_or(best);
            Some(Choice { problem, tokens, tactic: best.tactic.clone() })
        };
        let choices = buckets.into_iter().filter_map(choice).collect();
        Self { provenance, measured_ms, measurements, choices }
    }
}

/// A tactic for each bucket of a layer and format; none where the device chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Buckets<T>(Vec<(u32, Option<T>)>);

impl<T> Default for Buckets<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Buckets<T> {
    /// The choices of `problem`, whose names `parse` reads.
    pub(crate) fn of<E>(
        choices: &[Choice],
        problem: &Problem,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Self, E> {
        let of = choices.iter().filter(|choice| choice.problem == *problem);
        let mut buckets = of
            .map(|choice| match &choice.tactic[..] {
                BY_TOKENS => Ok((choice.tokens, None)),
                name => Ok((choice.tokens, Some(parse(name)?))),
            })
            .collect::<Result<Vec<_>, E>>()?;
        buckets.sort_by_key(|(tokens, _)| *tokens);
        Ok(Self(buckets))
    }

    /// The tactic of a call with so many tokens.
    pub(crate) fn get(&self, tokens: u32) -> Option<T> {
        let at = self.0.partition_point(|(most, _)| *most < tokens);
        self.0.get(at).and_then(|(_, tactic)| *tactic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBLEM: Problem = Problem {
        experts: 8,
        top_k: 2,
        hidden: 64,
        intermediate: 32,
        ranks: 1,
        slots_per_rank: 8,
        act: ActFormat::Bf16,
    };

    fn provenance() -> Provenance {
        let text = str::to_owned;
        Provenance { device: text("GPU"), driver: text("580"), kernels: text("abc") }
    }

    fn measured(tactic: &str, tokens: u32, median_us: f32) -> Measurement {
        let tactic = tactic.to_owned();
        Measurement { problem: PROBLEM, tactic, tokens, runs: 5, median_us, p99_us: 9.0 }
    }

    #[test]
    fn the_fastest_is_chosen_for_every_size() {
        let table = TacticTable::fastest(
            provenance(),
            7,
            vec![
                measured("b", 64, 2.0),
                measured("a", 64, 1.0),
                measured("a", 1, 0.98),
                measured(BY_TOKENS, 1, 1.0),
                measured(BY_TOKENS, 8, 1.0),
                measured("a", 8, 0.96),
            ],
        );
        let chosen: Vec<_> = table.choices.iter().map(|c| (c.tokens, &c.tactic[..])).collect();
        assert_eq!(chosen, [(1, BY_TOKENS), (8, "a"), (64, "a")]);
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<TacticTable>(&text).unwrap(), table);
    }

    #[test]
    fn a_call_belongs_to_the_first_bucket_that_it_fits_in() {
        let choice =
            |problem, tokens, tactic: &str| Choice { problem, tokens, tactic: tactic.to_owned() };
        let other = Problem { act: ActFormat::Nvfp4, ..PROBLEM };
        let choices = [
            choice(PROBLEM, 64, "3"),
            choice(PROBLEM, 8, BY_TOKENS),
            choice(PROBLEM, 1, "1"),
            choice(other, 8, "9"),
        ];
        let buckets = Buckets::of(&choices, &PROBLEM, str::parse::<u32>).unwrap();
        for (tokens, expected) in [
            (0, Some(1)),
            (1, Some(1)),
            (2, None),
            (8, None),
            (9, Some(3)),
            (64, Some(3)),
            (65, None),
        ] {
            assert_eq!(buckets.get(tokens), expected, "{tokens} tokens");
        }
        let wrong = [choice(PROBLEM, 1, "fast")];
        assert!(Buckets::of(&wrong, &PROBLEM, str::parse::<u32>).is_err());
    }

    #[test]
    fn what_was_measured_on_something_else_is_stale() {
        let here = provenance();
        assert_eq!(here.holds(&provenance()), Ok(()));
        let other = Provenance { driver: "570".to_owned(), ..provenance() };
        let expected = "the driver is 580, that of the measurements was 570";
        assert_eq!(here.holds(&other).unwrap_err().to_string(), expected);
    }
}
