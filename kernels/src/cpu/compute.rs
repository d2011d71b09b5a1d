//! The products of a call: FC1 with its activation, and FC2, over all of this rank's slots that have
//! tokens. Terms go to the ranks that the tokens came from.
//!
//! The pairs of a slot are cut into units. Units run in waves whose unpacked activations fit the
//! scratch, four passes a wave: unpack tokens, FC1 with the activation, transpose the intermediate,
//! FC2. A pass is a list of tasks, run by the pool, or by the calling thread where the call is
//! small. Neither tiles nor tasks nor threads change the order of any sum.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;
use rayon::ThreadPool;
use rayon::prelude::*;

use super::activate::Activation;
use super::dispatch::{Incoming, Pair, RowScratch};
use super::layout::{LANES, Matrix, RowBlock, matrices};
use super::product::{BLOCKS_MAX, Strip, Vector, panel_vectors, strip_blocks, tiles};
use super::tactic::CpuTactic;
use super::{CpuDevice, Layer, simd};
use crate::heap::TermAt;
use crate::memory::bytes_of;
use crate::problem::{Form, LayerShape};

/// Most rows of a unit: their sums and a panel's share of their activations stay in the second
/// level cache.
const UNIT_ROWS: usize = 256;

/// Tasks of a pass for each thread, so that a slow one does not hold up the rest.
const TASKS_PER_THREAD: usize = 4;

/// Unpacked activations of a wave; what does not fit runs in a further wave.
const WAVE_BYTES: usize = 64 << 20;

/// Multiplications below which a call stays on the calling thread: waking the pool takes longer
/// than it saves.
const SMALL_CALL: usize = 1 << 20;

/// Memory that calls share one after the other.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// For each tile of rows `[hidden, tile]`.
    x: Vec<f32>,
    /// For each task of FC1 `[rows, columns]`.
    intermediate: Vec<bf16>,
    /// For each tile of rows `[intermediate, tile]`.
    y: Vec<f32>,
    threads: Threads,
}

/// One scratch for each thread, each locked by its thread alone.
#[derive(Debug, Default)]
struct Threads(Vec<Mutex<ThreadScratch>>);

/// Memory of one thread.
#[derive(Debug, Default)]
pub(super) struct ThreadScratch {
    panel: Vec<Vector>,
    sums: Vec<Vector>,
    row: RowScratch,
    terms: Vec<bf16>,
    term_sums: Vec<f32>,
}

impl ThreadScratch {
    /// Memory for a row on its way to the wire or from it.
    pub(super) fn row(&mut self) -> &mut RowScratch {
        &mut self.row
    }

    /// A row of terms and a row of sums.
    pub(super) fn combine_rows(&mut self, hidden: usize) -> (&mut [bf16], &mut [f32]) {
        (grown(&mut self.terms, hidden), grown(&mut self.term_sums, hidden))
    }
}

impl Scratch {
    pub(super) fn new(threads: usize) -> Self {
        let threads = Threads((0..threads).map(|_| Mutex::default()).collect());
        Self { threads, ..Self::default() }
    }

    /// Whether a call with this many pairs is worth waking the pool.
    pub(super) fn is_parallel(&self, pairs: usize, shape: &LayerShape) -> bool {
        let expert = 3 * shape.hidden as usize * shape.intermediate as usize;
        self.threads.0.len() > 1 && pairs * expert > SMALL_CALL
    }

    /// Runs `task` for every element of `tasks`.
    pub(super) fn for_each<T: Send>(
        &self,
        pool: &ThreadPool,
        parallel: bool,
        tasks: Vec<T>,
        task: impl Fn(T, &mut ThreadScratch) + Sync,
    ) {
        self.threads.for_each(pool, parallel, tasks, task);
    }
}

impl Threads {
    fn for_each<T: Send>(
        &self,
        pool: &ThreadPool,
        parallel: bool,
        tasks: Vec<T>,
        task: impl Fn(T, &mut ThreadScratch) + Sync,
    ) {
        if parallel && tasks.len() > 1 {
            pool.install(|| tasks.into_par_iter().for_each(|t| task(t, &mut self.own())));
        } else {
            let mut scratch = self.own();
            tasks.into_iter().for_each(|t| task(t, &mut scratch));
        }
    }

