//! Which expert each slot of a layer holds, and how calls are split over replicas.
//!
//! A [`Placement`] cannot be invalid: its constructor refuses a placement that loses an expert, puts
//! two replicas of one expert on a rank, or gives ranks different numbers of slots.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::ids::{ExpertId, RankId, SlotId};

/// Why a placement was refused. Every variant names the value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// A group without ranks, a layer without experts, or ranks without slots.
    #[error(
        "a placement needs at least one rank, expert and slot, got {ranks} ranks, {experts} experts, {slots} slots"
    )]
    Empty {
        /// Ranks given.
        ranks: u32,
        /// Experts given.
        experts: u32,
        /// Slots given.
        slots: usize,
    },
    /// The slots cannot be divided evenly.
    #[error("{slots} slots cannot be divided evenly among {ranks} ranks")]
    Uneven {
        /// Slots given.
        slots: usize,
        /// Ranks given.
        ranks: u32,
    },
    /// A slot names an expert the layer does not have.
    #[error("slot {slot} holds expert {expert}, the layer has experts 0 to {last}")]
    UnknownExpert {
        /// The slot.
        slot: SlotId,
        /// The expert it names.
        expert: ExpertId,
        /// The layer's last expert.
        last: ExpertId,
    },
    /// A number that names neither an expert nor an empty slot.
    #[error("slot {slot} holds {expert}, expected an expert, or -1 for an empty slot")]
    NoExpert {
        /// The slot.
        slot: SlotId,
        /// What it holds.
        expert: i64,
    },
    /// An expert has no slot.
    #[error("expert {expert} has no slot")]
    Lost {
        /// The expert.
        expert: ExpertId,
    },
    /// Two replicas of an expert on one rank: a wasted slot, and a hazard for weight copies.
    #[error("rank {rank} holds expert {expert} twice, in slots {first} and {second}")]
    Duplicate {
        /// The rank.
        rank: RankId,
        /// The expert.
        expert: ExpertId,
        /// The first slot.
        first: SlotId,
        /// The second slot.
        second: SlotId,
    },
    /// A split for tokens of neither all ranks alike nor each.
    #[error("a split has {sources} rows of weights, expected 1, or {ranks}, one for each rank")]
    SplitSources {
        /// Rows given.
        sources: u32,
        /// Ranks of the group.
        ranks: u32,
    },
    /// A split that does not have one weight for each replica.
    #[error("a split has {got} weights, expected {expected}, one for each replica in a row")]
    SplitWeights {
        /// Weights given.
        got: usize,
        /// Rows times replicas.
        expected: usize,
    },
    /// A split that gives an expert's tokens to nobody.
    #[error("row {row} of a split gives none of the replicas of expert {expert} a weight")]
    SplitNobody {
        /// The row.
        row: u32,
        /// The expert.
        expert: ExpertId,
    },
}

/// A file of placements that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no list of lists of experts.
    #[error("{} is no JSON of the form [layer][slot]", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
}

/// Reads a file of placements, JSON `[layer][slot]`, each row as [`Placement::from_phy2log`] takes it; its
/// text and the rows.
///
/// # Errors
/// [`FileError`] names the file.
pub fn read_phy2log(path: &Path) -> Result<(Vec<u8>, Vec<Vec<i64>>), FileError> {
    let path = path.to_owned();
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(FileError::Read { path, source }),
    };
    match serde_json::from_slice(&text) {
        Ok(rows) => Ok((text, rows)),
        Err(source) => Err(FileError::Json { path, source }),
    }
}

/// The expert of every slot of one layer; slots of a rank are contiguous, a slot may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PlacementWire", into = "PlacementWire")]
pub struct Placement {
    ranks: u32,
    experts: u32,
    expert_of_slot: Vec<Option<ExpertId>>,
    /// Slots of each expert, ascending: the order of replicas in a [`RoutingTable`].
    slots_of_expert: Vec<Vec<SlotId>>,
    /// How tokens are split over replicas; none for evenly.
    split: Option<Split>,
}

/// How an expert's tokens are split over its replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Rows of `weights`: 1, the same split for tokens of every rank, or one for each rank that tokens come from.
    pub sources: u32,
    /// Weight of each replica beside the sum over its expert's, `[sources, replicas]`. Replicas are in the order of experts,
    /// then of slots. Those of an expert are not all 0 in a row.
    pub weights: Vec<u16>,
}

