//! Checkpoints of every form, and those that a worker refuses to start on. Each is made from a
//! golden case, so that its outputs are known.

use std::fs;
use std::path::Path;
use std::process::Command;

use protocol::message::Phase;
use reference::compare::Comparison;
use reference::layer::Variant;
use safetensors::tensor::Dtype;
use serde_json::json;
use tests::call::through;
use tests::case::Case;
use tests::rewrite::{Rewrite, Tensor};
use tests::worker_process::{Worker, program};

use crate::{BF16, NVFP4, assert_says, data};

fn golden(name: &str) -> Rewrite {
    Rewrite::open(&data("moe-golden").join(name)).unwrap()
}

/// Serves the folder and compares all variants with its recorded outputs.
#[track_caller]
fn assert_served(folder: &Path) {
    let case = Case::open(folder).unwrap();
    let worker = Worker::start(folder, &[]).unwrap();
    for variant in Variant::ALL {
        let mut engine = worker.engine(variant, case.inputs.tokens()).unwrap();
        let output = through(&mut engine, 0, Phase::Prefill, &case.inputs).unwrap();
        let comparison = Comparison::new(&output, &case.expected(variant).unwrap());
        assert!(comparison.passes(variant), "{variant} {comparison}");
    }
}

/// What a worker says that does not start on the folder.
#[track_caller]
fn refusal(folder: &Path) -> String {
    let mut worker = Worker::spawn(folder, &[]).unwrap();
    let status = worker.wait().unwrap();
    let log = worker.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(!log.contains("panicked"), "{log}");
    log
}

/// A case whose checkpoint the package compressed-tensors wrote: global scales divide.
#[test]
fn compressed_tensors_are_served() {
    assert_served(&data("compressed-tensors-case"));
}

/// Mixtral's names, with gate and up scales that differ (by a factor of 70 in one expert).
#[test]
fn mixtral_with_two_alphas_is_served_exactly() {
    let mut mixtral = golden("two_alphas_e4_k2_h256_i128").renamed(|name| {
        name.replace(".mlp.", ".block_sparse_moe.")
            .replace("gate_proj", "w1")
            .replace("up_proj", "w3")
            .replace("down_proj", "w2")
    });
    mixtral.config = json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 128,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    });
    assert_served(mixtral.write().unwrap().path());
}

/// The factor and the shared expert are the engine's business: weights are used once, as given.
#[test]
fn deepseek_is_served_without_its_scaling_factor_and_shared_expert() {
    let mut deepseek = golden("e4_k4_h512_i256");
    deepseek.config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 512,
        "moe_intermediate_size": 256, "intermediate_size": 1024, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": true, "scoring_func": "sigmoid",
    });
    let shared = Tensor { dtype: Dtype::BF16, shape: vec![2, 512], bytes: vec![0x3f; 2048] };
    let name = "model.layers.0.mlp.shared_experts.gate_proj.weight";
    deepseek.tensors.insert(name.to_owned(), shared);
    assert_served(deepseek.write().unwrap().path());
}

#[test]
fn limits_that_mean_no_clamp_do_not_clamp() {
    for limit in [json!(0.0), json!(null)] {
        let mut case = golden("e13_k3_h256_i128_t1");
        case.config["swiglu_limit"] = limit;
        assert_served(case.write().unwrap().path());
    }
}

/// Shards hold stale copies of tensors that the index assigns to other files: once before and once
/// after the right one.
#[test]
fn the_index_decides_among_copies() {
    let case = golden("masked_e8_k2_h256_i128");
    let shard = |name: &str| {
        if name.contains(".experts.3.") {
            "model-00001-of-00002.safetensors"
        } else {
            "model-00002-of-00002.safetensors"
        }
    };
    let copied = |name: &str| name.contains(".experts.3.") || name.contains(".experts.5.");
    assert_served(case.write_shards(shard, copied).unwrap().path());
}

#[test]
fn shards_that_are_absent_cut_or_empty_handed_are_named() {
    let case = golden("e4_k4_h512_i256");
    let shard = |name: &str| match name.split(".experts.").nth(1).unwrap_or_default().as_bytes() {
        [b'0', ..] => "model-00001-of-00003.safetensors",
        [b'1', ..] => "model-00002-of-00003.safetensors",
        _ => "model-00003-of-00003.safetensors",
    };
    let written = || case.write_shards(shard, |_| false).unwrap();
    assert_served(written().path());

    let folder = written();
    fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert_says(&refusal(folder.path()), &["model-00002-of-00003.safetensors", "absent"]);

    let folder = written();
    let third = folder.path().join("model-00003-of-00003.safetensors");
    let bytes = fs::read(&third).unwrap();
    fs::write(&third, &bytes[..bytes.len() * 7 / 10]).unwrap();
    let said = refusal(folder.path());
    assert_says(&said, &["model-00003-of-00003.safetensors", "no valid safetensors header"]);

    let folder = written();
    let lacking = "experts.1.up_proj.weight_scale";
    let bytes = case.file(|name| shard(name).contains("00002") && !name.ends_with(lacking));
    fs::write(folder.path().join("model-00002-of-00003.safetensors"), bytes.unwrap()).unwrap();
    assert_says(&refusal(folder.path()), &[lacking, "model-00002-of-00003.safetensors"]);
}

