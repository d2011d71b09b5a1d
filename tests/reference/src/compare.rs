//! How far an output is from what was expected, and whether that is near enough: the tolerances of
//! the numerics in one place.

use std::fmt;

use crate::layer::Variant;
use crate::numbers::bf16_value;

/// Largest relative error with bf16 activations: an fp32 implementation lands under 1e-4; a bf16
/// running sum or an unrounded term does not pass.
const ERROR_MAX_BF16: f64 = 1e-3;
/// The same for one row alone, whose few elements average less.
const ROW_ERROR_MAX_BF16: f64 = 4e-3;
/// Largest relative error with NVFP4 activations: a value within 1e-7 of a rounding boundary may
/// take the other code.
const ERROR_MAX_NVFP4: f64 = 2e-2;
/// Least share of elements that must be within 0.02 + 0.02 |ref|.
const SHARE_MIN: f64 = 0.99;

/// Least share of elements within 0.15 + 0.01 |ref| that the original system's test plan asks for.
const ORIGINAL_SHARE_MIN: f64 = 0.98;

/// The measured distance of an output from the expected one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// `||out - ref|| / ||ref||`; 0 for two empty or all-zero outputs.
    pub relative_error: f64,
    /// Share of elements within 0.02 + 0.02 |ref|, the reference scaled to unit rms.
    pub share: f64,
    /// Share of elements within 0.15 + 0.01 |ref|, unscaled: the original system's criterion.
    pub original_share: f64,
}

impl Comparison {
    /// Compares bf16 bits; an output of another length is infinitely far.
    #[must_use]
    pub fn new(output: &[u16], expected: &[u16]) -> Self {
        if output.len() != expected.len() {
            return Self { relative_error: f64::INFINITY, share: 0.0, original_share: 0.0 };
        }
        let values = || expected.iter().map(|&bits| bf16_value(bits));
        let power: f64 = values().map(|e| e * e).sum();
        let scale = if power > 0.0 { (expected.len() as f64 / power).sqrt() } else { 1.0 };
        let (mut error, mut near, mut original) = (0.0, 0_usize, 0_usize);
        for (&bits, expected) in output.iter().zip(values()) {
            let difference = (bf16_value(bits) - expected).abs();
            error += difference * difference;
            // A NaN is near to nothing: every comparison with it is false.
            near += usize::from(difference * scale <= 0.02 + 0.02 * (expected * scale).abs());
            original += usize::from(difference <= 0.15 + 0.01 * expected.abs());
        }
        let relative_error = match (error == 0.0, power > 0.0) {
            (true, _) => 0.0,
            (false, true) => (error / power).sqrt(),
            (false, false) => f64::INFINITY,
        };
        let share = |count: usize| {
            if expected.is_empty() { 1.0 } else { count as f64 / expected.len() as f64 }
        };
        Self { relative_error, share: share(near), original_share: share(original) }
    }

    /// Whether a whole output is near enough.
    #[must_use]
    pub fn passes(&self, variant: Variant) -> bool {
        let max = if variant.nvfp4 { ERROR_MAX_NVFP4 } else { ERROR_MAX_BF16 };
        self.relative_error <= max && self.share >= SHARE_MIN
    }

    /// Whether a whole output satisfies the original system's criterion.
    #[must_use]
    pub fn passes_original(&self) -> bool {
        self.original_share >= ORIGINAL_SHARE_MIN
    }

    /// Whether one row with bf16 activations is near enough. One row with NVFP4 activations says
    /// little: a single other code is a large part of it.
    #[must_use]
    pub fn row_passes(&self) -> bool {
        self.relative_error <= ROW_ERROR_MAX_BF16 && self.share >= SHARE_MIN
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { relative_error, share, .. } = self;
        write!(f, "relative error {relative_error:.2e}, {:.2} % in tolerance", 100.0 * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::bf16_bits;

    const BF16: Variant = Variant { nvfp4: false, weights_in_combine: false };
    const NVFP4: Variant = Variant { nvfp4: true, ..BF16 };

    fn bits(values: impl IntoIterator<Item = f64>) -> Vec<u16> {
        values.into_iter().map(bf16_bits).collect()
    }

    #[test]
    fn equal_passes_and_shifted_zero_and_nan_fail() {
        let values = || (0..200).map(|i| f64::from(i % 7) - 3.0);
        let expected = bits(values());
        let same = Comparison::new(&expected, &expected);
        assert_eq!((same.relative_error, same.share), (0.0, 1.0));
        assert!(same.passes(BF16) && same.passes(NVFP4) && same.row_passes());
        let shifted = bits(values().map(|e| e * 1.1));
        let zero = bits(values().map(|_| 0.0));
        let mut one_nan = expected.clone();
        one_nan[17] = bf16_bits(f64::NAN);
        for wrong in [shifted, zero, one_nan, Vec::new()] {
            let far = Comparison::new(&wrong, &expected);
            assert!(!far.passes(BF16) && !far.passes(NVFP4) && !far.row_passes(), "{far}");
        }
        assert!(Comparison::new(&[], &[]).passes(BF16));
        assert!(Comparison::new(&bits([0.0]), &bits([0.0])).passes(BF16));
        assert!(!Comparison::new(&bits([1.0]), &bits([0.0])).passes(NVFP4));
    }

    #[test]
    fn the_originals_criterion_is_about_elements_as_they_are() {
        let expected = bits(vec![0.0; 100]);
        let off =
            |count: usize, by: f64| bits((0..100).map(|at| if at < count { by } else { 0.0 }));
        assert!(Comparison::new(&off(100, 0.14), &expected).passes_original());
        assert!(Comparison::new(&off(2, 0.16), &expected).passes_original());
        assert!(!Comparison::new(&off(3, 0.16), &expected).passes_original());
    }

    #[test]
    fn an_error_of_half_a_percent_passes_as_nvfp4_alone() {
        let expected = bits((1..1000).map(f64::from));
        let off = bits((1..1000).map(|e| f64::from(e) * 1.005));
        let far = Comparison::new(&off, &expected);
        assert!(!far.passes(BF16) && far.passes(NVFP4), "{far}");
    }
}
