//! The canary of a migration: one token, the same everywhere, goes through an expert's replicas on all ranks, as a call takes it.
//! Where the answers have other bits, something is not the same that no checksum of weights sees.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use rayon::ThreadPoolBuilder;
use xxhash_rust::xxh3::xxh3_64;

use super::slots::{Held, Layer, Slot};
use super::{CpuDevice, CpuSlots, CpuTactic, Isa};
use crate::device::{CallError, CallOffsets, Device, DeviceError, LayerCall};
use crate::group::Group;
use crate::heap::HeapShape;
use crate::heap::shm::ShmHeap;
use crate::memory::{SharedMemory, bytes_of};
use crate::problem::{ActFormat, Form, WeightsIn};
use crate::route::RouteTable;

/// Why there is no answer to compare.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// There is no memory or thread for it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The call of it failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// How a rank computes, and of which layer.
#[derive(Debug)]
pub(super) struct Canary {
    pub(super) isa: Isa,
    pub(super) tactic: Option<CpuTactic>,
    /// Without slots.
    pub(super) layer: Layer,
}

impl Canary {
    /// XXH3 of what each of the experts in `slots` answers, `act=bf16`, in their order.
    pub(super) fn answers(&self, slots: &[Arc<Slot>]) -> Result<Vec<u64>, CanaryError> {
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let experts = slots.len() as u32;
        let Layer { number, shape, in13, scaled, .. } = self.layer;
        let held = Held {
            epoch: 0,
            route: RouteTable::identity(experts),
            slots: slots.iter().cloned().map(Some).collect(),
        };
        let layer = Layer { number, shape, in13, scaled, held, next: None, last: None };
        let pool = ThreadPoolBuilder::new().num_threads(1).build();
        let pool = pool.map_err(|source| DeviceError::Threads { threads: 1, source })?;
        let alone = CpuSlots { isa: self.isa, tactic: self.tactic, pool, layers: vec![layer] };
        let hidden = shape.hidden;
        let heap = HeapShape { ranks: 1, max_tokens: experts, max_pairs: experts, hidden };
        let group = Group::new(Arc::new(ShmHeap::alone(heap)?), Duration::MAX);
        let mut device = CpuDevice::new(alone, group);

        let (row, entry) = (u64::from(hidden) * 2, 4);
        let count = u64::from(experts);
        let offsets = CallOffsets {
            hidden: 0,
            topk_ids: count * row,
            topk_weights: count * (row + entry),
            output: count * (row + 2 * entry),
        };
        let buffer = SharedMemory::create("canary", count * 2 * (row + entry))?;
        let token = token(hidden);
        for number in 0..experts {
            buffer.write(u64::from(number) * row, &token);
            let at = u64::from(number) * entry;
            buffer.write(offsets.topk_ids + at, &[number as i32]);
            buffer.write(offsets.topk_weights + at, &[1.0_f32]);
        }
        let form = Form { act: ActFormat::Bf16, weights_in: WeightsIn::Combine };
        let (layer, buffer) = (number, &buffer);
        let call = LayerCall { layer, tokens: experts, top_k: 1, form, buffer, offsets };
        device.run(&call)?;
        let mut answer = vec![bf16::ZERO; hidden as usize];
        let answers = (0..count).map(|number| {
            buffer.read(offsets.output + number * row, &mut answer);
            xxh3_64(bytes_of(&answer))
        });
        Ok(answers.collect())
    }
}

/// The token: numbers from -1 to 1 that depend on their place alone.
fn token(hidden: u32) -> Vec<bf16> {
    let value = |place: u32| {
        let mixed = place.wrapping_mul(0x9E37_79B1) ^ place.wrapping_mul(0x85EB_CA77) >> 15;
        bf16::from_f32((mixed >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..hidden).map(value).collect()
}
