//! What policies propose: asked through the API and by the operator's command, against groups of made-up workers.

use std::process::Command;

use protocol::message::Phase;
use protocol::session::Window;
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, layer_window, register};
use tests::worker_process::{program, until};

use crate::assert_says;

const PROPOSALS: &str = "/api/v1/groups/g/proposals";

/// Says what is skipped where policies were not built.
#[expect(clippy::print_stderr, reason = "what is skipped is said")]
fn has_policies() -> bool {
    let control = program("moeplane-control").unwrap();
    let built = control.parent().unwrap().parent().unwrap().join("policies/greedy_swap.wasm");
    if !built.exists() {
        eprintln!("SKIPPED: {} does not exist, run cargo xtask policies", built.display());
    }
    built.exists()
}

/// Two ranks with a placement in force, and a window in which layer 1 has three times as many rows on rank 0.
fn group(control: &Control) -> Vec<FakeWorker> {
    let mut workers = Vec::new();
    for rank in 0..2 {
        let registered = register(("g", rank, 2), 2, 8);
        let (mut worker, _) = FakeWorker::dial(control, registered.clone()).unwrap();
        worker.hold_in_order(&registered).unwrap();
        workers.push(worker);
    }
    let rows = vec![3000, 3000, 3000, 3000, 1000, 1000, 1000, 1000];
    let layers = vec![layer_window(1, Phase::Decode, rows)];
    let (number, start_ms, end_ms, closed_by) = (1, 0, 60_000, Some(60_000));
    workers[0].tell(Window { number, start_ms, end_ms, closed_by, layers }).unwrap();
    until("a load", || {
        Ok((control.get("/api/v1/groups/g/windows")?.1["items"] != json!([])).then_some(()))
    })
    .unwrap();
    workers
}

fn propose(control: &Control, body: &Value) -> (u16, Value) {
    control.post(PROPOSALS, body).unwrap()
}

#[test]
fn a_policy_proposes_by_what_is_in_force_and_the_newest_load() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let (status, problem) = propose(&control, &json!({}));
    assert_eq!(status, 404, "{problem}");
    let _workers = group(&control);
    let (status, proposal) = propose(&control, &json!({}));
    assert_eq!(status, 200, "{proposal}");
    assert_eq!(proposal["policy"], "greedy-swap");
    let change = &proposal["changes"][0];
    assert_eq!((&change["layer"], &change["epoch"]), (&json!(1), &json!(0)));
    assert_eq!(change["max_over_mean"], json!({ "before": 1.5, "after": 1.0 }));
    let moves = change["moves"].as_array().unwrap();
    assert_eq!((moves.len(), &proposal["moved"]), (4, &json!(4)));
    assert_eq!(moves[0]["purpose"], "spread");
    let experts: Vec<i64> = serde_json::from_value(change["phy2log"].clone()).unwrap();
    let mut sorted = experts.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..8).collect::<Vec<i64>>());
    // 3 x 64 x 64 weights of 4.5 bits.
    assert_eq!(proposal["bytes"], 4 * 3 * 64 * 64 * 9 / 16);

    // The same question is the same proposal, also on record.
    let (_, again) = propose(&control, &json!({}));
    assert_eq!(again, proposal);
    let (_, list) = control.get(PROPOSALS).unwrap();
    assert_eq!(list["items"], json!([proposal]));
    let id = proposal["id"].as_str().unwrap();
    let (_, one) = control.get(&format!("/api/v1/proposals/{id}")).unwrap();
    assert_eq!(one, proposal);
    let (_, audit) = control.get("/api/v1/audit").unwrap();
    let entries = audit["items"].as_array().unwrap().iter();
    let made: Vec<&Value> = entries.filter(|entry| entry["action"] == "proposal.make").collect();
    assert_eq!((made.len(), &made[0]["target"]), (1, &json!(format!("g/{id}"))));

    // A budget is another question; one of nothing is a proposal that says why nothing changes.
    let budget = json!({ "moves_per_layer": 2 });
    let (_, small) = propose(&control, &json!({ "budget": budget }));
    assert_eq!((&small["moved"], &small["changes"][0]["layer"]), (&json!(2), &json!(1)));
    let settings = json!({ "dead-zone": 2 });
    let (_, none) = propose(&control, &json!({ "settings": settings }));
    assert_eq!(none["changes"], json!([]));
    assert_says(none["explanation"].as_str().unwrap(), &["0 of 2 layers change"]);
}

#[test]
fn what_cannot_be_proposed_is_said() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = group(&control);
    for (body, status, expected) in [
        (json!({ "policy": "nobody" }), 404, "there is no policy nobody, expected"),
        (
            json!({ "settings": { "dead-zone": 0 } }),
            422,
            "/dead-zone: got 0, expected a number from 1 to 10",
        ),
        (
            json!({ "policy": "measured_table" }),
            422,
            "this is a tactics policy, expected a placement policy",
        ),
        (json!({ "budget": { "moves": 1 } }), 422, "unknown field `moves`"),
    ] {
        let (found, problem) = propose(&control, &body);
        assert_eq!(found, status, "{body} {problem}");
        assert_says(problem["title"].as_str().unwrap(), &[expected]);
    }
    let (status, _) = control.get("/api/v1/proposals/none").unwrap();
    assert_eq!(status, 404);
}

#[test]
fn the_command_shows_changes_and_moves() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = group(&control);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program("moeplane").unwrap());
        command.env_clear().env("MOEPLANE_URL", format!("http://{}", control.address()));
        let output =
            command.env("MOEPLANE_TOKEN", control.token()).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run(&["proposals"]), "nothing has been proposed yet\n");
    let shown = run(&["propose", "--reason", "uneven"]);
    assert_says(
        &shown,
        &["greedy-swap: 1 of 2 layers change", "MAX/MEAN", "1.500", "1.000", "spread"],
    );
    let id = shown.lines().next().unwrap();
    assert_eq!(run(&["diff", id]), shown);
    assert_says(&run(&["proposals"]), &[id, "greedy-swap"]);
    let tradeoffs = run(&["tradeoffs"]);
    let rows: Vec<Vec<&str>> =
        tradeoffs.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    // Only layer 1 had traffic. A swap is two moves: a budget of one changes nothing, and one of eight no more than of four.
    let shown: Vec<[&str; 3]> = rows.iter().map(|row| [row[0], row[4], row[6]]).collect();
    let expected = [
        ["0", "1.500", "true"],
        ["1", "1.500", "false"],
        ["2", "1.250", "true"],
        ["4", "1.000", "true"],
        ["8", "1.000", "false"],
    ];
    assert_eq!(shown, expected, "{tradeoffs}");
}
