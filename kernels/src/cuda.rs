//! The CUDA device: one rank on a Hopper GPU, from packed weights in the tensor cores' own order
//! (`units`). A call is one persistent launch (`kernels/cuda/fused_moe.cu`), after one that quantises
//! tokens for act=nvfp4. Input and output go through pinned memory of the host.

mod bench;
mod compile;
mod launch;
mod params;
mod source;
mod units;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaFunction, DriverError};
use cudarc::nvrtc::result::NvrtcError;
use rayon::prelude::*;

pub use self::bench::{CudaBench, Timing};
pub use self::compile::{Compiled, default_cache};

use self::launch::{Gpu, Grid, Memory, Pinned};
use self::params::{Job, Pair, Params, Scalars};
use crate::assignments::Assignments;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{
    CallError, Device, DeviceError, LayerCall, LoadError, NoSuchTactic, check_call,
};
use crate::group::Group;
use crate::heap::HeapShape;
use crate::heap::shm::ShmHeap;
use crate::numeric::BLOCK;
use crate::problem::{ActFormat, Form, LayerShape, WeightsIn};
use crate::tactics::{BY_TOKENS, Buckets, Choice, Problem, Provenance};

/// Threads of a block of simple kernels.
const THREADS: usize = 128;
/// Most experts of a layer that the kernel sorts pairs for.
const EXPERTS_MAX: u32 = 1024;
/// Threads of the kernel of a layer: 16 warps that multiply, one that copies.
const FUSED_THREADS: u32 = 17 * 32;
/// Its shared memory: four stages of 36,864 bytes of weights and 32 rows of 528 bytes, 16 KiB for the
/// quantiser, barriers and tasks.
const FUSED_SHARED: u32 = 4 * (36_864 + 32 * 528) + 16_384 + 4 * 2 * 8 + 5 * (32 + 16 + 32 * 4);
/// Tiles of a row block.
const BLOCK_TILES: u32 = 16;

/// Threads of a kernel of a tiled call: two warpgroups that multiply, one of which two threads copy.
const TILED_THREADS: u32 = 3 * 128;
/// Most tokens of a tile; a multiprocessor has one block of wide tiles, or two of narrow ones.
const WIDE_TILE: usize = 256;
/// See above.
const NARROW_TILE: usize = 64;
/// Shared memory of a block.
const WIDE_SHARED: u32 = tiled_shared(WIDE_TILE as u32);
/// See above.
const NARROW_SHARED: u32 = tiled_shared(NARROW_TILE as u32);

/// Four stages of rows of 128 bytes, 128 or fewer rows of each warpgroup to write from, three stages of 18,432 bytes of
/// weights, four words for each token, barriers and tasks.
const fn tiled_shared(tile: u32) -> u32 {
    let staged = if tile < 128 { tile } else { 128 };
    (4 * tile + 2 * staged) * 128 + 3 * 18_432 + tile * 16 + 22 * 8 + 3 * 24
}

/// How a call is run. All its sums are in the order of the tactic: a token's bits do not depend on what shares its batch as
/// long as the tactic is the same. The two tiled ones have the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaTactic {
    /// One launch that streams weights past up to 32 tokens of an expert: bound by memory, for decoding.
    Streamed,
    /// Tokens gathered by expert, tiles of up to 64 of them times 128 rows of weights: bound by the decoding of weights.
    Narrow,
    /// The same with tiles of up to 256: bound by tensor cores.
    Wide,
}

impl CudaTactic {
    /// Every tactic.
    pub const ALL: [Self; 3] = [Self::Streamed, Self::Narrow, Self::Wide];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Streamed => "streamed",
            Self::Narrow => "narrow",
            Self::Wide => "wide",
        }
    }

    /// The tactic of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tactic| tactic.name() == name)
    }

    /// Most tokens of a tile, if there are tiles.
    fn tile(self) -> Option<usize> {
        match self {
            Self::Streamed => None,
            Self::Narrow => Some(NARROW_TILE),
            Self::Wide => Some(WIDE_TILE),
        }
    }
}

