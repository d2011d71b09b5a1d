//! The control plane with real workers: what it sees, what it remembers, and that nobody waits for it.

use std::fs;
use std::time::{Duration, UNIX_EPOCH};

use protocol::message::Phase;
use protocol::session::{FromControl, Register, SESSION_VERSION, Window};
use reference::compare::Comparison;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::call::through;
use tests::case::Case;
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, layer_window, register};
use tests::group::{Group, Spec, call_all, call_each, random_placement, uneven};
use tests::random::Random;
use tests::worker_process::{Worker, until};

use crate::{BF16, assert_says, data, skewed};

fn group(control: &Control, ranks: u32) -> Group {
    Group::start(&skewed(), &Spec { ranks, placement: None, options: control.options() }).unwrap()
}

fn ready(control: &Control) -> u16 {
    control.get("/readyz").unwrap().0
}

/// Waits until `/readyz` answers with `status`.
#[track_caller]
fn until_ready_is(control: &Control, status: u16) {
    until("another /readyz", || Ok((ready(control) == status).then_some(()))).unwrap();
}

/// Waits until so many workers are connected.
#[track_caller]
fn until_connected(control: &Control, count: usize) -> Vec<Value> {
    until("connected workers", || {
        let (_, page) = control.get("/api/v1/workers")?;
        let workers = page["items"].as_array().cloned().unwrap_or_default();
        let connected = workers.iter().filter(|worker| worker["state"] == "connected").count();
        Ok((connected == count).then_some(workers))
    })
    .unwrap()
}

/// Waits until `condition` holds for every worker.
#[track_caller]
fn until_all(control: &Control, condition: impl Fn(&Value) -> bool) {
    until("all workers to be so", || {
        let (_, page) = control.get("/api/v1/workers")?;
        Ok(page["items"].as_array().is_some_and(|all| all.iter().all(&condition)).then_some(()))
    })
    .unwrap();
}

/// Sums over a list of windows: calls, tokens, and the rows of each expert.
fn sums(windows: &Value) -> (u64, u64, Vec<u64>) {
    let windows = windows["items"].as_array().unwrap();
    let sum = |key: &str| windows.iter().filter_map(|window| window[key].as_u64()).sum();
    let mut counts: Vec<u64> = Vec::new();
    for window in windows {
        let of_window: Vec<u64> = serde_json::from_value(window["expert_tokens"].clone()).unwrap();
        counts.resize(of_window.len(), 0);
        counts.iter_mut().zip(of_window).for_each(|(sum, count)| *sum += count);
    }
    (sum("calls"), sum("tokens"), counts)
}

/// Tokens and rows of each expert in a group's windows, once they have so many calls.
#[track_caller]
fn until_counted(control: &Control, group: &str, calls: u64) -> (u64, Vec<u64>) {
    until("windows of load", || {
        let (_, windows) = control.get(&format!("/api/v1/groups/{group}/windows"))?;
        let (counted, tokens, counts) = sums(&windows);
        Ok((counted == calls).then_some((tokens, counts)))
    })
    .unwrap()
}

/// Closes the open windows of all ranks of the group `g`; their end.
#[track_caller]
fn close(control: &Control, ranks: u32) -> u64 {
    let (status, closed) = control.post("/api/v1/groups/g/windows", &json!({})).unwrap();
    assert_eq!(status, 200, "{closed}");
    assert_eq!(closed["ranks"], json!((0..ranks).collect::<Vec<_>>()), "{closed}");
    assert_eq!(closed["missing"], json!([]));
    closed["end_ms"].as_u64().unwrap()
}

/// Rows with an expert, and the rows of each expert.
fn load_of(ids: &[i32], top_k: usize, experts: usize) -> (u64, Vec<u64>) {
    let mut counts = vec![0; experts];
    for &id in ids.iter().filter(|id| **id >= 0) {
        counts[usize::try_from(id).unwrap()] += 1;
    }
    let live = ids.chunks(top_k).filter(|row| row.iter().any(|id| *id >= 0)).count();
    (live as u64, counts)
}

