//! A few swaps instead of a new plan: step by step the change that relieves the slowest rank most,
//! until the layer is within the dead zone. Knows no windows; callers estimate the loads.
//!
//! A step either swaps two experts (two copies) or gives a slot with a redundant replica, or an empty
//! one, to another expert (one copy). Every step keeps the placement valid and lowers the predicted
//! milliseconds over the phases.

mod search;
mod state;

use alloc::vec::Vec;

use crate::cost::PhaseLoad;
use crate::layer::{EMPTY, PlanError, Shape, expect_length, expect_loads, moved};
use search::best_change;
use state::State;

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Steps of one layer, at most.
    pub steps_max: usize,
    /// The slowest rank over the mean rank, at or below which nothing moves.
    pub dead_zone: f64,
    /// Share of the layer's milliseconds that a step must save for each expert it copies.
    pub min_gain: f64,
    /// Experts copied, at most.
    pub moves_max: usize,
    /// How phases add up.
    pub objective: Objective,
}

/// What may be placed on a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Anything.
    Active,
    /// Nothing new.
    Draining,
    /// Nothing.
    Lost,
}

/// What is known of the ranks beside the placement.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ranks<'a> {
    /// Relative speed of each; an empty list stands for 1 everywhere.
    pub speeds: &'a [f64],
    /// What may be placed on each; an empty list stands for anything everywhere.
    pub uses: &'a [Use],
    /// (expert, rank): replicas that must be there.
    pub must: &'a [(u32, usize)],
    /// (expert, rank): replicas that must not be there.
    pub never: &'a [(u32, usize)],
}

impl Ranks<'_> {
    /// What may be placed on a rank.
    #[must_use]
    pub fn of(&self, rank: usize) -> Use {
        self.uses.get(rank).copied().unwrap_or(Use::Active)
    }

    pub(crate) fn takes(&self, expert: u32, rank: usize) -> bool {
        self.of(rank) == Use::Active && !self.never.contains(&(expert, rank))
    }

    pub(crate) fn pinned(&self, expert: u32, rank: usize) -> bool {
        self.must.contains(&(expert, rank))
    }

    /// Ranks that share the work.
    fn working(&self, ranks: usize) -> usize {
        ranks - self.uses.iter().filter(|used| **used == Use::Lost).count().min(ranks)
    }
}

/// What the phases of a layer add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// The sum of their milliseconds by weight: phases that all happen.
    Sum,
    /// The largest of their milliseconds by weight: workloads of which any may come.
    Worst,
}

impl Objective {
    fn combine(self, phases: impl Iterator<Item = f64>) -> f64 {
        match self {
            Self::Sum => phases.sum(),
            Self::Worst => phases.fold(0.0, f64::max),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            steps_max: 8,
            dead_zone: 1.08,
            min_gain: 0.0,
            moves_max: usize::MAX,
            objective: Objective::Sum,
        }
    }
}

/// One change of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What changed.
    pub change: Change,
    /// The rank that was slowest before it.
    pub relieved: usize,
    /// Predicted milliseconds before, over the phases by weight.
    pub before_ms: f64,
    /// Predicted milliseconds after.
    pub after_ms: f64,
}

/// The two kinds of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The experts of two slots on different ranks change places; one slot may be empty.
    Swap {
        /// Slots.
        slots: [usize; 2],
        /// The experts that were in them.
        experts: [u32; 2],
    },
    /// A slot gets a replica of an expert of other ranks.
    Replicate {
        /// The slot.
        slot: usize,
        /// The expert it held: one with another replica, or [`EMPTY`].
        dropped: u32,
        /// The expert it gets.
        expert: u32,
    },
}

impl Change {
    /// Experts copied.
    #[must_use]
    pub fn copies(&self) -> usize {
        match self {
            Self::Swap { experts, .. } => experts.iter().filter(|e| **e != EMPTY).count(),
            Self::Replicate { .. } => 1,
        }
    }
}

/// The plan of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPlan {
    /// Expert of every slot after all steps.
    pub slots: Vec<u32>,
    /// The steps, in order; a prefix of them is a valid plan too.
    pub steps: Vec<Step>,
    /// Predicted milliseconds of the current placement, over the phases by weight.
    pub before_ms: f64,
    /// Predicted milliseconds of `slots`.
    pub after_ms: f64,
    /// Milliseconds were the current placement's work spread evenly.
    pub even_ms: f64,
}

impl LayerPlan {
    /// Experts copied by all steps together, which can be fewer than the sum over the steps.
    #[must_use]
    pub fn moved(&self, before: &[u32], slots_per_rank: usize) -> usize {
        moved(before, &self.slots, slots_per_rank)
    }
}

/// Plans one layer from its current placement.
///
/// # Errors
/// An invalid current placement, or loads that are no loads.
pub fn plan_layer(
    shape: Shape,
    current: &[u32],
    phases: &[PhaseLoad<'_>],
    ranks: &Ranks<'_>,
    options: &Options,
) -> Result<LayerPlan, PlanError> {
    shape.check_slots(current)?;
    for phase in phases {
        expect_length("loads", phase.pairs.len(), shape.experts)?;
        expect_loads(phase.pairs)?;
    }
    let mut state = State::new(shape, current, phases, ranks, options.objective);
    let (before_ms, even_ms) = (state.total_ms(), state.even_ms());
    let mut steps: Vec<Step> = Vec::new();
    let mut copies = 0;
    while steps.len() < options.steps_max {
        let (now, even) = (state.total_ms(), state.even_ms());
        if now <= even * options.dead_zone {
            break;
        }
        let Some(best) = best_change(&state) else { break };
        if best.gain <= now * options.min_gain * best.change.copies() as f64 {
            break;
        }
        copies += best.change.copies();
        if copies > options.moves_max {
            break;
        }
        state.apply(best.change);
        let after_ms = state.total_ms();
        let relieved = best.relieved;
        steps.push(Step { change: best.change, relieved, before_ms: now, after_ms });
    }
    Ok(LayerPlan { after_ms: state.total_ms(), slots: state.slots, steps, before_ms, even_ms })
}