/// Which GPU, and where its compiled code is kept.
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// Number of the GPU.
    pub gpu: usize,
    /// Folder of compiled code.
    pub cache: PathBuf,
    /// Slower code, of which tools that look for races see all of the order.
    pub every_lane_arrives: bool,
    /// One tactic for every call; by default each call gets one by its tokens.
    pub tactic: Option<CudaTactic>,
    /// For how long a block of a launch waits for something that others do; twice as long for the end of all that they do.
    pub deadline: Duration,
    /// Something that launches never say, to see that whoever waits for it gives up.
    pub withheld: Option<Awaited>,
}

impl CudaOptions {
    /// What a worker uses, on a GPU and with a folder of compiled code.
    #[must_use]
    pub fn new(gpu: usize, cache: PathBuf) -> Self {
        let (deadline, every_lane_arrives) = (DEADLINE, false);
        Self { gpu, cache, every_lane_arrives, tactic: None, deadline, withheld: None }
    }
}

/// What a block of a launch waits for others for; the twin of `kernels/cuda/stage/wait.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The order of the call's pairs.
    Order = 1,
    /// FC1 of an expert.
    GateUp = 2,
    /// The end of all other blocks' work.
    Others = 3,
}

/// For how long a block waits, which the slowest call does not come near.
const DEADLINE: Duration = Duration::from_secs(2);

/// Bytes before the output: the status of a call, and room so that rows are aligned.
const STATUS_BYTES: usize = 128;

/// Why a launch gave up, by its status word; none if it did not.
fn given_up(status: u32) -> Option<String> {
    let expert = status >> 4;
    match status & 0xf {
        0 => None,
        1 => Some("the order of the call's pairs".to_owned()),
        2 => Some(format!("FC1 of expert {expert}")),
        3 => Some("the end of other blocks' work".to_owned()),
        other => Some(format!("what it calls {other}")),
    }
}

/// Compiles the device code with NVRTC, which needs no GPU, and says what became of its kernels.
///
/// # Errors
/// [`CudaError::Library`] where NVRTC is not found, [`CudaError::Compile`] with its log.
pub fn compile_report(options: &CudaOptions) -> Result<Vec<Compiled>, CudaError> {
    find_compiler()?;
    compile::report(&source::program(), &source::options(options))
}

fn find_compiler() -> Result<(), CudaError> {
    let (library, provider) = ("libnvrtc", "the CUDA toolkit has it");
    match launch::compiler_is_present() {
        true => Ok(()),
        false => Err(CudaError::Library { library, provider }),
    }
}

/// A GPU that cannot be used, or that failed.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library that is not there.
    #[error("{library} is not on this machine ({provider}); the cpu device works without it")]
    Library {
        /// Its name.
        library: &'static str,
        /// What has it.
        provider: &'static str,
    },
    /// No such GPU.
    #[error("there is no GPU {gpu}: {error}; the cpu device works without one")]
    NoGpu {
        /// Its number.
        gpu: usize,
        /// What the driver says.
        error: DriverError,
    },
    /// A GPU of another generation.
    #[error("GPU {gpu} has compute capability {major}.{minor}, expected 9.0 (Hopper)")]
    Capability {
        /// Its number.
        gpu: usize,
        /// Major number.
        major: i32,
        /// Minor number.
        minor: i32,
    },
    /// More experts than a kernel sorts.
    #[error("layer {layer} has {experts} experts, expected at most {max}")]
    Experts {
        /// The layer.
        layer: u32,
        /// Its experts.
        experts: u32,
        /// Most there can be.
        max: u32,
    },
    /// Memory that the GPU does not have.
    #[error("{bytes} bytes for {what} were refused: {error}")]
    Memory {
        /// What they are for.
        what: &'static str,
        /// How many.
        bytes: usize,
        /// What the driver says.
        error: DriverError,
    },
    /// A call of the driver that failed.
    #[error("{call} failed: {error}")]
    Driver {
        /// The call, or what it is about.
        call: &'static str,
        /// What the driver says.
        error: DriverError,
    },
    /// A call of the compiler that failed.
    #[error("{call} failed: {error}")]
    Nvrtc {
        /// The call.
        call: &'static str,
        /// What the compiler says.
        error: NvrtcError,
    },
    /// A launch in which a block waited for others for too long. The GPU can be used further.
    #[error("a launch gave up, with a deadline of {ms} ms: {awaited} did not come")]
    Expired {
        /// What was waited for.
        awaited: String,
        /// [`CudaOptions::deadline`].
        ms: u128,
    },
    /// Device code that does not compile.
    #[error("the device code does not compile ({error}): {log}")]
    Compile {
        /// What the compiler says.
        error: NvrtcError,
        /// Its log.
        log: String,
    },
    /// The folder of compiled code.
    #[error("cannot write {}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One layer's experts on the GPU.
