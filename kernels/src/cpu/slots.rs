//! A rank's slots of one layer, and how another placement takes their place while calls go on.
//!
//! An expert's derived bytes are made once and shared: a placement is a list of them. Another placement is **staged** beside
//! calls, on any thread: experts that the rank lacks are derived, the others are taken along. What is staged is taken in
//! and then, once its group is to have it, made **ready**; ranks announce with every call of the layer for which epoch they
//! are ready, and all flip after the first call in which all are (`crate::group`). What was in force before is kept until
//! all ranks have called without it.

use std::sync::{Arc, OnceLock};

use memmap2::{Advice, MmapMut, MmapOptions};
use xxhash_rust::xxh3::Xxh3;

use super::canary::{Canary, CanaryError};
use super::layout;
use super::tactic::{CpuTactic, Isa};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{DeviceError, LayerSlots, LoadError};
use crate::expert::RawScalars;
use crate::problem::LayerShape;
use crate::route::RouteTable;

/// One expert, packed at 4.5 bits an element; never changed once it is made.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) expert: u32,
    pub(super) bytes: MmapMut,
    pub(super) scalars: RawScalars,
    /// XXH3 of the bytes as they lie in memory, and of the scalars: equal wherever the expert is.
    digest: u64,
    /// What it answers to the canary, once somebody has asked.
    canary: OnceLock<u64>,
}

impl Slot {
    /// Derives an expert of the layer at `position` of the checkpoint's layers.
    pub(super) fn derive(
        checkpoint: &Checkpoint,
        position: usize,
        expert: u32,
    ) -> Result<Self, LoadError> {
        let layers = checkpoint.layers();
        let layer = layers.get(position).ok_or(CheckpointError::OutOfRange {
            what: "layer position",
            value: position,
            count: layers.len(),
        })?;
        let raw = checkpoint.expert(position, expert)?;
        let mut bytes = slot_memory(layout::expert_bytes(&layer.shape))?;
        layout::derive(&raw, &mut bytes);
        let scalars = raw.scalars();
        let mut digest = Xxh3::new();
        digest.update(&bytes);
        for scalar in scalars.weight_scale_2.into_iter().chain(scalars.in2) {
            digest.update(&scalar.to_bits().to_le_bytes());
        }
        Ok(Self { expert, bytes, scalars, digest: digest.digest(), canary: OnceLock::new() })
    }
}

/// Memory of an expert: zero pages, resident once they are written.
fn slot_memory(bytes: usize) -> Result<MmapMut, DeviceError> {
    let refused = |source| DeviceError::Memory { what: "a slot", bytes: bytes as u64, source };
    let memory = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(refused)?;
    // Weights are streamed: huge pages save most TLB misses. A kernel without them refuses the
    // advice, which costs speed alone.
    drop(memory.advise(Advice::HugePage));
    Ok(memory)
}

/// A placement of a layer, as far as this rank holds it.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) epoch: u64,
    pub(super) route: RouteTable,
    /// None where a slot is empty.
    pub(super) slots: Vec<Option<Arc<Slot>>>,
}

/// This rank's slots of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) number: u32,
    pub(super) shape: LayerShape,
    /// Largest `gate_proj.input_scale` of the layer's experts.
    pub(super) in13: Option<f32>,
    /// Whether every expert of the layer has the scales that `act=nvfp4` needs.
    pub(super) scaled: bool,
    pub(super) held: Held,
    /// What is staged, and whether it is to be in force.
    pub(super) next: Option<(Held, bool)>,
    /// What was in force before, until all ranks have called without it.
    pub(super) last: Option<Held>,
}

impl Layer {
    /// A layer of `checkpoint` that has had one placement so far.
    pub(super) fn new(checkpoint: &Checkpoint, position: usize, held: Held) -> Self {
        let layer = &checkpoint.layers()[position];
        let (number, shape, in13, scaled) = (layer.number, layer.shape, layer.in13, layer.scaled);
        Self { number, shape, in13, scaled, held, next: None, last: None }
    }

    /// The same layer with no slots at all.
    fn without_slots(&self) -> Self {
        let Self { number, shape, in13, scaled, .. } = *self;
        let route = RouteTable::identity(0);
        let held = Held { epoch: 0, route, slots: Vec::new() };
        Self { number, shape, in13, scaled, held, next: None, last: None }
    }

    /// The epoch for which this rank is ready; 0 if for none.
    pub(super) fn ready(&self) -> u64 {
        match &self.next {
            Some((held, true)) => held.epoch,
            _ => 0,
        }
    }

    /// Has in force what is staged.
    pub(super) fn flip(&mut self) {
        if let Some((next, _)) = self.next.take() {
            self.last = Some(std::mem::replace(&mut self.held, next));
        }
    }

