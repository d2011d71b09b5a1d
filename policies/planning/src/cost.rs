//! Predicted milliseconds of one layer's call under a placement, from what each rank has to read and to multiply.
//! Measures nothing: the numbers are fitted to measurements, or come from a device's limits.
//!
//! A rank's part of a call is described by two numbers: its (token, expert) **pairs**, which cost arithmetic, and its
//! **active** experts, those with at least one token, whose weights must be read. The slowest rank ends the call. Small
//! batches are bound by active experts and large ones by pairs, so the balance that pays differs between phases.

use alloc::vec::Vec;

use crate::layer::{EMPTY, max_over_mean, replica_counts};

/// What one rank's part of a call costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankCost {
    /// Pairs times milliseconds of one pair: balance of tokens alone. What is left when nothing was
    /// measured; with 1.0 the "milliseconds" are pairs.
    Pairs {
        /// Milliseconds of one (token, expert) pair.
        ms_per_pair: f64,
    },
    /// The larger of reading weights and multiplying, plus a fixed part.
    Roofline(Roofline),
}

/// A device's limits as they apply to one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Milliseconds of a call without tokens.
    pub fixed_ms: f64,
    /// Milliseconds to read the weights of one expert: its bytes over the memory's bandwidth.
    pub ms_per_active: f64,
    /// Milliseconds of one pair: its floating-point operations over the device's rate.
    pub ms_per_pair: f64,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Pairs of the slowest rank.
    pub pairs: f64,
    /// Active experts of it.
    pub active: f64,
    /// Milliseconds of the call.
    pub ms: f64,
}

impl Roofline {
    /// The limits that explain measurements best, by the sum of squares of relative errors; none without a measurement of
    /// a positive time. No limit is negative, so nothing that is predicted falls as work grows.
    ///
    /// Points with few pairs for each active expert are bound by reading, those with many by multiplying. Every place
    /// where that may change is tried, and for each a linear fit of both sides with their common fixed part.
    #[must_use]
    pub fn fit(points: &[Point]) -> Option<Self> {
        let mut points: Vec<Point> =
            points.iter().filter(|point| point.ms > 0.0).copied().collect();
        // pairs / active of each, without dividing by an activity of 0.
        points.sort_by(|a, b| (a.pairs * b.active).total_cmp(&(b.pairs * a.active)));
        let mut best: Option<(f64, Self)> = None;
        for split in 0..=points.len() {
            for used in 1..8 {
                let Some(limits) = linear(&points, split, used) else { continue };
                let error: f64 = points.iter().map(|point| limits.error(point)).sum();
                if best.is_none_or(|(least, _)| error < least) {
                    best = Some((error, limits));
                }
            }
        }
        best.map(|(_, limits)| limits)
    }

    /// Milliseconds of a rank.
    #[must_use]
    pub fn ms(&self, pairs: f64, active: f64) -> f64 {
        self.fixed_ms + (active * self.ms_per_active).max(pairs * self.ms_per_pair)
    }

    /// Square of the relative error.
    fn error(&self, point: &Point) -> f64 {
        let error = self.ms(point.pairs, point.active) / point.ms - 1.0;
        error * error
    }
}

/// Least squares of fixed, reading (points before `split`) and multiplying (the others), of which the bits of `used` say
/// which may differ from 0. None where the points do not determine them, or one would be negative.
fn linear(points: &[Point], split: usize, used: usize) -> Option<Roofline> {
    // Normal equations, [row][column], the last column the right side.
    let mut rows = [[0.0; 4]; 3];
    for (number, point) in points.iter().enumerate() {
        let reads = number < split;
        let of_point = [
            1.0,
            if reads { point.active } else { 0.0 },
            if reads { 0.0 } else { point.pairs },
            point.ms,
        ];
        let relative = of_point.map(|value| value / point.ms);
        for (row, left) in rows.iter_mut().zip(relative) {
            row.iter_mut().zip(relative).for_each(|(sum, right)| *sum += left * right);
        }
    }
    let kept: Vec<usize> = (0..3).filter(|unknown| used >> unknown & 1 == 1).collect();
    let mut solved = [0.0; 3];
    // Elimination without a choice of pivots: the matrix is symmetric and, if determined, positive definite.
    for (step, &pivot) in kept.iter().enumerate() {
        if rows[pivot][pivot] <= 1e-12 {
            return None;
        }
        for &row in &kept[step + 1..] {
            let factor = rows[row][pivot] / rows[pivot][pivot];
            let above = rows[pivot];
            rows[row].iter_mut().zip(above).for_each(|(value, above)| *value -= factor * above);
        }
    }
    for &row in kept.iter().rev() {
        let known: f64 =
            kept.iter().filter(|c| **c > row).map(|c| rows[row][*c] * solved[*c]).sum();
        solved[row] = (rows[row][3] - known) / rows[row][row];
    }
    let [fixed_ms, ms_per_active, ms_per_pair] = solved;
    let good = solved.iter().all(|value| value.is_finite() && *value >= 0.0);
    good.then_some(Roofline { fixed_ms, ms_per_active, ms_per_pair })
}