    fn own(&self) -> MutexGuard<'_, ThreadScratch> {
        let index = rayon::current_thread_index().unwrap_or(0);
        // Scratch holds nothing between tasks that a panic could have left half done.
        self.0[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Chunks of `values` with their numbers.
pub(super) fn chunks_of<T>(values: &mut [T], length: usize) -> Vec<(usize, &mut [T])> {
    values.chunks_mut(length).enumerate().collect()
}

/// Pairs of one slot that run together.
struct Unit<'a> {
    pairs: &'a [Pair],
    tactic: CpuTactic,
    fc1: Matrix<'a>,
    fc2: Matrix<'a>,
    activation: Activation,
    /// Tasks that each product is cut into.
    parts: usize,
}

impl Unit<'_> {
    fn tiles(&self) -> impl Iterator<Item = usize> {
        tiles(self.pairs.len(), self.tactic.token_tile as usize)
    }

    /// Blocks `0..blocks` in ranges of whole strips of four, one for each task.
    fn ranges(&self, blocks: usize) -> impl Iterator<Item = Range<usize>> {
        let length = blocks.div_ceil(self.parts).next_multiple_of(BLOCKS_MAX);
        (0..blocks).step_by(length).map(move |first| first..blocks.min(first + length))
    }
}

/// One task of a product: a range of blocks of one unit, and what it reads and writes.
struct Task<'a, O> {
    unit: &'a Unit<'a>,
    blocks: Range<usize>,
    x: &'a [f32],
    out: O,
}

/// What all passes of a call share.
struct Passes<'a> {
    device: &'a CpuDevice,
    layer: &'a Layer,
    form: Form,
    /// Of every expert; by default each gets one by its tokens.
    tactic: Option<CpuTactic>,
    incoming: &'a Incoming,
    parallel: bool,
}

impl CpuDevice {
    /// Computes the terms of all pairs.
    pub(super) fn compute(
        &self,
        (layer, form, tactic): (&Layer, Form, Option<CpuTactic>),
        incoming: &Incoming,
        s: &mut Scratch,
    ) {
        let shape = layer.shape;
        let parallel = s.is_parallel(incoming.pairs(), &shape);
        let passes = Passes { device: self, layer, form, tactic, incoming, parallel };
        let row_bytes = shape.hidden as usize * size_of::<f32>()
            + shape.intermediate as usize * (size_of::<bf16>() + size_of::<f32>());
        let wave_rows = (WAVE_BYTES / row_bytes).max(1);
        let units = incoming.by_slot().flat_map(|(slot, pairs)| {
            pairs.chunks(UNIT_ROWS.min(wave_rows)).map(move |pairs| (slot, pairs))
        });
        let mut units = units.peekable();
        while units.peek().is_some() {
            let (mut wave, mut rows) = (Vec::new(), 0);
            while let Some((slot, pairs)) =
                units.next_if(|(_, pairs)| rows + pairs.len() <= wave_rows)
            {
                rows += pairs.len();
                wave.push(passes.unit(slot, pairs));
            }
            let tasks =
                if parallel { TASKS_PER_THREAD * self.pool.current_num_threads() } else { 1 };
            for unit in &mut wave {
                unit.parts = (tasks * unit.pairs.len()).div_ceil(rows);
            }
            passes.gate_up(&wave, rows, s);
            passes.down(&wave, rows, s);
        }
    }
}

