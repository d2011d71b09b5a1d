//! The last step of a call, at the tokens' own rank: sums the terms of each token, in order of k,
//! into the engine's output.

use half::bf16;

use super::dispatch::Outgoing;
use super::{CpuDevice, Layer, compute::Scratch};
use crate::device::LayerCall;
use crate::heap::TermAt;
use crate::memory::bytes_of_mut;
use crate::numeric::bf16_narrow;
use crate::problem::WeightsIn;

/// Fewest tokens that a thread takes at a time.
const TOKENS_PER_TASK: u32 = 8;

impl CpuDevice {
    /// A place without an expert adds nothing, whatever an earlier call left in memory.
    pub(super) fn combine(
        &self,
        call: &LayerCall<'_>,
        layer: &Layer,
        outgoing: &Outgoing,
        s: &Scratch,
    ) {
        let (heap, layout, rank) = (self.group.heap(), self.group.layout(), self.group.rank());
        let hidden = layer.shape.hidden;
        let top_k = call.top_k as usize;
        let parallel = s.is_parallel(outgoing.assignments.ids.len(), &layer.shape);
        let firsts = (0..call.tokens).step_by(TOKENS_PER_TASK as usize).collect();
        s.for_each(&self.pool, parallel, firsts, |first: u32, scratch| {
            let (terms, sums) = scratch.combine_rows(hidden as usize);
            for token in first..call.tokens.min(first + TOKENS_PER_TASK) {
                let places = token as usize * top_k..(token as usize + 1) * top_k;
                let ids = outgoing.assignments.ids[places.clone()].iter();
                let weights = outgoing.assignments.weights[places].iter();
                sums.fill(0.0);
                for (place, (_, weight)) in (0..).zip(ids.zip(weights)).filter(|p| *p.1.0 >= 0) {
                    let at = TermAt { token, place, top_k: call.top_k, hidden };
                    heap.read(rank, layout.term(at, 0), bytes_of_mut(terms));
                    add(terms, call.form.weights_in, *weight, sums);
                }
                bf16_narrow(sums, terms);
                let row = u64::from(token) * u64::from(hidden) * size_of::<bf16>() as u64;
                call.buffer.write(call.offsets.output + row, terms);
            }
        });
    }
}

fn add(terms: &[bf16], weights_in: WeightsIn, weight: f32, sums: &mut [f32]) {
    let factor = match weights_in {
        WeightsIn::Fc1 => 1.0,
        WeightsIn::Combine => weight,
    };
    for (sum, term) in sums.iter_mut().zip(terms) {
        *sum += term.to_f32() * factor;
    }
}
