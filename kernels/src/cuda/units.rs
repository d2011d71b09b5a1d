//! Derived bytes of an expert on the GPU: the order in which tensor cores take weights
//! (`kernels/cuda/layout/unit.cuh`). A pure function of the expert's raw bytes.
//!
//! A tile is 16 rows; a step is 64 of its columns; a unit is one step, or four where the columns
//! divide by 256. Lane (g, c) has block c of rows g and g + 8 of each step. Up to 16 tiles make a row
//! block, which streams as one: the units of its tiles for the same columns lie side by side.
//!
//! ```text
//! matrix [row blocks][units][tiles of the block] unit
//! unit   codes  [steps][32 lanes][2 pairs of words]   pair s: elements 8s..8s+7 of rows g and g + 8
//!        scales [32 lanes][steps][2]         of row g, of row g + 8
//! ```

use crate::expert::{RawExpert, RawProjection};
use crate::numeric::BLOCK;
use crate::problem::LayerShape;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a step.
const STEP_COLUMNS: usize = 64;
/// Blocks of a step: one for each lane of a quarter.
const STEP_BLOCKS: usize = STEP_COLUMNS / BLOCK;
const STEP_CODE_BYTES: usize = 512;
const STEP_SCALE_BYTES: usize = 64;
const WIDE_STEPS: usize = 4;
/// Tiles of a row block.
const BLOCK_TILES: usize = 16;

/// Exponent of the factor by which what a unit decodes to is too small.
pub(super) const UNSCALE_EXPONENT: i32 = 38;

/// Where a pair of words, the even one in the lower half of 64 bits, has the bits of its codes: for
/// each word pair 0 of row g, pair 0 of row g + 8, pair 1 of row g, pair 1 of row g + 8, the even
/// element first; for each code (sign, exponent, exponent, mantissa). The device brings them to bits
/// 15, 8, 7, 6 of a half: by a mask, a shift by 4, a rotation by 10; and what is left of both words by
/// a selection of their rotations by 6 and 8, and a shift of that.
const CODE_BITS: [[u32; 4]; 16] = [
    [15, 8, 7, 6],
    [31, 24, 23, 22],
    [11, 4, 3, 2],
    [27, 20, 19, 18],
    [5, 30, 29, 28],
    [21, 14, 13, 12],
    [9, 32, 1, 0],
    [25, 32 + 16, 17, 16],
    [32 + 15, 32 + 8, 32 + 7, 32 + 6],
    [32 + 31, 32 + 24, 32 + 23, 32 + 22],
    [32 + 11, 32 + 4, 32 + 3, 32 + 2],
    [32 + 27, 32 + 20, 32 + 19, 32 + 18],
    [32 + 5, 32 + 30, 32 + 29, 32 + 28],
    [32 + 21, 32 + 14, 32 + 13, 32 + 12],
    [32 + 1, 32 + 26, 32 + 25, 26],
    [32 + 17, 32 + 10, 32 + 9, 10],
];

/// Steps of a matrix with so many columns; the last may be padded with zeros.
fn steps(columns: usize) -> usize {
    columns.div_ceil(STEP_COLUMNS)
}

/// Steps of a unit.
fn unit_steps(columns: usize) -> usize {
    if columns.is_multiple_of(WIDE_STEPS * STEP_COLUMNS) { WIDE_STEPS } else { 1 }
}

/// Bytes of a unit.
fn unit_bytes(columns: usize) -> usize {
    unit_steps(columns) * (STEP_CODE_BYTES + STEP_SCALE_BYTES)
}

/// Bytes of a tile.
fn tile_bytes(columns: usize) -> usize {
    steps(columns) / unit_steps(columns) * unit_bytes(columns)
}

/// Bytes of an expert's FC1 and FC2.
pub(super) fn expert_bytes(layer: &LayerShape) -> [usize; 2] {
    let (h, i) = (layer.hidden as usize, layer.intermediate as usize);
    [2 * i / TILE_ROWS * tile_bytes(h), h / TILE_ROWS * tile_bytes(i)]
}

/// A row of a projection.
#[derive(Clone, Copy)]
struct Row<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
}

impl<'a> Row<'a> {
    fn new(raw: &RawProjection<'a>, row: usize) -> Self {
        let (codes, scales) = (raw.cols / 2, raw.cols / BLOCK);
        Self {
            codes: &raw.codes[row * codes..][..codes],
            scales: &raw.scales[row * scales..][..scales],
        }
    }

