//! Which experts a token goes to, and with what weights: top-k of a router's logits, by the seven
//! methods that public models use, under the names that TensorRT-LLM and FlashInfer gave them.
//! In fp32; of equal scores the lower expert wins; a token's experts are ordered by falling score of
//! selection.
//!
//! With `s = sigmoid(logits)` and `p = softmax(logits)` over all experts:
//!
//! | method | selected by | weight |
//! |---|---|---|
//! | `Default` | p | p |
//! | `Renormalize` | logits | softmax over the selected logits |
//! | `RenormalizeNaive` | p | p / sum of the selected p |
//! | `Llama4Renormalize` | logits | s |
//! | `DeepSeekV3` | s + bias within the best groups | scale x s / (sum of the selected s + 1e-20) |
//! | `MiniMaxM2` | s + bias | s / (sum of the selected s + 1e-20) |
//! | `SigmoidRenorm` | s | s / sum of the selected s |
//!
//! A crate of its own because both the devices' side (`kernels`) and the engines' side (`protocol`)
//! offer it, and an engine's client must not bring devices along. It knows nothing of ranks and
//! replicas: which replica serves an expert is `kernels::route`.
//!
//! ```
//! use routing::{Method, Router};
//!
//! let router = Router::new(Method::Renormalize, 4, 2)?;
//! let (mut ids, mut weights) = ([0; 2], [0.0; 2]);
//! router.route(&[0.0, 2.0, -1.0, 1.0], &mut ids, &mut weights)?;
//! assert_eq!(ids, [1, 3]);
//! assert!((weights[0] - 0.731).abs() < 1e-3);
//! # Ok::<(), routing::RoutingError>(())
//! ```
#![warn(missing_docs)]
#![expect(
    clippy::cast_sign_loss,
    reason = "ids of experts are i32 on the wire and positions here; both fit, see Router::new"
)]

use std::fmt;

/// Added to the sum that weights are divided by, as DeepSeek-V3's and MiniMax-M2's own gates do.
const SUM_FLOOR: f32 = 1e-20;

/// How logits become experts and weights; the table is at the top of the crate.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Softmax over all experts, then top-k: weights do not sum to 1.
    Default,
    /// Top-k, then softmax over those.
    Renormalize,
    /// Softmax over all experts, top-k, then divided by their sum.
    RenormalizeNaive,
    /// Top-k, then the sigmoid of each.
    Llama4Renormalize,
    /// Sigmoids with a bias choose groups, then experts of those; the bias does not weigh.
    DeepSeekV3 {
        /// `e_score_correction_bias`, one for each expert.
        bias: Vec<f32>,
        /// Equal groups of neighbouring experts.
        n_group: u32,
        /// How many of them a token's experts come from: those with the largest sum of their two
        /// largest biased scores.
        topk_group: u32,
        /// `routed_scaling_factor`: a factor of all weights, applied here and nowhere else.
        scale: f32,
    },
    /// Sigmoids with a bias choose experts; the bias does not weigh.
    MiniMaxM2 {
        /// `e_score_correction_bias`, one for each expert.
        bias: Vec<f32>,
    },
    /// Sigmoid, top-k, then divided by their sum.
    SigmoidRenorm,
}