#[derive(Serialize, Deserialize)]
struct PlacementWire {
    ranks: u32,
    experts: u32,
    expert_of_slot: Vec<Option<ExpertId>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    split: Option<Split>,
}

impl TryFrom<PlacementWire> for Placement {
    type Error = PlacementError;

    fn try_from(wire: PlacementWire) -> Result<Self, PlacementError> {
        let placement = Self::new(wire.experts, wire.ranks, wire.expert_of_slot)?;
        match wire.split {
            Some(split) => placement.with_split(split),
            None => Ok(placement),
        }
    }
}

impl From<Placement> for PlacementWire {
    fn from(placement: Placement) -> Self {
        Self {
            ranks: placement.ranks,
            experts: placement.experts,
            expert_of_slot: placement.expert_of_slot,
            split: placement.split,
        }
    }
}

impl Placement {
    /// Checks `expert_of_slot` (rank by rank, equally many slots each) and takes it.
    ///
    /// # Errors
    /// See [`PlacementError`].
    pub fn new(
        experts: u32,
        ranks: u32,
        expert_of_slot: Vec<Option<ExpertId>>,
    ) -> Result<Self, PlacementError> {
        let slots = expert_of_slot.len();
        if ranks == 0 || experts == 0 || slots == 0 {
            return Err(PlacementError::Empty { ranks, experts, slots });
        }
        if !slots.is_multiple_of(ranks as usize) {
            return Err(PlacementError::Uneven { slots, ranks });
        }
        let slots_per_rank = slots / ranks as usize;
        let mut slots_of_expert: Vec<Vec<SlotId>> = vec![Vec::new(); experts as usize];
        for (slot, expert) in (0_u32..).map(SlotId).zip(&expert_of_slot) {
            let Some(expert) = *expert else { continue };
            let Some(replicas) = slots_of_expert.get_mut(expert.0 as usize) else {
                let last = ExpertId(experts - 1);
                return Err(PlacementError::UnknownExpert { slot, expert, last });
            };
            if let Some(&first) = replicas.last()
                && first.0 as usize / slots_per_rank == slot.0 as usize / slots_per_rank
            {
                let rank = rank_of(slot, slots_per_rank);
                return Err(PlacementError::Duplicate { rank, expert, first, second: slot });
            }
            replicas.push(slot);
        }
        if let Some(expert) = (0..).zip(&slots_of_expert).find(|(_, s)| s.is_empty()) {
            return Err(PlacementError::Lost { expert: ExpertId(expert.0) });
        }
        Ok(Self { ranks, experts, expert_of_slot, slots_of_expert, split: None })
    }

    /// Experts in order over the ranks, `experts / ranks` rounded up on each (empty slots where they
    /// do not divide); redundant slots beyond that hold second replicas of the neighbour's first
    /// experts. The placement before anything was measured.
    ///
    /// `slots_per_rank` below `experts / ranks` rounded up is refused as [`PlacementError::Lost`].
    ///
    /// # Errors
    /// See [`PlacementError`].
    pub fn contiguous(
        experts: u32,
        ranks: u32,
        slots_per_rank: u32,
    ) -> Result<Self, PlacementError> {
        let slots = ranks as usize * slots_per_rank as usize;
        if ranks == 0 || experts == 0 || slots == 0 {
            return Err(PlacementError::Empty { ranks, experts, slots });
        }
        let per_rank = experts.div_ceil(ranks);
        let mut expert_of_slot = vec![None; slots];
        for (rank, row) in (0..ranks).zip(expert_of_slot.chunks_mut(slots_per_rank as usize)) {
            let first = (rank * per_rank).min(experts);
            let own = first..((rank + 1) * per_rank).min(experts);
            for (slot, expert) in row.iter_mut().zip(own.clone()) {
                *slot = Some(ExpertId(expert));
            }
            // The experts that follow the rank's own, cyclically: never a second one of its own.
            let others = (0..experts - (own.end - own.start)).map(|n| (own.end + n) % experts);
            for (slot, expert) in row.iter_mut().skip(per_rank as usize).zip(others) {
                *slot = Some(ExpertId(expert));
            }
        }
        Self::new(experts, ranks, expert_of_slot)
    }