impl RankCost {
    /// Milliseconds of a rank with `pairs` pairs and `active` active experts. Both may be fractions:
    /// they are expectations.
    #[must_use]
    pub fn ms(&self, pairs: f64, active: f64) -> f64 {
        match self {
            Self::Pairs { ms_per_pair } => pairs * ms_per_pair,
            Self::Roofline(limits) => limits.ms(pairs, active),
        }
    }

    /// Whether active experts matter at all.
    #[must_use]
    pub fn counts_active(&self) -> bool {
        !matches!(self, Self::Pairs { .. })
    }
}

/// Load of one layer in one phase, as calls of a typical size.
#[derive(Debug, Clone, Copy)]
pub struct PhaseLoad<'a> {
    /// (token, expert) pairs of every expert in one call; a window's pairs over its calls.
    pub pairs: &'a [f64],
    /// Tokens of one call; a window's tokens over its calls, rounded, at least 1.
    pub tokens: u32,
    /// How much a millisecond of this phase counts, for example calls in a window.
    pub weight: f64,
    /// What a rank's part costs in this phase.
    pub cost: &'a RankCost,
}

impl PhaseLoad<'_> {
    /// Expected pairs and activity that one of `replicas` replicas of `expert` gives its rank.
    ///
    /// A token picks the replica with probability p, so that it is active in a call of T tokens with
    /// probability 1 - (1 - p)^T.
    #[must_use]
    pub fn replica(&self, expert: usize, replicas: u32) -> (f64, f64) {
        let pairs = self.pairs.get(expert).copied().unwrap_or(0.0);
        let pairs = pairs / f64::from(replicas.max(1));
        if !self.cost.counts_active() {
            return (pairs, 0.0);
        }
        // Missed by chance once in e^40 calls at most: less than rounding.
        if pairs >= 40.0 {
            return (pairs, 1.0);
        }
        let tokens = self.tokens.max(1);
        let missed = 1.0 - (pairs / f64::from(tokens)).min(1.0);
        (pairs, 1.0 - power(missed, tokens))
    }
}

/// By squaring: no library's `pow`, so that every target computes the same bits.
fn power(base: f64, exponent: u32) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result *= square;
        }
        square *= square;
        rest >>= 1;
    }
    result
}

/// What a call of a layer is predicted to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Milliseconds of each rank.
    pub rank_ms: Vec<f64>,
    /// Milliseconds of the call: those of the slowest rank.
    pub call_ms: f64,
    /// Milliseconds of the call were the ranks' work spread evenly: their mean.
    pub even_ms: f64,
    /// Largest over mean of the ranks' pairs.
    pub max_over_mean: f64,
}

/// Predicts one call of one phase. `speeds` are relative to the device that `load.cost` describes,
/// one for each rank; an empty list stands for 1 everywhere.
#[must_use]
pub fn predict(
    slots: &[u32],
    slots_per_rank: usize,
    load: &PhaseLoad<'_>,
    speeds: &[f64],
) -> Prediction {
    let counts = replica_counts(slots, load.pairs.len());
    let mut rank_ms = Vec::new();
    let mut rank_pairs = Vec::new();
    for (rank, row) in slots.chunks(slots_per_rank.max(1)).enumerate() {
        let (mut pairs, mut active) = (0.0, 0.0);
        for &expert in row.iter().filter(|e| **e != EMPTY) {
            let count = counts.get(expert as usize).copied().unwrap_or(1);
            let (more_pairs, more_active) = load.replica(expert as usize, count);
            pairs += more_pairs;
            active += more_active;
        }
        rank_pairs.push(pairs);
        rank_ms.push(load.cost.ms(pairs, active) / speed(speeds, rank));
    }
    let call_ms = rank_ms.iter().copied().fold(0.0, f64::max);
    let even_ms = rank_ms.iter().sum::<f64>() / rank_ms.len().max(1) as f64;
    Prediction { call_ms, even_ms, max_over_mean: max_over_mean(&rank_pairs), rank_ms }
}

/// A rank's relative speed; what is no positive number counts as 1.
pub(crate) fn speed(speeds: &[f64], rank: usize) -> f64 {
    let speed = speeds.get(rank).copied().unwrap_or(1.0);
    if speed.is_finite() && speed > 0.0 { speed } else { 1.0 }
}
