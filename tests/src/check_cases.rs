//! `check-cases DIR`: every case folder under DIR, in the forms asked for, compared with the outputs
//! that the case records.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions, Isa};
use kernels::problem::{ActFormat, WeightsIn};
use reference::compare::Comparison;
use reference::layer::Variant;
use tests::case::{self, Case};
use tests::in_process;

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
}

impl Options {
    fn variants(&self) -> impl Iterator<Item = Variant> {
        Variant::ALL.into_iter().filter(|&variant| {
            let form = in_process::form(variant);
            self.act.is_none_or(|act| act == form.act)
                && self.weights_in.is_none_or(|place| place == form.weights_in)
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
    fn line(&mut self, what: &str, passed: bool) {
        println!("{what}: {}", if passed { "pass" } else { "FAIL" });
        *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
    }
}

/// True when all passed and there was at least one.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut tally = Tally::default();
    for dir in case::find(&options.dir)? {
        let name = case::name(&dir);
        match open(&dir, options) {
            Ok((case, layer, mut device)) => {
                for variant in options.variants() {
                    let name = format!("{name:<28} {variant}");
                    match check(&case, layer, &mut device, variant) {
                        Ok(comparison) => {
                            let passes = comparison.passes(variant);
                            tally.line(&format!("{name} {comparison}"), passes);
                        }
                        Err(error) => tally.line(&format!("{name} {error:#}"), false),
                    }
                }
            }
            Err(error) => tally.line(&format!("{name:<28} {error:#}"), false),
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(tally.failed == 0 && tally.passed > 0)
}

fn open(dir: &Path, options: &Options) -> Result<(Case, u32, CpuDevice)> {
    let case = Case::open(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let layer = checkpoint.layers().first().context("the checkpoint has no MoE layer")?.number;
    let device_options = CpuOptions { isa: options.isa, ..CpuOptions::default() };
    let device = CpuDevice::with_checkpoint(device_options, &checkpoint)?;
    Ok((case, layer, device))
}

fn check(case: &Case, layer: u32, device: &mut CpuDevice, variant: Variant) -> Result<Comparison> {
    let expected = case.expected(variant)?;
    let output = in_process::call(device, layer, variant, &case.inputs)?;
    Ok(Comparison::new(&output, &expected))
}
