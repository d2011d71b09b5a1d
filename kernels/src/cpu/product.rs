//! The products of the CPU device: a few blocks of packed rows times the tokens of one expert.
//! Written once over [`Lanes`], which `simd` implements for each instruction set.
//!
//! Every sum runs over k in ascending order, one fused multiply-add a step, whatever the
//! instruction set, the tile or the panel: so all of them give the same bits. The weight itself,
//! code x block scale, is exact in fp32.

use super::layout::{CodeLine, LANES, RowBlock, ScaleLine};
use super::tactic::{CpuTactic, Isa};
use crate::numeric::{BLOCK, E2M1, e4m3_decode};

/// Most tokens of a tile: 12 x 2 sums, 2 weights and the table fill 32 registers well.
pub(super) const TOKEN_TILE_MAX: usize = 12;

/// Most blocks of a strip.
pub(super) const BLOCKS_MAX: usize = 4;

/// How far ahead of their use codes are asked for: the time that memory takes to answer, at the rate
/// at which a core eats the lines of four blocks. With few tokens a call lives on this.
const PREFETCH_CODES: usize = 4096;
/// As far ahead along K as the codes.
const PREFETCH_SCALES: usize = PREFETCH_CODES / 8;

/// One value for each row of a block.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Vector(pub(super) [f32; LANES]);

/// Sixteen lanes of one instruction set. Methods are inlined into a function that enables it.
pub(super) trait Lanes {
    /// A value of each lane.
    type Floats: Copy;
    /// Codes of each lane.
    type Codes: Copy;

    fn zero() -> Self::Floats;
    fn load(from: &Vector) -> Self::Floats;
    fn store(values: Self::Floats, to: &mut Vector);
    fn scales(line: &ScaleLine) -> Self::Floats;
    fn codes(line: &CodeLine) -> Self::Codes;
    /// The value of the lowest code of each lane, times its scale.
    fn weight(codes: Self::Codes, scales: Self::Floats) -> Self::Floats;
    /// Drops the lowest code of each lane.
    fn next(codes: Self::Codes) -> Self::Codes;
    /// `weight * x + sum`, rounded once.
    fn fma(weight: Self::Floats, x: f32, sum: Self::Floats) -> Self::Floats;
    /// Asks for the cache line that lies `ahead` bytes after the start of `bytes`; it need not exist.
    fn prefetch(bytes: &[u8], ahead: usize);
}

/// Rust's own arithmetic.
pub(super) struct Scalar;

impl Lanes for Scalar {
    type Floats = [f32; LANES];
    type Codes = [u32; LANES];

    fn zero() -> Self::Floats {
        [0.0; LANES]
    }

    fn load(from: &Vector) -> Self::Floats {
        from.0
    }

    fn store(values: Self::Floats, to: &mut Vector) {
        to.0 = values;
    }

    fn scales(line: &ScaleLine) -> Self::Floats {
        line.map(e4m3_decode)
    }

    fn codes(line: &CodeLine) -> Self::Codes {
        let mut words = [0; LANES];
        for (word, bytes) in words.iter_mut().zip(line.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    fn weight(codes: Self::Codes, scales: Self::Floats) -> Self::Floats {
        let mut weights = scales;
        for (weight, code) in weights.iter_mut().zip(codes) {
            *weight *= E2M1[code as usize & 15];
        }
        weights
    }

    fn next(codes: Self::Codes) -> Self::Codes {
        codes.map(|word| word >> 4)
    }

    fn fma(weight: Self::Floats, x: f32, sum: Self::Floats) -> Self::Floats {
        let mut sums = sum;
        for (sum, weight) in sums.iter_mut().zip(weight) {
            *sum = weight.mul_add(x, *sum);
        }
        sums
    }

    fn prefetch(_: &[u8], _: usize) {}
}

/// How `rows` tokens are cut into tiles of at most `tile`, as even as possible.
pub(super) fn tiles(rows: usize, tile: usize) -> impl Iterator<Item = usize> {
    let parts = rows.div_ceil(tile).max(1);
    (0..parts).map(move |part| (rows + part) / parts).filter(|&tile| tile > 0).rev()
}

/// One product: `blocks` times the tokens of an expert.
pub(super) struct Strip<'a> {
    pub(super) tactic: CpuTactic,
    /// 2 or 4 blocks.
    pub(super) blocks: &'a [RowBlock<'a>],
    pub(super) rows: usize,
    /// For each tile of [`tiles`], `[cols, tile]` activations.
    pub(super) x: &'a [f32],
}

