//! `cargo xtask policies` and `bench-policies`: every crate under `policies` that makes a module becomes a component.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build::{WITH_COMPILER, cargo, root, target};
use crate::wasm::with_target;

/// Whether all could be built.
pub(crate) fn run() -> Result<bool> {
    let mut build = cargo(&["build", "--quiet", "--locked", "--bin", "moeplane-policy"]);
    ensure!(build.args(WITH_COMPILER).status()?.success(), "moeplane-policy could not be built");
    let program = target()?.join("debug/moeplane-policy");
    let into = target()?.join("policies");
    if into.exists() {
        // Also what is no policy any more.
        fs::remove_dir_all(&into).with_context(|| into.display().to_string())?;
    }
    for (name, folder) in guests()? {
        let mut make = Command::new(&program);
        make.current_dir(root()).arg("build").arg(&folder);
        make.arg("--output").arg(into.join(name).with_extension("wasm"));
        with_target(&mut make)?;
        if !make.status()?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Builds everything anew with all optimisation, and times it.
pub(crate) fn bench() -> Result<bool> {
    if !run()? {
        return Ok(false);
    }
    let mut bench = cargo(&["bench", "--quiet", "--locked", "--bench", "policies"]);
    Ok(bench.args(WITH_COMPILER).status()?.success())
}

/// Name and folder of the crates that make modules.
fn guests() -> Result<Vec<(String, PathBuf)>> {
    let output = cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"]).output()?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let makes_module = |package: &&Value| {
        let targets = package["targets"].as_array().into_iter().flatten();
        let mut types = targets.flat_map(|target| target["crate_types"].as_array()).flatten();
        types.any(|kind| kind == "cdylib")
    };
    let guest = |package: &Value| {
        let folder = Path::new(package["manifest_path"].as_str()?).parent()?.to_owned();
        let name = package["name"].as_str()?.to_owned();
        folder.starts_with(root().join("policies")).then_some((name, folder))
    };
    Ok(packages.iter().filter(makes_module).filter_map(guest).collect())
}
