//! Tactics: measured by `tune`, used at the next start, and not where they do not hold.

use std::fs;
use std::process::Command;

use protocol::message::ActFormat;
use protocol::session::{FromControl, FromWorker, Register};
use protocol::tactics::{Choice, Measurement, Problem, Provenance, Tactics};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::case::Case;
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, register};
use tests::group::{call_all, uneven};
use tests::worker_process::{Worker, program, until};

use crate::command::run;
use crate::proposals::has_policies;
use crate::{BF16, assert_says, skewed};

/// Status, standard output and error of `tune`.
fn tune(arguments: &[&str]) -> (Option<i32>, String, String) {
    let model = skewed();
    let mut command = Command::new(program("moeplane-worker").unwrap());
    command.args(["tune", "--model"]).arg(model).args(arguments);
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn what_was_measured_is_used_from_the_next_start_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tactics.json");
    let file = path.to_str().unwrap();
    let (code, said, error) = tune(&["--out", file, "--tokens", "1,300", "--threads", "1"]);
    assert_eq!(code, Some(0), "{error}");
    assert_says(&said, &["act=nvfp4, 300 tokens", "by-tokens", "1.00x"]);
    let mut table: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let choices = table["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4, "two sizes of two formats: {choices:?}");
    let tactics: Vec<&Value> =
        table["measurements"].as_array().unwrap().iter().map(|m| &m["tactic"]).collect();
    assert!(tactics.len() >= 4 * 3 && tactics.contains(&&json!("by-tokens")), "{tactics:?}");
    // The same bits, whatever was the fastest here.
    let case = Case::open(&skewed()).unwrap();
    let answer = |options: &[&str]| {
        let worker = Worker::start(&skewed(), options).unwrap();
        let mut engines = [worker.engine(BF16, 300).unwrap()];
        let output = call_all(&mut engines, 0, &case.inputs, &uneven(300, 1)).unwrap();
        (output, worker.log())
    };
    let (expected, _) = answer(&["--threads", "1"]);
    let (output, log) = answer(&["--threads", "1", "--tactics", file]);
    assert!(output == expected);
    assert_says(&log, &["tactics are used as measured", "choices=4"]);
    // Another device, and kernels that have changed since.
    let (output, log) = answer(&["--threads", "2", "--tactics", file]);
    assert!(output == expected);
    assert_says(&log, &["stale and not used", "1 threads"]);
    table["provenance"]["kernels"] = json!("0123456789abcdef");
    fs::write(&path, table.to_string()).unwrap();
    let (_, log) = answer(&["--threads", "1", "--tactics", file]);
    assert_says(&log, &["the hash of kernels is", "0123456789abcdef"]);
}

#[test]
fn a_table_that_cannot_be_used_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tactics.json");
    let file = path.to_str().unwrap();
    let start = |options: &[&str]| Worker::start(&skewed(), options).unwrap_err().to_string();
    let with = ["--threads", "1", "--tactics", file];
    assert_says(&start(&with), &["cannot read", "tactics.json"]);
    fs::write(&path, "{\"choices\": []}").unwrap();
    assert_says(&start(&with), &["is no table of tactics", "missing field"]);
    let (code, _, error) = tune(&["--out", file, "--tokens", "1", "--threads", "1"]);
    assert_eq!(code, Some(0), "{error}");
    let mut table: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    table["choices"][0]["tactic"] = json!("fastest");
    fs::write(&path, table.to_string()).unwrap();
    assert_says(&start(&with), &["there is no tactic fastest that runs here, expected one of"]);
    // One tactic for all, and a table: who should win?
    let both = ["--tactic", "scalar-t4-p0", "--tactics", file];
    assert_says(&start(&both), &["device.tactics is", "expected none where device.tactic"]);
    for tokens in ["4,1", "0", "1,70000"] {
        let (code, _, error) = tune(&["--out", file, "--tokens", tokens]);
        assert_eq!(code, Some(64), "{tokens}: {error}");
        assert_says(&error, &["expected ascending numbers from 1 to 65536"]);
    }
}