impl Passes<'_> {
    fn unit<'a>(&'a self, slot: usize, pairs: &'a [Pair]) -> Unit<'a> {
        let Self { device, form, layer, .. } = self;
        let slot = layer.held.slots[slot].as_ref().expect("pairs of empty slots are refused");
        let [fc1, fc2] = matrices(&slot.bytes, &layer.shape);
        let scalars = slot.scalars.products(form.act, layer.in13);
        let scalars = scalars.expect("a call is refused where a layer lacks scales");
        let heuristic = || CpuTactic::heuristic(device.isa, pairs.len());
        Unit {
            pairs,
            tactic: self.tactic.unwrap_or_else(heuristic),
            fc1,
            fc2,
            activation: Activation { scalars, swiglu: layer.shape.swiglu, form: *form },
            parts: 1,
        }
    }

    /// Unpacks the tokens of a wave, then runs FC1 and the activation.
    fn gate_up(&self, wave: &[Unit<'_>], rows: usize, scratch: &mut Scratch) {
        let Scratch { x, intermediate, threads, .. } = scratch;
        let shape = &self.layer.shape;
        let (hidden, columns) = (shape.hidden as usize, shape.intermediate as usize);
        let x = grown(x, rows * hidden);
        let mut rest = &mut *x;
        let mut tiles = Vec::new();
        for unit in wave {
            let mut pairs = unit.pairs;
            for tile in unit.tiles() {
                let (tile_pairs, later) = pairs.split_at(tile);
                tiles.push((tile_pairs, take(&mut rest, tile * hidden)));
                pairs = later;
            }
        }
        let pool = &self.device.pool;
        threads.for_each(pool, self.parallel, tiles, |(pairs, tile), _| {
            let row = |pair: &Pair| &self.incoming.values[pair.row as usize * hidden..][..hidden];
            unpack(pairs.iter().map(row), tile);
        });
        let (mut x, mut rest) = (&*x, grown(intermediate, rows * columns));
        let mut tasks = Vec::new();
        for unit in wave {
            let (unit_x, later) = x.split_at(unit.pairs.len() * hidden);
            for blocks in unit.ranges(unit.fc1.blocks()) {
                let out = take(&mut rest, unit.pairs.len() * blocks.len() * LANES / 2);
                tasks.push(Task { unit, blocks, x: unit_x, out });
            }
            x = later;
        }
        threads.for_each(pool, self.parallel, tasks, |task, scratch| {
            run_gate_up(task, scratch);
            self.device.group.heap().advance();
        });
    }

    /// Transposes the intermediate of a wave, then runs FC2 and writes its terms.
    fn down(&self, wave: &[Unit<'_>], rows: usize, scratch: &mut Scratch) {
        let Scratch { intermediate, y, threads, .. } = scratch;
        let columns = self.layer.shape.intermediate as usize;
        let y = grown(y, rows * columns);
        let (mut rest, mut from) = (&mut *y, intermediate.as_slice());
        let mut tiles = Vec::new();
        for unit in wave {
            let (unit_from, later) = from.split_at(unit.pairs.len() * columns);
            let mut first = 0;
            for tile in unit.tiles() {
                let out = take(&mut rest, tile * columns);
                tiles.push((unit, unit_from, first..first + tile, out));
                first += tile;
            }
            from = later;
        }
        let pool = &self.device.pool;
        threads.for_each(pool, self.parallel, tiles, |(unit, from, rows, tile), _| {
            transpose(unit, from, rows, tile);
        });
        let mut x = &*y;
        let mut tasks = Vec::new();
        for unit in wave {
            let (unit_x, later) = x.split_at(unit.pairs.len() * columns);
            let ranges = unit.ranges(unit.fc2.blocks());
            tasks.extend(ranges.map(|blocks| Task { unit, blocks, x: unit_x, out: () }));
            x = later;
        }
        threads.for_each(pool, self.parallel, tasks, |task, scratch| {
            self.run_down(&task, scratch);
            self.device.group.heap().advance();
        });
    }

    fn run_down(&self, task: &Task<'_, ()>, scratch: &mut ThreadScratch) {
        let (unit, hidden) = (task.unit, self.layer.shape.hidden);
        let group = &self.device.group;
        let fc2_alpha = unit.activation.scalars.fc2_alpha;
        let mut terms = [bf16::ZERO; BLOCKS_MAX * LANES];
        for_each_strip(unit, &unit.fc2, task, scratch, |first, width, sums| {
            for (pair, sums) in unit.pairs.iter().zip(sums.chunks(width)) {
                for (terms, sums) in terms.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                    *terms = sums.0.map(|sum| bf16::from_f32(fc2_alpha * sum));
                }
                let column = (first * LANES) as u32;
                let Pair { source, token, place, top_k, .. } = *pair;
                let offset = group.layout().term(TermAt { token, place, top_k, hidden }, column);
                group.heap().write(source, offset, bytes_of(&terms[..width * LANES]));
            }
        });
    }
}

