//! What `config.json` says of the model: which layers have experts, and their shape. Reads the
//! forms of Qwen3-MoE, Mixtral and DeepSeek-V3 by their fields, not by their names, so that models
//! which share a form are served too. Who quantised them is `quantiser`'s part.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::error::CheckpointError;
use super::quantiser::Quantiser;
use super::tensors::read_json;
use crate::problem::{LayerShape, Swiglu};

/// Most layers of a model: far beyond any there is, and few enough to be listed.
const LAYERS_MAX: u32 = 4096;

/// alpha and beta of the activation that OpenAI's open models brought, where the configuration
/// names it without its numbers.
const SWIGLUOAI: (f32, f32) = (1.702, 1.0);

pub(super) const CONFIG: &str = "config.json";

/// The facts of the checkpoint that its tensors do not state.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    pub(super) quantiser: Quantiser,
    pub(super) shape: LayerShape,
    /// Layers of the model, dense ones counted.
    pub(super) count: u32,
    /// The model's numbers of its MoE layers, ascending.
    pub(super) layers: Vec<u32>,
}

/// `config.json`, or its `text_config` for models that also see.
#[derive(Debug, Deserialize)]
struct ModelConfig {
    num_hidden_layers: Option<u32>,
    hidden_size: Option<u32>,
    intermediate_size: Option<u32>,
    moe_intermediate_size: Option<u32>,
    num_experts: Option<u32>,
    num_local_experts: Option<u32>,
    n_routed_experts: Option<u32>,
    num_experts_per_tok: Option<u32>,
    swiglu_limit: Option<f32>,
    swiglu_alpha: Option<f32>,
    swiglu_beta: Option<f32>,
    hidden_act: Option<String>,
    decoder_sparse_step: Option<u32>,
    #[serde(default)]
    mlp_only_layers: Vec<u32>,
    first_k_dense_replace: Option<u32>,
    moe_layer_freq: Option<LayerFrequency>,
}

/// DeepSeek's `moe_layer_freq`: every n-th layer, or one flag for each.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum LayerFrequency {
    Every(u32),
    Flags(Vec<u32>),
}

#[derive(Debug, Deserialize)]
struct WholeConfig {
    text_config: Option<Value>,
    quantization_config: Option<Value>,
}

impl Config {
    /// Reads both files of `folder`.
    pub(super) fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(CONFIG);
        let Some(whole) = read_json::<Value>(&path)? else {
            let source = std::io::ErrorKind::NotFound.into();
            return Err(CheckpointError::Io { action: "read", path, source });
        };
        let json = |source| CheckpointError::Json { path: path.clone(), source };
        let WholeConfig { text_config, quantization_config } =
            WholeConfig::deserialize(&whole).map_err(json)?;
        let model = ModelConfig::deserialize(text_config.as_ref().unwrap_or(&whole));
        let model = model.map_err(json)?;
        let nested = text_config.as_ref().and_then(|text| text.get("quantization_config"));
        let quantiser = Quantiser::read(folder, quantization_config.as_ref().or(nested))?;
        let count = model.layer_count()?;
        Ok(Self { quantiser, shape: model.shape()?, count, layers: model.moe_layers(count)? })
    }
}

impl ModelConfig {
    fn shape(&self) -> Result<LayerShape, CheckpointError> {
        let experts = self.num_experts.or(self.num_local_experts).or(self.n_routed_experts);
        let intermediate = self.moe_intermediate_size.or(self.intermediate_size);
        let shape = LayerShape {
            experts: required(experts, "num_experts, num_local_experts or n_routed_experts")?,
            top_k: required(self.num_experts_per_tok, "num_experts_per_tok")?,
            hidden: required(self.hidden_size, "hidden_size")?,
            intermediate: required(intermediate, "moe_intermediate_size or intermediate_size")?,
            swiglu: self.swiglu()?,
        };
        shape.check()?;
        Ok(shape)
    }

    /// Engines that drop these parameters serve such models without an error and answer garbage.
    fn swiglu(&self) -> Result<Swiglu, CheckpointError> {
        // Some exports say `silu` beside the alpha of the other activation.
        let oai = match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => self.swiglu_alpha.is_some(),
            Some("swigluoai") => true,
            Some(act) => return Err(wrong_value(CONFIG, "hidden_act", &act, "silu or swigluoai")),
        };
        let (alpha, beta) = if oai { SWIGLUOAI } else { (1.0, 0.0) };
        Ok(Swiglu {
            // 0 is how exports say "no clamp".
            limit: self.swiglu_limit.filter(|limit| *limit != 0.0),
            alpha: self.swiglu_alpha.unwrap_or(alpha),
            beta: self.swiglu_beta.unwrap_or(beta),
        })
    }

    fn layer_count(&self) -> Result<u32, CheckpointError> {
        let count = required(self.num_hidden_layers, "num_hidden_layers")?;
        if count > LAYERS_MAX {
            return Err(wrong_value(CONFIG, "num_hidden_layers", &count, "at most 4096"));
        }
        Ok(count)
    }

    fn moe_layers(&self, count: u32) -> Result<Vec<u32>, CheckpointError> {
        let layers: Vec<u32> = (0..count).filter(|&layer| self.is_moe(layer)).collect();
        if layers.is_empty() {
            let expected = "at least one layer with experts";
            return Err(wrong_value(CONFIG, "num_hidden_layers", &count, expected));
        }
        Ok(layers)
    }

    fn is_moe(&self, layer: u32) -> bool {
        let listed = match &self.moe_layer_freq {
            None => true,
            Some(LayerFrequency::Every(every)) => layer.is_multiple_of((*every).max(1)),
            Some(LayerFrequency::Flags(flags)) => flags.get(layer as usize).is_some_and(|f| *f > 0),
        };
        // Qwen counts layers from 1 here: a step of 2 makes layers 1, 3, 5 sparse.
        let step = self.decoder_sparse_step.unwrap_or(1).max(1);
        listed
            && layer >= self.first_k_dense_replace.unwrap_or(0)
            && (layer + 1).is_multiple_of(step)
            && !self.mlp_only_layers.contains(&layer)
    }
}

fn required(value: Option<u32>, field: &'static str) -> Result<u32, CheckpointError> {
    value.ok_or(CheckpointError::ConfigMissing { file: CONFIG, field })
}

pub(super) fn wrong_value(
    file: &'static str,
    field: &'static str,
    value: &dyn std::fmt::Display,
    expected: &'static str,
) -> CheckpointError {
    CheckpointError::ConfigValue { file, field, value: value.to_string(), expected }
}
