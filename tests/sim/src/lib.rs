//! Simulates a group of ranks and their control: the device's, the worker's and control's own code on a clock and a network
//! that a seed decides, with kills of ranks and of control, cut sessions, and placements that are committed in between. After
//! that nothing goes wrong any more, and what was committed last must come to be in force. The same seed is the same run.

mod heap;
mod model;
mod process;
mod schedule;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};
use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use control::simulated::Control;
use kernels::heap::HeapShape;
use protocol::placement::{Placement, Split};
use protocol::session::{
    EngineState, FromWorker, Heartbeat, LayerPlacement, LayerStaging, Register,
};
use tests::fake_worker::register;
use tests::group::random_placement;
use tests::invariants;
use tests::random::Random;

pub use self::model::Model;
pub use self::world::{Counts, Plant};

use self::heap::{Memory, place};
use self::model::{EXPERTS, LAYERS, TOKENS, TOP_K};
use self::schedule::{DIRECTOR, Killed, Schedule};
use self::world::{Process, Shared, Step, World};

/// Slots of a rank in a layer: with a rank less, there is still room for all.
const SLOTS: usize = 4;
const RANKS: u32 = 3;
/// Rounds in which something may go wrong.
const ROUNDS: usize = 350;
/// Rounds that the group may take afterwards until everything is as it was committed.
const REST_ROUNDS: usize = 6_000;
/// Steps that all must have answers to then.
const LAST_STEPS: usize = 5;
/// Between two rounds, at most.
const ROUND_MS: usize = 20;
/// Silence after which control takes a rank to be lost.
const PATIENCE_MS: u64 = 500;

/// What came of a seed.
#[derive(Debug)]
pub struct Run {
    /// What everything that happened comes to.
    pub trace: u64,
    /// What happened.
    pub counts: Counts,
    /// What was not as it must be.
    pub wrong: Option<Error>,
}

/// Simulates a seed.
///
/// # Errors
/// When the simulator itself fails.
pub fn simulate(model: &Model, seed: u64, plant: Option<Plant>) -> Result<Run> {
    let schedule = Arc::new(Schedule::new(seed, RANKS as usize));
    let (max_tokens, max_pairs) = (TOKENS, TOKENS * TOP_K);
    let checkpoint = model.open()?;
    let hidden = checkpoint.layers().iter().map(|layer| layer.shape.hidden).max().unwrap_or(0);
    let shape = HeapShape { ranks: RANKS, max_tokens, max_pairs, hidden };
    let memory = Arc::new(Memory::new(Arc::clone(&schedule), shape)?);
    let first = Placement::contiguous(EXPERTS, RANKS, u32::try_from(SLOTS)?)?;
    let placed =
        (0..LAYERS).map(|layer| LayerPlacement { layer, epoch: 1, placement: first.clone() });
    let world = World {
        control: Control::new("g", placed.collect(), PATIENCE_MS),
        control_is_up: true,
        ranks: (0..RANKS).map(|_| None).collect(),
        engines: 1 + u32::try_from(schedule.below(RANKS as usize))?,
        step: Step::default(),
        remembered: None,
        wrong: None,
        counts: Counts::default(),
    };
    let world = Arc::new(Mutex::new(world));
    let shared = Shared { model, plant, schedule, memory, world };
    thread::scope(|scope| {
        let mut director = Director { shared: &shared, scope, starts: 0 };
        let ended = director.direct();
        director.end();
        ended
    })?;
    let mut world = shared.world();
    Ok(Run { trace: shared.schedule.trace(), counts: world.counts, wrong: world.wrong.take() })
}

/// Decides what goes wrong, and is the network.
struct Director<'scope, 'env> {
    shared: &'scope Shared<'env>,
    scope: &'scope Scope<'scope, 'env>,
    starts: u64,
}

impl Director<'_, '_> {
    fn direct(&mut self) -> Result<()> {
        (0..RANKS).for_each(|rank| self.start(rank));
        for _ in 0..ROUNDS {
            self.faults()?;
            self.round();
            if self.shared.world().wrong.is_some() {
                return Ok(());
            }
        }
        self.shared.schedule.note("nothing goes wrong any more");
        let mut until = None;
        for _ in 0..REST_ROUNDS {
            self.shared.world().control_is_up = true;
            (0..RANKS).for_each(|rank| self.start(rank));
            self.round();
            let world = self.shared.world();
            if world.wrong.is_some() {
                return Ok(());
            }
            if !Self::rests(&world) {
                until = None;
            } else if *until.get_or_insert(world.counts.answered + LAST_STEPS)
                <= world.counts.answered
            {
                return Ok(());
            }
        }
        let wrong = self.unrest();
        self.shared.found(wrong);
        Ok(())
    }

