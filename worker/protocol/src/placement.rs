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
    /// A split that does not have one weight for each replica, or whose weights sum to zero.
    #[error(
        "expert {expert} has {replicas} replicas, got split weights {weights:?} (one each, not all 0)"
    )]
    Split {
        /// The expert.
        expert: ExpertId,
        /// Its replicas.
        replicas: usize,
        /// The weights given.
        weights: Vec<u16>,
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
}

#[derive(Serialize, Deserialize)]
struct PlacementWire {
    ranks: u32,
    experts: u32,
    expert_of_slot: Vec<Option<ExpertId>>,
}

impl TryFrom<PlacementWire> for Placement {
    type Error = PlacementError;

    fn try_from(wire: PlacementWire) -> Result<Self, PlacementError> {
        Self::new(wire.experts, wire.ranks, wire.expert_of_slot)
    }
}

impl From<Placement> for PlacementWire {
    fn from(placement: Placement) -> Self {
        Self {
            ranks: placement.ranks,
            experts: placement.experts,
            expert_of_slot: placement.expert_of_slot,
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
        Ok(Self { ranks, experts, expert_of_slot, slots_of_expert })
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
    /// Every replica of an expert gets the same share.
    #[must_use]
    pub fn even(placement: &Placement) -> Self {
        let weights = placement.slots_of_expert.iter().map(|slots| vec![1; slots.len()]);
        Self::build(placement, weights)
    }

    /// `split[expert]` has one weight for each replica, in the order of [`Placement::replicas`].
    ///
    /// # Errors
    /// [`PlacementError::Split`] when a row has another length or sums to zero,
    /// [`PlacementError::Lost`] when an expert's row is missing.
    pub fn weighted(placement: &Placement, split: &[Vec<u16>]) -> Result<Self, PlacementError> {
        for expert in (0..placement.experts).map(ExpertId) {
            let Some(weights) = split.get(expert.0 as usize) else {
                return Err(PlacementError::Lost { expert });
            };
            let replicas = placement.replicas(expert).len();
            if weights.len() != replicas || weights.iter().all(|&w| w == 0) {
                let weights = weights.clone();
                return Err(PlacementError::Split { expert, replicas, weights });
            }
        }
        Ok(Self::build(placement, split.iter().cloned()))
    }

    fn build(placement: &Placement, weights: impl Iterator<Item = Vec<u16>>) -> Self {
        let mut table = Self { replica_start: vec![0], slots: Vec::new(), cumulative: Vec::new() };
        for (slots, weights) in placement.slots_of_expert.iter().zip(weights) {
            let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
            let mut sum = 0_u64;
            for (slot, weight) in slots.iter().zip(&weights) {
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

    #[test]
    fn split_weights_become_cumulative_shares() {
        let p = Placement::new(2, 2, slots(&[0, 1, 0, -1])).unwrap();
        let even = RoutingTable::even(&p);
        assert_eq!(even.replica_start, [0, 2, 3]);
        assert_eq!(even.slots, [0, 2, 1]);
        assert_eq!(even.cumulative, [32767, 65535, 65535]);
        let skewed = RoutingTable::weighted(&p, &[vec![3, 1], vec![9]]).unwrap();
        assert_eq!(skewed.cumulative, [49151, 65535, 65535]);
        assert!(RoutingTable::weighted(&p, &[vec![3], vec![9]]).is_err());
        assert!(RoutingTable::weighted(&p, &[vec![0, 0], vec![9]]).is_err());
    }
}
