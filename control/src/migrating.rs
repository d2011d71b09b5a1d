//! What ranks are told so that a layer comes to have the placement that was committed last, while calls go on. Pure, and
//! without a memory of its own: it looks at what every rank says that it holds and has staged, so that it does not matter
//! who was told what before, or whether control was away meanwhile.
//!
//! ```text
//! all hold E, E' is committed  ->  Stage E' to whoever has not
//! all have staged E'           ->  Ready E' to all, if those who have an expert have the same of it
//! one is ready for E', or has it in force  ->  there is no way back: Ready E' to the others, too
//! all hold E'                  ->  nothing
//! ```

use std::collections::BTreeMap;

use protocol::session::{FromControl, LayerPlacement, LayerStaging};

/// What a rank says of a layer.
#[derive(Debug, Clone)]
pub(crate) struct RankLayer {
    pub(crate) rank: u32,
    /// The epoch in force.
    pub(crate) held: u64,
    pub(crate) staging: Option<LayerStaging>,
}

impl RankLayer {
    /// What it says of its way to `epoch`.
    pub(crate) fn to(&self, epoch: u64) -> Option<&LayerStaging> {
        self.staging.as_ref().filter(|staging| staging.epoch == epoch)
    }

    fn has_staged(&self, epoch: u64) -> bool {
        self.to(epoch).is_some_and(|staging| staging.staged && staging.problem.is_none())
    }

    /// Whether it says that it stages `epoch`, or has.
    fn works_at(&self, epoch: u64) -> bool {
        self.to(epoch).is_some_and(|staging| staging.problem.is_none())
    }

    fn is_ready(&self) -> Option<u64> {
        self.staging.as_ref().filter(|staging| staging.ready).map(|staging| staging.epoch)
    }

    /// What it is told to come to hold `wanted`, for which others are ready.
    fn follows(&self, wanted: u64, committed: &[LayerPlacement]) -> Option<FromControl> {
        if self.held >= wanted || self.is_ready() == Some(wanted) {
            return None;
        }
        if self.has_staged(wanted) {
            return ready(committed, wanted);
        }
        if self.works_at(wanted) {
            return None;
        }
        let placement = committed.iter().find(|placed| placed.epoch == wanted)?.clone();
        Some(FromControl::Stage { placement })
    }
}

/// Two ranks that have an expert of a layer, and not the same of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Disagreement {
    #[error("expert {expert} is not the same on rank {second} as on rank {first}")]
    Weights { expert: u32, first: u32, second: u32 },
    #[error("expert {expert} answers the canary otherwise on rank {second} than on rank {first}")]
    Canary { expert: u32, first: u32, second: u32 },
}

impl Disagreement {
    /// The later rank.
    pub(crate) fn second(&self) -> u32 {
        match *self {
            Self::Weights { second, .. } | Self::Canary { second, .. } => second,
        }
    }
}

/// Whether ranks that have staged `epoch` disagree about what an expert is, or about what it answers.
pub(crate) fn disagreement(ranks: &[RankLayer], epoch: u64) -> Option<Disagreement> {
    let staged = ranks.iter().filter_map(|of| Some((of.rank, of.to(epoch)?)));
    let weights = differing(staged.clone().map(|(rank, s)| (rank, &s.digests[..])));
    if let Some((expert, first, second)) = weights {
        return Some(Disagreement::Weights { expert, first, second });
    }
    let (expert, first, second) = differing(staged.map(|(rank, s)| (rank, &s.canaries[..])))?;
    Some(Disagreement::Canary { expert, first, second })
}

/// The first expert of which two ranks say something else, and these.
fn differing<'a>(said: impl Iterator<Item = (u32, &'a [(u32, u64)])>) -> Option<(u32, u32, u32)> {
    let mut known: BTreeMap<u32, (u32, u64)> = BTreeMap::new();
    for (second, of_experts) in said {
        for &(expert, digest) in of_experts {
            let (first, before) = *known.entry(expert).or_insert((second, digest));
            if before != digest {
                return Some((expert, first, second));
            }
        }
    }
    None
}

fn ready(committed: &[LayerPlacement], epoch: u64) -> Option<FromControl> {
    committed.first().map(|placed| FromControl::Ready { layer: placed.layer, epoch })
}

/// The epoch that all ranks are to come to hold, if one holds or is ready for what others do not hold.
pub(crate) fn bound(ranks: &[RankLayer]) -> Option<u64> {
    let ahead = ranks.iter().map(|rank| rank.held).max()?;
    let behind = ranks.iter().any(|rank| rank.held < ahead);
    if behind { Some(ahead) } else { ranks.iter().find_map(RankLayer::is_ready) }
}

