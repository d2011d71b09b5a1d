//! `moeplane-simulate`: many seeds, and what happened in them.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use simulator::{Model, Plant, Run, simulate};

/// Simulates groups of ranks and their control, one seed after the other.
#[derive(Parser)]
struct Options {
    /// How many seeds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Something wrong that is to be found.
    #[arg(long)]
    plant: Option<Plant>,
}

fn main() -> Result<ExitCode> {
    let Options { seeds, first, plant } = Options::parse();
    let (model, began, mut out) = (Model::new()?, Instant::now(), io::stdout());
    let (mut found, mut traces, mut total) = (0, 0_u64, [0; 8]);
    for seed in first..first + seeds {
        let Run { trace, counts, wrong } = simulate(&model, seed, plant)?;
        traces = traces.rotate_left(1) ^ trace;
        let c = counts;
        let counts = [
            c.answered,
            c.refused,
            c.repeated,
            c.rank_kills,
            c.control_kills,
            c.cuts,
            c.commits,
            c.flips,
        ];
        total.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        if let Some(wrong) = wrong {
            found += 1;
            writeln!(out, "seed {seed}: {wrong:#}")?;
        }
    }
    let [answered, refused, repeated, ranks, control, cuts, commits, flips] = total;
    writeln!(
        out,
        "{seeds} seeds, {found} with something wrong, {:.1} s",
        began.elapsed().as_secs_f64()
    )?;
    writeln!(
        out,
        "steps: {answered} answered, {refused} refused for lost experts, {repeated} repeated"
    )?;
    writeln!(out, "killed: {ranks} ranks, control {control} times, {cuts} sessions")?;
    writeln!(out, "placements: {commits} committed, {flips} came to be in force on a rank")?;
    writeln!(out, "trace {traces:016x}")?;
    Ok(ExitCode::from(u8::from(found > 0)))
}
