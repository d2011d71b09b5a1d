//! What users of such systems reported, and what is right instead. The numbers are those of the
//! reports; inputs are in `tests/data/field` where a golden case does not do.

use std::path::Path;

use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use protocol::client::ClientError;
use protocol::message::{Call, Phase};
use protocol::refusal::Refusal;
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant, layer_outputs};
use reference::model::Model;
use tests::call::{in_process, through};
use tests::case::Case;
use tests::group::{Group, Spec, call_all, uneven};
use tests::random::Random;
use tests::recorded::Recorded;
use tests::worker_process::Worker;

use crate::{BF16, NVFP4, assert_says, data, skewed};

fn group(model: &Path, ranks: u32, placement: Option<Vec<Vec<i64>>>) -> Group {
    Group::start(model, &Spec { ranks, placement, options: Vec::new() }).unwrap()
}

/// A7: the quantiser keeps whole layers in bf16. The others are served; those are listed with the
/// reason, and a call for one says it.
#[test]
fn layers_that_were_left_in_bf16_are_listed_and_the_others_served() {
    let case = Case::open(&data("field/pass/layer_left_bf16")).unwrap();
    let worker = Worker::start(&case.dir, &[]).unwrap();
    let tokens = case.inputs.tokens();
    for variant in Variant::ALL {
        let mut engine = worker.engine(variant, tokens).unwrap();
        let served: Vec<u32> = engine.layers().iter().map(|layer| layer.number).collect();
        assert_eq!(served, [0]);
        let [left] = engine.unserved() else { panic!("{:?}", engine.unserved()) };
        assert_eq!(left.number, 1);
        assert_says(&left.reason, &["its experts are BF16, not NVFP4"]);
        let call = Call { layer: 1, tokens: 1, top_k: 2, phase: Phase::Decode };
        let Err(ClientError::Refused(refusal)) = engine.call(call) else { panic!("served") };
        let said = "layer 1 is not served (its experts are BF16, not NVFP4";
        assert_says(&refusal.to_string(), &[said, "expected one of [0]"]);
        assert!(matches!(refusal, Refusal::Layer { layer: 1, .. }), "{refusal:?}");
        let output = through(&mut engine, 0, Phase::Decode, &case.inputs).unwrap();
        let comparison = Comparison::new(&output, &case.expected(variant).unwrap());
        assert!(comparison.passes(variant), "{variant} {comparison}");
    }
}

/// B13: ranks that are idle bring no tokens; often none does.
#[test]
fn calls_without_tokens_on_any_rank_are_ordinary() {
    const ROWS: usize = 300;
    let dir = data("moe-golden/e13_k3_h256_i128_t1");
    let mut random = Random::new(13);
    let (hidden, top_k) = (256, 3);
    let x = (0..ROWS * hidden).map(|_| half::bf16::from_f32(random.normal()).to_bits()).collect();
    let ids = (0..ROWS).flat_map(|_| {
        let mut experts: Vec<i32> = (0..13).collect();
        random.shuffle(&mut experts);
        experts.truncate(top_k);
        experts
    });
    let ids = ids.collect();
    let weights = (0..ROWS * top_k).map(|_| random.unit()).collect();
    let inputs = Inputs { hidden, top_k, x, ids, weights };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut device = CpuDevice::alone(CpuOptions::default(), &checkpoint, 300).unwrap();
    let expected = in_process(&mut device, 0, BF16, &inputs).unwrap();
    let model = Model::open(&dir).unwrap();
    let reference = layer_outputs(&model, 0, &inputs, &[BF16]).unwrap().concat();
    assert!(Comparison::new(&expected, &reference).passes(BF16));

    let group = group(&dir, 4, None);
    let mut engines = group.engines(BF16, ROWS).unwrap();
    let mut without = 0;
    for call in 0..1000 {
        let shares: Vec<_> = (0..4).map(|_| 0..random.pick(&[0, 0, 0, 1, 5, ROWS])).collect();
        without += usize::from(shares.iter().all(|share| share.end == 0));
        let output = call_all(&mut engines, 0, &inputs, &shares).unwrap();
        let rows = shares.iter().flat_map(|share| &expected[..share.end * hidden]);
        assert!(output.iter().eq(rows), "call {call}, {shares:?}");
    }
    assert!(without > 0, "no call of nobody");
}

