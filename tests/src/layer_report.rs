//! `layer-report DIR`: what quantisation costs. Recorded activations of a model run through its NVFP4
//! layers, and the outputs compared with those that the unquantised model gave.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use reference::compare::Comparison;
use reference::layer::Variant;
use tests::call::in_process;
use tests::recorded::Recorded;

/// Most tokens that a recording may have.
const TOKENS_MAX: u32 = 1 << 16;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with model-nvfp4/ and recorded.safetensors, of the form of tests/data/tiny-kjv-moe.
    dir: PathBuf,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let recorded = Recorded::open(&options.dir.join("recorded.safetensors"))?;
    let checkpoint = Checkpoint::open(&options.dir.join("model-nvfp4"))?;
    let mut device = CpuDevice::alone(CpuOptions::default(), &checkpoint, TOKENS_MAX)?;
    let mut out = io::stdout();
    writeln!(out, "relative difference from the unquantised model's MoE output")?;
    writeln!(out, "layer  tokens  act=bf16  act=nvfp4")?;
    for layer in recorded.layers()? {
        let mut differences = Vec::new();
        for nvfp4 in [false, true] {
            let variant = Variant { nvfp4, weights_in_combine: false };
            let output = in_process(&mut device, layer.number, variant, &layer.inputs)?;
            differences.push(Comparison::new(&output, &layer.unquantised).relative_error);
        }
        let (number, tokens) = (layer.number, layer.inputs.tokens());
        writeln!(
            out,
            "{number:>5}  {tokens:>6}  {:>8.4}  {:>9.4}",
            differences[0], differences[1]
        )?;
    }
    Ok(())
}
