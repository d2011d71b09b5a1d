//! `group-calls DIR`: random calls of a group, each answer verified bit for bit.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use reference::layer::Variant;
use tests::group::{Group, Spec, random_placement};
use tests::random::Random;
use tests::traffic::Pool;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with model-nvfp4/ and recorded.safetensors, of the form of tests/data/tiny-kjv-moe.
    dir: PathBuf,
    /// Ranks of the group.
    #[arg(long, default_value_t = 4)]
    ranks: u32,
    /// Calls, a quarter of them in each form.
    #[arg(long, default_value_t = 10_000)]
    calls: usize,
    /// What the calls are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Slots of each rank: enough for replicas on any number of ranks.
const SPARE_SLOTS: usize = 4;
/// Recorded rows that calls draw from.
const ROWS: usize = 256;

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { dir, ranks, calls, seed } = options;
    ensure!(*ranks > 0, "--ranks is 0, expected at least 1");
    let mut random = Random::new(*seed);
    let count = *ranks as usize;
    let layer =
        |_| random_placement(32, count, 32_usize.div_ceil(count) + SPARE_SLOTS, &mut random);
    let placement = Some((0..4).map(layer).collect());
    let spec = Spec { ranks: *ranks, placement, options: Vec::new() };
    let group = Group::start(&dir.join("model-nvfp4"), &spec)?;
    let mut out = io::stdout();
    for variant in Variant::ALL {
        let began = Instant::now();
        let pool = Pool::new(dir, ROWS, variant, *seed)?;
        let prepared = began.elapsed();
        pool.replay(&group, calls / 4, *seed)?;
        let took = began.elapsed() - prepared;
        writeln!(out, "{variant} {} calls verified in {:.1} s", calls / 4, took.as_secs_f64())?;
    }
    writeln!(out, "{ranks} ranks, seed {seed}: every answer right")?;
    Ok(())
}