#[test]
fn workers_are_seen_with_what_they_are() {
    let control = Control::start().unwrap();
    assert_eq!(control.get("/healthz").unwrap().0, 200);
    let group = group(&control, 3);
    let workers = until_connected(&control, 3);
    for (rank, worker) in workers.iter().enumerate() {
        assert_eq!((&worker["group"], worker["rank"].as_u64()), (&"g".into(), Some(rank as u64)));
        assert_eq!(worker["pid"].as_u64(), Some(group.workers[rank].pid().into()));
        assert_eq!(worker["model"], "skewed_e16_k4_h256_i64_t300");
        assert_eq!(worker["act"], json!(["bf16", "nvfp4"]));
        assert_eq!((&worker["ranks"], &worker["slots_per_rank"]), (&3.into(), &6.into()));
        assert_says(worker["device"].as_str().unwrap(), &["cpu, "]);
    }
    let (_, groups) = control.get("/api/v1/groups").unwrap();
    assert_eq!(groups[0]["missing"], json!([]));
    // Calls and engines show with a heartbeat.
    let mut engines = group.engines(BF16, 4).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs.rows(0..4);
    call_all(&mut engines, 0, &inputs, &uneven(4, 3)).unwrap();
    until_all(&control, |worker| worker["engine"] == "attached" && worker["calls"] == 1);
    // Page by page.
    let (_, first) = control.get("/api/v1/workers?limit=2").unwrap();
    assert_eq!((first["items"].as_array().unwrap().len(), &first["next"]), (2, &"g:1".into()));
    let (_, second) = control.get("/api/v1/workers?limit=2&cursor=g:1").unwrap();
    assert_eq!((&second["items"][0]["rank"], &second["next"]), (&2.into(), &Value::Null));
}

#[test]
fn layers_that_are_not_served_are_shown_with_the_reason() {
    let control = Control::start().unwrap();
    let options = control.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let _worker = Worker::start(&data("field/pass/layer_left_bf16"), &options).unwrap();
    until_connected(&control, 1);
    let (status, layers) = control.get("/api/v1/groups/layer_left_bf16/layers").unwrap();
    assert_eq!(
        (status, &layers[0]["served"], &layers[1]["served"]),
        (200, &true.into(), &false.into())
    );
    assert_eq!(layers[0]["shape"]["experts"], 4);
    assert_says(layers[1]["reason"].as_str().unwrap(), &["its experts are BF16, not NVFP4"]);
}

/// D30: readiness goes down when a rank dies, names it, and comes back by itself.
#[test]
fn a_lost_rank_is_named_until_it_is_back() {
    let control = Control::start().unwrap();
    let mut group = group(&control, 2);
    until_connected(&control, 2);
    assert_eq!(ready(&control), 200);
    group.workers[1].signal(Signal::KILL).unwrap();
    group.workers[1].wait().unwrap();
    until_ready_is(&control, 503);
    let (_, problem) = control.get("/readyz").unwrap();
    assert_says(problem["title"].as_str().unwrap(), &["group g lacks ranks [1]"]);
    let (_, lost) = control.get("/api/v1/workers/g/1").unwrap();
    assert_eq!(lost["state"], "lost");
    // Control itself is well.
    assert_eq!(control.get("/healthz").unwrap().0, 200);
    group.restart(1).unwrap();
    until_ready_is(&control, 200);
}

/// A worker that is stopped has a connection and says nothing.
#[test]
fn a_rank_that_goes_silent_is_lost_too() {
    let control = Control::start().unwrap();
    let group = group(&control, 2);
    until_connected(&control, 2);
    group.workers[0].signal(Signal::STOP).unwrap();
    until_ready_is(&control, 503);
    group.workers[0].signal(Signal::CONT).unwrap();
    until_ready_is(&control, 200);
}