#[derive(Debug)]
struct Layer {
    number: u32,
    shape: LayerShape,
    in13: Option<f32>,
    scaled: bool,
    fc1: u64,
    fc2: u64,
    /// For each activation format.
    scalars: [u64; 2],
    lag: u32,
    /// Holds what the addresses point to.
    _memory: (Memory<u8>, Memory<u8>, [Memory<Scalars>; 2]),
}

/// The kernels of a call.
#[derive(Debug)]
struct Kernels {
    quantise_tokens: CudaFunction,
    fused_moe: CudaFunction,
    count_pairs: CudaFunction,
    sort_pairs: CudaFunction,
    gather_tokens: CudaFunction,
    /// Gate and up, then down.
    narrow: [CudaFunction; 2],
    wide: [CudaFunction; 2],
    sum_terms: CudaFunction,
    multiprocessors: usize,
    tactic: Option<CudaTactic>,
}

impl Kernels {
    fn new(gpu: &Gpu, tactic: Option<CudaTactic>) -> Result<Self, CudaError> {
        Ok(Self {
            count_pairs: gpu.kernel("count_pairs")?,
            sort_pairs: gpu.kernel("sort_pairs")?,
            gather_tokens: gpu.kernel("gather_tokens")?,
            narrow: [
                gpu.large_kernel("narrow_gate_up", NARROW_SHARED)?,
                gpu.large_kernel("narrow_down", NARROW_SHARED)?,
            ],
            wide: [
                gpu.large_kernel("wide_gate_up", WIDE_SHARED)?,
                gpu.large_kernel("wide_down", WIDE_SHARED)?,
            ],
            sum_terms: gpu.kernel("sum_terms")?,
            tactic,
            quantise_tokens: gpu.kernel("quantise_tokens")?,
            fused_moe: gpu.large_kernel("fused_moe", FUSED_SHARED)?,
            multiprocessors: gpu.multiprocessors()?,
        })
    }

    /// The tactic of a call with so many places, for which `chosen` was measured to be the fastest.
    fn tactic(&self, shape: &LayerShape, places: usize, chosen: Option<CudaTactic>) -> CudaTactic {
        let by_tokens = match places / shape.experts as usize {
            0..NARROW_FROM => CudaTactic::Streamed,
            NARROW_FROM..WIDE_FROM => CudaTactic::Narrow,
            _ => CudaTactic::Wide,
        };
        self.tactic.or(chosen).unwrap_or(by_tokens)
    }

    /// Starts all of a call.
    fn launch(&self, gpu: &Gpu, tactic: CudaTactic, params: &Params) -> Result<(), DriverError> {
        let plain = |blocks, threads: usize| Grid {
            blocks,
            threads: threads as u32,
            shared: 0,
            resident: false,
        };
        if params.quantised != 0 {
            let blocks = params.tokens as usize * params.hidden as usize / BLOCK;
            gpu.launch(&self.quantise_tokens, plain(blocks.div_ceil(THREADS), THREADS), params)?;
        }
        let blocks = self.multiprocessors;
        let ([gate_up, down], per_multiprocessor, shared) = match tactic {
            CudaTactic::Streamed => {
                let (threads, shared) = (FUSED_THREADS, FUSED_SHARED);
                let grid = Grid { blocks, threads, shared, resident: true };
                return gpu.launch(&self.fused_moe, grid, params);
            }
            CudaTactic::Narrow => (&self.narrow, 2, NARROW_SHARED),
            CudaTactic::Wide => (&self.wide, 1, WIDE_SHARED),
        };
        let (blocks, threads) = (blocks * per_multiprocessor, TILED_THREADS);
        let grid = Grid { blocks, threads, shared, resident: false };
        let places = params.tokens as usize * params.top_k as usize;
        let sorts = plain(places.div_ceil(SORTED_PLACES), SORT_THREADS);
        gpu.launch(&self.count_pairs, sorts, params)?;
        gpu.launch(&self.sort_pairs, sorts, params)?;
        gpu.launch(&self.gather_tokens, plain(params.tokens as usize, THREADS), params)?;
        gpu.launch(gate_up, grid, params)?;
        gpu.launch(down, grid, params)?;
        gpu.launch(&self.sum_terms, plain(self.multiprocessors * 8, 256), params)
    }

