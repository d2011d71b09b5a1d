//! `check-cases DIR`: every case folder under DIR, in the forms asked for, compared with the outputs
//! that the case records.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions, Isa};
use protocol::message::{ActFormat, Phase, WeightsIn};
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant};
use tests::call::{attach, first_layer, in_process, through};
use tests::case::{self, Case};
use tests::group::{Group, Spec, call_all, random_placement, uneven};
use tests::random::Random;
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
    /// What computes: cpu or cuda.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Ranks of the group that answers; every case runs with experts in order and with a random
    /// placement that has replicas.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// Call the device in this process instead of a worker.
    #[arg(long)]
    in_process: bool,
}

impl Options {
    fn placements(&self) -> &'static [Place] {
        if self.ranks > 1 { &[Place::InOrder, Place::Random] } else { &[Place::Alone] }
    }

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
    ensure!(options.ranks > 0, "--ranks is 0, expected at least 1");
    let both = options.in_process && options.ranks > 1;
    let elsewhere = options.in_process && options.device != "cpu";
    ensure!(!elsewhere, "--in-process is the cpu device, --device asks for {}", options.device);
    ensure!(!both, "--in-process is one rank, --ranks asks for {}", options.ranks);
    let mut tally = Tally::default();
    for dir in case::find(&options.dir)? {
        let name = case::name(&dir);
        for &placement in options.placements() {
            let name = format!("{name:<28} {placement}");
            match open(&dir, options, placement) {
                Ok((case, server)) => all_variants(options, &name, (&case, server), &mut tally)?,
                Err(error) => tally.line(&format!("{name} {error:#}"), false)?,
            }
        }
    }
    writeln!(io::stdout(), "{} passed, {} failed", tally.passed, tally.failed)?;
    Ok(tally.failed == 0 && tally.passed > 0)
}

fn all_variants(
    options: &Options,
    name: &str,
    (case, mut server): (&Case, Server),
    tally: &mut Tally,
) -> io::Result<()> {
    for variant in options.variants() {
        let name = format!("{name}{variant}");
        match check(case, &mut server, variant) {
            Ok(comparison) => {
                tally.line(&format!("{name} {comparison}"), comparison.passes(variant))?;
            }
            Err(error) => tally.line(&format!("{name} {error:#}"), false)?,
        }
    }
    Ok(())
}

/// Where experts are.
#[derive(Clone, Copy)]
enum Place {
    /// On the rank that is alone.
    Alone,
    /// In order over the ranks; those that do not divide leave empty slots.
    InOrder,
    /// Anywhere, with replicas and empty slots.
    Random,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Alone => "",
            Self::InOrder => "in-order ",
            Self::Random => "replicas ",
        })
    }
}

/// Whoever answers calls.
enum Server {
    Group(Group),
    Worker(Worker),
    Device { device: Box<CpuDevice>, checkpoint: Checkpoint, layer: u32 },
}

fn open(dir: &Path, options: &Options, place: Place) -> Result<(Case, Server)> {
    let case = Case::open(dir)?;
    let isa = options.isa.map(|isa| isa.to_string());
    let mut arguments: Vec<&str> = isa.iter().flat_map(|isa| ["--isa", isa.as_str()]).collect();
    arguments.extend(["--device", &options.device]);
    if options.ranks > 1 {
        let placement = matches!(place, Place::Random).then(|| placement(dir, options.ranks));
        let spec = Spec {
            ranks: options.ranks,
            placement: placement.transpose()?,
            options: arguments.into_iter().map(str::to_owned).collect(),
        };
        return Ok((case, Server::Group(Group::start(dir, &spec)?)));
    }
    if !options.in_process {
        return Ok((case, Server::Worker(Worker::start(dir, &arguments)?)));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let layer = checkpoint.layers().first().context("the checkpoint has no MoE layer")?.number;
    let tokens = u32::try_from(case.inputs.tokens())?;
    let device_options = CpuOptions { isa: options.isa, ..CpuOptions::default() };
    let device = Box::new(CpuDevice::alone(device_options, &checkpoint, tokens)?);
    Ok((case, Server::Device { device, checkpoint, layer }))
}

/// A random placement of every layer, two slots a rank beyond what the experts need.
fn placement(dir: &Path, ranks: u32) -> Result<Vec<Vec<i64>>> {
    let (checkpoint, mut random) = (Checkpoint::open(dir)?, Random::new(7));
    let layers = checkpoint.layers().iter().map(|layer| {
        let slots = layer.shape.experts.div_ceil(ranks) + 2;
        let [experts, ranks, slots] = [layer.shape.experts, ranks, slots].map(|n| n as usize);
        random_placement(experts, ranks, slots, &mut random)
    });
    Ok(layers.collect())
}

fn check(case: &Case, server: &mut Server, variant: Variant) -> Result<Comparison> {
    let expected = case.expected(variant)?;
    let output = answer(server, variant, &case.inputs)?;
    Ok(Comparison::new(&output, &expected))
}

fn answer(server: &mut Server, variant: Variant, inputs: &Inputs) -> Result<Vec<u16>> {
    match server {
        Server::Group(group) => {
            let mut engines = group.engines(variant, inputs.tokens().max(1))?;
            let shares = uneven(inputs.tokens(), engines.len());
            let layer = first_layer(&engines[0])?;
            call_all(&mut engines, layer, inputs, &shares)
        }
        Server::Worker(worker) => {
            let mut engine = worker.engine(variant, inputs.tokens().max(1))?;
            let layer = first_layer(&engine)?;
            Ok(through(&mut engine, layer, Phase::Prefill, inputs)?)
        }
        Server::Device { device, checkpoint, layer } => {
            checkpoint.check_act(attach(variant, 0).act.to_string().parse()?)?;
            in_process(&mut **device, *layer, variant, inputs)
        }
    }
}
