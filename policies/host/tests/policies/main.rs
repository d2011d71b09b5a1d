//! The contract, and components that keep it or mean harm, through the host and the compiler of this crate.
#![cfg_attr(
    feature = "compiler",
    expect(clippy::unwrap_used, reason = "a test that cannot go on fails")
)]

mod contract;
#[cfg(feature = "compiler")]
mod hostile;
#[cfg(feature = "compiler")]
mod make;