#[test]
fn activations_that_are_not_served_are_named() {
    let case = |key: &str, value: serde_json::Value| {
        let mut case = golden("clamp_e4_k2_h128_i64");
        case.config[key] = value;
        refusal(case.write().unwrap().path())
    };
    assert_says(&case("swiglu_limit", json!(-0.5)), &["swiglu_limit", "-0.5"]);
    assert_says(&case("hidden_act", json!("gelu_tanh")), &["hidden_act", "gelu_tanh"]);
}

/// A bf16 matrix of as many elements; which, is of no matter.
fn unquantise(weight: &mut Tensor) {
    weight.dtype = Dtype::BF16;
    weight.shape[1] *= 2;
    weight.bytes = weight.bytes.repeat(4);
}

/// A whole layer may be left out of the quantisation; an expert of a quantised layer may not.
#[test]
fn one_unquantised_expert_in_a_quantised_layer_is_named() {
    for expert in [0, 2] {
        let mut case = golden("e4_k4_h512_i256");
        let of_expert = format!(".experts.{expert}.");
        case.tensors.retain(|name, _| !name.contains(&of_expert) || name.ends_with("proj.weight"));
        let weights = case.tensors.iter_mut().filter(|(name, _)| name.contains(&of_expert));
        weights.for_each(|(_, weight)| unquantise(weight));
        let named = format!("experts.{expert}.gate_proj.weight has dtype BF16, expected U8");
        assert_says(&refusal(case.write().unwrap().path()), &[&named]);
    }
}

#[test]
fn a_checkpoint_without_a_quantised_layer_is_refused() {
    let mut case = golden("e4_k4_h512_i256");
    case.tensors.retain(|name, _| name.ends_with("proj.weight"));
    case.tensors.values_mut().for_each(unquantise);
    let said = refusal(case.write().unwrap().path());
    assert_says(&said, &["no layer can be served", "layer 0: its experts are BF16, not NVFP4"]);
}

/// What would be served, and what a start would end with, without one.
#[test]
fn a_checkpoint_can_be_checked_without_a_start() {
    let check = |options: &[&str]| {
        let mut check = Command::new(program("moeplane-worker").unwrap());
        let output = check.arg("check").args(options).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let folder = data("field/pass/layer_left_bf16");
    let (code, said) = check(&["--model", folder.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    assert_says(&said, &["served      layer 0: 4 experts, top-2, hidden 64, intermediate 128"]);
    assert_says(&said, &["not served  layer 1: its experts are BF16", "act         bf16, nvfp4"]);
    assert_says(&said, &["memory      cpu: 0.1 MiB of packed experts", "cuda: "]);

    let tiny = data("tiny-kjv-moe/model-nvfp4");
    let tiny = tiny.to_str().unwrap();
    let (code, said) = check(&["--model", tiny, "--ranks", "4", "--slots", "9"]);
    assert_eq!(code, Some(0), "{said}");
    // 4 layers x 9 slots x 3 x 256 x 192 weights of 4.5 bits.
    assert_says(&said, &["each of 4 ranks: 2.8 MiB of packed experts, 9 slots a layer", "heap"]);
    let (code, said) = check(&["--model", tiny, "--ranks", "4", "--slots", "7"]);
    assert_eq!((code, said.contains("expert 7 has no slot")), (Some(1), true), "{said}");
    let (code, said) = check(&["--model", tiny, "--ranks", "0"]);
    assert_eq!((code, said.contains("ranks is 0, expected 1 to 64")), (Some(64), true), "{said}");

    let mut case = golden("e4_k4_h512_i256");
    let scales = "model.layers.0.mlp.experts.3.up_proj.weight_scale";
    case.tensors.get_mut(scales).unwrap().bytes[5] = 0x7f;
    let broken = case.write().unwrap();
    let (code, said) = check(&["--model", broken.path().to_str().unwrap()]);
    assert_eq!((code, said.contains(scales)), (Some(1), true), "{said}");
    assert_says(&refusal(broken.path()), &[scales]);
}

/// Calibration never reached experts 3 and 5.
#[test]
fn experts_without_input_scales_are_served_in_bf16_and_listed_for_nvfp4() {
    let mut case = golden("e7_k2_h256_i512");
    let missed = |name: &str| name.contains(".experts.3.") || name.contains(".experts.5.");
    case.tensors.retain(|name, _| !(missed(name) && name.ends_with("input_scale")));
    let folder = case.write().unwrap();
    let worker = Worker::start(folder.path(), &[]).unwrap();
    let refused = worker.engine(NVFP4, 8).unwrap_err().to_string();
    for expert in [3, 5] {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            assert_says(&refused, &[&format!("experts.{expert}.{projection}.input_scale")]);
        }
    }
    let case = Case::open(folder.path()).unwrap();
    let mut engine = worker.engine(BF16, case.inputs.tokens()).unwrap();
    let output = through(&mut engine, 0, Phase::Decode, &case.inputs).unwrap();
    assert!(Comparison::new(&output, &case.expected(BF16).unwrap()).passes(BF16));
}
