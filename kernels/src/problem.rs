//! What a layer computes, as numbers: shape, activation function, and the form of a call. Shapes
//! are checked here once; the rest of the crate takes them as good.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Largest number of experts a token may go to.
pub const TOP_K_MAX: u32 = 16;

/// What crosses the wire and feeds the matrix products.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ActFormat {
    /// bf16 activations against NVFP4 weights.
    #[default]
    Bf16,
    /// NVFP4 activations against NVFP4 weights; tokens and intermediate are quantised.
    Nvfp4,
}

/// Where a token's top-k weight is multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsIn {
    /// Into the intermediate, in fp32, before it is rounded for FC2.
    #[default]
    Fc1,
    /// Into the bf16 terms of the final sum.
    Combine,
}

/// How calls are computed: a property of the attachment between engine and worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Form {
    /// Format of activations.
    pub act: ActFormat,
    /// Where the top-k weights are applied.
    pub weights_in: WeightsIn,
}

impl Form {
    /// Every form.
    pub const ALL: [Self; 4] = [
        Self { act: ActFormat::Bf16, weights_in: WeightsIn::Fc1 },
        Self { act: ActFormat::Bf16, weights_in: WeightsIn::Combine },
        Self { act: ActFormat::Nvfp4, weights_in: WeightsIn::Fc1 },
        Self { act: ActFormat::Nvfp4, weights_in: WeightsIn::Combine },
    ];
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "act={} weights_in={}", self.act, self.weights_in)
    }
}

/// A word that is not one of a type's names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not one of {expected}")]
pub struct UnknownName {
    value: String,
    expected: &'static str,
}

impl fmt::Display for ActFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bf16 => "bf16",
            Self::Nvfp4 => "nvfp4",
        })
    }
}

impl FromStr for ActFormat {
    type Err = UnknownName;

    fn from_str(value: &str) -> Result<Self, UnknownName> {
        match value {
            "bf16" => Ok(Self::Bf16),
            "nvfp4" => Ok(Self::Nvfp4),
            _ => Err(UnknownName { value: value.to_owned(), expected: "bf16, nvfp4" }),
        }
    }
}

impl fmt::Display for WeightsIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fc1 => "fc1",
            Self::Combine => "combine",
        })
    }
}

impl FromStr for WeightsIn {
    type Err = UnknownName;

    fn from_str(value: &str) -> Result<Self, UnknownName> {
        match value {
            "fc1" => Ok(Self::Fc1),
            "combine" => Ok(Self::Combine),
            _ => Err(UnknownName { value: value.to_owned(), expected: "fc1, combine" }),
        }
    }
}

/// The gated activation between FC1 and FC2: with G and U the products of gate and up,
/// `G = min(G, limit)`, `U = clamp(U, -limit, limit)`, `y = (U + beta) G sigmoid(alpha G)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Swiglu {
    /// The clamp; gate is clamped from above only.
    pub limit: Option<f32>,
    /// Steepness of the sigmoid; 1 for plain SwiGLU.
    pub alpha: f32,
    /// Added to up; 0 for plain SwiGLU.
    pub beta: f32,
}

impl Default for Swiglu {
    fn default() -> Self {
        Self { limit: None, alpha: 1.0, beta: 0.0 }
    }
}

/// Shape and activation of one MoE layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerShape {
    /// Experts.
    pub experts: u32,
    /// Experts of one token by the model's configuration, at most [`TOP_K_MAX`].
    pub top_k: u32,
    /// Width of a token: a positive multiple of 32.
    pub hidden: u32,
    /// Width of an expert's intermediate: a positive multiple of 16.
    pub intermediate: u32,
    /// The activation.
    pub swiglu: Swiglu,
}

/// Why a shape was refused.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ShapeError {
    /// No experts.
    #[error("a layer needs at least one expert, got 0")]
    Experts,
    /// `top_k` outside 1 to [`TOP_K_MAX`], or beyond the number of experts.
    #[error("top_k is {top_k}, expected 1 to {TOP_K_MAX} and at most the {experts} experts")]
    TopK {
        /// The value.
        top_k: u32,
        /// The layer's experts.
        experts: u32,
    },
    /// The hidden width cannot be packed.
    #[error("hidden is {0}, expected a positive multiple of 32")]
    Hidden(u32),
    /// The intermediate width cannot be packed.
    #[error("intermediate is {0}, expected a positive multiple of 16")]
    Intermediate(u32),
    /// A clamp that clamps everything or nothing.
    #[error("swiglu_limit is {0}, expected a positive finite number, or 0 for no clamp")]
    SwigluLimit(f32),
    /// A parameter of the activation that is no number.
    #[error("{field} is {value}, expected a finite number")]
    SwigluParameter {
        /// `swiglu_alpha` or `swiglu_beta`.
        field: &'static str,
        /// Its value.
        value: f32,
    },
}

impl LayerShape {
    /// Checks every rule that the numerics have for shapes.
    ///
    /// # Errors
    /// See [`ShapeError`].
    pub fn check(&self) -> Result<(), ShapeError> {
        let Self { experts, top_k, hidden, intermediate, swiglu } = *self;
        if experts == 0 {
            return Err(ShapeError::Experts);
        }
        if top_k == 0 || top_k > TOP_K_MAX || top_k > experts {
            return Err(ShapeError::TopK { top_k, experts });
        }
        if hidden == 0 || !hidden.is_multiple_of(32) {
            return Err(ShapeError::Hidden(hidden));
        }
        if intermediate == 0 || !intermediate.is_multiple_of(16) {
            return Err(ShapeError::Intermediate(intermediate));
        }
        if let Some(limit) = swiglu.limit.filter(|limit| !(limit.is_finite() && *limit > 0.0)) {
            return Err(ShapeError::SwigluLimit(limit));
        }
        for (field, value) in [("swiglu_alpha", swiglu.alpha), ("swiglu_beta", swiglu.beta)] {
            if !value.is_finite() {
                return Err(ShapeError::SwigluParameter { field, value });
            }
        }
        Ok(())
    }
}
