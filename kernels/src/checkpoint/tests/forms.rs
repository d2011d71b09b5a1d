//! Every way in which experts are named, split over files and described.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;
use tempfile::TempDir;

use super::golden::data;
use super::written::{EXPERTS, Projection, Sample, WORDS, assert_experts, projection};
use crate::checkpoint::{Checkpoint, UnservedLayer, WhyUnserved};
use crate::expert::RawProjection;
use crate::numeric::dequantise_row;
use crate::problem::{ActFormat, Swiglu};

/// Gate and up rows of an expert in one, gate first; down as it is.
fn units(expert: usize) -> [(&'static str, Vec<Projection>); 2] {
    let [gate, up, down] = [0, 1, 2].map(|which| projection(0, expert, which));
    [("gate_up_proj", vec![gate, up]), ("down_proj", vec![down])]
}

fn joined(projections: &[Projection], bytes: impl Fn(&Projection) -> &Vec<u8>) -> Vec<u8> {
    projections.iter().flat_map(|p| bytes(p).iter().copied()).collect()
}

fn fused() -> Sample {
    let mut sample = Sample::empty();
    for expert in 0..EXPERTS {
        for (word, unit) in units(expert) {
            let stem = format!("model.layers.0.mlp.experts.{expert}.{word}");
            let (rows, cols) = (unit[0].rows * unit.len(), unit[0].cols);
            let codes = joined(&unit, |p| &p.codes);
            sample.put(&format!("{stem}.weight"), Dtype::U8, &[rows, cols / 2], codes);
            let scales = joined(&unit, |p| &p.scales);
            let name = format!("{stem}.weight_scale");
            sample.put(&name, Dtype::F8_E4M3, &[rows, cols / 16], scales);
            let globals: Vec<f32> = unit.iter().map(|p| p.weight_scale_2).collect();
            sample.floats(&format!("{stem}.weight_scale_2"), &[globals.len()], &globals);
            sample.floats(&format!("{stem}.input_scale"), &[1], &[unit[0].input_scale]);
        }
    }
    sample
}

/// All experts in one; `joint` comes between the projection's name and a part's.
fn stacked(joint: &str, weight: &str) -> Sample {
    let mut sample = Sample::empty();
    for number in 0..2 {
        let all: Vec<_> = (0..EXPERTS).map(|expert| units(expert)[number].0).collect();
        let stem = format!("model.layers.0.mlp.experts.{}", all[0]);
        let unit: Vec<Projection> = (0..EXPERTS)
            .flat_map(|expert| {
                let [gate_up, down] = units(expert);
                if number == 0 { gate_up.1 } else { down.1 }
            })
            .collect();
        let together = unit.len() / EXPERTS;
        let (rows, cols) = (unit[0].rows * together, unit[0].cols);
        let codes = joined(&unit, |p| &p.codes);
        let shape = [EXPERTS, rows, cols / 2];
        sample.put(&format!("{stem}{weight}"), Dtype::U8, &shape, codes);
        let scales = joined(&unit, |p| &p.scales);
        let shape = [EXPERTS, rows, cols / 16];
        sample.put(&format!("{stem}{joint}weight_scale"), Dtype::F8_E4M3, &shape, scales);
        let globals: Vec<f32> = unit.iter().map(|p| p.weight_scale_2).collect();
        let name = format!("{stem}{joint}weight_scale_2");
        sample.floats(&name, &[EXPERTS, together], &globals);
        let inputs: Vec<f32> = unit.iter().step_by(together).map(|p| p.input_scale).collect();
        sample.floats(&format!("{stem}{joint}input_scale"), &[EXPERTS], &inputs);
    }
    sample
}

#[test]
fn every_form_lends_the_same_experts() {
    let mut mixtral = Sample::empty();
    mixtral.add_split(0, "model.layers.0.block_sparse_moe.experts", ["w1", "w3", "w2"]);
    let mut vision = Sample::empty();
    vision.config = json!({"text_config": vision.config, "vision_config": {}});
    vision.add_split(0, "model.language_model.layers.0.mlp.experts", WORDS);
    let forms = [
        ("modelopt", Sample::modelopt()),
        ("w1 w3 w2", mixtral),
        ("text_config", vision),
        ("fused", fused()),
        ("stacked", stacked(".", ".weight")),
        ("stacked, bare", stacked("_", "")),
    ];
    for (name, sample) in forms {
        let checkpoint = sample.open().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_experts(&checkpoint, 0, 0);
    }
}

#[test]
fn one_global_scale_serves_all_stacked_experts() {
    let mut sample = stacked("_", "");
    let prefix = "model.layers.0.mlp.experts";
    sample.floats(&format!("{prefix}.gate_up_proj_weight_scale_2"), &[], &[0.25]);
    sample.floats(&format!("{prefix}.down_proj_weight_scale_2"), &[EXPERTS, 1], &[0.5, 1.0, 2.0]);
    let checkpoint = sample.open().unwrap();
    for (expert, down) in [0.5, 1.0, 2.0].into_iter().enumerate() {
        let raw = checkpoint.expert(0, expert as u32).unwrap();
        let got = [raw.gate.weight_scale_2, raw.up.weight_scale_2, raw.down.weight_scale_2];
        assert_eq!(got, [0.25, 0.25, down]);
    }
}

#[test]
fn sharded_files_are_one_checkpoint() {
    let sample = Sample::modelopt();
    let folder = TempDir::new().unwrap();
    sample.write_configs(folder.path());
    let shard = |name: &str| {
        if name.contains("up_proj") { "model-2.safetensors" } else { "model-1.safetensors" }
    };
    for file in ["model-1.safetensors", "model-2.safetensors"] {
        fs::write(folder.path().join(file), sample.file(|name| shard(name) == file)).unwrap();
    }
    let map: BTreeMap<_, _> = sample.tensors.keys().map(|name| (name, shard(name))).collect();
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_experts(&checkpoint, 0, 0);
    checkpoint.release(0).unwrap();
    assert_experts(&checkpoint, 0, 0);
}

#[test]
fn deepseek_layers_and_shared_experts() {
    let mut sample = Sample::empty();
    sample.config = json!({
        "num_hidden_layers": 3, "hidden_size": 64, "moe_intermediate_size": 32,
        "intermediate_size": 999, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 1,
    });
    // Layer 3 predicts further tokens: it is not among the model's layers.
    for layer in 1..=3 {
        sample.add_split(layer, &format!("model.layers.{layer}.mlp.experts"), WORDS);
        let shared = format!("model.layers.{layer}.mlp.shared_experts.gate_proj.weight");
        sample.put(&shared, Dtype::BF16, &[1], vec![0; 2]);
    }
    let checkpoint = sample.open().unwrap();
    let numbers: Vec<u32> = checkpoint.layers().iter().map(|layer| layer.number).collect();
    assert_eq!(numbers, [1, 2]);
    assert_experts(&checkpoint, 0, 1);
    assert_experts(&checkpoint, 1, 2);
    let left = |number, why| UnservedLayer { number, why };
    let beyond = WhyUnserved::Beyond { count: 3 };
    assert_eq!(checkpoint.unserved(), [left(0, WhyUnserved::Dense), left(3, beyond)]);
}

/// Whatever form the experts of a layer have that was left out, and whatever they have that NVFP4
/// experts may not.
#[test]
fn layers_without_quantised_experts_are_left_out() {
    let mut sample = Sample::modelopt();
    sample.config["num_hidden_layers"] = json!(3);
    let experts = "model.layers.1.mlp.experts";
    let shape = [EXPERTS, 64, 64];
    let bytes = vec![0; EXPERTS * 64 * 64 * 2];
    sample.put(&format!("{experts}.gate_up_proj"), Dtype::BF16, &shape, bytes.clone());
    sample.put(&format!("{experts}.down_proj"), Dtype::BF16, &shape, bytes);
    sample.floats(&format!("{experts}.gate_up_proj_bias"), &[2], &[0.0, 1.0]);
    for word in WORDS {
        let stem = format!("model.layers.2.mlp.experts.0.{word}");
        sample.put(&format!("{stem}.weight"), Dtype::F8_E4M3, &[32, 64], vec![0; 2048]);
        sample.floats(&format!("{stem}.weight_scale"), &[], &[1.0]);
    }
    let checkpoint = sample.open().unwrap();
    assert_experts(&checkpoint, 0, 0);
    assert_eq!(checkpoint.layers().len(), 1);
    let left = |number, dtype| UnservedLayer { number, why: WhyUnserved::Unquantised { dtype } };
    assert_eq!(checkpoint.unserved(), [left(1, Dtype::BF16), left(2, Dtype::F8_E4M3)]);
}

#[test]
fn dense_layers_are_left_out() {
    let layers = |config: serde_json::Value, moe: &[u32]| {
        let mut sample = Sample::empty();
        sample.config["num_hidden_layers"] = json!(6);
        for (key, value) in config.as_object().unwrap() {
            sample.config[key] = value.clone();
        }
        for &layer in moe {
            sample.add_split(layer, &format!("model.layers.{layer}.mlp.experts"), WORDS);
        }
        let checkpoint = sample.open().unwrap();
        let numbers: Vec<u32> = checkpoint.layers().iter().map(|layer| layer.number).collect();
        assert_eq!(numbers, moe);
    };
    layers(json!({"decoder_sparse_step": 2}), &[1, 3, 5]);
    layers(json!({"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}), &[1, 2, 3, 5]);
    layers(json!({"moe_layer_freq": 2, "first_k_dense_replace": 1}), &[2, 4]);
    layers(json!({"moe_layer_freq": [0, 1, 0, 0, 0, 1]}), &[1, 5]);
}

#[test]
fn the_quantiser_may_stand_in_config_json() {
    let mut sample = Sample::modelopt();
    sample.quant = None;
    sample.config["quantization_config"] = json!({
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
    });
    assert_experts(&sample.open().unwrap(), 0, 0);
}

#[test]
fn weight_only_checkpoints_have_no_input_scales() {
    let mut sample = Sample::modelopt();
    sample.tensors.retain(|name, _| !name.ends_with("input_scale"));
    let checkpoint = sample.open().unwrap();
    assert_eq!(checkpoint.layers()[0].in13, None);
    assert_eq!(checkpoint.expert(0, 0).unwrap().gate.input_scale, None);
}

#[test]
fn an_expert_that_calibration_missed_serves_bf16_alone() {
    let mut sample = Sample::modelopt();
    let absent = ["gate_proj", "up_proj", "down_proj"]
        .map(|word| format!("model.layers.0.mlp.experts.2.{word}.input_scale"));
    absent.iter().for_each(|name| drop(sample.tensors.remove(name)));
    let checkpoint = sample.open().unwrap();
    assert_eq!(checkpoint.layers()[0].in13, None);
    checkpoint.check_act(ActFormat::Bf16).unwrap();
    let message = checkpoint.check_act(ActFormat::Nvfp4).unwrap_err().to_string();
    for name in absent {
        assert!(message.contains(&name), "{message}");
    }
    assert!(!message.contains("experts.1."), "{message}");
}

#[test]
fn a_digest_tells_checkpoints_apart() {
    let digest = |change: &dyn Fn(&mut Sample)| {
        let mut sample = Sample::modelopt();
        change(&mut sample);
        sample.open().unwrap().digest().unwrap()
    };
    let tensor = |part: &str| format!("model.layers.0.mlp.experts.1.up_proj.{part}");
    let same = digest(&|_| {});
    assert_eq!((digest(&|_| {}), same.len()), (same.clone(), 64));
    let others = [
        digest(&|sample| sample.floats(&tensor("weight_scale_2"), &[], &[0.75])),
        digest(&|sample| sample.config["swiglu_limit"] = json!(7.0)),
        digest(&|sample| sample.tensor(&tensor("weight")).bytes[512] ^= 1),
        digest(&|sample| sample.tensor(&tensor("weight_scale")).bytes[64] ^= 1),
        digest(&|sample| drop(sample.tensors.remove(&tensor("input_scale")))),
    ];
    let all: std::collections::BTreeSet<_> = others.iter().chain([&same]).collect();
    assert_eq!(all.len(), 6);
}

#[test]
fn the_activation_is_read() {
    let swiglu = |fields: serde_json::Value| {
        let mut sample = Sample::modelopt();
        for (key, value) in fields.as_object().unwrap() {
            sample.config[key] = value.clone();
        }
        sample.open().unwrap().layers()[0].shape.swiglu
    };
    let plain = Swiglu::default();
    for limit in [json!(0.0), json!(null)] {
        assert_eq!(swiglu(json!({ "swiglu_limit": limit })), plain);
    }
    assert_eq!(swiglu(json!({"swiglu_limit": 7.0})), Swiglu { limit: Some(7.0), ..plain });
    let oai = Swiglu { limit: None, alpha: 1.702, beta: 1.0 };
    assert_eq!(swiglu(json!({"hidden_act": "swigluoai"})), oai);
    assert_eq!(swiglu(json!({"swiglu_alpha": 1.5})), Swiglu { alpha: 1.5, ..oai });
    let half = json!({"hidden_act": "silu", "swiglu_beta": 0.5});
    assert_eq!(swiglu(half), Swiglu { beta: 0.5, ..plain });
}

#[test]
fn one_of_several_formats_may_be_nvfp4() {
    let folder = TempDir::new().unwrap();
    let source = data("compressed-tensors");
    let config = fs::read(source.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let quantization = &mut config["quantization_config"];
    quantization["format"] = json!("mixed-precision");
    quantization["config_groups"]["group_1"] =
        json!({"format": "float-quantized", "weights": {"group_size": 128, "symmetric": false}});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let file = "model.safetensors";
    fs::copy(source.join(file), folder.path().join(file)).unwrap();
    let (mixed, plain) = (Checkpoint::open(folder.path()).unwrap(), Checkpoint::open(&source));
    assert_eq!(mixed.expert(0, 2).unwrap(), plain.unwrap().expert(0, 2).unwrap());
}

/// `compressed-tensors` wrote this one, and its own reading of it is the expectation.
#[test]
fn compressed_tensors_means_the_same_weights() {
    let folder = data("compressed-tensors");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let bytes = fs::read(folder.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let float =
        |name: &str| f32::from_le_bytes(file.tensor(name).unwrap().data().try_into().unwrap());
    let mut in13 = 0.0_f32;
    for number in 0..3 {
        let expert = checkpoint.expert(0, number).unwrap();
        for (word, projection) in [("w1", expert.gate), ("w3", expert.up), ("w2", expert.down)] {
            let stem = format!("model.layers.0.block_sparse_moe.experts.{number}.{word}");
            let global = float(&format!("{stem}.weight_global_scale"));
            let input = float(&format!("{stem}.input_global_scale"));
            assert_eq!(projection.weight_scale_2, 1.0 / global);
            assert_eq!(projection.input_scale, Some(1.0 / input));
            let want = expected.tensor(&stem).unwrap();
            assert_eq!(want.shape(), [projection.rows, projection.cols]);
            assert_close(&dequantised(&projection), want.data());
        }
        in13 = in13.max(expert.gate.input_scale.unwrap());
    }
    assert_eq!(checkpoint.layers()[0].in13, Some(in13));
}

fn dequantised(projection: &RawProjection<'_>) -> Vec<f32> {
    let RawProjection { rows, cols, codes, scales, weight_scale_2, .. } = *projection;
    let mut values = vec![0.0; rows * cols];
    let inputs = codes.chunks(cols / 2).zip(scales.chunks(cols / 16));
    for (row, (codes, scales)) in values.chunks_mut(cols).zip(inputs) {
        dequantise_row(codes, scales, weight_scale_2, row);
    }
    values
}

/// The package divides where this crate multiplies by a reciprocal: equal but for a rounding or
/// two of fp32.
#[track_caller]
fn assert_close(got: &[f32], want: &[u8]) {
    let want: Vec<f32> = want.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() <= want.abs() * 3e-7, "{got} is not {want}");
    }
    assert!(want.iter().any(|&value| value != 0.0));
}
