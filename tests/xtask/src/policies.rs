//! Commands about policies. `cargo xtask policies`: every crate under `policies` that makes a module becomes a component.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build::{WITH_COMPILER, caches, cargo, root, target};
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

/// The tools that put an interpreter into a component, in the versions that templates were tried with.
const FOR_PYTHON: &str = "componentize-py==0.25.1";
const FOR_JAVASCRIPT: &str = "componentize-qjs@0.4.5";

/// Runs the tests of templates that need tools of other languages.
pub(crate) fn templates() -> Result<bool> {
    let folder = caches("componentize")?;
    let (python, npm) = (folder.join("python"), folder.join("npm"));
    if !python.join("bin/componentize-py").exists() {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        pip.args(["--root-user-action=ignore", "--target"]).arg(&python).arg(FOR_PYTHON);
        ensure!(pip.status()?.success(), "pip could not get {FOR_PYTHON}");
    }
    if !npm.join("node_modules/.bin/componentize-qjs").exists() {
        let mut install = Command::new("npm");
        install
            .args(["install", "--silent", "--no-save", "--prefix"])
            .arg(&npm)
            .arg(FOR_JAVASCRIPT);
        ensure!(install.status()?.success(), "npm could not get {FOR_JAVASCRIPT}");
    }
    let known = env::var_os("PATH").unwrap_or_default();
    let tools = [python.join("bin"), npm.join("node_modules/.bin")];
    let path = env::join_paths(tools.into_iter().chain(env::split_paths(&known)))?;
    let mut tests = cargo(&["test", "--quiet", "--locked", "--test", "policies"]);
    tests.args(WITH_COMPILER).env("PATH", path).env("PYTHONPATH", python);
    Ok(tests.args(["templates_of_other_languages", "--", "--nocapture"]).status()?.success())
}

/// Runs the test that is too long for CI.
pub(crate) fn hostile() -> Result<bool> {
    let mut tests = cargo(&["test", "--quiet", "--locked", "--test", "policies"]);
    tests.args(WITH_COMPILER).args(["ten_thousand", "--", "--ignored"]);
    Ok(tests.status()?.success())
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