    /// Is not ready any more for what is staged: another may be staged in its place.
    pub(super) fn stand_back(&mut self) {
        if let Some((_, ready)) = &mut self.next {
            *ready = false;
        }
    }

    /// All ranks have called under the epoch in force: nobody goes back to the one before.
    pub(super) fn settle(&mut self) {
        self.last = None;
    }
}

/// Why a placement cannot be staged, or not be had.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A layer that the device does not have.
    #[error("layer {layer} is not served")]
    Layer {
        /// The layer.
        layer: u32,
    },
    /// An epoch that is not after the one in force.
    #[error("epoch {got} of layer {layer} is not after {held}, which is in force")]
    Epoch {
        /// The layer.
        layer: u32,
        /// The one that is to be staged, or is.
        got: u64,
        /// The one in force.
        held: u64,
    },
    /// An epoch that is not the one that is staged.
    #[error("epoch {got} of layer {layer} is not staged")]
    NotStaged {
        /// The layer.
        layer: u32,
        /// What was asked for.
        got: u64,
    },
    /// Another number of slots: a rank's memory is what it was started with.
    #[error("layer {layer} would have {got} slots, expected {expected}")]
    Slots {
        /// The layer.
        layer: u32,
        /// What was asked for.
        got: usize,
        /// What there is.
        expected: usize,
    },
    /// What is ready cannot be taken back: other ranks may have it in force. It is not ready any more once a call shows that
    /// another rank is beyond it.
    #[error("epoch {epoch} of layer {layer} is ready, and cannot be taken back")]
    Ready {
        /// The layer.
        layer: u32,
        /// The epoch.
        epoch: u64,
    },
}

/// Stages a placement of a layer, one expert at a time. It lives beside the device: calls go on.
#[derive(Debug)]
pub struct Stager {
    layer: u32,
    position: usize,
    expert_bytes: usize,
    wanted: LayerSlots,
    /// Every expert that is held or was derived.
    have: Vec<Arc<Slot>>,
    /// Experts that are not.
    lacking: Vec<u32>,
    canary: Canary,
}

/// A placement that is staged and not yet at hand.
#[derive(Debug)]
pub struct Staged {
    layer: u32,
    held: Held,
}

impl Stager {
    pub(super) fn new(
        layer: &Layer,
        (isa, tactic): (Isa, Option<CpuTactic>),
        position: usize,
        wanted: LayerSlots,
    ) -> Result<Self, StageError> {
        let number = layer.number;
        let canary = Canary { isa, tactic, layer: layer.without_slots() };
        let (got, expected) = (wanted.experts.len(), layer.held.slots.len());
        if got != expected {
            return Err(StageError::Slots { layer: number, got, expected });
        }
        check_later(layer, wanted.epoch)?;
        let have: Vec<_> = layer.held.slots.iter().flatten().cloned().collect();
        let known = |expert: &u32| have.iter().any(|slot| slot.expert == *expert);
        let lacking = wanted.experts.iter().flatten().filter(|expert| !known(expert));
        let lacking = lacking.rev().copied().collect();
        let expert_bytes = layout::expert_bytes(&layer.shape);
        Ok(Self { layer: number, position, expert_bytes, wanted, have, lacking, canary })
    }

    /// The layer.
    #[must_use]
    pub fn layer(&self) -> u32 {
        self.layer
    }

    /// How many experts are still to be derived.
    #[must_use]
    pub fn left(&self) -> usize {
        self.lacking.len()
    }

    /// Bytes of those experts, as this device holds them.
    #[must_use]
    pub fn bytes_left(&self) -> u64 {
        (self.lacking.len() * self.expert_bytes) as u64
    }

    /// Derives one expert; its bytes, or none if there is none left. Whoever calls decides how fast that goes.
    ///
    /// # Errors
    /// As [`super::CpuSlots::load`]; the expert is still to be derived then.
    pub fn step(&mut self, checkpoint: &Checkpoint) -> Result<Option<u64>, LoadError> {
        let Some(&expert) = self.lacking.last() else { return Ok(None) };
        let slot = Slot::derive(checkpoint, self.position, expert)?;
        let bytes = slot.bytes.len() as u64;
        self.have.push(Arc::new(slot));
        self.lacking.pop();
        Ok(Some(bytes))
    }

