//! Real worker processes on real sockets: what is served, what is refused, and what is left behind.
#![expect(clippy::unwrap_used, reason = "a test")]

mod access;
mod calls;
mod checkpoints;
mod command;
mod configuration;
mod conformance;
mod control;
mod events;
mod failures;
mod field;
mod groups;
mod migrations;
mod pace;
mod placements;
mod policies;
mod proposals;
mod raw;
mod recovery;
mod shutdown;
mod splitting;
mod tactics;

use std::path::{Path, PathBuf};

use reference::layer::Variant;

const BF16: Variant = Variant { nvfp4: false, weights_in_combine: false };
const NVFP4: Variant = Variant { nvfp4: true, weights_in_combine: false };

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(path)
}

/// Sixteen experts, four for each of 300 tokens.
fn skewed() -> PathBuf {
    data("moe-golden/skewed_e16_k4_h256_i64_t300")
}

/// Eight experts, places without an expert among four for each token.
fn holes() -> PathBuf {
    data("moe-golden/holes_e8_k4_h128_i64")
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}
