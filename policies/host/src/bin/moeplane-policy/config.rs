//! What `build` takes from the environment: that of cargo.
#![expect(clippy::disallowed_methods, reason = "cargo is configured by its environment")]

use std::path::PathBuf;

/// Flags of the compiler for the target of policies, such as a sysroot.
pub(crate) fn flags() -> Vec<String> {
    let given = std::env::var("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS");
    given.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// Where cargo keeps the sources of crates.
pub(crate) fn cargo_home() -> PathBuf {
    let named = std::env::var("CARGO_HOME").map(PathBuf::from);
    named.unwrap_or_else(|_unset| std::env::home_dir().unwrap_or_default().join(".cargo"))
}