    /// A placement in the form of DeepSeek's `phy2log`: the expert of every slot, rank by rank; -1
    /// is an empty slot.
    ///
    /// # Errors
    /// See [`PlacementError`].
    pub fn from_phy2log(experts: u32, ranks: u32, phy2log: &[i64]) -> Result<Self, PlacementError> {
        let expert = |(slot, &expert): (u32, &i64)| match expert {
            -1 => Ok(None),
            _ => u32::try_from(expert)
                .map(|expert| Some(ExpertId(expert)))
                .map_err(|_beyond| PlacementError::NoExpert { slot: SlotId(slot), expert }),
        };
        let slots = (0..).zip(phy2log).map(expert).collect::<Result<_, _>>()?;
        Self::new(experts, ranks, slots)
    }

    /// The inverse of [`Self::from_phy2log`].
    #[must_use]
    pub fn to_phy2log(&self) -> Vec<i64> {
        self.expert_of_slot.iter().map(|slot| slot.map_or(-1, |e| i64::from(e.0))).collect()
    }

    /// The same slots with another split. One that is even is none.
    ///
    /// # Errors
    /// [`PlacementError::SplitSources`], [`PlacementError::SplitWeights`], [`PlacementError::SplitNobody`].
    pub fn with_split(mut self, split: Split) -> Result<Self, PlacementError> {
        let Split { sources, weights } = &split;
        let (sources, ranks) = (*sources, self.ranks);
        if sources != 1 && sources != ranks {
            return Err(PlacementError::SplitSources { sources, ranks });
        }
        let replicas: usize = self.slots_of_expert.iter().map(Vec::len).sum();
        let (got, expected) = (weights.len(), replicas * sources as usize);
        if got != expected {
            return Err(PlacementError::SplitWeights { got, expected });
        }
        let mut even = true;
        for (row, mut rest) in (0..).zip(weights.chunks(replicas)) {
            for (expert, slots) in (0..).map(ExpertId).zip(&self.slots_of_expert) {
                let (own, others) = rest.split_at(slots.len());
                if own.iter().all(|&weight| weight == 0) {
                    return Err(PlacementError::SplitNobody { row, expert });
                }
                even &= own.iter().all(|weight| *weight == own[0]);
                rest = others;
            }
        }
        self.split = (!even).then_some(split);
        Ok(self)
    }

    /// How tokens are split over replicas; none for evenly.
    #[must_use]
    pub fn split(&self) -> Option<&Split> {
        self.split.as_ref()
    }

    /// Which part of an expert's tokens goes to each of its replicas, in the order of [`Self::replicas`], if as many come from
    /// each rank; 1 altogether.
    #[must_use]
    pub fn shares(&self, expert: ExpertId) -> Vec<f64> {
        let count = self.replicas(expert).len();
        let Some(Split { sources, weights }) = &self.split else {
            return vec![1.0 / count as f64; count];
        };
        let (first, replicas) = (self.first_replica(expert), weights.len() / *sources as usize);
        let mut shares = vec![0.0; count];
        for row in weights.chunks(replicas) {
            let own = &row[first..first + count];
            let sum: u64 = own.iter().map(|&weight| u64::from(weight)).sum();
            for (share, weight) in shares.iter_mut().zip(own) {
                *share += f64::from(*weight) / sum.max(1) as f64 / f64::from(*sources);
            }
        }
        shares
    }

    /// Replicas of all experts before `expert`.
    fn first_replica(&self, expert: ExpertId) -> usize {
        self.slots_of_expert.iter().take(expert.0 as usize).map(Vec::len).sum()
    }

