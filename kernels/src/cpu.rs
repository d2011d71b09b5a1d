//! The CPU device: exact, on all cores. Owns the layers' packed weights and the state of a call; its
//! steps are in `places`, `compute` and `combine`.

mod activate;
mod combine;
mod compute;
mod layout;
mod places;
mod product;
mod simd;
mod tactic;

use half::bf16;
use memmap2::{Advice, MmapMut, MmapOptions};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

pub use self::tactic::{CpuTactic, Isa, UnknownIsa, UnknownTactic, Why};

use self::compute::Scratch;
use self::places::Places;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{CallError, Device, DeviceError, LayerCall, LoadError};
use crate::expert::RawScalars;
use crate::memory::SharedMemory;
use crate::problem::{ActFormat, LayerShape, TOP_K_MAX};

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

/// One layer's experts, packed at 4.5 bits an element.
#[derive(Debug)]
struct Layer {
    number: u32,
    shape: LayerShape,
    /// Largest `gate_proj.input_scale` of its experts.
    in13: Option<f32>,
    /// Derived bytes of every expert.
    bytes: MmapMut,
    scalars: Vec<RawScalars>,
}

/// A rank on the CPU.
#[derive(Debug)]
pub struct CpuDevice {
    isa: Isa,
    tactic: Option<CpuTactic>,
    pool: ThreadPool,
    /// Ascending by number.
    layers: Vec<Layer>,
    places: Places,
    /// Tokens as the products take them, `[T, h]`: bf16 values, or code x block scale.
    rows: Vec<bf16>,
    /// One bf16 term for each (token, k), `[T, k, h]`.
    terms: SharedMemory,
    scratch: Scratch,
}

impl CpuDevice {
    /// Makes a device without layers.
    ///
    /// # Errors
    /// [`DeviceError::Tactic`] for instructions that the processor lacks, [`DeviceError::Threads`],
    /// [`DeviceError::Memory`].
    pub fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let isa = options.tactic.map(|tactic| tactic.isa).or(options.isa).unwrap_or(Isa::best());
        if !isa.available() {
            let why = Why::Isa { isa: isa.name() };
            return Err(DeviceError::Tactic { tactic: isa.name().to_owned(), why });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|index| format!("moe-{index}"))
            .build()
            .map_err(|source| DeviceError::Threads { threads: options.threads, source })?;
        Ok(Self {
            isa,
            tactic: options.tactic,
            layers: Vec::new(),
            places: Places::default(),
            rows: Vec::new(),
            terms: SharedMemory::create("terms", 0)?,
            scratch: Scratch::new(pool.current_num_threads()),
            pool,
        })
    }

    /// Makes a device with every layer of a checkpoint.
    ///
    /// # Errors
    /// As [`Self::new`] and [`Self::load`].
    pub fn with_checkpoint(
        options: CpuOptions,
        checkpoint: &Checkpoint,
    ) -> Result<Self, LoadError> {
        let mut device = Self::new(options)?;
        for position in 0..checkpoint.layers().len() {
            device.load(checkpoint, position)?;
        }
        Ok(device)
    }

    /// Derives the experts of the layer at `position` of the checkpoint's layers, and gives the
    /// checkpoint's pages back: no more than one layer of it is resident at a time.
    ///
    /// # Errors
    /// [`DeviceError::Tactic`] for a tactic that is not legal for the layer,
    /// [`DeviceError::Memory`], and whatever is wrong with the layer's block scales.
    pub fn load(&mut self, checkpoint: &Checkpoint, position: usize) -> Result<(), LoadError> {
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
        let expert_bytes = layout::expert_bytes(&shape);
        let mut bytes = slot_memory(expert_bytes * shape.experts as usize)?;
        let slots = bytes.par_chunks_exact_mut(expert_bytes).zip(0..shape.experts);
        let derive = |(slot, expert): (&mut [u8], u32)| -> Result<RawScalars, CheckpointError> {
            let raw = checkpoint.expert(position, expert)?;
            layout::derive(&raw, slot);
            Ok(raw.scalars())
        };
        let scalars = self.pool.install(|| slots.map(derive).collect::<Result<Vec<_>, _>>())?;
        checkpoint.release(position)?;
        let (number, in13) = (layer.number, layer.in13);
        let at = self.layers.partition_point(|known| known.number < number);
        self.layers.insert(at, Layer { number, shape, in13, bytes, scalars });
        Ok(())
    }

    fn position(&self, call: &LayerCall<'_>) -> Result<usize, CallError> {
        if call.top_k == 0 || call.top_k > TOP_K_MAX {
            return Err(CallError::TopK { top_k: call.top_k });
        }
        let found = self.layers.binary_search_by_key(&call.layer, |layer| layer.number);
        let position = found.map_err(|_absent| CallError::Layer {
            layer: call.layer,
            served: self.layers.iter().map(|layer| layer.number).collect(),
        })?;
        let layer = &self.layers[position];
        let scaled = layer.in13.is_some() && layer.scalars.iter().all(|s| s.in2.is_some());
        if call.form.act == ActFormat::Nvfp4 && !scaled {
            return Err(CallError::NoInputScale { layer: call.layer });
        }
        Ok(position)
    }
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        let threads = self.pool.current_num_threads();
        match self.tactic {
            Some(tactic) => format!("cpu, {threads} threads, tactic {tactic}"),
            None => format!("cpu, {threads} threads, {}, tactic by tokens", self.isa.name()),
        }
    }

    fn run(&mut self, call: &LayerCall<'_>) -> Result<(), CallError> {
        let position = self.position(call)?;
        self.places.read(call, self.layers[position].shape.experts)?;
        // Taken out so that threads may share the rest of the device meanwhile.
        let mut scratch = std::mem::take(&mut self.scratch);
        self.take_rows(call, position, &mut scratch);
        self.compute(call, position, &mut scratch);
        self.combine(call, position, &mut scratch);
        self.scratch = scratch;
        Ok(())
    }
}

/// Memory for a layer's experts: zero pages, resident once they are written.
fn slot_memory(bytes: usize) -> Result<MmapMut, DeviceError> {
    let refused =
        |source| DeviceError::Memory { what: "slots of a layer", bytes: bytes as u64, source };
    let memory = MmapOptions::new().len(bytes).map_anon().map_err(refused)?;
    // Weights are streamed: huge pages save most TLB misses. A kernel without them refuses the
    // advice, which costs speed alone.
    drop(memory.advise(Advice::HugePage));
    Ok(memory)
}

#[cfg(test)]
mod tests;
