//! What happens to the sums of the products between FC1 and FC2: alphas, SwiGLU, the weight, and
//! rounding to what FC2 takes.

use half::bf16;

use super::product::Vector;
use crate::expert::ExpertScalars;
use crate::numeric::{BLOCK, dequantise_row, quantise_row};
use crate::problem::{ActFormat, Form, Swiglu, WeightsIn};

/// The activation of one expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activation {
    pub(super) scalars: ExpertScalars,
    pub(super) swiglu: Swiglu,
    pub(super) form: Form,
}

impl Activation {
    /// Sixteen columns of one token's intermediate, as FC2 takes them. Values of `act=nvfp4` are
    /// code x block scale, exact in bf16; their global scale is part of `fc2_alpha`.
    pub(super) fn apply(&self, gate: &Vector, up: &Vector, weight: f32) -> [bf16; BLOCK] {
        let ExpertScalars { gate_alpha, up_alpha, norm_const, .. } = self.scalars;
        let mut y = [0.0; BLOCK];
        for (y, (gate, up)) in y.iter_mut().zip(gate.0.iter().zip(up.0)) {
            *y = self.swiglu(gate_alpha * gate, up_alpha * up);
            if self.form.weights_in == WeightsIn::Fc1 {
                *y *= weight;
            }
        }
        if self.form.act == ActFormat::Nvfp4 {
            let (mut codes, mut scale) = ([0; BLOCK / 2], [0]);
            quantise_row(&y, norm_const, &mut codes, &mut scale);
            dequantise_row(&codes, &scale, 1.0, &mut y);
        }
        y.map(bf16::from_f32)
    }

    fn swiglu(&self, gate: f32, up: f32) -> f32 {
        let Swiglu { limit, alpha, beta } = self.swiglu;
        let (gate, up) = match limit {
            // Not `f32::min` and `f32::max`, which would turn a NaN into a number.
            Some(limit) => (if gate > limit { limit } else { gate }, up.clamp(-limit, limit)),
            None => (gate, up),
        };
        let sigmoid = 1.0 / (1.0 + (-(alpha * gate)).exp());
        (up + beta) * gate * sigmoid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activation(limit: Option<f32>) -> Activation {
        Activation {
            scalars: ExpertScalars {
                gate_alpha: 2.0,
                up_alpha: 0.5,
                fc2_alpha: 1.0,
                norm_const: 1.0,
            },
            swiglu: Swiglu { limit, ..Swiglu::default() },
            form: Form::default(),
        }
    }

    #[test]
    fn both_alphas_the_clamp_and_the_weight_are_applied() {
        let (gate, up) = (Vector([1.0; 16]), Vector([-8.0; 16]));
        let silu = |x: f32| x / (1.0 + (-x).exp());
        let got = activation(None).apply(&gate, &up, 3.0)[5];
        assert_eq!(got, bf16::from_f32(silu(2.0) * -4.0 * 3.0));
        let got = activation(Some(1.0)).apply(&gate, &up, 3.0)[5];
        assert_eq!(got, bf16::from_f32(-silu(1.0) * 3.0));
    }

    #[test]
    fn gate_is_clamped_from_above_only() {
        let (gate, up) = (Vector([-4.0; 16]), Vector([2.0; 16]));
        let unclamped = activation(None).apply(&gate, &up, 1.0);
        assert_eq!(activation(Some(1.0)).apply(&gate, &up, 1.0), unclamped);
    }

    #[test]
    fn alpha_and_beta_are_applied() {
        let swiglu = Swiglu { limit: None, alpha: 1.702, beta: 1.0 };
        let activation = Activation { swiglu, ..activation(None) };
        let got = activation.apply(&Vector([0.5; 16]), &Vector([4.0; 16]), 1.0)[0];
        assert_eq!(got, bf16::from_f32(3.0 / (1.0 + (-1.702_f32).exp())));
    }

    #[test]
    fn a_nan_stays_a_nan() {
        for limit in [None, Some(1.0)] {
            let nan = Vector([f32::NAN; 16]);
            assert!(activation(limit).apply(&nan, &Vector([1.0; 16]), 1.0)[0].is_nan());
            assert!(activation(limit).apply(&Vector([1.0; 16]), &nan, 1.0)[0].is_nan());
        }
    }

    #[test]
    fn a_large_negative_gate_gives_zero() {
        let gate = Vector([-1e4; 16]);
        assert_eq!(activation(None).apply(&gate, &Vector([1.0; 16]), 1.0)[0].to_f32(), 0.0);
    }
}
