//! The look for one change: every swap of the slowest rank with another, every slot that can take
//! another replica. Changes nothing.
//!
//! Most changes are told apart from the best so far by the two ranks that exchange work, in the
//! phase in focus; only the few that pass are weighed in full.

use alloc::vec::Vec;

use super::Change;
use super::state::{State, Work};
use crate::layer::{EMPTY, number};

/// A change, and what it saves among the ranks that it touches.
pub(super) struct Candidate {
    pub(super) change: Change,
    pub(super) relieved: usize,
    pub(super) gain: f64,
}

/// The best change of `state` that relieves the slowest rank of its worst phase.
pub(super) fn best_change(state: &State<'_>) -> Option<Candidate> {
    let (focus, hot) = state.focus()?;
    let before = state.total_ms();
    let mut search = Search { state, focus, hot, before, limit_ms: 0.0, best: None };
    search.tighten();
    // A replica of a hot expert saves more than any swap, and then rules out most swaps.
    search.replications();
    search.swaps();
    search.best
}

/// One look for the best change that relieves rank `hot` in phase `focus`.
struct Search<'a> {
    state: &'a State<'a>,
    focus: usize,
    hot: usize,
    /// Milliseconds of the layer over the phases, before any change.
    before: f64,
    /// What every touched rank must stay below, in the phase in focus, to beat the best so far.
    limit_ms: f64,
    best: Option<Candidate>,
}

