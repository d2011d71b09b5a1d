//! Building our programs, and finding what was built.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir)
}

/// A call of cargo in the repository's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root()).args(arguments);
    command
}

/// Whether nextest is installed; `cargo test` does without.
pub(crate) fn has_nextest() -> bool {
    let mut version = cargo(&["nextest", "--version"]);
    let status = version.stderr(Stdio::null()).stdout(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Arguments of cargo for what has a compiler of policies. What is built together shares features, and control must not
/// get a compiler: this is a build of its own.
pub(crate) const WITH_COMPILER: [&str; 4] = ["--package", "policy-host", "--features", "compiler"];

/// What builds every program that tests and commands start.
pub(crate) fn build_programs() -> Command {
    cargo(&["build", "--quiet", "--workspace", "--bins", "--locked", "--exclude", "xtask"])
}

/// Builds every program of the workspace.
pub(crate) fn programs() -> Result<()> {
    ensure!(build_programs().status()?.success(), "the programs could not be built");
    Ok(())
}

/// Builds every program and returns the path of one.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    programs()?;
    Ok(target()?.join("debug").join(name))
}

/// Builds the programs of a package and what calls them with all optimisation, for what is measured or
/// carried away.
pub(crate) fn release_programs(package: &str) -> Result<()> {
    let mut build = cargo(&["build", "--quiet", "--release", "--locked"]);
    let status = build.args(["--package", package, "--package", "tests"]).status()?;
    ensure!(status.success(), "the programs could not be built");
    Ok(())
}

/// The same, and the path of what calls them.
pub(crate) fn release_caller(package: &str) -> Result<PathBuf> {
    release_programs(package)?;
    Ok(target()?.join("release/moeplane-cases"))
}

/// The target folder that cargo uses here.
pub(crate) fn target() -> Result<PathBuf> {
    let output = cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"]).output()?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let target = metadata["target_directory"].as_str();
    Ok(target.context("cargo metadata names no target folder")?.into())
}

/// Deletes our own programs from the target folder, so that none of an earlier commit is run.
pub(crate) fn delete_programs() -> Result<()> {
    let folder = target()?.join("debug");
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if (name == "moeplane" || name.starts_with("moeplane-")) && path.is_file() {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// A folder of what is made or fetched once for a machine, which is made.
pub(crate) fn caches(of: &str) -> Result<PathBuf> {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let folder = caches.context("HOME is not set")?.join("moeplane").join(of);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}
