//! The golden cases: the reference against them, and the CPU device on every instruction set that
//! this processor has.
#![expect(clippy::unwrap_used, reason = "a test")]

mod routing;

use std::path::{Path, PathBuf};

use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions, Isa};
use reference::compare::Comparison;
use reference::layer::{Variant, layer_outputs, quantised_tokens};
use reference::model::Model;
use reference::quantise::quantise_weights;
use reference::tensors::TensorFile;
use tests::call::in_process;
use tests::case::{Case, find};

/// Case folders that the repository has.
const CASES: usize = 17;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(path)
}

fn cases() -> Vec<Case> {
    let found = find(&data("moe-golden")).unwrap();
    assert_eq!(found.len(), CASES);
    found.iter().map(|dir| Case::open(dir).unwrap()).collect()
}

/// The reference must land far inside of the tolerances, or nothing that is compared with it means
/// much.
#[test]
fn the_reference_agrees_with_every_case() {
    for case in cases() {
        let model = Model::open(&case.dir).unwrap();
        let outputs = layer_outputs(&model, 0, &case.inputs, &Variant::ALL).unwrap();
        for (variant, output) in Variant::ALL.into_iter().zip(outputs) {
            let comparison = Comparison::new(&output, &case.expected(variant).unwrap());
            let close = comparison.relative_error <= 1e-4 && comparison.share == 1.0;
            assert!(close, "{} {variant} {comparison}", case.dir.display());
        }
    }
}

#[test]
fn the_reference_quantises_tokens_to_the_recorded_bytes() {
    let mut compared = 0;
    for case in cases() {
        let Some(recorded) = case.quantised().unwrap() else { continue };
        let in13 = Model::open(&case.dir).unwrap().in13(0).unwrap();
        assert!(quantised_tokens(&case.inputs, in13) == recorded, "{}", case.dir.display());
        compared += 1;
    }
    assert_eq!(compared, 15);
}

/// Every byte of a checkpoint that ModelOpt wrote, from the weights that it was given.
#[test]
fn the_reference_quantises_weights_to_the_bytes_of_modelopt() {
    let weights = data("quantise-golden/e4_k2_h1632_i48.unquantised.safetensors");
    let weights = TensorFile::open(&weights).unwrap();
    let case = data("moe-golden/e4_k2_h1632_i48/model.safetensors");
    let case = TensorFile::open(&case).unwrap();
    for name in weights.entries().keys() {
        let values: Vec<f32> = weights.bf16(name).unwrap().into_iter().map(widen).collect();
        let scale = case.f32(&format!("{name}_scale_2")).unwrap()[0];
        let (codes, scales) = quantise_weights(&values, scale);
        assert!(codes == case.bytes(name, &["U8"]).unwrap(), "{name}");
        let expected = case.bytes(&format!("{name}_scale"), &["F8_E4M3"]).unwrap();
        assert!(scales == expected, "{name}_scale");
    }
    assert_eq!(weights.entries().len(), 12);
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// 17 cases, two formats, two places, on each instruction set; all of them answer the same bits.
#[test]
fn the_cpu_device_agrees_with_every_case() {
    let mut passes = 0;
    for case in cases() {
        let checkpoint = Checkpoint::open(&case.dir).unwrap();
        let devices = Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| {
            let options = CpuOptions { isa: Some(isa), ..CpuOptions::default() };
            CpuDevice::alone(options, &checkpoint, 512).unwrap()
        });
        let mut devices: Vec<CpuDevice> = devices.collect();
        for variant in Variant::ALL {
            let expected = case.expected(variant).unwrap();
            let mut first = None;
            for device in &mut devices {
                let output = in_process(device, 0, variant, &case.inputs).unwrap();
                let comparison = Comparison::new(&output, &expected);
                assert!(
                    comparison.passes(variant),
                    "{} {variant} {comparison}",
                    case.dir.display()
                );
                assert!(*first.get_or_insert(output.clone()) == output, "instruction sets differ");
            }
            passes += 1;
        }
    }
    assert_eq!(passes, 4 * CASES);
}
