//! Weights quantised as NVIDIA ModelOpt does it, in its fp32 arithmetic. A checkpoint that it wrote
//! proves it byte for byte.

use crate::numbers::{e2m1_code, e4m3_code, e4m3_value, pack};

/// What a global scale divides the largest magnitude by: the largest e2m1 times the largest e4m3.
const RANGE: f32 = 6.0 * 448.0;
/// Smallest block scale that is written, that of e4m3's smallest number.
const SCALE_MIN: f32 = 1.0 / 512.0;
/// Largest block scale.
const SCALE_MAX: f32 = 448.0;

/// `weight_scale_2`, or `input_scale`, for values whose largest magnitude is `amax`.
#[must_use]
pub fn global_scale(amax: f32) -> f32 {
    amax / RANGE
}

/// The largest magnitude of `values`.
#[must_use]
pub fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, value| value.abs().max(max))
}

/// Codes, two a byte, and block scales of `values`, whole blocks of 16, under the global scale
/// `weight_scale_2`: `scale = amax / (6 x weight_scale_2)`, 1 where that is 0, as e4m3;
/// `code = e2m1(w / (scale x weight_scale_2))`.
#[must_use]
pub fn quantise_weights(values: &[f32], weight_scale_2: f32) -> (Vec<u8>, Vec<u8>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / 16);
    for block in values.chunks(16) {
        let scale = amax(block) / (6.0 * weight_scale_2);
        let scale = if scale == 0.0 { 1.0 } else { scale.clamp(SCALE_MIN, SCALE_MAX) };
        let scale = e4m3_code(f64::from(scale));
        scales.push(scale);
        let step = e4m3_value(scale) as f32 * weight_scale_2;
        codes.extend(block.iter().map(|value| e2m1_code(f64::from(value / step))));
    }
    (pack(&codes), scales)
}