/// Blocks that a strip of `tactic` should have: with few tokens four, whose independent sums hide
/// the latency of the additions.
pub(super) fn strip_blocks(tactic: &CpuTactic, rows: usize) -> usize {
    let few = if tactic.isa == Isa::Avx2 { 1 } else { 4 };
    if tactic.panel == 0 && rows.min(tactic.token_tile as usize) <= few { BLOCKS_MAX } else { 2 }
}

/// Vectors of scratch that a tactic's panel takes.
pub(super) fn panel_vectors(panel: u32) -> usize {
    panel as usize * 2
}

/// Calls a kernel for a tile whose size is known when it is compiled.
macro_rules! for_tile {
    (@match $tile:expr, $kernel:ident, $lanes:ty, $blocks:tt, $args:tt, $($size:literal)*) => {
        match $tile {
            $($size => for_tile!(@call $kernel, $lanes, $blocks, $size, $args),)*
            tile => unreachable!("no kernel for a tile of {tile} tokens"),
        }
    };
    (@call $kernel:ident, $lanes:ty, $blocks:tt, $size:literal, ($($arg:expr),*)) => {
        $kernel::<$lanes, $blocks, $size>($($arg),*)
    };
    ($tile:expr, $kernel:ident::<$lanes:ty, $blocks:tt>($($arg:expr),*)) => {
        for_tile!(
            @match $tile, $kernel, $lanes, $blocks, ($($arg),*), 1 2 3 4 5 6 7 8 9 10 11 12
        )
    };
}