impl Method {
    /// The method's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "Default",
            Self::Renormalize => "Renormalize",
            Self::RenormalizeNaive => "RenormalizeNaive",
            Self::Llama4Renormalize => "Llama4Renormalize",
            Self::DeepSeekV3 { .. } => "DeepSeekV3",
            Self::MiniMaxM2 { .. } => "MiniMaxM2",
            Self::SigmoidRenorm => "SigmoidRenorm",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Parameters that do not fit together, or logits that have no answer.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum RoutingError {
    /// No experts, or more than ids can name.
    #[error("{experts} experts, expected 1 to {}", i32::MAX)]
    Experts {
        /// The value.
        experts: u32,
    },
    /// k outside of what there is to choose from.
    #[error("top_k is {top_k}, expected 1 to {experts}, the number of experts")]
    TopK {
        /// The value.
        top_k: u32,
        /// Experts of the layer.
        experts: u32,
    },
    /// Groups that do not divide the experts.
    #[error("n_group is {n_group}, expected a divisor of {experts}, the number of experts")]
    Groups {
        /// The value.
        n_group: u32,
        /// Experts of the layer.
        experts: u32,
    },
    /// No groups kept, or more than there are.
    #[error("topk_group is {topk_group}, expected 1 to {n_group}, the number of groups")]
    KeptGroups {
        /// The value.
        topk_group: u32,
        /// Groups of the layer.
        n_group: u32,
    },
    /// Fewer experts in the kept groups than a token needs.
    #[error(
        "topk_group {topk_group} of {n_group} groups keeps {kept} experts, expected at least \
         top_k {top_k}"
    )]
    TooFewKept {
        /// Groups kept.
        topk_group: u32,
        /// Groups.
        n_group: u32,
        /// Experts in the groups kept.
        kept: u32,
        /// Experts of a token.
        top_k: u32,
    },
    /// A factor of weights that is no number.
    #[error("scale is {scale}, expected a finite number")]
    Scale {
        /// The value.
        scale: f32,
    },
    /// A bias that is no number.
    #[error("bias of expert {expert} is {bias}, expected a finite number")]
    Bias {
        /// The expert.
        expert: usize,
        /// The value.
        bias: f32,
    },
    /// A tensor of the wrong length.
    #[error("{tensor} has {length} elements, expected {expected}")]
    Length {
        /// Which.
        tensor: &'static str,
        /// Its elements.
        length: usize,
        /// What they should be.
        expected: usize,
    },
    /// A logit that is NaN or plus infinity. Minus infinity is a number here: an expert that is
    /// masked.
    #[error("logit of token {token} for expert {expert} is {logit}, expected a number below inf")]
    Logit {
        /// Row.
        token: usize,
        /// Column.
        expert: usize,
        /// The value.
        logit: f32,
    },
    /// A row of nothing but masked experts.
    #[error("all logits of token {token} are -inf, expected a finite one")]
    AllMasked {
        /// Row.
        token: usize,
    },
}

/// A method with its parameters, checked; one for each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    method: Method,
    experts: usize,
    top_k: usize,
}

impl Router {
    /// A router of `experts` logits a token to `top_k` experts.
    ///
    /// # Errors
    /// Parameters that do not fit together; see [`RoutingError`].
    pub fn new(method: Method, experts: u32, top_k: u32) -> Result<Self, RoutingError> {
        if experts == 0 || i32::try_from(experts).is_err() {
            return Err(RoutingError::Experts { experts });
        }
        if !(1..=experts).contains(&top_k) {
            return Err(RoutingError::TopK { top_k, experts });
        }
        let count = experts as usize;
        match &method {
            Method::DeepSeekV3 { bias, n_group, topk_group, scale } => {
                check_groups((*n_group, *topk_group), experts, top_k)?;
                if !scale.is_finite() {
                    return Err(RoutingError::Scale { scale: *scale });
                }
                check_bias(bias, count)?;
            }
            Method::MiniMaxM2 { bias } => check_bias(bias, count)?,
            Method::Default
            | Method::Renormalize
            | Method::RenormalizeNaive
            | Method::Llama4Renormalize
            | Method::SigmoidRenorm => {}
        }
        Ok(Self { method, experts: count, top_k: top_k as usize })
    }

    /// Routes T tokens: `logits` f32 `[T, experts]` to `ids` i32 `[T, top_k]` and `weights` f32
    /// `[T, top_k]`. T is what `ids` has room for; 0 is an ordinary call.
    ///
    /// # Errors
    /// Lengths that do not fit each other, and logits without an answer, see [`RoutingError`];
    /// nothing was written then.
    pub fn route(
        &self,
        logits: &[f32],
        ids: &mut [i32],
        weights: &mut [f32],
    ) -> Result<(), RoutingError> {
        let tokens = ids.len().div_ceil(self.top_k);
        expect_length("ids", ids.len(), tokens * self.top_k)?;
        expect_length("weights", weights.len(), tokens * self.top_k)?;
        expect_length("logits", logits.len(), tokens * self.experts)?;
        logits.chunks_exact(self.experts).enumerate().try_for_each(check_row)?;
        let mut scratch = Scratch::default();
        let places = ids.chunks_exact_mut(self.top_k).zip(weights.chunks_exact_mut(self.top_k));
        for (logits, (ids, weights)) in logits.chunks_exact(self.experts).zip(places) {
            self.route_token(&mut scratch, logits, ids, weights);
        }
        Ok(())
    }

