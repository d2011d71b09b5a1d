//! What policies propose: asked through the API and by the operator's command, against groups of made-up workers.

use protocol::message::Phase;
use protocol::session::{Register, Window};
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, layer_window, register};
use tests::watcher::Watcher;
use tests::worker_process::{program, until};

use crate::assert_says;
use crate::command::{run, run_as};
use crate::tactics::made_up_sizes;

const PROPOSALS: &str = "/api/v1/groups/g/proposals";

/// Says what is skipped where policies were not built.
#[expect(clippy::print_stderr, reason = "what is skipped is said")]
pub(crate) fn has_policies() -> bool {
    let control = program("moeplane-control").unwrap();
    let built = control.parent().unwrap().parent().unwrap().join("policies/greedy_swap.wasm");
    if !built.exists() {
        eprintln!("SKIPPED: {} does not exist, run cargo xtask policies", built.display());
    }
    built.exists()
}

/// Two ranks with a placement in force, and a window in which layer 1 has three times as many rows on rank 0.
pub(crate) fn group(control: &Control) -> Vec<FakeWorker> {
    let mut workers = hold(control, [1, 1]);
    tell_load(control, &mut workers[0]);
    workers
}

/// Tells the load.
fn tell_load(control: &Control, worker: &mut FakeWorker) {
    let rows = vec![3000, 3000, 3000, 3000, 1000, 1000, 1000, 1000];
    let layers = vec![layer_window(1, Phase::Decode, rows)];
    let (number, start_ms, end_ms, closed_by) = (1, 0, 60_000, Some(60_000));
    worker.tell(Window { number, start_ms, end_ms, closed_by, layers }).unwrap();
    until("a load", || {
        Ok((control.get("/api/v1/groups/g/windows")?.1["items"] != json!([])).then_some(()))
    })
    .unwrap();
}

/// Two ranks that hold what they are told: these epochs.
fn hold(control: &Control, epochs: [u64; 2]) -> Vec<FakeWorker> {
    let rank = |rank| {
        let registered = Register { asks: true, ..register(("g", rank, 2), 2, 8) };
        let (mut worker, _) = FakeWorker::dial(control, registered).unwrap();
        assert_eq!(worker.hold_what_is_told().unwrap(), epochs);
        worker
    };
    let workers = (0..2).map(rank).collect();
    until("a placement in force", || {
        let (_, all) = control.get("/api/v1/groups/g/placements")?;
        Ok(all[0]["in_force"].is_object().then_some(()))
    })
    .unwrap();
    workers
}

/// Asks for what would be proposed with this budget.
fn open(control: &Control, moves_per_layer: u32) -> String {
    let budget = json!({ "moves_per_layer": moves_per_layer });
    let (status, proposal) = propose(control, &json!({ "budget": budget }));
    assert_eq!((status, &proposal["standing"]), (200, &json!("open")), "{proposal}");
    proposal["id"].as_str().unwrap().to_owned()
}

fn decide(control: &Control, id: &str, verb: &str) -> (u16, Value) {
    control.post(&format!("/api/v1/proposals/{id}/{verb}"), &json!({})).unwrap()
}

