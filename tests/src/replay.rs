//! An engine that replays recorded tokens of a real model and holds every answer against the
//! reference: with bf16 activations row by row; with NVFP4 activations, where a single other code is
//! much of a row, in blocks of 64 rows or more. Later answers of a row must have the bits of its
//! first, in whatever batch it comes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use protocol::client::Engine;
use protocol::message::Phase;
use reference::compare::Comparison;
use reference::layer::{Variant, layer_outputs};
use reference::model::Model;

use crate::call::through;
use crate::recorded::{Recorded, RecordedLayer};

/// Tokens of the steps of a round: a prompt, then generation for a few sequences, some of which end.
const STEPS: [(Phase, usize); 14] = [
    (Phase::Prefill, 192),
    (Phase::Decode, 8),
    (Phase::Decode, 8),
    (Phase::Decode, 7),
    (Phase::Decode, 6),
    (Phase::Decode, 5),
    (Phase::Prefill, 96),
    (Phase::Decode, 9),
    (Phase::Decode, 8),
    (Phase::Decode, 4),
    (Phase::Decode, 2),
    (Phase::Decode, 1),
    (Phase::Decode, 1),
    (Phase::Decode, 0),
];

/// Most tokens of a call.
pub const TOKENS_MAX: usize = 192;

/// Fewest rows that say something of NVFP4 activations.
const BLOCK_ROWS: usize = 64;

/// Calls of one layer so far.
#[derive(Debug, Default, Clone)]
pub struct Calls {
    /// How long each took.
    pub times: Vec<Duration>,
    /// Rows of all of them.
    pub tokens: usize,
    /// Rows that were sent to experts, once for each.
    pub assignments: u64,
}

/// Steps of a model.
#[derive(Debug, Default, Clone)]
pub struct Steps {
    /// How long each call took.
    pub times: Vec<Duration>,
    /// Rows of all calls.
    pub tokens: usize,
}

impl Steps {
    /// Those of another engine, too.
    pub fn add(&mut self, other: Self) {
        self.times.extend(other.times);
        self.tokens += other.tokens;
    }
}

/// One layer at work.
#[derive(Debug, Clone)]
struct Layer {
    recorded: RecordedLayer,
    expected: Arc<[u16]>,
    /// The first answer of each row.
    first: Vec<Option<Vec<u16>>>,
    /// Rows that were answered and wait for the rest of their block.
    unverified: Vec<usize>,
    /// Answers that were compared with the reference.
    verified: usize,
    worst: f64,
    calls: Calls,
}

/// A replay of one variant, by one engine.
#[derive(Debug, Clone)]
pub struct Replay {
    variant: Variant,
    layers: BTreeMap<u32, Layer>,
    step: usize,
}

/// What a replay says of a layer.
#[derive(Debug, Clone)]
pub struct LayerReport {
    /// The model's number of the layer.
    pub number: u32,
    /// Its calls.
    pub calls: Calls,
    /// Rows that were compared with the reference.
    pub verified: usize,
    /// Largest relative error: of a row with bf16, of a block with NVFP4 activations.
    pub worst: f64,
}

impl LayerReport {
    /// What another engine did with the layer, too.
    pub fn add(&mut self, other: Self) {
        self.calls.times.extend(other.calls.times);
        self.calls.tokens += other.calls.tokens;
        self.calls.assignments += other.calls.assignments;
        self.verified += other.verified;
        self.worst = self.worst.max(other.worst);
    }
}

impl Replay {
    /// Reads `recorded.safetensors` and `model-nvfp4` of `dir`, and computes what to expect.
    pub fn open(dir: &Path, variant: Variant) -> Result<Self> {
        let model = Model::open(&dir.join("model-nvfp4"))?;
        let recorded = Recorded::open(&dir.join("recorded.safetensors"))?;
        let layer = |recorded: RecordedLayer| -> Result<(u32, Layer)> {
            let number = recorded.number;
            let outputs = layer_outputs(&model, number, &recorded.inputs, &[variant])?;
            let first = vec![None; recorded.inputs.tokens()];
            ensure!(first.len() >= TOKENS_MAX, "layer {number} has {} rows", first.len());
            let expected = outputs.concat().into();
            let (unverified, calls) = (Vec::new(), Calls::default());
            let (verified, worst) = (0, 0.0);
            Ok((number, Layer { recorded, expected, first, unverified, verified, worst, calls }))
        };
        let layers = recorded.layers()?.into_iter().map(layer).collect::<Result<_>>()?;
        Ok(Self { variant, layers, step: 0 })
    }

