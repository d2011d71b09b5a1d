//! What a worker and the control plane say to each other: JSON text frames of a WebSocket, which the
//! worker dials at [`SESSION_PATH`] with its credential as a bearer token. Unknown members are ignored,
//! so that neighbouring versions understand each other.
//!
//! ```text
//! worker                              control
//!   Register                   ->
//!                              <-     Welcome, or Refused and the end
//!                              <-     Place, if the worker asks for a placement
//!   Holds, once it has loaded  ->
//!   Heartbeat, again and again ->
//!   Window                     ->
//!                              <-     Kept
//!                              <-     Close, at any time; the answer is a Window
//!                              <-     Throttle, Stage, Ready: another placement of a layer
//!   Staging, Holds             ->
//!   Tactics                    ->
//!                              <-     Choose: which tactics calls get
//! ```
//!
//! A worker counts what it serves in windows, and keeps those that control has not kept yet; they are
//! numbered, so that one that comes twice counts once. They end when the clock shows a multiple of
//! their length, so that those of all ranks cover the same time, and when control asks for it.
//!
//! Another placement takes the place of one while calls go on, if all ranks can (`Register::stages`): each stages it, control
//! says `Ready` once all have, and all have it in force after the same call, from when on they say so by `Holds`. Until the
//! first rank is ready another may be staged instead. Every order may come again: it is followed once.
//!
//! A worker that belongs to a group asks what to hold before it loads, and says what it holds in every
//! session afterwards: that, and not what was asked for, is in force. It serves whether or not control is
//! there; without an answer it holds what its group held last, or what its own configuration says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::message::{ActFormat, Phase, ServedLayer, UnservedLayer};
use crate::placement::Placement;
use crate::tactics::{Choice, Tactics};

/// Version of these messages. Since 2, a worker may ask for a placement and
/// says what it holds, and control may say `Close`; since 3, placements may change while calls go on;
/// since 4, control says how fast; since 5, it chooses tactics;
/// since 6, placements say how tokens are split over replicas.
pub const SESSION_VERSION: u32 = 6;

/// The oldest version that control accepts. A worker is told nothing that its
/// version does not know.
pub const SESSION_VERSION_OLDEST: u32 = 1;

/// Path of the session on control's address.
pub const SESSION_PATH: &str = "/api/v1/session";

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromWorker {
    /// First, once.
    Register(Box<Register>),
    /// What the rank holds of every layer that it serves; from then on it is ready.
    Holds {
        /// In the order of the model's layers.
        layers: Vec<LayerPlacement>,
    },
    /// What is on its way to other placements; whole, and again whenever it changes.
    Staging {
        /// Layers of which something is, ascending.
        layers: Vec<LayerStaging>,
        /// The throttle that it keeps to; none of a worker that knows none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_per_second: Option<u64>,
    },
    /// What the worker knows of its tactics; again whenever it changes.
    Tactics(Box<Tactics>),
    /// The worker lives, and how it is.
    Heartbeat(Heartbeat),
    /// The oldest window that control has not kept.
    Window(Window),
}

/// What control says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromControl {
    /// The session stands.
    Welcome {
        /// Control's version.
        version: u32,
        /// Milliseconds between heartbeats.
        heartbeat_ms: u64,
        /// Milliseconds of a window.
        window_ms: u64,
    },
    /// What the worker is to load.
    Place {
        /// In the order of the model's layers; empty if control has none for it.
        layers: Vec<LayerPlacement>,
    },
    /// A window is stored.
    Kept {
        /// Its number.
        number: u64,
    },
    /// The open window ends now, also one that nothing was counted in.
    Close {
        /// What [`Window::closed_by`] of its window is to be.
        mark_ms: u64,
    },
    /// How fast experts are to be derived for other placements, from now on.
    Throttle {
        /// At most; 0 pauses.
        bytes_per_second: u64,
    },
    /// Another placement of a layer is to be staged, in place of any that is.
    Stage {
        /// It; its epoch is later than the one in force.
        placement: LayerPlacement,
    },
    /// All ranks have staged it: it is to be in force after the first call in which all ranks know so.
    Ready {
        /// The layer.
        layer: u32,
        /// What is staged.
        epoch: u64,
    },
    /// Which tactics calls get from now on, in place of all that were chosen.
    Choose {
        /// Of the worker's problems and candidates.
        choices: Vec<Choice>,
    },
    /// It does not; the worker says why in its log and tries again later.
    Refused {
        /// Names the value, and what was expected.
        reason: String,
    },
}

