//! What every device that serves a rank offers: layers to load, calls to run. What a call computes,
//! step by step:
//!
//! A call is collective over the ranks of a group (`group`); a rank that is alone is a group of one.
//!
//! ```text
//! dispatch   check ids and weights; act=nvfp4: quantise each token once, g = 1 / in13
//! FC1        G = fc1_alpha x sum(x w_gate), U = fc1_alpha x sum(x w_up), fp32, an alpha each
//! activate   problem::Swiglu, fp32; weights_in=fc1: times the token's weight
//!            act=bf16: round to bf16; act=nvfp4: quantise along i, g = 1 / in2[e]
//! FC2        z = bf16(fc2_alpha x sum(y w_down)), one term for each (token, k)
//! combine    bf16(sum over k in order, fp32, of z_k); weights_in=combine: of z_k x weight_k
//! ```
//!
//! The order of accumulation depends on shape and tactic only: the bits of a token's output do not
//! depend on what shares its batch.

use std::io;

use crate::checkpoint::CheckpointError;
use crate::cpu::CpuDevice;
use crate::cpu::Why;
use crate::cuda::CudaError;
use crate::group::{Group, GroupError, Mismatch};
use crate::memory::SharedMemory;
use crate::problem::{ActFormat, Form, TOP_K_MAX};
use crate::route::RouteTable;
use crate::tactics::{Choice, Problem, Provenance};

/// Where the tensors of a call lie in a buffer that engine and device share, in bytes from its
/// start: hidden states bf16 `[T, h]`, expert ids i32 `[T, k]`, their weights f32 `[T, k]`, and the
/// output bf16 `[T, h]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallOffsets {
    /// Hidden states.
    pub hidden: u64,
    /// Expert ids; -1 is no expert.
    pub topk_ids: u64,
    /// Weights.
    pub topk_weights: u64,
    /// Output.
    pub output: u64,
}

/// What a rank holds of one layer, and where the whole group's experts are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSlots {
    /// Number of the committed placement.
    pub epoch: u64,
    /// The expert of each of this rank's slots.
    pub experts: Vec<Option<u32>>,
    /// Expert to slots, over the group.
    pub route: RouteTable,
}

impl LayerSlots {
    /// Every expert on a rank that is alone.
    #[must_use]
    pub fn whole(experts: u32) -> Self {
        let route = RouteTable::identity(experts);
        Self { epoch: 0, experts: (0..experts).map(Some).collect(), route }
    }
}

/// One call of one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerCall<'a> {
    /// The model's number of the layer.
    pub layer: u32,
    /// Rows (T); 0 is an ordinary call.
    pub tokens: u32,
    /// Experts of a token (k), 1 to [`TOP_K_MAX`].
    pub top_k: u32,
    /// How it is computed.
    pub form: Form,
    /// Where input is read and output is written.
    pub buffer: &'a SharedMemory,
    /// Where in it.
    pub offsets: CallOffsets,
}

/// A call that cannot be answered; nothing was written to its output.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CallError {
    /// A layer that the device does not have.
    #[error("layer {layer} is not served, expected one of {served:?}")]
    Layer {
        /// The layer asked for.
        layer: u32,
        /// Those that are served.
        served: Vec<u32>,
    },
    /// k outside of what a device takes.
    #[error("top_k is {top_k}, expected 1 to {TOP_K_MAX}")]
    TopK {
        /// The value.
        top_k: u32,
    },
    /// An expert id that is neither -1 nor an expert of the layer.
    #[error("expert id {id} of token {token} at place {place}, expected -1 or 0 to {last}")]
    ExpertId {
        /// Row.
        token: u32,
        /// Place among the row's experts.
        place: u32,
        /// The id.
        id: i32,
        /// Largest id there is.
        last: u32,
    },
    /// One expert twice in a row: its two terms would be one expert's vote counted twice.
    #[error("token {token} has expert {id} at places {first} and {second}, expected it once")]
    DuplicateExpert {
        /// Row.
        token: u32,
        /// The id.
        id: i32,
        /// Earlier place.
        first: u32,
        /// Later place.
        second: u32,
    },
    /// A weight that is no number, at a place that has an expert.
    #[error("weight of token {token} at place {place} is {weight}, expected a finite number")]
    Weight {
        /// Row.
        token: u32,
        /// Place among the row's experts.
        place: u32,
        /// The weight.
        weight: f32,
    },
    /// More (token, expert) pairs than the group's heap has room for.
    #[error("{tokens} tokens with top_k {top_k}, expected at most {max} pairs of token and expert")]
    Pairs {
        /// Rows.
        tokens: u32,
        /// Experts of a token.
        top_k: u32,
        /// Pairs there is room for.
        max: u32,
    },
    /// An expert whose replicas are all on ranks that were lost.
    #[error(
        "expert {expert} of layer {layer} has no live replica: ranks {lost:?} of the group are lost"
    )]
    Unavailable {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// Ranks that are lost.
        lost: Vec<u32>,
    },
    /// The device failed; what it says.
    #[error("the device failed: {reason}")]
    Device {
        /// The call that failed, and how.
        reason: String,
    },
    /// The ranks of the group called different things; none was answered.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The group gave the call up.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// `act=nvfp4` on a layer whose checkpoint has no scales of activations.
    #[error("layer {layer} has experts without input_scale, expected act=bf16")]
    NoInputScale {
        /// The layer.
        layer: u32,
    },
}

