//! The CPU device: exact, on all cores. Owns the packed weights of its slots and the state of a call,
//! whose steps are in `dispatch`, `compute` and `combine`.

mod activate;
mod canary;
mod combine;
mod compute;
mod dispatch;
mod layout;
mod product;
mod simd;
mod slots;
mod tactic;

use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

pub use self::canary::CanaryError;
pub use self::slots::{StageError, Staged, Stager};
pub use self::tactic::{CpuTactic, Isa, UnknownIsa, UnknownTactic, Why};

use self::compute::Scratch;
use self::dispatch::{Garbled, Incoming, Outgoing};
use self::slots::{Held, Layer, Slot};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{
    CallError, Device, DeviceError, LayerCall, LayerSlots, LoadError, NoSuchTactic, check_call,
};
use crate::group::{Announcement, Group, NO_LAYER, Role, behind, compare, flips, is_superseded};
use crate::heap::HeapShape;
use crate::heap::shm::ShmHeap;
use crate::problem::{ActFormat, Form, LayerShape};
use crate::tactics::{BY_TOKENS, Buckets, Choice, Problem, Provenance};

/// Bytes of a slot of a layer of `shape`.
#[must_use]
pub fn slot_bytes(shape: &LayerShape) -> u64 {
    layout::expert_bytes(shape) as u64
}

/// How the device uses the processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads of the products; 0 takes one for each core.
    pub threads: usize,
    /// Instructions; by default the fastest that the processor has.
    pub isa: Option<Isa>,
    /// One tactic for every expert and call; by default each expert gets one by its tokens.
    pub tactic: Option<CpuTactic>,
}

impl CpuOptions {
    /// The instructions that a device with these options uses.
    #[must_use]
    pub fn chosen_isa(&self) -> Isa {
        self.tactic.map(|tactic| tactic.isa).or(self.isa).unwrap_or_else(Isa::best)
    }
}

fn describe(pool: &ThreadPool, tactic: Option<CpuTactic>, isa: Isa) -> String {
    let threads = pool.current_num_threads();
    match tactic {
        Some(tactic) => format!("cpu, {threads} threads, tactic {tactic}"),
        None => format!("cpu, {threads} threads, {}, tactic by tokens", isa.name()),
    }
}

/// A rank's slots on the CPU, loaded before the rank joins its group: nobody waits for a rank that
/// loads.
#[derive(Debug)]
pub struct CpuSlots {
    isa: Isa,
    tactic: Option<CpuTactic>,
    pool: ThreadPool,
    /// Ascending by number.
    layers: Vec<Layer>,
}

/// A rank on the CPU.
#[derive(Debug)]
pub struct CpuDevice {
    isa: Isa,
    tactic: Option<CpuTactic>,
    pool: ThreadPool,
    group: Group,
    /// Ascending by number.
    layers: Vec<Layer>,
    outgoing: Outgoing,
    incoming: Incoming,
    scratch: Scratch,
    /// For each layer and activation format.
    chosen: Vec<[Buckets<CpuTactic>; 2]>,
}

