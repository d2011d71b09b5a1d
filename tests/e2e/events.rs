//! Events of the control plane, and requests that come twice.

use std::time::UNIX_EPOCH;

use protocol::message::Phase;
use protocol::session::Window;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, layer_window, register};
use tests::watcher::{Told, Watcher};

use crate::assert_says;

const TOKENS: &str = "/api/v1/tokens";

/// Makes a token of this name.
fn make(control: &Control, name: &str) {
    let wanted = json!({"name": name, "role": "viewer"});
    assert_eq!(control.post(TOKENS, &wanted).unwrap().0, 201);
}

/// The next events, up to one that satisfies `last`.
#[track_caller]
fn until(watcher: &mut Watcher, last: impl Fn(&str, &Value) -> bool) -> Vec<(i64, String, Value)> {
    let mut events = Vec::new();
    loop {
        let event = watcher.event().unwrap();
        events.push(event.clone());
        if last(&event.1, &event.2[&event.1]) {
            return events;
        }
    }
}

#[test]
fn whoever_comes_back_misses_nothing_and_gets_nothing_twice() {
    let mut control = Control::start().unwrap();
    let mut watcher = Watcher::open(&control, None).unwrap();
    make(&control, "one");
    let first = watcher.event().unwrap();
    assert_eq!((&first.1[..], &first.2["audit"]["target"]), ("audit", &json!("one")));
    drop(watcher);
    make(&control, "two");
    make(&control, "three");
    // Also over a restart.
    control.signal(Signal::TERM).unwrap();
    control.wait().unwrap();
    control.restart(&[]).unwrap();
    make(&control, "four");
    let mut watcher = Watcher::open(&control, Some(first.0)).unwrap();
    let missed = until(&mut watcher, |_, data| data["target"] == "four");
    let targets: Vec<&Value> = missed.iter().map(|event| &event.2["audit"]["target"]).collect();
    assert_eq!(targets, ["two", "three", "four"]);
    let ids: Vec<i64> = missed.iter().map(|event| event.0 - first.0).collect();
    assert_eq!(ids, [1, 2, 3]);
    // A number that no event has had.
    let error = Watcher::open(&control, Some(1 << 40)).unwrap_err().to_string();
    assert_says(&error, &["400 Bad Request"]);
    // A quiet stream ends with control, and does not hold it up.
    control.signal(Signal::TERM).unwrap();
    assert!(control.wait().unwrap().success());
    watcher.event().unwrap_err();
}

#[test]
fn workers_placements_and_windows_are_told_of() {
    let control = Control::start_patient().unwrap();
    let mut watcher = Watcher::open(&control, None).unwrap();
    let registered = register(("g", 0, 1), 2, 8);
    let (mut worker, _) = FakeWorker::dial(&control, registered.clone()).unwrap();
    worker.hold_in_order(&registered).unwrap();
    let layers = vec![layer_window(0, Phase::Decode, vec![1; 8])];
    let end_ms = u64::try_from(UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
    let (start_ms, closed_by) = (end_ms - 10, Some(end_ms));
    worker.tell(Window { number: 1, start_ms, end_ms, closed_by, layers }).unwrap();
    let mut events = until(&mut watcher, |kind, _| kind == "window");
    drop(worker);
    events.extend(until(&mut watcher, |kind, data| kind == "worker" && data["state"] == "lost"));
    let told: Vec<&Value> = events.iter().map(|(_, kind, data)| &data[kind]).collect();
    let worker = |state: &str| json!({"group": "g", "rank": 0, "state": state});
    let placement = json!({"group": "g", "epochs": [0, 0]});
    let window = json!({"group": "g", "end_ms": end_ms});
    assert_eq!(
        told,
        [&worker("loading"), &worker("connected"), &placement, &window, &worker("lost")]
    );
}

/// F40: proxies close connections that are quiet for long.
#[test]
fn a_quiet_stream_says_that_it_lives() {
    let control = Control::start_with(&["--keepalive-ms", "100"]).unwrap();
    let mut watcher = Watcher::open(&control, None).unwrap();
    for _ in 0..3 {
        assert_eq!(watcher.hear().unwrap(), Told::Comment);
    }
    make(&control, "one");
    assert_eq!(watcher.event().unwrap().1, "audit");
    let long = Control::start_with(&["--keepalive-ms", "15001"]).unwrap_err().to_string();
    assert_says(&long, &["keepalive_ms is 15001, expected 100 to 15000"]);
}

#[test]
fn a_request_that_comes_twice_is_done_once() {
    let control = Control::start().unwrap();
    let made = || {
        let (_, all) = control.get(TOKENS).unwrap();
        all["items"].as_array().unwrap().len()
    };
    let revoke = |id: &Value, reason: &str, key: &str| {
        let body = json!({"reason": reason}).to_string();
        control.send_keyed("POST", &format!("{TOKENS}/{id}/revoke"), (key, &body)).unwrap()
    };
    make(&control, "one");
    let (_, all) = control.get(TOKENS).unwrap();
    let id = &all["items"].as_array().unwrap().last().unwrap()["id"];
    let first = revoke(id, "because", "k-1");
    assert_eq!(first.0, 200, "{}", first.1);
    assert_eq!(revoke(id, "because", "k-1"), first, "not a conflict with itself");
    // The key of another request, and one that answers with a secret.
    let (status, text) = revoke(id, "for another reason", "k-1");
    assert_eq!(status, 409);
    assert_says(&text, &["idempotency-key k-1: another request had it"]);
    let before = made();
    let wanted = json!({"name": "two", "role": "viewer", "reason": "r"}).to_string();
    let create = || control.send_keyed("POST", TOKENS, ("k-2", &wanted)).unwrap();
    assert_eq!(create().0, 201);
    let (status, text) = create();
    assert_eq!((status, made()), (409, before + 1));
    assert_says(&text, &["it was answered with a secret, which is not kept"]);
    // What was refused for its input is refused again; bad keys are named.
    let wrong = json!({"name": "", "role": "viewer", "reason": "r"}).to_string();
    let create = |key: &str| control.send_keyed("POST", TOKENS, (key, &wrong)).unwrap();
    let refused = create("k-3");
    assert_eq!((refused.0, create("k-3")), (400, refused.clone()));
    assert_says(&create(&"k".repeat(256)).1, &["expected 1 to 255 visible characters"]);
}