/// What of a call can be refused before its ids are looked at; `layers` are the device's, each with its
/// number and whether it has the scales that `act=nvfp4` needs. The position of the call's layer.
pub(crate) fn check_call(
    call: &LayerCall<'_>,
    layers: impl Iterator<Item = (u32, bool)> + Clone,
) -> Result<usize, CallError> {
    let LayerCall { layer, top_k, form, .. } = *call;
    if top_k == 0 || top_k > TOP_K_MAX {
        return Err(CallError::TopK { top_k });
    }
    let found = layers.clone().enumerate().find(|(_, (number, _))| *number == layer);
    let Some((position, (_, scaled))) = found else {
        return Err(CallError::Layer { layer, served: layers.map(|(number, _)| number).collect() });
    };
    if form.act == ActFormat::Nvfp4 && !scaled {
        return Err(CallError::NoInputScale { layer });
    }
    Ok(position)
}

/// A device that cannot be made, or that cannot take a layer.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Memory that the system refused.
    #[error("{bytes} bytes for {what} were refused")]
    Memory {
        /// What they are for.
        what: &'static str,
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Threads that the system refused.
    #[error("{threads} threads cannot be started (0 is one for each core)")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
    /// A GPU that cannot be used.
    #[error(transparent)]
    Cuda(CudaError),
    /// A tactic that cannot run a layer here.
    #[error("tactic {tactic} cannot run")]
    Tactic {
        /// Its name.
        tactic: String,
        /// Why.
        #[source]
        why: Why,
    },
}

/// A layer that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its experts are refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device refuses it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A name that none of a device's tactics has, or one that cannot run a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no tactic {name} that runs here, expected one of {known:?}")]
pub struct NoSuchTactic {
    /// The name.
    pub name: String,
    /// Those that there are.
    pub known: Vec<String>,
}

/// A rank's device.
pub trait Device: Send {
    /// The device in words, for logs.
    fn describe(&self) -> String;

    /// What measurements of its tactics hold for.
    fn provenance(&self) -> Provenance;

    /// Names of the tactics that can run all of its layers; the first is [`BY_TOKENS`](crate::tactics::BY_TOKENS).
    fn tactics(&self) -> Vec<String>;

    /// What the layer at `position` is, in a format.
    fn problem(&self, position: usize, act: ActFormat) -> Option<Problem>;

    /// From now on calls get the tactics of their buckets, unless the device was made for one; choices of other problems are
    /// passed over.
    ///
    /// # Errors
    /// [`NoSuchTactic`]; everything stays as it was.
    fn choose(&mut self, choices: &[Choice]) -> Result<(), NoSuchTactic>;

    /// The device as one that can hold another placement while calls go on; none if it cannot.
    fn placed(&mut self) -> Option<&mut CpuDevice> {
        None
    }

    /// Runs one call: reads ids, weights and hidden states from its buffer, writes the output.
    ///
    /// In a group every rank takes part in every call. An error of the engine's input comes before this
    /// rank has: whoever gets it calls [`Self::join`].
    ///
    /// The engine must not touch the buffer meanwhile; if it does, its own output is garbage and
    /// nothing else.
    ///
    /// # Errors
    /// See [`CallError`]; the device serves on.
    fn run(&mut self, call: &LayerCall<'_>) -> Result<(), CallError>;

    /// Expert ids of the last call that was run, `[tokens, top_k]`, -1 for no expert.
    fn assigned(&self) -> &[i32];

    /// Takes part without tokens in the group's next call: announces that at once, and waits for the
    /// others. `asked` is the layer that this rank's engine called for, if its call was refused.
    ///
    /// # Errors
    /// [`CallError::Mismatch`], [`CallError::Group`].
    fn join(&mut self, asked: Option<u32>) -> Result<(), CallError>;

    /// The group that the device's rank belongs to.
    fn group(&mut self) -> &mut Group;
}