    /// Ranks of the group.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.ranks
    }

    /// Experts of the layer.
    #[must_use]
    pub fn experts(&self) -> u32 {
        self.experts
    }

    /// Slots of each rank.
    #[must_use]
    pub fn slots_per_rank(&self) -> u32 {
        u32::try_from(self.expert_of_slot.len()).unwrap_or(u32::MAX) / self.ranks
    }

    /// The expert of every slot, rank by rank.
    #[must_use]
    pub fn expert_of_slot(&self) -> &[Option<ExpertId>] {
        &self.expert_of_slot
    }

    /// The experts of one rank's slots; empty for a rank outside the group.
    #[must_use]
    pub fn slots_of_rank(&self, rank: RankId) -> &[Option<ExpertId>] {
        let per_rank = self.slots_per_rank() as usize;
        self.expert_of_slot.chunks(per_rank).nth(rank.0 as usize).unwrap_or_default()
    }

    /// The slots that hold `expert`, ascending; empty for an unknown expert.
    #[must_use]
    pub fn replicas(&self, expert: ExpertId) -> &[SlotId] {
        self.slots_of_expert.get(expert.0 as usize).map_or(&[], Vec::as_slice)
    }

    /// The rank that owns `slot`.
    #[must_use]
    pub fn rank_of(&self, slot: SlotId) -> RankId {
        rank_of(slot, self.slots_per_rank() as usize)
    }
}

fn rank_of(slot: SlotId, slots_per_rank: usize) -> RankId {
    RankId(slot.0 / u32::try_from(slots_per_rank).unwrap_or(u32::MAX).max(1))
}

/// Expert to replicas with cumulative split weights, in the flat form that devices read.
///
/// A token goes to the first replica whose cumulative weight exceeds
/// `hash(source rank, token index, expert)`, a number from 0 to 65534; the last cumulative weight
/// of each expert is 65535.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingTable {
    /// `experts + 1` positions into the two lists below.
    pub replica_start: Vec<u32>,
    /// Slot of each replica, over the whole group.
    pub slots: Vec<u32>,
    /// Cumulative split weight of each replica within its expert.
    pub cumulative: Vec<u16>,
}

