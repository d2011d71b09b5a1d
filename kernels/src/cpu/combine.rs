//! The last step of a call: sums the terms of each token, in order of k, into the engine's output.

use half::bf16;

use super::CpuDevice;
use super::compute::{Scratch, term_offset};
use crate::device::LayerCall;
use crate::numeric::bf16_narrow;
use crate::problem::WeightsIn;

/// Fewest tokens that a thread takes at a time.
const TOKENS_PER_TASK: u32 = 8;

impl CpuDevice {
    /// A place without an expert adds nothing, whatever an earlier call left in memory.
    pub(super) fn combine(&self, call: &LayerCall<'_>, position: usize, s: &mut Scratch) {
        let shape = &self.layers[position].shape;
        let (hidden, top_k) = (shape.hidden as usize, call.top_k as usize);
        let parallel = s.is_parallel(self.places.pairs(), shape);
        let first_tokens = (0..call.tokens).step_by(TOKENS_PER_TASK as usize).collect();
        s.for_each(&self.pool, parallel, first_tokens, |first: u32, scratch| {
            let (terms, sums) = scratch.combine_rows(hidden);
            for token in first..call.tokens.min(first + TOKENS_PER_TASK) {
                let places = token as usize * top_k..(token as usize + 1) * top_k;
                let ids = self.places.ids[places.clone()].iter();
                let weights = self.places.weights[places].iter();
                sums.fill(0.0);
                for (place, (_, weight)) in (0..).zip(ids.zip(weights)).filter(|p| *p.1.0 >= 0) {
                    self.terms.read(term_offset(call.top_k, shape.hidden, token, place, 0), terms);
                    add(terms, call.form.weights_in, *weight, sums);
                }
                bf16_narrow(sums, terms);
                let row = u64::from(token) * (hidden * size_of::<bf16>()) as u64;
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
