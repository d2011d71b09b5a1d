//! The ends of a call where data changes ranks. The source picks a replica for every pair, and lays rows and lists out in its own region of the heap; the experts' ranks
//! read their parts of the lists, and the rows that these name.

use std::borrow::Cow;

use half::bf16;

use super::compute::{Scratch, chunks_of};
use super::{CpuDevice, Layer};
use crate::assignments::Assignments;
use crate::device::{CallError, LayerCall};
use crate::group::{Announcement, RankSet};
use crate::heap::row_bytes;
use crate::memory::{bytes_of, bytes_of_mut};
use crate::numeric::{BLOCK, bf16_narrow, bf16_widen, dequantise_row, quantise_row};
use crate::problem::{ActFormat, Form};

/// Fewest tokens that a thread takes at a time: rows are short work.
const ROWS_PER_TASK: usize = 8;

/// One (token, expert) pair that this rank computes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Pair {
    /// Rank that the token came from.
    pub(super) source: u32,
    /// Token at its source.
    pub(super) token: u32,
    /// Place among the token's experts (k).
    pub(super) place: u32,
    /// Experts of a token at its source.
    pub(super) top_k: u32,
    /// Row among those that were read.
    pub(super) row: u32,
    pub(super) weight: f32,
}

/// What the engine brings to a call, routed. Kept from call to call for its memory alone.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    pub(super) assignments: Assignments,
    /// List entries for each rank, by token: `[token, slot | place << 16, weight, 0]`.
    lists: Vec<Vec<[u32; 4]>>,
}

impl Outgoing {
    /// Nothing: a rank that joins a call.
    pub(super) fn clear(&mut self, ranks: u32) {
        self.assignments.clear();
        self.lists.resize(ranks as usize, Vec::new());
        self.lists.iter_mut().for_each(Vec::clear);
    }

    /// Picks the replica of every pair, on a rank that is not absent; each goes to exactly one.
    pub(super) fn route(
        &mut self,
        layer: &Layer,
        (source, top_k): (u32, u32),
        absent: RankSet,
    ) -> Result<(), CallError> {
        let slots_per_rank = layer.held.slots.len() as u32;
        let mut table = Cow::Borrowed(&layer.held.route);
        if !absent.is_empty() {
            table = Cow::Owned(table.without(|slot| absent.has(slot / slots_per_rank)));
        }
        let Assignments { ids, weights, .. } = &self.assignments;
        for (index, (&id, weight)) in (0..).zip(ids.iter().zip(weights)) {
            let Ok(expert) = u32::try_from(id) else { continue };
            let (token, place) = (index / top_k, index % top_k);
            let slot = table.slot(source, token, expert).ok_or_else(|| CallError::Unavailable {
                layer: layer.number,
                expert,
                lost: absent.iter().collect(),
            })?;
            let (rank, slot) = (slot / slots_per_rank, slot % slots_per_rank);
            self.lists[rank as usize].push([token, slot | place << 16, weight.to_bits(), 0]);
        }
        Ok(())
    }

    /// Pairs for each rank.
    pub(super) fn counts(&self) -> Vec<u32> {
        self.lists.iter().map(|list| list.len() as u32).collect()
    }
}

/// The pairs of a call that this rank computes, by slot, source, token and place. Kept from call to
/// call for its memory alone.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    list: Vec<[u32; 4]>,
    unsorted: Vec<(u32, Pair)>,
    pairs: Vec<Pair>,
    /// Where each slot's pairs end; a slot begins where the one before it ends.
    ends: Vec<u32>,
    /// Source and token of each row.
    rows: Vec<(u32, u32)>,
    /// The rows as the products take them, `[rows, h]`: bf16 values, or code x block scale.
    pub(super) values: Vec<bf16>,
}

impl Incoming {
    /// Number of pairs.
    pub(super) fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// The slots that have pairs, ascending, and their pairs.
    pub(super) fn by_slot(&self) -> impl Iterator<Item = (usize, &[Pair])> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends).map(|(start, &end)| start as usize..end as usize);
        ranges.enumerate().filter(|(_, r)| !r.is_empty()).map(|(slot, r)| (slot, &self.pairs[r]))
    }

    /// Takes a pair that `source` sent; none if no peer of this version would send it.
    fn take(
        &mut self,
        source: u32,
        entry: [u32; 4],
        announced: &Announcement,
        layer: &Layer,
    ) -> Option<()> {
        let [token, places, weight, _] = entry;
        let (slot, place) = (places & 0xffff, places >> 16);
        layer.held.slots.get(slot as usize)?.as_ref()?;
        if token >= announced.tokens || place >= announced.top_k {
            return None;
        }
        if self.rows.last() != Some(&(source, token)) {
            self.rows.push((source, token));
        }
        let (row, weight) = (self.rows.len() as u32 - 1, f32::from_bits(weight));
        let pair = Pair { source, token, place, top_k: announced.top_k, row, weight };
        self.unsorted.push((slot, pair));
        Some(())
    }

    /// Groups the pairs by slot; those of one slot stay in their order.
    fn sort(&mut self, slots: usize) {
        self.ends.clear();
        self.ends.resize(slots, 0);
        self.unsorted.iter().for_each(|(slot, _)| self.ends[*slot as usize] += 1);
        let mut total = 0;
        for end in &mut self.ends {
            (*end, total) = (total, total + *end);
        }
        self.pairs.clear();
        self.pairs.resize(total as usize, Pair::default());
        for (slot, pair) in &self.unsorted {
            let next = &mut self.ends[*slot as usize];
            self.pairs[*next as usize] = *pair;
            *next += 1;
        }
    }
}

