//! A layer of made-up weights on the GPU, to be timed: everything of a call but the copies from and
//! to the host.
//!
//! *Burst*: the GPU idle for a while, its cache full of clean lines, one call between two events; the
//! median of several. *Sustained*: calls back to back for a while; the mean. A layer draws the card's
//! whole power, so the two differ.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use cudarc::driver::CudaFunction;
use rustix::time::{ClockId, clock_gettime};

use super::launch::{Gpu, Grid, Memory};
use super::params::{Params, Scalars};
use super::{CudaError, CudaOptions, Kernels, Layer, Workspace, compile, context, source, units};
use crate::problem::{Form, LayerShape};

const BURSTS: usize = 9;
const HOST_CALLS: u32 = 200;
const IDLE: Duration = Duration::from_millis(400);
const SUSTAINED_US: f64 = 1.5e6;
/// More than the cache holds.
const CLEAN_BYTES: usize = 256 << 20;

/// Times of a call, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Median of single calls.
    pub burst_us: f64,
    /// Mean of calls back to back.
    pub sustained_us: f64,
    /// Processor time that starting a call takes the host; mean.
    pub host_us: f64,
}

/// A layer on a GPU.
#[derive(Debug)]
pub struct CudaBench {
    gpu: Gpu,
    kernels: Kernels,
    layer: Layer,
    workspace: Workspace,
    clean: Memory<u8>,
    read_memory: CudaFunction,
}

impl CudaBench {
    /// Makes a layer; all experts have the same random weights, each its own copy.
    ///
    /// # Errors
    /// As for a device.
    pub fn new(options: &CudaOptions, shape: LayerShape) -> Result<Self, CudaError> {
        let (context, _) = context(options.gpu)?;
        let cubin = compile::cubin(&source::program(), &source::options(options), &options.cache)?;
        let gpu = Gpu::new(context, cubin)?;
        let kernels = Kernels::new(&gpu, options.tactic)?;
        let [mut fc1_memory, mut fc2_memory] = [Memory::new("weights"), Memory::new("weights")];
        let [fc1_bytes, fc2_bytes] = units::expert_bytes(&shape);
        let fc1 = weights(&gpu, &shape, fc1_bytes, &mut fc1_memory)?;
        let fc2 = weights(&gpu, &shape, fc2_bytes, &mut fc2_memory)?;
        let unscale = 1e-4 * 2_f32.powi(units::UNSCALE_EXPONENT);
        let scalars =
            Scalars { gate_alpha: unscale, up_alpha: unscale, fc2_alpha: unscale, norm_const: 1.0 };
        let mut memory = Memory::new("scalars");
        let address = gpu.upload(&vec![scalars; shape.experts as usize], &mut memory)?;
        let layer = Layer {
            number: 0,
            shape,
            in13: Some(1.0),
            scaled: true,
            fc1,
            fc2,
            scalars: [address; 2],
            lag: kernels.lag(&shape),
            _memory: (fc1_memory, fc2_memory, [memory, Memory::new("none")]),
        };
        let mut clean = Memory::new("what fills the cache");
        gpu.upload(&vec![0; CLEAN_BYTES], &mut clean)?;
        let read_memory = gpu.kernel("read_memory")?;
        let workspace = Workspace::new(&gpu, options.deadline)?;
        Ok(Self { gpu, kernels, layer, workspace, clean, read_memory })
    }

    /// Times calls with these expert ids, `[tokens, top_k]`.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn time(&mut self, ids: &[i32], top_k: u32, form: Form) -> Result<Timing, CudaError> {
        let Self { gpu, kernels, layer, workspace, .. } = self;
        let tokens = ids.len() as u32 / top_k;
        let tactic = kernels.tactic(&layer.shape, ids.len(), None);
        let params = workspace.params(gpu, (layer, tactic), form, (tokens, top_k))?;
        let rows = tokens as usize * layer.shape.hidden as usize;
        // bf16 near 1, without two alike: power depends on the bits.
        let x: Vec<u8> = (0..rows as u32)
            .flat_map(|n| (0x3f00 | (n * 7) as u16 & 0x80ff).to_le_bytes())
            .collect();
        gpu.upload(&x, &mut workspace.x)?;
        gpu.upload(ids, &mut workspace.ids)?;
        gpu.upload(&vec![1.0 / top_k as f32; ids.len()], &mut workspace.weights)?;
        let numbers = Cell::new(params.call);
        let timed = |params: &Params, calls: usize| {
            // Each launch has a number of its own.
            let first = numbers.get();
            numbers.set(first + calls as u32);
            let mut launch =
                |n: u32| kernels.launch(gpu, tactic, &Params { call: first + n, ..*params });
            gpu.time(|| (0..calls as u32).try_for_each(&mut launch))
        };
        let failed = |error| CudaError::Driver { call: "a timed call", error };
        timed(&params, 2).map_err(failed)?;
        let clean = Params {
            x: gpu.address(&self.clean),
            tokens: (CLEAN_BYTES / 16) as u32,
            ..Params::default()
        };
        let mut bursts = Vec::new();
        for _ in 0..BURSTS {
            gpu.wait().map_err(failed)?;
            thread::sleep(IDLE);
            let blocks = kernels.multiprocessors * 8;
            let grid = Grid { blocks, threads: 512, shared: 0, resident: false };
            gpu.launch(&self.read_memory, grid, &clean).map_err(failed)?;
            gpu.wait().map_err(failed)?;
            bursts.push(timed(&params, 1).map_err(failed)?);
        }
        bursts.sort_by(f64::total_cmp);
        let burst_us = bursts[BURSTS / 2];
        let calls = (SUSTAINED_US / burst_us).ceil() as usize;
        let sustained_us = timed(&params, calls).map_err(failed)? / calls as f64;
        let mut host_us = 0.0;
        for n in 0..HOST_CALLS {
            let began = processor_us();
            let call = numbers.get() + n;
            kernels.launch(gpu, tactic, &Params { call, ..params }).map_err(failed)?;
            host_us += processor_us() - began;
            // Not while the queue is full: the host would wait.
            gpu.wait().map_err(failed)?;
        }
        workspace.calls = numbers.get() + HOST_CALLS;
        Ok(Timing { burst_us, sustained_us, host_us: host_us / f64::from(HOST_CALLS) })
    }
}

/// What this thread has used of its processor.
fn processor_us() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

/// Weights of every expert: random bytes of one, repeated. Any bytes are codes and scales.
fn weights(
    gpu: &Gpu,
    shape: &LayerShape,
    bytes: usize,
    all: &mut Memory<u8>,
) -> Result<u64, CudaError> {
    let mut state = 1_u64;
    let random = (0..bytes / 8).flat_map(|_| {
        // SplitMix64.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (z ^ z >> 27).to_le_bytes()
    });
    let mut one = Memory::new("an expert");
    gpu.upload(&random.collect::<Vec<u8>>(), &mut one)?;
    gpu.grow(all, bytes * shape.experts as usize)?;
    gpu.repeat(&one, bytes, all)?;
    Ok(gpu.address(all))
}
