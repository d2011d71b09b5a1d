//! Who quantised the experts, by `hf_quant_config.json` or the `quantization_config` of
//! `config.json`; refuses every format but NVFP4 in blocks of 16. Looks at no tensor.

use std::path::Path;

use serde_json::Value;

use super::config::{CONFIG, wrong_value};
use super::error::CheckpointError;
use super::tensors::read_json;
use crate::numeric::BLOCK;

const QUANT_CONFIG: &str = "hf_quant_config.json";

/// The format of `compressed-tensors` that is served.
const PACKED: &str = "nvfp4-pack-quantized";

/// Who wrote the experts, which decides names and the sense of the global scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quantiser {
    /// NVIDIA ModelOpt: global scales multiply.
    ModelOpt,
    /// `compressed-tensors`, format `nvfp4-pack-quantized`: global scales divide.
    CompressedTensors,
}

impl Quantiser {
    /// ModelOpt's own file, or else what `config.json` says.
    pub(super) fn read(folder: &Path, in_config: Option<&Value>) -> Result<Self, CheckpointError> {
        if let Some(file) = read_json::<Value>(&folder.join(QUANT_CONFIG))? {
            return modelopt(QUANT_CONFIG, file.get("quantization").unwrap_or(&file));
        }
        let Some(config) = in_config else {
            let field = "quantization_config (and there is no hf_quant_config.json)";
            return Err(CheckpointError::ConfigMissing { file: CONFIG, field });
        };
        match config.get("quant_method").and_then(Value::as_str) {
            Some("modelopt" | "modelopt_fp4") => modelopt(CONFIG, config),
            Some("compressed-tensors") => compressed_tensors(config),
            method => {
                let value = method.unwrap_or("absent");
                let expected = "modelopt or compressed-tensors";
                Err(wrong_value(CONFIG, "quantization_config.quant_method", &value, expected))
            }
        }
    }
}

fn modelopt(file: &'static str, config: &Value) -> Result<Quantiser, CheckpointError> {
    let algo = config.get("quant_algo").unwrap_or(&Value::Null);
    if !matches!(algo.as_str(), Some("NVFP4" | "W4A16_NVFP4")) {
        return Err(wrong_value(file, "quant_algo", algo, "NVFP4 or W4A16_NVFP4"));
    }
    check_group_size(file, config)?;
    // Newer exports state the group size for each group of layers only.
    groups(config)
        .filter_map(|group| group.get("weights"))
        .try_for_each(|w| check_group_size(file, w))?;
    Ok(Quantiser::ModelOpt)
}

fn compressed_tensors(config: &Value) -> Result<Quantiser, CheckpointError> {
    let format = config.get("format").unwrap_or(&Value::Null);
    // Where a model has several formats, each group of layers names its own.
    let packed = |group: &&Value| group.get("format").unwrap_or(format) == PACKED;
    let mixed = format == "mixed-precision" && groups(config).any(|group| packed(&group));
    if format != PACKED && !mixed {
        return Err(wrong_value(CONFIG, "quantization_config.format", format, PACKED));
    }
    let transform = config.get("transform_config").unwrap_or(&Value::Null);
    if !transform.is_null() && transform.as_object().is_none_or(|fields| !fields.is_empty()) {
        let field = "quantization_config.transform_config";
        return Err(wrong_value(CONFIG, field, transform, "none: inputs are not transformed"));
    }
    for weights in groups(config).filter(packed).filter_map(|group| group.get("weights")) {
        if weights.get("symmetric") == Some(&Value::Bool(false)) {
            return Err(wrong_value(CONFIG, "weights.symmetric", &false, "true"));
        }
        check_group_size(CONFIG, weights)?;
    }
    Ok(Quantiser::CompressedTensors)
}

/// The entries of `config_groups`.
fn groups(config: &Value) -> impl Iterator<Item = &Value> {
    let groups = config.get("config_groups").and_then(Value::as_object);
    groups.into_iter().flatten().map(|(_, group)| group)
}

fn check_group_size(file: &'static str, holder: &Value) -> Result<(), CheckpointError> {
    match holder.get("group_size") {
        Some(size) if size.as_u64() != Some(BLOCK as u64) => {
            Err(wrong_value(file, "group_size", size, "16"))
        }
        _ => Ok(()),
    }
}