/// A rank whose list no rank of this version would send.
pub(super) struct Garbled {
    pub(super) source: u32,
}

impl CpuDevice {
    /// Lays rows and lists out in this rank's region, where peers read them.
    pub(super) fn send(
        &self,
        call: &LayerCall<'_>,
        layer: &Layer,
        outgoing: &Outgoing,
        s: &Scratch,
    ) {
        let (heap, layout, rank) = (self.group.heap(), self.group.layout(), self.group.rank());
        let mut index = 0;
        for list in &outgoing.lists {
            heap.write(rank, layout.list(index), bytes_of(list));
            index += list.len() as u32;
        }
        let hidden = layer.shape.hidden;
        let row = row_bytes(hidden, call.form.act);
        let g = layer.in13.map_or(1.0, |in13| 1.0 / in13);
        let parallel = s.is_parallel(index as usize, &layer.shape);
        let firsts = (0..call.tokens).step_by(ROWS_PER_TASK).collect();
        s.for_each(&self.pool, parallel, firsts, |first: u32, scratch| {
            let row_scratch = scratch.row();
            for token in first..call.tokens.min(first + ROWS_PER_TASK as u32) {
                let wire = row_scratch.read(call, token, hidden as usize, g);
                heap.write(rank, layout.row(token, row), wire);
            }
        });
    }

    /// Reads the pairs for this rank, and their rows.
    pub(super) fn receive(
        &self,
        (layer, form): (&Layer, Form),
        announced: &[Announcement],
        incoming: &mut Incoming,
        s: &Scratch,
    ) -> Result<(), Garbled> {
        let (heap, layout, rank) = (self.group.heap(), self.group.layout(), self.group.rank());
        incoming.rows.clear();
        incoming.unsorted.clear();
        for (source, announcement) in (0..).zip(announced) {
            let counts = &announcement.pairs;
            let first: u32 = counts[..rank as usize].iter().sum();
            let mut list = std::mem::take(&mut incoming.list);
            list.resize(counts[rank as usize] as usize, [0; 4]);
            heap.read(source, layout.list(first), bytes_of_mut(&mut list));
            let mut entries = list.iter();
            let taken = entries.try_for_each(|e| incoming.take(source, *e, announcement, layer));
            incoming.list = list;
            taken.ok_or(Garbled { source })?;
        }
        incoming.sort(layer.held.slots.len());
        let (hidden, act) = (layer.shape.hidden, form.act);
        let row = row_bytes(hidden, act);
        let parallel = s.is_parallel(incoming.pairs(), &layer.shape);
        let Incoming { rows, values, .. } = incoming;
        values.resize(rows.len() * hidden as usize, bf16::ZERO);
        let tasks = chunks_of(values, ROWS_PER_TASK * hidden as usize);
        s.for_each(&self.pool, parallel, tasks, |(task, values), scratch| {
            let rows = &rows[task * ROWS_PER_TASK..];
            for ((source, token), values) in
                rows.iter().zip(values.chunks_exact_mut(hidden as usize))
            {
                let wire = scratch.row().wire(row);
                heap.read(*source, layout.row(*token, row), wire);
                scratch.row().unpack(act, values);
            }
        });
        Ok(())
    }
}

/// Memory of a thread for one row on its way to the wire or from it.
#[derive(Debug, Default)]
pub(super) struct RowScratch {
    bf16: Vec<bf16>,
    values: Vec<f32>,
    /// bf16; or codes, then block scales.
    wire: Vec<u8>,
}

impl RowScratch {
    /// Reads a token from the engine's buffer; `act=nvfp4` quantises it, with quantisation scale g.
    fn read(&mut self, call: &LayerCall<'_>, token: u32, hidden: usize, g: f32) -> &[u8] {
        let Self { bf16: row, values, wire } = self;
        row.resize(hidden, bf16::ZERO);
        let offset = u64::from(token) * (hidden * size_of::<bf16>()) as u64;
        call.buffer.read(call.offsets.hidden + offset, row);
        match call.form.act {
            ActFormat::Bf16 => bytes_of(row),
            ActFormat::Nvfp4 => {
                values.resize(hidden, 0.0);
                wire.resize(hidden / 2 + hidden / BLOCK, 0);
                bf16_widen(row, values);
                let (codes, scales) = wire.split_at_mut(hidden / 2);
                quantise_row(values, g, codes, scales);
                wire
            }
        }
    }

    fn wire(&mut self, bytes: u64) -> &mut [u8] {
        self.wire.resize(bytes as usize, 0);
        &mut self.wire
    }

    /// What is on the wire as the products take it; code x block scale is exact in bf16, and the
    /// global scale is part of the alphas.
    fn unpack(&mut self, act: ActFormat, row: &mut [bf16]) {
        match act {
            ActFormat::Bf16 => bytes_of_mut(row).copy_from_slice(&self.wire),
            ActFormat::Nvfp4 => {
                self.values.resize(row.len(), 0.0);
                let (codes, scales) = self.wire.split_at(row.len() / 2);
                dequantise_row(codes, scales, 1.0, &mut self.values);
                bf16_narrow(&self.values, row);
            }
        }
    }
}
