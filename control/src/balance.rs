//! How evenly a placement spreads a load over ranks. Pure.
//!
//! A layer's call takes as long as its busiest rank, so what counts is the busiest rank's rows beside the
//! mean: `max / mean`, 1 when all have the same. `balancedness` is the inverse, from 1 / ranks to 1, as vLLM
//! defines it. Both are over the ranks of one layer; only then layers are summed up.

use protocol::ids::ExpertId;
use protocol::placement::Placement;
use serde::Serialize;
use utoipa::ToSchema;

/// Rows of each rank if each expert's rows are split over its replicas as the placement says, as workers do, and as many come from
/// each rank.
pub(crate) fn rank_tokens(placement: &Placement, expert_tokens: &[u64]) -> Vec<f64> {
    let mut ranks = vec![0.0; placement.ranks() as usize];
    for (expert, tokens) in (0..placement.experts()).map(ExpertId).zip(expert_tokens) {
        for (slot, share) in placement.replicas(expert).iter().zip(placement.shares(expert)) {
            ranks[placement.rank_of(*slot).0 as usize] += *tokens as f64 * share;
        }
    }
    ranks
}

/// The busiest rank's rows beside the mean; none without rows.
pub(crate) fn max_over_mean(rank_tokens: &[f64]) -> Option<f64> {
    let sum: f64 = rank_tokens.iter().sum();
    let max = rank_tokens.iter().copied().fold(0.0, f64::max);
    (sum > 0.0).then(|| max * rank_tokens.len() as f64 / sum)
}

/// Balancedness over layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub(crate) struct Balancedness {
    /// Of the worst layer.
    pub(crate) min: f64,
    /// Median.
    pub(crate) p50: f64,
    /// 90 of 100 layers do not exceed it.
    pub(crate) p90: f64,
    /// Mean.
    pub(crate) avg: f64,
}

impl Balancedness {
    /// Of layers by their `max / mean`; none without layers. Between two layers percentiles are
    /// interpolated.
    pub(crate) fn of(max_over_mean: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = max_over_mean.into_iter().map(|ratio| 1.0 / ratio).collect();
        all.sort_by(f64::total_cmp);
        let min = *all.first()?;
        let percentile = |percent: usize| {
            let (place, rest) = (percent * (all.len() - 1) / 100, percent * (all.len() - 1) % 100);
            let next = all.get(place + 1).unwrap_or(&all[place]);
            all[place] + (next - all[place]) * rest as f64 / 100.0
        };
        let avg = all.iter().sum::<f64>() / all.len() as f64;
        Some(Self { min, p50: percentile(50), p90: percentile(90), avg })
    }
}

#[cfg(test)]
mod tests {
    use protocol::placement::Split;

    use super::*;

    #[test]
    fn replicas_share_an_experts_rows() {
        // Expert 0 on both ranks; rank 1 has an empty slot.
        let placement = Placement::from_phy2log(3, 2, &[0, 1, 2, 0, -1, -1]).unwrap();
        let tokens = rank_tokens(&placement, &[6, 1, 2]);
        assert_eq!(tokens, [6.0, 3.0]);
        assert_eq!(max_over_mean(&tokens), Some(6.0 / 4.5));
        assert_eq!(max_over_mean(&[0.0, 0.0]), None);
        let weights = vec![1, 2, 1, 1];
        let split = placement.with_split(Split { sources: 1, weights }).unwrap();
        assert_eq!(rank_tokens(&split, &[6, 1, 2]), [5.0, 4.0]);
    }

    #[test]
    fn layers_are_summed_up_after_ranks() {
        let of = |ratios: &[f64]| Balancedness::of(ratios.iter().copied());
        assert_eq!(of(&[]), None);
        let one = Balancedness { min: 0.5, p50: 0.5, p90: 0.5, avg: 0.5 };
        assert_eq!(of(&[2.0]), Some(one));
        let Balancedness { min, p50, p90, avg } = of(&[1.0, 4.0, 2.0]).unwrap();
        assert_eq!((min, p50), (0.25, 0.5));
        assert!((p90 - 0.9).abs() < 1e-9 && (avg - 1.75 / 3.0).abs() < 1e-9, "{p90} {avg}");
    }
}
