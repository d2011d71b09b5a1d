//! One layer's slots as planners see them: shape, loads of ranks, differences. Decides nothing.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// The value of a slot that holds no expert.
pub const EMPTY: u32 = u32::MAX;

/// Sizes of one layer of a group; `ranks * slots_per_rank` slots, those of a rank contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Experts of the layer.
    pub experts: usize,
    /// Ranks of the group.
    pub ranks: usize,
    /// Slots of each rank.
    pub slots_per_rank: usize,
}

/// Why a planner refused its input. Names the value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// A size is zero, or slots do not suffice for the experts.
    Shape {
        /// The sizes given.
        shape: Shape,
    },
    /// A list has another length than the sizes say.
    Length {
        /// What the list holds.
        of: &'static str,
        /// Its length.
        length: usize,
        /// The length that the sizes ask for.
        expected: usize,
    },
    /// A load is negative, infinite or not a number.
    Load {
        /// Position in the list of loads.
        index: usize,
    },
    /// A number is not a multiple of another.
    Indivisible {
        /// What is divided.
        of: &'static str,
        /// Its value.
        value: usize,
        /// The divisor.
        by: usize,
    },
    /// A slot names an expert that the layer does not have.
    UnknownExpert {
        /// The slot.
        slot: usize,
        /// What it holds.
        expert: u32,
        /// Experts of the layer.
        experts: usize,
    },
    /// The current placement lacks an expert, or holds it twice on a rank.
    Placement {
        /// The expert.
        expert: usize,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { shape: Shape { experts, ranks, slots_per_rank } } => write!(
                f,
                "{experts} experts do not fit {ranks} ranks of {slots_per_rank} slots, \
                 expected at least one of each and a slot for every expert"
            ),
            Self::Length { of, length, expected } => {
                write!(f, "{length} {of} given, expected {expected}")
            }
            Self::Load { index } => {
                write!(f, "load {index} is not a finite number of at least 0")
            }
            Self::Indivisible { of, value, by } => {
                write!(f, "{value} {of} cannot be divided evenly by {by}")
            }
            Self::UnknownExpert { slot, expert, experts } => {
                write!(f, "slot {slot} holds expert {expert}, the layer has {experts}")
            }
            Self::Placement { expert } => write!(
                f,
                "expert {expert} has no slot, or two on one rank, in the current placement"
            ),
        }
    }
}

impl core::error::Error for PlanError {}

impl Shape {
    /// Slots of the layer over all ranks.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.ranks * self.slots_per_rank
    }

    /// # Errors
    /// [`PlanError::Shape`] unless every expert can have a slot.
    pub fn check(&self) -> Result<(), PlanError> {
        let fits = self.experts > 0 && self.ranks > 0 && self.slots() >= self.experts;
        if fits { Ok(()) } else { Err(PlanError::Shape { shape: *self }) }
    }

    /// Checks that `slots` is a valid placement of this shape: every expert has a slot, no rank
    /// holds one twice.
    ///
    /// # Errors
    /// The first reason why it is not.
    pub fn check_slots(&self, slots: &[u32]) -> Result<(), PlanError> {
        self.check()?;
        expect_length("slots", slots.len(), self.slots())?;
        // The last rank that held an expert, plus one: ranks are visited in order.
        let mut seen = vec![0_usize; self.experts];
        for (slot, &expert) in slots.iter().enumerate().filter(|(_, e)| **e != EMPTY) {
            let rank = slot / self.slots_per_rank + 1;
            let Some(last) = seen.get_mut(expert as usize) else {
                return Err(PlanError::UnknownExpert { slot, expert, experts: self.experts });
            };
            if *last == rank {
                return Err(PlanError::Placement { expert: expert as usize });
            }
            *last = rank;
        }
        match seen.iter().position(|&last| last == 0) {
            Some(expert) => Err(PlanError::Placement { expert }),
            None => Ok(()),
        }
    }
}

/// Loads are finite and not negative.
pub(crate) fn expect_loads(loads: &[f64]) -> Result<(), PlanError> {
    let bad = loads.iter().position(|load| !(load.is_finite() && *load >= 0.0));
    bad.map_or(Ok(()), |index| Err(PlanError::Load { index }))
}

