//! The layer itself, step by step. Slow and plain on purpose.

use std::fmt;
use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::model::{Expert, Model, Projection, Swiglu};
use crate::numbers::{bf16_bits, bf16_value, dequantise_row, e2m1_pair, e4m3_value, quantise_row};

/// What an engine brings to a call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inputs {
    /// Width of a token.
    pub hidden: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Hidden states, bf16 bits `[tokens, hidden]`.
    pub x: Vec<u16>,
    /// Expert ids `[tokens, top_k]`; -1 is none.
    pub ids: Vec<i32>,
    /// Weights `[tokens, top_k]`.
    pub weights: Vec<f32>,
}

impl Inputs {
    /// Rows.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.x.len() / self.hidden.max(1)
    }

    /// The rows of `range` alone.
    #[must_use]
    pub fn rows(&self, range: Range<usize>) -> Self {
        let (h, k) = (self.hidden, self.top_k);
        Self {
            hidden: h,
            top_k: k,
            x: self.x[range.start * h..range.end * h].to_vec(),
            ids: self.ids[range.start * k..range.end * k].to_vec(),
            weights: self.weights[range.start * k..range.end * k].to_vec(),
        }
    }
}

/// How a layer is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Activations are quantised to NVFP4; they are bf16 otherwise.
    pub nvfp4: bool,
    /// Top-k weights are applied in the final sum; to the intermediate otherwise.
    pub weights_in_combine: bool,
}

impl Variant {
    /// Both formats with both places.
    pub const ALL: [Self; 4] = [
        Self { nvfp4: false, weights_in_combine: false },
        Self { nvfp4: false, weights_in_combine: true },
        Self { nvfp4: true, weights_in_combine: false },
        Self { nvfp4: true, weights_in_combine: true },
    ];

    /// The name of the activation format.
    #[must_use]
    pub fn act(&self) -> &'static str {
        if self.nvfp4 { "nvfp4" } else { "bf16" }
    }

    /// The name of the place where weights are applied.
    #[must_use]
    pub fn weights_in(&self) -> &'static str {
        if self.weights_in_combine { "combine" } else { "fc1" }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "act={:<5} weights_in={:<7}", self.act(), self.weights_in())
    }
}

/// One (token, expert) pair of a call.
struct Pair {
    token: usize,
    place: usize,
    weight: f32,
}

/// The outputs of `layer` for `inputs`, bf16 bits `[tokens, hidden]`, one for each of `variants`.
/// Experts are read once for all variants, only those that are hit.
pub fn layer_outputs(
    model: &Model,
    layer: u32,
    inputs: &Inputs,
    variants: &[Variant],
) -> Result<Vec<Vec<u16>>> {
    let in13 = model.in13(layer)?;
    let top_k = inputs.top_k;
    let mut pairs: Vec<Vec<Pair>> = (0..model.experts(layer)?).map(|_| Vec::new()).collect();
    for (index, (&id, &weight)) in inputs.ids.iter().zip(&inputs.weights).enumerate() {
        if id >= 0 {
            ensure!((id as usize) < pairs.len(), "expert {id} of {}", pairs.len());
            let pair = Pair { token: index / top_k, place: index % top_k, weight };
            pairs[id as usize].push(pair);
        }
    }
    let activations: Vec<Vec<Vec<f64>>> =
        variants.iter().map(|variant| activations(inputs, *variant, in13)).collect();
    // A term for each variant and (token, place); none where the place has no expert.
    let mut terms: Vec<Vec<Option<Vec<f32>>>> =
        variants.iter().map(|_| (0..inputs.ids.len()).map(|_| None).collect()).collect();
    for (expert, pairs) in (0..).zip(&pairs).filter(|(_, pairs)| !pairs.is_empty()) {
        let expert = model.expert(layer, expert)?;
        let (hidden, cols) = (inputs.hidden, expert.gate.cols);
        ensure!(hidden == cols, "{hidden} columns, the layer has {cols}");
        let computation = Computation { expert: &expert, swiglu: model.swiglu, in13 };
        let mut rows = computation.terms(variants, pairs, &activations).into_iter();
        for terms in &mut terms {
            for (pair, row) in pairs.iter().zip(rows.by_ref()) {
                terms[pair.token * top_k + pair.place] = Some(row);
            }
        }
    }
    Ok(variants.iter().zip(&terms).map(|(v, terms)| combine(inputs, *v, terms)).collect())
}

/// Step 1: what the products of FC1 see of each token.
fn activations(inputs: &Inputs, variant: Variant, in13: f32) -> Vec<Vec<f64>> {
    let tokens = inputs.x.chunks(inputs.hidden.max(1));
    let values = tokens.map(|row| row.iter().map(|&bits| bf16_value(bits)));
    if variant.nvfp4 {
        values.map(|row| requantised(&row.map(|y| y as f32).collect::<Vec<_>>(), in13)).collect()
    } else {
        values.map(Iterator::collect).collect()
    }
}

fn requantised(row: &[f32], input_scale: f32) -> Vec<f64> {
    let (codes, scales) = quantise_row(row, 1.0 / input_scale);
    dequantise_row(&codes, &scales)
}

