//! Policies in Rust: cargo makes a module of a crate, and wit-component a component of the module.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use wit_component::ComponentEncoder;

use crate::config;

/// The target of all policies. There is no system below it, so nothing is imported by accident.
const TARGET: &str = "wasm32-unknown-unknown";

/// The release profile for policies, whatever the crate's workspace says: fast, and with the names of functions, which a
/// trap is told by.
const PROFILE: [&str; 5] =
    ["opt-level=3", "lto=true", "codegen-units=1", "debug=false", "strip=\"debuginfo\""];

/// The component of the crate with this manifest.
pub(crate) fn component(manifest: &Path) -> Result<Vec<u8>> {
    let module = module(manifest)?;
    encode(&module).with_context(|| format!("{} cannot become a component", module.display()))
}

/// The module that cargo makes. What it has to say goes to the error output.
fn module(manifest: &Path) -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--quiet", "--release", "--target", TARGET, "--manifest-path"]);
    cargo.arg(manifest).args(["--message-format", "json-render-diagnostics"]);
    for setting in PROFILE {
        cargo.args(["--config", &format!("profile.release.{setting}")]);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(manifest)?.join("\u{1f}"));
    let output = cargo.stderr(Stdio::inherit()).output().context("cargo did not start")?;
    ensure!(
        output.status.success(),
        "cargo could not build it; for the standard library: rustup target add {TARGET}"
    );
    let messages = String::from_utf8_lossy(&output.stdout);
    last_module(&messages).with_context(|| {
        format!("{} makes no module, expected crate-type = [\"cdylib\"]", manifest.display())
    })
}

/// Flags of the compiler: those of the environment for the target, and what keeps paths of this machine out of the
/// component, which panics would name.
fn flags(manifest: &Path) -> Result<Vec<String>> {
    let mut flags = config::flags();
    let mut cut = |folder: &Path, name: &str| {
        flags.push(format!("--remap-path-prefix={}={name}", folder.display()));
    };
    let own = manifest.canonicalize()?;
    cut(own.parent().unwrap_or(&own), "/policy");
    let sources = config::cargo_home().join("registry/src");
    for registry in std::fs::read_dir(sources).into_iter().flatten().flatten() {
        cut(&registry.path(), "/crates");
    }
    Ok(flags)
}

/// The crate's own module: those of dependencies come before it.
fn last_module(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut modules = messages.filter_map(|message| {
        let files = message.get("filenames")?.as_array()?;
        let mut files = files.iter().filter_map(Value::as_str).map(PathBuf::from);
        files.find(|file| file.extension().is_some_and(|end| end == "wasm"))
    });
    modules.next_back()
}

fn encode(module: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(module)?;
    let mut encoder = ComponentEncoder::default();
    let encoder = encoder.validate(true).module(&bytes);
    encoder.and_then(|encoder| encoder.encode()).map_err(|error| anyhow!("{error:#}"))
}