fn propose(control: &Control, ask: &Value) -> (u16, Value) {
    control.post(PROPOSALS, &json!({ "ask": ask })).unwrap()
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
    let (status, mut proposal) = propose(&control, &json!({}));
    assert_eq!(status, 200, "{proposal}");
    assert_eq!(proposal["policy"], "greedy-swap");
    let change = &proposal["changes"][0];
    assert_eq!((&change["layer"], &change["epoch"]), (&json!(1), &json!(1)));
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

    // The same question is the same proposal, also on record, and its time begins anew.
    let (_, again) = propose(&control, &json!({}));
    let expires = |proposal: &Value| proposal["expires_ms"].as_u64().unwrap();
    assert!(expires(&again) >= expires(&proposal));
    proposal["expires_ms"] = again["expires_ms"].clone();
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

/// What a rank's part of a call costs is what its workers have measured.
#[test]
fn milliseconds_are_predicted_where_calls_were_measured() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let mut workers = group(&control);
    let ask = json!({ "policy": "greedy_swap" });
    let (_, before) = propose(&control, &ask);
    assert_eq!((&before["milliseconds"], &before["payback_steps"]), (&Value::Null, &Value::Null));
    // Ten microseconds and one for each pair of token and expert.
    let times = [1, 64, 4_096].map(|tokens| ("wide", tokens, 10.0 + 4.0 * tokens as f32));
    workers[0].say(&made_up_sizes("k", &times)).unwrap();
    until("measurements", || {
        let (_, view) = control.get("/api/v1/groups/g/tactics")?;
        Ok((view["tables"] != json!([])).then_some(()))
    })
    .unwrap();
    let (status, after) = propose(&control, &ask);
    assert_eq!(status, 200, "{after}");
    let ms = |when: &str| after["milliseconds"][when].as_f64().unwrap();
    // A call of 16,000 pairs: 12,000 on the busiest rank, and 8,000 on each when they are even.
    assert!((ms("before") - 12.01).abs() < 0.2, "{after}");
    assert!((ms("after") - 8.01).abs() < 0.2, "{after}");
    let payback = after["payback_steps"].as_f64().unwrap();
    let copy_ms = after["bytes"].as_f64().unwrap() / 2.0 / 500e6 * 1e3;
    assert!((payback * (ms("before") - ms("after")) - copy_ms).abs() < 1e-3 * copy_ms, "{after}");
    let id = after["id"].as_str().unwrap();
    assert_says(&run(&control, &["diff", id]), &["predicted: ", "which pays back after"]);
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
    let run = |arguments: &[&str]| run(&control, arguments);
    assert_eq!(run(&["proposals"]), "nothing has been proposed yet\n");
    let shown = run(&["propose", "--reason", "uneven"]);
    assert_says(
        &shown,
        &["greedy-swap: 1 of 2 layers change", "MAX/MEAN", "1.500", "1.000", "spread"],
    );
    let (id, standing) = shown.lines().next().unwrap().split_once(' ').unwrap();
    assert_eq!((run(&["diff", id]), standing), (shown.clone(), "open"));
    assert_says(&run(&["proposals"]), &[id, "greedy-swap", "open"]);
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
    let rejected = run(&["reject", id, "--reason", "a release is due"]);
    assert_says(&rejected, &[id, "rejected by admin: a release is due", "MAX/MEAN"]);
    let small = run(&["propose", "--moves-per-layer", "2", "--reason", "uneven"]);
    let small = small.split_once(' ').unwrap().0;
    assert_says(&run(&["approve", small, "--reason", "quiet hour"]), &["approved by admin"]);
    assert_says(&run(&["placement", "--layer", "1"]), &["proposal", "default"]);
    // In force is epoch 1: the approved one is given up.
    let given_up = run(&["rollback", "--reason", "not now"]);
    assert_says(&given_up, &["LAYER", "EPOCH", "CHANGED", "3", "true"]);
    assert_says(&run(&["placement", "--layer", "1"]), &["rollback", "proposal", "default"]);
    assert_says(&run(&["balancing"]), &["manual", "greedy_swap", "60"]);
    let auto = ["balancing", "--mode", "auto", "--approve-moved", "7", "--approve-bytes", "9"];
    let auto = [&auto[..], &["--every-s", "3600", "--reason", "nights"]].concat();
    assert_says(&run(&auto), &["auto", "greedy_swap", "3600", "7", "9"]);
    assert_says(&run(&["balancing"]), &["auto", "3600"]);
}

