//! `moeplane-policy`: checks, compiles and tries policies, and is the compiler that hosts start. Parses arguments and
//! prints; each larger subcommand is a module.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod ask;
mod author;
mod build;
mod compile;
mod config;
mod golden;
mod replay;

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use policy_host::limits::COMPONENT_BYTES_MAX;
use policy_host::{Component, Host, HostOptions, Verdict, gate, shipped};

/// Fuel is what bounds calls that are compared with others, whatever else the machine does.
const PATIENCE: Duration = Duration::from_secs(60);

/// Checks, compiles and tries policies of moeplane.
#[derive(Parser)]
#[command(name = "moeplane-policy", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes the folder of a policy that works: the place to begin.
    New(author::NewArguments),
    /// Makes the component of a policy's folder.
    Build(author::BuildArguments),
    /// Says whether a file is a policy that moeplane runs, and what it says of itself. Compiles it, and asks it the
    /// example questions twice.
    Check {
        /// A component, or the name of a policy that comes with moeplane.
        policy: PathBuf,
        /// Folder that keeps what was compiled; without, nothing is kept.
        #[arg(long)]
        store: Option<PathBuf>,
    },
    /// Asks a policy requests from files, each twice: answers must keep the contract, be the same, and be those on record;
    /// with recorded windows, it also plans on each of them.
    Test(ask::TestArguments),
    /// Times a policy: median, 99th percentile, fuel.
    Bench(ask::BenchArguments),
    /// Shows a decision with its reasons.
    Explain(ask::ExplainArguments),
    /// Holds the plans of a policy against worked examples of DeepSeek's EPLB, as they are before anything is mended.
    Golden(golden::Arguments),
    /// Replays placement policies over load windows: each plans on window t and is scored on window t + 1.
    Replay(replay::Arguments),
    /// Reads a component, writes its code: the process that hosts start.
    #[command(hide = true, name = policy_host::compiler::SUBCOMMAND)]
    CompileChild(compile::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::New(arguments) => author::new(&arguments),
        Command::Build(arguments) => author::build(&arguments),
        Command::Check { policy, store } => check(&policy, store.as_deref()),
        Command::Test(arguments) => ask::test(&arguments),
        Command::Bench(arguments) => ask::bench(&arguments),
        Command::Explain(arguments) => ask::explain(&arguments),
        Command::Golden(arguments) => golden::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::CompileChild(arguments) => compile::run(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn check(path: &Path, store: Option<&Path>) -> Result<ExitCode> {
    let policy = load(path, store, None)?;
    let info = policy.info();
    println!("{} {}: {}", info.name, info.version, info.summary);
    println!("kind      {}, contract {}", policy.kind().world(), gate::VERSION);
    println!("sha256    {}", policy.digest());
    println!("settings  {}", info.settings_schema);
    Ok(ExitCode::SUCCESS)
}

/// Loads a policy with this very program as its compiler.
fn load(policy: &Path, store: Option<&Path>, deadline: Option<Duration>) -> Result<Component> {
    let program = std::env::current_exe()?;
    let (named, by_name) = (policy.display().to_string(), policy.components().count() == 1);
    let shipped = shipped::file(&shipped::folder(&program), &named);
    let path = if by_name && !policy.exists() { &shipped } else { policy };
    let file = File::open(path).with_context(|| path.display().to_string())?;
    // Refused by its size, without reading a film.
    let (bytes, limit) = (file.metadata()?.len(), COMPONENT_BYTES_MAX);
    if bytes > limit {
        return Err(Verdict::TooLarge { bytes, limit }).context(named);
    }
    let mut bytes = Vec::new();
    // One byte more than there may be, as the file may have grown.
    file.take(limit + 1).read_to_end(&mut bytes).context(named.clone())?;
    let temporary = tempfile::tempdir()?;
    let store = store.unwrap_or(temporary.path()).to_owned();
    let host = Host::new(&HostOptions { store, compiler: program, deadline })?;
    host.load(&bytes).context(named)
}