/// One expert at work.
struct Computation<'a> {
    expert: &'a Expert,
    swiglu: Swiglu,
    in13: f32,
}

impl Computation<'_> {
    /// Steps 2 to 6 for the tokens that go to the expert, in every variant: all pairs in the first,
    /// then all in the second, and so on, so that weights are decoded once for all.
    fn terms(
        &self,
        variants: &[Variant],
        pairs: &[Pair],
        activations: &[Vec<Vec<f64>>],
    ) -> Vec<Vec<f32>> {
        let Expert { gate, up, down } = self.expert;
        let in2 = down.input_scale;
        let all = || variants.iter().flat_map(|v| pairs.iter().map(move |pair| (*v, pair)));
        let scaled = |projection: &Projection, input_scale: f32| -> Vec<f32> {
            let input = |v: Variant| if v.nvfp4 { input_scale } else { 1.0 };
            all().map(|(v, _)| input(v) * projection.weight_scale_2).collect()
        };
        let mut rows: Vec<&[f64]> = Vec::new();
        for tokens in activations {
            rows.extend(pairs.iter().map(|pair| tokens[pair.token].as_slice()));
        }
        let gates = products(gate, &scaled(gate, self.in13), &rows);
        let ups = products(up, &scaled(up, self.in13), &rows);
        let intermediate: Vec<Vec<f64>> = all()
            .enumerate()
            .map(|(n, (variant, pair))| {
                let y = gates.iter().zip(&ups).map(|(gate, up)| {
                    let y = self.activate(gate[n], up[n]);
                    if variant.weights_in_combine { y } else { y * pair.weight }
                });
                if variant.nvfp4 {
                    requantised(&y.collect::<Vec<_>>(), in2)
                } else {
                    y.map(|y| bf16_value(bf16_bits(f64::from(y)))).collect()
                }
            })
            .collect();
        let rows: Vec<&[f64]> = intermediate.iter().map(Vec::as_slice).collect();
        let sums = products(down, &scaled(down, in2), &rows);
        let round = |z: f32| bf16_value(bf16_bits(f64::from(z))) as f32;
        (0..rows.len()).map(|n| sums.iter().map(|row| round(row[n])).collect()).collect()
    }

    /// Step 3, in fp32.
    fn activate(&self, gate: f32, up: f32) -> f32 {
        let Swiglu { limit, alpha, beta } = self.swiglu;
        let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
        (up + beta) * gate * (1.0 / (1.0 + (-(alpha * gate)).exp()))
    }
}

/// `alpha x (weights . row)`: for every output feature, one number for each of `rows` with its alpha.
/// Sums in float64, rounded to fp32, then times alpha.
fn products(projection: &Projection, alphas: &[f32], rows: &[&[f64]]) -> Vec<Vec<f32>> {
    let (codes, scales) = (projection.cols / 2, projection.cols / 16);
    let feature = |weights: &mut Vec<f64>, feature: usize| {
        let codes = &projection.codes[feature * codes..][..codes];
        let scales = &projection.scales[feature * scales..][..scales];
        weights.clear();
        for (block, &scale) in codes.chunks(8).zip(scales) {
            let scale = e4m3_value(scale);
            weights.extend(block.iter().flat_map(|&byte| e2m1_pair(byte)).map(|w| w * scale));
        }
        let sums = rows.iter().zip(alphas).map(|(row, alpha)| alpha * dot(row, weights) as f32);
        sums.collect()
    };
    (0..projection.rows).into_par_iter().map_init(Vec::new, feature).collect()
}

/// Eight running sums, so that the compiler may use vectors; in float64 the order is of no matter.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}

/// Step 7, in fp32.
fn combine(inputs: &Inputs, variant: Variant, terms: &[Option<Vec<f32>>]) -> Vec<u16> {
    let mut output = Vec::with_capacity(inputs.x.len());
    for (terms, weights) in terms.chunks(inputs.top_k).zip(inputs.weights.chunks(inputs.top_k)) {
        let mut sum = vec![0.0_f32; inputs.hidden];
        for (term, &weight) in terms.iter().zip(weights) {
            let weight = if variant.weights_in_combine { weight } else { 1.0 };
            sum.iter_mut().zip(term.iter().flatten()).for_each(|(sum, z)| *sum += z * weight);
        }
        output.extend(sum.into_iter().map(|y| bf16_bits(f64::from(y))));
    }
    output
}

/// The bytes of quantised tokens, codes and block scales, as `x_packed` and `x_scale` of a golden
/// case have them.
#[must_use]
pub fn quantised_tokens(inputs: &Inputs, in13: f32) -> (Vec<u8>, Vec<u8>) {
    let (mut packed, mut block_scales) = (Vec::new(), Vec::new());
    for row in inputs.x.chunks(inputs.hidden.max(1)) {
        let row: Vec<f32> = row.iter().map(|&bits| bf16_value(bits) as f32).collect();
        let (codes, scales) = quantise_row(&row, 1.0 / in13);
        packed.extend(crate::numbers::pack(&codes));
        block_scales.extend(scales);
    }
    (packed, block_scales)
}
