//! Tactics: measured by `tune`, used at the next start, and not where they do not hold.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use tests::case::Case;
use tests::group::{call_all, uneven};
use tests::worker_process::{Worker, program};

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
