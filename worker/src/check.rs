//! `moeplane-worker check`: what of a checkpoint would be served, by how much memory, without a device
//! and without a start.

use std::fmt;
use std::path::PathBuf;

use kernels::checkpoint::{Checkpoint, CheckpointError};
use kernels::heap::{HeapLayout, HeapShape, RANKS_MAX};
use kernels::{cpu, cuda};

use crate::StartError;
use crate::config::ConfigError;
use crate::limits::{GROUP_TOKENS_DEFAULT, TOKENS_DEFAULT, TOKENS_MAX};
use crate::model::Model;
use crate::placement::contiguous;

const MIB: f64 = 1_048_576.0;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Ranks of a group; none for a rank that is alone.
    pub ranks: Option<u32>,
    /// Slots of each rank and layer; 0 takes as few as hold every expert once.
    pub slots: u32,
    /// Most tokens of a call.
    pub max_tokens: Option<u32>,
}

/// The answer, a line for each fact.
#[derive(Debug)]
pub struct Report {
    model: Model,
    /// Ranks and their slots in every layer; none for a rank that is alone.
    group: Option<(u32, u32)>,
    max_tokens: u32,
    slot_bytes: u64,
    gpu_bytes: u64,
    heap_bytes: u64,
}

impl Question {
    /// Opens the checkpoint and reads every scale of every expert.
    ///
    /// # Errors
    /// Whatever a start would end with, see [`StartError`].
    pub fn answer(&self) -> Result<Report, StartError> {
        let default = if self.ranks.is_some() { GROUP_TOKENS_DEFAULT } else { TOKENS_DEFAULT };
        let max_tokens = self.max_tokens.unwrap_or(default);
        in_range("max-tokens", max_tokens, TOKENS_MAX)?;
        in_range("ranks", self.ranks.unwrap_or(1), RANKS_MAX)?;
        let refused = |source| StartError::Checkpoint { path: self.model.clone(), source };
        let checkpoint = Checkpoint::open(&self.model).map_err(refused)?;
        let layers = checkpoint.layers();
        let placements = match self.ranks {
            Some(ranks) => contiguous(ranks, self.slots, layers)?,
            None => contiguous(1, 0, layers)?,
        };
        read_scales(&checkpoint).map_err(refused)?;
        let slots = |placement: &protocol::placement::Placement| placement.slots_per_rank();
        let bytes = layers
            .iter()
            .zip(&placements)
            .map(|(layer, placement)| u64::from(slots(placement)) * cpu::slot_bytes(&layer.shape));
        let gpu_bytes =
            layers.iter().map(|l| u64::from(l.shape.experts) * cuda::expert_bytes(&l.shape)).sum();
        let shape = match self.ranks {
            Some(ranks) => HeapShape::of_group(ranks, max_tokens, layers),
            None => HeapShape::alone(max_tokens, layers),
        };
        Ok(Report {
            model: Model::new(&checkpoint),
            group: self.ranks.map(|ranks| (ranks, placements.first().map_or(0, slots))),
            max_tokens,
            slot_bytes: bytes.sum(),
            gpu_bytes,
            heap_bytes: HeapLayout::new(shape).bytes() * u64::from(shape.ranks),
        })
    }
}

fn in_range(key: &'static str, value: u32, max: u32) -> Result<(), ConfigError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Value { key, value: value.to_string(), expected: format!("1 to {max}") })
}

/// Block scales are looked at where an expert is lent.
fn read_scales(checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    for (position, layer) in checkpoint.layers().iter().enumerate() {
        for expert in 0..layer.shape.experts {
            checkpoint.expert(position, expert)?;
        }
        checkpoint.release(position)?;
    }
    Ok(())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, group, max_tokens, slot_bytes, gpu_bytes, heap_bytes } = self;
        writeln!(f, "model       {}", model.name)?;
        let shapes = model.layers.iter().map(|layer| {
            let (experts, k) = (layer.experts, layer.top_k);
            let (hidden, intermediate) = (layer.hidden, layer.intermediate);
            let shape = format!("{experts} experts, top-{k}, hidden {hidden}, intermediate");
            (layer.number, format!("{shape} {intermediate}"))
        });
        for (layers, shape) in together(shapes) {
            writeln!(f, "served      {layers}: {shape}")?;
        }
        let reasons = model.unserved.iter().map(|layer| (layer.number, layer.reason.clone()));
        for (layers, reason) in together(reasons) {
            writeln!(f, "not served  {layers}: {reason}")?;
        }
        match &model.no_nvfp4 {
            None => writeln!(f, "act         bf16, nvfp4")?,
            Some(reason) => writeln!(f, "act         bf16; {reason}")?,
        }
        let [slots, gpu, heap] = [*slot_bytes, *gpu_bytes, *heap_bytes].map(size);
        let calls = format!("calls of up to {max_tokens} tokens");
        match group {
            None => {
                writeln!(
                    f,
                    "memory      cpu: {slots} of packed experts, up to {heap} for {calls}"
                )?;
                writeln!(f, "memory      cuda: {gpu} of packed experts")
            }
            Some((ranks, of_each)) => {
                let what = format!("{slots} of packed experts, {of_each} slots a layer");
                writeln!(f, "memory      cpu, each of {ranks} ranks: {what}")?;
                writeln!(f, "memory      cpu, all ranks together: {heap} of heap for {calls}")
            }
        }
    }
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / MIB;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

/// Neighbours of which the same is said, as `layers 0-2, 5`.
fn together(facts: impl Iterator<Item = (u32, String)>) -> Vec<(String, String)> {
    let mut groups: Vec<(Vec<(u32, u32)>, String)> = Vec::new();
    for (number, fact) in facts {
        let runs = match groups.iter().position(|(_, known)| *known == fact) {
            Some(at) => &mut groups[at].0,
            None => {
                groups.push((Vec::new(), fact));
                let Some((runs, _)) = groups.last_mut() else { continue };
                runs
            }
        };
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let named = |&(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    let listed = |(runs, fact): (Vec<(u32, u32)>, String)| {
        let word =
            if matches!(runs[..], [(first, last)] if first == last) { "layer" } else { "layers" };
        let runs: Vec<String> = runs.iter().map(named).collect();
        (format!("{word} {}", runs.join(", ")), fact)
    };
    groups.into_iter().map(listed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_layers_are_named_by_their_ends() {
        let facts = [(0, "a"), (1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "c"), (9, "b")];
        let facts = facts.map(|(number, fact)| (number, fact.to_owned()));
        let named = together(facts.into_iter());
        let expected = [("layers 0-1, 3-4", "a"), ("layers 2, 9", "b"), ("layer 5", "c")];
        assert_eq!(named, expected.map(|(l, fact)| (l.to_owned(), fact.to_owned())));
    }
}