    /// Jobs by which FC1 runs ahead of FC2: two rounds of the multiprocessors, so that whoever draws
    /// FC2 of a job does not wait for FC1 of it.
    fn lag(&self, shape: &LayerShape) -> u32 {
        let blocks = (shape.intermediate / 8).div_ceil(BLOCK_TILES);
        (2 * self.multiprocessors as u32).div_ceil(blocks).max(1)
    }
}

/// Memory that calls share one after the other.
#[derive(Debug)]
struct Workspace {
    x: Memory<u8>,
    mid: Memory<u8>,
    terms: Memory<u8>,
    out: Memory<u8>,
    jobs: Memory<Job>,
    counters: Memory<u32>,
    control: Memory<u32>,
    pairs: Memory<Pair>,
    pool: Memory<u8>,
    tiles: Memory<Job>,
    spots: Memory<u32>,
    ids: Memory<i32>,
    weights: Memory<f32>,
    pinned: Pinned,
    /// Calls so far, never 0 in a launch.
    calls: u32,
    deadline: Duration,
}

/// Pairs for each expert of a layer from which tiles are narrow, and from which they are wide.
const NARROW_FROM: usize = 16;
const WIDE_FROM: usize = 96;

/// Places that a block sorts, and its threads.
const SORTED_PLACES: usize = 1_024;
const SORT_THREADS: usize = 256;

/// Columns of a step, for which a row of a pool has 128 bytes.
const STEP_COLUMNS: usize = 64;
const ROW: usize = 128;
/// Rows of a tile are a multiple of this.
const ROWS_STEP: usize = 8;

/// Places of a small call, whose counters lie behind the other words that blocks share.
const SMALL_PLACES: usize = 32;
/// Where they begin.
const COUNTERS: usize = 8;
/// Words that the blocks of a launch share.
const CONTROL_WORDS: usize = COUNTERS + SMALL_PLACES;

impl Workspace {
    fn new(gpu: &Gpu, deadline: Duration) -> Result<Self, CudaError> {
        let mut control = Memory::new("control words");
        gpu.upload(&[0; CONTROL_WORDS], &mut control)?;
        Ok(Self {
            x: Memory::new("tokens"),
            mid: Memory::new("the intermediate"),
            terms: Memory::new("terms"),
            out: Memory::new("the output"),
            jobs: Memory::new("jobs"),
            counters: Memory::new("counters"),
            control,
            pairs: Memory::new("pairs"),
            pool: Memory::new("tokens by expert"),
            tiles: Memory::new("tiles"),
            spots: Memory::new("spots"),
            ids: Memory::new("ids"),
            weights: Memory::new("weights"),
            pinned: Pinned::new(),
            calls: 0,
            deadline,
        })
    }

