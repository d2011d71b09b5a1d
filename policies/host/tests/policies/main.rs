//! The contract, and components that keep it or mean harm, through the host and the compiler of this crate.
#![cfg_attr(
    feature = "compiler",
    expect(clippy::unwrap_used, reason = "a test that cannot go on fails")
)]

#[cfg(feature = "compiler")]
mod agreement;
#[cfg(feature = "compiler")]
mod authors;
mod contract;
#[cfg(feature = "compiler")]
mod fixtures;
#[cfg(feature = "compiler")]
mod greedy_swap;
#[cfg(feature = "compiler")]
mod hostile;
#[cfg(feature = "compiler")]
mod make;
#[cfg(feature = "compiler")]
mod mixture;
#[cfg(feature = "compiler")]
mod question;
#[cfg(feature = "compiler")]
mod routing;
#[cfg(feature = "compiler")]
mod shipped;
#[cfg(feature = "compiler")]
mod tactics;

#[cfg(feature = "compiler")]
use {
    policy_host::{Component, Host, HostOptions, Verdict},
    std::path::Path,
    std::time::Duration,
};

/// A host whose compiler is the program of this crate.
#[cfg(feature = "compiler")]
fn host(store: &Path, deadline: Option<Duration>) -> Host {
    let compiler = env!("CARGO_BIN_EXE_moeplane-policy").into();
    Host::new(&HostOptions { store: store.to_owned(), compiler, deadline }).unwrap()
}

/// Loads a component with a deadline that no busy machine reaches. Tests share what was compiled.
#[cfg(feature = "compiler")]
fn load_patiently(component: &[u8]) -> Result<Component, Verdict> {
    let store = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compiled");
    host(&store, Some(Duration::from_secs(600))).load(component)
}
