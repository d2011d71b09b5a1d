//! The operator's command against a real control plane.

use std::fs;
use std::process::{Command, Output};

use protocol::message::Phase;
use protocol::session::Window;
use serde_json::Value;
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, layer_window, register};
use tests::worker_process::{program, until};

use crate::assert_says;

/// Runs the command by a token; `{url}` is set by the environment.
pub(crate) fn run_as(control: &Control, token: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("moeplane").unwrap());
    command.env_clear().env("MOEPLANE_URL", format!("http://{}", control.address()));
    if let Some(token) = token {
        command.env("MOEPLANE_TOKEN", token);
    }
    command.args(arguments).output().unwrap()
}

/// What it prints for the admin.
#[track_caller]
pub(crate) fn run(control: &Control, arguments: &[&str]) -> String {
    let output = run_as(control, Some(control.token()), arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?} {:?}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Cells of a table's rows, without its head.
pub(crate) fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect()
}

/// A group of two with a placement in force, and a window in which rank 0 has three times rank 1's rows.
fn group(control: &Control) -> Vec<FakeWorker> {
    let workers = (0..2).map(|rank| {
        let registered = register(("g", rank, 2), 2, 8);
        let (mut worker, _) = FakeWorker::dial(control, registered.clone()).unwrap();
        worker.hold_in_order(&registered).unwrap();
        worker
    });
    let mut workers: Vec<FakeWorker> = workers.collect();
    let layers = vec![layer_window(1, Phase::Decode, vec![3, 3, 3, 3, 1, 1, 1, 1])];
    let (number, start_ms, end_ms, closed_by) = (1, 0, 60_000, Some(60_000));
    workers[0].tell(Window { number, start_ms, end_ms, closed_by, layers }).unwrap();
    workers
}

#[test]
fn people_get_tables_and_programs_json() {
    let control = Control::start_patient().unwrap();
    assert_eq!(run(&control, &["workers"]), "no worker has registered yet\n");
    let _workers = group(&control);
    let all = until("two workers", || {
        let text = run(&control, &["workers"]);
        Ok((text.matches("connected").count() == 2).then_some(text))
    })
    .unwrap();
    assert_eq!(rows(&all)[1][..4], ["g", "1", "connected", "made-up"]);
    let status = run(&control, &["status"]);
    assert_eq!(rows(&status)[0], ["g", "made-up", "2", "-", "2", "1.500", "1", "-"]);
    assert_eq!(rows(&run(&control, &["layers"]))[1][..4], ["1", "true", "8", "4"]);
    let windows = run(&control, &["windows", "--layer", "1", "--limit", "1"]);
    assert_eq!(rows(&windows)[0][..3], ["1970-01-01T00:01:00Z", "1", "decode"]);
    let balance = run(&control, &["balance", "--group", "g"]);
    assert_eq!(rows(&balance)[1], ["1", "0", "16", "1.500", "0.667"]);
    let placements: Value = serde_json::from_str(&run(&control, &["placement", "--json"])).unwrap();
    assert_eq!(placements[0]["in_force"]["slots_per_rank"], 4);
    assert_says(&run(&control, &["completions", "bash"]), &["moeplane", "--token-file"]);
}

#[test]
fn placements_go_out_and_in() {
    let control = Control::start_patient().unwrap();
    let _workers = group(&control);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("map.yaml").display().to_string();
    until("a placement in force", || {
        let export = ["export", "--format", "tensorrt-llm", "--out", &file];
        Ok(run_as(&control, Some(control.token()), &export).status.success().then_some(()))
    })
    .unwrap();
    let import = ["import", &file, "--format", "tensorrt-llm", "--reason", "as before"];
    assert_eq!(
        rows(&run(&control, &[&import[..], &["--dry-run"]].concat()))[0],
        ["0", "1", "true"]
    );
    assert_eq!(rows(&run(&control, &import))[1], ["1", "1", "true"]);
    assert_eq!(rows(&run(&control, &["placement", "--layer", "1"]))[0][..2], ["1", "import"]);
    let text = fs::read_to_string(&file).unwrap().replace("- 7\n", "- 8\n");
    fs::write(&file, text).unwrap();
    let refused = run_as(&control, Some(control.token()), &import);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_says(&said, &["error: layer 0, device 1: expert 8 is there, expected 0 to 7"]);
    assert_says(&run(&control, &["audit"]), &["placements.import", "as before"]);
}

#[test]
fn tokens_are_made_by_it_and_its_exit_code_says_what_is_wrong() {
    let control = Control::start().unwrap();
    let make = ["token", "make", "ci", "--role", "viewer", "--reason", "to look"];
    let secret = run(&control, &make);
    let secret = secret.trim();
    let code = |token: Option<&str>, arguments: &[&str]| {
        let output = run_as(&control, token, arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let whoami = String::from_utf8(run_as(&control, Some(secret), &["token", "whoami"]).stdout);
    assert_eq!(rows(&whoami.unwrap())[0], ["ci", "viewer"]);
    let (low, said) = code(Some(secret), &make);
    assert_eq!(low, 3);
    assert_says(&said, &["the token has the role viewer, expected admin"]);
    let id = rows(&run(&control, &["token", "list"])).last().unwrap()[0].to_owned();
    run(&control, &["token", "revoke", &id, "--reason", "seen enough"]);
    assert_eq!(code(Some(secret), &["status"]).0, 3);
    assert_eq!(code(None, &["status"]).0, 3);
    let (wrong, said) = code(Some(control.token()), &["layers"]);
    assert_eq!(wrong, 64);
    assert_says(&said, &["the group is not set, expected --group with one of []"]);
    assert_eq!(code(Some(control.token()), &["layers", "--group", "a/b"]).0, 2);
    assert_eq!(code(Some(control.token()), &["nonsense"]).0, 64);
    let (away, said) = code(Some("x"), &["status", "--url", "http://127.0.0.1:1"]);
    assert_eq!(away, 1);
    assert_says(&said, &["control at http://127.0.0.1:1 is not reached"]);
}
