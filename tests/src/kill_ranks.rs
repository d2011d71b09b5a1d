//! `kill-ranks DIR`: ranks of a group in which every expert is on two, killed at random moments, in a table.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reference::layer::Variant;
use tests::group::{Spec, twice};
use tests::kill::{Kill, Target};
use tests::random::Random;
use tests::times::percentile;
use tests::worker_process::Worker;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A case folder.
    dir: PathBuf,
    /// Ranks of the group.
    #[arg(long, default_value_t = 4)]
    ranks: u32,
    /// How often one of them is killed.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// What victims and moments are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Tokens of a step.
const TOKENS: usize = 64;
/// A kill comes within this of the first call; a call takes a fraction of a millisecond.
const LATEST_US: usize = 30_000;

/// The rank that is spared in the second half.
const SURVIVOR: usize = 0;
/// What it may grow by: calls that come first after its start take memory that stays.
const GROWTH_MAX: u64 = 4 << 20;

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { dir, ranks, kills, seed } = options;
    ensure!(*ranks > 1, "--ranks is {ranks}, expected at least 2: nobody would be left");
    let variant = Variant { nvfp4: false, weights_in_combine: false };
    let layers = Worker::start(dir, &[])?.engine(variant, 1)?.layers().to_vec();
    let placement = Some(layers.iter().map(|layer| twice(layer.experts, *ranks)).collect());
    let spec = Spec { ranks: *ranks, placement, options: Vec::new() };
    let mut target = Target::start(dir, &spec, variant, TOKENS)?;
    let mut random = Random::new(*seed);
    let mut all = Vec::new();
    let mut before = target.held(SURVIVOR)?;
    for number in 0..*kills {
        // In the second half one rank survives, to see whether it grows.
        let victim = if number < kills / 2 {
            before = target.held(SURVIVOR)?;
            random.below(*ranks as usize)
        } else {
            SURVIVOR + 1 + random.below(*ranks as usize - 1)
        };
        let after = Duration::from_micros(random.below(LATEST_US) as u64);
        let kill = target.kill(victim, after);
        let kill =
            kill.with_context(|| format!("kill {number} of seed {seed}, after {after:?}"))?;
        ensure!(kill.without.is_some(), "kill {number} of seed {seed}: calls were refused");
        all.push(kill);
    }
    let after = target.held(SURVIVOR)?;
    target.end()?;
    table(*ranks as usize, &all)?;
    let (survived, mib) = (kills - kills / 2, |bytes: u64| bytes as f64 / f64::from(1 << 20));
    let held = format!("{:.1} MiB before, {:.1} MiB after", mib(before), mib(after));
    writeln!(io::stdout(), "rank {SURVIVOR} survived the last {survived}: {held}")?;
    ensure!(after <= before + GROWTH_MAX, "rank {SURVIVOR} grew");
    Ok(())
}

fn table(ranks: usize, kills: &[Kill]) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(
        out,
        "        kills  in announce  in compute   named, ms p50 / max  without it, ms p50 / max  with it, ms p50 / max"
    )?;
    for victim in 0..ranks {
        let of: Vec<&Kill> = kills.iter().filter(|kill| kill.victim == victim).collect();
        let heard = |phase: &str| {
            of.iter().flat_map(|kill| &kill.phases).filter(|heard| *heard == phase).count()
        };
        let named: Vec<_> = of.iter().map(|kill| kill.named).collect();
        let without: Vec<_> = of.iter().filter_map(|kill| kill.without).collect();
        let served: Vec<_> = of.iter().map(|kill| kill.served).collect();
        let (announce, compute) = (heard("announce"), heard("compute"));
        writeln!(
            out,
            "rank {victim} {:>7} {announce:>12} {compute:>11} {:>21} {:>25} {:>22}",
            of.len(),
            spread(&named),
            spread(&without),
            spread(&served)
        )?;
    }
    let answers: usize = kills.iter().map(|kill| kill.answers).sum();
    let kills = kills.len();
    writeln!(
        out,
        "{kills} kills, {answers} answers before them, all right without the victim and with it; no file left"
    )
}

/// Median and largest, in milliseconds.
fn spread(times: &[Duration]) -> String {
    let ms = |percent| 1e3 * percentile(times, percent).as_secs_f64();
    format!("{:.1} / {:.1}", ms(50), ms(100))
}