#[test]
fn what_is_approved_is_committed_and_held_from_the_next_start() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let workers = group(&control);
    let mut watcher = Watcher::open(&control, None).unwrap();
    let (large, small) = (open(&control, 4), open(&control, 2));
    let (status, approved) = decide(&control, &large, "approve");
    assert_eq!((status, &approved["standing"]), (200, &json!("approved")), "{approved}");
    let decision = &approved["decision"];
    assert_eq!((&decision["actor"], &decision["reason"]), (&json!("admin"), &json!("a test")));
    for (id, standing) in [(&large, "open"), (&small, "open"), (&large, "approved")] {
        let told = loop {
            let (_, kind, data) = watcher.event().unwrap();
            if kind == "proposal" {
                break data;
            }
        };
        let expected = json!({ "group": "g", "id": id, "standing": standing });
        assert_eq!(told["proposal"], expected);
    }

    // One layer has another placement; nobody holds it yet.
    let (_, placements) = control.get("/api/v1/groups/g/placements").unwrap();
    let asked = &placements[1]["asked"];
    assert_eq!((&asked["source"], &asked["proposal"]), (&json!("proposal"), &json!(large)));
    assert_eq!(asked["phy2log"], approved["changes"][0]["phy2log"]);
    assert_eq!((&asked["epoch"], &placements[1]["in_force"]["epoch"]), (&json!(2), &json!(1)));
    assert_eq!(
        (&placements[1]["waiting"], &placements[0]["waiting"]),
        (&json!([0, 1]), &json!([]))
    );

    // The other was made for what is not the newest any more, and so is what would be proposed now.
    for verb in ["approve", "reject"] {
        let (status, problem) = decide(&control, &small, verb);
        assert_eq!(status, 409, "{problem}");
        let expected = "layer 1 has epoch 2 now, it was proposed for epoch 1";
        assert_says(problem["title"].as_str().unwrap(), &[&small, expected]);
        let (status, problem) = decide(&control, &large, verb);
        assert_eq!(status, 409, "{problem}");
        assert_says(
            problem["title"].as_str().unwrap(),
            &["admin has approved it already", "a test"],
        );
    }
    let (_, shown) = control.get(&format!("/api/v1/proposals/{small}")).unwrap();
    assert_eq!((&shown["standing"], &shown["decision"]), (&json!("superseded"), &Value::Null));

    drop(workers);
    until("workers to be gone", || {
        let (_, workers) = control.get("/api/v1/workers")?;
        let items = workers["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().all(|worker| worker["state"] == "lost").then_some(()))
    })
    .unwrap();
    let _workers = hold(&control, [1, 2]);
    let id = open(&control, 4);
    let (_, audit) = control.get("/api/v1/audit").unwrap();
    let entries = audit["items"].as_array().unwrap();
    let approval = entries.iter().find(|entry| entry["action"] == "proposal.approve").unwrap();
    let epochs = |epoch: u64| json!({ "epochs": [[1, epoch]] });
    assert_eq!((&approval["before"], &approval["after"]), (&epochs(1), &epochs(2)));
    assert_ne!(id, large);
}

#[test]
fn what_cannot_be_decided_is_said() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = group(&control);
    let refused = |id: &str, verb: &str, status: u16, expected: &str| {
        let (found, problem) = decide(&control, id, verb);
        assert_eq!(found, status, "{verb} {problem}");
        assert_says(problem["title"].as_str().unwrap(), &[expected]);
    };
    refused("none", "approve", 404, "there is no proposal none");
    let id = open(&control, 0);
    refused(&id, "approve", 409, "it changes nothing, expected at least one layer");
    assert_eq!(decide(&control, &id, "reject").0, 200);
    refused(&id, "approve", 409, "admin has rejected it already");
    // Rejected once, it stays so when it is asked for again.
    let budget = json!({ "moves_per_layer": 0 });
    let (_, again) = propose(&control, &json!({ "budget": budget }));
    assert_eq!((&again["id"], &again["standing"]), (&json!(id), &json!("rejected")));

    let (_, short) = propose(&control, &json!({ "valid_for_s": 1 }));
    let id = short["id"].as_str().unwrap();
    until("a proposal to expire", || {
        let (_, shown) = control.get(&format!("/api/v1/proposals/{id}"))?;
        Ok((shown["standing"] == "expired").then_some(()))
    })
    .unwrap();
    refused(id, "approve", 409, "it expired at");
    refused(id, "reject", 409, "ask for it again");
    let (_, again) = propose(&control, &json!({}));
    assert_eq!((&again["id"], &again["standing"]), (&json!(id), &json!("open")));

    for (body, expected) in [
        (json!({ "valid_for_s": 0 }), "valid_for_s is 0, expected 1 to 604800"),
        (json!({ "minimum_gain": -1 }), "minimum_gain is -1, expected 0 to 1024"),
    ] {
        let (status, problem) = propose(&control, &body);
        assert_eq!(status, 400, "{problem}");
        assert_says(problem["title"].as_str().unwrap(), &[expected]);
    }
    let (_, none) = propose(&control, &json!({ "minimum_gain": 0.6 }));
    assert_eq!((&none["changes"], &none["withheld"]), (&json!([]), &json!(1)));
}