#[test]
fn calls_go_on_without_control_which_comes_back_with_all_it_knew() {
    let mut control = Control::start().unwrap();
    let group = group(&control, 2);
    let before = until_connected(&control, 2);
    control.signal(Signal::KILL).unwrap();
    control.wait().unwrap();
    let case = Case::open(&skewed()).unwrap();
    let mut engines = group.engines(BF16, 300).unwrap();
    let output = call_all(&mut engines, 0, &case.inputs, &uneven(300, 2)).unwrap();
    let comparison = Comparison::new(&output, &case.expected(BF16).unwrap());
    assert!(comparison.passes(BF16), "{comparison}");
    control.restart(&[]).unwrap();
    // Known at once, before anybody has dialled.
    let (_, known) = control.get("/api/v1/workers").unwrap();
    let first_seen = |worker: &Value| worker["first_seen_ms"].as_u64().unwrap();
    let known: Vec<u64> = known["items"].as_array().unwrap().iter().map(first_seen).collect();
    assert_eq!(known, before.iter().map(first_seen).collect::<Vec<_>>());
    // With the first heartbeat, the calls that were made meanwhile.
    until_all(&control, |worker| worker["state"] == "connected" && worker["calls"] == 1);
    // And the load of those calls, which the workers had kept.
    let (tokens, counts) = until_counted(&control, "g", 2);
    assert_eq!((tokens, counts), load_of(&case.inputs.ids, 4, 16));
    // And an orderly end: nobody holds it up.
    control.signal(Signal::TERM).unwrap();
    assert!(control.wait().unwrap().success(), "{}", control.log());
    assert!(!control.data().join("address").exists());
}

#[test]
fn a_worker_with_another_credential_or_model_is_refused_and_serves_on() {
    let control = Control::start().unwrap();
    let mut options = control.options();
    let other = control.data().join("other");
    fs::write(&other, "of nobody").unwrap();
    options[3] = other.display().to_string();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let worker = Worker::start(&skewed(), &options).unwrap();
    until("a refusal in the log", || Ok(worker.log().contains("401").then_some(()))).unwrap();
    assert_eq!(control.get("/api/v1/workers").unwrap().1["items"], json!([]));
    let inputs = Case::open(&skewed()).unwrap().inputs.rows(0..4);
    let mut engine = worker.engine(BF16, 4).unwrap();
    through(&mut engine, 0, Phase::Decode, &inputs).unwrap();
}

#[test]
fn bad_requests_are_problems_that_name_the_value() {
    let control = Control::start().unwrap();
    for (path, status, code, title) in [
        ("/api/v1/workers/g/7", 404, "not_found", "there is no worker g/7"),
        ("/api/v1/workers/g/x", 400, "path", "x"),
        ("/api/v1/workers?limit=0", 400, "value", "limit is 0, expected 1 to 500"),
        ("/api/v1/workers?limit=many", 400, "query", "limit"),
        ("/api/v1/workers?cursor=here", 400, "value", "cursor is here, expected `next`"),
        ("/api/v1/groups/none/layers", 404, "not_found", "there is no group none"),
        ("/api/v1/groups/none/windows", 404, "not_found", "there is no group none"),
        ("/nowhere", 404, "not_found", "there is no path /nowhere"),
        ("/api/v1/session", 401, "credential", "credential"),
    ] {
        let (got, problem) = control.get(path).unwrap();
        assert_eq!((got, &problem["code"]), (status, &code.into()), "{path} {problem}");
        assert_says(problem["title"].as_str().unwrap(), &[title]);
    }
}

