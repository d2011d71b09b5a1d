//! `conformance FILE`: the 24 functional shapes, then the 59 cases of the original system's test plan,
//! through real workers. The last line counts the 59.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use tests::plan::{Plan, PlannedCase};
use tests::shape_cases::{by_shape, run as run_shape};
use tests::synthetic::Pool;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The cases, of the form of tests/data/cases.json.
    file: PathBuf,
    /// Only cases whose name begins so, for example S59 or M.
    #[arg(long, default_value = "")]
    only: String,
    /// What computes: cpu or cuda. GPUs serve alone: on them multi-rank cases are left out, and
    /// functional shapes run on one rank.
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// True when all passed and there was at least one.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let began = Instant::now();
    let Plan { mut seed, mut functional } = Plan::read(&options.file)?;
    for cases in [&mut seed, &mut functional] {
        cases.retain(|case| case.id.starts_with(&options.only));
    }
    ensure!(!(seed.is_empty() && functional.is_empty()), "no case is called {}…", options.only);
    if options.device == "cuda" {
        let all = seed.len();
        seed.retain(|case| case.ranks == 1);
        functional.iter_mut().for_each(|case| case.ranks = 1);
        let left_out = all - seed.len();
        writeln!(io::stdout(), "{left_out} multi-rank cases are left out: GPUs serve alone")?;
    }
    let pool = Pool::new(1);
    let mut passed = true;
    for (what, cases) in [("functional shapes", &functional), ("cases", &seed)] {
        if cases.is_empty() {
            continue;
        }
        let [good, bad] = run_cases(&pool, cases, &options.device)?;
        passed &= bad == 0;
        writeln!(io::stdout(), "{what} after {:.0} s:", began.elapsed().as_secs_f64())?;
        writeln!(io::stdout(), "{good} passed, {bad} failed")?;
    }
    Ok(passed)
}

/// How many passed and failed.
fn run_cases(pool: &Pool, cases: &[PlannedCase], device: &str) -> Result<[usize; 2]> {
    let mut counts = [0, 0];
    for list in by_shape(cases) {
        run_shape(pool, &list, device, |verdict| {
            counts[usize::from(!verdict.passed)] += 1;
            Ok(writeln!(io::stdout(), "{}", verdict.line)?)
        })?;
    }
    Ok(counts)
}
