//! A layer under change: its slots, and the work and milliseconds of every rank in every phase.
//! Decides nothing.
//!
//! A plan of sixty layers takes hundreds of steps, so what a step reads lies flat and nothing here
//! allocates after [`State::new`].

use alloc::vec;
use alloc::vec::Vec;

use super::{Change, Objective, Ranks, Use};
use crate::cost::{PhaseLoad, RankCost, speed};
use crate::layer::{EMPTY, Shape};

/// What a replica or a rank has to do in one phase.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Work {
    pub(super) pairs: f64,
    pub(super) active: f64,
}

/// A layer under change.
pub(super) struct State<'a> {
    pub(super) shape: Shape,
    pub(super) phases: &'a [PhaseLoad<'a>],
    pub(super) objective: Objective,
    pub(super) ranks: &'a Ranks<'a>,
    /// 1 over the speed of each rank.
    slowness: Vec<f64>,
    pub(super) slots: Vec<u32>,
    replicas: Replicas,
    pub(super) loads: Vec<Loads>,
}

/// One phase of the layer.
pub(super) struct Loads {
    /// Of the replica in each slot.
    pub(super) slot: Vec<Work>,
    /// Of each rank.
    pub(super) rank: Vec<Work>,
    /// Milliseconds of each rank.
    pub(super) ms: Vec<f64>,
    /// Least and most pairs that a slot of each rank has.
    pub(super) range: Vec<(f64, f64)>,
}

impl<'a> State<'a> {
    pub(super) fn new(
        shape: Shape,
        slots: &[u32],
        phases: &'a [PhaseLoad<'a>],
        ranks: &'a Ranks<'a>,
        objective: Objective,
    ) -> Self {
        let none = || Loads {
            slot: vec![Work::default(); slots.len()],
            rank: vec![Work::default(); shape.ranks],
            ms: vec![0.0; shape.ranks],
            range: vec![(0.0, 0.0); shape.ranks],
        };
        let mut state = Self {
            shape,
            phases,
            objective,
            ranks,
            slowness: (0..shape.ranks).map(|rank| 1.0 / speed(ranks.speeds, rank)).collect(),
            slots: slots.to_vec(),
            replicas: Replicas::new(shape.experts, slots),
            loads: phases.iter().map(|_| none()).collect(),
        };
        for (slot, &expert) in slots.iter().enumerate() {
            let replicas = state.replicas(expert);
            for phase in 0..phases.len() {
                state.loads[phase].slot[slot] = state.share(phase, expert, replicas);
            }
        }
        (0..shape.ranks).for_each(|rank| state.refresh_rank(rank));
        state
    }

    pub(super) fn total_ms(&self) -> f64 {
        let phases = self.phases.iter().zip(&self.loads);
        let slowest =
            |phase: &PhaseLoad<'_>, loads: &Loads| phase.weight * loads.ms[first_max(&loads.ms)];
        self.objective.combine(phases.map(|(phase, loads)| slowest(phase, loads)))
    }

    pub(super) fn even_ms(&self) -> f64 {
        let phases = self.phases.iter().zip(&self.loads);
        let even = phases.map(|(phase, loads)| phase.weight * self.mean(&loads.ms));
        self.objective.combine(even)
    }

    /// Over the ranks that work: the others have nothing.
    fn mean(&self, of_ranks: &[f64]) -> f64 {
        let working = self.ranks.working(of_ranks.len()).max(1);
        of_ranks.iter().sum::<f64>() / working as f64
    }

    pub(super) fn rank_of(&self, slot: usize) -> usize {
        slot / self.shape.slots_per_rank
    }

    pub(super) fn row(&self, rank: usize) -> core::ops::Range<usize> {
        rank * self.shape.slots_per_rank..(rank + 1) * self.shape.slots_per_rank
    }

    pub(super) fn holds(&self, rank: usize, expert: u32) -> bool {
        expert != EMPTY && self.slots[self.row(rank)].contains(&expert)
    }

    /// Whether `expert` may leave `rank`; an empty slot may always be filled.
    pub(super) fn may_leave(&self, expert: u32, rank: usize) -> bool {
        !self.ranks.pinned(expert, rank)
    }

    /// Whether `expert` may come to `rank`; nothing at all may always come.
    pub(super) fn may_come(&self, expert: u32, rank: usize) -> bool {
        expert == EMPTY || (self.ranks.takes(expert, rank) && !self.holds(rank, expert))
    }

    pub(super) fn replicas(&self, expert: u32) -> u32 {
        self.replicas.count.get(expert as usize).copied().unwrap_or(0)
    }

    /// Slots that may take another expert: empty ones, and those with one of several replicas. A replica on a draining
    /// rank is none that another can be given up for.
    pub(super) fn free_slots(&self) -> Vec<usize> {
        let mut free = Vec::with_capacity(2 * (self.slots.len() + 1 - self.shape.experts));
        let drains = self.ranks.uses.contains(&Use::Draining);
        for (slot, &expert) in self.slots.iter().enumerate() {
            let replicas = if drains { self.staying(expert, slot) } else { self.replicas(expert) };
            if (expert == EMPTY || replicas > 1) && self.may_leave(expert, self.rank_of(slot)) {
                free.push(slot);
            }
        }
        free
    }

    /// Replicas of `expert` on ranks that stay, and the one in `slot`.
    fn staying(&self, expert: u32, slot: usize) -> u32 {
        let stays =
            |held: &usize| *held == slot || self.ranks.of(self.rank_of(*held)) == Use::Active;
        self.replicas.slots(expert).map(|held| u32::from(stays(&held))).sum()
    }

    /// Ranks that hold `expert`.
    pub(super) fn holders(&self, expert: u32) -> impl Iterator<Item = usize> {
        self.replicas.slots(expert).map(|slot| self.rank_of(slot))
    }

    /// Work of one of `replicas` replicas; none for an empty slot.
    pub(super) fn share(&self, phase: usize, expert: u32, replicas: u32) -> Work {
        if expert == EMPTY {
            return Work::default();
        }
        let (pairs, active) = self.phases[phase].replica(expert as usize, replicas);
        Work { pairs, active }
    }

    fn refresh_replicas(&mut self, expert: u32) {
        for phase in 0..self.phases.len() {
            let share = self.share(phase, expert, self.replicas(expert));
            let loads = &mut self.loads[phase];
            self.replicas.slots(expert).for_each(|slot| loads.slot[slot] = share);
        }
    }

    /// From scratch, so that no rounding is carried from step to step.
    fn refresh_rank(&mut self, rank: usize) {
        for phase in 0..self.phases.len() {
            let row = &self.loads[phase].slot[self.row(rank)];
            let (mut work, mut range) = (Work::default(), (f64::INFINITY, 0.0_f64));
            for slot in row {
                work = work.plus(*slot);
                range = (range.0.min(slot.pairs), range.1.max(slot.pairs));
            }
            let ms = self.rank_ms(phase, rank, work);
            let loads = &mut self.loads[phase];
            (loads.rank[rank], loads.ms[rank], loads.range[rank]) = (work, ms, range);
        }
    }

    pub(super) fn rank_ms(&self, phase: usize, rank: usize, work: Work) -> f64 {
        self.phases[phase].cost.ms(work.pairs, work.active) * self.slowness[rank]
    }

    /// The phase that loses most to imbalance, or is the worst, and its slowest rank.
    pub(super) fn focus(&self) -> Option<(usize, usize)> {
        let mut best: Option<(f64, usize, usize)> = None;
        for (phase, loads) in self.loads.iter().enumerate() {
            let hot = first_max(&loads.ms);
            let even = match self.objective {
                Objective::Sum => self.mean(&loads.ms),
                Objective::Worst => 0.0,
            };
            let lost = (loads.ms[hot] - even) * self.phases[phase].weight;
            if best.is_none_or(|(most, ..)| lost > most) {
                best = Some((lost, phase, hot));
            }
        }
        best.map(|(_, phase, hot)| (phase, hot))
    }

    /// Pairs that a rank may have to stay below `ms`; nothing where more than pairs count.
    pub(super) fn pairs_below(&self, phase: usize, rank: usize, ms: f64) -> Option<f64> {
        match self.phases[phase].cost {
            RankCost::Pairs { ms_per_pair } => Some(ms / (ms_per_pair * self.slowness[rank])),
            RankCost::Roofline(_) => None,
        }
    }

    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Swap { slots: [a, b], experts: [left, right] } => {
                self.replicas.unlink(left, a);
                self.replicas.unlink(right, b);
                self.replicas.link(left, b);
                self.replicas.link(right, a);
                self.slots.swap(a, b);
                self.loads.iter_mut().for_each(|loads| loads.slot.swap(a, b));
                self.refresh_rank(self.rank_of(a));
                self.refresh_rank(self.rank_of(b));
            }
            Change::Replicate { slot, dropped, expert } => {
                self.replicas.unlink(dropped, slot);
                self.replicas.link(expert, slot);
                self.slots[slot] = expert;
                for changed in [dropped, expert] {
                    self.refresh_replicas(changed);
                    let mut at = self.replicas.first(changed);
                    while let Some(held) = at {
                        self.refresh_rank(self.rank_of(held));
                        at = self.replicas.next(held);
                    }
                }
            }
        }
    }
}

