//! What a checkpoint is refused for: one broken thing each, and the words of the refusal.

use std::fs;

use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::written::{EXPERTS, Sample, WORDS, full_message};
use crate::checkpoint::Checkpoint;

const EXPERT_1: &str = "model.layers.0.mlp.experts.1";

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

/// Breaks a good checkpoint and says what it is refused with.
#[track_caller]
fn refused(breaking: impl FnOnce(&mut Sample), parts: &[&str]) {
    let mut sample = Sample::modelopt();
    breaking(&mut sample);
    assert_says(&sample.refusal(), parts);
}

/// Replaces the weight file by these bytes.
#[track_caller]
fn refused_file(bytes: &[u8], parts: &[&str]) {
    let folder = TempDir::new().unwrap();
    Sample::empty().write_configs(folder.path());
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let message = full_message(&Checkpoint::open(folder.path()).unwrap_err());
    assert_says(&message, &["model.safetensors", "no valid safetensors header"]);
    assert_says(&message, parts);
}

/// A safetensors file with this header and as many zeros.
fn file(header: &Value, data: usize) -> Vec<u8> {
    let text = header.to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn u8_tensor(begin: usize, end: usize) -> Value {
    json!({"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]})
}

#[test]
fn truncated_files() {
    let whole = Sample::modelopt().file(|_| true);
    refused_file(&[], &["0 bytes", "header too small"]);
    refused_file(&whole[..5], &["5 bytes", "header too small"]);
    refused_file(&whole[..100], &["100 bytes", "invalid header length"]);
    refused_file(&whole[..whole.len() - 1], &["incomplete metadata"]);
    refused_file(&[&whole[..], &[0]].concat(), &["incomplete metadata"]);
}

#[test]
fn oversized_headers() {
    let mut bytes = Sample::modelopt().file(|_| true);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused_file(&bytes, &["header too large"]);
    bytes[..8].copy_from_slice(&100_000_001_u64.to_le_bytes());
    refused_file(&bytes, &["header too large"]);
}

#[test]
fn overlapping_and_gaping_tensors() {
    let overlapping = json!({"a": u8_tensor(0, 8), "b": u8_tensor(4, 12)});
    refused_file(&file(&overlapping, 12), &["invalid offset", "b"]);
    let gaping = json!({"a": u8_tensor(0, 8), "b": u8_tensor(12, 16)});
    refused_file(&file(&gaping, 16), &["invalid offset", "b"]);
    let beyond = json!({"a": u8_tensor(0, 64)});
    refused_file(&file(&beyond, 8), &["incomplete metadata"]);
    let lying = json!({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}});
    refused_file(&file(&lying, 8), &["invalid shape, data type, or offset"]);
    let huge = json!({"a": {"dtype": "F32", "shape": [u64::MAX, 2], "data_offsets": [0, 8]}});
    refused_file(&file(&huge, 8), &["overflow"]);
}

#[test]
fn headers_that_are_no_json() {
    refused_file(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', b'x'], &["invalid JSON in header"]);
    refused_file(&[1, 0, 0, 0, 0, 0, 0, 0, 0xff], &["invalid UTF-8 in header"]);
}

#[test]
fn missing_tensors() {
    for part in ["weight", "weight_scale", "weight_scale_2"] {
        let tensor = format!("{EXPERT_1}.up_proj.{part}");
        let parts = [tensor.as_str(), "is missing, expected"];
        refused(|sample| drop(sample.tensors.remove(&tensor)), &parts);
    }
    let tensor = "model.layers.0.mlp.experts.0.gate_proj.weight";
    refused(|sample| drop(sample.tensors.remove(tensor)), &[tensor, "U8 [32, 32]"]);
    refused(
        |sample| sample.config["num_experts"] = json!(EXPERTS + 1),
        &["model.layers.0.mlp.experts.3.gate_proj.weight is missing, expected U8 [32, 32]"],
    );
}

#[test]
fn missing_and_ambiguous_layers() {
    refused(|sample| sample.config["num_hidden_layers"] = json!(2), &["layer 1 has no experts"]);
    refused(
        |sample| sample.add_split(0, "other.layers.0.mlp.experts", WORDS),
        &["layer 0", "model.layers.0.mlp.experts", "other.layers.0.mlp.experts"],
    );
}

#[test]
fn wrong_dtypes() {
    let unquantised = |sample: &mut Sample| {
        let tensor = sample.tensor(&format!("{EXPERT_1}.down_proj.weight"));
        tensor.dtype = Dtype::BF16;
        tensor.bytes.resize(2 * tensor.bytes.len(), 0);
    };
    let parts = ["model.safetensors", "experts.1.down_proj.weight", "BF16", "expected U8"];
    refused(unquantised, &parts);
    refused(
        |sample| sample.tensor(&format!("{EXPERT_1}.up_proj.weight_scale")).dtype = Dtype::U8,
        &["experts.1.up_proj.weight_scale has dtype U8, expected F8_E4M3"],
    );
    refused(
        |sample| sample.tensor(&format!("{EXPERT_1}.up_proj.input_scale")).dtype = Dtype::I32,
        &["experts.1.up_proj.input_scale has dtype I32, expected F32"],
    );
}

#[test]
fn wrong_shapes() {
    let name = format!("{EXPERT_1}.gate_proj.weight");
    let rows = |rows: usize| {
        let name = name.clone();
        move |sample: &mut Sample| sample.put(&name, Dtype::U8, &[rows, 32], vec![0; rows * 32])
    };
    refused(rows(48), &[&name, "[48, 32], expected [32, 32]"]);
    refused(rows(16), &[&name, "[16, 32], expected [32, 32]"]);
    let scales = |sample: &mut Sample| {
        sample.tensor(&format!("{EXPERT_1}.down_proj.weight_scale")).shape = vec![2, 64];
    };
    refused(scales, &["down_proj.weight_scale has shape [2, 64], expected [64, 2]"]);
    let global = |sample: &mut Sample| {
        sample.floats(&format!("{EXPERT_1}.up_proj.weight_scale_2"), &[2], &[1.0, 1.0]);
    };
    refused(global, &["up_proj.weight_scale_2 has shape [2], expected []"]);
}

#[test]
fn fused_rows_other_than_twice_i() {
    let mut sample = Sample::empty();
    let stem = "model.layers.0.mlp.experts.0.gate_up_proj";
    sample.put(&format!("{stem}.weight"), Dtype::U8, &[48, 32], vec![0; 48 * 32]);
    sample.floats(&format!("{stem}.weight_scale_2"), &[], &[1.0]);
    assert_says(&sample.refusal(), &["gate_up_proj.weight has shape [48, 32], expected [64, 32]"]);
}

#[test]
fn stacked_experts_with_k_along_the_rows() {
    let mut sample = Sample::empty();
    let stem = "model.layers.0.mlp.experts.gate_up_proj";
    sample.put(stem, Dtype::U8, &[EXPERTS, 32, 64], vec![0; EXPERTS * 32 * 64]);
    sample.floats(&format!("{stem}_weight_scale_2"), &[], &[1.0]);
    assert_says(&sample.refusal(), &["gate_up_proj has shape [3, 32, 64], expected [3, 64, 32]"]);
}

#[test]
fn global_scales_that_are_no_scales() {
    for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-0.5, "-0.5")] {
        for part in ["down_proj.weight_scale_2", "down_proj.input_scale"] {
            let tensor = format!("{EXPERT_1}.{part}");
            let parts = [&tensor, "model.safetensors", &format!("is {word} at 0, expected")];
            refused(|sample| sample.floats(&tensor, &[], &[value]), &parts);
        }
    }
    refused(
        |sample| sample.floats(&format!("{EXPERT_1}.up_proj.weight_scale_2"), &[], &[0.0]),
        &["experts.1.up_proj.weight_scale_2", "is 0 at 0, expected a positive"],
    );
    for (value, word) in [(0.0, "0"), (1e-45, "0.000")] {
        let tensor = format!("{EXPERT_1}.down_proj.input_scale");
        let parts = [&tensor, &format!("is {word}"), "finite reciprocal"];
        refused(|sample| sample.floats(&tensor, &[], &[value]), &parts);
    }
}

#[test]
fn input_scales_of_gate_and_up_that_differ() {
    refused(
        |sample| sample.floats(&format!("{EXPERT_1}.up_proj.input_scale"), &[], &[0.5]),
        &[
            "experts.1.gate_proj.input_scale is 0.015625",
            "experts.1.up_proj.input_scale is 0.5, expected the same",
        ],
    );
}

#[test]
fn block_scales_that_are_no_scales() {
    let tensor = format!("{EXPERT_1}.gate_proj.weight_scale");
    for (bits, word) in [(0x7f, "NaN (0x7f)"), (0xff, "NaN (0xff)"), (0xb8, "-1 (0xb8)")] {
        let mut sample = Sample::modelopt();
        sample.tensor(&tensor).bytes[4 * 5 + 2] = bits;
        let checkpoint = sample.open().unwrap();
        let message = checkpoint.expert(0, 1).unwrap_err().to_string();
        assert_says(&message, &[&tensor, word, "row 5, column 2", "model.safetensors"]);
        assert!(checkpoint.expert(0, 0).is_ok(), "other experts are served");
    }
    let mut sample = Sample::modelopt();
    sample.tensor(&tensor).bytes[3] = 0x80;
    assert!(sample.open().unwrap().expert(0, 1).is_ok(), "-0 is a zero block");
}

#[test]
fn block_scales_of_a_fused_tensor_are_named_by_its_own_rows() {
    let mut sample = Sample::empty();
    sample.config["num_experts"] = json!(1);
    sample.config["num_experts_per_tok"] = json!(1);
    for (word, rows, cols) in [("gate_up_proj", 64, 64), ("down_proj", 64, 32)] {
        let stem = format!("model.layers.0.mlp.experts.0.{word}");
        let name = format!("{stem}.weight");
        sample.put(&name, Dtype::U8, &[rows, cols / 2], vec![0; rows * cols / 2]);
        let mut scales = vec![0; rows * cols / 16];
        if word == "gate_up_proj" {
            scales[33 * 4 + 3] = 0xff;
        }
        sample.put(&format!("{stem}.weight_scale"), Dtype::F8_E4M3, &[rows, cols / 16], scales);
        sample.floats(&format!("{stem}.weight_scale_2"), &[], &[1.0]);
    }
    let message = sample.open().unwrap().expert(0, 0).unwrap_err().to_string();
    assert_says(&message, &["gate_up_proj.weight_scale", "row 33, column 3"]);
}

#[test]
fn shapes_that_cannot_be_packed() {
    let shape = |field: &str, value: u32| {
        let field = field.to_owned();
        move |sample: &mut Sample| sample.config[field] = json!(value)
    };
    refused(shape("hidden_size", 48), &["hidden is 48, expected a positive multiple of 32"]);
    refused(shape("hidden_size", 0), &["hidden is 0"]);
    let parts = ["intermediate is 24, expected a positive multiple of 16"];
    refused(shape("moe_intermediate_size", 24), &parts);
    refused(shape("num_experts_per_tok", 17), &["top_k is 17, expected 1 to 16"]);
    refused(shape("num_experts", 0), &["at least one expert"]);
    refused(shape("num_hidden_layers", 0), &["num_hidden_layers is 0"]);
    refused(shape("num_hidden_layers", u32::MAX), &["num_hidden_layers is 4294967295"]);
    refused(
        |sample| sample.config["swiglu_limit"] = json!(-1.0),
        &["swiglu_limit is -1, expected a positive finite number"],
    );
    refused(
        |sample| sample.config["swiglu_beta"] = json!(1e39),
        &["swiglu_beta is inf, expected a finite number"],
    );
}

#[test]
fn configurations_that_are_not_served() {
    for field in ["hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"] {
        let remove = |sample: &mut Sample| {
            sample.config.as_object_mut().unwrap().remove(field);
        };
        refused(remove, &["config.json lacks", field]);
    }
    refused(
        |sample| sample.config["hidden_act"] = json!("gelu"),
        &["hidden_act is gelu, expected silu or swigluoai"],
    );
    refused(
        |sample| sample.config["hidden_size"] = json!("wide"),
        &["config.json is not the JSON expected", "wide"],
    );
}

#[test]
fn quantisers_that_are_not_served() {
    let file = |quantization: Value| {
        move |sample: &mut Sample| sample.quant = Some(json!({"quantization": quantization}))
    };
    refused(
        file(json!({"quant_algo": "FP8"})),
        &["hf_quant_config.json: quant_algo is \"FP8\", expected NVFP4"],
    );
    refused(file(json!({"quant_algo": null})), &["quant_algo is null"]);
    let odd_group = json!({"quant_algo": "NVFP4", "group_size": 32});
    refused(file(odd_group), &["group_size is 32, expected 16"]);
    let config = |quantization: Value| {
        move |sample: &mut Sample| {
            sample.quant = None;
            sample.config["quantization_config"] = quantization;
        }
    };
    refused(config(Value::Null), &["config.json lacks quantization_config"]);
    refused(config(json!({"quant_method": "awq"})), &["quant_method is awq, expected modelopt"]);
    let mixed = json!({"quant_method": "compressed-tensors", "format": "mixed-precision",
        "config_groups": {"group_0": {"format": "float-quantized", "weights": {}}}});
    refused(config(mixed), &["format is \"mixed-precision\", expected nvfp4-pack-quantized"]);
    let packed = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
    refused(config(packed), &["format is \"pack-quantized\", expected nvfp4-pack-quantized"]);
    let with = |key: &str, value: Value| {
        let method = "compressed-tensors";
        let mut config = json!({"quant_method": method, "format": "nvfp4-pack-quantized"});
        config[key] = value;
        config
    };
    let groups = |weights: Value| json!({"group_0": {"weights": weights}});
    let odd_group = with("config_groups", groups(json!({"group_size": 128})));
    refused(config(odd_group), &["group_size is 128, expected 16"]);
    let asymmetric = with("config_groups", groups(json!({"symmetric": false})));
    refused(config(asymmetric), &["weights.symmetric is false, expected true"]);
    let hadamard = with("transform_config", json!({"config_groups": {"u": {}}}));
    refused(config(hadamard), &["transform_config is", "not transformed"]);
}

#[test]
fn reciprocals_of_nothing() {
    let mut sample = Sample::empty();
    sample.quant = None;
    sample.config["quantization_config"] =
        json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"});
    let stem = "model.layers.0.mlp.experts.0.gate_proj";
    sample.put(&format!("{stem}.weight_packed"), Dtype::U8, &[32, 32], vec![0; 32 * 32]);
    sample.put(&format!("{stem}.weight_scale"), Dtype::F8_E4M3, &[32, 4], vec![0; 32 * 4]);
    sample.floats(&format!("{stem}.weight_global_scale"), &[1], &[0.0]);
    assert_says(&sample.refusal(), &["gate_proj.weight_global_scale is 0 at 0", "positive"]);
}

#[test]
fn tensors_that_would_be_ignored() {
    refused(
        |sample| sample.put(&format!("{EXPERT_1}.up_proj.bias"), Dtype::BF16, &[1], vec![0; 2]),
        &["experts.1.up_proj.bias is not served: experts have no bias"],
    );
    refused(
        |sample| sample.floats(&format!("{EXPERT_1}.up_proj.pre_quant_scale"), &[1], &[2.0]),
        &["experts.1.up_proj.pre_quant_scale is not served"],
    );
    refused(
        |sample| sample.config["num_experts"] = json!(2),
        &["experts.2.gate_proj.weight is not served: config.json counts fewer experts"],
    );
}

#[test]
fn folders_without_a_checkpoint() {
    let folder = TempDir::new().unwrap();
    let open = || full_message(&Checkpoint::open(folder.path()).unwrap_err());
    assert_says(&open(), &["cannot read", "config.json"]);
    fs::write(folder.path().join("config.json"), "{").unwrap();
    assert_says(&open(), &["config.json is not the JSON expected", "EOF"]);
    Sample::empty().write_configs(folder.path());
    assert_says(&open(), &["neither model.safetensors nor model.safetensors.index.json"]);
}

#[test]
fn indices_that_lie() {
    let sample = Sample::modelopt();
    let folder = sample.write();
    let open = |map: Value| {
        let index = json!({"weight_map": map}).to_string();
        fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        full_message(&Checkpoint::open(folder.path()).unwrap_err())
    };
    let absolute = open(json!({"a": "/etc/passwd"}));
    assert_says(&absolute, &["tensor a in \"/etc/passwd\", expected a plain file name"]);
    assert_says(&open(json!({"a": "../model.safetensors"})), &["expected a plain file name"]);
    assert_says(&open(json!({"a": ".."})), &["expected a plain file name"]);
    let gone = open(json!({"a": "gone.safetensors", "b": "lost.safetensors"}));
    assert_says(&gone, &["gone.safetensors, lost.safetensors are named by the index and absent"]);
    let lost = open(json!({"a": "model.safetensors"}));
    assert_says(&lost, &["tensor a in model.safetensors, which does not hold it"]);
}

proptest! {
    /// Whatever a file's first bytes are turned into, it opens or is refused.
    #[test]
    fn no_header_makes_it_panic(
        changes in prop::collection::vec((0_usize..4000, any::<u8>()), 1..8),
        cut in 0_usize..6000,
    ) {
        let sample = Sample::modelopt();
        let mut bytes = sample.file(|_| true);
        let length = bytes.len();
        for (position, value) in changes {
            bytes[position] = value;
        }
        // One file in three is cut off besides.
        bytes.truncate(if cut < 2000 { length - cut } else { length });
        let folder = TempDir::new().unwrap();
        sample.write_configs(folder.path());
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        match Checkpoint::open(folder.path()) {
            Ok(checkpoint) => {
                for expert in 0..EXPERTS as u32 {
                    let lent = checkpoint.expert(0, expert).map(|raw| raw.down.codes.len());
                    prop_assert!(lent.is_err() || lent.is_ok_and(|bytes| bytes == 64 * 16));
                }
            }
            Err(error) => prop_assert!(!full_message(&error).is_empty()),
        }
    }
}

#[test]
fn layers_and_experts_that_are_not_there() {
    let checkpoint = Sample::modelopt().open().unwrap();
    let message = |position, expert| checkpoint.expert(position, expert).unwrap_err().to_string();
    assert_eq!(message(0, 3), "expert 3 is outside the checkpoint's 3");
    assert_eq!(message(1, 0), "layer position 1 is outside the checkpoint's 1");
    let error = checkpoint.release(1).unwrap_err().to_string();
    assert_eq!(error, "layer position 1 is outside the checkpoint's 1");
}