#[test]
fn workers_that_hold_placements_of_their_own_are_not_told_others() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let mut workers = Vec::new();
    for rank in 0..2 {
        let registered = register(("g", rank, 2), 2, 8);
        let (mut worker, _) = FakeWorker::dial(&control, registered.clone()).unwrap();
        worker.hold_in_order(&registered).unwrap();
        workers.push(worker);
    }
    tell_load(&control, &mut workers[0]);
    let id = open(&control, 4);
    let (status, problem) = decide(&control, &id, "approve");
    assert_eq!(status, 409, "{problem}");
    let expected = "its workers hold placements of their own";
    assert_says(problem["title"].as_str().unwrap(), &[expected]);
}

const BALANCING: &str = "/api/v1/groups/g/balancing";

#[track_caller]
fn balance(control: &Control, balancing: &Value) -> (u16, Value) {
    let body = json!({ "balancing": balancing, "reason": "a test" });
    let (status, text) =
        control.send("PUT", BALANCING, Some(control.token()), Some(&body.to_string())).unwrap();
    (status, serde_json::from_str(&text).unwrap())
}

/// What control's own question has led to.
fn advised(control: &Control) -> Value {
    let mut last = Value::Null;
    until("advice", || {
        last = control.get(BALANCING)?.1["last"].clone();
        Ok((!last["asked_ms"].is_null()).then_some(()))
    })
    .unwrap();
    last
}

fn standings(control: &Control) -> Vec<Value> {
    let (_, list) = control.get(PROPOSALS).unwrap();
    list["items"].as_array().unwrap().iter().map(|item| item["standing"].clone()).collect()
}

/// A later window with the same load.
pub(crate) fn tell_again(control: &Control, worker: &mut FakeWorker, end_ms: u64) {
    let rows = vec![3000, 3000, 3000, 3000, 1000, 1000, 1000, 1000];
    let layers = vec![layer_window(1, Phase::Decode, rows)];
    let (number, start_ms, closed_by) = (1, 0, Some(end_ms));
    worker.tell(Window { number, start_ms, end_ms, closed_by, layers }).unwrap();
    until("another window", || {
        let (_, windows) = control.get("/api/v1/groups/g/windows?newest_first=true")?;
        Ok((windows["items"][0]["end_ms"] == end_ms).then_some(()))
    })
    .unwrap();
}