    /// Everything about a call but its input: `tokens` rows with `top_k` places each.
    fn params(
        &mut self,
        gpu: &Gpu,
        (layer, tactic): (&Layer, CudaTactic),
        form: Form,
        (tokens, top_k): (u32, u32),
    ) -> Result<Params, CudaError> {
        let LayerShape { hidden, intermediate, swiglu, experts, .. } = layer.shape;
        let places = tokens as usize * top_k as usize;
        let tiled = tactic.tile().is_some();
        let tile = tactic.tile().unwrap_or(1);
        // An expert may have one tile more than fill, and the last of each is rounded up.
        let tiles = places.min(experts as usize) + places / tile;
        let pool_rows = places + tiles * (ROWS_STEP - 1);
        let counts = places.div_ceil(SORTED_PLACES) * experts as usize;
        let pool_bytes = |columns: u32| pool_rows * (columns as usize).div_ceil(STEP_COLUMNS) * ROW;
        let mid_bytes = match tiled {
            true => pool_bytes(intermediate),
            false => places * intermediate as usize * 2,
        };
        let rows = tokens as usize * hidden as usize * 2;
        self.calls = self.calls.wrapping_add(1).max(1);
        let control = gpu.address(&self.control);
        let status = gpu.grow(&mut self.out, STATUS_BYTES + rows)?;
        // Every place may be an expert's only one.
        Ok(Params {
            fc1: layer.fc1,
            fc2: layer.fc2,
            scalars: layer.scalars[usize::from(form.act == ActFormat::Nvfp4)],
            x: gpu.grow(&mut self.x, rows)?,
            mid: gpu.grow(&mut self.mid, mid_bytes)?,
            terms: gpu.grow(&mut self.terms, places * hidden as usize * 2)?,
            out: status + STATUS_BYTES as u64,
            status,
            deadline_ns: u64::try_from(self.deadline.as_nanos()).unwrap_or(u64::MAX),
            jobs: gpu.grow(&mut self.jobs, places)?,
            counters: match tactic {
                CudaTactic::Narrow | CudaTactic::Wide => gpu.grow(&mut self.counters, counts)?,
                CudaTactic::Streamed if places <= SMALL_PLACES => {
                    control + (COUNTERS * size_of::<u32>()) as u64
                }
                CudaTactic::Streamed => gpu.grow(&mut self.counters, places)?,
            },
            control,
            pairs: gpu.grow(&mut self.pairs, if tiled { pool_rows } else { places })?,
            pool: gpu.grow(&mut self.pool, if tiled { pool_bytes(hidden) } else { 0 })?,
            tiles: gpu.grow(&mut self.tiles, if tiled { tiles } else { 0 })?,
            spots: gpu.grow(&mut self.spots, if tiled { 2 * places } else { 0 })?,
            ids: gpu.grow(&mut self.ids, places)?,
            weights: gpu.grow(&mut self.weights, places)?,
            tokens,
            top_k,
            hidden,
            intermediate,
            experts,
            quantised: u32::from(form.act == ActFormat::Nvfp4),
            weights_in_combine: u32::from(form.weights_in == WeightsIn::Combine),
            g: layer.in13.map_or(1.0, |in13| 1.0 / in13),
            limit: swiglu.limit.unwrap_or(f32::INFINITY),
            alpha: swiglu.alpha,
            beta: swiglu.beta,
            lag: layer.lag,
            call: self.calls,
            tile_tokens: tile as u32,
        })
    }
}

/// A rank on a GPU.
#[derive(Debug)]
pub struct CudaDevice {
    name: String,
    gpu: Gpu,
    kernels: Kernels,
    layers: Vec<Layer>,
    workspace: Workspace,
    assignments: Assignments,
    group: Group,
    provenance: Provenance,
    /// For each layer and activation format.
    chosen: Vec<[Buckets<CudaTactic>; 2]>,
}

/// Bytes of an expert of a layer of `shape`.
#[must_use]
pub fn expert_bytes(shape: &LayerShape) -> u64 {
    units::expert_bytes(shape).iter().map(|&bytes| bytes as u64).sum()
}

impl CudaDevice {
    /// Makes a device that is alone, with every layer of a checkpoint. The device code is compiled
    /// here, unless it was before; nothing is compiled on a call.
    ///
    /// # Errors
    /// [`CudaError`] for a machine without such a GPU; what is wrong with block scales.
    pub fn alone(options: &CudaOptions, checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let (context, name) = context(options.gpu)?;
        let (program, flags) = (source::program(), source::options(options));
        let cubin = compile::cubin(&program, &flags, &options.cache)?;
        let provenance = Provenance {
            device: name.clone(),
            driver: driver_version(),
            kernels: compile::key(&program, &flags, compile::version()?),
        };
        let gpu = Gpu::new(context, cubin)?;
        let kernels = Kernels::new(&gpu, options.tactic)?;
        let mut layers = Vec::new();
        for position in 0..checkpoint.layers().len() {
            layers.push(load(&gpu, &kernels, checkpoint, position)?);
        }
        let workspace = Workspace::new(&gpu, options.deadline)?;
        let shape = HeapShape { ranks: 1, max_tokens: 0, max_pairs: 0, hidden: 0 };
        let heap = ShmHeap::alone(shape).map_err(LoadError::Device)?;
        let group = Group::new(Arc::new(heap), Duration::MAX);
        let assignments = Assignments::default();
        let chosen = layers.iter().map(|_| Default::default()).collect();
        Ok(Self { name, gpu, kernels, layers, workspace, assignments, group, provenance, chosen })
    }

