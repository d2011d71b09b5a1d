//! What a launch gets, the twin of `kernels/cuda/layout/params.cuh`.

use std::mem::offset_of;

/// Pairs of one expert that stream its weights together.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Job {
    pub(super) expert: u32,
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) reserved: u32,
}

/// One (token, expert) pair.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Pair {
    pub(super) token: u32,
    pub(super) place: u32,
    pub(super) weight: f32,
    pub(super) reserved: u32,
}

/// fp32 products of one expert's scales.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Scalars {
    pub(super) gate_alpha: f32,
    pub(super) up_alpha: f32,
    pub(super) fc2_alpha: f32,
    pub(super) norm_const: f32,
}

/// Addresses of the device's memory, and numbers.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Params {
    pub(super) fc1: u64,
    pub(super) fc2: u64,
    pub(super) scalars: u64,
    pub(super) x: u64,
    pub(super) mid: u64,
    pub(super) terms: u64,
    pub(super) out: u64,
    pub(super) jobs: u64,
    pub(super) counters: u64,
    pub(super) control: u64,
    pub(super) pairs: u64,
    pub(super) pool: u64,
    pub(super) tiles: u64,
    pub(super) spots: u64,
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) status: u64,
    pub(super) deadline_ns: u64,
    pub(super) tokens: u32,
    pub(super) top_k: u32,
    pub(super) hidden: u32,
    pub(super) intermediate: u32,
    pub(super) experts: u32,
    pub(super) quantised: u32,
    pub(super) weights_in_combine: u32,
    pub(super) g: f32,
    pub(super) limit: f32,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    pub(super) lag: u32,
    pub(super) call: u32,
    pub(super) tile_tokens: u32,
}

// C++ lays these out without padding, in the same order.
const _: () = assert!(size_of::<Job>() == 16 && size_of::<Pair>() == 16);
const _: () = assert!(size_of::<Scalars>() == 16 && size_of::<Params>() == 18 * 8 + 14 * 4);
const _: () = assert!(offset_of!(Params, tokens) == 144 && offset_of!(Params, beta) == 184);
