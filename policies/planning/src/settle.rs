//! Makes a placement one that may be in force at all: nothing on ranks that are lost, pins kept, a slot for every expert;
//! then a second home for what lives on draining ranks alone, so that those can leave. Balances nothing: plan the layer
//! again afterwards.

use alloc::vec::Vec;
use core::fmt;

use crate::greedy::{Ranks, Use};
use crate::layer::{EMPTY, Row, Shape, number, rank_loads, replica_counts};

/// Why an expert comes to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It had no slot, or a pin asks for it.
    Repair,
    /// It was on draining ranks alone.
    Drain,
}

/// An expert that came to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// The expert.
    pub expert: u32,
    /// The slot.
    pub slot: usize,
    /// Why.
    pub why: Why,
}

/// Why there is no placement that may be in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsettled {
    /// No slot is free for an expert, where it may be.
    NoSlot {
        /// The expert.
        expert: u32,
    },
    /// More moves than there may be.
    Moves {
        /// Moves that it takes, at least.
        needed: usize,
        /// Moves that there may be.
        limit: usize,
    },
}

impl fmt::Display for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSlot { expert } => write!(f, "no slot is free for expert {expert}"),
            Self::Moves { needed, limit } => {
                write!(f, "at least {needed} moves are needed, {limit} may be made")
            }
        }
    }
}

/// Changes `slots` with at most `moves_max` arrivals. What must be is done whole or not at all; experts on draining ranks,
/// heaviest first, as far as moves and slots suffice, and how many of them are left is returned beside.
///
/// `slots` are of `shape`, each with an expert of it or [`EMPTY`]; `loads` has one load for each expert.
///
/// # Errors
/// [`Unsettled`]; `slots` are then of no use.
pub fn settle(
    slots: &mut [u32],
    shape: Shape,
    loads: &[f64],
    ranks: &Ranks<'_>,
    moves_max: usize,
) -> Result<(Vec<Arrival>, usize), Unsettled> {
    empty_what_must_go(slots, shape, ranks);
    let mut settling = Settling { slots, shape, loads, ranks, arrivals: Vec::new() };
    for &(expert, rank) in ranks.must {
        settling.pin(expert, rank)?;
    }
    let counts = replica_counts(settling.slots, shape.experts);
    let lost = (0..number(shape.experts)).filter(|expert| counts[*expert as usize] == 0);
    for expert in heaviest_first(lost.collect(), loads) {
        let slot = settling.refuge(expert).ok_or(Unsettled::NoSlot { expert })?;
        settling.place(expert, slot, Why::Repair);
    }
    let needed = settling.arrivals.len();
    if needed > moves_max {
        return Err(Unsettled::Moves { needed, limit: moves_max });
    }
    let mut left = 0;
    if ranks.uses.contains(&Use::Draining) {
        let alone = (0..number(shape.experts)).filter(|expert| settling.staying(*expert) == 0);
        for expert in heaviest_first(alone.collect(), loads) {
            match settling.refuge(expert) {
                Some(slot) if settling.arrivals.len() < moves_max => {
                    settling.place(expert, slot, Why::Drain);
                }
                _ => left += 1,
            }
        }
    }
    Ok((settling.arrivals, left))
}

/// What is lost, forbidden, or twice on a rank.
fn empty_what_must_go(slots: &mut [u32], shape: Shape, ranks: &Ranks<'_>) {
    let mut held = Row::of(slots);
    for (rank, row) in slots.chunks_mut(shape.slots_per_rank).enumerate() {
        held.turn(&[]);
        for slot in row {
            let goes = ranks.of(rank) == Use::Lost || ranks.never.contains(&(*slot, rank));
            if goes || held.holds(*slot) {
                *slot = EMPTY;
            }
            held.add(*slot);
        }
    }
}

fn heaviest_first(mut experts: Vec<u32>, loads: &[f64]) -> Vec<u32> {
    experts.sort_by(|a, b| loads[*b as usize].total_cmp(&loads[*a as usize]));
    experts
}

struct Settling<'a> {
    slots: &'a mut [u32],
    shape: Shape,
    loads: &'a [f64],
    ranks: &'a Ranks<'a>,
    arrivals: Vec<Arrival>,
}

