//! Mends placements that hold an expert twice on a rank: a slot wasted, and a hazard for copies of
//! weights (DeepSeek's algorithm can do that). Changes nothing else and plans nothing.

use alloc::vec::Vec;

use crate::layer::{EMPTY, Row, Shape, number, replica_counts};

/// How one duplicate was mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repair {
    /// The slot that held a second replica on its rank.
    pub slot: usize,
    /// The expert that was twice there.
    pub expert: u32,
    /// What was done.
    pub remedy: Remedy,
}

/// The remedies, in the order in which they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// The replica changed places with that of another rank.
    Swapped {
        /// The other rank's slot.
        with: usize,
        /// The expert that came from there.
        expert: u32,
    },
    /// No swap is valid: the slot got a replica of the most loaded expert that its rank lacked.
    Replaced {
        /// That expert.
        expert: u32,
    },
    /// The rank holds every expert already: the slot is empty.
    Emptied,
}

/// Mends every duplicate of one layer, slots ascending. Swaps stay within a node (`nodes` equal runs
/// of ranks) where they can, and are chosen to leave the slower of the two ranks as fast as possible;
/// the first of equals wins.
///
/// `slots` holds every expert of `shape` at least once; `loads` has one load for each expert.
pub fn repair(slots: &mut [u32], shape: Shape, nodes: usize, loads: &[f64]) -> Vec<Repair> {
    let mut repairs = Vec::new();
    let per_rank = shape.slots_per_rank;
    let first = first_duplicate(slots, per_rank);
    if first == slots.len() {
        return repairs;
    }
    let mut weights = Weights::of(slots, shape, loads);
    for slot in first..slots.len() {
        let row = slot / per_rank * per_rank;
        let expert = slots[slot];
        if expert == EMPTY || !slots[row..slot].contains(&expert) {
            continue;
        }
        let remedy = match best_swap(slots, slot, shape, nodes, &weights) {
            Some(with) => {
                slots.swap(slot, with);
                weights.swap(slot, with, per_rank);
                Remedy::Swapped { with, expert: slots[slot] }
            }
            None => {
                let remedy = replace(slots, slot, shape, loads);
                weights = Weights::of(slots, shape, loads);
                remedy
            }
        };
        repairs.push(Repair { slot, expert, remedy });
    }
    repairs
}

/// Loads of a placement.
struct Weights {
    /// Of the replica in each slot; 0 for an empty one.
    slot: Vec<f64>,
    /// Of each rank.
    rank: Vec<f64>,
}

impl Weights {
    fn of(slots: &[u32], shape: Shape, loads: &[f64]) -> Self {
        let counts = replica_counts(slots, shape.experts);
        let share = |expert: &u32| {
            let load = loads.get(*expert as usize).zip(counts.get(*expert as usize));
            load.map_or(0.0, |(load, count)| load / f64::from(*count))
        };
        let slot: Vec<f64> = slots.iter().map(share).collect();
        let rank = slot.chunks(shape.slots_per_rank).map(|row| row.iter().sum()).collect();
        Self { slot, rank }
    }

    fn swap(&mut self, left: usize, right: usize, per_rank: usize) {
        self.slot.swap(left, right);
        for rank in [left / per_rank, right / per_rank] {
            self.rank[rank] = self.slot[rank * per_rank..][..per_rank].iter().sum();
        }
    }
}

/// Where mending begins; the end without a duplicate, as most plans are.
fn first_duplicate(slots: &[u32], per_rank: usize) -> usize {
    let mut row = Row::of(slots);
    for (rank, held) in slots.chunks(per_rank).enumerate() {
        row.turn(&[]);
        for (at, &expert) in held.iter().enumerate() {
            if row.holds(expert) {
                return rank * per_rank + at;
            }
            row.add(expert);
        }
    }
    slots.len()
}

fn best_swap(
    slots: &[u32],
    slot: usize,
    shape: Shape,
    nodes: usize,
    weights: &Weights,
) -> Option<usize> {
    let per_rank = shape.slots_per_rank;
    let rank = slot / per_rank;
    let node_ranks = (shape.ranks / nodes.max(1)).max(1);
    let own = &slots[rank * per_rank..(rank + 1) * per_rank];
    let mut best: Option<((bool, f64), usize)> = None;
    for (other, row) in slots.chunks(per_rank).enumerate() {
        if other == rank || row.contains(&slots[slot]) {
            continue;
        }
        let far = rank / node_ranks != other / node_ranks;
        for (at, &candidate) in (other * per_rank..).zip(row) {
            let change = weights.slot[slot] - weights.slot[at];
            let slower = (weights.rank[rank] - change).max(weights.rank[other] + change);
            let better = best.is_none_or(|(least, _)| (far, slower) < least);
            if better && candidate != EMPTY && !own.contains(&candidate) {
                best = Some(((far, slower), at));
            }
        }
    }
    best.map(|(_, with)| with)
}

fn replace(slots: &mut [u32], slot: usize, shape: Shape, loads: &[f64]) -> Remedy {
    let row = slot / shape.slots_per_rank * shape.slots_per_rank;
    let own = &slots[row..row + shape.slots_per_rank];
    let counts = replica_counts(slots, shape.experts);
    let mut best: Option<(f64, u32)> = None;
    for (expert, (load, count)) in loads.iter().zip(&counts).enumerate() {
        let share = load / f64::from(*count);
        let expert = number(expert);
        if !own.contains(&expert) && best.is_none_or(|(most, _)| share > most) {
            best = Some((share, expert));
        }
    }
    slots[slot] = best.map_or(EMPTY, |(_, expert)| expert);
    best.map_or(Remedy::Emptied, |(_, expert)| Remedy::Replaced { expert })
}
