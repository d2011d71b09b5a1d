//! Processes of a group that are killed or stopped: named to every engine, and back without a restart
//! of the others.

use std::thread;
use std::time::Duration;

use protocol::client::{Client, ClientError, Options};
use protocol::message::Phase;
use protocol::refusal::Refusal;
use reference::compare::Comparison;
use reference::layer::Inputs;
use rustix::process::Signal;
use tests::call::{attach, through};
use tests::case::Case;
use tests::group::{Group, Spec, call_all, twice, uneven};
use tests::kill::Target;
use tests::worker_process::{Worker, until};

use crate::{BF16, assert_says, skewed};

const RANKS: usize = 3;
const TOKENS: usize = 24;
/// A dead process is noticed at once; nobody else is to be named, however slow the machine.
const PATIENT: [&str; 2] = ["--deadline-ms", "30000"];

fn spec(options: &[&str]) -> Spec {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Spec { ranks: u32::try_from(RANKS).unwrap(), placement: None, options }
}

/// A share of `cargo xtask kill-ranks`: every rank once.
#[test]
fn a_killed_rank_is_named_to_all_others_and_comes_back() {
    let mut target = Target::start(&skewed(), &spec(&PATIENT), BF16, TOKENS).unwrap();
    for victim in 0..RANKS {
        let kill = target.kill(victim, Duration::from_millis(20)).unwrap();
        assert_eq!(kill.phases.len(), RANKS - 1);
    }
    target.end().unwrap();
}

/// Every expert is on two ranks: the others' answers are the same bits without the lost one.
#[test]
fn calls_go_on_without_a_lost_rank_where_its_experts_have_other_replicas() {
    let ranks = u32::try_from(RANKS).unwrap();
    let spec = Spec { placement: Some(vec![twice(16, ranks)]), ..spec(&PATIENT) };
    let mut target = Target::start(&skewed(), &spec, BF16, TOKENS).unwrap();
    for victim in 0..RANKS {
        let kill = target.kill(victim, Duration::from_millis(20)).unwrap();
        assert!(kill.without.is_some(), "calls were refused without rank {victim}");
    }
    target.end().unwrap();
}

/// Two of three ranks are lost, one after the other: what is left answers what it can, and says what it cannot.
#[test]
fn an_expert_without_a_live_replica_is_named_and_costs_only_the_calls_that_need_it() {
    let ranks = u32::try_from(RANKS).unwrap();
    let placement = twice(16, ranks);
    let spec = Spec { placement: Some(vec![placement.clone()]), ..spec(&PATIENT) };
    let mut group = Group::start(&skewed(), &spec).unwrap();
    let mut inputs = Case::open(&skewed()).unwrap().inputs.rows(0..TOKENS);
    let alone = Worker::start(&skewed(), &[]).unwrap();
    let mut other = alone.engine(BF16, TOKENS).unwrap();
    let mut engine = group.workers[0].engine(BF16, TOKENS).unwrap();
    for victim in [1, 2] {
        group.workers[victim].signal(Signal::KILL).unwrap();
        group.workers[victim].wait().unwrap();
        let named = refused(through(&mut engine, 0, Phase::Decode, &inputs));
        assert!(matches!(&named, Refusal::Group { .. }), "{named}");
    }
    let here: Vec<i32> = placement[..placement.len() / RANKS]
        .iter()
        .filter_map(|&expert| i32::try_from(expert).ok().filter(|&expert| expert >= 0))
        .collect();
    let gone = (0..16).find(|expert| !here.contains(expert)).unwrap();
    inputs.ids.fill(gone);
    let refusal = refused(through(&mut engine, 0, Phase::Decode, &one_expert(&inputs)));
    let expert = u32::try_from(gone).unwrap();
    assert_eq!(refusal, Refusal::Unavailable { layer: 0, expert, lost: vec![1, 2] });
    inputs.ids.fill(here[0]);
    let served = one_expert(&inputs);
    let expected = through(&mut other, 0, Phase::Decode, &served).unwrap();
    assert!(through(&mut engine, 0, Phase::Decode, &served).unwrap() == expected);
}

