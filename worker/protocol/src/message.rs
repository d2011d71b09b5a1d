//! Bodies of frames, and the words in them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::buffer::BufferLayout;
use crate::refusal::Refusal;

/// What crosses the wire and feeds the matrix products.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ActFormat {
    /// bf16 activations.
    #[default]
    Bf16,
    /// NVFP4 activations.
    Nvfp4,
}

/// Where a token's top-k weight is multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsIn {
    /// Into the intermediate.
    #[default]
    Fc1,
    /// Into the final sum.
    Combine,
}

/// What part of its work an engine calls for; load is counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum Phase {
    /// Prompts.
    Prefill = 0,
    /// Generation.
    #[default]
    Decode = 1,
}

/// A word that is not one of a type's names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not one of {expected}")]
pub struct UnknownName {
    value: String,
    expected: &'static str,
}

/// The names of an enum's values, for people and for command lines.
macro_rules! names {
    ($type:ident, $expected:literal, $($name:literal => $value:ident),*) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$value => $name),* })
            }
        }

        impl FromStr for $type {
            type Err = UnknownName;

            fn from_str(value: &str) -> Result<Self, UnknownName> {
                match value {
                    $($name => Ok(Self::$value),)*
                    _ => Err(UnknownName { value: value.to_owned(), expected: $expected }),
                }
            }
        }
    };
}
names!(ActFormat, "bf16, nvfp4", "bf16" => Bf16, "nvfp4" => Nvfp4);
names!(WeightsIn, "fc1, combine", "fc1" => Fc1, "combine" => Combine);
names!(Phase, "prefill, decode", "prefill" => Prefill, "decode" => Decode);

/// An engine's first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Who it is, for the worker's log.
    pub client: String,
    /// What it can do beyond the version; a worker ignores what it does not know.
    #[serde(default)]
    pub features: Vec<String>,
}

/// A worker's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The worker's program and version.
    pub worker: String,
    /// The model's name.
    pub model: String,
    /// The device, in words.
    pub device: String,
    /// Most tokens that an engine may attach for.
    pub max_tokens: u32,
    /// This rank.
    pub rank: u32,
    /// Ranks of the group: every call is made by the engines of all of them together.
    pub ranks: u32,
    /// Of the engine's features those that are in force.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Asks for a buffer. How calls are computed is a property of the attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Format of activations.
    #[serde(default)]
    pub act: ActFormat,
    /// Where the top-k weights are applied.
    #[serde(default)]
    pub weights_in: WeightsIn,
    /// Most tokens of a call.
    pub max_tokens: u32,
}

/// A layer that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedLayer {
    /// The model's number of the layer.
    pub number: u32,
    /// Experts.
    pub experts: u32,
    /// Experts of a token, by the model's configuration.
    pub top_k: u32,
    /// Width of a token.
    pub hidden: u32,
    /// Width of an expert's intermediate.
    pub intermediate: u32,
}

/// A layer that is left to the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnservedLayer {
    /// The model's number of the layer.
    pub number: u32,
    /// Why, in words.
    pub reason: String,
}

/// A worker's answer to [`Attach`]; the frame carries the buffer's descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Where tensors lie in the buffer.
    pub layout: BufferLayout,
    /// The layers that may be called, ascending.
    pub layers: Vec<ServedLayer>,
    /// The model's other layers, ascending.
    #[serde(default)]
    pub unserved: Vec<UnservedLayer>,
}

/// Runs one layer on what is in the buffer: hidden states bf16 `[tokens, hidden]`, ids i32 and
/// weights f32 `[tokens, top_k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The model's number of the layer.
    pub layer: u32,
    /// Rows.
    pub tokens: u32,
    /// Experts of a token.
    pub top_k: u32,
    /// What the engine is doing.
    pub phase: Phase,
}

impl Call {
    /// Bytes of a body.
    pub const BYTES: usize = 16;

    /// The body: four words, little endian.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let words = [self.layer, self.tokens, self.top_k, self.phase as u32];
        let mut bytes = [0; Self::BYTES];
        for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        bytes
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`Refusal::Body`] for another length or an unknown phase.
    pub fn decode(body: &[u8]) -> Result<Self, Refusal> {
        let malformed = |reason| Refusal::Body { kind: "call".to_owned(), reason };
        let Ok(body) = <&[u8; Self::BYTES]>::try_from(body) else {
            let reason = format!("{} bytes, expected {}", body.len(), Self::BYTES);
            return Err(malformed(reason));
        };
        let word = |n: usize| u32::from_le_bytes(body.as_chunks::<4>().0[n]);
        let phase = match word(3) {
            0 => Phase::Prefill,
            1 => Phase::Decode,
            code => return Err(malformed(format!("phase {code}, expected 0 or 1"))),
        };
        Ok(Self { layer: word(0), tokens: word(1), top_k: word(2), phase })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_its_bytes() {
        for phase in [Phase::Prefill, Phase::Decode] {
            let call = Call { layer: 3, tokens: 70_000, top_k: 16, phase };
            assert_eq!(Call::decode(&call.encode()), Ok(call));
        }
        let bytes = Call { layer: 1, tokens: 2, top_k: 3, phase: Phase::Decode }.encode();
        assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        assert!(Call::decode(&bytes[..15]).is_err());
        assert!(Call::decode(&[9; 16]).is_err());
    }

    #[test]
    fn words_are_the_same_on_the_wire_and_on_command_lines() {
        for act in [ActFormat::Bf16, ActFormat::Nvfp4] {
            assert_eq!(serde_json::to_string(&act).unwrap(), format!("\"{act}\""));
            assert_eq!(act.to_string().parse(), Ok(act));
        }
        for place in [WeightsIn::Fc1, WeightsIn::Combine] {
            assert_eq!(serde_json::to_string(&place).unwrap(), format!("\"{place}\""));
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        let error = "fp8".parse::<ActFormat>().unwrap_err();
        assert_eq!(error.to_string(), "\"fp8\" is not one of bf16, nvfp4");
    }
}
