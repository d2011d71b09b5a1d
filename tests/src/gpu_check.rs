//! `gpu-check DIR`: the CUDA device against the golden cases, and against the CPU device on recorded
//! tokens in batches of every size; each call twice, bit for bit.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use kernels::cuda::{Awaited, CudaDevice, CudaOptions, CudaTactic, default_cache};
use kernels::device::Device;
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant};
use tests::call::in_process;
use tests::case::{self, Case};
use tests::recorded::Recorded;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with moe-golden/ and tiny-kjv-moe/, of the form of tests/data.
    dir: PathBuf,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Leave the trained model out: for tools under which everything is slow.
    #[arg(long)]
    golden_only: bool,
    /// Compile the code of which tools that look for races see all of the order.
    #[arg(long)]
    every_lane_arrives: bool,
}

/// Batches of recorded tokens: none a multiple of anything, and tiles that are full.
const BATCHES: [usize; 9] = [1, 2, 3, 7, 8, 9, 33, 64, 301];

pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut counts = [0, 0];
    for tactic in CudaTactic::ALL {
        let cuda = CudaOptions {
            every_lane_arrives: options.every_lane_arrives,
            tactic: Some(tactic),
            // Tools under which everything is slow make blocks wait.
            deadline: Duration::from_secs(if options.golden_only { 600 } else { 2 }),
            ..CudaOptions::new(options.gpu, default_cache())
        };
        check(options, &cuda, tactic.name(), &mut counts)?;
    }
    if !options.golden_only {
        give_up(options, &mut counts)?;
    }
    let [failed, passed] = counts;
    writeln!(io::stdout(), "{passed} passed, {failed} failed")?;
    Ok(failed == 0 && passed > 0)
}

/// Everything with one tactic; counts what failed and what passed.
fn check(options: &Options, cuda: &CudaOptions, tactic: &str, counts: &mut [u32; 2]) -> Result<()> {
    let mut out = io::stdout();
    for dir in case::find(&options.dir.join("moe-golden"))? {
        for (variant, comparison) in golden(&dir, cuda).with_context(|| case::name(&dir))? {
            let passes = comparison.passes(variant);
            let word = if passes { "pass" } else { "FAIL" };
            writeln!(out, "{tactic:<8} {:<28} {variant} {comparison}: {word}", case::name(&dir))?;
            counts[usize::from(passes)] += 1;
        }
    }
    let model = (!options.golden_only).then(|| options.dir.join("tiny-kjv-moe"));
    for (what, worst, same) in model.map_or(Ok(Vec::new()), |dir| batches(&dir, cuda))? {
        let word = if same { "pass" } else { "FAIL" };
        writeln!(
            out,
            "{tactic:<8} {what}: relative error {worst:.2e} beside the cpu device: {word}"
        )?;
        counts[usize::from(same)] += 1;
    }
    Ok(())
}

/// Launches in which something is never said: they end, say what they waited for, and the GPU can be used further.
fn give_up(options: &Options, counts: &mut [u32; 2]) -> Result<()> {
    let mut out = io::stdout();
    let cases = case::find(&options.dir.join("moe-golden"))?;
    let cases = cases.iter().map(|dir| Case::open(dir)).collect::<Result<Vec<_>>>()?;
    let case = cases.iter().max_by_key(|case| case.inputs.tokens()).context("no case")?;
    let checkpoint = Checkpoint::open(&case.dir)?;
    let variant = Variant { nvfp4: false, weights_in_combine: true };
    let expected = case.expected(variant)?;
    let deadline = Duration::from_millis(50);
    let right = |device: &mut CudaDevice, tokens: usize| -> Result<bool> {
        let output = twice(device, 0, variant, &case.inputs.rows(0..tokens))?;
        let expected = &expected[..tokens * case.inputs.hidden];
        Ok(Comparison::new(&output, expected).passes(variant))
    };
    for (awaited, says) in [
        (Awaited::Order, "the order of the call's pairs"),
        (Awaited::GateUp, "FC1 of expert"),
        (Awaited::Others, "the end of other blocks' work"),
    ] {
        let base = CudaOptions::new(options.gpu, default_cache());
        let tactic = Some(CudaTactic::Streamed);
        let cuda = CudaOptions { tactic, deadline, withheld: Some(awaited), ..base.clone() };
        let mut device = CudaDevice::alone(&cuda, &checkpoint)?;
        // In a call of few places nobody waits for their order.
        for tokens in [1, case.inputs.tokens()] {
            let began = Instant::now();
            let waits = awaited != Awaited::Order || tokens * case.inputs.top_k > 32;
            let said = |device: &mut CudaDevice| {
                let answer = in_process(device, 0, variant, &case.inputs.rows(0..tokens));
                answer.err().is_some_and(|error| format!("{error:#}").contains(says))
            };
            let passes = match waits {
                true => said(&mut device) && said(&mut device),
                false => right(&mut device, tokens)?,
            };
            let passes = passes && right(&mut CudaDevice::alone(&base, &checkpoint)?, tokens)?;
            let word = if passes { "pass" } else { "FAIL" };
            let ms = began.elapsed().as_millis();
            writeln!(
                out,
                "without {awaited:?}, {tokens} tokens: ended and right again in {ms} ms: {word}"
            )?;
            counts[usize::from(passes)] += 1;
        }
    }
    Ok(())
}

fn golden(dir: &Path, cuda: &CudaOptions) -> Result<Vec<(Variant, Comparison)>> {
    let (case, checkpoint) = (Case::open(dir)?, Checkpoint::open(dir)?);
    let mut device = CudaDevice::alone(cuda, &checkpoint)?;
    let compare = |variant| {
        let output = twice(&mut device, 0, variant, &case.inputs)?;
        Ok((variant, Comparison::new(&output, &case.expected(variant)?)))
    };
    Variant::ALL.into_iter().map(compare).collect()
}

/// One call, made twice.
fn twice(
    device: &mut dyn Device,
    layer: u32,
    variant: Variant,
    inputs: &Inputs,
) -> Result<Vec<u16>> {
    let first = in_process(device, layer, variant, inputs)?;
    let second = in_process(device, layer, variant, inputs)?;
    ensure!(first == second, "layer {layer} {variant}: two calls differ in bits");
    Ok(first)
}

/// Every layer and variant of the trained model: near the CPU device, and the same bits for a row in
/// every batch.
fn batches(dir: &Path, cuda: &CudaOptions) -> Result<Vec<(String, f64, bool)>> {
    let checkpoint = Checkpoint::open(&dir.join("model-nvfp4"))?;
    let recorded = Recorded::open(&dir.join("recorded.safetensors"))?;
    let mut gpu = CudaDevice::alone(cuda, &checkpoint)?;
    let mut cpu = CpuDevice::alone(CpuOptions::default(), &checkpoint, 1 << 16)?;
    let mut lines = Vec::new();
    for layer in recorded.layers()? {
        for variant in Variant::ALL {
            let whole = twice(&mut gpu, layer.number, variant, &layer.inputs)?;
            let expected = in_process(&mut cpu, layer.number, variant, &layer.inputs)?;
            let comparison = Comparison::new(&whole, &expected);
            let mut same = comparison.passes(variant);
            for tokens in BATCHES {
                let rows = layer.inputs.tokens() - tokens..layer.inputs.tokens();
                let inputs = layer.inputs.rows(rows.clone());
                let part = twice(&mut gpu, layer.number, variant, &inputs)?;
                same &= part == whole[rows.start * inputs.hidden..];
            }
            let what = format!("layer {} {variant}", layer.number);
            lines.push((what, comparison.relative_error, same));
        }
    }
    Ok(lines)
}
