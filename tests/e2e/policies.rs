//! Versions of policies: uploaded, tried, activated, rolled back; and what becomes of one that fails.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::fake_worker::FakeWorker;
use tests::worker_process::until;

use crate::command::{rows, run, run_as};
use crate::proposals::{group, has_policies, tell_again};
use crate::{assert_says, data};

const POLICIES: &str = "/api/v1/policies";

/// Uploads a file of `tests/data`; the status and the answer.
fn upload(control: &Control, file: &str) -> (u16, Value) {
    let component = fs::read(data(file)).unwrap();
    let path = format!("{POLICIES}?reason=a%20test");
    control.upload(&path, &component).unwrap()
}

fn digest(uploaded: &(u16, Value)) -> String {
    assert!(uploaded.0 < 300, "{}", uploaded.1);
    uploaded.1["digest"].as_str().unwrap().to_owned()
}

fn decide(control: &Control, policy: &str, verb: &str) -> (u16, Value) {
    control.post(&format!("{POLICIES}/{policy}/{verb}"), &json!({})).unwrap()
}

/// Asks by this name; the status and the proposal.
fn propose(control: &Control, policy: &str) -> (u16, Value) {
    control.post("/api/v1/groups/g/proposals", &json!({ "ask": { "policy": policy } })).unwrap()
}

fn balance_by(control: &Control, policy: &str) {
    let body = json!({ "balancing": { "ask": { "policy": policy } } });
    assert_eq!(control.put("/api/v1/groups/g/balancing", &body).unwrap().0, 200);
}

const HARMLESS: &str = "policy-registry/harmless.wasm";
const TRAPS: &str = "policy-registry/traps_live.wasm";
/// SHA-256 of `policy-v0.1/routing.wasm`.
const REFUSED: &str = "f2b9df2a13a7d768c978265eac9b02d4f7cfebc73c71d0a40aadc0f8fc573ec3";
/// `deepseek_eplb` as it was once.
const FROZEN: &str = "policy-v0.1/placement.wasm";

fn start() -> Option<(Control, Vec<FakeWorker>)> {
    has_policies().then(|| {
        let control = Control::start_patient().unwrap();
        let workers = group(&control);
        (control, workers)
    })
}

#[test]
fn a_version_is_asked_by_name_once_it_is_activated_and_back_after_a_rollback() {
    let Some((mut control, _workers)) = start() else { return };
    let shipped = propose(&control, "deepseek-eplb").1["policy_digest"].clone();
    let uploaded = upload(&control, FROZEN);
    let (status, view) = &uploaded;
    assert_eq!(
        (status, &view["name"], &view["new"]),
        (&201, &json!("deepseek_eplb"), &json!(true))
    );
    // It was tried on the group.
    let tried = &view["tried"][0];
    assert_eq!((&tried["group"], &tried["uses"]), (&json!("g"), &json!(false)));
    assert!(tried["layers"].as_u64() > Some(0) && tried["fuel"].as_u64() > Some(0), "{tried}");
    let digest = digest(&uploaded);
    assert_eq!(upload(&control, FROZEN).0, 200, "the same again");
    let by = |control: &Control, policy: &str| propose(control, policy).1["policy_digest"].clone();
    assert_eq!(by(&control, "deepseek_eplb"), shipped, "before it is activated");
    assert_eq!(by(&control, &digest), json!(digest), "by its digest");
    let (status, policy) = decide(&control, &digest, "activate");
    assert_eq!((status, &policy["active"]), (200, &json!(digest)));
    assert_eq!(by(&control, "deepseek-eplb"), json!(digest));
    // Also after a restart.
    control.signal(Signal::KILL).unwrap();
    control.wait().unwrap();
    control.restart(&[]).unwrap();
    assert_eq!(
        control.get(&format!("{POLICIES}/deepseek-eplb")).unwrap().1["active"],
        json!(digest)
    );
    let (status, policy) = decide(&control, "deepseek-eplb", "rollback");
    assert_eq!((status, &policy["active"]), (200, &shipped));
    let (status, problem) = decide(&control, "deepseek_eplb", "rollback");
    assert_eq!(status, 409);
    assert_says(problem["title"].as_str().unwrap(), &["nothing was activated"]);
}

