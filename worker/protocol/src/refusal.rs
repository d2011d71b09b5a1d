//! Why a worker refuses a frame: a closed list, each with its values, for programs as JSON with a
//! stable `code`, for people as a sentence.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

/// A refused frame. Unless it says otherwise, the connection lives, nothing was written to the
/// output, and the next frame is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr, thiserror::Error)]
#[serde(tag = "code", rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Refusal {
    /// Not this protocol; the worker closes the connection.
    #[error("a frame begins with {got:?}, expected \"moep\"")]
    Magic {
        /// The first bytes.
        got: String,
    },
    /// Another version.
    #[error("a frame has version {got}, expected {expected}")]
    Version {
        /// The frame's.
        got: u16,
        /// The worker's.
        expected: u16,
    },
    /// A kind that the version does not have, or that engines do not send.
    #[error("a frame has kind {got}, which engines do not send")]
    FrameKind {
        /// Its code.
        got: u16,
    },
    /// A body that is too long.
    #[error("a frame announces {got} bytes, expected at most {max}")]
    FrameLength {
        /// Bytes announced.
        got: u32,
        /// Most that are taken.
        max: u32,
    },
    /// A body that its kind does not have.
    #[error("the body of a {kind} frame is malformed: {reason}")]
    Body {
        /// The frame.
        kind: String,
        /// What is wrong.
        reason: String,
    },
    /// A frame at the wrong time.
    #[error("a {got} frame came, expected {expected}")]
    Order {
        /// The frame.
        got: String,
        /// What may come now.
        expected: String,
    },
    /// A call out of sequence.
    #[error("a call has sequence number {got}, expected {expected}")]
    Sequence {
        /// The frame's.
        got: u64,
        /// The next one.
        expected: u64,
    },
    /// What was asked for is in use: a call that came before the one before it was answered, a rank
    /// of a group that has its engine, as many connections as there can be (which closes this one).
    #[error("busy with {with}")]
    Busy {
        /// What is in the way.
        with: String,
    },
    /// More tokens than the worker or the attachment takes.
    #[error("{tokens} tokens, expected {min} to {max}")]
    Tokens {
        /// Tokens asked for.
        tokens: u32,
        /// Fewest.
        min: u32,
        /// Most.
        max: u32,
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
    /// An expert whose replicas are all on ranks that were lost; calls that do not need it are answered.
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
    /// The device failed; further calls may fail, too, until the worker is restarted.
    #[error("the device failed: {reason}")]
    Device {
        /// What failed, and how.
        reason: String,
    },
    /// The ranks of the group called different things; none was answered.
    #[error("{reason}")]
    Mismatch {
        /// Names two ranks and what they call.
        reason: String,
    },
    /// The group gave the call up. Other ranks may have its answer already: the engines repeat the
    /// step together.
    #[error("{reason}")]
    Group {
        /// The generation that began.
        generation: u32,
        /// The rank that it is about.
        rank: u32,
        /// What was awaited of it: `announce` or `compute`.
        phase: String,
        /// The layer that was called; 65535 where nobody knew.
        layer: u32,
        /// All of it in words.
        reason: String,
    },
    /// k outside of what a call may have.
    #[error("top_k is {top_k}, expected 1 to {max}")]
    TopK {
        /// The value.
        top_k: u32,
        /// Most.
        max: u32,
    },
    /// A layer that is not served.
    #[error("layer {layer} is not served{}, expected one of {served:?}", because(reason.as_ref()))]
    Layer {
        /// The layer.
        layer: u32,
        /// Why, where the model has the layer.
        reason: Option<String>,
        /// Those that are.
        served: Vec<u32>,
    },
    /// An expert id that is neither -1 nor an expert of the layer.
    #[error("expert id {id} of token {token} at place {place}, expected -1 or 0 to {last}")]
    ExpertId {
        /// Row.
        token: u32,
        /// Place among its experts.
        place: u32,
        /// The id.
        id: i32,
        /// Largest there is.
        last: u32,
    },
    /// One expert twice in a row.
    #[error("token {token} has expert {id} at places {first} and {second}, expected it once")]
    DuplicateExpert {
        /// Row.
        token: u32,
        /// The expert.
        id: i32,
        /// Earlier place.
        first: u32,
        /// Later place.
        second: u32,
    },
    /// A weight that is no number.
    #[error("weight of token {token} at place {place} is {weight}, expected a finite number")]
    Weight {
        /// Row.
        token: u32,
        /// Place among its experts.
        place: u32,
        /// The weight, as text: JSON has no NaN.
        weight: String,
    },
    /// `act=nvfp4` on a checkpoint whose experts lack scales of activations.
    #[error("{reason}")]
    NoInputScale {
        /// Names every absent tensor.
        reason: String,
    },
    /// Memory that the system refused the worker.
    #[error("{reason}")]
    Memory {
        /// How much, for what, and why not.
        reason: String,
    },
}

fn because(reason: Option<&String>) -> String {
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}
