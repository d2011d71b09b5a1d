//! Commands that compare devices with expected outputs.
#![expect(clippy::print_stderr, reason = "a command line program")]

mod check_cases;
mod compile_kernels;
mod conformance;
mod demo;
mod fleet;
mod gpu_bench;
mod gpu_check;
mod group_calls;
mod kill_control;
mod kill_ranks;
mod latency;
mod layer_report;
mod memory;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Compares MoE layers with expected outputs.
#[derive(Parser)]
#[command(name = "moeplane-cases")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs every case folder under a folder, of the form of tests/data/moe-golden.
    CheckCases(check_cases::Options),
    /// Compiles the device code; no GPU is needed, but NVRTC is.
    CompileKernels,
    /// The cases of the original system's test plan and its functional shapes, through real workers.
    Conformance(conformance::Options),
    /// Serves the small trained checkpoint with control and four workers, replays real activations and
    /// verifies every answer.
    Demo(demo::Options),
    /// Control under a fleet of workers that only speak with it.
    Fleet(fleet::Options),
    /// Times the CUDA device on layers of public models.
    GpuBench(gpu_bench::Options),
    /// The CUDA device beside the CPU device and expected outputs, on a machine with a Hopper GPU.
    GpuCheck(gpu_check::Options),
    /// Random calls of a group of ranks, each answer verified.
    GroupCalls(group_calls::Options),
    /// Control killed at random moments of migrations under load, every answer verified.
    KillControl(kill_control::Options),
    /// Ranks of a group killed at random moments, with a table of what everybody heard.
    KillRanks(kill_ranks::Options),
    /// How long calls of the small trained model take, through workers and groups.
    Latency(latency::Options),
    /// How far each layer of a checkpoint is from the unquantised model's recorded outputs.
    LayerReport(layer_report::Options),
    /// What ranks hold in memory while they load a large checkpoint and when they serve it.
    Memory(memory::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::CheckCases(options) => check_cases::run(&options),
        Command::CompileKernels => compile_kernels::run(),
        Command::Conformance(options) => conformance::run(&options),
        Command::Demo(options) => demo::run(&options).map(|()| true),
        Command::Fleet(options) => fleet::run(&options).map(|()| true),
        Command::GpuBench(options) => gpu_bench::run(&options).map(|()| true),
        Command::GpuCheck(options) => gpu_check::run(&options),
        Command::GroupCalls(options) => group_calls::run(&options).map(|()| true),
        Command::KillControl(options) => kill_control::run(&options).map(|()| true),
        Command::KillRanks(options) => kill_ranks::run(&options).map(|()| true),
        Command::Latency(options) => latency::run(&options).map(|()| true),
        Command::Memory(options) => memory::run(&options),
        Command::LayerReport(options) => layer_report::run(&options).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