/// B15: rows and places without an expert add nothing, whatever an earlier call left in memory.
#[test]
fn places_without_an_expert_add_nothing_of_earlier_calls() {
    let case = |name| Case::open(&data("field/pass").join(name)).unwrap();
    let cases = ["a_full", "b_all_minus_one", "c_only_last_place"].map(case);
    let worker = Worker::start(&cases[0].dir, &[]).unwrap();
    for variant in Variant::ALL {
        let mut engine = worker.engine(variant, 50).unwrap();
        for case in cases.iter().cycle().take(9) {
            let output = through(&mut engine, 0, Phase::Decode, &case.inputs).unwrap();
            let expected = case.expected(variant).unwrap();
            let comparison = Comparison::new(&output, &expected);
            assert!(comparison.passes(variant), "{} {variant} {comparison}", case.dir.display());
            if case.dir.ends_with("b_all_minus_one") {
                assert!(output.iter().all(|&bits| bits == 0), "not +0 everywhere");
            }
        }
    }
}

/// B18: a row's bits do not depend on how many others come along, nor on its rank.
#[test]
fn rows_have_the_same_bits_in_every_batch_on_every_rank() {
    let inputs = Case::open(&skewed()).unwrap().inputs;
    for variant in [BF16, NVFP4] {
        let mut whole: Option<Vec<u16>> = None;
        for ranks in [1, 2, 4] {
            let group = group(&skewed(), ranks, None);
            let mut engines = group.engines(variant, 300).unwrap();
            for rows in [300, 1, 7, 64, 299] {
                let part = inputs.rows(300 - rows..300);
                let shares = uneven(rows, ranks as usize);
                let output = call_all(&mut engines, 0, &part, &shares).unwrap();
                let whole = whole.get_or_insert_with(|| output.clone());
                let expected = &whole[(300 - rows) * inputs.hidden..];
                assert!(output == expected, "{variant} {rows} rows, {ranks} ranks");
            }
        }
    }
}

/// C28: with spare slots each (token, expert) still runs on exactly one replica.
#[test]
fn replicas_are_not_counted_twice() {
    let recorded = Recorded::open(&data("tiny-kjv-moe/recorded.safetensors")).unwrap();
    let layers = recorded.layers().unwrap();
    let mut first: Option<Vec<Vec<u16>>> = None;
    for slots in [32, 36, 64, 128] {
        let file = data(&format!("field/import/replicas_once/slots_{slots}.json"));
        let placement = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let group = group(&data("tiny-kjv-moe/model-nvfp4"), 4, Some(placement));
        let mut engines = group.engines(BF16, 64).unwrap();
        let outputs: Vec<Vec<u16>> = layers
            .iter()
            .map(|layer| {
                let inputs = layer.inputs.rows(0..160);
                call_all(&mut engines, layer.number, &inputs, &uneven(160, 4)).unwrap()
            })
            .collect();
        assert!(*first.get_or_insert_with(|| outputs.clone()) == outputs, "{slots} slots");
    }
    let model = Model::open(&data("tiny-kjv-moe/model-nvfp4")).unwrap();
    for (layer, output) in layers.iter().zip(first.unwrap()) {
        let inputs = layer.inputs.rows(0..160);
        let expected = layer_outputs(&model, layer.number, &inputs, &[BF16]).unwrap().concat();
        let comparison = Comparison::new(&output, &expected);
        assert!(comparison.passes(BF16), "layer {} {comparison}", layer.number);
    }
}