/// Orders to ranks, by number. `ranks` are all of the group but for those that were given up, `committed` the placements of the layer that are later than the
/// earliest in force, newest first.
pub(crate) fn orders(ranks: &[RankLayer], committed: &[LayerPlacement]) -> Vec<(u32, FromControl)> {
    let Some(newest) = committed.first() else { return Vec::new() };
    let ahead = ranks.iter().map(|rank| rank.held).max().unwrap_or(0);
    if let Some(wanted) = bound(ranks) {
        let order = |of: &RankLayer| Some((of.rank, of.follows(wanted, committed)?));
        return ranks.iter().filter_map(order).collect();
    }
    if newest.epoch <= ahead {
        return Vec::new();
    }
    if ranks.iter().all(|rank| rank.has_staged(newest.epoch)) {
        if disagreement(ranks, newest.epoch).is_some() {
            return Vec::new();
        }
        let order = FromControl::Ready { layer: newest.layer, epoch: newest.epoch };
        return ranks.iter().map(|of| (of.rank, order.clone())).collect();
    }
    let order = FromControl::Stage { placement: newest.clone() };
    let idle = ranks.iter().filter(|of| !of.works_at(newest.epoch));
    idle.map(|of| (of.rank, order.clone())).collect()
}

#[cfg(test)]
mod tests {
    use protocol::placement::Placement;

    use super::*;

    fn placed(epoch: u64) -> LayerPlacement {
        let placement = Placement::contiguous(4, 2, 2).unwrap();
        LayerPlacement { layer: 3, epoch, placement }
    }

    fn holds(held: u64) -> RankLayer {
        RankLayer { rank: 0, held, staging: None }
    }

    fn staging(held: u64, epoch: u64, (staged, ready): (bool, bool)) -> RankLayer {
        RankLayer {
            rank: 0,
            held,
            staging: Some(LayerStaging {
                layer: 3,
                epoch,
                left: u64::from(!staged),
                staged,
                ready,
                ..LayerStaging::default()
            }),
        }
    }

    /// As ranks 0, 1 and so on.
    fn numbered(ranks: &[RankLayer]) -> Vec<RankLayer> {
        (0..).zip(ranks).map(|(rank, of)| RankLayer { rank, ..of.clone() }).collect()
    }

    /// Orders in few words: rank and epoch.
    fn told(ranks: &[RankLayer], committed: &[u64]) -> Vec<String> {
        let committed: Vec<LayerPlacement> = committed.iter().map(|&epoch| placed(epoch)).collect();
        let words = |(rank, order)| match order {
            FromControl::Stage { placement } => format!("{rank} stage {}", placement.epoch),
            FromControl::Ready { layer: 3, epoch } => format!("{rank} ready {epoch}"),
            other => panic!("{other:?}"),
        };
        orders(&numbered(ranks), &committed).into_iter().map(words).collect()
    }

    #[test]
    fn a_placement_is_staged_everywhere_before_anybody_is_ready() {
        let none: [&str; 0] = [];
        assert_eq!(told(&[holds(1), holds(1)], &[]), none);
        assert_eq!(told(&[holds(1), holds(1)], &[2]), ["0 stage 2", "1 stage 2"]);
        let works = staging(1, 2, (false, false));
        let has = staging(1, 2, (true, false));
        // Who has not told that it works may not have heard.
        assert_eq!(told(&[has.clone(), works], &[2]), none);
        assert_eq!(told(&[has.clone(), holds(1)], &[2]), ["1 stage 2"]);
        assert_eq!(told(&[has.clone(), has.clone()], &[2]), ["0 ready 2", "1 ready 2"]);
        let mut failed = has.clone();
        failed.staging.as_mut().unwrap().problem = Some("no memory".to_owned());
        assert_eq!(told(&[has.clone(), failed], &[2]), ["1 stage 2"]);
        // Another is committed meanwhile: the one that is staged is not wanted any more.
        assert_eq!(told(&[has.clone(), has], &[3, 2]), ["0 stage 3", "1 stage 3"]);
    }

    /// A rank with other weights is never in force.
    #[test]
    fn nobody_is_ready_while_an_expert_is_not_the_same_everywhere() {
        let has = |digests: &[(u32, u64)]| {
            let mut rank = staging(1, 2, (true, false));
            rank.staging.as_mut().unwrap().digests = digests.to_vec();
            rank
        };
        let none: [&str; 0] = [];
        let other = [has(&[(0, 7), (1, 8)]), has(&[(1, 9), (2, 5)])];
        assert_eq!(told(&other, &[2]), none);
        let found = disagreement(&numbered(&other), 2).unwrap();
        assert_eq!(found, Disagreement::Weights { expert: 1, first: 0, second: 1 });
        assert_eq!(found.to_string(), "expert 1 is not the same on rank 1 as on rank 0");
        let same = [has(&[(0, 7), (1, 8)]), has(&[(1, 8), (2, 5)])];
        assert_eq!(told(&same, &[2]), ["0 ready 2", "1 ready 2"]);
        // Another may take its place.
        assert_eq!(told(&other, &[3, 2]), ["0 stage 3", "1 stage 3"]);
        // The same weights, and other answers.
        let mut answers = same;
        answers[0].staging.as_mut().unwrap().canaries = vec![(1, 3), (0, 2)];
        answers[1].staging.as_mut().unwrap().canaries = vec![(1, 4), (2, 9)];
        assert_eq!(told(&answers, &[2]), none);
        let found = disagreement(&numbered(&answers), 2).unwrap();
        assert_eq!(
            found.to_string(),
            "expert 1 answers the canary otherwise on rank 1 than on rank 0"
        );
    }