#[test]
fn what_is_no_policy_is_refused_with_the_reason() {
    let control = Control::start_patient().unwrap();
    let path = format!("{POLICIES}?reason=a%20test");
    let (status, problem) = control.upload(&path, b"not wasm").unwrap();
    assert_eq!((status, &problem["code"]), (422, &json!("policy")), "{problem}");
    assert_says(problem["title"].as_str().unwrap(), &["this is no component"]);
    // A reason is needed, and only operators may.
    assert_eq!(control.upload(POLICIES, b"not wasm").unwrap().0, 400);
    assert_eq!(control.send("POST", &path, None, None).unwrap().0, 401);
    let (status, problem) = control.get(&format!("{POLICIES}/nobody")).unwrap();
    assert_eq!(status, 404);
    assert_says(problem["title"].as_str().unwrap(), &["there is no policy nobody"]);
    let (status, problem) = decide(&control, "greedy_swap", "activate");
    assert_eq!(status, 400);
    assert_says(problem["title"].as_str().unwrap(), &["expected the digest of a version"]);
    assert_eq!(decide(&control, &"0".repeat(64), "activate").0, 404);
    let (_, log) = control.get("/api/v1/audit").unwrap();
    let mut actions = log["items"].as_array().unwrap().iter().map(|entry| &entry["action"]);
    assert!(actions.all(|action| action == "token.make"), "{log}");
}

/// A version that is right in examples and traps at live load.
#[test]
fn a_policy_that_fails_is_not_activated_where_it_is_used_and_its_verdicts_are_kept() {
    let Some((control, _workers)) = start() else { return };
    let harmless = digest(&upload(&control, HARMLESS));
    let (status, problem) = propose(&control, "hostile");
    assert_eq!(status, 404, "not activated: {problem}");
    assert_eq!(decide(&control, &harmless, "activate").0, 200);
    balance_by(&control, "hostile");
    let traps = upload(&control, TRAPS);
    assert_says(
        traps.1["tried"][0]["problem"].as_str().unwrap(),
        &["trapped: wasm trap: wasm `unreachable`"],
    );
    let traps = digest(&traps);
    let (status, problem) = decide(&control, &traps, "activate");
    assert_eq!(status, 409, "{problem}");
    assert_says(problem["title"].as_str().unwrap(), &["the group g is balanced by it: trapped"]);
    // One that decides something else, under the same name, is no version.
    let (status, problem) = upload(&control, "policy-v0.1/routing.wasm");
    assert_eq!(status, 409, "{problem}");
    assert_says(problem["title"].as_str().unwrap(), &["it decides routing"]);
    let (status, problem) = propose(&control, REFUSED);
    assert_eq!(status, 404, "{problem}");
    // The good one stands, and the other may still be asked by its digest.
    assert_eq!(propose(&control, "hostile").1["policy_digest"], json!(harmless));
    let before = control.get("/api/v1/groups/g/placements").unwrap().1;
    let (status, problem) = propose(&control, &traps);
    assert_eq!((status, &problem["code"]), (422, &json!("policy")));
    assert_eq!(control.get("/api/v1/groups/g/placements").unwrap().1, before);
    let (_, policy) = control.get(&format!("{POLICIES}/{traps}")).unwrap();
    assert_eq!((&policy["name"], &policy["active"]), (&json!("hostile"), &json!(harmless)));
    let verdicts = policy["verdicts"].as_array().unwrap();
    assert_eq!(verdicts.len(), 3, "at upload, activation and question: {policy}");
    for verdict in verdicts {
        assert_eq!((&verdict["digest"], &verdict["group"]), (&json!(traps), &json!("g")));
        assert_eq!(verdict["verdict"]["verdict"], "trap");
    }
    // Where nobody uses it, it may be activated.
    balance_by(&control, "greedy_swap");
    assert_eq!(decide(&control, &traps, "activate").0, 200);
    let (_, log) = control.get("/api/v1/audit").unwrap();
    let entry = &log["items"][0];
    assert_eq!(
        (&entry["action"], &entry["target"]),
        (&json!("policy.activate"), &json!("hostile"))
    );
    assert_eq!(
        (&entry["before"]["digest"], &entry["after"]["digest"]),
        (&json!(harmless), &json!(traps))
    );
}

