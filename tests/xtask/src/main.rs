//! The commands of the repository. Depends on no crate of ours: it builds programs and starts them.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod build;
mod ci;

use std::ffi::OsString;
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
    /// Runs every case folder under a folder, of the form of tests/data/moe-golden.
    #[command(disable_help_flag = true)]
    CheckCases(Rest),
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
        Command::CheckCases(Rest { arguments }) => cases("check-cases", arguments),
        Command::LayerReport => {
            let data = build::root().join("tests/data/tiny-kjv-moe");
            cases("layer-report", vec![data.into_os_string()])
        }
    }
}

/// Builds and runs a command of the crate `tests`.
fn cases(command: &str, arguments: Vec<OsString>) -> Result<bool> {
    let program = build::program("moeplane-cases")?;
    let status = std::process::Command::new(program).arg(command).args(arguments).status()?;
    Ok(status.success())
}