impl Search<'_> {
    fn best_gain(&self) -> f64 {
        self.best.as_ref().map_or(0.0, |best| best.gain)
    }

    fn tighten(&mut self) {
        let state = self.state;
        let hot_ms = state.loads[self.focus].ms[self.hot];
        let left = (self.before - self.best_gain()) / state.phases[self.focus].weight;
        // Of several phases, each may save something, so no bound follows for one alone.
        self.limit_ms = if state.phases.len() == 1 { left.min(hot_ms) } else { hot_ms };
    }

    fn swaps(&mut self) {
        let ms = &self.state.loads[self.focus].ms;
        let mut lightest = self.hot;
        for (rank, rank_ms) in ms.iter().enumerate() {
            if *rank_ms < ms[lightest] {
                lightest = rank;
            }
        }
        // The lightest rank mostly has the best swap, and then rules out most of the others.
        self.swaps_with(lightest);
        (0..ms.len()).filter(|rank| *rank != lightest).for_each(|rank| self.swaps_with(rank));
    }

    fn swaps_with(&mut self, other: usize) {
        let (state, hot) = (self.state, self.hot);
        let loads = &state.loads[self.focus];
        let gap = loads.ms[hot] - loads.ms[other];
        if other == hot || gap * state.phases[self.focus].weight <= self.best_gain() {
            return;
        }
        let Some(mut bounds) = self.bounds(other) else {
            state.row(hot).for_each(|from| self.swaps_by_ms(from, other));
            return;
        };
        let (fewest, greatest) = loads.range[other];
        for (from, leaving) in state.row(hot).zip(&loads.slot[state.row(hot)]) {
            // Most experts of most ranks are too light, or would make the other too heavy.
            if leaving.pairs - fewest <= bounds.0 || leaving.pairs - greatest >= bounds.1 {
                continue;
            }
            for (to, coming) in state.row(other).zip(&loads.slot[state.row(other)]) {
                let change = leaving.pairs - coming.pairs;
                if change > bounds.0 && change < bounds.1 && self.swap(from, to, other) {
                    bounds = self.bounds(other).unwrap_or(bounds);
                }
            }
        }
    }

    /// Where only pairs count: more than the first and less than the second must go from the hot
    /// rank to the other.
    fn bounds(&self, other: usize) -> Option<(f64, f64)> {
        let (state, loads) = (self.state, &self.state.loads[self.focus]);
        let hot_pairs = state.pairs_below(self.focus, self.hot, self.limit_ms)?;
        let other_pairs = state.pairs_below(self.focus, other, self.limit_ms)?;
        Some((loads.rank[self.hot].pairs - hot_pairs, other_pairs - loads.rank[other].pairs))
    }

    fn swaps_by_ms(&mut self, from: usize, other: usize) {
        let (state, hot) = (self.state, self.hot);
        let loads = &state.loads[self.focus];
        let without = loads.rank[hot].minus(loads.slot[from]);
        if state.rank_ms(self.focus, hot, without) >= self.limit_ms {
            return;
        }
        let with = loads.rank[other].plus(loads.slot[from]);
        for to in state.row(other) {
            let coming = loads.slot[to];
            let burdened = state.rank_ms(self.focus, other, with.minus(coming));
            if burdened < self.limit_ms
                && state.rank_ms(self.focus, hot, without.plus(coming)) < self.limit_ms
            {
                self.swap(from, to, other);
            }
        }
    }

    /// Whether this is the best so far.
    fn swap(&mut self, from: usize, to: usize, other: usize) -> bool {
        let (state, hot) = (self.state, self.hot);
        let (a, b) = (state.slots[from], state.slots[to]);
        let valid = a != EMPTY
            && state.may_come(a, other)
            && state.may_come(b, hot)
            && state.may_leave(a, hot)
            && state.may_leave(b, other);
        if !valid {
            return false;
        }
        let mut value = Value::default();
        for (phase, loads) in state.loads.iter().enumerate() {
            let change = loads.slot[from].minus(loads.slot[to]);
            let relieved = state.rank_ms(phase, hot, loads.rank[hot].minus(change));
            let burdened = state.rank_ms(phase, other, loads.rank[other].plus(change));
            self.add(&mut value, phase, relieved.max(burdened), |rank| rank == other);
        }
        self.take(value, Change::Swap { slots: [from, to], experts: [a, b] })
    }

    /// Slots that are empty, or hold one of several replicas, take an expert of the hot rank; those
    /// of the hot rank itself one that has less to do.
    fn replications(&mut self) {
        let (state, hot) = (self.state, self.hot);
        let mut free = state.free_slots();
        let loads = &state.loads[self.focus];
        // The first that is tried should be hard to beat: it rules out the others.
        let left = |slot: &usize| loads.rank[state.rank_of(*slot)].pairs - loads.slot[*slot].pairs;
        first_to_front(&mut free, |slot| left(slot));
        let mut hot_slots: Vec<usize> = state.row(hot).collect();
        first_to_front(&mut hot_slots, |slot| -loads.slot[*slot].pairs);
        for from in hot_slots.into_iter().filter(|from| state.slots[*from] != EMPTY) {
            self.relieve(from, &free);
        }
        let own = |slot: &&usize| {
            let without = loads.rank[hot].minus(loads.slot[**slot]);
            state.rank_of(**slot) == hot
                && state.slots[**slot] != EMPTY
                && state.rank_ms(self.focus, hot, without) < self.limit_ms
        };
        let own: Vec<usize> = free.iter().filter(own).copied().collect();
        if let Some(expert) = own.first().and_then(|_| self.coldest()) {
            own.into_iter().for_each(|slot| self.replicate(slot, hot, expert));
        }
    }

    /// The expert in slot `from` of the hot rank gets a replica in a free slot of another rank.
    fn relieve(&mut self, from: usize, free: &[usize]) {
        let (state, expert) = (self.state, self.state.slots[from]);
        let loads = &state.loads[self.focus];
        let more = state.share(self.focus, expert, state.replicas(expert) + 1);
        let relieved = loads.rank[self.hot].minus(loads.slot[from]).plus(more);
        let relieved = state.rank_ms(self.focus, self.hot, relieved);
        for &slot in free {
            if relieved >= self.limit_ms {
                return;
            }
            let rank = state.rank_of(slot);
            let burdened = loads.rank[rank].minus(loads.slot[slot]).plus(more);
            if rank != self.hot && state.rank_ms(self.focus, rank, burdened) < self.limit_ms {
                self.replicate(slot, rank, expert);
            }
        }
    }

    /// The expert that the hot rank lacks whose next replica has the least to do.
    fn coldest(&self) -> Option<u32> {
        let state = self.state;
        let pairs = state.phases[self.focus].pairs;
        let mut coldest: Option<(f64, u32)> = None;
        for (expert, pairs) in (0..number(state.shape.experts)).zip(pairs) {
            let share = pairs / f64::from(state.replicas(expert) + 1);
            if coldest.is_none_or(|(least, _)| share < least) && !state.holds(self.hot, expert) {
                coldest = Some((share, expert));
            }
        }
        coldest.map(|(_, expert)| expert)
    }

    fn replicate(&mut self, slot: usize, rank: usize, expert: u32) {
        let state = self.state;
        if !state.may_come(expert, rank) {
            return;
        }
        let dropped = state.slots[slot];
        let (kept, held) = (state.replicas(dropped), state.replicas(expert));
        let mut value = Value::default();
        for (phase, loads) in state.loads.iter().enumerate() {
            let more = state.share(phase, expert, held + 1);
            let less = state.share(phase, expert, held).minus(more);
            let extra = state.share(phase, dropped, kept.saturating_sub(1)).minus(loads.slot[slot]);
            let ms = |other: usize, work: Work| state.rank_ms(phase, other, work);
            let mut slower = ms(rank, loads.rank[rank].minus(loads.slot[slot]).plus(more));
            for other in state.holders(dropped).filter(|other| *other != rank) {
                let work = loads.rank[other].plus(extra);
                let both = state.holds(other, expert);
                slower = slower.max(ms(other, if both { work.minus(less) } else { work }));
            }
            for other in state.holders(expert) {
                let work = loads.rank[other].minus(less);
                let both = state.holds(other, dropped);
                slower = slower.max(if both { 0.0 } else { ms(other, work) });
            }
            let touched =
                |other| other == rank || state.holds(other, dropped) || state.holds(other, expert);
            self.add(&mut value, phase, slower, touched);
        }
        self.take(value, Change::Replicate { slot, dropped, expert });
    }

    /// Adds a phase to `value`, given the slowest of the ranks that the change touches.
    fn add(&self, value: &mut Value, phase: usize, slower: f64, touched: impl Fn(usize) -> bool) {
        let load = &self.state.phases[phase];
        // With one phase alone whatever relieves the hot rank is no loss elsewhere.
        let all = if self.state.phases.len() == 1 {
            slower
        } else {
            let ranks = self.state.loads[phase].ms.iter().enumerate();
            let rest = ranks.filter(|(rank, _)| *rank != self.hot && !touched(*rank));
            rest.fold(slower, |slowest, (_, ms)| slowest.max(*ms))
        };
        let local = if phase == self.focus { slower } else { all };
        let add =
            |sum: f64, ms: f64| self.state.objective.combine([sum, load.weight * ms].into_iter());
        value.total = add(value.total, all);
        value.local = add(value.local, local);
    }

    /// Takes a change that relieves the hot rank more than the best so far, by more than rounding,
    /// and costs the layer as a whole nothing.
    fn take(&mut self, value: Value, change: Change) -> bool {
        let gain = self.before - value.local;
        let better = value.total <= self.before && gain > self.best_gain() + 1e-12 * self.before;
        if better {
            self.best = Some(Candidate { change, relieved: self.hot, gain });
            self.tighten();
        }
        better
    }
}

/// Brings the item of the least value to the front.
fn first_to_front(items: &mut [usize], value: impl Fn(&usize) -> f64) {
    let mut least: Option<(f64, usize)> = None;
    for (at, item) in items.iter().enumerate() {
        let value = value(item);
        if least.is_none_or(|(least, _)| value < least) {
            least = Some((value, at));
        }
    }
    if let Some((_, at)) = least {
        items.swap(0, at);
    }
}

/// Milliseconds over the phases after a change.
#[derive(Debug, Clone, Copy, Default)]
struct Value {
    /// Of all ranks, but of the touched ones alone in the phase in focus: one of several equally
    /// slow ranks must be relieved before the layer gains.
    local: f64,
    /// Of all ranks.
    total: f64,
}