impl Settling<'_> {
    fn place(&mut self, expert: u32, slot: usize, why: Why) {
        // One that came before and is driven out again has not come.
        self.arrivals.retain(|arrival| arrival.slot != slot);
        self.arrivals.push(Arrival { expert, slot, why });
        self.slots[slot] = expert;
    }

    /// The pinned expert takes the rank's emptiest slot: one without an expert, else with one that is elsewhere too, else
    /// with the lightest, which then needs another.
    fn pin(&mut self, expert: u32, rank: usize) -> Result<(), Unsettled> {
        let first = rank * self.shape.slots_per_rank;
        let row = first..first + self.shape.slots_per_rank;
        if self.slots[row.clone()].contains(&expert) {
            return Ok(());
        }
        let counts = replica_counts(self.slots, self.shape.experts);
        let cost = |slot: &usize| match self.slots[*slot] {
            EMPTY => (0, 0.0),
            held => (1 + u8::from(counts[held as usize] == 1), self.loads[held as usize]),
        };
        let free = row.filter(|slot| !self.ranks.pinned(self.slots[*slot], rank));
        let free = free.filter(|_| self.ranks.takes(expert, rank));
        let best = free.min_by(|a, b| {
            let (a, b) = (cost(a), cost(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let slot = best.ok_or(Unsettled::NoSlot { expert })?;
        self.place(expert, slot, Why::Repair);
        Ok(())
    }

    /// Replicas of an expert on ranks that stay.
    fn staying(&self, expert: u32) -> usize {
        let rows = self.slots.chunks(self.shape.slots_per_rank).enumerate();
        let stays = |rank| self.ranks.of(rank) == Use::Active;
        rows.filter(|(rank, row)| stays(*rank) && row.contains(&expert)).count()
    }

    /// The slot to give to an expert: an empty one before one whose expert is elsewhere too, then on the least loaded
    /// rank, then the first.
    fn refuge(&self, expert: u32) -> Option<usize> {
        let per_rank = self.shape.slots_per_rank;
        let load = rank_loads(self.slots, per_rank, self.loads);
        let mut best: Option<((bool, f64), usize)> = None;
        for (slot, &held) in self.slots.iter().enumerate() {
            let rank = slot / per_rank;
            let row = &self.slots[rank * per_rank..(rank + 1) * per_rank];
            let redundant = held != EMPTY;
            let cost = (redundant, load[rank]);
            if best.is_some_and(|(least, _)| cost >= least)
                || !self.ranks.takes(expert, rank)
                || row.contains(&expert)
                || (redundant && (self.ranks.pinned(held, rank) || self.staying(held) < 2))
            {
                continue;
            }
            best = Some((cost, slot));
        }
        best.map(|(_, slot)| slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { experts: 4, ranks: 3, slots_per_rank: 2 };
    const LOADS: [f64; 4] = [1.0, 5.0, 2.0, 2.0];

    fn settled(slots: [u32; 6], ranks: &Ranks<'_>, moves_max: usize) -> ([u32; 6], usize, usize) {
        let mut slots = slots;
        let (arrivals, left) = settle(&mut slots, SHAPE, &LOADS, ranks, moves_max).unwrap();
        (slots, arrivals.len(), left)
    }

    #[test]
    fn a_good_placement_stays() {
        let slots = [0, 1, 2, EMPTY, 3, 2];
        assert_eq!(settled(slots, &Ranks::default(), 0), (slots, 0, 0));
    }

    #[test]
    fn what_drains_comes_to_free_slots_as_far_as_moves_go() {
        let uses = [Use::Draining, Use::Active, Use::Active];
        let ranks = Ranks { uses: &uses, ..Ranks::default() };
        let slots = [0, 1, 2, EMPTY, 3, 2];
        assert_eq!(settled(slots, &ranks, 9), ([0, 1, 2, 1, 3, 0], 2, 0));
        assert_eq!(settled(slots, &ranks, 1), ([0, 1, 2, 1, 3, 2], 1, 1));
    }

    #[test]
    fn what_was_on_a_lost_rank_comes_elsewhere_whole_or_not_at_all() {
        let uses = [Use::Lost, Use::Active, Use::Active];
        let ranks = Ranks { uses: &uses, ..Ranks::default() };
        let slots = [0, 1, 2, EMPTY, 3, 2];
        assert_eq!(settled(slots, &ranks, 2), ([EMPTY, EMPTY, 2, 1, 3, 0], 2, 0));
        let too_many = settle(&mut slots.clone(), SHAPE, &LOADS, &ranks, 1);
        assert_eq!(too_many, Err(Unsettled::Moves { needed: 2, limit: 1 }));
        let full = [0, 1, 2, EMPTY, 3, EMPTY];
        let never = [(1, 1), (1, 2)];
        let ranks = Ranks { never: &never, ..ranks };
        let nowhere = settle(&mut full.clone(), SHAPE, &LOADS, &ranks, 9);
        assert_eq!(nowhere, Err(Unsettled::NoSlot { expert: 1 }));
    }

    #[test]
    fn pins_are_kept() {
        let must = [(1, 2)];
        let never = [(0, 0)];
        let ranks = Ranks { must: &must, never: &never, ..Ranks::default() };
        // Expert 2 on the last rank is elsewhere too and makes room; expert 0 leaves the first rank.
        let (slots, arrivals, _) = settled([0, 1, 2, EMPTY, 3, 2], &ranks, 9);
        assert_eq!((slots, arrivals), ([EMPTY, 1, 2, 0, 3, 1], 2));
        // A pin may drive out an expert that then needs a slot itself.
        let must = [(1, 1), (0, 1)];
        let ranks = Ranks { must: &must, ..Ranks::default() };
        let (slots, arrivals, _) = settled([0, 1, 2, 3, EMPTY, EMPTY], &ranks, 9);
        assert_eq!((&slots[2..4], arrivals), (&[1, 0][..], 4));
        assert!(slots[4..].contains(&2) && slots[4..].contains(&3), "{slots:?}");
    }

    #[test]
    fn a_second_replica_on_a_rank_goes() {
        assert_eq!(settled([0, 0, 1, 2, 3, 3], &Ranks::default(), 0).0, [0, EMPTY, 1, 2, 3, EMPTY]);
    }
}
