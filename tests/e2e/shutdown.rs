//! Starting and ending.

use std::fs;
use std::process::Command;

use protocol::frame::{Frame, Kind};
use rustix::process::Signal;
use tests::worker_process::{Worker, program};

use crate::raw::{Raw, call};
use crate::{assert_says, skewed};

#[test]
fn every_call_that_has_arrived_is_answered_before_the_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut worker = Worker::start(&skewed(), &[]).unwrap();
        let mut engines: Vec<Raw> = (0..8).map(|_| Raw::attached(&worker)).collect();
        // Frames and signal meet the worker stopped, so that it finds all of them at once.
        worker.signal(Signal::STOP).unwrap();
        engines.iter_mut().for_each(|engine| engine.send(&call(1)));
        worker.signal(signal).unwrap();
        worker.signal(Signal::CONT).unwrap();
        for engine in &mut engines {
            let done = Frame { kind: Kind::Done, seq: 1, body: Vec::new() };
            assert_eq!(engine.frame(), Some(done));
            assert_eq!(engine.frame(), None);
        }
        assert_eq!(worker.wait().unwrap().code(), Some(0));
        assert!(!worker.socket().exists());
    }
}

#[test]
fn a_socket_where_a_worker_listens_is_not_taken_over() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let path = worker.socket();
    let second = || {
        let mut command = Command::new(program("moeplane-worker").unwrap());
        command.args(["run", "--exit-with-parent", "--model"]).arg(skewed());
        command.arg("--socket").arg(&path);
        command.output().unwrap()
    };
    let output = second();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_says(&said, &["cannot listen at", path.to_str().unwrap(), "somebody listens there"]);
    Raw::attached(&worker);
}

#[test]
fn a_dead_socket_does_not_keep_a_worker_from_starting() {
    let mut worker = Worker::start(&skewed(), &[]).unwrap();
    worker.signal(Signal::KILL).unwrap();
    worker.wait().unwrap();
    assert!(worker.socket().exists(), "a killed worker leaves its socket");
    worker.restart(&skewed()).unwrap();
    Raw::attached(&worker);
}

#[test]
fn configurations_that_cannot_be_used_end_with_64_and_name_the_value() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("worker.toml");
    let run = |text: &str, options: &[&str]| {
        fs::write(&file, text).unwrap();
        let mut command = Command::new(program("moeplane-worker").unwrap());
        command.arg("config").arg("--config").arg(&file).args(options);
        let output = command.output().unwrap();
        (output.status.code(), output.stdout, String::from_utf8(output.stderr).unwrap())
    };
    let good = "model = 'm'\n[engine]\nsocket = 's'\n";
    let cases = [
        ("modle = 'm'", vec![], "unknown field `modle`"),
        ("model = 'm'", vec![], "engine.socket is not set"),
        (good, vec!["--max-tokens", "0"], "engine.max_tokens is 0, expected 1 to 65536"),
        (good, vec!["--tactic", "best"], "device.tactic is best"),
        (good, vec!["--log", "worker=noisy"], "log.filter is worker=noisy"),
    ];
    for (text, options, expected) in cases {
        let (code, _, said) = run(text, &options);
        assert_eq!(code, Some(64), "{said}");
        assert_says(&said, &["error: ", expected]);
    }
    let (code, printed, _) = run(good, &["--threads", "3"]);
    assert_eq!(code, Some(0));
    let printed = String::from_utf8(printed).unwrap();
    assert_says(&printed, &["model = \"m\"", "threads = 3", "max_tokens = 8192"]);
    fs::write(&file, &printed).unwrap();
    assert_eq!(run(&printed, &[]).1, printed.into_bytes(), "what is printed reads back");
}
