//! The CUDA device: one rank on a Hopper GPU, from packed weights in the tensor cores' own order
//! (`units`). This form is right and simple, a kernel for each stage; input and output go through
//! pinned memory of the host.

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

pub use self::compile::default_cache;

use self::launch::{Gpu, Grid, Memory, Pinned};
use self::params::{Pair, Params, Scalars, TILE_TOKENS, Tile};
use crate::assignments::Assignments;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{CallError, Device, DeviceError, LayerCall, LoadError};
use crate::group::Group;
use crate::heap::HeapShape;
use crate::heap::shm::ShmHeap;
use crate::problem::{ActFormat, LayerShape, TOP_K_MAX, WeightsIn};

/// Threads of a block.
const THREADS: u32 = 128;
const WARPS: usize = THREADS as usize / 32;

/// Which GPU, and where its compiled code is kept.
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// Number of the GPU.
    pub gpu: usize,
    /// Folder of compiled code.
    pub cache: PathBuf,
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
    /// Holds what the addresses point to.
    _memory: (Memory<u8>, Memory<u8>, [Memory<Scalars>; 2]),
}

/// The kernels of the stages.
#[derive(Debug)]
struct Kernels {
    quantise_tokens: CudaFunction,
    quantise_intermediate: CudaFunction,
    gate_up: CudaFunction,
    down: CudaFunction,
    combine: CudaFunction,
}

/// Memory that calls share one after the other.
#[derive(Debug)]
struct Workspace {
    x: Memory<u8>,
    y: Memory<u8>,
    mid: Memory<u8>,
    terms: Memory<u8>,
    out: Memory<u8>,
    tiles: Memory<Tile>,
    pairs: Memory<Pair>,
    ids: Memory<i32>,
    weights: Memory<f32>,
    pinned: Pinned,
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
}

impl CudaDevice {
    /// Makes a device that is alone, with every layer of a checkpoint. The device code is compiled
    /// here, unless it was before; nothing is compiled on a call.
    ///
    /// # Errors
    /// [`CudaError`] for a machine without such a GPU; what is wrong with block scales.
    pub fn alone(options: &CudaOptions, checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let (context, name) = context(options.gpu)?;
        let cubin = compile::cubin(&source::program(), &source::OPTIONS, &options.cache)?;
        let gpu = Gpu::new(context, cubin)?;
        let kernels = Kernels {
            quantise_tokens: gpu.kernel("quantise_tokens")?,
            quantise_intermediate: gpu.kernel("quantise_intermediate")?,
            gate_up: gpu.kernel("gate_up")?,
            down: gpu.kernel("down")?,
            combine: gpu.kernel("combine")?,
        };
        let mut layers = Vec::new();
        for position in 0..checkpoint.layers().len() {
            layers.push(load(&gpu, checkpoint, position)?);
        }
        let workspace = Workspace {
            x: Memory::new("tokens"),
            y: Memory::new("the intermediate"),
            mid: Memory::new("the intermediate"),
            terms: Memory::new("terms"),
            out: Memory::new("the output"),
            tiles: Memory::new("tiles"),
            pairs: Memory::new("pairs"),
            ids: Memory::new("ids"),
            weights: Memory::new("weights"),
            pinned: Pinned::new(),
        };
        let shape = HeapShape { ranks: 1, max_tokens: 0, max_pairs: 0, hidden: 0 };
        let heap = ShmHeap::alone(shape).map_err(LoadError::Device)?;
        let group = Group::new(Arc::new(heap), Duration::MAX);
        let assignments = Assignments::default();
        Ok(Self { name, gpu, kernels, layers, workspace, assignments, group })
    }

    fn position(&self, call: &LayerCall<'_>) -> Result<usize, CallError> {
        let LayerCall { layer, top_k, form, .. } = *call;
        if top_k == 0 || top_k > TOP_K_MAX {
            return Err(CallError::TopK { top_k });
        }
        let served = || self.layers.iter().map(|layer| layer.number).collect();
        let found = self.layers.iter().position(|known| known.number == layer);
        let position = found.ok_or_else(|| CallError::Layer { layer, served: served() })?;
        if form.act == ActFormat::Nvfp4 && !self.layers[position].scaled {
            return Err(CallError::NoInputScale { layer });
        }
        Ok(position)
    }

