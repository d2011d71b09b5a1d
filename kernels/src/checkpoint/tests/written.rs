//! Small checkpoints that tests write: one set of experts under any of the names, and whatever a
//! test then breaks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::expert::RawExpert;

pub(super) const EXPERTS: usize = 3;
pub(super) const HIDDEN: usize = 64;
pub(super) const INTERMEDIATE: usize = 32;
pub(super) const WORDS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// One projection of the experts that every form holds.
pub(super) struct Projection {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<u8>,
    pub(super) weight_scale_2: f32,
    pub(super) input_scale: f32,
}

/// Projection `which` (gate, up, down) of an expert. Scalars are powers of two, so that
/// reciprocals are exact; gate and up share their `input_scale` and differ in `weight_scale_2`.
pub(super) fn projection(layer: u32, expert: usize, which: usize) -> Projection {
    let (rows, cols) = if which == 2 { (HIDDEN, INTERMEDIATE) } else { (INTERMEDIATE, HIDDEN) };
    let seed = layer as usize * 97 + expert * 31 + which * 7;
    let bytes = |count: usize, modulus: usize| -> Vec<u8> {
        (0..count).map(|n| ((n * n + 13 * n + seed) % modulus) as u8).collect()
    };
    Projection {
        rows,
        cols,
        codes: bytes(rows * cols / 2, 251),
        scales: bytes(rows * cols / 16, 0x7f),
        weight_scale_2: (-8.0 - which as f32).exp2(),
        input_scale: (-5.0 - expert as f32 - (which / 2) as f32).exp2(),
    }
}

pub(super) struct Tensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

/// A checkpoint before it is written.
pub(super) struct Sample {
    pub(super) config: Value,
    pub(super) quant: Option<Value>,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Sample {
    /// A Qwen3-MoE of one layer without tensors.
    pub(super) fn empty() -> Self {
        let config = json!({
            "num_hidden_layers": 1, "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_act": "silu",
        });
        let quant = json!({"quantization": {"quant_algo": "NVFP4", "group_size": 16}});
        Self { config, quant: Some(quant), tensors: BTreeMap::new() }
    }

    /// ModelOpt's form, one layer.
    pub(super) fn modelopt() -> Self {
        let mut sample = Self::empty();
        sample.add_split(0, "model.layers.0.mlp.experts", WORDS);
        sample
    }

    /// ModelOpt's parts of every projection of every expert.
    pub(super) fn add_split(&mut self, layer: u32, prefix: &str, words: [&str; 3]) {
        for expert in 0..EXPERTS {
            for (which, word) in words.iter().enumerate() {
                let p = projection(layer, expert, which);
                let stem = format!("{prefix}.{expert}.{word}");
                self.put(&format!("{stem}.weight"), Dtype::U8, &[p.rows, p.cols / 2], p.codes);
                let shape = [p.rows, p.cols / 16];
                self.put(&format!("{stem}.weight_scale"), Dtype::F8_E4M3, &shape, p.scales);
                self.floats(&format!("{stem}.weight_scale_2"), &[], &[p.weight_scale_2]);
                self.floats(&format!("{stem}.input_scale"), &[], &[p.input_scale]);
            }
        }
    }

    pub(super) fn put(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name.to_owned(), Tensor { dtype, shape: shape.to_vec(), bytes });
    }

    pub(super) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.put(name, Dtype::F32, shape, bytes);
    }

    pub(super) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap()
    }

    /// The file that holds the tensors for which `keep` holds.
    pub(super) fn file(&self, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        let views = self.tensors.iter().filter(|(name, _)| keep(name)).map(|(name, tensor)| {
            let Tensor { dtype, shape, bytes } = tensor;
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    /// Writes everything but the tensors.
    pub(super) fn write_configs(&self, folder: &Path) {
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        if let Some(quant) = &self.quant {
            fs::write(folder.join("hf_quant_config.json"), quant.to_string()).unwrap();
        }
    }

    /// Writes a single file.
    pub(super) fn write(&self) -> TempDir {
        let folder = TempDir::new().unwrap();
        self.write_configs(folder.path());
        fs::write(folder.path().join("model.safetensors"), self.file(|_| true)).unwrap();
        folder
    }

    pub(super) fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(self.write().path())
    }

    /// The message, with its causes, that opening ends in.
    #[track_caller]
    pub(super) fn refusal(&self) -> String {
        full_message(&self.open().unwrap_err())
    }
}

/// A message and its causes.
pub(super) fn full_message(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |message, cause| format!("{message}: {cause}"))
}

/// Asserts that a layer lends the experts of [`projection`].
#[track_caller]
pub(super) fn assert_experts(checkpoint: &Checkpoint, position: usize, layer: u32) {
    for number in 0..EXPERTS {
        let RawExpert { gate, up, down } = checkpoint.expert(position, number as u32).unwrap();
        for (which, got) in [gate, up, down].into_iter().enumerate() {
            let want = projection(layer, number, which);
            assert_eq!((got.rows, got.cols), (want.rows, want.cols), "expert {number} {which}");
            assert!(got.codes == want.codes, "codes of expert {number}, projection {which}");
            assert!(got.scales == want.scales, "scales of expert {number}, projection {which}");
            assert_eq!(got.weight_scale_2, want.weight_scale_2, "expert {number} {which}");
            assert_eq!(got.input_scale, Some(want.input_scale), "expert {number} {which}");
        }
    }
    assert_eq!(checkpoint.layers()[position].in13, Some((-5_f32).exp2()));
}