fn told(control: &Control, group: &str) -> Value {
    let (status, view) = control.get(&format!("/api/v1/groups/{group}/tactics")).unwrap();
    assert_eq!(status, 200, "{view}");
    view
}

/// Waits until rank 0 uses what was chosen.
#[track_caller]
fn until_as_chosen(control: &Control, group: &str) -> Value {
    until("tactics as chosen", || {
        let path = format!("/api/v1/groups/{group}/tactics");
        let view = control.get(&path)?.1;
        Ok((view["ranks"][0]["as_chosen"] == true).then_some(view))
    })
    .unwrap()
}

#[test]
fn what_a_worker_has_measured_is_chosen_by_and_comes_back_at_its_next_start() {
    if !has_policies() {
        return;
    }
    let control = Control::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tactics.json");
    let file = path.to_str().unwrap();
    let (code, _, error) = tune(&["--out", file, "--tokens", "1,300", "--threads", "1"]);
    assert_eq!(code, Some(0), "{error}");
    let mut options = control.options();
    options.extend(["--threads".to_owned(), "1".to_owned()]);
    let with_file = [&options[..], &["--tactics".to_owned(), file.to_owned()]].concat();
    let start = |options: &[String]| {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Worker::start(&skewed(), &options).unwrap()
    };
    let group = skewed().file_name().unwrap().to_str().unwrap().to_owned();
    let mut worker = start(&with_file);
    let view = until_as_chosen(&control, &group);
    let tables = view["tables"].as_array().unwrap();
    assert_eq!(tables.len(), 2, "a table for each format: {view}");
    for table in tables {
        assert_eq!((&table["stale"], &table["policy"]), (&Value::Null, &json!("measured_table")));
        let tokens: Vec<&Value> =
            table["choices"].as_array().unwrap().iter().map(|choice| &choice["tokens"]).collect();
        assert_eq!(tokens, [&json!(1), &json!(300)]);
        assert!(table["measurements"].as_array().unwrap().len() >= 6, "{table}");
    }
    assert_says(&run(&control, &["tactics"]), &["nvfp4", "measured_table", "true"]);
    // Without the file: control knows what was measured.
    worker.signal(Signal::TERM).unwrap();
    worker.wait().unwrap();
    let case = Case::open(&skewed()).unwrap();
    let worker = start(&options);
    let view = until_as_chosen(&control, &group);
    assert_eq!(view["ranks"][0]["chosen"], 4);
    assert_says(&worker.log(), &["tactics are used as control has chosen"]);
    let mut engines = [worker.engine(BF16, 300).unwrap()];
    let output = call_all(&mut engines, 0, &case.inputs, &uneven(300, 1)).unwrap();
    drop(worker);
    let alone = Worker::start(&skewed(), &["--threads", "1"]).unwrap();
    let mut engines = [alone.engine(BF16, 300).unwrap()];
    assert!(output == call_all(&mut engines, 0, &case.inputs, &uneven(300, 1)).unwrap());
}

const PROBLEM: Problem = Problem {
    experts: 8,
    top_k: 4,
    hidden: 64,
    intermediate: 64,
    ranks: 1,
    slots_per_rank: 8,
    act: ActFormat::Bf16,
};

/// What a made-up worker with these kernels says: microseconds of calls of 64 tokens.
fn made_up(kernels: &str, times: &[(&str, f32)]) -> FromWorker {
    let times: Vec<_> = times.iter().map(|&(tactic, us)| (tactic, 64, us)).collect();
    made_up_sizes(kernels, &times)
}

