//! `demo`: a worker on the small trained checkpoint, and an engine that replays real activations
//! and verifies every answer.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use reference::layer::Variant;
use tests::replay::{LayerReport, Replay, TOKENS_MAX};
use tests::times::percentile;
use tests::worker_process::Worker;

/// Time between two progress lines.
const PROGRESS: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with model-nvfp4/ and recorded.safetensors, of the form of tests/data/tiny-kjv-moe.
    dir: PathBuf,
    /// Seconds of replay, half of them for each activation format.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// What computes: cpu or cuda.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// A short run: two seconds.
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let seconds = if options.once { 2.0 } else { options.seconds };
    ensure!(seconds > 0.0 && seconds.is_finite(), "--seconds is {seconds}, expected more than 0");
    let mut out = io::stdout();
    let variants = [false, true].map(|nvfp4| Variant { nvfp4, weights_in_combine: false });
    let worker = Worker::start(&options.dir.join("model-nvfp4"), &["--device", &options.device])?;
    let mut reports = Vec::new();
    for variant in variants {
        let mut replay = Replay::open(&options.dir, variant)?;
        let mut engine = worker.engine(variant, TOKENS_MAX)?;
        if reports.is_empty() {
            let welcome = engine.welcome();
            writeln!(out, "{}: {} on {}", welcome.worker, welcome.model, welcome.device)?;
        }
        let mut progress = Progress::new(variant);
        let began = Instant::now();
        while began.elapsed().as_secs_f64() < seconds / 2.0 {
            replay.step(&mut engine)?;
            progress.show(&replay, &mut out)?;
        }
        progress.end(&mut out)?;
        reports.push((variant, replay.finish()?));
    }
    table(&reports, &mut out)
}

/// The live line.
struct Progress {
    variant: Variant,
    shown: Instant,
    /// Calls of each layer, and tokens of all, when it was last shown.
    calls: Vec<usize>,
    tokens: usize,
    on_terminal: bool,
}

impl Progress {
    fn new(variant: Variant) -> Self {
        let (calls, on_terminal) = (Vec::new(), io::stdout().is_terminal());
        Self { variant, shown: Instant::now(), calls, tokens: 0, on_terminal }
    }

    fn show(&mut self, replay: &Replay, out: &mut impl Write) -> Result<()> {
        let passed = self.shown.elapsed();
        if passed < PROGRESS {
            return Ok(());
        }
        let layers = replay.progress();
        self.calls.resize(layers.len(), 0);
        let latest = layers.iter().zip(&self.calls).flat_map(|(calls, &seen)| &calls.times[seen..]);
        let latest: Vec<Duration> = latest.copied().collect();
        let tokens: usize = layers.iter().map(|calls| calls.tokens).sum();
        let verified: usize = layers.iter().map(|calls| calls.times.len()).sum();
        let rate = |count: usize| count as f64 / passed.as_secs_f64();
        let [p50, p99] = percentiles(&latest);
        let line = format!(
            "act={:<5} {:>7.0} calls/s {:>8.0} tokens/s  p50 {p50:>6} us  p99 {p99:>6} us  \
             {verified:>8} calls verified",
            self.variant.act(),
            rate(latest.len()),
            rate(tokens - self.tokens),
        );
        let (before, after) = if self.on_terminal { ("\r", "") } else { ("", "\n") };
        write!(out, "{before}{line}{after}")?;
        out.flush()?;
        self.calls = layers.iter().map(|calls| calls.times.len()).collect();
        (self.shown, self.tokens) = (Instant::now(), tokens);
        Ok(())
    }

    fn end(&self, out: &mut impl Write) -> Result<()> {
        if self.on_terminal {
            writeln!(out)?;
        }
        Ok(())
    }
}

/// p50 and p99 in microseconds.
fn percentiles(times: &[Duration]) -> [u128; 2] {
    [50, 99].map(|percent| percentile(times, percent).as_micros())
}

fn table(reports: &[(Variant, Vec<LayerReport>)], out: &mut impl Write) -> Result<()> {
    writeln!(
        out,
        "act    layer    calls    tokens  p50 us  p99 us  rows verified  worst relative error"
    )?;
    let mut total = 0;
    for (variant, layers) in reports {
        for LayerReport { number, calls, verified, worst } in layers {
            let [p50, p99] = percentiles(&calls.times);
            let (act, count) = (variant.act(), calls.times.len());
            let of = if variant.nvfp4 { "block" } else { "row" };
            writeln!(
                out,
                "{act:<5} {number:>6} {count:>8} {:>9} {p50:>7} {p99:>7} {verified:>14}  {worst:.2e} of a {of}",
                calls.tokens
            )?;
            ensure!(*verified > 0, "no row of layer {number} was verified");
            total += count;
        }
    }
    writeln!(out, "{total} calls verified, 0 wrong")?;
    Ok(())
}