    /// Code of `column`; zero where the block's scale is, and past the end.
    fn code(&self, column: usize) -> u32 {
        let Some(&byte) = self.codes.get(column / 2) else { return 0 };
        if self.scales[column / BLOCK] & 0x7f == 0 {
            return 0;
        }
        u32::from(byte >> (4 * (column % 2)) & 15)
    }

    fn scale(&self, block: usize) -> u8 {
        self.scales.get(block).map_or(0, |&bits| e5m3(bits))
    }
}

/// Writes the derived bytes of an expert: a tile of FC1 has 8 rows of gate and the same 8 of up, so
/// that one lane gets both.
pub(super) fn derive(expert: &RawExpert<'_>, [fc1, fc2]: [&mut [u8]; 2]) {
    let RawExpert { gate, up, down } = expert;
    let half = TILE_ROWS / 2;
    derive_matrix(gate.cols, fc1, |tile, row| match row {
        row if row < half => Row::new(gate, tile * half + row),
        row => Row::new(up, tile * half + row - half),
    });
    derive_matrix(down.cols, fc2, |tile, row| Row::new(down, tile * TILE_ROWS + row));
}

/// Writes a matrix whose tile `tile` has row `row(tile, 0..16)`.
fn derive_matrix<'a>(columns: usize, bytes: &mut [u8], row: impl Fn(usize, usize) -> Row<'a>) {
    let unit = unit_bytes(columns);
    for (block, bytes) in bytes.chunks_mut(BLOCK_TILES * tile_bytes(columns)).enumerate() {
        let tiles = bytes.len() / tile_bytes(columns);
        for tile in 0..tiles {
            let rows = std::array::from_fn(|n| row(block * BLOCK_TILES + tile, n));
            let units = bytes.chunks_exact_mut(unit).skip(tile).step_by(tiles);
            units.enumerate().for_each(|(n, bytes)| derive_unit(columns, n, &rows, bytes));
        }
    }
}

fn derive_unit(columns: usize, unit: usize, rows: &[Row<'_>; TILE_ROWS], bytes: &mut [u8]) {
    let wide = unit_steps(columns);
    let (codes, scales) = bytes.split_at_mut(wide * STEP_CODE_BYTES);
    for (index, words) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (step, lane, half) = (unit * wide + index / 64, index / 2 % 32, index % 2);
        let column = step * STEP_COLUMNS + lane % STEP_BLOCKS * BLOCK + 8 * half;
        let pair = [rows[lane / 4], rows[lane / 4 + 8]];
        *words = join(|n| pair[n / 2 % 2].code(column + n / 4 * 2 + n % 2)).to_le_bytes();
    }
    for (index, scales) in scales.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let (lane, step) = (index / wide, unit * wide + index % wide);
        let block = step * STEP_BLOCKS + lane % STEP_BLOCKS;
        *scales = [rows[lane / 4], rows[lane / 4 + 8]].map(|row| row.scale(block));
    }
}

/// Two words of eight codes each.
fn join(code: impl Fn(usize) -> u32) -> u64 {
    let mut words = 0;
    for (n, bits) in CODE_BITS.iter().enumerate() {
        let code = u64::from(code(n));
        for (k, bit) in bits.iter().enumerate() {
            words |= (code >> (3 - k) & 1) << bit;
        }
    }
    words
}

