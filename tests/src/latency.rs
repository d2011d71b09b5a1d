//! `latency DIR`: how long a call of the small trained model takes, in this process, through one
//! worker, and through groups; and what a group's protocol costs alone, in calls without tokens.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use ::tests::call::{InProcess, call_of, through};
use ::tests::group::{Group, Spec, together};
use ::tests::recorded::{Recorded, RecordedLayer};
use ::tests::times::percentile;
use ::tests::worker_process::Worker;
use anyhow::{Result, ensure};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use protocol::client::Engine;
use protocol::message::Phase;
use reference::layer::{Inputs, Variant};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with model-nvfp4/ and recorded.safetensors, of the form of tests/data/tiny-kjv-moe.
    dir: PathBuf,
    /// Calls of each figure.
    #[arg(long, default_value_t = 4000)]
    calls: usize,
    /// Ranks of the groups.
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    ranks: Vec<u32>,
}

/// Tokens of a call.
const TOKENS: [usize; 3] = [0, 1, 64];
/// Calls before the first that counts, as a share of those that do.
const WARM: usize = 10;
const VARIANT: Variant = Variant { nvfp4: false, weights_in_combine: false };

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(options.calls > 0, "--calls is 0, expected at least 1");
    let model = options.dir.join("model-nvfp4");
    let layers = Recorded::open(&options.dir.join("recorded.safetensors"))?.layers()?;
    let mut out = io::stdout();
    writeln!(out, "us p50 / p99 of {} calls, layers by turns, act=bf16", options.calls)?;
    let head = TOKENS.map(|tokens| format!("{:>18}", format!("T = {tokens}"))).concat();
    writeln!(out, "{:<28}{head}", "")?;

    let checkpoint = Checkpoint::open(&model)?;
    let mut device = CpuDevice::alone(CpuOptions::default(), &checkpoint, 64)?;
    let mut cells = Vec::new();
    for tokens in TOKENS {
        let calls = inputs(&layers, tokens);
        let calls = calls.iter().map(|(layer, inputs)| InProcess::new(*layer, VARIANT, inputs));
        let calls = calls.collect::<Result<Vec<_>>>()?;
        cells.push(measure(options.calls, |n| Ok(calls[n % calls.len()].run(&mut device)?))?);
    }
    row("in process", &cells)?;

    let worker = Worker::start(&model, &[])?;
    let mut engine = worker.engine(VARIANT, 64)?;
    row("1 rank", &with_one_engine(options, &layers, &mut engine)?)?;
    drop(engine);
    drop(worker);

    for &ranks in &options.ranks {
        let group = Group::start(&model, &Spec { ranks, ..Spec::default() })?;
        let mut engine = group.workers[0].engine(VARIANT, 64)?;
        let cells = with_one_engine(options, &layers, &mut engine)?;
        row(&format!("{ranks} ranks, one engine"), &cells)?;
        drop(engine);
        let mut engines = group.engines(VARIANT, 64)?;
        let cells = with_all_engines(options, &layers, &mut engines)?;
        row(&format!("{ranks} ranks, T on every rank"), &cells)?;
    }
    Ok(())
}

fn row(name: &str, cells: &[[Duration; 2]]) -> io::Result<()> {
    let us = |time: Duration| 1e6 * time.as_secs_f64();
    let cell =
        |&[p50, p99]: &[Duration; 2]| format!("{:>18}", format!("{:.1} / {:.1}", us(p50), us(p99)));
    let cells: String = cells.iter().map(cell).collect();
    writeln!(io::stdout(), "{name:<28}{cells}")
}

/// `tokens` recorded rows of each layer.
fn inputs(layers: &[RecordedLayer], tokens: usize) -> Vec<(u32, Inputs)> {
    layers.iter().map(|layer| (layer.number, layer.inputs.rows(0..tokens))).collect()
}

/// p50 and p99 of `call`, which is told its number.
fn measure(calls: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<[Duration; 2]> {
    (0..calls / WARM).try_for_each(&mut call)?;
    let mut times = Vec::with_capacity(calls);
    for number in 0..calls {
        let began = Instant::now();
        call(number)?;
        times.push(began.elapsed());
    }
    Ok([50, 99].map(|percent| percentile(&times, percent)))
}

/// Each number of tokens, on the rank of one engine; others join by themselves.
fn with_one_engine(
    options: &Options,
    layers: &[RecordedLayer],
    engine: &mut Engine,
) -> Result<Vec<[Duration; 2]>> {
    let figures = TOKENS.map(|tokens| {
        let inputs = inputs(layers, tokens);
        through(engine, inputs[0].0, Phase::Decode, &inputs[0].1)?;
        // The rows of the first layer serve all: their values are of no matter to the time.
        measure(options.calls, |number| {
            let (layer, inputs) = &inputs[number % inputs.len()];
            Ok(engine.call(call_of(*layer, Phase::Decode, inputs))?)
        })
    });
    figures.into_iter().collect()
}

/// The same with an engine on every rank, all of which bring as many tokens; of the slowest rank.
fn with_all_engines(
    options: &Options,
    layers: &[RecordedLayer],
    engines: &mut [Engine],
) -> Result<Vec<[Duration; 2]>> {
    let barrier = Barrier::new(engines.len());
    let ranks = together(engines, |engine| {
        barrier.wait();
        with_one_engine(options, layers, engine)
    });
    let ranks = ranks.into_iter().collect::<Result<Vec<_>>>()?;
    let slowest = |at: usize| {
        [0, 1].map(|figure| ranks.iter().map(|rank| rank[at][figure]).max().unwrap_or_default())
    };
    Ok((0..TOKENS.len()).map(slowest).collect())
}
