//! What is true of a simulated group beside its memory: control, the network, engines, and what was found to be wrong.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Error;
use control::simulated::Control;
use protocol::session::{FromControl, FromWorker, LayerPlacement, Register};

use crate::heap::Memory;
use crate::model::{LAYERS, Model, SAMPLES};
use crate::schedule::Schedule;

/// Something wrong that the simulator has to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plant {
    /// A rank stages other weights, and control does not compare checksums before a placement is in force.
    FlipBeforeChecksum,
}

/// How an engine's part of a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Answered,
    /// An expert was not to be had.
    Refused,
    /// All repeat the step.
    Repeat,
}

/// What all engines call together.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) layer: u32,
    /// What each rank brings.
    pub(crate) samples: Vec<usize>,
    /// Whose engines take part.
    pub(crate) members: BTreeSet<u32>,
    pub(crate) ends: BTreeMap<u32, End>,
}

/// A rank's process as others see it.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) register: Register,
    /// What control has told it to load.
    pub(crate) placed: Option<Vec<LayerPlacement>>,
    /// Whether its engine can call.
    pub(crate) serves: bool,
    /// What it holds, as far as it has said.
    pub(crate) held: Vec<LayerPlacement>,
    pub(crate) session: Option<u64>,
    /// A session stands in which nothing was said yet.
    pub(crate) is_new: bool,
    pub(crate) to_worker: VecDeque<FromControl>,
    pub(crate) from_worker: VecDeque<FromWorker>,
    /// Orders that have come.
    pub(crate) inbox: Vec<FromControl>,
}

/// What happened, to see that something does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Steps that all engines had answers to.
    pub answered: usize,
    /// Steps in which an expert was not to be had.
    pub refused: usize,
    /// Steps that were repeated.
    pub repeated: usize,
    /// Ranks that were killed.
    pub rank_kills: usize,
    /// How often control was.
    pub control_kills: usize,
    /// Sessions that were cut.
    pub cuts: usize,
    /// Placements of layers that were committed, repairs as well.
    pub commits: usize,
    /// Placements that a rank came to have in force while it ran.
    pub flips: usize,
}

pub(crate) struct World {
    pub(crate) control: Control,
    pub(crate) control_is_up: bool,
    /// None while the process does not run.
    pub(crate) ranks: Vec<Option<Process>>,
    /// How many of the ranks have engines: the first.
    pub(crate) engines: u32,
    pub(crate) step: Step,
    /// What the group held last, in a file.
    pub(crate) remembered: Option<Vec<LayerPlacement>>,
    pub(crate) wrong: Option<Error>,
    pub(crate) counts: Counts,
}

/// Everything of one seed.
pub(crate) struct Shared<'a> {
    pub(crate) model: &'a Model,
    pub(crate) plant: Option<Plant>,
    pub(crate) schedule: Arc<Schedule>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) world: Arc<Mutex<World>>,
}

impl Shared<'_> {
    /// Never held where another rank may go on.
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.schedule.now().as_millis()).unwrap_or(u64::MAX)
    }

    /// Something is not as it must be.
    pub(crate) fn found(&self, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.schedule.note(&format!("{error:#}"));
            self.world().wrong.get_or_insert(error);
        }
    }

    /// Begins the next step if all whose engines take part have ended this one.
    pub(crate) fn next_step(&self) {
        let drawn: Vec<usize> =
            (0..8).map(|_| self.schedule.below(LAYERS as usize * SAMPLES)).collect();
        let mut world = self.world();
        let Step { members, ends, .. } = &world.step;
        if members.iter().any(|rank| !ends.contains_key(rank)) {
            return;
        }
        let any = |end| ends.values().any(|is| *is == end);
        let (repeats, refused, ended) = (any(End::Repeat), any(End::Refused), !ends.is_empty());
        if repeats {
            world.counts.repeated += 1;
        } else if ended {
            world.counts.answered += usize::from(!refused);
            world.counts.refused += usize::from(refused);
        }
        if !repeats {
            world.step.layer = u32::try_from(drawn[0]).unwrap_or(0) % LAYERS;
            world.step.samples = drawn[1..].iter().map(|number| number % SAMPLES).collect();
        }
        let engines = (0..).zip(&world.ranks).take(world.engines as usize);
        let serves = engines.filter(|(_, process)| process.as_ref().is_some_and(|p| p.serves));
        let members = serves.map(|(rank, _)| rank).collect();
        (world.step.members, world.step.ends) = (members, BTreeMap::new());
    }
}