/// Experts and slots are counted in u32 on the wire; shapes are bounded far below that.
pub(crate) fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(EMPTY)
}

pub(crate) fn expect_length(
    of: &'static str,
    length: usize,
    expected: usize,
) -> Result<(), PlanError> {
    if length == expected { Ok(()) } else { Err(PlanError::Length { of, length, expected }) }
}

/// Replicas of each expert; slots outside the layer's experts are not counted.
#[must_use]
pub fn replica_counts(slots: &[u32], experts: usize) -> Vec<u32> {
    let mut counts = vec![0; experts];
    for &expert in slots {
        if let Some(count) = counts.get_mut(expert as usize) {
            *count += 1;
        }
    }
    counts
}

/// Load of each rank when replicas share their expert's load evenly.
#[must_use]
pub fn rank_loads(slots: &[u32], slots_per_rank: usize, loads: &[f64]) -> Vec<f64> {
    let counts = replica_counts(slots, loads.len());
    let share = |&expert: &u32| {
        let load = loads.get(expert as usize).copied().unwrap_or(0.0);
        let count = counts.get(expert as usize).copied().unwrap_or(1);
        load / f64::from(count.max(1))
    };
    slots.chunks(slots_per_rank.max(1)).map(|row| row.iter().map(share).sum()).collect()
}

/// Largest over mean; 1 where nothing is loaded.
#[must_use]
pub fn max_over_mean(rank_loads: &[f64]) -> f64 {
    let max = rank_loads.iter().copied().fold(0.0, f64::max);
    let total: f64 = rank_loads.iter().sum();
    if total > 0.0 { max / (total / rank_loads.len() as f64) } else { 1.0 }
}

/// What a rank holds, one rank after the other, so that asking costs the same however long its row.
#[derive(Debug, Clone)]
pub struct Row {
    /// The last row that held each expert.
    last: Vec<u32>,
    row: u32,
}

impl Row {
    /// For rows of these slots.
    #[must_use]
    pub fn of(slots: &[u32]) -> Self {
        let most = slots.iter().filter(|e| **e != EMPTY).max();
        Self { last: vec![0; most.map_or(0, |most| *most as usize + 1)], row: 0 }
    }

    /// Turns to the next rank.
    pub fn turn(&mut self, row: &[u32]) {
        self.row += 1;
        row.iter().for_each(|expert| self.add(*expert));
    }

    /// One more expert of the rank turned to.
    pub fn add(&mut self, expert: u32) {
        if let Some(last) = self.last.get_mut(expert as usize) {
            *last = self.row;
        }
    }

    /// Whether the rank turned to holds `expert`.
    #[must_use]
    pub fn holds(&self, expert: u32) -> bool {
        self.last.get(expert as usize) == Some(&self.row)
    }
}

/// Experts that a rank must receive to come from `before` to `after`, summed over the ranks: what a
/// migration copies. Reordering within a rank counts as nothing.
#[must_use]
pub fn moved(before: &[u32], after: &[u32], slots_per_rank: usize) -> usize {
    let per_rank = slots_per_rank.max(1);
    let (mut held, mut moved) = (Row::of(before), 0);
    for (old, new) in before.chunks(per_rank).zip(after.chunks(per_rank)) {
        held.turn(old);
        moved += new.iter().filter(|e| **e != EMPTY && !held.holds(**e)).count();
    }
    moved
}

/// Gives the experts that stay on a rank their old slots, so that only arrivals are copied.
pub fn keep_slots(before: &[u32], after: &mut [u32], slots_per_rank: usize) {
    let per_rank = slots_per_rank.max(1);
    let (mut held, mut wanted) = (Row::of(before), Row::of(after));
    let mut arrivals = Vec::with_capacity(per_rank);
    for (old, new) in before.chunks(per_rank).zip(after.chunks_mut(per_rank)) {
        held.turn(old);
        wanted.turn(new);
        arrivals.clear();
        arrivals.extend(new.iter().rev().copied().filter(|e| !held.holds(*e)));
        for (slot, &kept) in new.iter_mut().zip(old) {
            *slot = if wanted.holds(kept) { kept } else { arrivals.pop().unwrap_or(EMPTY) };
        }
    }
}
