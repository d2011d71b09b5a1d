//! `memory`: what ranks hold in memory while they load a large checkpoint, and when they have served
//! calls of every layer, beside what they may.

use std::io::{self, Write};

use ::tests::group::{Group, Spec, call_all};
use ::tests::plan::Shape;
use ::tests::random::Random;
use ::tests::synthetic::Pool;
use anyhow::{Context, Result, ensure};
use half::bf16;
use kernels::checkpoint::Checkpoint;
use kernels::cpu::slot_bytes;
use kernels::heap::{HeapLayout, HeapShape};
use reference::layer::{Inputs, Variant};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Size of the checkpoint, written to the temporary folder.
    #[arg(long, default_value_t = 10)]
    gib: u64,
    /// Ranks of the groups.
    #[arg(long, value_delimiter = ',', default_value = "1,4")]
    ranks: Vec<u32>,
}

/// Layers of 648 MiB.
const SHAPE: Shape = Shape { experts: 64, hidden: 4096, intermediate: 1536, clamp: None };
const TOP_K: u32 = 8;
/// Tokens of a rank's call.
const TOKENS: u32 = 64;
/// What a rank may hold beyond its slots and the heap: its program, threads, scratch, the buffer of
/// its engine.
const BEYOND: u64 = 150 << 20;

/// True if no rank held more than it may.
pub(crate) fn run(options: &Options) -> Result<bool> {
    ensure!((1..1024).contains(&options.gib), "--gib is {}, expected 1 to 1023", options.gib);
    let weights = 3 * u64::from(SHAPE.experts * SHAPE.hidden) * u64::from(SHAPE.intermediate);
    let layer_bytes = weights / 2 + weights / 16;
    let layers = u32::try_from((options.gib << 30).div_ceil(layer_bytes))?;
    let mut out = io::stdout();
    writeln!(out, "{layers} layers of {} MiB", mib(layer_bytes))?;
    writeln!(out, "MiB, of the largest rank    slots   heap    held may hold    peak may peak")?;
    let folder = Pool::new(1).write(&SHAPE, (layers, TOP_K), 1)?;
    let checkpoint = Checkpoint::open(folder.path())?;
    let mut fits = true;
    for &ranks in &options.ranks {
        let options = vec!["--max-tokens".to_owned(), TOKENS.to_string()];
        let spec = Spec { ranks, placement: None, options };
        let group = Group::start(folder.path(), &spec)?;
        let loaded = group.workers.iter().map(|worker| Ok(worker.resident()?.peak));
        let peak = largest(loaded)?;
        call_every_layer(&group, layers)?;
        let held = largest(group.workers.iter().map(|worker| Ok(worker.resident()?.held())))?;
        let slots = u64::from(SHAPE.experts.div_ceil(ranks));
        let of_layer = |layer: &kernels::checkpoint::MoeLayer| slots * slot_bytes(&layer.shape);
        let slots: u64 = checkpoint.layers().iter().map(of_layer).sum();
        let shape = HeapShape::of_group(ranks, TOKENS, checkpoint.layers());
        let heap = HeapLayout::new(shape).bytes() * u64::from(ranks);
        let may_hold = slots + heap + BEYOND;
        let may_peak = may_hold + layer_bytes;
        let fit = held <= may_hold && peak <= may_peak;
        let figures = [slots, heap, held, may_hold, peak, may_peak].map(mib);
        let [slots, heap, held, may_hold, peak, may_peak] = figures;
        let verdict = if fit { "pass" } else { "FAIL" };
        writeln!(
            out,
            "{ranks} ranks {slots:>24} {heap:>6} {held:>7} {may_hold:>8} {peak:>7} {may_peak:>8} {verdict}"
        )?;
        fits &= fit;
    }
    Ok(fits)
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn largest(figures: impl Iterator<Item = Result<u64>>) -> Result<u64> {
    let figures = figures.collect::<Result<Vec<_>>>()?;
    figures.into_iter().max().context("a group without ranks")
}

/// One call of every layer in each activation format, as many tokens on every rank as fit.
fn call_every_layer(group: &Group, layers: u32) -> Result<()> {
    let ranks = group.workers.len();
    let tokens = TOKENS as usize * ranks;
    let inputs = inputs(tokens);
    let share = |rank| rank * TOKENS as usize..(rank + 1) * TOKENS as usize;
    let shares: Vec<_> = (0..ranks).map(share).collect();
    for nvfp4 in [false, true] {
        let variant = Variant { nvfp4, weights_in_combine: false };
        let mut engines = group.engines(variant, TOKENS as usize)?;
        for layer in 0..layers {
            call_all(&mut engines, layer, &inputs, &shares)?;
        }
    }
    Ok(())
}

/// Normal numbers, each token to experts drawn for it.
fn inputs(tokens: usize) -> Inputs {
    let mut random = Random::new(2);
    let (hidden, top_k) = (SHAPE.hidden as usize, TOP_K as usize);
    let x = (0..tokens * hidden).map(|_| bf16::from_f32(random.normal()).to_bits()).collect();
    let mut experts: Vec<i32> = (0..).take(SHAPE.experts as usize).collect();
    let mut ids = Vec::with_capacity(tokens * top_k);
    for _ in 0..tokens {
        random.shuffle(&mut experts);
        ids.extend_from_slice(&experts[..top_k]);
    }
    Inputs { hidden, top_k, x, ids, weights: vec![0.125; tokens * top_k] }
}