#[test]
fn advice_comes_with_new_load_and_says_nothing_twice() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let mut workers = group(&control);
    let (_, manual) = control.get(BALANCING).unwrap();
    assert_eq!((&manual["mode"], &manual["last"]["asked_ms"]), (&json!("manual"), &Value::Null));
    let advise = json!({ "mode": "advise", "every_s": 1 });
    assert_eq!(balance(&control, &advise).0, 200);
    let last = advised(&control);
    assert_eq!((&last["problem"], &last["window_end_ms"]), (&Value::Null, &json!(60_000)));
    let id = last["proposal"].as_str().unwrap().to_owned();
    assert_eq!(standings(&control), ["open"]);
    // The same load again: it is asked, and the answer is known.
    tell_again(&control, &mut workers[0], 61_000);
    until("another question", || {
        let (_, balancing) = control.get(BALANCING)?;
        Ok((balancing["last"]["window_end_ms"] == 61_000).then_some(()))
    })
    .unwrap();
    assert_eq!(advised(&control)["proposal"], json!(id));
    assert_eq!(standings(&control), ["open"]);
    // Once it is approved, ranks that still hold what was before are not advised.
    assert_eq!(decide(&control, &id, "approve").0, 200);
    tell_again(&control, &mut workers[0], 62_000);
    until("a problem", || {
        let (_, balancing) = control.get(BALANCING)?;
        Ok(balancing["last"]["problem"].as_str().is_some().then_some(()))
    })
    .unwrap();
    let expected = "layer 1 has epoch 2 now, it was proposed for epoch 1";
    assert_says(advised(&control)["problem"].as_str().unwrap(), &[expected]);
    assert_eq!(standings(&control), ["approved"]);
}

#[test]
fn mode_auto_approves_within_limits() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = group(&control);
    let auto = |moved: u64| json!({ "mode": "auto", "every_s": 1, "approve": { "moved": moved, "bytes": 1_000_000 } });
    // Four experts would move.
    assert_eq!(balance(&control, &auto(3)).0, 200);
    let id = advised(&control)["proposal"].clone();
    assert_eq!(standings(&control), ["open"]);
    assert_eq!(balance(&control, &auto(4)).0, 200);
    assert_eq!(advised(&control)["proposal"], id);
    assert_eq!(standings(&control), ["approved"]);
    let (_, proposal) =
        control.get(&format!("/api/v1/proposals/{}", id.as_str().unwrap())).unwrap();
    let decision = &proposal["decision"];
    assert_eq!(decision["actor"], "moeplane-control");
    assert_says(decision["reason"].as_str().unwrap(), &["mode auto: at most 4 experts"]);

    for (balancing, status, expected) in [
        (json!({ "mode": "auto" }), 400, "approve is null, expected the most experts and bytes"),
        (json!({ "every_s": 0 }), 400, "every_s is 0, expected 1 to 86400"),
        (json!({ "mode": "often" }), 422, "unknown variant `often`"),
        (json!({ "ask": { "valid_for_s": 0 } }), 400, "valid_for_s is 0"),
    ] {
        let (found, problem) = balance(&control, &balancing);
        assert_eq!(found, status, "{problem}");
        assert_says(problem["title"].as_str().unwrap(), &[expected]);
    }
    let (_, kept) = control.get(BALANCING).unwrap();
    assert_eq!((&kept["mode"], &kept["approve"]["moved"]), (&json!("auto"), &json!(4)));
}

/// Three ranks with four slots each for eight experts, and load in one of two layers.
fn roomy(control: &Control) -> Vec<FakeWorker> {
    let rank = |rank| {
        let base = register(("g", rank, 3), 2, 8);
        let registered = Register { asks: true, slots_per_rank: 4, ..base };
        let (mut worker, _) = FakeWorker::dial(control, registered).unwrap();
        worker.hold_what_is_told().unwrap();
        worker
    };
    let mut workers: Vec<FakeWorker> = (0..3).map(rank).collect();
    until("a placement in force", || {
        let (_, all) = control.get("/api/v1/groups/g/placements")?;
        Ok(all[0]["in_force"].is_object().then_some(()))
    })
    .unwrap();
    tell_load(control, &mut workers[0]);
    workers
}