    fn route_token(
        &self,
        Scratch { scores, keys }: &mut Scratch,
        logits: &[f32],
        ids: &mut [i32],
        weights: &mut [f32],
    ) {
        scores.clear();
        scores.extend_from_slice(logits);
        match self.method {
            Method::Renormalize | Method::Llama4Renormalize => {}
            Method::Default | Method::RenormalizeNaive => softmax(scores),
            Method::DeepSeekV3 { .. } | Method::MiniMaxM2 { .. } | Method::SigmoidRenorm => {
                sigmoid(scores);
            }
        }
        keys.clear();
        keys.extend_from_slice(scores);
        if let Method::DeepSeekV3 { bias, .. } | Method::MiniMaxM2 { bias } = &self.method {
            keys.iter_mut().zip(bias).for_each(|(key, bias)| *key += bias);
        }
        if let Method::DeepSeekV3 { n_group, topk_group, .. } = self.method {
            keep_best_groups(keys, n_group as usize, topk_group as usize);
        }
        select(keys, ids);
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = scores[id as usize];
        }
        match self.method {
            Method::Default => {}
            Method::Renormalize => softmax(weights),
            Method::Llama4Renormalize => sigmoid(weights),
            Method::RenormalizeNaive | Method::SigmoidRenorm => normalise(weights, 0.0, 1.0),
            Method::DeepSeekV3 { scale, .. } => normalise(weights, SUM_FLOOR, scale),
            Method::MiniMaxM2 { .. } => normalise(weights, SUM_FLOOR, 1.0),
        }
    }
}

/// Room for one token's experts, used again for the next.
#[derive(Default)]
struct Scratch {
    /// What weights are made of.
    scores: Vec<f32>,
    /// What experts are selected by.
    keys: Vec<f32>,
}

fn check_groups(
    (n_group, topk_group): (u32, u32),
    experts: u32,
    top_k: u32,
) -> Result<(), RoutingError> {
    if n_group == 0 || !experts.is_multiple_of(n_group) {
        return Err(RoutingError::Groups { n_group, experts });
    }
    if !(1..=n_group).contains(&topk_group) {
        return Err(RoutingError::KeptGroups { topk_group, n_group });
    }
    let kept = experts / n_group * topk_group;
    if kept < top_k {
        return Err(RoutingError::TooFewKept { topk_group, n_group, kept, top_k });
    }
    Ok(())
}

fn check_bias(bias: &[f32], experts: usize) -> Result<(), RoutingError> {
    expect_length("bias", bias.len(), experts)?;
    match bias.iter().position(|bias| !bias.is_finite()) {
        Some(expert) => Err(RoutingError::Bias { expert, bias: bias[expert] }),
        None => Ok(()),
    }
}

fn check_row((token, logits): (usize, &[f32])) -> Result<(), RoutingError> {
    let bad = |&logit: &f32| logit.is_nan() || logit == f32::INFINITY;
    if let Some(expert) = logits.iter().position(bad) {
        return Err(RoutingError::Logit { token, expert, logit: logits[expert] });
    }
    if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        return Err(RoutingError::AllMasked { token });
    }
    Ok(())
}

fn expect_length(tensor: &'static str, length: usize, expected: usize) -> Result<(), RoutingError> {
    if length == expected { Ok(()) } else { Err(RoutingError::Length { tensor, length, expected }) }
}

fn softmax(values: &mut [f32]) {
    let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter_mut().for_each(|value| *value = (*value - largest).exp());
    let sum: f32 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}

fn sigmoid(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = 1.0 / (1.0 + (-*value).exp()));
}

/// Weights of all zero stay zero: sigmoids of far negative logits are, and 0 / 0 is no weight.
fn normalise(weights: &mut [f32], floor: f32, scale: f32) {
    let sum = weights.iter().sum::<f32>() + floor;
    if sum > 0.0 {
        weights.iter_mut().for_each(|weight| *weight = scale * *weight / sum);
    }
}

/// The positions of the largest keys, largest first; of equal keys the lower position first.
fn select(keys: &[f32], ids: &mut [i32]) {
    let mut found = 0;
    for (id, &key) in (0..).zip(keys) {
        let place = ids[..found].partition_point(|&other| keys[other as usize] >= key);
        if place < ids.len() {
            found = (found + 1).min(ids.len());
            ids[place..found].rotate_right(1);
            ids[place] = id;
        }
    }
}

/// Takes the experts of all but the best groups out of the choice. Minus infinity, not zero: biased
/// scores may be negative, and a zero would beat them.
fn keep_best_groups(keys: &mut [f32], n_group: usize, topk_group: usize) {
    let size = keys.len() / n_group;
    let sums: Vec<f32> = keys.chunks_exact(size).map(sum_of_two_largest).collect();
    let mut best = vec![0; topk_group];
    select(&sums, &mut best);
    for (group, keys) in (0..).zip(keys.chunks_exact_mut(size)) {
        if !best.contains(&group) {
            keys.fill(f32::NEG_INFINITY);
        }
    }
}

fn sum_of_two_largest(keys: &[f32]) -> f32 {
    let mut largest = [0; 2];
    let largest = &mut largest[..keys.len().min(2)];
    select(keys, largest);
    largest.iter().map(|&id| keys[id as usize]).sum()
}

#[cfg(test)]
mod tests;