impl CpuSlots {
    /// No layers yet.
    ///
    /// # Errors
    /// [`DeviceError::Tactic`] for instructions that the processor lacks, [`DeviceError::Threads`].
    pub fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let isa = options.chosen_isa();
        if !isa.available() {
            let why = Why::Isa { isa: isa.name() };
            return Err(DeviceError::Tactic { tactic: isa.name().to_owned(), why });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|index| format!("moe-{index}"))
            .build()
            .map_err(|source| DeviceError::Threads { threads: options.threads, source })?;
        Ok(Self { isa, tactic: options.tactic, pool, layers: Vec::new() })
    }

    /// What [`Device::describe`] will say.
    #[must_use]
    pub fn describe(&self) -> String {
        describe(&self.pool, self.tactic, self.isa)
    }

    /// Derives the experts of this rank's slots of the layer at `position` of the checkpoint's
    /// layers, and gives the checkpoint's pages back: no more than one layer of it is resident at a
    /// time.
    ///
    /// # Errors
    /// [`DeviceError::Tactic`] for a tactic that is not legal for the layer,
    /// [`DeviceError::Memory`], and whatever is wrong with the layer's block scales.
    pub fn load(
        &mut self,
        checkpoint: &Checkpoint,
        position: usize,
        slots: LayerSlots,
    ) -> Result<(), LoadError> {
        let layers = checkpoint.layers();
        let layer = layers.get(position).ok_or(CheckpointError::OutOfRange {
            what: "layer position",
            value: position,
            count: layers.len(),
        })?;
        let shape = layer.shape;
        if let Some(tactic) = &self.tactic {
            let named = |why| DeviceError::Tactic { tactic: tactic.to_string(), why };
            tactic.legal(&shape).map_err(named)?;
        }
        let LayerSlots { epoch, experts, route } = slots;
        let derive = |expert: &Option<u32>| {
            let derived = expert.map(|expert| Slot::derive(checkpoint, position, expert));
            Ok::<_, LoadError>(derived.transpose()?.map(Arc::new))
        };
        let slots =
            self.pool.install(|| experts.par_iter().map(derive).collect::<Result<Vec<_>, _>>())?;
        checkpoint.release(position)?;
        let layer = Layer::new(checkpoint, position, Held { epoch, route, slots });
        let at = self.layers.partition_point(|known| known.number < layer.number);
        self.layers.insert(at, layer);
        Ok(())
    }
}

impl CpuDevice {
    /// A rank's part of `group`, with its slots.
    #[must_use]
    pub fn new(slots: CpuSlots, group: Group) -> Self {
        let CpuSlots { isa, tactic, pool, layers } = slots;
        let chosen = layers.iter().map(|_| Default::default()).collect();
        Self {
            chosen,
            isa,
            tactic,
            group,
            layers,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            scratch: Scratch::new(pool.current_num_threads()),
            pool,
        }
    }

    /// Makes a device that is alone, with every layer of a checkpoint, for calls of up to
    /// `max_tokens` tokens.
    ///
    /// # Errors
    /// As [`CpuSlots::new`] and [`CpuSlots::load`].
    pub fn alone(
        options: CpuOptions,
        checkpoint: &Checkpoint,
        max_tokens: u32,
    ) -> Result<Self, LoadError> {
        let heap = ShmHeap::alone(HeapShape::alone(max_tokens, checkpoint.layers()))?;
        let mut slots = CpuSlots::new(options)?;
        for (position, layer) in checkpoint.layers().iter().enumerate() {
            slots.load(checkpoint, position, LayerSlots::whole(layer.shape.experts))?;
        }
        // Nobody is waited for.
        Ok(Self::new(slots, Group::new(Arc::new(heap), Duration::MAX)))
    }

    /// Position of a layer that the device has.
    fn position(&self, layer: u32) -> Option<usize> {
        self.layers.binary_search_by_key(&layer, |layer| layer.number).ok()
    }

    /// Everything about a call that can be refused before ids are looked at.
    fn check(&self, call: &LayerCall<'_>) -> Result<usize, CallError> {
        let layers = self.layers.iter().map(|layer| (layer.number, layer.scaled));
        let position = check_call(call, layers)?;
        let LayerCall { tokens, top_k, .. } = *call;
        let HeapShape { max_tokens, max_pairs: max, .. } = self.group.layout().shape;
        if tokens > max_tokens || u64::from(tokens) * u64::from(top_k) > u64::from(max) {
            return Err(CallError::Pairs { tokens, top_k, max });
        }
        Ok(position)
    }

