//! The golden layers and the small trained model, as ModelOpt wrote them.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use crate::checkpoint::Checkpoint;

pub(super) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

#[test]
fn a_golden_layer_is_lent_byte_for_byte() {
    let folder = data("moe-golden/two_alphas_e4_k2_h256_i128");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.name(), "two_alphas_e4_k2_h256_i128");
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let [layer] = checkpoint.layers() else { panic!("{:?}", checkpoint.layers()) };
    let shape = layer.shape;
    assert_eq!((layer.number, shape.experts, shape.top_k), (0, 4, 2));
    assert_eq!((shape.hidden, shape.intermediate, shape.swiglu.limit), (256, 128, None));
    let mut alphas_differ = false;
    for number in 0..4 {
        let expert = checkpoint.expert(0, number).unwrap();
        let all = [("gate", expert.gate), ("up", expert.up), ("down", expert.down)];
        for (name, projection) in all {
            let tensor = |part: &str| {
                let prefix = format!("model.layers.0.mlp.experts.{number}.{name}_proj");
                file.tensor(&format!("{prefix}.{part}")).unwrap().data()
            };
            assert_eq!(projection.codes, tensor("weight"));
            assert_eq!(projection.scales, tensor("weight_scale"));
            assert_eq!(projection.weight_scale_2.to_le_bytes(), tensor("weight_scale_2"));
            assert_eq!(projection.input_scale.unwrap().to_le_bytes(), tensor("input_scale"));
        }
        assert_eq!((expert.gate.rows, expert.gate.cols), (128, 256));
        assert_eq!((expert.down.rows, expert.down.cols), (256, 128));
        alphas_differ |= expert.gate.weight_scale_2 != expert.up.weight_scale_2;
    }
    assert!(alphas_differ, "the case is about gate and up with scales of their own");
}

#[test]
fn in13_is_the_largest_of_all_experts() {
    let checkpoint = Checkpoint::open(&data("moe-golden/input_scales_e6_k3_h128_i64")).unwrap();
    let scales: Vec<f32> =
        (0..6).map(|e| checkpoint.expert(0, e).unwrap().gate.input_scale.unwrap()).collect();
    let in13 = checkpoint.layers()[0].in13.unwrap();
    assert!(scales.contains(&in13) && scales.iter().all(|&s| s <= in13), "{in13} {scales:?}");
    assert!(scales.iter().any(|&s| s < in13), "the case is about scales that differ");
}

#[test]
fn the_clamp_is_read() {
    let checkpoint = Checkpoint::open(&data("moe-golden/clamp_e4_k2_h128_i64")).unwrap();
    assert_eq!(checkpoint.layers()[0].shape.swiglu.limit, Some(0.5));
}

#[test]
fn the_trained_model_opens_whole() {
    let checkpoint = Checkpoint::open(&data("tiny-kjv-moe/model-nvfp4")).unwrap();
    let numbers: Vec<u32> = checkpoint.layers().iter().map(|layer| layer.number).collect();
    assert_eq!(numbers, [0, 1, 2, 3]);
    for position in 0..4 {
        for expert in 0..32 {
            let expert = checkpoint.expert(position, expert).unwrap();
            assert_eq!((expert.up.rows, expert.up.cols), (192, 256));
        }
        checkpoint.release(position).unwrap();
    }
}