/// C22: a window has each live assignment once, on any number of ranks, with redundant slots, whoever
/// is masked.
#[test]
fn windows_count_each_live_assignment_once() {
    let expected = fs::read(data("field/eplb/load_counters/expected_counts.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let control = Control::start().unwrap();
    let mut random = Random::new(22);
    for name in ["holes_e8_k4_h128_i64", "masked_e8_k2_h256_i128", "e7_k2_h256_i512"] {
        let case = Case::open(&data("moe-golden").join(name)).unwrap();
        let counts: Vec<u64> =
            serde_json::from_value(expected[name]["logical_count"].clone()).unwrap();
        for ranks in [1, 2, 4] {
            let slots = counts.len().div_ceil(ranks) + 1;
            let placement = Some(vec![random_placement(counts.len(), ranks, slots, &mut random)]);
            let ranks = u32::try_from(ranks).unwrap();
            let spec = Spec { ranks, placement, options: control.options() };
            let group = Group::start(&case.dir, &spec).unwrap();
            until_connected(&control, ranks as usize);
            let after_ms = close(&control, ranks);
            let tokens = case.inputs.tokens();
            let mut engines = group.engines(BF16, tokens).unwrap();
            call_all(&mut engines, 0, &case.inputs, &uneven(tokens, ranks as usize)).unwrap();
            let end_ms = close(&control, ranks);
            let path = format!("/api/v1/groups/g/windows?after_ms={after_ms}&until_ms={end_ms}");
            let (_, windows) = control.get(&path).unwrap();
            let (tokens, of_case) = load_of(&case.inputs.ids, case.inputs.top_k, counts.len());
            assert_eq!(of_case, counts, "{name}");
            assert_eq!(sums(&windows), (ranks.into(), tokens, counts.clone()), "{name} on {ranks}");
        }
    }
}

#[test]
fn a_worker_that_ends_tells_its_last_window() {
    let control = Control::start().unwrap();
    let mut group = group(&control, 2);
    until_connected(&control, 2);
    let case = Case::open(&skewed()).unwrap();
    let mut engines = group.engines(BF16, 300).unwrap();
    call_all(&mut engines, 0, &case.inputs, &uneven(300, 2)).unwrap();
    for worker in &mut group.workers {
        worker.signal(Signal::TERM).unwrap();
        worker.wait().unwrap();
    }
    assert_eq!(until_counted(&control, "g", 2), load_of(&case.inputs.ids, 4, 16));
}

/// A worker of the version before is let in, and told nothing that it does not know.
#[test]
fn ranks_that_cannot_close_a_window_are_named_and_the_others_do() {
    let control = Control::start_patient().unwrap();
    let (_old, version) =
        FakeWorker::dial(&control, Register { version: 1, ..register(("g", 0, 3), 2, 8) }).unwrap();
    assert_eq!(version, 1);
    let (mut new, version) = FakeWorker::dial(&control, register(("g", 2, 3), 2, 8)).unwrap();
    assert_eq!(version, SESSION_VERSION);
    let closed = std::thread::scope(|scope| {
        let closing = scope.spawn(|| control.post("/api/v1/groups/g/windows", &json!({})).unwrap());
        let FromControl::Close { mark_ms } = new.hear().unwrap() else { panic!("no close") };
        let layers = vec![layer_window(1, Phase::Decode, vec![5; 8])];
        let (number, start_ms, end_ms) = (1, mark_ms - 50, mark_ms + 1);
        new.tell(Window { number, start_ms, end_ms, closed_by: Some(mark_ms), layers }).unwrap();
        closing.join().unwrap()
    });
    assert_eq!((&closed.1["ranks"], &closed.1["missing"]), (&json!([2]), &json!([0, 1])));
    let path = format!("/api/v1/groups/g/windows?until_ms={}", closed.1["end_ms"]);
    let (_, windows) = control.get(&path).unwrap();
    assert_eq!(sums(&windows), (1, 10, vec![5; 8]));
    assert_eq!(
        (&windows["items"][0]["ranks"], &windows["items"][0]["layer"]),
        (&1.into(), &1.into())
    );
    assert_eq!(control.post("/api/v1/groups/none/windows", &json!({})).unwrap().0, 404);
}

#[test]
fn windows_come_in_parts() {
    let control = Control::start_patient().unwrap();
    let (mut worker, _) = FakeWorker::dial(&control, register(("g", 0, 1), 3, 4)).unwrap();
    for end in 1..=3_u64 {
        let layer = |layer| layer_window(layer, Phase::Prefill, vec![end; 4]);
        let layers = (0..3).map(layer).collect();
        let (number, closed_by) = (1, Some(end * 1_000));
        let window = Window { number, start_ms: 0, end_ms: end * 1_000, closed_by, layers };
        worker.tell(window).unwrap();
    }
    let (mut cursor, mut seen) = (String::new(), Vec::new());
    for part in 0..5 {
        let path = format!("/api/v1/groups/g/windows?after_ms=1000&limit=4{cursor}");
        let (_, page) = control.get(&path).unwrap();
        let items = page["items"].as_array().unwrap();
        seen.extend(items.iter().map(|item| (item["end_ms"].clone(), item["layer"].clone())));
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => {
                assert_eq!(part, 1);
                break;
            }
        }
    }
    let expected: Vec<_> = [2_000, 3_000]
        .into_iter()
        .flat_map(|end| (0..3).map(move |l| (json!(end), json!(l))))
        .collect();
    assert_eq!(seen, expected);
    let (_, hours) = control.get("/api/v1/groups/g/windows?span=hour").unwrap();
    assert_eq!(hours["items"], json!([]));
    let (_, other) = control.get("/api/v1/groups/g/windows?model=other").unwrap();
    assert_eq!(other["items"], json!([]));
}

/// C24: balancedness is of the ranks of a layer, and only then of layers: over layers instead of ranks
/// this load would be even.
#[test]
fn balancedness_is_over_ranks_then_over_layers_that_had_traffic() {
    let made = fs::read(data("field/eplb/balancedness/windows.json")).unwrap();
    let made: Value = serde_json::from_slice(&made).unwrap();
    let counts: Vec<Vec<u64>> =
        serde_json::from_value(made["windows"][0]["logical_count"].clone()).unwrap();
    let control = Control::start_patient().unwrap();
    let registered = |rank| register(("g", rank, 4), 5, 8);
    let mut ranks: Vec<FakeWorker> = (0..4)
        .map(|rank| {
            let (mut worker, _) = FakeWorker::dial(&control, registered(rank)).unwrap();
            worker.hold_in_order(&registered(rank)).unwrap();
            worker
        })
        .collect();
    let end_ms = u64::try_from(UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
    for (layer, counts) in (0..).zip(&counts).filter(|(_, counts)| counts.iter().any(|&n| n > 0)) {
        // A part of it from each rank: two ranks tell one half, as prefill and decode.
        for (worker, phase) in ranks.iter_mut().zip([Phase::Prefill, Phase::Decode]) {
            let half = counts.iter().map(|count| count / 2).collect();
            let layers = vec![layer_window(layer, phase, half)];
            let (number, start_ms, closed_by) = (1, end_ms - 10, Some(end_ms));
            worker.tell(Window { number, start_ms, end_ms, closed_by, layers }).unwrap();
        }
    }
    let metrics = until("a window that is settled", || {
        let text = control.text("/metrics")?;
        Ok(text.contains("eplb_balancedness_min{").then_some(text))
    })
    .unwrap();
    for line in [
        "eplb_balancedness_min{group=\"g\"} 0.5",
        "eplb_balancedness_p50{group=\"g\"} 0.5",
        "eplb_balancedness_p90{group=\"g\"} 0.5",
        "eplb_balancedness_avg{group=\"g\"} 0.5",
        "moeplane_workers{group=\"g\",state=\"connected\"} 4",
        "moeplane_missing_ranks{group=\"g\"} 0",
        "moeplane_window_tokens{group=\"g\",phase=\"decode\"} 150",
        "moeplane_call_seconds{group=\"g\",phase=\"prefill\",quantile=\"0.99\"} 0.000099",
    ] {
        assert!(metrics.lines().any(|got| got == line), "no {line} in {metrics}");
    }
    let (_, balance) = control.get("/api/v1/groups/g/balancedness").unwrap();
    let half = json!({"min": 0.5, "p50": 0.5, "p90": 0.5, "avg": 0.5});
    assert_eq!(balance["balancedness"], half);
    let ratios: Vec<&Value> =
        balance["layers"].as_array().unwrap().iter().map(|layer| &layer["max_over_mean"]).collect();
    assert_eq!(ratios, [&json!(2.0), &json!(2.0), &json!(2.0), &json!(2.0), &Value::Null]);
    assert_eq!(balance["layers"][0]["rank_assignments"], json!([600.0, 200.0, 200.0, 200.0]));
    // One phase, an interval, and one without anything.
    let path = format!("/api/v1/groups/g/balancedness?phase=decode&after_ms={}", end_ms - 1);
    let (_, decode) = control.get(&path).unwrap();
    assert_eq!(
        (&decode["balancedness"], &decode["layers"][1]["assignments"]),
        (&half, &json!(600))
    );
    let (_, none) = control.get("/api/v1/groups/g/balancedness?until_ms=1000").unwrap();
    assert_eq!((&none["balancedness"], &none["worst_layer"]), (&Value::Null, &Value::Null));
    // Without one of the ranks nothing is in force.
    drop(ranks.pop());
    until("a rank less", || {
        let (_, balance) = control.get("/api/v1/groups/g/balancedness")?;
        Ok(balance["balancedness"].is_null().then_some(()))
    })
    .unwrap();
}

#[test]
fn refused_calls_are_counted_by_code() {
    let control = Control::start().unwrap();
    let group = group(&control, 2);
    let mut inputs = Case::open(&skewed()).unwrap().inputs.rows(0..4);
    inputs.ids[1] = 16;
    let mut engines = group.engines(BF16, 4).unwrap();
    let answers = call_each(&mut engines, 0, &inputs, &[0..4, 0..0]);
    assert!(answers[0].is_err() && answers[1].is_ok());
    until_all(&control, |worker| {
        let refused = u64::from(worker["rank"] == 0);
        worker["refused"] == refused && worker["calls"] == 1 - refused
    });
    let (_, worker) = control.get("/api/v1/workers/g/0").unwrap();
    assert_eq!(worker["refusals"], json!({"expert_id": 1}));
    let metrics = control.text("/metrics").unwrap();
    let line = "moeplane_refusals_total{group=\"g\",rank=\"0\",code=\"expert_id\"} 1";
    assert!(metrics.lines().any(|got| got == line), "{metrics}");
    assert!(metrics.contains("moeplane_calls_total{group=\"g\",rank=\"1\"} 1"), "{metrics}");
}

/// Windows are counted once each, whenever control is killed: also between storing one and saying so.
#[test]
fn no_window_is_lost_or_counted_twice_when_control_is_killed() {
    let mut control = Control::start().unwrap();
    let group = group(&control, 2);
    until_connected(&control, 2);
    let case = Case::open(&skewed()).unwrap();
    let mut engines = group.engines(BF16, 300).unwrap();
    let mut random = Random::new(9);
    let mut calls = 0;
    let mut call = |count: usize, calls: &mut u64| {
        for _ in 0..count {
            call_all(&mut engines, 0, &case.inputs, &uneven(300, 2)).unwrap();
            *calls += 1;
        }
    };
    for _ in 0..6 {
        // Windows end every 300 ms: the kill comes at any moment of one.
        for _ in 0..random.below(5) + 1 {
            call(2, &mut calls);
            std::thread::sleep(Duration::from_millis(random.below(120) as u64));
        }
        control.signal(Signal::KILL).unwrap();
        control.wait().unwrap();
        call(1, &mut calls);
        control.restart(&[]).unwrap();
        until_connected(&control, 2);
    }
    close(&control, 2);
    let (tokens, counts) = load_of(&case.inputs.ids, 4, 16);
    let (counted, told) = until_counted(&control, "g", 2 * calls);
    assert_eq!(counted, tokens * calls);
    assert_eq!(told, counts.iter().map(|count| count * calls).collect::<Vec<_>>());
}