/// The slots of every expert, as lists threaded through the slots.
struct Replicas {
    count: Vec<u32>,
    first: Vec<Option<u32>>,
    next: Vec<Option<u32>>,
}

impl Replicas {
    fn new(experts: usize, slots: &[u32]) -> Self {
        let (count, first) = (vec![0; experts], vec![None; experts]);
        let mut replicas = Self { count, first, next: vec![None; slots.len()] };
        for (slot, &expert) in slots.iter().enumerate().rev() {
            replicas.link(expert, slot);
        }
        replicas
    }

    fn first(&self, expert: u32) -> Option<usize> {
        self.first.get(expert as usize).copied().flatten().map(|slot| slot as usize)
    }

    fn next(&self, slot: usize) -> Option<usize> {
        self.next[slot].map(|slot| slot as usize)
    }

    fn slots(&self, expert: u32) -> impl Iterator<Item = usize> {
        core::iter::successors(self.first(expert), |slot| self.next(*slot))
    }

    /// Nothing happens for an empty slot.
    fn link(&mut self, expert: u32, slot: usize) {
        let Some(first) = self.first.get_mut(expert as usize) else { return };
        self.next[slot] = core::mem::replace(first, u32::try_from(slot).ok());
        self.count[expert as usize] += 1;
    }

    fn unlink(&mut self, expert: u32, slot: usize) {
        let Some(first) = self.first(expert) else { return };
        let rest = self.next[slot];
        if first == slot {
            self.first[expert as usize] = rest;
        } else {
            let before = self.slots(expert).find(|held| self.next(*held) == Some(slot));
            let Some(before) = before else { return };
            self.next[before] = rest;
        }
        self.count[expert as usize] -= 1;
    }
}

impl Work {
    pub(super) fn plus(self, other: Self) -> Self {
        Self { pairs: self.pairs + other.pairs, active: self.active + other.active }
    }

    pub(super) fn minus(self, other: Self) -> Self {
        Self { pairs: self.pairs - other.pairs, active: self.active - other.active }
    }
}

fn first_max(values: &[f64]) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.iter().enumerate() {
        if *value > best.1 {
            best = (index, *value);
        }
    }
    best.0
}