    /// Runs a call whose ids and weights are good.
    fn compute(&mut self, call: &LayerCall<'_>, position: usize) -> Result<(), CudaError> {
        let Self { gpu, kernels, layers, workspace, assignments, chosen, .. } = self;
        let layer = &layers[position];
        let rows = call.tokens as usize * layer.shape.hidden as usize * 2;
        let size = (call.tokens, call.top_k);
        let chosen = chosen[position][usize::from(call.form.act == ActFormat::Nvfp4)].get(size.0);
        let tactic = kernels.tactic(&layer.shape, size.0 as usize * size.1 as usize, chosen);
        let params = workspace.params(gpu, (layer, tactic), call.form, size)?;
        let Workspace { x, out, ids, weights, pinned, .. } = workspace;
        call.buffer.read(call.offsets.hidden, gpu.pin(pinned, rows)?);
        gpu.send(pinned, rows, x)?;
        gpu.upload(&assignments.ids, ids)?;
        gpu.upload(&assignments.weights, weights)?;
        let launched = kernels.launch(gpu, tactic, &params);
        launched.map_err(|error| CudaError::Driver { call: "cuLaunchKernel", error })?;
        gpu.fetch(out, STATUS_BYTES + rows, pinned)?;
        let (status, rows) = gpu.pin(pinned, STATUS_BYTES + rows)?.split_at(STATUS_BYTES);
        // Blocks of tiled calls do not wait for others.
        let status = status.first_chunk().filter(|_| tactic.tile().is_none());
        if let Some(awaited) = status.and_then(|word| given_up(u32::from_le_bytes(*word))) {
            return Err(CudaError::Expired { awaited, ms: workspace.deadline.as_millis() });
        }
        call.buffer.write(call.offsets.output, rows);
        Ok(())
    }
}

/// The number that the kernel's part of the driver has, such as 580.65.06.
fn driver_version() -> String {
    let said = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let number =
        |word: &&str| word.contains('.') && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    said.split_whitespace().find(number).unwrap_or("unknown").to_owned()
}

/// Finds the driver, the compiler and the GPU. A missing library would panic later.
fn context(gpu: usize) -> Result<(Arc<CudaContext>, String), CudaError> {
    if !launch::driver_is_present() {
        return Err(CudaError::Library { library: "libcuda", provider: "NVIDIA's driver has it" });
    }
    find_compiler()?;
    let context = CudaContext::new(gpu).map_err(|error| CudaError::NoGpu { gpu, error })?;
    let failed = |error| CudaError::Driver { call: "cuDeviceGetAttribute", error };
    let (major, minor) = context.compute_capability().map_err(failed)?;
    if (major, minor) != (9, 0) {
        return Err(CudaError::Capability { gpu, major, minor });
    }
    let name = context.name().map_err(failed)?;
    Ok((context, name))
}