    #[test]
    fn what_one_rank_is_ready_for_all_come_to_hold() {
        let (has, ready) = (staging(1, 2, (true, false)), staging(1, 2, (true, true)));
        let none: [&str; 0] = [];
        assert_eq!(told(&[ready.clone(), has.clone()], &[2]), ["1 ready 2"]);
        assert_eq!(told(&[ready.clone(), ready.clone()], &[2]), none);
        // Also if another is committed by now, or a rank has started again.
        assert_eq!(told(&[ready.clone(), has.clone()], &[3, 2]), ["1 ready 2"]);
        assert_eq!(told(&[ready.clone(), holds(1)], &[3, 2]), ["1 stage 2"]);
        // The first has it in force.
        assert_eq!(told(&[holds(2), ready.clone()], &[3, 2]), none);
        assert_eq!(told(&[holds(2), has], &[3, 2]), ["1 ready 2"]);
        assert_eq!(told(&[holds(2), holds(2)], &[3]), ["0 stage 3", "1 stage 3"]);
    }

    /// Whatever is lost or comes late, and whenever ranks start again: all come to hold the newest, none is ever ready for
    /// something that another lacks, and no rank flips alone.
    #[test]
    fn every_history_ends_with_the_newest_everywhere() {
        for seed in 0..2_000_u64 {
            let mut world = World::new(seed);
            let mut steps = 0;
            while !world.is_done() {
                world.step();
                steps += 1;
                assert!(steps < 10_000, "seed {seed}: {:?}", world.ranks);
            }
        }
    }

    /// Ranks, and orders on their way to them.
    struct World {
        ranks: Vec<RankLayer>,
        committed: Vec<u64>,
        waiting: Vec<(u32, FromControl)>,
        random: u64,
        commits: u32,
    }

    impl World {
        fn new(seed: u64) -> Self {
            let ranks = vec![holds(1); 3];
            Self { ranks, committed: vec![2, 1], waiting: Vec::new(), random: seed, commits: 3 }
        }

        fn roll(&mut self, sides: usize) -> usize {
            // SplitMix64.
            self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (self.random ^ self.random >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            usize::try_from(z >> 40).unwrap() % sides
        }

        fn is_done(&self) -> bool {
            self.commits == 0 && self.ranks.iter().all(|rank| rank.held == self.committed[0])
        }

        fn step(&mut self) {
            let rank = self.roll(3);
            match self.roll(12) {
                0..4 => {
                    let lowest = self.ranks.iter().map(|rank| rank.held).min().unwrap();
                    let later = self.committed.iter().filter(|&&epoch| epoch > lowest);
                    let later: Vec<LayerPlacement> = later.map(|&epoch| placed(epoch)).collect();
                    let orders = orders(&numbered(&self.ranks), &later);
                    self.waiting.extend(orders);
                }
                4..8 if !self.waiting.is_empty() => {
                    let at = self.roll(self.waiting.len());
                    let (rank, order) = self.waiting.swap_remove(at);
                    // A session may end with what was said last.
                    if self.roll(5) > 0 {
                        follow(&mut self.ranks[rank as usize], order);
                    }
                }
                8 => {
                    if let Some(staging) = &mut self.ranks[rank].staging {
                        (staging.staged, staging.left) = (true, 0);
                    }
                }
                9 if self.commits > 0 => {
                    self.commits -= 1;
                    self.committed.insert(0, self.committed[0] + 1);
                }
                10 if self.roll(10) == 0 => {
                    // It starts again, and is told what the others hold.
                    let held = self.ranks.iter().map(|rank| rank.held).max().unwrap();
                    self.ranks[rank] = holds(held);
                }
                _ => self.call(),
            }
        }

        /// A call: all ready ranks flip, if all are.
        fn call(&mut self) {
            let Some(epoch) = self.ranks[0].is_ready() else { return };
            if self.ranks.iter().all(|rank| rank.is_ready() == Some(epoch)) {
                self.ranks.fill(holds(epoch));
            }
        }
    }

    /// As workers do.
    fn follow(rank: &mut RankLayer, order: FromControl) {
        match order {
            FromControl::Stage { placement } => {
                let known = rank.staging.as_ref();
                let same = known.is_some_and(|staging| staging.epoch == placement.epoch);
                let ready = known.is_some_and(|staging| staging.ready);
                if placement.epoch > rank.held && !same && !ready {
                    *rank = staging(rank.held, placement.epoch, (false, false));
                }
            }
            FromControl::Ready { epoch, .. } => {
                if let Some(staging) = &mut rank.staging
                    && (staging.epoch, staging.staged) == (epoch, true)
                {
                    staging.ready = true;
                }
            }
            other => panic!("{other:?}"),
        }
    }
}
