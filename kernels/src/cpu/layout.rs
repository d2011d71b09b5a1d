//! Derived bytes of an expert on the CPU: the order in which the products read weights, still
//! packed at 4.5 bits an element.
//!
//! Rows of a matrix go in blocks of 16, one for each lane of a vector. For each block and 8
//! consecutive k there is a line of 16 little-endian words: word n holds the 8 codes of row n, the
//! first k in the low nibble. For each block and 16 k there is a line of 16 scales. FC1 alternates
//! blocks of gate and up rows, gate first, so that both halves of a SwiGLU meet in one task.
//!
//! ```text
//! FC1 codes [2i/16][h/8][64]  FC1 scales [2i/16][h/16][16]
//! FC2 codes [h/16][i/8][64]   FC2 scales [h/16][i/16][16]
//! ```

use crate::expert::{RawExpert, RawProjection};
use crate::numeric::BLOCK;
use crate::problem::LayerShape;

/// Rows of a block: lanes of the widest vector.
pub(super) const LANES: usize = 16;

/// Eight codes of each row of a block.
pub(super) type CodeLine = [u8; 64];
/// One e4m3 scale of each row of a block.
pub(super) type ScaleLine = [u8; LANES];

/// Slots begin at multiples of this, so that lines of codes do not straddle cache lines.
const ALIGN: usize = 64;

/// A matrix in derived order: its blocks of rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<'a> {
    codes: &'a [CodeLine],
    scales: &'a [ScaleLine],
    /// Columns (K).
    pub(super) cols: usize,
}

/// One block of rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowBlock<'a> {
    /// `[cols / 16]` pairs of lines.
    pub(super) codes: &'a [[CodeLine; 2]],
    /// `[cols / 16]` lines.
    pub(super) scales: &'a [ScaleLine],
}

impl<'a> Matrix<'a> {
    fn new(bytes: &'a [u8], rows: usize, cols: usize) -> Self {
        let (codes, scales) = bytes[..packed_bytes(rows, cols)].split_at(rows * cols / 2);
        Self { codes: codes.as_chunks().0, scales: scales.as_chunks().0, cols }
    }

    /// Blocks of rows.
    pub(super) fn blocks(&self) -> usize {
        self.scales.len() / (self.cols / BLOCK)
    }

    /// Block `index`.
    pub(super) fn block(&self, index: usize) -> RowBlock<'a> {
        let lines = self.cols / BLOCK;
        RowBlock {
            codes: self.codes[index * 2 * lines..][..2 * lines].as_chunks().0,
            scales: &self.scales[index * lines..][..lines],
        }
    }
}

/// Bytes of codes and scales together.
const fn packed_bytes(rows: usize, cols: usize) -> usize {
    rows * cols / 2 + rows * cols / BLOCK
}

/// Bytes of a slot of `layer`.
pub(super) fn expert_bytes(layer: &LayerShape) -> usize {
    let (h, i) = (layer.hidden as usize, layer.intermediate as usize);
    (packed_bytes(2 * i, h) + packed_bytes(h, i)).next_multiple_of(ALIGN)
}

/// FC1 and FC2 of a slot.
pub(super) fn matrices<'a>(slot: &'a [u8], layer: &LayerShape) -> [Matrix<'a>; 2] {
    let (h, i) = (layer.hidden as usize, layer.intermediate as usize);
    let fc1 = Matrix::new(slot, 2 * i, h);
    [fc1, Matrix::new(&slot[packed_bytes(2 * i, h)..], h, i)]
}

/// Writes the derived bytes of an expert of the slot's layer.
pub(super) fn derive(expert: &RawExpert<'_>, slot: &mut [u8]) {
    let RawExpert { gate, up, down } = expert;
    let (fc1, fc2) = slot.split_at_mut(packed_bytes(2 * gate.rows, gate.cols));
    let gate_up = (0..gate.rows).step_by(LANES).flat_map(|row| [(gate, row), (up, row)]);
    derive_matrix(gate_up, gate.cols, fc1);
    let fc2 = &mut fc2[..packed_bytes(down.rows, down.cols)];
    derive_matrix((0..down.rows).step_by(LANES).map(|row| (down, row)), down.cols, fc2);
}

