//! Calls through the client.

use std::fs;

use protocol::client::{ClientError, Engine};
use protocol::message::{Attach, Call, Phase};
use protocol::refusal::Refusal;
use reference::compare::Comparison;
use reference::layer::Variant;
use tests::call::{attach, through};
use tests::case::{Case, find};
use tests::replay::{Replay, TOKENS_MAX};
use tests::worker_process::Worker;

use crate::raw::{Raw, call};
use crate::{BF16, NVFP4, data, holes, skewed};

#[test]
fn every_golden_case_passes_through_a_worker() {
    let mut passes = 0;
    for dir in find(&data("moe-golden")).unwrap() {
        let case = Case::open(&dir).unwrap();
        let worker = Worker::start(&dir, &[]).unwrap();
        for variant in Variant::ALL {
            let mut engine = worker.engine(variant, case.inputs.tokens().max(1)).unwrap();
            let output = through(&mut engine, 0, Phase::Prefill, &case.inputs).unwrap();
            let comparison = Comparison::new(&output, &case.expected(variant).unwrap());
            assert!(comparison.passes(variant), "{} {variant} {comparison}", dir.display());
            passes += 1;
        }
    }
    assert_eq!(passes, 68);
}

#[test]
fn a_replay_of_a_real_model_is_right_in_both_formats() {
    let dir = data("tiny-kjv-moe");
    let worker = Worker::start(&dir.join("model-nvfp4"), &[]).unwrap();
    for variant in [BF16, NVFP4] {
        let mut replay = Replay::open(&dir, variant).unwrap();
        let mut engine = worker.engine(variant, TOKENS_MAX).unwrap();
        for _ in 0..30 {
            replay.step(&mut engine).unwrap();
        }
        let layers = replay.finish().unwrap();
        assert_eq!(layers.len(), 4);
        for layer in layers {
            assert_eq!(layer.calls.times.len(), 30);
            assert!(layer.verified > 600, "{} rows were verified", layer.verified);
        }
    }
}

/// A replay against the answers of another variant must fail, or its passes mean nothing.
#[test]
fn a_replay_notices_wrong_answers() {
    let dir = data("tiny-kjv-moe");
    let worker = Worker::start(&dir.join("model-nvfp4"), &[]).unwrap();
    for (expected, served) in
        [(BF16, NVFP4), (NVFP4, Variant { weights_in_combine: true, ..NVFP4 })]
    {
        let mut replay = Replay::open(&dir, expected).unwrap();
        let mut engine = worker.engine(served, TOKENS_MAX).unwrap();
        let wrong = (0..30).find_map(|_| replay.step(&mut engine).err());
        assert!(wrong.unwrap().to_string().contains("is wrong: relative error"));
    }
}

