//! Experts of a ModelOpt checkpoint as the reference sees them: names, codes, scales and scalars
//! read by this crate's own decoder. Refusing bad checkpoints is `kernels::checkpoint`'s task.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::tensors::TensorFile;

/// One projection: codes, block scales and the two global scales.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// e2m1 codes, two a byte.
    pub codes: Vec<u8>,
    /// e4m3 block scales.
    pub scales: Vec<u8>,
    /// Global scale of the weights.
    pub weight_scale_2: f32,
    /// Global scale of the activations.
    pub input_scale: f32,
}

/// The three projections of one expert.
#[derive(Debug, Clone, PartialEq)]
pub struct Expert {
    /// Gate projection `[intermediate, hidden]`.
    pub gate: Projection,
    /// Up projection `[intermediate, hidden]`.
    pub up: Projection,
    /// Down projection `[hidden, intermediate]`.
    pub down: Projection,
}

/// The parameters of the activation: limit (infinite where there is none), alpha, beta.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Swiglu {
    /// Clamp of gate (from above) and up (both sides).
    pub limit: f32,
    /// Factor in the sigmoid.
    pub alpha: f32,
    /// Added to up.
    pub beta: f32,
}

/// A checkpoint folder of one file, with MoE layers under Qwen3-MoE's names.
#[derive(Debug)]
pub struct Model {
    dir: PathBuf,
    file: TensorFile,
    /// The activation of every layer.
    pub swiglu: Swiglu,
}

impl Model {
    /// Opens `model.safetensors` and `config.json` of `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let file = TensorFile::open(&dir.join("model.safetensors"))?;
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let config: Value =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let number = |key: &str| config[key].as_f64().map(|value| value as f32);
        let oai = config["hidden_act"] == "swigluoai" || number("swiglu_alpha").is_some();
        let (alpha, beta) = if oai { (1.702, 1.0) } else { (1.0, 0.0) };
        let limit = number("swiglu_limit").filter(|&limit| limit != 0.0);
        let swiglu = Swiglu {
            limit: limit.unwrap_or(f32::INFINITY),
            alpha: number("swiglu_alpha").unwrap_or(alpha),
            beta: number("swiglu_beta").unwrap_or(beta),
        };
        Ok(Self { dir: dir.to_owned(), file, swiglu })
    }

    /// The layers that have experts, ascending.
    #[must_use]
    pub fn layers(&self) -> Vec<u32> {
        let mut layers: Vec<u32> =
            self.file.entries().keys().filter_map(|name| Some(parse_name(name)?.0)).collect();
        layers.sort_unstable();
        layers.dedup();
        layers
    }

    /// How many experts `layer` has.
    pub fn experts(&self, layer: u32) -> Result<u32> {
        let names = self.file.entries().keys().filter_map(|name| parse_name(name));
        let last = names.filter(|n| n.0 == layer).map(|n| n.1).max();
        let none = || format!("{} has no experts in layer {layer}", self.dir.display());
        Ok(last.with_context(none)? + 1)
    }

    /// Reads expert `expert` of `layer`.
    pub fn expert(&self, layer: u32, expert: u32) -> Result<Expert> {
        let read = |name| self.projection(&prefix(layer, expert, name));
        Ok(Expert { gate: read("gate")?, up: read("up")?, down: read("down")? })
    }

    /// in13: the largest `gate_proj.input_scale` of `layer`.
    pub fn in13(&self, layer: u32) -> Result<f32> {
        (0..self.experts(layer)?).try_fold(0.0_f32, |max, expert| {
            let scale = self.scalar(&format!("{}input_scale", prefix(layer, expert, "gate")))?;
            Ok(max.max(scale))
        })
    }

    fn projection(&self, prefix: &str) -> Result<Projection> {
        let name = format!("{prefix}weight");
        let shape = self.file.shape(&name)?;
        ensure!(shape.len() == 2, "{name} has shape {shape:?}, expected two extents");
        let (rows, cols) = (shape[0], shape[1] * 2);
        let codes = self.file.bytes(&name, &["U8"])?;
        let name = format!("{prefix}weight_scale");
        let scales = self.file.bytes(&name, &["F8_E4M3"])?;
        ensure!(scales.len() * 16 == rows * cols, "{name} has {} scales", scales.len());
        let weight_scale_2 = self.scalar(&format!("{prefix}weight_scale_2"))?;
        let input_scale = self.scalar(&format!("{prefix}input_scale"))?;
        Ok(Projection { rows, cols, codes, scales, weight_scale_2, input_scale })
    }

    fn scalar(&self, name: &str) -> Result<f32> {
        let values = self.file.f32(name)?;
        ensure!(values.len() == 1, "{name} has {} elements, expected 1", values.len());
        Ok(values[0])
    }
}

/// The start of the names of one projection's tensors.
fn prefix(layer: u32, expert: u32, projection: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.")
}

fn parse_name(name: &str) -> Option<(u32, u32)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.experts.")?;
    Some((layer.parse().ok()?, rest.split('.').next()?.parse().ok()?))
}