    /// Whether every rank holds what was committed last.
    fn rests(world: &World) -> bool {
        let newest = world.control.newest();
        let rests = |process: &Option<Process>| {
            process.as_ref().is_some_and(|p| p.serves && epochs(&p.held) == newest)
        };
        world.ranks.iter().all(rests)
    }

    /// Why the group did not come to rest.
    fn unrest(&self) -> Result<()> {
        let world = self.shared.world();
        let newest = world.control.newest();
        for (rank, process) in world.ranks.iter().enumerate() {
            let Some(process) = process else { bail!("rank {rank} does not run") };
            invariants::is_in_force(&newest, &epochs(&process.held), &format!("rank {rank}"))?;
        }
        bail!("calls are not answered: {:?}", world.step)
    }

    fn draws(&self, one_of: usize) -> bool {
        self.shared.schedule.below(one_of) == 0
    }

    fn faults(&mut self) -> Result<()> {
        for rank in 0..RANKS {
            if self.draws(120) {
                self.kill(rank);
            }
            // Some are away for longer than their grace.
            if self.draws(60) {
                self.start(rank);
            }
            if self.draws(80) {
                self.shared.world().counts.cuts += 1;
                self.cut(rank);
            }
        }
        if self.draws(100) {
            self.kill_control();
        }
        if self.draws(10) {
            self.shared.world().control_is_up = true;
        }
        if self.draws(25) {
            self.commit()?;
        }
        Ok(())
    }

    /// A new placement of some layer.
    fn commit(&mut self) -> Result<()> {
        let layer = u32::try_from(self.shared.schedule.below(LAYERS as usize))?;
        let mut random = Random::new(self.shared.schedule.below(1 << 30) as u64);
        let slots = random_placement(EXPERTS as usize, RANKS as usize, SLOTS, &mut random);
        let mut placement = Placement::from_phy2log(EXPERTS, RANKS, &slots)?;
        if random.below(2) == 0 {
            let sources = random.pick(&[1, RANKS]);
            let replicas = slots.iter().filter(|expert| **expert >= 0).count();
            let weights = (0..replicas * sources as usize).map(|_| random.pick(&[1, 2, 9]));
            placement = placement.with_split(Split { sources, weights: weights.collect() })?;
        }
        let mut world = self.shared.world();
        if world.control_is_up {
            world.control.commit(layer, placement);
        }
        Ok(())
    }

    fn kill_control(&mut self) {
        (0..RANKS).for_each(|rank| self.cut(rank));
        let now_ms = self.shared.now_ms();
        self.shared.schedule.note("control is killed");
        let mut world = self.shared.world();
        world.counts.control_kills += 1;
        world.control_is_up = false;
        world.control.restart(now_ms);
    }

    fn kill(&mut self, rank: u32) {
        if self.shared.world().ranks[rank as usize].is_none() {
            return;
        }
        self.shared.schedule.note("a rank is killed");
        self.shared.schedule.kill(place(rank));
        self.shared.memory.set_alive(rank, false);
        self.cut(rank);
        let mut world = self.shared.world();
        world.counts.rank_kills += 1;
        world.ranks[rank as usize] = None;
        world.step.members.remove(&rank);
        world.step.ends.remove(&rank);
    }

    /// Starts a rank that does not run.
    fn start(&mut self, rank: u32) {
        let free = self.shared.schedule.is_free(place(rank));
        if !free || self.shared.world().ranks[rank as usize].is_some() {
            return;
        }
        self.starts += 1;
        let process = Process {
            register: self.register(rank),
            placed: None,
            serves: false,
            held: Vec::new(),
            session: None,
            is_new: false,
            to_worker: Default::default(),
            from_worker: Default::default(),
            inbox: Vec::new(),
        };
        self.shared.world().ranks[rank as usize] = Some(process);
        self.shared.schedule.take(place(rank));
        let shared = self.shared;
        self.scope.spawn(move || {
            let process = || {
                shared.schedule.begin(place(rank));
                process::run(shared, rank)
            };
            match catch_unwind(AssertUnwindSafe(process)) {
                Ok(ended) => shared.found(ended),
                Err(payload) if payload.is::<Killed>() => {}
                Err(_panic) => shared.found(Err(anyhow!("rank {rank} panicked"))),
            }
            shared.schedule.leave(place(rank));
        });
    }

    fn register(&self, rank: u32) -> Register {
        let slots = u32::try_from(SLOTS).unwrap_or(0);
        let of = register(("g", rank, RANKS), LAYERS, EXPERTS);
        Register {
            incarnation: self.starts,
            slots_per_rank: slots,
            layer_slots: vec![slots; LAYERS as usize],
            asks: true,
            stages: true,
            ..of
        }
    }

