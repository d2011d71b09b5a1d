//! One expert as the checkpoint has it: borrowed bytes and scalars, and the fp32 products of those
//! scalars. Derives no bytes: that is a device's part.

use crate::problem::ActFormat;

/// One projection of one expert. Rows are output features, columns run along K.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawProjection<'a> {
    /// Output features: `intermediate` for gate and up, `hidden` for down.
    pub rows: usize,
    /// Input features (K): `hidden` for gate and up, `intermediate` for down.
    pub cols: usize,
    /// e2m1 codes `[rows, cols / 2]`, two a byte along K, the even element in the low nibble.
    pub codes: &'a [u8],
    /// Block scales `[rows, cols / 16]`, e4m3 bits: finite and not negative.
    pub scales: &'a [u8],
    /// Global scale of the weights, ModelOpt's `weight_scale_2` (amax / 2688).
    pub weight_scale_2: f32,
    /// Global scale of the input activations (amax / 2688); absent where calibration did not reach
    /// the expert, and in weight-only checkpoints: such layers serve `act=bf16` alone.
    pub input_scale: Option<f32>,
}

/// One expert: three projections. `gate` and `up` share their `input_scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawExpert<'a> {
    /// Gate projection `[intermediate, hidden]`.
    pub gate: RawProjection<'a>,
    /// Up projection `[intermediate, hidden]`.
    pub up: RawProjection<'a>,
    /// Down projection `[hidden, intermediate]`.
    pub down: RawProjection<'a>,
}

/// The scalars of one expert as the checkpoint has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawScalars {
    /// `weight_scale_2` of gate, up and down.
    pub weight_scale_2: [f32; 3],
    /// in2: the down projection's `input_scale`.
    pub in2: Option<f32>,
}

/// The fp32 scalars of one expert for one activation format.
///
/// With in13 the largest `gate_proj.input_scale` of the layer's experts and in2 the expert's own
/// `down_proj.input_scale`: `act=nvfp4` has `fc1_alpha = in13 x weight_scale_2` (gate and up each),
/// `fc2_alpha = in2 x weight_scale_2`, `norm_const = 1 / in2`; `act=bf16` leaves in13 and in2 out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertScalars {
    /// Multiplies the gate sum.
    pub gate_alpha: f32,
    /// Multiplies the up sum; differs from `gate_alpha` where `weight_scale_2` does.
    pub up_alpha: f32,
    /// Multiplies the FC2 sum.
    pub fc2_alpha: f32,
    /// Quantisation scale of the intermediate, `1 / in2`; 1 for `act=bf16`, where it is not used.
    pub norm_const: f32,
}

impl RawExpert<'_> {
    /// The expert's scalars.
    #[must_use]
    pub fn scalars(&self) -> RawScalars {
        RawScalars {
            weight_scale_2: [self.gate, self.up, self.down].map(|p| p.weight_scale_2),
            in2: self.down.input_scale,
        }
    }
}

impl RawScalars {
    /// Their products for `act`; `None` when `act=nvfp4` and a scale of the inputs is missing.
    #[must_use]
    pub fn products(&self, act: ActFormat, in13: Option<f32>) -> Option<ExpertScalars> {
        let [gate, up, down] = self.weight_scale_2;
        match act {
            ActFormat::Bf16 => Some(ExpertScalars {
                gate_alpha: gate,
                up_alpha: up,
                fc2_alpha: down,
                norm_const: 1.0,
            }),
            ActFormat::Nvfp4 => {
                let (in13, in2) = (in13?, self.in2?);
                Some(ExpertScalars {
                    gate_alpha: in13 * gate,
                    up_alpha: in13 * up,
                    fc2_alpha: in2 * down,
                    norm_const: 1.0 / in2,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_honour_every_scale() {
        let raw = RawScalars { weight_scale_2: [0.5, 0.25, 2.0], in2: Some(0.125) };
        let scalars = raw.products(ActFormat::Nvfp4, Some(4.0)).unwrap();
        assert_eq!((scalars.gate_alpha, scalars.up_alpha), (2.0, 1.0));
        assert_eq!((scalars.fc2_alpha, scalars.norm_const), (0.25, 8.0));
        let scalars = raw.products(ActFormat::Bf16, Some(4.0)).unwrap();
        assert_eq!((scalars.gate_alpha, scalars.up_alpha), (0.5, 0.25));
        assert_eq!((scalars.fc2_alpha, scalars.norm_const), (2.0, 1.0));
    }

    #[test]
    fn weight_only_experts_serve_bf16_alone() {
        let raw = RawScalars { weight_scale_2: [0.5; 3], in2: None };
        assert_eq!(raw.products(ActFormat::Nvfp4, Some(1.0)), None);
        assert!(raw.products(ActFormat::Bf16, None).is_some());
    }
}