    /// This rank's part of a call, with what `outgoing` holds.
    fn take_part(
        &mut self,
        part: &Part<'_>,
        outgoing: &mut Outgoing,
        incoming: &mut Incoming,
        scratch: &mut Scratch,
    ) -> Result<(), CallError> {
        let ours = match *part {
            Part::Calls { position, call } => {
                let absent = self.group.enter_to_call()?;
                let layer = &self.layers[position];
                outgoing.route(layer, (self.group.rank(), call.top_k), absent)?;
                self.send(call, layer, outgoing, scratch);
                let LayerCall { tokens, top_k, form, .. } = *call;
                let ready = layer.ready();
                let (layer, epoch, pairs) = (layer.number, layer.held.epoch, outgoing.counts());
                let role = Role::Calls;
                Announcement { role, layer, form, epoch, ready, absent, tokens, top_k, pairs }
            }
            Part::Joins { asked } => self.joins(asked, outgoing.counts()),
        };
        let announced = self.group.announce(&ours)?;
        let flips = flips(&announced, &ours);
        let result = self.go_through(part, &announced, (outgoing, incoming, scratch));
        // All ranks saw the same announcements: they flip after the same call, whatever became of it.
        match self.position(ours.layer) {
            Some(position) if flips => self.layers[position].flip(),
            Some(position) if is_superseded(&announced, &ours) => {
                self.layers[position].stand_back();
            }
            Some(position) if result.is_ok() && ours.role != Role::Refused => {
                self.layers[position].settle();
            }
            _ => {}
        }
        result
    }

    /// The call that was announced.
    fn go_through(
        &mut self,
        part: &Part<'_>,
        announced: &[Announcement],
        (outgoing, incoming, scratch): (&mut Outgoing, &mut Incoming, &mut Scratch),
    ) -> Result<(), CallError> {
        if let Some(late) = behind(announced) {
            self.group.end_call();
            return Err(self.group.flipped(late, announced[late as usize].layer).into());
        }
        let (number, form, epoch) = match compare(announced) {
            Ok(Some(called)) => (called.layer, called.form, called.epoch),
            // Every engine's call was refused.
            Ok(None) => {
                self.group.end_call();
                return Ok(());
            }
            Err(mismatch) => {
                self.group.end_call();
                return Err(mismatch.into());
            }
        };
        let here = self.position(number).filter(|&at| self.layers[at].held.epoch == epoch);
        let Some(position) = here else {
            // This rank could not say so before: it did not know the layer.
            let rank = self.group.rank();
            return Err(self.group.give_up_garbled(rank, number).into());
        };
        let layer = &self.layers[position];
        if let Err(Garbled { source }) = self.receive((layer, form), announced, incoming, scratch) {
            return Err(self.group.give_up_garbled(source, number).into());
        }
        // The same on all ranks, also on those that bring no tokens.
        let tokens = announced.iter().map(|a| a.tokens).max().unwrap_or(0);
        let chosen = self.chosen[position][usize::from(form.act == ActFormat::Nvfp4)].get(tokens);
        self.compute((layer, form, self.tactic.or(chosen)), incoming, scratch);
        self.group.be_done(number)?;
        self.group.end_call();
        if let Part::Calls { position, call } = *part {
            self.combine(call, &self.layers[position], outgoing, scratch);
        }
        Ok(())
    }

    /// What a rank announces whose engine does not call.
    fn joins(&mut self, asked: Option<u32>, pairs: Vec<u32>) -> Announcement {
        let pending = self.group.pending();
        let absent = self.group.enter();
        let known = pending.and_then(|a| Some((a.form, &self.layers[self.position(a.layer)?])));
        let (tokens, top_k) = (0, 1);
        match known {
            Some((form, layer)) => {
                let (layer, epoch, ready) = (layer.number, layer.held.epoch, layer.ready());
                let role = Role::Joins;
                Announcement { role, layer, form, epoch, ready, absent, tokens, top_k, pairs }
            }
            None => {
                // Also a call that is refused makes ranks flip: it may be refused for what comes to be in force by that.
                let known = asked.and_then(|asked| Some(&self.layers[self.position(asked)?]));
                let (epoch, ready) = known.map_or((0, 0), |l| (l.held.epoch, l.ready()));
                let (layer, form) = (asked.unwrap_or(NO_LAYER), Form::default());
                let role = Role::Refused;
                Announcement { role, layer, form, epoch, ready, absent, tokens, top_k, pairs }
            }
        }
    }