/// Who a worker is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// The worker's [`SESSION_VERSION`].
    pub version: u32,
    /// Name of its group; a worker that is alone is a group of one.
    pub group: String,
    /// Its rank.
    pub rank: u32,
    /// Ranks of the group.
    pub ranks: u32,
    /// When the process started, in milliseconds since 1970: a later process of a rank takes the
    /// place of an earlier one.
    pub incarnation: u64,
    /// Number of the process.
    pub pid: u32,
    /// Name of its host.
    pub host: String,
    /// Path of the socket for engines.
    pub socket: String,
    /// The device, in words.
    pub device: String,
    /// What it serves.
    pub model: ModelInfo,
    /// Slots of the rank in the layer that has most.
    pub slots_per_rank: u32,
    /// Room of the rank in each layer, in slots, in the order of the model's layers.
    #[serde(default)]
    pub layer_slots: Vec<u32>,
    /// Most tokens of a call.
    pub max_tokens: u32,
    /// Whether the worker waits to be told what to load.
    #[serde(default)]
    pub asks: bool,
    /// Whether it can hold another placement while calls go on.
    #[serde(default)]
    pub stages: bool,
}

impl Register {
    /// Whether the worker holds what control commits, now or from its next start on; otherwise its placements are its own.
    #[must_use]
    pub fn is_placed(&self) -> bool {
        // Who has loaded does not ask again.
        self.asks || self.stages
    }
}

/// How far another placement of a layer is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStaging {
    /// The model's number of the layer.
    pub layer: u32,
    /// Its epoch.
    pub epoch: u64,
    /// Experts that the rank lacks still.
    pub left: u64,
    /// Bytes of them, as the rank holds experts.
    #[serde(default)]
    pub bytes_left: u64,
    /// Bytes of all that it lacked when it began.
    #[serde(default)]
    pub bytes: u64,
    /// Whether it is at hand.
    pub staged: bool,
    /// Whether it is to be in force.
    pub ready: bool,
    /// Once it is at hand, every expert that the rank has of the layer, with a digest of what it is in memory. Equal on all
    /// ranks, or somebody has other weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub digests: Vec<(u32, u64)>,
    /// The same experts, with a digest of what each answers to one token that is the same on all ranks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub canaries: Vec<(u32, u64)>,
    /// Why it does not come to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The placement of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlacement {
    /// The model's number of the layer.
    pub layer: u32,
    /// Number under which control has committed it; 0 for one of the worker's own.
    pub epoch: u64,
    /// The expert of every slot of the group.
    pub placement: Placement,
}

/// What a worker serves: the same on all ranks of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Last component of the checkpoint's path.
    pub name: String,
    /// Of shapes, scales, and a sample of every tensor.
    pub digest: String,
    /// Activation formats that engines may attach for.
    pub act: Vec<ActFormat>,
    /// Layers that are served, ascending.
    pub layers: Vec<ServedLayer>,
    /// The model's other layers, ascending.
    pub unserved: Vec<UnservedLayer>,
}

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The rank's engine.
    pub engine: EngineState,
    /// Calls that were answered since the start.
    pub calls: u64,
    /// Calls that were refused or given up since the start.
    pub refused: u64,
    /// The same by the code of their refusal.
    #[serde(default)]
    pub refusals: BTreeMap<String, u64>,
}

/// What a rank's own engine asked for in an interval: load by where it comes from, so that the sum
/// over ranks has each (token, expert) once, whatever replicas there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Number of the window, from 1 on for each process.
    pub number: u64,
    /// Its begin, in milliseconds since 1970.
    pub start_ms: u64,
    /// Its end.
    pub end_ms: u64,
    /// `mark_ms` of the `Close` that ended it; none if it ended by the clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed_by: Option<u64>,
    /// Layers and phases that had calls, ascending.
    pub layers: Vec<LayerWindow>,
}

/// A window's part of one layer and phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerWindow {
    /// The model's number of the layer.
    pub layer: u32,
    /// What the engine was doing.
    pub phase: Phase,
    /// Calls that were answered.
    pub calls: u64,
    /// Rows with at least one expert; masked and padded rows are none.
    pub tokens: u64,
    /// Sum over calls of the different experts that were asked for.
    pub distinct_experts: u64,
    /// For each expert, the rows that went to it.
    pub expert_tokens: Vec<u64>,
    /// Median of the time of a call, in microseconds.
    pub latency_us_p50: u64,
    /// What 99 of 100 calls did not exceed.
    pub latency_us_p99: u64,
}

/// Whether a rank has an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineState {
    /// None.
    #[default]
    Absent,
    /// One that has said that it does not call.
    Idle,
    /// One that calls.
    Attached,
}
