//! What workers and control say of tactics: what is to be run, what was measured, and what was chosen.

use serde::{Deserialize, Serialize};

use crate::message::ActFormat;

/// What measurements hold for: another device, driver or kernel may be faster or slower.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Provenance {
    /// The device as it names itself.
    pub device: String,
    /// What runs it: the GPU's driver, or the processor.
    pub driver: String,
    /// Hash of the kernels' source.
    pub kernels: String,
}

/// A layer on a device, as far as its speed goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Experts of the layer.
    pub experts: u32,
    /// Experts of a token.
    pub top_k: u32,
    /// Width of a token.
    pub hidden: u32,
    /// Width of an expert's intermediate.
    pub intermediate: u32,
    /// Ranks of the group.
    pub ranks: u32,
    /// Slots of each rank.
    pub slots_per_rank: u32,
    /// Format of the activations.
    pub act: ActFormat,
}

/// Calls of one size by one tactic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The layer.
    pub problem: Problem,
    /// The tactic's name.
    pub tactic: String,
    /// Tokens of a call.
    pub tokens: u32,
    /// Calls that were timed.
    pub runs: u32,
    /// Median, in microseconds.
    pub median_us: f32,
    /// What 99 of 100 calls did not exceed, in microseconds.
    pub p99_us: f32,
    /// When, in milliseconds since 1970.
    pub measured_ms: u64,
}

/// The tactic of calls of a size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The layer.
    pub problem: Problem,
    /// Most tokens of the calls.
    pub tokens: u32,
    /// The tactic's name.
    pub tactic: String,
}

/// What a worker knows of its tactics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tactics {
    /// What its measurements hold for.
    pub provenance: Provenance,
    /// Its layers, each once.
    pub problems: Vec<Problem>,
    /// Tactics that can run all of them; the first leaves the choice to the device.
    pub candidates: Vec<String>,
    /// What was measured here, as far as the worker knows.
    pub measurements: Vec<Measurement>,
    /// What calls get; whatever is not here is left to the device.
    pub chosen: Vec<Choice>,
}
