//! Tests of the number formats: every code, every tie, and the golden layers' quantised tokens.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;

/// The value halfway between two neighbouring codes, and the code that a tie must go to.
fn ties(values: &[f32]) -> impl Iterator<Item = (f32, u8)> {
    (0_u8..).zip(values.windows(2)).map(|(code, pair)| {
        let even = if code.is_multiple_of(2) { code } else { code + 1 };
        (f32::midpoint(pair[0], pair[1]), even)
    })
}

#[test]
fn every_e2m1_code_survives_a_round_trip() {
    assert_eq!(E2M1[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
    for code in 0..16 {
        assert_eq!(e2m1_encode(e2m1_decode(code)), code);
        assert_eq!(e2m1_decode(code | 0xf0).to_bits(), e2m1_decode(code).to_bits());
    }
}

#[test]
fn e2m1_ties_go_to_the_even_code() {
    for (tie, even) in ties(&E2M1[..8]) {
        assert_eq!(e2m1_encode(tie), even, "{tie}");
        assert_eq!(e2m1_encode(-tie), even | 8, "-{tie}");
        assert_eq!(e2m1_encode(tie.next_down()), e2m1_encode(tie.next_up()) - 1, "{tie}");
    }
}

#[test]
fn e2m1_saturates() {
    for value in [6.0, 6.5, 1e30, f32::INFINITY] {
        assert_eq!((e2m1_encode(value), e2m1_encode(-value)), (7, 15));
    }
    assert_eq!(e2m1_encode(f32::NAN) & 7, 0);
}

#[test]
fn every_e4m3_code_survives_a_round_trip() {
    for code in 0..=255_u8 {
        let value = e4m3_decode(code);
        assert_eq!(value.is_nan(), code & 0x7f == E4M3_NAN, "{code:#x}");
        if value.is_nan() {
            assert_eq!(e4m3_encode(value) & 0x7f, E4M3_NAN);
        } else {
            assert_eq!(e4m3_encode(value), code, "{code:#x} = {value}");
        }
    }
    let known = [(0x00, 0.0), (0x01, 0.001_953_125), (0x07, 0.013_671_875), (0x08, 0.015_625)];
    let larger = [(0x38, 1.0), (0x3f, 1.875), (0x7e, 448.0), (0xfe, -448.0)];
    for (code, value) in known.into_iter().chain(larger) {
        assert_eq!(e4m3_decode(code).to_bits(), f32::to_bits(value));
    }
}

#[test]
fn e4m3_ties_go_to_the_even_code() {
    for (tie, even) in ties(&E4M3[..=0x7e]) {
        assert_eq!(e4m3_encode(tie), even, "{tie}");
        assert_eq!(e4m3_encode(-tie), even | 0x80, "-{tie}");
        assert_eq!(e4m3_encode(tie.next_down()), e4m3_encode(tie.next_up()) - 1, "{tie}");
    }
}

#[test]
fn e4m3_saturates() {
    for value in [448.0, 463.9, 464.0, 480.0, 1e30, f32::INFINITY] {
        assert_eq!((e4m3_encode(value), e4m3_encode(-value)), (0x7e, 0xfe), "{value}");
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    // 1 + 2^-8 lies halfway between 1 and 1 + 2^-7.
    assert_eq!(bf16_round(1.0 + 0.003_906_25), 1.0);
    assert_eq!(bf16_round(1.0 + 3.0 * 0.003_906_25), 1.0 + 0.015_625);
    let mut narrow = [bf16::ZERO; 2];
    bf16_narrow(&[1.004, -2.5], &mut narrow);
    let mut wide = [0.0; 2];
    bf16_widen(&narrow, &mut wide);
    assert_eq!(wide, [1.007_812_5, -2.5]);
}

#[test]
fn a_block_by_hand() {
    // amax 12, g 1: scale e4m3(2) = 0x40, so codes are of y / 2.
    let mut row = [0.0; 32];
    row[..5].copy_from_slice(&[12.0, -1.0, 0.5, 5.0, -8.0]);
    let (mut codes, mut scales) = ([0xaa; 16], [0xaa; 2]);
    quantise_row(&row, 1.0, &mut codes, &mut scales);
    assert_eq!(scales, [0x40, 0]);
    // 6 -> 7, -.5 -> 9; .25 ties to 0, 2.5 ties to 2 (code 4); -4 -> 14.
    assert_eq!(codes[..3], [0x97, 0x40, 0x0e]);
    assert_eq!(codes[3..], [0; 13]);
    let mut back = [1.0; 32];
    dequantise_row(&codes, &scales, 1.0, &mut back);
    assert_eq!(back[..6], [12.0, -1.0, 0.0, 4.0, -8.0, 0.0]);
}

#[test]
fn a_nan_stays_visible_in_its_block_alone() {
    let mut row = [1.0; 32];
    row[3] = f32::NAN;
    let (mut codes, mut scales) = ([0; 16], [0; 2]);
    quantise_row(&row, 1.0, &mut codes, &mut scales);
    let mut back = [0.0; 32];
    dequantise_row(&codes, &scales, 1.0, &mut back);
    assert!(back[..16].iter().all(|y| y.is_nan()));
    assert!(back[16..].iter().all(|y| (y - 1.0).abs() < 0.1));
}

#[test]
fn a_block_whose_scale_underflows_is_zero() {
    let (mut codes, mut scales) = ([0xff; 8], [0xff; 1]);
    quantise_row(&[-1e-6; 16], 1.0, &mut codes, &mut scales);
    assert_eq!((codes, scales), ([0; 8], [0; 1]));
}

fn nearest(values: &[f32], value: f32) -> f32 {
    let gap = |v: &f32| (f64::from(*v) - f64::from(value)).abs();
    values.iter().copied().min_by(|a, b| gap(a).total_cmp(&gap(b))).unwrap()
}

proptest! {
    #[test]
    fn e2m1_takes_a_nearest_value(value in -8.0_f32..8.0) {
        let gap = |v: f32| (f64::from(v) - f64::from(value)).abs();
        prop_assert_eq!(gap(e2m1_decode(e2m1_encode(value))), gap(nearest(&E2M1, value)));
    }

    #[test]
    fn e4m3_takes_a_nearest_value(value in prop_oneof![-500.0_f32..500.0, -0.05_f32..0.05]) {
        let gap = |v: f32| (f64::from(v) - f64::from(value)).abs();
        let finite: Vec<f32> = E4M3.into_iter().filter(|v| !v.is_nan()).collect();
        prop_assert_eq!(gap(e4m3_decode(e4m3_encode(value))), gap(nearest(&finite, value)));
    }

    #[test]
    fn quantising_errs_by_half_a_step_at_most(
        row in prop::collection::vec(-100.0_f32..100.0, 64),
        global in 0.01_f32..2.0,
    ) {
        let (mut codes, mut scales, mut back) = ([0; 32], [0; 4], [0.0; 64]);
        quantise_row(&row, 1.0 / global, &mut codes, &mut scales);
        dequantise_row(&codes, &scales, global, &mut back);
        for (block, (got, want)) in back.chunks(BLOCK).zip(row.chunks(BLOCK)).enumerate() {
            // The widest gap of e2m1 is 2, between 4 and 6; a scale that was rounded down by at
            // most 1/16 (or saturated) clips the largest element by as much.
            let step = e4m3_decode(scales[block]) * global;
            let amax = want.iter().fold(0.0_f32, |amax, y| amax.max(y.abs()));
            let clipped = (amax - E2M1_MAX * step).max(0.0);
            for (got, want) in got.iter().zip(want) {
                let bound = (step * 1.0001).max(clipped * 1.0001).max(amax * 1e-5);
                prop_assert!((got - want).abs() <= bound, "{got} {want} {step}");
            }
        }
    }
}

fn golden_cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/moe-golden");
    let mut cases: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    cases.sort();
    cases
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// `in13` of a golden layer: the largest `input_scale` of its gate projections.
fn in13(case: &Path) -> f32 {
    let bytes = fs::read(case.join("model.safetensors")).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let gates = model.iter().filter(|(name, _)| name.ends_with("gate_proj.input_scale"));
    gates.map(|(_, view)| floats(view.data())[0]).reduce(f32::max).unwrap()
}

#[test]
fn golden_tokens_quantise_to_the_same_bits() {
    let mut compared = 0;
    for case in golden_cases() {
        let bytes = fs::read(case.join("io.safetensors")).unwrap();
        let io = SafeTensors::deserialize(&bytes).unwrap();
        // The layer without tokens and the one of exact numbers have no quantised tokens.
        let Ok(x_scale) = io.tensor("x_scale") else { continue };
        let hidden_states = io.tensor("hidden_states").unwrap();
        let hidden = hidden_states.shape()[1];
        let x = hidden_states.data().as_chunks().0.iter();
        let x: Vec<f32> = x.map(|&b| bf16::from_le_bytes(b).to_f32()).collect();
        let (mut codes, mut scales) = (vec![0; x.len() / 2], vec![0; x.len() / BLOCK]);
        let g = 1.0 / in13(&case);
        let outputs = codes.chunks_mut(hidden / 2).zip(scales.chunks_mut(hidden / BLOCK));
        for (row, (codes, scales)) in x.chunks(hidden).zip(outputs) {
            quantise_row(row, g, codes, scales);
        }
        assert!(scales == x_scale.data(), "{}", case.display());
        assert!(codes == io.tensor("x_packed").unwrap().data(), "{}", case.display());
        compared += 1;
    }
    assert_eq!(compared, 15);
}
