//! A rank's process: it asks control what to load, loads, joins, and serves its engine until it is killed. What it does is
//! the worker's and the device's own code; what is written here is the order of `worker::rank`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kernels::cpu::{CpuDevice, CpuSlots};
use kernels::device::{CallError, Device};
use kernels::group::Group;
use protocol::session::LayerPlacement;
use tests::invariants;
use worker::simulated::{Placing, slots};

use crate::heap::{Heap, place};
use crate::model::{Buffer, options};
use crate::world::{End, Plant, Shared};

/// How long a peer that makes no progress is waited for.
const DEADLINE: Duration = Duration::from_millis(50);
/// How long control may take to say what is to be loaded.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at what there is to do.
const REST: Duration = Duration::from_millis(3);
/// Most of the time that an engine takes for what comes between two calls.
const THINKS_MS: usize = 30;

/// Runs until it is killed, which unwinds.
pub(crate) fn run(shared: &Shared<'_>, rank: u32) -> Result<()> {
    let placed = ask(shared, rank)?;
    let checkpoint = shared.model.open()?;
    let mut loaded = CpuSlots::new(options())?;
    for position in 0..checkpoint.layers().len() {
        let time = shared.schedule.below(20) as u64;
        shared.schedule.sleep(place(rank), Duration::from_millis(time));
        loaded.load(&checkpoint, position, slots(&placed, position, rank))?;
    }
    shared.memory.set_alive(rank, true);
    let heap = Heap { memory: Arc::clone(&shared.memory), rank };
    let device = CpuDevice::new(loaded, Group::new(Arc::new(heap), DEADLINE));
    let wrong = shared.plant == Some(Plant::FlipBeforeChecksum) && rank == 1;
    let checkpoint = if wrong { shared.model.open_wrong()? } else { checkpoint };
    let world = Arc::clone(&shared.world);
    let remember = move |held: &[LayerPlacement]| {
        if let Ok(mut world) = world.lock() {
            world.remembered = Some(held.to_vec());
        }
    };
    remember(&placed);
    let placing = Placing::new(checkpoint, rank, placed.clone(), remember)?;
    if let Some(process) = &mut shared.world().ranks[rank as usize] {
        (process.serves, process.held) = (true, placed);
    }
    let mut process = Running { shared, rank, device, placing, buffer: Buffer::new()? };
    loop {
        process.turn()?;
    }
}

/// What control says, or what the group held last if control is away.
fn ask(shared: &Shared<'_>, rank: u32) -> Result<Vec<LayerPlacement>> {
    let until = shared.schedule.now() + PATIENCE;
    loop {
        {
            let mut world = shared.world();
            let late = shared.schedule.now() >= until;
            let process =
                world.ranks[rank as usize].as_mut().context("a process without a place")?;
            let placed = process.placed.take();
            if placed.is_some() || late && world.remembered.is_some() {
                return placed.or_else(|| world.remembered.clone()).context("nothing to load");
            }
        }
        shared.schedule.sleep(place(rank), REST);
    }
}

struct Running<'a, 'b> {
    shared: &'a Shared<'b>,
    rank: u32,
    device: CpuDevice,
    placing: Placing,
    buffer: Buffer,
}

impl Running<'_, '_> {
    fn turn(&mut self) -> Result<()> {
        let (rank, shared) = (self.rank, self.shared);
        shared.next_step();
        if shared.schedule.below(2) == 0 {
            self.placing.stage();
        }
        let (orders, is_new, calls) = {
            let mut world = shared.world();
            let calls = (rank < world.engines).then(|| {
                let step = &world.step;
                let due = step.members.contains(&rank) && !step.ends.contains_key(&rank);
                due.then(|| (step.layer, step.samples[rank as usize]))
            });
            let process =
                world.ranks[rank as usize].as_mut().context("a process without a place")?;
            let orders = std::mem::take(&mut process.inbox);
            (orders, std::mem::take(&mut process.is_new), calls)
        };
        self.placing.follow(&mut self.device, orders);
        if is_new {
            self.placing.say_again();
        }
        match calls {
            Some(Some((layer, sample))) => {
                let thinks = shared.schedule.below(THINKS_MS) as u64;
                shared.schedule.sleep(place(rank), Duration::from_millis(thinks));
                self.call(layer, sample);
            }
            // Its engine waits for others; that of a rank that is no member yet has not called.
            Some(None) if self.is_member() => shared.schedule.sleep(place(rank), REST),
            Some(None) | None => {
                if self.device.group().is_pending() {
                    self.join();
                } else {
                    shared.schedule.sleep(place(rank), REST);
                }
            }
        }
        self.say();
        Ok(())
    }

    fn is_member(&self) -> bool {
        self.shared.world().step.members.contains(&self.rank)
    }

    fn call(&mut self, layer: u32, number: usize) {
        let sample = self.shared.model.sample(layer, number);
        let call = self.buffer.call(layer, sample);
        let mut ran = self.device.run(&call);
        let mut end = End::Answered;
        match &ran {
            Ok(()) => {
                let what = format!("an answer of layer {layer} on rank {}", self.rank);
                let answer = self.buffer.answer(sample);
                self.shared.found(invariants::has_its_bits(&what, &answer, &sample.expected));
            }
            Err(CallError::Unavailable { layer, expert, lost }) => {
                let held = self.placing.holds().iter().find(|held| held.layer == *layer);
                let lost = lost.iter().copied().collect();
                let is_lost =
                    held.map(|held| invariants::is_lost(&held.placement, (*layer, *expert), &lost));
                self.shared.found(is_lost.unwrap_or(Ok(())));
                // As the worker does: its rank takes part all the same.
                ran = self.device.join(Some(*layer));
                end = End::Refused;
            }
            Err(_together) => {}
        }
        match ran {
            Ok(()) => {}
            Err(CallError::Group(_) | CallError::Mismatch(_)) => end = End::Repeat,
            Err(error) => self.shared.found(Err(error.into())),
        }
        self.placing.after_call(&mut self.device);
        self.shared.schedule.note(&format!("{} {layer} {number} {end:?}", self.rank));
        let mut world = self.shared.world();
        if world.step.members.contains(&self.rank) {
            world.step.ends.insert(self.rank, end);
        }
    }

    fn join(&mut self) {
        match self.device.join(None) {
            Ok(()) | Err(CallError::Group(_) | CallError::Mismatch(_)) => {}
            Err(error) => self.shared.found(Err(error.into())),
        }
        self.placing.after_call(&mut self.device);
    }

    fn say(&mut self) {
        let says = self.placing.says();
        let held = self.placing.holds();
        let checked = {
            let mut world = self.shared.world();
            let flips = |before: &[LayerPlacement]| {
                before.iter().zip(held).filter(|(before, now)| before.epoch < now.epoch).count()
            };
            let mut checked = Ok(());
            let mut flipped = 0;
            if let Some(process) = &mut world.ranks[self.rank as usize] {
                checked = invariants::epochs_grow(&process.held, held);
                flipped = flips(&process.held);
                process.held = held.to_vec();
                if process.session.is_some() {
                    process.from_worker.extend(says);
                }
            }
            world.counts.flips += flipped;
            let committed = held.iter().try_for_each(|held| {
                invariants::is_committed(held, |layer, epoch| world.control.committed(layer, epoch))
            });
            checked.and(committed)
        };
        self.shared.found(checked);
    }
}