/// The same of calls of several sizes: tactic, tokens, microseconds.
pub(crate) fn made_up_sizes(kernels: &str, times: &[(&str, u32, f32)]) -> FromWorker {
    let measured = |&(tactic, tokens, median_us): &(&str, u32, f32)| Measurement {
        problem: PROBLEM,
        tactic: tactic.to_owned(),
        tokens,
        runs: 50,
        median_us,
        p99_us: 99.0,
        measured_ms: 1_000,
    };
    let text = str::to_owned;
    let (device, driver, kernels) = (text("made-up"), text("1"), text(kernels));
    FromWorker::Tactics(Box::new(Tactics {
        provenance: Provenance { device, driver, kernels },
        problems: vec![PROBLEM],
        candidates: vec![text("by-tokens"), text("wide")],
        measurements: times.iter().map(measured).collect(),
        chosen: Vec::new(),
    }))
}

fn dial(control: &Control, incarnation: u64) -> FakeWorker {
    let register = Register { incarnation, ..register(("g", 0, 1), 1, 8) };
    FakeWorker::dial(control, register).unwrap().0
}

/// Waits for this order; others may have been on their way before.
#[track_caller]
fn hear_choice(worker: &mut FakeWorker, tactic: &str) {
    let choices = vec![Choice { problem: PROBLEM, tokens: 64, tactic: tactic.to_owned() }];
    let expected = FromControl::Choose { choices };
    loop {
        match worker.hear().unwrap() {
            order if order == expected => return,
            FromControl::Choose { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn set_chooser(control: &Control, chooser: &Value) -> (u16, Value) {
    control.put("/api/v1/groups/g/tactics", &json!({ "chooser": chooser })).unwrap()
}

#[test]
fn the_fastest_is_chosen_and_tables_of_other_kernels_are_stale() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let mut worker = dial(&control, 1);
    worker.say(&made_up("old", &[("by-tokens", 20.0), ("wide", 10.0)])).unwrap();
    hear_choice(&mut worker, "wide");
    drop(worker);
    // A margin that no tactic reaches: what is in force stays, which is the device's own choice at first.
    let settings = json!({ "policy": "measured_table", "settings": { "margin": 0.9 } });
    let (status, view) = set_chooser(&control, &settings);
    assert_eq!((status, &view["chooser"]["settings"]["margin"]), (200, &json!(0.9)));
    // An upgrade of the worker: what was measured before does not hold.
    let mut worker = dial(&control, 2);
    worker.say(&made_up("new", &[])).unwrap();
    until("the worker's word", || {
        let view = told(&control, "g");
        Ok((view["ranks"][0]["measured_on"]["kernels"] == "new").then_some(()))
    })
    .unwrap();
    let view = told(&control, "g");
    let why = view["tables"][0]["stale"].as_str().unwrap();
    assert_eq!(why, "the hash of kernels is new, that of the measurements was old");
    assert_eq!(view["ranks"][0]["as_chosen"], false);
    worker.say(&made_up("new", &[("by-tokens", 10.0), ("wide", 5.0)])).unwrap();
    hear_choice(&mut worker, "by-tokens");
    assert_eq!(told(&control, "g")["tables"].as_array().unwrap().len(), 2);
}

#[test]
fn what_cannot_choose_or_be_measured_is_refused() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let mut worker = dial(&control, 1);
    let refused = json!({ "margin": 2 });
    for (policy, settings, status, says) in [
        ("nobody", json!({}), 404, "there is no policy nobody"),
        ("greedy_swap", json!({}), 400, "expected a tactics policy"),
        ("measured_table", refused, 422, "the settings are refused: /margin"),
    ] {
        let chooser = json!({ "policy": policy, "settings": settings });
        let (got, problem) = set_chooser(&control, &chooser);
        assert_eq!(got, status, "{problem}");
        assert_says(problem["title"].as_str().unwrap(), &[says]);
    }
    worker.say(&made_up("new", &[("wide", -1.0)])).unwrap();
    let FromControl::Refused { reason } = worker.hear().unwrap() else { panic!("no refusal") };
    assert_says(&reason, &["a measured time is -1, expected a finite time of more than 0 us"]);
}
