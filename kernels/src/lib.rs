//! Numerics, checkpoints and devices of an NVFP4 Mixture-of-Experts layer. A leaf: of the workspace
//! it depends on `routing` alone, which it hands on. `unsafe` lives here (`checkpoint/mapped.rs`,
//! `memory.rs`, `cpu/simd.rs`, `cuda/compile.rs`, `cuda/launch.rs`). No sockets, no async.
#![warn(missing_docs)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numerics: narrowing conversions are the subject of this crate"
)]

mod assignments;
pub mod checkpoint;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod expert;
pub mod group;
pub mod heap;
pub mod memory;
pub mod numeric;
pub mod problem;
pub mod route;
pub mod tactics;

pub use routing;