    fn run_part(&mut self, part: &Part<'_>, mut outgoing: Outgoing) -> Result<(), CallError> {
        // Taken out so that threads may share the rest of the device meanwhile.
        let mut incoming = std::mem::take(&mut self.incoming);
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.take_part(part, &mut outgoing, &mut incoming, &mut scratch);
        (self.outgoing, self.incoming, self.scratch) = (outgoing, incoming, scratch);
        result
    }
}

/// What a rank does in a call.
enum Part<'a> {
    /// Its engine calls the layer at `position`.
    Calls { position: usize, call: &'a LayerCall<'a> },
    /// It brings no tokens; its engine may have asked for a layer.
    Joins { asked: Option<u32> },
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        describe(&self.pool, self.tactic, self.isa)
    }

    fn provenance(&self) -> Provenance {
        let threads = self.pool.current_num_threads();
        Provenance {
            device: format!("cpu, {}, {threads} threads", self.isa),
            driver: processor(),
            kernels: kernels_hash(),
        }
    }

    fn tactics(&self) -> Vec<String> {
        let legal =
            |tactic: &CpuTactic| self.layers.iter().all(|layer| tactic.legal(&layer.shape).is_ok());
        let all = CpuTactic::candidates(self.isa).into_iter().filter(legal);
        std::iter::once(BY_TOKENS.to_owned()).chain(all.map(|tactic| tactic.to_string())).collect()
    }

    fn problem(&self, position: usize, act: ActFormat) -> Option<Problem> {
        let layer = self.layers.get(position)?;
        let slots = layer.held.slots.len() as u32;
        Some(Problem::new(&layer.shape, (self.group.ranks(), slots), act))
    }

    fn choose(&mut self, choices: &[Choice]) -> Result<(), NoSuchTactic> {
        let of = |position: usize, act| {
            let layer = &self.layers[position];
            let problem = self.problem(position, act);
            let parse = |name: &str| {
                let tactic = name.parse::<CpuTactic>().ok();
                let legal = tactic.filter(|tactic| tactic.legal(&layer.shape).is_ok());
                legal.ok_or_else(|| NoSuchTactic { name: name.to_owned(), known: self.tactics() })
            };
            problem.map_or_else(
                || Ok(Buckets::default()),
                |problem| Buckets::of(choices, &problem, parse),
            )
        };
        let layer =
            |position| Ok([of(position, ActFormat::Bf16)?, of(position, ActFormat::Nvfp4)?]);
        self.chosen = (0..self.layers.len()).map(layer).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn placed(&mut self) -> Option<&mut CpuDevice> {
        Some(self)
    }

    fn run(&mut self, call: &LayerCall<'_>) -> Result<(), CallError> {
        let position = self.check(call)?;
        let mut outgoing = std::mem::take(&mut self.outgoing);
        outgoing.clear(self.group.ranks());
        let read = outgoing.assignments.read(call, self.layers[position].shape.experts);
        if let Err(refused) = read {
            self.outgoing = outgoing;
            return Err(refused);
        }
        self.run_part(&Part::Calls { position, call }, outgoing)
    }

    fn assigned(&self) -> &[i32] {
        &self.outgoing.assignments.ids
    }

    fn join(&mut self, asked: Option<u32>) -> Result<(), CallError> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        outgoing.clear(self.group.ranks());
        self.run_part(&Part::Joins { asked }, outgoing)
    }

    fn group(&mut self) -> &mut Group {
        &mut self.group
    }
}

/// Names the processor as the system does.
fn processor() -> String {
    let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = facts.lines().find_map(|line| line.strip_prefix("model name"));
    let name = model.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Of the source whose speed is measured.
fn kernels_hash() -> String {
    let source = [
        include_str!("cpu/compute.rs"),
        include_str!("cpu/layout.rs"),
        include_str!("cpu/product.rs"),
        include_str!("cpu/simd.rs"),
    ];
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(source.concat().as_bytes()))
}

#[cfg(test)]
mod tests;
