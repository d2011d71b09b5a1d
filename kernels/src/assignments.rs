//! Which experts a call's tokens go to: ids and weights are copied out of memory that the engine may
//! change meanwhile, and checked whole. The same on every device.

use crate::device::{CallError, LayerCall};

/// Kept from call to call for its memory alone.
#[derive(Debug, Default)]
pub(crate) struct Assignments {
    /// `[T, k]`; -1 where there is no expert.
    pub(crate) ids: Vec<i32>,
    /// `[T, k]`; finite wherever there is an expert.
    pub(crate) weights: Vec<f32>,
    /// For every expert, the last token that it was seen with, counted from 1.
    seen: Vec<u32>,
}

impl Assignments {
    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.ids.clear();
        self.weights.clear();
    }

    /// Reads and checks a call's ids and weights. What stands beside id -1 is ignored.
    pub(crate) fn read(&mut self, call: &LayerCall<'_>, experts: u32) -> Result<(), CallError> {
        let places = call.tokens as usize * call.top_k as usize;
        self.ids.resize(places, 0);
        self.weights.resize(places, 0.0);
        call.buffer.read(call.offsets.topk_ids, &mut self.ids);
        call.buffer.read(call.offsets.topk_weights, &mut self.weights);
        self.seen.clear();
        self.seen.resize(experts as usize, 0);
        let top_k = call.top_k as usize;
        let rows = self.ids.chunks(top_k).zip(self.weights.chunks(top_k));
        (0..).zip(rows).try_for_each(|(token, row)| check_row(token, row, &mut self.seen))
    }
}

/// Checks one token's places.
fn check_row(
    token: u32,
    (ids, weights): (&[i32], &[f32]),
    seen: &mut [u32],
) -> Result<(), CallError> {
    let last = (seen.len() - 1) as u32;
    for (place, (&id, &weight)) in (0..).zip(ids.iter().zip(weights)) {
        if id == -1 {
            continue;
        }
        let expert = usize::try_from(id).unwrap_or(usize::MAX);
        let Some(seen) = seen.get_mut(expert) else {
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
    }
    Ok(())
}
