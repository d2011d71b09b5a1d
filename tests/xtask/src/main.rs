//! The commands of the repository. Depends on no crate of ours: it builds programs and starts them.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod build;
mod ci;
mod gpu_check;
mod nvrtc;
mod policies;
mod wasm;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The commands of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that must hold before a merge; ends with the line "N passed, N failed".
    Ci,
    /// Serves a small trained model with control and four workers, replays real activations with four
    /// engines, verifies every answer, and stays up until Ctrl-C; `--once` ends after the replay.
    #[command(disable_help_flag = true)]
    Demo(Rest),
    /// Random calls of a group of ranks, each answer verified: `--ranks N --calls N --seed S`.
    #[command(disable_help_flag = true)]
    GroupCalls(Rest),
    /// Control killed at random moments of migrations under load: `--kills N --seed S`.
    #[command(disable_help_flag = true)]
    KillControl(Rest),
    /// Ranks of a group killed at random moments, every answer verified: `--ranks N --kills N --seed S`.
    #[command(disable_help_flag = true)]
    KillRanks(Rest),
    /// Simulates a group and its control, a seed after the other: `--seeds N --first N --plant flip-before-checksum`.
    #[command(disable_help_flag = true)]
    Simulate(Rest),
    /// The end-to-end tests; with `--stress N` each of them N times.
    E2e {
        /// Rounds.
        #[arg(long, default_value_t = 1)]
        stress: u32,
    },
    /// Compiles the device code for Hopper and prints registers and spills; needs no GPU, gets NVRTC by pip.
    CompileKernels,
    /// Builds the policies that come with moeplane, into the folder `policies` beside the programs.
    Policies,
    /// Times policies linked in and as components: plans of DeepSeek-V3's sizes, and tables of tactics.
    BenchPolicies,
    /// Builds and asks the templates of policies in Python and JavaScript, with tools that it gets by pip and npm.
    PolicyTemplates,
    /// Ten thousand components that mean harm: memory returns to where it was.
    HostilePolicies,
    /// Runs every case folder under a folder, of the form of tests/data/moe-golden.
    #[command(disable_help_flag = true)]
    CheckCases(Rest),
    /// The 59 cases of the original system's test plan, after its 24 functional shapes, through real
    /// workers: `--only S59`.
    #[command(disable_help_flag = true)]
    Conformance(Rest),
    /// Packs programs, data and one script for a machine with a Hopper GPU and no cargo.
    GpuCheck,
    /// How long calls of the small trained model take, through workers and groups of them, built in
    /// release: `--calls N --ranks 2,4`.
    #[command(disable_help_flag = true)]
    Latency(Rest),
    /// What ranks hold in memory while they load a synthetic checkpoint and when they serve it:
    /// `--gib 10 --ranks 1,4`.
    #[command(disable_help_flag = true)]
    Memory(Rest),
    /// Control under a fleet of 72 ranks that only speak with it, built in release: its time, its memory,
    /// and how soon it answers: `--seconds 60 --ranks 72 --layers 61`.
    #[command(disable_help_flag = true)]
    Fleet(Rest),
    /// How far each layer of the small trained model is from its unquantised original.
    LayerReport,
}

/// Arguments that another program reads.
#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether what was asked for holds.
fn run(command: Command) -> Result<bool> {
    match command {
        Command::Ci => ci::run(),
        Command::Demo(Rest { mut arguments }) => {
            arguments.insert(0, build::root().join("tests/data/tiny-kjv-moe").into_os_string());
            // It ends with a proposal.
            if !policies::run()? {
                return Ok(false);
            }
            let mut demo = std::process::Command::new(build::program("moeplane-cases")?);
            // In place of this program: Ctrl-C is for it alone.
            Err(demo.arg("demo").args(arguments).exec().into())
        }
        Command::GroupCalls(Rest { mut arguments }) => {
            arguments.insert(0, build::root().join("tests/data/tiny-kjv-moe").into_os_string());
            cases("group-calls", arguments)
        }
        Command::KillControl(Rest { mut arguments }) => {
            arguments.insert(0, build::root().join("tests/data/tiny-kjv-moe").into_os_string());
            cases("kill-control", arguments)
        }
        Command::KillRanks(Rest { mut arguments }) => {
            let case = "tests/data/moe-golden/skewed_e16_k4_h256_i64_t300";
            arguments.insert(0, build::root().join(case).into_os_string());
            cases("kill-ranks", arguments)
        }
        Command::Simulate(Rest { arguments }) => {
            let mut simulate = std::process::Command::new(build::program("moeplane-simulate")?);
            Ok(simulate.args(arguments).status()?.success())
        }
        Command::E2e { stress } => e2e(stress),
        Command::CompileKernels => {
            let mut compile = std::process::Command::new(build::program("moeplane-cases")?);
            // Without, the program says what it lacks.
            nvrtc::with_nvrtc(&mut compile)?;
            Ok(compile.arg("compile-kernels").status()?.success())
        }
        Command::Policies => policies::run(),
        Command::BenchPolicies => policies::bench(),
        Command::PolicyTemplates => policies::templates(),
        Command::HostilePolicies => policies::hostile(),
        Command::CheckCases(Rest { arguments }) => cases("check-cases", arguments),
        Command::Conformance(Rest { mut arguments }) => {
            arguments.insert(0, build::root().join("tests/data/cases.json").into_os_string());
            cases("conformance", arguments)
        }
        Command::Fleet(Rest { arguments }) => {
            run_program(&build::release_caller("control")?, "fleet", arguments)
        }
        Command::GpuCheck => gpu_check::run(),
        Command::Latency(Rest { mut arguments }) => {
            arguments.insert(0, build::root().join("tests/data/tiny-kjv-moe").into_os_string());
            run_program(&build::release_caller("worker")?, "latency", arguments)
        }
        Command::Memory(Rest { arguments }) => cases("memory", arguments),
        Command::LayerReport => {
            let data = build::root().join("tests/data/tiny-kjv-moe");
            cases("layer-report", vec![data.into_os_string()])
        }
    }
}

/// Runs the end-to-end tests until one fails.
fn e2e(rounds: u32) -> Result<bool> {
    build::programs()?;
    let only = ["--package", "tests", "--test", "e2e"];
    if build::has_nextest() {
        let mut tests = build::cargo(&["nextest", "run", "--stress-count", &rounds.to_string()]);
        return Ok(tests.args(only).status()?.success());
    }
    for _ in 0..rounds {
        if !build::cargo(&["test"]).args(only).status()?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Builds and runs a command of the crate `tests`.
fn cases(command: &str, arguments: Vec<OsString>) -> Result<bool> {
    run_program(&build::program("moeplane-cases")?, command, arguments)
}

fn run_program(program: &Path, command: &str, arguments: Vec<OsString>) -> Result<bool> {
    let status = std::process::Command::new(program).arg(command).args(arguments).status()?;
    Ok(status.success())
}