/// Layers that a proposal changes, and the expert of every slot.
fn changed(proposal: &Value) -> Vec<(u64, Vec<i64>)> {
    let of = |change: &Value| {
        let slots = change["phy2log"].as_array().unwrap().iter();
        (change["layer"].as_u64().unwrap(), slots.map(|slot| slot.as_i64().unwrap()).collect())
    };
    proposal["changes"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn plans_keep_what_operators_have_said_of_ranks_and_experts() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = roomy(&control);
    let run = |arguments: &[&str]| run(&control, arguments);
    assert_says(&run(&["constraints"]), &["no rank is to leave", "no expert is pinned"]);
    let ask = json!({ "policy": "greedy_swap" });
    // An expert that must not be where it is, in the layer without load.
    run(&["constraints", "--never", "0:0@0", "--reason", "another tenant"]);
    let (status, proposal) = propose(&control, &ask);
    assert_eq!(status, 200, "{proposal}");
    let changes = changed(&proposal);
    let (_, slots) = changes.iter().find(|(layer, _)| *layer == 0).unwrap();
    assert!(!slots[..4].contains(&0) && slots[4..].contains(&0), "{slots:?}");
    // A rank that is to be taken away: of both layers all comes to have a place elsewhere.
    run(&["constraints", "--unpin", "0:0@0", "--drain", "2", "--reason", "new memory"]);
    let (status, proposal) = propose(&control, &ask);
    assert_eq!(status, 200, "{proposal}");
    let changes = changed(&proposal);
    assert_eq!(changes.len(), 2, "{proposal}");
    for (layer, slots) in &changes {
        assert!((0..8).all(|expert| slots[..8].contains(&expert)), "layer {layer}: {slots:?}");
    }
    let moves = proposal["changes"][0]["moves"].as_array().unwrap();
    assert!(moves.iter().any(|step| step["purpose"] == "drain"), "{moves:?}");
    let said = run(&["constraints", "--rejoin", "2", "--speed", "1=0.5", "--reason", "back"]);
    assert_says(&said, &["no rank is to leave", "0.5"]);
    let (status, problem) = control
        .put("/api/v1/groups/g/constraints", &json!({ "constraints": { "draining": [0, 1, 2] } }))
        .unwrap();
    assert_eq!(status, 400);
    let expected = "draining is every rank, expected a rank that is left";
    assert_says(problem["title"].as_str().unwrap(), &[expected]);
    let wrong = ["constraints", "--must", "5-2", "--reason", "x"];
    let refused = run_as(&control, Some(control.token()), &wrong);
    assert_eq!(refused.status.code(), Some(64));
}

#[test]
fn what_would_be_without_a_rank_is_said() {
    let control = Control::start_patient().unwrap();
    let _workers = roomy(&control);
    let whatif = |lost: &str| control.get(&format!("/api/v1/groups/g/whatif?lost={lost}")).unwrap();
    let (_, placements) = control.get("/api/v1/groups/g/placements").unwrap();
    let slots = placements[1]["in_force"]["phy2log"].as_array().unwrap().clone();
    let (status, loss) = whatif("2");
    assert_eq!((status, &loss["lost"]), (200, &json!([2])), "{loss}");
    let gone: Vec<Value> =
        (0..8).map(|expert| json!(expert)).filter(|expert| !slots[..8].contains(expert)).collect();
    assert!(!gone.is_empty(), "{slots:?}");
    let layer = &loss["layers"][1];
    assert_eq!((&layer["gone"], &layer["room"]), (&json!(gone), &json!(true)));
    assert!(layer["max_over_mean"].as_f64() >= Some(1.0), "{layer}");
    assert_eq!(loss["layers"][0]["max_over_mean"], Value::Null, "no rows there");
    // 64 x 64, three matrices, NVFP4.
    let expert = 3 * 64 * 64 * 9 / 16;
    assert_eq!(loss["bytes"].as_u64().unwrap(), loss["gone"].as_u64().unwrap() * expert);
    assert_eq!(whatif("1,2").1["room"], false);
    for wrong in ["3", "x", "", "1,,2"] {
        let (status, problem) = whatif(wrong);
        assert_eq!(status, 400, "{wrong}");
        assert_says(problem["title"].as_str().unwrap(), &["expected ranks, 0 to 2"]);
    }
    assert_says(&run(&control, &["whatif", "--lost", "1,2"]), &["EXPERTS GONE", "false"]);
}
