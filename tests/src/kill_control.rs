//! `kill-control DIR`: control killed at random moments of migrations under load, in a table.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::control_kills::{ControlKill, kill};
use tests::moving::Moving;
use tests::random::Random;
use tests::times::percentile;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The folder of the trained model.
    dir: PathBuf,
    /// How often control is killed.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// What moments are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { dir, kills, seed } = options;
    let mut moving = Moving::start(dir)?;
    let mut random = Random::new(*seed);
    let mut by_step: BTreeMap<String, Vec<ControlKill>> = BTreeMap::new();
    for number in 0..*kills {
        let killed = kill(&mut moving, &mut random);
        let killed = killed.with_context(|| format!("kill {number} of seed {seed}"))?;
        by_step.entry(killed.step.clone()).or_default().push(killed);
    }
    let mut out = io::stdout();
    writeln!(
        out,
        "killed at     kills  answered   steps   settled after the restart, ms p50 / max"
    )?;
    for (step, kills) in &by_step {
        let step = if step.is_empty() { "in force" } else { step };
        let answered = kills.iter().filter(|kill| kill.answered).count();
        let steps: usize = kills.iter().map(|kill| kill.steps).sum();
        let settled: Vec<Duration> = kills.iter().map(|kill| kill.settled).collect();
        let ms = |percent| 1e3 * percentile(&settled, percent).as_secs_f64();
        let count = kills.len();
        let (p50, max) = (ms(50), ms(100));
        writeln!(out, "{step:<12} {count:>6} {answered:>9} {steps:>7} {p50:>25.0} / {max:.0}")?;
    }
    let steps = moving.traffic.steps;
    Ok(writeln!(
        out,
        "{kills} kills, {steps} steps of all layers, every answer the same to the bit"
    )?)
}
