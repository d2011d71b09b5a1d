//! `cargo xtask gpu-check`: packs programs, data and one script into a folder, for a machine that has
//! a Hopper GPU and needs no cargo.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build::{release_programs, root, target};

/// Programs that the script starts.
const PROGRAMS: [&str; 2] = ["moeplane-worker", "moeplane-cases"];

/// What runs on the other machine; exits with 0 if everything held.
const SCRIPT: &str = r#"#!/usr/bin/env bash
# The CUDA device on this machine's GPU 0. Exits with 0 if everything held.
# PEER=FILE ROUTING=FOLDER: the output of another program for these routings, to be compared with.
set -uo pipefail
cd "$(dirname "$0")"
failed=0
step() {
    echo "== $1"
    shift
    "$@" || { failed=1; echo "FAILED: $*"; }
}
step "against golden cases and the cpu device" ./moeplane-cases gpu-check data
step "golden cases through worker processes" ./moeplane-cases check-cases data/moe-golden --device cuda
step "cases of the original system, and functional shapes" ./moeplane-cases conformance data/cases.json --device cuda
tuned() {
    ./moeplane-worker tune --device cuda --model data/tiny-kjv-moe/model-nvfp4 --out tactics.json --tokens 1,8,64,256
}
step "tactics of a small model" tuned
step "times on layers of public models" ./moeplane-cases gpu-bench ${ROUTING:+--routing "$ROUTING"} ${PEER:+--peer "$PEER"}
step "demo through a worker process" ./moeplane-cases demo data/tiny-kjv-moe --device cuda --alone --once --seconds 2
if command -v compute-sanitizer >/dev/null; then
    mkdir -p small/moe-golden
    cp -r data/moe-golden/{e4_k2_h1632_i48,holes_e8_k4_h128_i64,two_alphas_e4_k2_h256_i128} small/moe-golden/
    sanitize() { compute-sanitizer --error-exitcode 9 --tool "$@"; }
    small=(./moeplane-cases gpu-check small --golden-only)
    step "compute-sanitizer memcheck" sanitize memcheck "${small[@]}"
    step "compute-sanitizer racecheck" sanitize racecheck "${small[@]}" --every-lane-arrives
else
    echo "== compute-sanitizer: skipped, it is not on this machine"
fi
[ $failed = 0 ] && echo "gpu-check: everything held" || echo "gpu-check: FAILED"
exit $failed
"#;

pub(crate) fn run() -> Result<bool> {
    release_programs("worker")?;
    let target = target()?;
    let folder = target.join("gpu-check");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(&folder)?;
    for program in PROGRAMS {
        let to = folder.join(program);
        fs::copy(target.join("release").join(program), &to).context(program)?;
        let stripped = Command::new("strip").arg(&to).status().context("strip")?;
        ensure!(stripped.success(), "strip {program} failed");
    }
    fs::create_dir_all(folder.join("data"))?;
    fs::copy(root().join("tests/data/cases.json"), folder.join("data/cases.json"))?;
    for data in ["moe-golden", "tiny-kjv-moe"] {
        copy_folder(&root().join("tests/data").join(data), &folder.join("data").join(data))?;
    }
    let script = folder.join("check.sh");
    fs::write(&script, SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    println!("{}: copy it to a machine with a Hopper GPU and run check.sh there", folder.display());
    Ok(true)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_folder(&from, &to)?;
        } else {
            fs::copy(&from, &to).with_context(|| from.display().to_string())?;
        }
    }
    Ok(())
}
