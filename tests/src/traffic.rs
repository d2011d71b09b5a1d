//! Random calls of a group, each answer verified: uneven and empty shares, rows without experts,
//! skewed routing, idle engines and ranks without one.
//!
//! A row's bits do not depend on what shares its batch, nor on ranks and placements. So every row of
//! a pool is computed once on a device in this process, compared with the reference, and each answer
//! of the group compared with that, bit for bit.

use std::ops::Range;
use std::path::Path;
use std::sync::Barrier;

use anyhow::{Context, Result, ensure};
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use protocol::client::Engine;
use protocol::message::Phase;
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant, layer_outputs};
use reference::model::Model;

use crate::call::{in_process, through};
use crate::group::{Group, together};
use crate::random::Random;
use crate::recorded::Recorded;

/// Most tokens of an engine's call.
pub const TOKENS_MAX: usize = 48;
/// Numbers of tokens that are drawn from: many calls are small, many ranks have nothing.
const TOKENS: [usize; 10] = [0, 0, 0, 1, 1, 2, 5, 8, 20, TOKENS_MAX];
/// Calls between two changes of who is idle.
const CALLS_A_TURN: usize = 40;

/// Rows and what they must give, for each layer.
#[derive(Debug)]
pub struct Pool {
    layers: Vec<(u32, Inputs, Vec<u16>)>,
    variant: Variant,
}

impl Pool {
    /// Recorded rows as they are, with places masked, and with all tokens at few experts.
    pub fn new(dir: &Path, rows: usize, variant: Variant, seed: u64) -> Result<Self> {
        let folder = dir.join("model-nvfp4");
        let (model, checkpoint) = (Model::open(&folder)?, Checkpoint::open(&folder)?);
        let recorded = Recorded::open(&dir.join("recorded.safetensors"))?;
        let mut device = CpuDevice::alone(CpuOptions::default(), &checkpoint, 3 * 1024)?;
        let mut random = Random::new(seed);
        let mut layers = Vec::new();
        for layer in recorded.layers()? {
            let inputs = varied(&layer.inputs.rows(0..rows), &mut random);
            let output = in_process(&mut device, layer.number, variant, &inputs)?;
            let expected = layer_outputs(&model, layer.number, &inputs, &[variant])?.concat();
            let comparison = Comparison::new(&output, &expected);
            ensure!(comparison.passes(variant), "layer {}: {comparison}", layer.number);
            layers.push((layer.number, inputs, output));
        }
        Ok(Self { layers, variant })
    }

    /// Makes `calls` calls with all ranks of the group; an answer that is wrong is an error.
    pub fn replay(&self, group: &Group, calls: usize, seed: u64) -> Result<()> {
        let count = group.workers.len();
        let barrier = Barrier::new(count);
        let replay = |rank| self.replay_rank(group, rank, (calls, seed), &barrier);
        together(0..count, replay).into_iter().collect()
    }

    fn replay_rank(
        &self,
        group: &Group,
        rank: usize,
        (calls, seed): (usize, u64),
        barrier: &Barrier,
    ) -> Result<()> {
        let count = group.workers.len();
        let mut state = State::Detached;
        let mut outcome = Ok(());
        for turn in 0..calls.div_ceil(CALLS_A_TURN) {
            // Whoever failed goes on meeting the others, or they would wait.
            if outcome.is_ok() {
                outcome = self.take_seat(group, rank, (turn, seed), &mut state);
            }
            barrier.wait();
            if outcome.is_ok() {
                outcome = self.take_turn((rank, count), (turn, seed), &mut state);
            }
            barrier.wait();
        }
        outcome.with_context(|| format!("rank {rank}, seed {seed}"))
    }

    /// Makes the rank's engine what the turn's plan says: calling, idle, or away.
    fn take_seat(
        &self,
        group: &Group,
        rank: usize,
        (turn, seed): (usize, u64),
        state: &mut State,
    ) -> Result<()> {
        let seat = seats(group.workers.len(), turn, seed)[rank];
        if seat == Seat::Away {
            *state = State::Detached;
            return Ok(());
        }
        if matches!(state, State::Detached) {
            let engine = group.workers[rank].engine(self.variant, TOKENS_MAX)?;
            *state = State::Attached(Box::new(engine));
        }
        if let State::Attached(engine) = state {
            engine.set_idle(seat == Seat::Idle)?;
        }
        Ok(())
    }

    fn take_turn(
        &self,
        (rank, ranks): (usize, usize),
        (turn, seed): (usize, u64),
        state: &mut State,
    ) -> Result<()> {
        let State::Attached(engine) = state else { return Ok(()) };
        // All ranks draw the same layers, each its own rows.
        let mut shared = Random::new(seed ^ (turn as u64) << 20);
        let mut own = Random::new(seed ^ (turn as u64) << 20 ^ (rank as u64 + 1) << 50);
        if seats(ranks, turn, seed)[rank] != Seat::Calling {
            return Ok(());
        }
        for call in 0..CALLS_A_TURN {
            let (number, inputs, expected) = &self.layers[shared.below(self.layers.len())];
            let tokens = own.pick(&TOKENS);
            let first = own.below(inputs.tokens() - tokens + 1);
            let rows = first..first + tokens;
            let output = through(engine, *number, Phase::Decode, &inputs.rows(rows.clone()))
                .with_context(|| format!("turn {turn}, call {call}, layer {number}"))?;
            let expected = &expected[rows.start * inputs.hidden..rows.end * inputs.hidden];
            ensure!(output == expected, "turn {turn}, call {call}: wrong bits in rows {rows:?}");
        }
        Ok(())
    }
}

/// A rank's engine during a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seat {
    Calling,
    Idle,
    Away,
}

enum State {
    Detached,
    Attached(Box<Engine>),
}

/// Who does what in a turn: most call, and one of the first two always does.
fn seats(ranks: usize, turn: usize, seed: u64) -> Vec<Seat> {
    let mut random = Random::new(seed.wrapping_add(turn as u64 * 7919));
    let mut seats: Vec<Seat> = (0..ranks)
        .map(|_| match random.below(6) {
            0 => Seat::Idle,
            1 => Seat::Away,
            _ => Seat::Calling,
        })
        .collect();
    seats[turn % ranks.min(2)] = Seat::Calling;
    seats
}

/// The rows three times: as they are, with some places masked, and all at four experts.
fn varied(inputs: &Inputs, random: &mut Random) -> Inputs {
    let mut all = inputs.clone();
    for variation in [masked, skewed] {
        let varied = variation(inputs, random);
        all.x.extend(varied.x);
        all.ids.extend(varied.ids);
        all.weights.extend(varied.weights);
    }
    all
}

fn masked(inputs: &Inputs, random: &mut Random) -> Inputs {
    let mut masked = inputs.clone();
    for ids in masked.ids.chunks_mut(inputs.top_k) {
        let all: Range<usize> = 0..inputs.top_k;
        match random.below(4) {
            0 => ids.fill(-1),
            _ => all.filter(|_| random.below(3) == 0).for_each(|place| ids[place] = -1),
        }
    }
    masked
}

fn skewed(inputs: &Inputs, random: &mut Random) -> Inputs {
    let mut skewed = inputs.clone();
    for ids in skewed.ids.chunks_mut(inputs.top_k) {
        for (id, place) in ids.iter_mut().zip(0..) {
            *id = place;
        }
        random.shuffle(ids);
    }
    skewed
}
