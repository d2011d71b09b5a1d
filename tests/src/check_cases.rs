//! `check-cases DIR`: every case folder under DIR, in the forms asked for, compared with the outputs
//! that the case records.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions, Isa};
use protocol::message::{ActFormat, Phase, WeightsIn};
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant};
use tests::call::{attach, first_layer, in_process, through};
use tests::case::{self, Case};
use tests::worker_process::Worker;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with case folders.
    dir: PathBuf,
    /// Only this activation format, bf16 or nvfp4; both otherwise.
    #[arg(long)]
    act: Option<ActFormat>,
    /// Only this place of the top-k weights, fc1 or combine; both otherwise.
    #[arg(long)]
    weights_in: Option<WeightsIn>,
    /// Instructions of the CPU device: scalar, avx2 or avx512; the fastest otherwise.
    #[arg(long)]
    isa: Option<Isa>,
    /// Call the device in this process instead of a worker.
    #[arg(long)]
    in_process: bool,
}

impl Options {
    fn variants(&self) -> impl Iterator<Item = Variant> {
        Variant::ALL.into_iter().filter(|&variant| {
            let wanted = attach(variant, 0);
            self.act.is_none_or(|act| act == wanted.act)
                && self.weights_in.is_none_or(|place| place == wanted.weights_in)
        })
    }
}

/// Passed and failed so far.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
}

impl Tally {
    fn line(&mut self, what: &str, passed: bool) -> io::Result<()> {
        *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
        writeln!(io::stdout(), "{what}: {}", if passed { "pass" } else { "FAIL" })
    }
}

/// True when all passed and there was at least one.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut tally = Tally::default();
    for dir in case::find(&options.dir)? {
        let name = case::name(&dir);
        match open(&dir, options) {
            Ok((case, mut server)) => {
                for variant in options.variants() {
                    let name = format!("{name:<28} {variant}");
                    match check(&case, &mut server, variant) {
                        Ok(comparison) => {
                            let passes = comparison.passes(variant);
                            tally.line(&format!("{name} {comparison}"), passes)?;
                        }
                        Err(error) => tally.line(&format!("{name} {error:#}"), false)?,
                    }
                }
            }
            Err(error) => tally.line(&format!("{name:<28} {error:#}"), false)?,
        }
    }
    writeln!(io::stdout(), "{} passed, {} failed", tally.passed, tally.failed)?;
    Ok(tally.failed == 0 && tally.passed > 0)
}

/// Whoever answers calls.
enum Server {
    Worker(Worker),
    Device { device: Box<CpuDevice>, checkpoint: Checkpoint, layer: u32 },
}

fn open(dir: &Path, options: &Options) -> Result<(Case, Server)> {
    let case = Case::open(dir)?;
    if !options.in_process {
        let isa = options.isa.map(|isa| isa.to_string());
        let arguments = isa.iter().flat_map(|isa| ["--isa", isa.as_str()]);
        let worker = Worker::start(dir, &arguments.collect::<Vec<_>>())?;
        return Ok((case, Server::Worker(worker)));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let layer = checkpoint.layers().first().context("the checkpoint has no MoE layer")?.number;
    let device_options = CpuOptions { isa: options.isa, ..CpuOptions::default() };
    let device = Box::new(CpuDevice::with_checkpoint(device_options, &checkpoint)?);
    Ok((case, Server::Device { device, checkpoint, layer }))
}

fn check(case: &Case, server: &mut Server, variant: Variant) -> Result<Comparison> {
    let expected = case.expected(variant)?;
    let output = answer(server, variant, &case.inputs)?;
    Ok(Comparison::new(&output, &expected))
}

fn answer(server: &mut Server, variant: Variant, inputs: &Inputs) -> Result<Vec<u16>> {
    match server {
        Server::Worker(worker) => {
            let mut engine = worker.engine(variant, inputs.tokens().max(1))?;
            let layer = first_layer(&engine)?;
            Ok(through(&mut engine, layer, Phase::Prefill, inputs)?)
        }
        Server::Device { device, checkpoint, layer } => {
            checkpoint.check_act(attach(variant, 0).act.to_string().parse()?)?;
            in_process(device, *layer, variant, inputs)
        }
    }
}