#[test]
fn bad_calls_are_refused_with_their_values_and_the_engine_lives() {
    let worker = Worker::start(&holes(), &["--max-tokens", "64"]).unwrap();
    let case = Case::open(&holes()).unwrap();
    let mut engine = worker.engine(BF16, case.inputs.tokens()).unwrap();
    let right = through(&mut engine, 0, Phase::Decode, &case.inputs).unwrap();
    let tokens = u32::try_from(case.inputs.tokens()).unwrap();
    let good = Call { layer: 0, tokens, top_k: 4, phase: Phase::Decode };
    let refused = |engine: &mut Engine, call: Call| match engine.call(call) {
        Err(ClientError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let unknown = refused(&mut engine, Call { layer: 7, ..good });
    assert_eq!(unknown, Refusal::Layer { layer: 7, reason: None, served: vec![0] });
    for top_k in [0, 17, u32::MAX] {
        let refusal = refused(&mut engine, Call { top_k, ..good });
        assert_eq!(refusal, Refusal::TopK { top_k, max: 16 });
    }
    for too_many in [tokens + 1, u32::MAX] {
        let refusal = refused(&mut engine, Call { tokens: too_many, ..good });
        assert_eq!(refusal, Refusal::Tokens { tokens: too_many, min: 0, max: tokens });
    }
    let live = case.inputs.ids.iter().position(|&id| id >= 0).unwrap();
    let (token, place) = (live / 4, live % 4);
    let mut bad = case.inputs.clone();
    bad.ids[live] = 8;
    let refusal = through(&mut engine, 0, Phase::Decode, &bad).unwrap_err();
    let text = format!("expert id 8 of token {token} at place {place}, expected -1 or 0 to 7");
    assert_eq!(refusal.to_string(), format!("the worker refused: {text}"));
    bad.ids[..4].copy_from_slice(&[5, -1, 2, 5]);
    let refusal = through(&mut engine, 0, Phase::Decode, &bad).unwrap_err();
    assert!(refusal.to_string().contains("expert 5 at places 0 and 3"), "{refusal}");
    let mut bad = case.inputs.clone();
    bad.weights[live] = f32::NAN;
    let refusal = through(&mut engine, 0, Phase::Decode, &bad).unwrap_err();
    assert!(refusal.to_string().contains("is NaN, expected a finite number"), "{refusal}");
    assert_eq!(through(&mut engine, 0, Phase::Decode, &case.inputs).unwrap(), right);
}

#[test]
fn tensors_that_do_not_fit_stay_with_the_engine() {
    let worker = Worker::start(&holes(), &[]).unwrap();
    let mut engine = worker.engine(BF16, 2).unwrap();
    let wide = engine.write_inputs(&[0; 1000], &[], &[]).unwrap_err().to_string();
    assert!(wide.contains("hidden has 1000 elements"), "{wide}");
    let apart = engine.write_inputs(&[0; 128], &[1, 2], &[0.5]).unwrap_err().to_string();
    assert_eq!(apart, "weights has 1 elements, expected the 2 of ids");
    assert!(engine.read_output(&mut [0; 1000]).is_err());
}

/// -1 everywhere is +0 everywhere, whatever ran before on the same buffers.
#[test]
fn rows_without_experts_hold_nothing_of_earlier_calls() {
    let worker = Worker::start(&holes(), &[]).unwrap();
    let inputs = Case::open(&holes()).unwrap().inputs;
    for variant in Variant::ALL {
        let mut engine = worker.engine(variant, inputs.tokens()).unwrap();
        let mut full = inputs.clone();
        full.ids = (0..).map(|place| place % 4).take(inputs.ids.len()).collect();
        full.weights.fill(900.0);
        let mut none = full.clone();
        none.ids.fill(-1);
        let mut last = none.clone();
        last.ids.iter_mut().skip(3).step_by(4).for_each(|id| *id = 5);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let mut call = |inputs| through(&mut engine, 0, Phase::Decode, inputs).unwrap();
            assert!(call(&full).iter().any(|&bits| bits != 0));
            assert!(call(&none).iter().all(|&bits| bits == 0));
            seen.push(call(&last));
        }
        assert!(seen[0] == seen[1] && seen[1] == seen[2]);
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs;
    for variant in Variant::ALL {
        let mut engine = worker.engine(variant, 300).unwrap();
        let whole = through(&mut engine, 0, Phase::Prefill, &inputs).unwrap();
        for rows in [0..1, 1..8, 8..72, 1..300] {
            let part = through(&mut engine, 0, Phase::Decode, &inputs.rows(rows.clone())).unwrap();
            assert!(part == whole[rows.start * 256..rows.end * 256], "{variant} {rows:?}");
        }
    }
}

#[test]
fn an_engine_that_goes_away_in_a_call_costs_nobody_else() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs;
    let mut engine = worker.engine(BF16, 300).unwrap();
    let right = through(&mut engine, 0, Phase::Decode, &inputs).unwrap();
    let open = || fs::read_dir(format!("/proc/{}/fd", worker.pid())).unwrap().count();
    let before = open();
    for _ in 0..20 {
        let mut raw = Raw::attached(&worker);
        raw.send(&call(1));
        drop(raw);
        // And one in the middle of a frame.
        let mut raw = Raw::attached(&worker);
        raw.send(&call(1)[..30]);
    }
    assert_eq!(through(&mut engine, 0, Phase::Decode, &inputs).unwrap(), right);
    tests::worker_process::until("the end of lost connections", || {
        Ok((open() == before).then_some(()))
    })
    .unwrap();
}

#[test]
fn an_attachment_says_what_is_served() {
    let worker = Worker::start(&data("tiny-kjv-moe/model-nvfp4"), &[]).unwrap();
    let engine = worker.attach(&Attach { max_tokens: 5, ..attach(NVFP4, 0) }).unwrap();
    assert_eq!(engine.welcome().model, "model-nvfp4");
    let numbers: Vec<u32> = engine.layers().iter().map(|layer| layer.number).collect();
    assert_eq!(numbers, [0, 1, 2, 3]);
    let layer = engine.layers()[2];
    assert_eq!((layer.experts, layer.top_k), (32, 4));
    assert_eq!((layer.hidden, layer.intermediate), (256, 192));
    assert_eq!(engine.buffer().1.max_tokens, 5);
}