    /// Runs a call whose ids and weights are good.
    fn compute(&mut self, call: &LayerCall<'_>, position: usize) -> Result<(), CudaError> {
        let Self { gpu, kernels, layers, workspace: w, assignments, .. } = self;
        let layer = &layers[position];
        let LayerShape { hidden, intermediate, swiglu, experts, .. } = layer.shape;
        let (pairs, tiles) = work(assignments, experts, call.top_k);
        let rows = call.tokens as usize * hidden as usize * 2;
        let places = call.tokens as usize * call.top_k as usize;
        call.buffer.read(call.offsets.hidden, gpu.pin(&mut w.pinned, rows)?);
        let quantised = call.form.act == ActFormat::Nvfp4;
        let mid = pairs.len() * intermediate as usize;
        let params = Params {
            fc1: layer.fc1,
            fc2: layer.fc2,
            scalars: layer.scalars[usize::from(quantised)],
            x: gpu.send(&w.pinned, rows, &mut w.x)?,
            y: gpu.grow(&mut w.y, if quantised { mid * 4 } else { 0 })?,
            mid: gpu.grow(&mut w.mid, mid * 2)?,
            terms: gpu.grow(&mut w.terms, places * hidden as usize * 2)?,
            out: gpu.grow(&mut w.out, rows)?,
            tiles: gpu.upload(&tiles, &mut w.tiles)?,
            pairs: gpu.upload(&pairs, &mut w.pairs)?,
            ids: gpu.upload(&assignments.ids, &mut w.ids)?,
            weights: gpu.upload(&assignments.weights, &mut w.weights)?,
            tokens: call.tokens,
            top_k: call.top_k,
            hidden,
            intermediate,
            pair_count: pairs.len() as u32,
            quantised: u32::from(quantised),
            weights_in_combine: u32::from(call.form.weights_in == WeightsIn::Combine),
            g: layer.in13.map_or(1.0, |in13| 1.0 / in13),
            limit: swiglu.limit.unwrap_or(f32::INFINITY),
            alpha: swiglu.alpha,
            beta: swiglu.beta,
            reserved: 0,
        };
        let launch = |what: &'static str, kernel, x: usize, y: usize| {
            let grid = Grid { x, y, threads: THREADS };
            gpu.launch(kernel, grid, &params)
                .map_err(|error| CudaError::Driver { call: what, error })
        };
        if quantised {
            let blocks = rows / 2 / 16;
            let grid = blocks.div_ceil(THREADS as usize);
            launch("quantise_tokens", &kernels.quantise_tokens, grid, 1)?;
        }
        let warps = intermediate as usize / 8;
        launch("gate_up", &kernels.gate_up, warps.div_ceil(WARPS), tiles.len())?;
        if quantised {
            launch("quantise_intermediate", &kernels.quantise_intermediate, 1, tiles.len())?;
        }
        let warps = hidden as usize / units::TILE_ROWS;
        launch("down", &kernels.down, warps.div_ceil(WARPS), tiles.len())?;
        let columns = (hidden as usize).div_ceil(THREADS as usize);
        launch("combine", &kernels.combine, columns, call.tokens as usize)?;
        gpu.fetch(&w.out, rows, &mut w.pinned)?;
        call.buffer.write(call.offsets.output, &*gpu.pin(&mut w.pinned, rows)?);
        Ok(())
    }
}

/// A call's pairs by expert, and their tiles.
fn work(assignments: &Assignments, experts: u32, top_k: u32) -> (Vec<Pair>, Vec<Tile>) {
    let mut by_expert: Vec<Vec<Pair>> = vec![Vec::new(); experts as usize];
    let places = (0..).zip(assignments.ids.iter().zip(&assignments.weights));
    for (place, (&id, &weight)) in places {
        let Ok(expert) = usize::try_from(id) else { continue };
        let token = place / top_k;
        by_expert[expert].push(Pair { token, place, weight, reserved: 0 });
    }
    let mut tiles = Vec::new();
    let mut first = 0;
    for (expert, pairs) in (0..).zip(&by_expert) {
        for chunk in pairs.chunks(TILE_TOKENS) {
            let count = chunk.len() as u32;
            tiles.push(Tile { expert, first, count, reserved: 0 });
            first += count;
        }
    }
    (by_expert.concat(), tiles)
}

/// Finds the driver, the compiler and the GPU. A missing library would panic later.
fn context(gpu: usize) -> Result<(Arc<CudaContext>, String), CudaError> {
    if !launch::driver_is_present() {
        return Err(CudaError::Library { library: "libcuda", provider: "NVIDIA's driver has it" });
    }
    if !launch::compiler_is_present() {
        let (library, provider) = ("libnvrtc", "the CUDA toolkit has it");
        return Err(CudaError::Library { library, provider });
    }
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
fn load(gpu: &Gpu, checkpoint: &Checkpoint, position: usize) -> Result<Layer, LoadError> {
    let layer = checkpoint.layers()[position];
    let shape = layer.shape;
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

    fn run(&mut self, call: &LayerCall<'_>) -> Result<(), CallError> {
        let position = self.position(call)?;
        self.assignments.read(call, self.layers[position].shape.experts)?;
        if call.tokens == 0 {
            return Ok(());
        }
        self.compute(call, position)
            .map_err(|error| CallError::Device { reason: error.to_string() })
    }

    fn join(&mut self) -> Result<bool, CallError> {
        Ok(false)
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

    #[test]
    fn pairs_lie_by_expert_in_tiles_of_eight() {
        let mut assignments = Assignments::default();
        assignments.ids = [vec![2, -1], vec![0, 2], vec![2, 1]].concat();
        assignments.ids.extend([2, -1].repeat(8));
        assignments.weights = (0..22).map(|n| n as f32).collect();
        let (pairs, tiles) = work(&assignments, 3, 2);
        let seen: Vec<_> = tiles.iter().map(|t| (t.expert, t.first, t.count)).collect();
        assert_eq!(seen, [(0, 0, 1), (1, 1, 1), (2, 2, 8), (2, 10, 3)]);
        let third = pairs[3];
        assert_eq!((third.token, third.place, third.weight), (1, 3, 3.0));
        assert_eq!(pairs.len(), 13);
    }
}
