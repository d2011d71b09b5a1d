//! Groups of ranks: the same bits however many there are and wherever experts lie, and the rules of a
//! collective call.

use std::thread;

use protocol::client::{ClientError, Engine};
use protocol::message::{Call, Phase};
use protocol::refusal::Refusal;
use reference::compare::Comparison;
use reference::layer::Variant;
use tests::call::{attach, through};
use tests::case::{Case, find};
use tests::group::{Group, Spec, call_all, call_each, random_placement, uneven};
use tests::random::Random;
use tests::traffic::Pool;
use tests::worker_process::Worker;

use crate::{BF16, NVFP4, assert_says, data, holes, skewed};

/// A group of some ranks on a case, experts in order.
fn group(model: &std::path::Path, ranks: u32, options: &[&str]) -> Group {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Group::start(model, &Spec { ranks, placement: None, options }).unwrap()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Refusal {
    match answer {
        Err(ClientError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_golden_case_passes_on_four_ranks() {
    let mut passes = 0;
    for dir in find(&data("moe-golden")).unwrap() {
        let case = Case::open(&dir).unwrap();
        let group = group(&dir, 4, &[]);
        for variant in Variant::ALL {
            let tokens = case.inputs.tokens();
            let mut engines = group.engines(variant, tokens.max(1)).unwrap();
            let output = call_all(&mut engines, 0, &case.inputs, &uneven(tokens, 4)).unwrap();
            let comparison = Comparison::new(&output, &case.expected(variant).unwrap());
            assert!(comparison.passes(variant), "{} {variant} {comparison}", dir.display());
            passes += 1;
        }
    }
    assert_eq!(passes, 68);
}

/// Rank counts, placements, shares, repeats: the same bits as one rank alone.
#[test]
fn ranks_and_placements_change_no_bit() {
    let inputs = Case::open(&skewed()).unwrap().inputs;
    let alone = Worker::start(&skewed(), &[]).unwrap();
    let expected = Variant::ALL.map(|variant| {
        let mut engine = alone.engine(variant, 300).unwrap();
        through(&mut engine, 0, Phase::Prefill, &inputs).unwrap()
    });
    let mut random = Random::new(3);
    for (ranks, slots) in [(1, 16), (2, 8), (2, 12), (3, 6), (4, 4), (4, 7), (4, 16)] {
        let count = ranks as usize;
        let placement = Some(vec![random_placement(16, count, slots, &mut random)]);
        let group = Group::start(&skewed(), &Spec { ranks, placement, options: Vec::new() });
        let group = group.unwrap();
        for (variant, expected) in Variant::ALL.into_iter().zip(&expected) {
            let mut engines = group.engines(variant, 300).unwrap();
            let mut all_at_one = vec![300..300; count];
            all_at_one[count - 1] = 0..300;
            all_at_one[..count - 1].fill(0..0);
            for shares in [uneven(300, count), all_at_one.clone(), uneven(300, count)] {
                let output = call_all(&mut engines, 0, &inputs, &shares).unwrap();
                assert!(output == *expected, "{ranks} ranks, {slots} slots, {variant} {shares:?}");
            }
        }
    }
}

/// A share of `cargo xtask group-calls`.
#[test]
fn random_calls_of_four_ranks_are_right() {
    let dir = data("tiny-kjv-moe");
    let mut random = Random::new(11);
    let placement = Some((0..4).map(|_| random_placement(32, 4, 12, &mut random)).collect());
    let spec = Spec { ranks: 4, placement, options: Vec::new() };
    let group = Group::start(&dir.join("model-nvfp4"), &spec).unwrap();
    for (variant, seed) in [(BF16, 5), (NVFP4, 6)] {
        Pool::new(&dir, 96, variant, seed).unwrap().replay(&group, 240, seed).unwrap();
    }
}

#[test]
fn ranks_without_an_engine_join_by_themselves() {
    let inputs = Case::open(&skewed()).unwrap().inputs;
    let group = group(&skewed(), 4, &[]);
    let mut engine = group.workers[2].engine(BF16, 300).unwrap();
    let alone = Worker::start(&skewed(), &[]).unwrap();
    let mut other = alone.engine(BF16, 300).unwrap();
    let expected = through(&mut other, 0, Phase::Decode, &inputs).unwrap();
    for _ in 0..20 {
        assert!(through(&mut engine, 0, Phase::Decode, &inputs).unwrap() == expected);
    }
    // An idle one is like none; an active one is waited for.
    let mut idle = group.workers[0].engine(BF16, 300).unwrap();
    idle.set_idle(true).unwrap();
    assert!(through(&mut engine, 0, Phase::Decode, &inputs).unwrap() == expected);
    idle.set_idle(false).unwrap();
    let engines = &mut [idle, engine];
    let shares = [0..100, 100..300];
    assert!(call_all(engines, 0, &inputs, &shares).unwrap() == expected);
}

#[test]
fn an_engine_that_does_not_call_is_named_after_the_deadline() {
    let group = group(&skewed(), 2, &["--deadline-ms", "100"]);
    let inputs = Case::open(&skewed()).unwrap().inputs.rows(0..4);
    let mut engines = group.engines(BF16, 4).unwrap();
    let refusal = refused(through(&mut engines[0], 0, Phase::Decode, &inputs));
    let Refusal::Group { rank, phase, layer, reason, .. } = &refusal else { panic!("{refusal}") };
    assert_eq!((*rank, phase.as_str(), *layer), (1, "announce", 0));
    assert_says(reason, &["rank 1 made no progress before the deadline", "repeat the step"]);
    // Together they are served.
    call_all(&mut engines, 0, &inputs, &uneven(4, 2)).unwrap();
}

#[test]
fn ranks_that_call_different_things_all_hear_the_same() {
    let group = group(&data("tiny-kjv-moe/model-nvfp4"), 3, &[]);
    let mut engines = group.engines(BF16, 1).unwrap();
    let call = |layer| Call { layer, tokens: 0, top_k: 4, phase: Phase::Decode };
    let layers = [2, 2, 3];
    let answers: Vec<Refusal> = thread::scope(|scope| {
        let calls = engines.iter_mut().zip(layers);
        let calls: Vec<_> =
            calls.map(|(engine, layer)| scope.spawn(move || engine.call(call(layer)))).collect();
        calls.into_iter().map(|answer| refused(answer.join().unwrap())).collect()
    });
    let said =
        "rank 0 calls layer 2 with act=bf16 weights_in=fc1 under epoch 0, rank 2 calls layer 3";
    for answer in answers {
        assert!(
            matches!(&answer, Refusal::Mismatch { reason } if reason.starts_with(said)),
            "{answer}"
        );
    }
    let inputs = reference::layer::Inputs { hidden: 256, top_k: 4, ..Default::default() };
    assert!(call_all(&mut engines, 1, &inputs, &vec![0..0; 3]).unwrap().is_empty());
}

/// The engine whose input is bad gets the error, and its rank takes part in the others' call.
#[test]
fn bad_input_of_one_engine_does_not_hold_up_the_others() {
    let group = group(&holes(), 2, &[]);
    let inputs = Case::open(&holes()).unwrap().inputs.rows(0..4);
    let mut engines = group.engines(BF16, 4).unwrap();
    let mut bad = inputs.clone();
    bad.ids[0] = 99;
    let (good, wrong) = thread::scope(|scope| {
        let [first, second] = &mut engines[..] else { panic!("two engines") };
        let good = scope.spawn(|| through(first, 0, Phase::Decode, &inputs));
        let wrong = scope.spawn(|| through(second, 0, Phase::Decode, &bad));
        (good.join().unwrap(), wrong.join().unwrap())
    });
    assert!(matches!(refused(wrong), Refusal::ExpertId { id: 99, .. }));
    good.unwrap();
    // A call that is refused before its values are looked at is no other matter.
    let (good, wrong) = thread::scope(|scope| {
        let [first, second] = &mut engines[..] else { panic!("two engines") };
        let good = scope.spawn(|| through(first, 0, Phase::Decode, &inputs));
        let call = Call { layer: 0, tokens: 5, top_k: 4, phase: Phase::Decode };
        let wrong = scope.spawn(move || second.call(call));
        (good.join().unwrap(), wrong.join().unwrap())
    });
    assert_eq!(refused(wrong), Refusal::Tokens { tokens: 5, min: 0, max: 4 });
    good.unwrap();
    call_all(&mut engines, 0, &inputs, &uneven(4, 2)).unwrap();
}

/// A refused call is a step like any other: nobody joins the next step for it.
#[test]
fn steps_in_which_all_engines_are_refused_keep_the_ranks_together() {
    const STEPS: usize = 200;
    let group = group(&holes(), 3, &["--deadline-ms", "20000"]);
    let inputs = Case::open(&holes()).unwrap().inputs.rows(0..4);
    let mut engines = group.engines(BF16, 4).unwrap();
    let expected = call_all(&mut engines, 0, &inputs, &vec![0..4; 3]).unwrap();
    let expected = &expected[..4 * inputs.hidden];
    let inputs = &inputs;
    thread::scope(|scope| {
        for (rank, engine) in engines.iter_mut().enumerate() {
            scope.spawn(move || {
                for step in 0..STEPS {
                    // Each in its own way: ids, tokens, a layer that there is not.
                    let (layer, tokens, top_k) = match rank {
                        0 => (0, 1, 17),
                        1 => (0, 5, 4),
                        _ => (9, 1, 4),
                    };
                    let call = Call { layer, tokens, top_k, phase: Phase::Decode };
                    let refusal = refused(engine.call(call));
                    assert!(!matches!(refusal, Refusal::Group { .. }), "step {step}: {refusal}");
                    let output = through(engine, 0, Phase::Decode, inputs);
                    let output = output.unwrap_or_else(|error| panic!("step {step}: {error}"));
                    assert!(output == *expected, "step {step} of rank {rank}");
                }
            });
        }
    });
}

#[test]
fn a_rank_has_one_engine_at_a_time() {
    let group = group(&holes(), 2, &[]);
    let first: Engine = group.workers[0].engine(BF16, 4).unwrap();
    let second = group.workers[0].attach(&attach(BF16, 4)).unwrap_err().to_string();
    assert_says(&second, &["the worker refused: busy with the engine \"engine\""]);
    drop(first);
    group.workers[0].engine(BF16, 4).unwrap();
}

/// Group calls have room for as many pairs as the model's own calls bring.
#[test]
fn calls_that_the_heap_has_no_room_for_are_refused() {
    let group = group(&holes(), 2, &["--max-tokens", "8"]);
    let mut engine = group.workers[0].engine(BF16, 8).unwrap();
    let call = Call { layer: 0, tokens: 8, top_k: 5, phase: Phase::Decode };
    assert_eq!(refused(engine.call(call)), Refusal::Pairs { tokens: 8, top_k: 5, max: 32 });
}

#[test]
fn ranks_that_do_not_belong_to_the_group_are_refused_by_name() {
    let group = group(&holes(), 2, &["--isa", "scalar"]);
    let refusal = |rank, model: &std::path::Path, options: &[&str]| {
        let mut worker = group.spawn_with(rank, model, options).unwrap();
        assert_eq!(worker.wait().unwrap().code(), Some(1), "{}", worker.log());
        worker.log()
    };
    let taken = refusal(0, &holes(), &[]);
    assert_says(&taken, &["rank 0 of the group", "runs already"]);
    // Of eight experts and the same width, but other weights.
    let other = data("moe-golden/e4_k2_h1568_i64");
    assert_says(&refusal(1, &other, &[]), &["this rank has model digest"]);
    assert_says(&refusal(1, &holes(), &["--max-tokens", "7"]), &["has max_tokens 7", "1024"]);
    let slots = refusal(1, &holes(), &["--slots-per-rank", "6"]);
    assert_says(&slots, &["placement digest"]);
    let tactic = refusal(1, &holes(), &["--tactic", "scalar-t2-p0"]);
    assert_says(&tactic, &["has tactic scalar-t2-p0", "founded with by tokens"]);
    assert_says(&refusal(1, &holes(), &["--slots-per-rank", "3"]), &["layer 0", "has no slot"]);
    let mut engines = group.engines(BF16, 4).unwrap();
    let inputs = Case::open(&holes()).unwrap().inputs.rows(0..4);
    call_all(&mut engines, 0, &inputs, &uneven(4, 2)).unwrap();
    assert_eq!(call_each(&mut engines, 0, &inputs, &uneven(4, 2)).len(), 2);
}

#[test]
fn a_group_that_ends_leaves_nothing() {
    let mut group = group(&holes(), 2, &[]);
    assert!(group.heap().exists());
    for worker in &mut group.workers {
        worker.signal(rustix::process::Signal::TERM).unwrap();
        assert_eq!(worker.wait().unwrap().code(), Some(0), "{}", worker.log());
        assert!(!worker.socket().exists());
    }
    assert!(!group.heap().exists());
}
