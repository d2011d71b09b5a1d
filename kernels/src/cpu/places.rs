//! The first step of a call: expert ids and weights are copied out of memory that the engine may
//! change meanwhile, checked whole, and grouped by expert; then the tokens are taken.

use half::bf16;

use super::CpuDevice;
use super::compute::{Scratch, chunks_of};
use crate::device::{CallError, LayerCall};
use crate::numeric::{BLOCK, bf16_narrow, bf16_widen, dequantise_row, quantise_row};
use crate::problem::ActFormat;

/// Fewest tokens that a thread takes at a time: rows are short work.
const ROWS_PER_TASK: usize = 8;

/// One (token, expert) pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Entry {
    pub(super) token: u32,
    /// Place among the token's experts (k).
    pub(super) place: u32,
    pub(super) weight: f32,
}

/// A call's assignments. Kept from call to call for its memory alone.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// `[T, k]`; -1 where there is no expert.
    pub(super) ids: Vec<i32>,
    /// `[T, k]`; finite wherever there is an expert.
    pub(super) weights: Vec<f32>,
    /// All pairs, by expert, token and place.
    entries: Vec<Entry>,
    /// Where each expert's entries end; an expert begins where the one before it ends.
    ends: Vec<u32>,
    /// For every expert, the last token that it was seen with, counted from 1.
    seen: Vec<u32>,
}

impl Places {
    /// Reads and checks a call's ids and weights. What stands beside id -1 is ignored.
    pub(super) fn read(&mut self, call: &LayerCall<'_>, experts: u32) -> Result<(), CallError> {
        let places = call.tokens as usize * call.top_k as usize;
        self.ids.resize(places, 0);
        self.weights.resize(places, 0.0);
        call.buffer.read(call.offsets.topk_ids, &mut self.ids);
        call.buffer.read(call.offsets.topk_weights, &mut self.weights);
        let top_k = call.top_k as usize;
        for counts in [&mut self.ends, &mut self.seen] {
            counts.clear();
            counts.resize(experts as usize, 0);
        }
        let rows = self.ids.chunks(top_k).zip(self.weights.chunks(top_k));
        for (token, (ids, weights)) in (0..).zip(rows) {
            check_row(token, (ids, weights), &mut self.ends, &mut self.seen)?;
        }
        self.group(call.top_k);
        Ok(())
    }

    /// Sorts the pairs by expert: `ends` holds counts before and ends after.
    fn group(&mut self, top_k: u32) {
        let mut total = 0;
        for end in &mut self.ends {
            (*end, total) = (total, total + *end);
        }
        let none = Entry { token: 0, place: 0, weight: 0.0 };
        self.entries.clear();
        self.entries.resize(total as usize, none);
        for (index, (&id, &weight)) in (0..).zip(self.ids.iter().zip(&self.weights)) {
            let Ok(expert) = usize::try_from(id) else { continue };
            let next = &mut self.ends[expert];
            let (token, place) = (index / top_k, index % top_k);
            self.entries[*next as usize] = Entry { token, place, weight };
            *next += 1;
        }
    }

    /// Number of pairs.
    pub(super) fn pairs(&self) -> usize {
        self.entries.len()
    }

    /// The experts that have tokens, ascending, and their pairs by token.
    pub(super) fn by_expert(&self) -> impl Iterator<Item = (usize, &[Entry])> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends).map(|(start, &end)| start as usize..end as usize);
        ranges.enumerate().filter(|(_, r)| !r.is_empty()).map(|(e, r)| (e, &self.entries[r]))
    }
}

/// Checks one token's places and counts its experts.
fn check_row(
    token: u32,
    (ids, weights): (&[i32], &[f32]),
    counts: &mut [u32],
    seen: &mut [u32],
) -> Result<(), CallError> {
    let last = (counts.len() - 1) as u32;
    for (place, (&id, &weight)) in (0..).zip(ids.iter().zip(weights)) {
        if id == -1 {
            continue;
        }
        let expert = usize::try_from(id).unwrap_or(usize::MAX);
        let (Some(count), Some(seen)) = (counts.get_mut(expert), seen.get_mut(expert)) else {
            return Err(CallError::ExpertId { token, place, id, last });
        };
        if *seen == token + 1 {
            let first = ids.iter().position(|&earlier| earlier == id).unwrap_or(0) as u32;
            return Err(CallError::DuplicateExpert { token, id, first, second: place });
        }
        if !weight.is_finite() {
            return Err(CallError::Weight { token, place, weight });
        }
        *seen = token + 1;
        *count += 1;
    }
    Ok(())
}

impl CpuDevice {
    /// Reads the tokens; `act=nvfp4` quantises each once, with g = 1 / in13.
    pub(super) fn take_rows(&mut self, call: &LayerCall<'_>, position: usize, s: &mut Scratch) {
        let layer = &self.layers[position];
        let hidden = layer.shape.hidden as usize;
        let parallel = s.is_parallel(self.places.pairs(), &layer.shape);
        let g = layer.in13.map_or(1.0, |in13| 1.0 / in13);
        let mut rows = std::mem::take(&mut self.rows);
        rows.resize(call.tokens as usize * hidden, bf16::ZERO);
        let chunks = chunks_of(&mut rows, ROWS_PER_TASK * hidden);
        s.for_each(&self.pool, parallel, chunks, |(index, rows), scratch| {
            let offset = (index * ROWS_PER_TASK * hidden * size_of::<bf16>()) as u64;
            call.buffer.read(call.offsets.hidden + offset, rows);
            if call.form.act == ActFormat::Nvfp4 {
                for row in rows.chunks_exact_mut(hidden) {
                    scratch.requantise(row, g);
                }
            }
        });
        self.rows = rows;
    }
}

/// Memory of a thread for one row on its way to codes and scales and back.
#[derive(Debug, Default)]
pub(super) struct RowScratch {
    values: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl RowScratch {
    /// Quantises a row and leaves code x block scale, which bf16 holds exactly; the global scale is
    /// part of the alphas.
    pub(super) fn requantise(&mut self, row: &mut [bf16], g: f32) {
        let Self { values, codes, scales } = self;
        values.resize(row.len(), 0.0);
        codes.resize(row.len() / 2, 0);
        scales.resize(row.len() / BLOCK, 0);
        bf16_widen(row, values);
        quantise_row(values, g, codes, scales);
        dequantise_row(codes, scales, 1.0, values);
        bf16_narrow(values, row);
    }
}