impl Strip<'_> {
    /// Computes `[rows, blocks]` sums into `out`.
    #[inline(always)]
    pub(super) fn run<L: Lanes>(&self, panel: &mut [Vector], out: &mut [Vector]) {
        let cols = self.blocks[0].scales.len() * BLOCK;
        assert_eq!(self.x.len(), self.rows * cols, "activations of a strip");
        assert_eq!(out.len(), self.rows * self.blocks.len(), "sums of a strip");
        match (self.tactic.panel as usize, self.blocks) {
            (0, [a, b]) => self.direct::<L, 2>(&[*a, *b], cols, out),
            (0, [a, b, c, d]) => self.direct::<L, 4>(&[*a, *b, *c, *d], cols, out),
            (width, [a, b]) => self.panels::<L>(&[*a, *b], width, panel, out),
            (_, blocks) => unreachable!("a strip has 2 or 4 blocks, got {}", blocks.len()),
        }
    }

    #[inline(always)]
    fn direct<L: Lanes, const B: usize>(
        &self,
        blocks: &[RowBlock<'_>; B],
        cols: usize,
        out: &mut [Vector],
    ) {
        let (mut x, mut out) = (self.x, out);
        for tile in tiles(self.rows, self.tactic.token_tile as usize) {
            let (tile_x, rest) = x.split_at(tile * cols);
            let (tile_out, rest_out) = out.split_at_mut(tile * B);
            (x, out) = (rest, rest_out);
            for_tile!(tile, direct::<L, B>(blocks, tile_x, tile_out));
        }
    }

    #[inline(always)]
    fn panels<L: Lanes>(
        &self,
        blocks: &[RowBlock<'_>; 2],
        width: usize,
        panel: &mut [Vector],
        out: &mut [Vector],
    ) {
        let cols = blocks[0].scales.len() * BLOCK;
        out.fill(Vector::default());
        for first in (0..cols).step_by(width) {
            let width = width.min(cols - first);
            let panel = &mut panel[..width * 2];
            decode::<L, 2>(blocks, first / BLOCK, panel);
            let (mut done, mut out) = (0, &mut *out);
            for tile in tiles(self.rows, self.tactic.token_tile as usize) {
                let tile_x = &self.x[done * cols + first * tile..][..width * tile];
                let (tile_out, rest) = out.split_at_mut(tile * 2);
                (done, out) = (done + tile, rest);
                for_tile!(tile, multiply::<L, 2>(panel, tile_x, tile_out));
            }
        }
    }
}

/// Decodes in registers; sums stay in registers over all of K.
#[inline(always)]
fn direct<L: Lanes, const B: usize, const T: usize>(
    blocks: &[RowBlock<'_>; B],
    x: &[f32],
    out: &mut [Vector],
) {
    let mut sums = [[L::zero(); B]; T];
    for (group, x) in x.as_chunks::<T>().0.as_chunks::<BLOCK>().0.iter().enumerate() {
        let mut scales = [L::zero(); B];
        for (scales, block) in scales.iter_mut().zip(blocks) {
            *scales = L::scales(&block.scales[group]);
            L::prefetch(&block.scales[group], PREFETCH_SCALES);
            L::prefetch(&block.codes[group][0], PREFETCH_CODES);
            L::prefetch(&block.codes[group][1], PREFETCH_CODES);
        }
        for (half, x) in x.as_chunks::<8>().0.iter().enumerate() {
            let mut codes = [L::codes(&blocks[0].codes[group][half]); B];
            for (codes, block) in codes.iter_mut().zip(blocks).skip(1) {
                *codes = L::codes(&block.codes[group][half]);
            }
            for x in x {
                let mut weights = [L::zero(); B];
                for b in 0..B {
                    weights[b] = L::weight(codes[b], scales[b]);
                    codes[b] = L::next(codes[b]);
                }
                add::<L, B, T>(&mut sums, &weights, x);
            }
        }
    }
    for (sums, out) in sums.iter().zip(out.as_chunks_mut::<B>().0) {
        for (sum, out) in sums.iter().zip(out) {
            L::store(*sum, out);
        }
    }
}

/// One step along K: adds the products of every weight with every token.
#[inline(always)]
fn add<L: Lanes, const B: usize, const T: usize>(
    sums: &mut [[L::Floats; B]; T],
    weights: &[L::Floats; B],
    x: &[f32; T],
) {
    for (sums, x) in sums.iter_mut().zip(x) {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum = L::fma(*weight, *x, *sum);
        }
    }
}

/// Decodes columns from block of 16 `first` on into `panel`, `[cols, B]`.
#[inline(always)]
fn decode<L: Lanes, const B: usize>(
    blocks: &[RowBlock<'_>; B],
    first: usize,
    panel: &mut [Vector],
) {
    for (group, panel) in panel.as_chunks_mut::<B>().0.chunks_exact_mut(BLOCK).enumerate() {
        for (b, block) in blocks.iter().enumerate() {
            let scales = L::scales(&block.scales[first + group]);
            for (half, panel) in panel.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let mut codes = L::codes(&block.codes[first + group][half]);
                for vectors in panel {
                    L::store(L::weight(codes, scales), &mut vectors[b]);
                    codes = L::next(codes);
                }
            }
        }
    }
}

/// Adds the products of a decoded panel to the sums.
#[inline(always)]
fn multiply<L: Lanes, const B: usize, const T: usize>(
    panel: &[Vector],
    x: &[f32],
    out: &mut [Vector],
) {
    let out = out.as_chunks_mut::<B>().0;
    let mut sums = [[L::zero(); B]; T];
    for (sums, out) in sums.iter_mut().zip(&*out) {
        for (sum, out) in sums.iter_mut().zip(out) {
            *sum = L::load(out);
        }
    }
    for (panel, x) in panel.as_chunks::<B>().0.iter().zip(x.as_chunks::<T>().0) {
        let mut weights = [L::zero(); B];
        for (weight, panel) in weights.iter_mut().zip(panel) {
            *weight = L::load(panel);
        }
        add::<L, B, T>(&mut sums, &weights, x);
    }
    for (sums, out) in sums.iter().zip(out) {
        for (sum, out) in sums.iter().zip(out) {
            L::store(*sum, out);
        }
    }
}
