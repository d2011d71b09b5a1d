//! `moeplane-policy`: checks, compiles and tries policies, and is the compiler that hosts start. Parses arguments and
//! prints; each larger subcommand is a module.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod compile;

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use policy_host::limits::COMPONENT_BYTES_MAX;
use policy_host::{Component, Host, HostOptions, gate};

/// Checks, compiles and tries policies of moeplane.
#[derive(Parser)]
#[command(name = "moeplane-policy", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Says whether a file is a policy that moeplane runs, and what it says of itself. Compiles it, and asks it the
    /// example questions twice.
    Check {
        /// The component.
        policy: PathBuf,
        /// Folder that keeps what was compiled; without, nothing is kept.
        #[arg(long)]
        store: Option<PathBuf>,
    },
    /// Reads a component, writes its code: the process that hosts start.
    #[command(hide = true, name = policy_host::compiler::SUBCOMMAND)]
    CompileChild(compile::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Check { policy, store } => check(&policy, store.as_deref()),
        Command::CompileChild(arguments) => compile::run(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn check(path: &Path, store: Option<&Path>) -> Result<ExitCode> {
    let policy = load(path, store)?;
    let info = policy.info();
    println!("{} {}: {}", info.name, info.version, info.summary);
    println!("kind      {}, contract {}", policy.kind().world(), gate::VERSION);
    println!("sha256    {}", policy.digest());
    println!("settings  {}", info.settings_schema);
    Ok(ExitCode::SUCCESS)
}

/// Loads a component with this very program as its compiler.
fn load(path: &Path, store: Option<&Path>) -> Result<Component> {
    let named = || path.display().to_string();
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(named)?;
    // One byte more than may be: enough to refuse it by its size, without reading a film.
    file.take(COMPONENT_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(named)?;
    let temporary = tempfile::tempdir()?;
    let options = HostOptions {
        store: store.unwrap_or(temporary.path()).to_owned(),
        compiler: std::env::current_exe()?,
        deadline: None,
    };
    Host::new(&options)?.load(&bytes).with_context(named)
}