#[test]
fn the_command_uploads_lists_and_activates() {
    let Some((control, _workers)) = start() else { return };
    let file = data(FROZEN).display().to_string();
    let said = run(&control, &["policy", "upload", &file, "--reason", "the one of 2026"]);
    assert_says(&said, &["deepseek_eplb", "GROUP", "g", "false"]);
    let digest = said.lines().nth(1).unwrap();
    let said = run(&control, &["policy", "activate", &digest[..8], "--reason", "tried enough"]);
    assert_eq!(rows(&said)[0][..4], ["deepseek_eplb", "placement", "0.1.0", "true"]);
    assert_says(&said, &["nothing went wrong"]);
    let listed = run(&control, &["policy", "list"]);
    let active: Vec<&str> =
        rows(&listed).iter().filter(|row| row[0] == "deepseek_eplb").map(|row| row[3]).collect();
    assert_eq!(active, ["true", "false"]);
    let said = run(&control, &["policy", "rollback", "deepseek-eplb", "--reason", "worse"]);
    assert_eq!(rows(&said)[0][3], "false");
    let refused = run_as(&control, Some(control.token()), &["policy", "show", "nobody"]);
    assert_eq!(refused.status.code(), Some(2));
    // What was uploaded comes back to the byte.
    let folder = tempfile::tempdir().unwrap();
    let back = folder.path().join("back.wasm");
    run(&control, &["policy", "download", &digest[..8], "--out", back.to_str().unwrap()]);
    assert!(fs::read(back).unwrap() == fs::read(file).unwrap());
}

/// Load moves from one half of the experts to the other in each window: who plans by the last one alone is wrong in the next.
#[test]
fn shadows_are_scored_by_the_window_that_comes_next() {
    let Some((control, mut workers)) = start() else { return };
    let shadows = "/api/v1/groups/g/shadows";
    let traps = digest(&upload(&control, TRAPS));
    let entrants = json!([{ "policy": "deepseek_eplb" }, { "policy": traps }]);
    let body = json!({ "shadows": { "policies": entrants } });
    let (status, view) = control.put(shadows, &body).unwrap();
    assert_eq!((status, &view["league"]), (200, &json!([])), "{view}");
    let before = control.get("/api/v1/groups/g/placements").unwrap().1;
    // The same load as in the window before: what was planned for that is right.
    let mut end_ms = 60_000;
    let league = until("a league of three windows", || {
        end_ms += 60_000;
        tell_again(&control, &mut workers[0], end_ms);
        let (_, view) = control.get(shadows)?;
        let league = view["league"].clone();
        let enough = league.as_array().is_some_and(|rows| {
            rows.len() == 3
                && rows.iter().all(|row| {
                    row["windows"].as_u64() >= Some(2) || row["failed"].as_u64() >= Some(2)
                })
        });
        Ok(enough.then_some(league))
    })
    .unwrap();
    let row = |policy: &str| {
        let mut rows = league.as_array().unwrap().iter();
        rows.find(|row| row["policy"] == policy).unwrap().clone()
    };
    // 3000 rows of each expert of rank 0 and 1000 of rank 1's: 1.5 as it is; even, if two change places.
    for policy in ["deepseek_eplb", "greedy_swap"] {
        let row = row(policy);
        assert_eq!((&row["max_over_mean"], &row["in_force"]), (&json!(1.0), &json!(1.5)), "{row}");
        assert!(row["moved"].as_f64() > Some(0.0) && row["failed"] == json!(0), "{row}");
    }
    let failed = row(&traps);
    assert_eq!((&failed["windows"], &failed["max_over_mean"]), (&json!(0), &Value::Null));
    assert_says(failed["problem"].as_str().unwrap(), &["trapped"]);
    assert_eq!(league[2]["policy"], json!(traps), "who has no score is last: {league}");
    // Nothing was carried out.
    assert_eq!(control.get("/api/v1/groups/g/placements").unwrap().1, before);
    let said = run(&control, &["policy", "league"]);
    assert_says(&said, &["deepseek_eplb", "1.500", "trapped"]);
    let stop = ["policy", "shadow", &traps[..8], "--stop", "--reason", "it traps"];
    assert!(!run(&control, &stop).split("WINDOWS").next().unwrap().contains(&traps));
}

#[test]
fn who_cannot_be_asked_is_no_shadow() {
    let Some((control, _workers)) = start() else { return };
    let put = |policies: Value| {
        let body = json!({ "shadows": { "policies": policies } });
        let (status, problem) = control.put("/api/v1/groups/g/shadows", &body).unwrap();
        (status, problem["title"].as_str().unwrap_or_default().to_owned())
    };
    let unlike = json!([{ "policy": "greedy_swap", "settings": { "nonsense": 1 } }]);
    for (policies, status, says) in [
        (json!([{ "policy": "nobody" }]), 404, "there is no policy nobody"),
        (json!([{ "policy": "locality_split" }]), 400, "expected a placement policy"),
        (unlike, 422, "the settings are refused"),
        (
            json!([{ "policy": "greedy_swap" }, { "policy": "greedy_swap" }]),
            400,
            "greedy_swap twice",
        ),
    ] {
        let (got, title) = put(policies);
        assert_eq!(got, status, "{title}");
        assert_says(&title, &[says]);
    }
}