/// Lays rows out as `[hidden, rows]` in fp32.
fn unpack<'a>(rows: impl ExactSizeIterator<Item = &'a [bf16]>, tile: &mut [f32]) {
    let width = rows.len();
    for (place, row) in rows.enumerate() {
        for (line, value) in tile.chunks_exact_mut(width).zip(row) {
            line[place] = value.to_f32();
        }
    }
}

fn run_gate_up(task: Task<'_, &mut [bf16]>, scratch: &mut ThreadScratch) {
    let Task { unit, blocks, x, out } = task;
    let columns = blocks.len() * LANES / 2;
    let first_block = blocks.start;
    let task = Task { unit, blocks, x, out: () };
    for_each_strip(unit, &unit.fc1, &task, scratch, |first, width, sums| {
        let column = (first - first_block) * LANES / 2;
        let rows = unit.pairs.iter().zip(out.chunks_exact_mut(columns)).zip(sums.chunks(width));
        for ((pair, out), sums) in rows {
            let halves = out[column..].as_chunks_mut::<LANES>().0.iter_mut();
            for (out, [gate, up]) in halves.zip(sums.as_chunks::<2>().0) {
                *out = unit.activation.apply(gate, up, pair.weight);
            }
        }
    });
}

/// Multiplies the blocks of a task, strip by strip; `then` gets the first block of the strip, its
/// number of blocks, and the sums `[rows, blocks]`.
fn for_each_strip(
    unit: &Unit<'_>,
    matrix: &Matrix<'_>,
    task: &Task<'_, ()>,
    scratch: &mut ThreadScratch,
    mut then: impl FnMut(usize, usize, &[Vector]),
) {
    let (rows, tactic) = (unit.pairs.len(), unit.tactic);
    let ThreadScratch { panel, sums, .. } = scratch;
    let panel = grown(panel, panel_vectors(tactic.panel));
    let widest = strip_blocks(&tactic, rows);
    let mut first = task.blocks.start;
    while first < task.blocks.end {
        // Both matrices have an even number of blocks: a strip of two always fits.
        let width = if task.blocks.end - first < widest { 2 } else { widest };
        let blocks: [RowBlock<'_>; BLOCKS_MAX] =
            std::array::from_fn(|b| matrix.block(first + b.min(width - 1)));
        let sums = grown(sums, rows * width);
        let strip = Strip { tactic, blocks: &blocks[..width], rows, x: task.x };
        simd::run(&strip, panel, sums);
        then(first, width, sums);
        first += width;
    }
}

/// Gathers rows `rows` of a unit's intermediate from the outputs of its FC1 tasks into
/// `[intermediate, rows]`.
fn transpose(unit: &Unit<'_>, from: &[bf16], rows: Range<usize>, tile: &mut [f32]) {
    let all = unit.pairs.len();
    let (mut from, mut tile) = (from, tile);
    for blocks in unit.ranges(unit.fc1.blocks()) {
        let columns = blocks.len() * LANES / 2;
        let (task, later) = from.split_at(all * columns);
        let part = take(&mut tile, rows.len() * columns);
        let task_rows = &task[rows.start * columns..rows.end * columns];
        unpack(task_rows.chunks_exact(columns), part);
        from = later;
    }
}

/// The first `length` elements of scratch that only ever grows.
fn grown<T: Copy + Default>(scratch: &mut Vec<T>, length: usize) -> &mut [T] {
    if scratch.len() < length {
        scratch.resize(length, T::default());
    }
    &mut scratch[..length]
}

/// Splits the first `length` elements off.
fn take<'a, T>(rest: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (first, later) = std::mem::take(rest).split_at_mut(length);
    *rest = later;
    first
}