impl RoutingTable {
    /// For tokens that come from the rank `source`.
    #[must_use]
    pub fn of(placement: &Placement, source: RankId) -> Self {
        let mut table = Self { replica_start: vec![0], slots: Vec::new(), cumulative: Vec::new() };
        let replicas: usize = placement.slots_of_expert.iter().map(Vec::len).sum();
        let even = vec![1; replicas];
        let row = placement.split.as_ref().and_then(|Split { sources, weights }| {
            let row = if *sources == 1 { 0 } else { source.0 as usize };
            weights.chunks(replicas).nth(row)
        });
        let mut rest = row.unwrap_or(&even);
        for slots in &placement.slots_of_expert {
            let (own, others) = rest.split_at(slots.len());
            rest = others;
            let total: u64 = own.iter().map(|&weight| u64::from(weight)).sum();
            let mut sum = 0_u64;
            for (slot, weight) in slots.iter().zip(own) {
                sum += u64::from(*weight);
                table.slots.push(slot.0);
                let share = sum * u64::from(u16::MAX) / total.max(1);
                table.cumulative.push(u16::try_from(share).unwrap_or(u16::MAX));
            }
            table.replica_start.push(u32::try_from(table.slots.len()).unwrap_or(u32::MAX));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(experts: &[i32]) -> Vec<Option<ExpertId>> {
        experts.iter().map(|&e| u32::try_from(e).ok().map(ExpertId)).collect()
    }

    #[test]
    fn contiguous_covers_every_expert_and_leaves_no_duplicate() {
        for (experts, ranks, per_rank) in
            [(32, 4, 9), (7, 4, 2), (4, 4, 1), (13, 1, 13), (60, 4, 16)]
        {
            let p = Placement::contiguous(experts, ranks, per_rank).unwrap();
            assert_eq!(p.slots_per_rank(), per_rank);
            assert!((0..experts).all(|e| !p.replicas(ExpertId(e)).is_empty()));
        }
        assert_eq!(
            Placement::contiguous(32, 4, 9).unwrap().slots_of_rank(RankId(3)),
            slots(&[24, 25, 26, 27, 28, 29, 30, 31, 0])
        );
    }

    #[test]
    fn invalid_placements_are_refused_by_name() {
        assert_eq!(
            Placement::new(2, 2, slots(&[0, 0, 1, -1])),
            Err(PlacementError::Duplicate {
                rank: RankId(0),
                expert: ExpertId(0),
                first: SlotId(0),
                second: SlotId(1),
            })
        );
        assert_eq!(
            Placement::new(3, 2, slots(&[0, 1])),
            Err(PlacementError::Lost { expert: ExpertId(2) })
        );
        assert!(matches!(
            Placement::new(2, 2, slots(&[0, 1, 5, -1])),
            Err(PlacementError::UnknownExpert { slot: SlotId(2), .. })
        ));
        assert_eq!(
            Placement::new(2, 2, slots(&[0, 1, 0])),
            Err(PlacementError::Uneven { slots: 3, ranks: 2 })
        );
        assert!(matches!(Placement::contiguous(5, 2, 2), Err(PlacementError::Lost { .. })));
    }

    #[test]
    fn placement_survives_json_and_refuses_a_bad_one() {
        let p = Placement::contiguous(7, 4, 2).unwrap();
        let json = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Placement>(&json).unwrap(), p);
        let bad = r#"{"ranks":1,"experts":2,"expert_of_slot":[0,0]}"#;
        let error = serde_json::from_str::<Placement>(bad).unwrap_err().to_string();
        assert!(error.contains("rank 0 holds expert 0 twice"), "{error}");
    }

    #[test]
    fn phy2log_comes_back_and_names_what_is_no_expert() {
        let phy2log = [2, 0, 1, -1, 0, 1];
        let p = Placement::from_phy2log(3, 2, &phy2log).unwrap();
        assert_eq!((p.slots_per_rank(), p.to_phy2log()), (3, phy2log.to_vec()));
        for bad in [-2, 1 << 40] {
            let slot = SlotId(3);
            let error = Placement::from_phy2log(3, 2, &[0, 1, 2, bad]).unwrap_err();
            assert_eq!(error, PlacementError::NoExpert { slot, expert: bad });
        }
    }

    /// Experts 0 and 1 on two ranks, the first on both.
    fn replicated() -> Placement {
        Placement::new(2, 2, slots(&[0, 1, 0, -1])).unwrap()
    }

    fn with_split(sources: u32, weights: &[u16]) -> Result<Placement, PlacementError> {
        replicated().with_split(Split { sources, weights: weights.to_vec() })
    }

    #[test]
    fn split_weights_become_cumulative_shares() {
        let of = |placement: &Placement, rank| RoutingTable::of(placement, RankId(rank));
        let even = of(&replicated(), 0);
        assert_eq!(even.replica_start, [0, 2, 3]);
        assert_eq!(even.slots, [0, 2, 1]);
        assert_eq!(even.cumulative, [32767, 65535, 65535]);
        assert_eq!(replicated().shares(ExpertId(0)), [0.5, 0.5]);
        let skewed = with_split(1, &[3, 1, 9]).unwrap();
        for rank in [0, 1] {
            assert_eq!(of(&skewed, rank).cumulative, [49151, 65535, 65535]);
        }
        assert_eq!(skewed.shares(ExpertId(0)), [0.75, 0.25]);
        assert_eq!(skewed.shares(ExpertId(1)), [1.0]);
        // Each rank keeps what it can.
        let near = with_split(2, &[1, 0, 9, 0, 1, 9]).unwrap();
        assert_eq!(of(&near, 0).cumulative, [65535, 65535, 65535]);
        assert_eq!(of(&near, 1).cumulative, [0, 65535, 65535]);
        assert_eq!(near.shares(ExpertId(0)), [0.5, 0.5]);
        let json = serde_json::to_string(&near).unwrap();
        assert_eq!(serde_json::from_str::<Placement>(&json).unwrap(), near);
    }

    #[test]
    fn splits_that_cannot_be_are_refused_and_an_even_one_is_none() {
        assert_eq!(with_split(2, &[4, 4, 1, 2, 2, 7]).unwrap(), replicated());
        let refused = |sources, weights: &[u16]| with_split(sources, weights).unwrap_err();
        assert_eq!(refused(3, &[1; 9]), PlacementError::SplitSources { sources: 3, ranks: 2 });
        assert_eq!(refused(2, &[1; 5]), PlacementError::SplitWeights { got: 5, expected: 6 });
        let nobody = PlacementError::SplitNobody { row: 1, expert: ExpertId(0) };
        assert_eq!(refused(2, &[1, 1, 1, 0, 0, 1]), nobody);
        let bad = serde_json::to_string(&with_split(1, &[3, 1, 9]).unwrap()).unwrap();
        let bad = bad.replace("[3,1,9]", "[3,1]");
        assert!(serde_json::from_str::<Placement>(&bad).is_err());
    }
}
