//! What would be if ranks were lost: which experts have no replica elsewhere, whether the others have room for them, and how even
//! those would be. Pure.

use std::collections::BTreeSet;

use protocol::ids::ExpertId;
use protocol::placement::Placement;

use crate::balance::max_over_mean;

/// A layer without some ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Loss {
    /// Experts that no other rank has.
    pub(crate) gone: Vec<u32>,
    /// Whether the others have a slot for each of these, if replicas make way.
    pub(crate) room: bool,
    /// Rows of the busiest of the others beside their mean, with the replicas that are left, and without the rows of experts that are
    /// gone; none without rows.
    pub(crate) max_over_mean: Option<f64>,
}

/// What a layer would be without the ranks `lost`.
pub(crate) fn without(placement: &Placement, lost: &BTreeSet<u32>, rows: &[u64]) -> Loss {
    let left: Vec<u32> = (0..placement.ranks()).filter(|rank| !lost.contains(rank)).collect();
    let mut of_ranks = vec![0.0; left.len()];
    let mut gone = Vec::new();
    for expert in 0..placement.experts() {
        let of = ExpertId(expert);
        let replicas = placement.replicas(of).iter().zip(placement.shares(of));
        let place = |slot| left.iter().position(|rank| *rank == placement.rank_of(slot).0);
        let stay: Vec<(usize, f64)> =
            replicas.filter_map(|(slot, share)| Some((place(*slot)?, share))).collect();
        let whole: f64 = stay.iter().map(|(_, share)| share).sum();
        let rows = rows.get(expert as usize).copied().unwrap_or(0) as f64;
        for (place, share) in &stay {
            // As `kernels::route`: those that stay share what there is as they did, or evenly if they had nothing.
            let share = if whole > 0.0 { share / whole } else { 1.0 / stay.len() as f64 };
            of_ranks[*place] += rows * share;
        }
        if stay.is_empty() {
            gone.push(expert);
        }
    }
    let slots = left.len() * placement.slots_per_rank() as usize;
    let room = slots >= placement.experts() as usize;
    Loss { gone, room, max_over_mean: max_over_mean(&of_ranks) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_gone_that_no_other_rank_has() {
        // Expert 0 on ranks 0 and 2.
        let placement = Placement::from_phy2log(5, 3, &[0, 1, 2, 3, 4, 0]).unwrap();
        let rows = [8, 2, 3, 1, 6];
        let of = |lost: &[u32]| without(&placement, &lost.iter().copied().collect(), &rows);
        // 6 rows on rank 0, 4 on rank 1, 10 on rank 2.
        let whole = of(&[]);
        assert_eq!((&whole.gone[..], whole.room), (&[][..], true));
        assert_eq!(whole.max_over_mean, Some(10.0 * 3.0 / 20.0));
        // All of expert 0's rows come to rank 2: 4 and 14; four slots are too few for five experts.
        let loss = of(&[0]);
        assert_eq!((&loss.gone[..], loss.room), (&[1][..], false));
        assert_eq!(loss.max_over_mean, Some(14.0 * 2.0 / 18.0));
        assert_eq!(of(&[0, 2]).gone, [0, 1, 4]);
        let all = of(&[0, 1, 2]);
        assert_eq!((all.gone.len(), all.room, all.max_over_mean), (5, false, None));
    }
}
