//! The NVFP4 MoE layer written a second time, plainly, to compare devices with: the sums of FC1 and
//! FC2 in float64, every other step in fp32 as the numerics define it. Shares no arithmetic with
//! `kernels`, and depends on no other crate of the workspace, so that a mistake there cannot hide
//! here.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numerics: narrowing conversions are the subject of this crate"
)]

pub mod compare;
pub mod layer;
pub mod model;
pub mod numbers;
pub mod quantise;
pub mod routing;
pub mod tensors;