    /// Ends a rank's session; what was said and not heard is lost.
    fn cut(&mut self, rank: u32) {
        let mut world = self.shared.world();
        let World { control, ranks, .. } = &mut *world;
        let Some(process) = &mut ranks[rank as usize] else { return };
        process.to_worker.clear();
        process.from_worker.clear();
        if let Some(session) = process.session.take() {
            control.leave(&process.register, session);
        }
    }

    /// Messages, ticks, and some time.
    fn round(&mut self) {
        (0..RANKS).for_each(|rank| self.exchange(rank));
        let look = self.draws(2);
        let now_ms = self.shared.now_ms();
        {
            let mut world = self.shared.world();
            if look && world.control_is_up {
                world.control.look_after(now_ms);
            }
            let commits = world.control.newest().values().map(|&epoch| epoch - 1).sum::<u64>();
            world.counts.commits = usize::try_from(commits).unwrap_or(0);
        }
        self.shared.next_step();
        let time = self.shared.schedule.below(ROUND_MS) as u64;
        self.shared.schedule.sleep(DIRECTOR, Duration::from_millis(time));
    }

    fn exchange(&mut self, rank: u32) {
        let [dials, hears, tells] = [4, 2, 2].map(|one_of| self.draws(one_of));
        let now_ms = self.shared.now_ms();
        let mut world = self.shared.world();
        let World { control, control_is_up, ranks, .. } = &mut *world;
        let Some(process) = ranks[rank as usize].as_mut().filter(|_| *control_is_up) else {
            return;
        };
        let Some(session) = process.session else {
            if dials {
                process.register.asks &= !process.serves;
                if let Ok((session, placed)) = control.admit(&process.register, now_ms) {
                    process.session = Some(session);
                    process.placed = placed;
                    process.is_new = true;
                }
            }
            return;
        };
        let of = (&process.register, session);
        let beat = FromWorker::Heartbeat(Heartbeat {
            engine: EngineState::Absent,
            calls: 0,
            refused: 0,
            refusals: BTreeMap::new(),
        });
        let mut heard = control.hear(of, beat, now_ms);
        if hears && let Some(message) = process.from_worker.pop_front() {
            let message = match self.shared.plant {
                Some(Plant::FlipBeforeChecksum) => without_digests(message),
                None => message,
            };
            heard = heard.and_then(|()| control.hear(of, message, now_ms));
        }
        process.to_worker.extend(control.orders(session));
        if tells && let Some(order) = process.to_worker.pop_front() {
            process.inbox.push(order);
        }
        drop(world);
        self.shared.found(heard.map_err(|refusal| anyhow!("rank {rank} was refused: {refusal}")));
    }

    /// Ends all processes.
    fn end(&mut self) {
        (0..RANKS).for_each(|rank| self.shared.schedule.kill(place(rank)));
        while (0..RANKS).any(|rank| !self.shared.schedule.is_free(place(rank))) {
            self.shared.schedule.sleep(DIRECTOR, Duration::from_millis(1));
        }
    }
}

fn epochs(held: &[LayerPlacement]) -> BTreeMap<u32, u64> {
    held.iter().map(|placed| (placed.layer, placed.epoch)).collect()
}

fn without_digests(message: FromWorker) -> FromWorker {
    let FromWorker::Staging { layers, bytes_per_second } = message else { return message };
    let without = |staging| LayerStaging { digests: Vec::new(), canaries: Vec::new(), ..staging };
    FromWorker::Staging { layers: layers.into_iter().map(without).collect(), bytes_per_second }
}

#[cfg(test)]
mod seeds {
    use super::*;

    /// A share of `cargo xtask simulate`.
    #[test]
    fn nothing_is_wrong_whatever_goes_wrong() {
        let model = Model::new().unwrap();
        for seed in 0..20 {
            let run = simulate(&model, seed, None).unwrap();
            assert!(run.wrong.is_none(), "seed {seed}: {:?}", run.wrong);
        }
    }

    #[test]
    fn the_same_seed_is_the_same_run() {
        let model = Model::new().unwrap();
        let run = |seed| {
            let Run { trace, counts, .. } = simulate(&model, seed, None).unwrap();
            (trace, counts)
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7).0, run(8).0);
    }

    #[test]
    fn weights_that_nobody_compares_are_found() {
        let model = Model::new().unwrap();
        let found = (0..20).find_map(|seed| {
            simulate(&model, seed, Some(Plant::FlipBeforeChecksum)).unwrap().wrong
        });
        let found = found.unwrap().to_string();
        assert!(found.ends_with("has other bits"), "{found}");
    }
}