    /// Every expert that is held or was derived, ascending, with a digest of what it is in memory: equal on all ranks.
    #[must_use]
    pub fn digests(&self) -> Vec<(u32, u64)> {
        let mut all: Vec<_> = self.have.iter().map(|slot| (slot.expert, slot.digest)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The same experts, with what each answers to one token that is the same everywhere: equal on all ranks.
    ///
    /// # Errors
    /// [`CanaryError`].
    pub fn canaries(&self) -> Result<Vec<(u32, u64)>, CanaryError> {
        let mut slots = self.have.clone();
        slots.sort_by_key(|slot| slot.expert);
        slots.dedup_by_key(|slot| slot.expert);
        let unasked = slots.iter().filter(|slot| slot.canary.get().is_none());
        let unasked: Vec<Arc<Slot>> = unasked.cloned().collect();
        for (slot, answer) in unasked.iter().zip(self.canary.answers(&unasked)?) {
            slot.canary.get_or_init(|| answer);
        }
        Ok(slots.iter().filter_map(|slot| Some((slot.expert, *slot.canary.get()?))).collect())
    }

    /// What is staged; none while an expert is still to be derived.
    #[must_use]
    pub fn staged(&self) -> Option<Staged> {
        let Self { layer, wanted: LayerSlots { epoch, experts, route }, have, lacking, .. } = self;
        let slot = |expert: &Option<u32>| {
            have.iter().find(|slot| Some(slot.expert) == *expert).map(Arc::clone)
        };
        let slots = experts.iter().map(slot).collect();
        let held = Held { epoch: *epoch, route: route.clone(), slots };
        lacking.is_empty().then_some(Staged { layer: *layer, held })
    }
}

fn check_later(layer: &Layer, got: u64) -> Result<(), StageError> {
    let held = layer.held.epoch;
    if got > held { Ok(()) } else { Err(StageError::Epoch { layer: layer.number, got, held }) }
}

/// What is done with staged placements between calls.
impl super::CpuDevice {
    /// Begins to stage a placement of a layer.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn stager(&self, layer: u32, wanted: LayerSlots) -> Result<Stager, StageError> {
        let position = self.position(layer).ok_or(StageError::Layer { layer })?;
        Stager::new(&self.layers[position], (self.isa, self.tactic), position, wanted)
    }

    /// Has a staged placement at hand, in place of any that was.
    ///
    /// # Errors
    /// [`StageError::Epoch`] if another is in force by now, [`StageError::Ready`] where another is ready.
    pub fn take_staged(&mut self, staged: Staged) -> Result<(), StageError> {
        let Staged { layer, held } = staged;
        let known = self.staging(layer)?;
        check_later(known, held.epoch)?;
        check_not_ready(known)?;
        known.next = Some((held, false));
        Ok(())
    }

    /// Announces from now on that this rank is ready for the staged epoch of a layer.
    ///
    /// # Errors
    /// [`StageError::NotStaged`].
    pub fn make_ready(&mut self, layer: u32, epoch: u64) -> Result<(), StageError> {
        match &mut self.staging(layer)?.next {
            Some((held, ready)) if held.epoch == epoch => {
                *ready = true;
                Ok(())
            }
            _ => Err(StageError::NotStaged { layer, got: epoch }),
        }
    }

    /// Drops what is staged of a layer, if anything is.
    ///
    /// # Errors
    /// [`StageError::Ready`] once it is ready.
    pub fn drop_staged(&mut self, layer: u32) -> Result<(), StageError> {
        let known = self.staging(layer)?;
        check_not_ready(known)?;
        known.next = None;
        Ok(())
    }

    /// The epoch of a layer that is in force on this rank.
    #[must_use]
    pub fn epoch(&self, layer: u32) -> Option<u64> {
        Some(self.layers[self.position(layer)?].held.epoch)
    }

    /// The epoch of a layer that this rank is ready for.
    #[must_use]
    pub fn ready(&self, layer: u32) -> Option<u64> {
        Some(self.layers[self.position(layer)?].ready()).filter(|epoch| *epoch != 0)
    }

    /// Bytes of all experts that are held, staged, or kept from before.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let of_layer = |layer: &Layer| {
            let next = layer.next.as_ref().map(|(held, _)| held);
            let all = [Some(&layer.held), next, layer.last.as_ref()];
            let slots = all.into_iter().flatten().flat_map(|held| held.slots.iter().flatten());
            let mut seen: Vec<*const Slot> = slots.map(Arc::as_ptr).collect();
            seen.sort_unstable();
            seen.dedup();
            seen.len() as u64 * layout::expert_bytes(&layer.shape) as u64
        };
        self.layers.iter().map(of_layer).sum()
    }

    fn staging(&mut self, layer: u32) -> Result<&mut Layer, StageError> {
        let position = self.position(layer).ok_or(StageError::Layer { layer })?;
        Ok(&mut self.layers[position])
    }
}

fn check_not_ready(layer: &Layer) -> Result<(), StageError> {
    match layer.ready() {
        0 => Ok(()),
        epoch => Err(StageError::Ready { layer: layer.number, epoch }),
    }
}