    /// The part of an engine of a group: the same steps, begun somewhere else.
    #[must_use]
    pub fn part(&self, rank: usize) -> Self {
        // Three steps apart: some have a prompt while others generate.
        Self { step: rank * 3, ..self.clone() }
    }

    /// What it replays.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Makes every kind of step once; what it did.
    pub fn round(&mut self, engine: &mut Engine) -> Result<Steps> {
        let calls = self.layers.values().map(|layer| (layer.calls.times.len(), layer.calls.tokens));
        let before: Vec<(usize, usize)> = calls.collect();
        for _ in STEPS {
            self.step(engine)?;
        }
        let mut steps = Steps::default();
        for (layer, (calls, tokens)) in self.layers.values().zip(before) {
            steps.times.extend(&layer.calls.times[calls..]);
            steps.tokens += layer.calls.tokens - tokens;
        }
        Ok(steps)
    }

    /// Calls every layer once, as a step of a model does; an answer that is wrong is an error.
    pub fn step(&mut self, engine: &mut Engine) -> Result<()> {
        let (phase, tokens) = STEPS[self.step % STEPS.len()];
        for layer in self.layers.values_mut() {
            // 37 has no divisor in common with the steps of a round: every window comes up.
            let windows = layer.recorded.inputs.tokens() - tokens + 1;
            let start = self.step * 37 % windows;
            layer.call(engine, self.variant, phase, start..start + tokens)?;
        }
        self.step += 1;
        Ok(())
    }

    /// Verifies what is left, and reports.
    pub fn finish(mut self) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::new();
        for (number, mut layer) in std::mem::take(&mut self.layers) {
            if !layer.unverified.is_empty() {
                // The last rows are too few for themselves: all that were answered join them.
                layer.verified = 0;
                layer.unverified =
                    (0..layer.first.len()).filter(|&row| layer.first[row].is_some()).collect();
                layer.verify_block(self.variant)?;
            }
            let Layer { calls, verified, worst, .. } = layer;
            reports.push(LayerReport { number, calls, verified, worst });
        }
        Ok(reports)
    }
}

impl Layer {
    fn call(
        &mut self,
        engine: &mut Engine,
        variant: Variant,
        phase: Phase,
        rows: Range<usize>,
    ) -> Result<()> {
        let inputs = self.recorded.inputs.rows(rows.clone());
        let began = Instant::now();
        let output = through(engine, self.recorded.number, phase, &inputs)?;
        self.calls.times.push(began.elapsed());
        self.calls.tokens += rows.len();
        self.calls.assignments += inputs.ids.iter().filter(|id| **id >= 0).count() as u64;
        for (row, answer) in rows.zip(output.chunks_exact(inputs.hidden)) {
            self.take_row(variant, row, answer)?;
        }
        if self.unverified.len() >= BLOCK_ROWS {
            self.verify_block(variant)?;
        }
        Ok(())
    }

    fn take_row(&mut self, variant: Variant, row: usize, answer: &[u16]) -> Result<()> {
        let number = self.recorded.number;
        if let Some(first) = &self.first[row] {
            ensure!(first == answer, "layer {number}: row {row} has other bits than before");
            return Ok(());
        }
        self.first[row] = Some(answer.to_vec());
        if variant.nvfp4 {
            self.unverified.push(row);
            return Ok(());
        }
        let expected = &self.expected[row * answer.len()..][..answer.len()];
        let comparison = Comparison::new(answer, expected);
        self.verified += 1;
        ensure!(comparison.row_passes(), "layer {number}: row {row} is wrong: {comparison}");
        self.worst = self.worst.max(comparison.relative_error);
        Ok(())
    }

    fn verify_block(&mut self, variant: Variant) -> Result<()> {
        let (mut answers, mut expected) = (Vec::new(), Vec::new());
        self.verified += self.unverified.len();
        for row in std::mem::take(&mut self.unverified) {
            let answer = self.first[row].as_deref().unwrap_or_default();
            answers.extend_from_slice(answer);
            expected.extend_from_slice(&self.expected[row * answer.len()..][..answer.len()]);
        }
        let comparison = Comparison::new(&answers, &expected);
        let number = self.recorded.number;
        ensure!(comparison.passes(variant), "layer {number}: a block is wrong: {comparison}");
        self.worst = self.worst.max(comparison.relative_error);
        Ok(())
    }
}