/// Derives a layer's experts and copies them to the GPU.
fn load(
    gpu: &Gpu,
    kernels: &Kernels,
    checkpoint: &Checkpoint,
    position: usize,
) -> Result<Layer, LoadError> {
    let layer = checkpoint.layers()[position];
    let shape = layer.shape;
    if shape.experts > EXPERTS_MAX {
        let (experts, max) = (shape.experts, EXPERTS_MAX);
        return Err(CudaError::Experts { layer: layer.number, experts, max }.into());
    }
    let [fc1_bytes, fc2_bytes] = units::expert_bytes(&shape);
    let experts = shape.experts as usize;
    let (mut fc1, mut fc2) = (vec![0; fc1_bytes * experts], vec![0; fc2_bytes * experts]);
    let slots = fc1.par_chunks_exact_mut(fc1_bytes).zip(fc2.par_chunks_exact_mut(fc2_bytes));
    let raw = slots.zip(0..shape.experts).map(|((fc1, fc2), expert)| {
        let raw = checkpoint.expert(position, expert)?;
        units::derive(&raw, [fc1, fc2]);
        Ok(raw.scalars())
    });
    let raw = raw.collect::<Result<Vec<_>, CheckpointError>>()?;
    let unscale = 2_f32.powi(units::UNSCALE_EXPONENT);
    let of_format = |act| -> Vec<Scalars> {
        let products = raw.iter().map(|raw| raw.products(act, layer.in13));
        let scalars = products.map(|products| {
            products.map_or_else(Scalars::default, |p| Scalars {
                gate_alpha: p.gate_alpha * unscale,
                up_alpha: p.up_alpha * unscale,
                fc2_alpha: p.fc2_alpha * unscale,
                norm_const: p.norm_const,
            })
        });
        scalars.collect()
    };
    let (mut fc1_memory, mut fc2_memory) =
        (Memory::new("weights of FC1"), Memory::new("weights of FC2"));
    let mut scalars = [Memory::new("scalars"), Memory::new("scalars")];
    let addresses = [ActFormat::Bf16, ActFormat::Nvfp4].map(of_format);
    let [bf16, nvfp4] = &mut scalars;
    let scalar_addresses = [gpu.upload(&addresses[0], bf16)?, gpu.upload(&addresses[1], nvfp4)?];
    let (fc1, fc2) = (gpu.upload(&fc1, &mut fc1_memory)?, gpu.upload(&fc2, &mut fc2_memory)?);
    gpu.wait().map_err(|error| CudaError::Driver { call: "weights", error })?;
    checkpoint.release(position)?;
    Ok(Layer {
        number: layer.number,
        shape,
        in13: layer.in13,
        scaled: layer.scaled,
        fc1,
        fc2,
        scalars: scalar_addresses,
        lag: kernels.lag(&shape),
        _memory: (fc1_memory, fc2_memory, scalars),
    })
}

impl From<CudaError> for LoadError {
    fn from(error: CudaError) -> Self {
        Self::Device(DeviceError::Cuda(error))
    }
}

impl Device for CudaDevice {
    fn describe(&self) -> String {
        format!("cuda, {}", self.name)
    }

    fn provenance(&self) -> Provenance {
        self.provenance.clone()
    }

    fn tactics(&self) -> Vec<String> {
        let all = CudaTactic::ALL.map(|tactic| tactic.name().to_owned());
        std::iter::once(BY_TOKENS.to_owned()).chain(all).collect()
    }

    fn problem(&self, position: usize, act: ActFormat) -> Option<Problem> {
        let shape = &self.layers.get(position)?.shape;
        Some(Problem::new(shape, (1, shape.experts), act))
    }

    fn choose(&mut self, choices: &[Choice]) -> Result<(), NoSuchTactic> {
        let parse = |name: &str| {
            CudaTactic::named(name)
                .ok_or_else(|| NoSuchTactic { name: name.to_owned(), known: self.tactics() })
        };
        let of = |layer: &Layer, act| {
            let problem = Problem::new(&layer.shape, (1, layer.shape.experts), act);
            Buckets::of(choices, &problem, parse)
        };
        let layer = |layer| Ok([of(layer, ActFormat::Bf16)?, of(layer, ActFormat::Nvfp4)?]);
        self.chosen = self.layers.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn run(&mut self, call: &LayerCall<'_>) -> Result<(), CallError> {
        let layers = self.layers.iter().map(|layer| (layer.number, layer.scaled));
        let position = check_call(call, layers)?;
        self.assignments.read(call, self.layers[position].shape.experts)?;
        if call.tokens == 0 {
            return Ok(());
        }
        self.compute(call, position)
            .map_err(|error| CallError::Device { reason: error.to_string() })
    }

    fn assigned(&self) -> &[i32] {
        &self.assignments.ids
    }

    fn join(&mut self, _asked: Option<u32>) -> Result<(), CallError> {
        Ok(())
    }

    fn group(&mut self) -> &mut Group {
        &mut self.group
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever machine this runs on: without a GPU the error says what to do.
    #[test]
    fn a_machine_without_a_gpu_is_told_of_the_cpu_device() {
        let Err(error) = context(0) else { return };
        assert!(error.to_string().contains("the cpu device works without"), "{error}");
    }
}
