//! Recorded activations of a real model: for each MoE layer its inputs, and what the unquantised
//! model answered.

use std::path::Path;

use anyhow::{Result, ensure};
use reference::layer::Inputs;
use reference::tensors::TensorFile;

/// One layer's recording.
#[derive(Debug, Clone)]
pub struct RecordedLayer {
    /// The model's number of the layer.
    pub number: u32,
    /// What the engine brings.
    pub inputs: Inputs,
    /// The unquantised model's output, bf16 bits `[tokens, hidden]`.
    pub unquantised: Vec<u16>,
}

/// A file of recordings.
#[derive(Debug)]
pub struct Recorded {
    file: TensorFile,
}

impl Recorded {
    /// Opens the file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: TensorFile::open(path)? })
    }

    /// Reads every layer, ascending.
    pub fn layers(&self) -> Result<Vec<RecordedLayer>> {
        let names = self.file.entries().keys();
        let number = |name: &String| {
            name.strip_prefix("layers.")?.strip_suffix(".hidden_states")?.parse().ok()
        };
        let mut numbers: Vec<u32> = names.filter_map(number).collect();
        numbers.sort_unstable();
        ensure!(!numbers.is_empty(), "no tensor is named layers.N.hidden_states");
        numbers.into_iter().map(|number| self.layer(number)).collect()
    }

    fn layer(&self, number: u32) -> Result<RecordedLayer> {
        let name = |part: &str| format!("layers.{number}.{part}");
        let hidden = self.file.shape(&name("hidden_states"))?[1];
        let top_k = self.file.shape(&name("topk_ids"))?[1];
        let inputs = Inputs {
            hidden,
            top_k,
            x: self.file.bf16(&name("hidden_states"))?,
            ids: self.file.i32(&name("topk_ids"))?,
            weights: self.file.f32(&name("topk_weights"))?,
        };
        let unquantised = self.file.bf16(&name("moe_out_unquantised"))?;
        Ok(RecordedLayer { number, inputs, unquantised })
    }
}