fn derive_matrix<'a>(
    blocks: impl Iterator<Item = (&'a RawProjection<'a>, usize)>,
    cols: usize,
    to: &mut [u8],
) {
    // 8 bytes of codes for every byte of scales.
    let (codes, scales) = to.split_at_mut(to.len() / 9 * 8);
    let codes = codes.chunks_exact_mut(LANES * cols / 2);
    let scales = scales.chunks_exact_mut(cols);
    for ((raw, first_row), (codes, scales)) in blocks.zip(codes.zip(scales)) {
        for lane in 0..LANES {
            let row = first_row + lane;
            let from = &raw.codes[row * cols / 2..][..cols / 2];
            transpose(from.as_chunks::<4>().0, lane, codes.as_chunks_mut::<4>().0);
            let from = &raw.scales[row * cols / BLOCK..][..cols / BLOCK];
            transpose(from, lane, scales);
        }
        // The one scale with a sign is -0; the products decode magnitudes alone.
        scales.iter_mut().for_each(|scale| *scale &= 0x7f);
    }
}

/// Puts element e of a row into lane `lane` of line e.
fn transpose<T: Copy>(row: &[T], lane: usize, lines: &mut [T]) {
    for (line, element) in lines.chunks_exact_mut(LANES).zip(row) {
        line[lane] = *element;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Swiglu;

    #[test]
    fn every_code_and_scale_lies_where_the_page_says() {
        let (h, i) = (64_usize, 32_usize);
        let layer = LayerShape {
            experts: 1,
            top_k: 1,
            hidden: h as u32,
            intermediate: i as u32,
            swiglu: Swiglu::default(),
        };
        let bytes = |seed: usize, n: usize| -> Vec<u8> {
            (0..n).map(|b| (b * 37 + b / 251 + seed * 91) as u8).collect()
        };
        let codes = [bytes(1, i * h / 2), bytes(2, i * h / 2), bytes(3, h * i / 2)];
        let scales = [bytes(4, i * h / 16), bytes(5, i * h / 16), bytes(6, h * i / 16)];
        let raw = |p: usize, rows, cols| RawProjection {
            rows,
            cols,
            codes: &codes[p],
            scales: &scales[p],
            weight_scale_2: 1.0,
            input_scale: None,
        };
        let expert = RawExpert { gate: raw(0, i, h), up: raw(1, i, h), down: raw(2, h, i) };
        let mut slot = vec![0; expert_bytes(&layer)];
        derive(&expert, &mut slot);
        let [fc1, fc2] = matrices(&slot, &layer);
        assert_eq!((fc1.blocks(), fc2.blocks()), (4, 4));
        let check =
            |matrix: Matrix<'_>, derived_row: usize, raw: &RawProjection<'_>, row: usize| {
                let block = matrix.block(derived_row / LANES);
                let lane = derived_row % LANES;
                for k in 0..raw.cols {
                    let line = &block.codes[k / 16][k % 16 / 8];
                    let word = u32::from_le_bytes(line.as_chunks().0[lane]);
                    let code = raw.codes[(row * raw.cols + k) / 2] >> (4 * (k % 2)) & 15;
                    assert_eq!((word >> (4 * (k % 8)) & 15) as u8, code);
                    let scale = raw.scales[(row * raw.cols + k) / 16] & 0x7f;
                    assert_eq!(block.scales[k / 16][lane], scale);
                }
            };
        for column in 0..i {
            let gate_row = column / 16 * 32 + column % 16;
            check(fc1, gate_row, &expert.gate, column);
            check(fc1, gate_row + 16, &expert.up, column);
        }
        for row in 0..h {
            check(fc2, row, &expert.down, row);
        }
    }

    #[test]
    fn a_slot_takes_4_5_bits_an_element() {
        let layer = LayerShape {
            experts: 60,
            top_k: 4,
            hidden: 2048,
            intermediate: 1408,
            swiglu: Swiglu::default(),
        };
        assert_eq!(expert_bytes(&layer), 3 * 2048 * 1408 * 9 / 16);
    }
}