fn refused(answer: Result<Vec<u16>, ClientError>) -> Refusal {
    match answer {
        Err(ClientError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// Every token with its first expert alone.
fn one_expert(inputs: &Inputs) -> Inputs {
    let mut one = inputs.clone();
    let places = one.ids.iter_mut().enumerate();
    places.filter(|(at, _)| at % inputs.top_k > 0).for_each(|(_, id)| *id = -1);
    one
}

#[test]
fn what_killed_ranks_left_is_swept_by_the_next_start() {
    let mut group = Group::start(&skewed(), &spec(&PATIENT)).unwrap();
    for worker in &mut group.workers {
        worker.signal(Signal::KILL).unwrap();
        worker.wait().unwrap();
    }
    assert!(group.heap().exists());
    for rank in 0..RANKS {
        group.restart(rank).unwrap();
    }
    let case = Case::open(&skewed()).unwrap();
    let mut engines = group.engines(BF16, 300).unwrap();
    let output = call_all(&mut engines, 0, &case.inputs, &uneven(300, RANKS)).unwrap();
    let comparison = Comparison::new(&output, &case.expected(BF16).unwrap());
    assert!(comparison.passes(BF16), "{comparison}");
    for worker in &mut group.workers {
        worker.signal(Signal::TERM).unwrap();
        worker.wait().unwrap();
    }
    assert!(!group.heap().exists());
}

#[test]
fn a_stopped_rank_is_named_after_the_deadline_and_joins_by_itself() {
    let group = Group::start(&skewed(), &spec(&["--deadline-ms", "200"])).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs.rows(0..TOKENS);
    let alone = Worker::start(&skewed(), &[]).unwrap();
    let mut other = alone.engine(BF16, TOKENS).unwrap();
    let expected = through(&mut other, 0, Phase::Decode, &inputs).unwrap();
    let mut engine = group.workers[0].engine(BF16, TOKENS).unwrap();
    group.workers[1].signal(Signal::STOP).unwrap();
    let error = through(&mut engine, 0, Phase::Decode, &inputs).unwrap_err();
    let ClientError::Refused(Refusal::Group { rank: 1, reason, .. }) = error else {
        panic!("{error}")
    };
    assert_says(&reason, &["rank 1 made no progress before the deadline"]);
    group.workers[1].signal(Signal::CONT).unwrap();
    // A loaded machine may take longer than 200 ms to wake it.
    let served = until("an answer of the whole group", || {
        Ok(through(&mut engine, 0, Phase::Decode, &inputs).ok())
    });
    assert!(served.unwrap() == expected);
}

/// An engine that dies while its rank waits for others, or while others wait for it: its rank goes on
/// without it, and nobody is told of a deadline.
#[test]
fn an_engine_that_dies_in_a_call_of_its_group_holds_nobody_up() {
    let group = Group::start(&skewed(), &spec(&PATIENT)).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs.rows(0..TOKENS);
    let mut first = group.workers[0].engine(BF16, TOKENS).unwrap();
    let expected = through(&mut first, 0, Phase::Decode, &inputs).unwrap();
    // It dies while the first waits for it.
    let second = group.workers[1].engine(BF16, TOKENS).unwrap();
    let output = thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(second);
        });
        through(&mut first, 0, Phase::Decode, &inputs).unwrap()
    });
    assert!(output == expected);
    // It dies while its own call waits for the first: it gives up and closes.
    let impatient = Options { deadline: Duration::from_secs(1), ..Options::default() };
    let second = Client::connect(&group.workers[1].socket(), impatient).unwrap();
    let mut second = second.attach(&attach(BF16, TOKENS)).unwrap();
    let error = through(&mut second, 0, Phase::Decode, &inputs).unwrap_err();
    assert!(matches!(error, ClientError::Deadline { .. }), "{error}");
    drop(second);
    for _ in 0..3 {
        assert!(through(&mut first, 0, Phase::Decode, &inputs).unwrap() == expected);
    }
}
