//! The compiler process: limits first, then a component from the input, code to the output, a refusal to the error
//! output.

use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use policy_host::compiler::REFUSED;
use policy_host::{engine, gate, limits};
use rustix::process::{Resource, Rlimit, setrlimit};
use wasmtime::Engine;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Seconds of processor time.
    #[arg(long)]
    seconds: u64,
    /// Bytes of address space.
    #[arg(long)]
    memory_bytes: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    // The hard limit is later: at the soft one the process dies of a signal that says why.
    limit(Resource::Cpu, arguments.seconds, arguments.seconds + 2)?;
    limit(Resource::As, arguments.memory_bytes, arguments.memory_bytes)?;
    // A crash of the compiler is not worth a core file.
    limit(Resource::Core, 0, 0)?;
    let mut component = Vec::new();
    std::io::stdin().take(limits::COMPONENT_BYTES_MAX + 1).read_to_end(&mut component)?;
    match catch_unwind(AssertUnwindSafe(|| code(&component))) {
        Ok(Ok(code)) => {
            std::io::stdout().write_all(&code).context("writing the code")?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(Err(reason)) => refuse(&format!("{reason:#}")),
        Err(_panic) => refuse("the compiler panicked"),
    }
}

fn code(component: &[u8]) -> Result<Vec<u8>> {
    gate::check(component)?;
    let mut config = engine::config();
    // A build without a compiler does not have this option.
    config.cranelift_nan_canonicalization(true);
    let compiled = Engine::new(&config).and_then(|engine| engine.precompile_component(component));
    compiled.map_err(|error| anyhow!("{error:#}"))
}

fn refuse(reason: &str) -> Result<ExitCode> {
    writeln!(std::io::stderr(), "{reason}").context("writing the reason")?;
    Ok(ExitCode::from(REFUSED))
}

fn limit(resource: Resource, soft: u64, hard: u64) -> Result<()> {
    let limit = Rlimit { current: Some(soft), maximum: Some(hard) };
    setrlimit(resource, limit).with_context(|| format!("limiting {resource:?} to {soft}"))
}