/// An e4m3 scale as E5M3: exponent E = e + 23 and mantissa, subnormal numbers normalised. What stands
/// for zero does not matter: its codes are zero.
fn e5m3(bits: u8) -> u8 {
    let (exponent, mantissa) = (bits >> 3 & 15, bits & 7);
    match (exponent, mantissa) {
        (0, 0) => 0,
        (0, mantissa) => {
            // mantissa x 2^-9, with the leading bit at 0, 1 or 2.
            let leading = mantissa.ilog2() as u8;
            (14 + leading) << 3 | (mantissa << (3 - leading) & 7)
        }
        (exponent, mantissa) => (exponent + 16) << 3 | mantissa,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::numeric::e4m3_decode;

    /// As the device decodes: bits 15, 8, 7, 6 of each half of eight words.
    fn decode(words: u64) -> [u32; 16] {
        const MASK: u32 = 0x81c0_81c0;
        const FROM_EVEN: u32 = 0x80c1_80c1;
        let (even, odd) = (words as u32, (words >> 32) as u32);
        let rest = even.rotate_left(6) & FROM_EVEN | odd.rotate_left(8) & !FROM_EVEN;
        let pairs = [
            even & MASK,
            even << 4 & MASK,
            even.rotate_left(10) & MASK,
            rest & MASK,
            odd & MASK,
            odd << 4 & MASK,
            odd.rotate_left(10) & MASK,
            rest << 6 & MASK,
        ];
        let code = |half: u32| half >> 12 & 8 | half >> 6 & 7;
        let mut codes = [0; 16];
        for (pair, codes) in pairs.into_iter().zip(codes.chunks_exact_mut(2)) {
            codes.copy_from_slice(&[code(pair & 0xffff), code(pair >> 16)]);
        }
        codes
    }

    #[test]
    fn every_code_in_every_place_survives_its_words() {
        for n in 0..16 {
            for value in 0..16 {
                let code = |place| if place == n { value } else { 15 - value };
                assert_eq!(decode(join(code)), std::array::from_fn(code));
            }
        }
    }

    #[test]
    fn every_scale_is_exact() {
        for bits in 1..0x7f_u8 {
            let e5m3 = e5m3(bits);
            let value = (1.0 + f32::from(e5m3 & 7) / 8.0) * f32::exp2(f32::from(e5m3 >> 3) - 23.0);
            assert_eq!(value, e4m3_decode(bits), "{bits:#x}");
        }
    }

    /// E5M3 has no zero: a block whose scale is zero, of either sign, has zero codes instead.
    #[test]
    fn zero_blocks_have_zero_codes() {
        let (codes, mut scales) = (vec![0x77; 16 * 32], vec![0x38; 16 * 4]);
        (scales[1], scales[9 * 4 + 2]) = (0, 0x80);
        let raw = RawProjection {
            rows: 16,
            cols: 64,
            codes: &codes,
            scales: &scales,
            weight_scale_2: 1.0,
            input_scale: None,
        };
        let mut tile = vec![0; tile_bytes(64)];
        derive_matrix(64, &mut tile, |_, row| Row::new(&raw, row));
        for (row, column) in (0..16 * 64).map(|n| (n / 64, n % 64)) {
            let zero = [(0, 1), (9, 2)].contains(&(row, column / 16));
            let (code, _) = element(&tile, 64, (row, column));
            assert_eq!(code, if zero { 0 } else { 7 }, "{row} {column}");
        }
    }

    /// Reads an element back out of a matrix's derived bytes: code and scale.
    fn element(matrix: &[u8], columns: usize, (row, column): (usize, usize)) -> (u32, u8) {
        let (tile, row) = (row / 16, row % 16);
        let block = &matrix[tile / 16 * 16 * tile_bytes(columns)..];
        let tiles = (block.len() / tile_bytes(columns)).min(16);
        let wide = unit_steps(columns);
        let (step, within) = (column / 64, column % 64);
        let unit = &block[(step / wide * tiles + tile % 16) * unit_bytes(columns)..];
        let lane = row % 8 * 4 + within / 16;
        let (half, k) = (within % 16 / 8, within % 8);
        let words = &unit[step % wide * 512 + lane * 16 + half * 8..][..8];
        let codes = decode(u64::from_le_bytes(words.try_into().unwrap()));
        let scales = &unit[wide * 512 + (lane * wide + step % wide) * 2..];
        (codes[k / 2 * 4 + row / 8 * 2 + k % 2], scales[row / 8])
    }

    /// Odd widths, wide units, and padding: every element of an expert comes back.
    #[test]
    fn golden_experts_come_back_from_their_derived_bytes() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/moe-golden");
        for case in ["e4_k2_h1568_i64", "e4_k2_h1632_i48", "e7_k2_h256_i512", "tiny_e4_k2_h64_i128"]
        {
            let checkpoint = Checkpoint::open(&data.join(case)).unwrap();
            let shape = checkpoint.layers()[0].shape;
            let raw = checkpoint.expert(0, 1).unwrap();
            let [mut fc1, mut fc2] = expert_bytes(&shape).map(|bytes| vec![0; bytes]);
            derive(&raw, [&mut fc1, &mut fc2]);
            let check = |bytes: &[u8], derived_row: usize, raw: &RawProjection<'_>, row: usize| {
                let columns = raw.cols;
                let expected = Row::new(raw, row);
                for column in 0..columns {
                    let (code, scale) = element(bytes, columns, (derived_row, column));
                    assert_eq!(code, expected.code(column), "{case} {row} {column}");
                    assert_eq!(scale, e5m3(expected.scales[column / 16]));
                }
                for column in columns..columns.next_multiple_of(64) {
                    assert_eq!(element(bytes, columns, (derived_row, column)).0, 0);
                }
            };
            for column in 0..shape.intermediate as usize {
                let gate = column / 8 * 16 + column % 8;
                check(&fc1, gate, &raw.gate, column);
                check(&fc1, gate + 8, &raw.up, column);
            }
            for row in 0..shape.hidden as usize {
                check(&fc2, row, &raw.down, row);
            }
        }
    }
}
