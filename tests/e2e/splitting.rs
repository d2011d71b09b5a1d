//! How tokens are split over replicas: a routing policy says so with a proposal, and ranks do so from a call on, all of them.

use serde_json::{Value, json};
use tests::case::Case;
use tests::control_process::Control;
use tests::group::{Group, Spec, call_all, uneven};
use tests::worker_process::until;

use crate::command::run;
use crate::proposals::has_policies;
use crate::{BF16, assert_says, skewed};

const SPLITTING: &str = "/api/v1/groups/g/splitting";
const LAYER: &str = "/api/v1/groups/g/placements/0";
const ROWS: usize = 300;

#[test]
fn a_split_is_proposed_approved_and_in_force_while_calls_go_on_and_no_bit_changes() {
    if !has_policies() {
        return;
    }
    let control = Control::start().unwrap();
    let mut options = control.options();
    options.extend(["--slots-per-rank".to_owned(), "12".to_owned()]);
    let group = Group::start(&skewed(), &Spec { ranks: 2, placement: None, options }).unwrap();
    let inputs = Case::open(&skewed()).unwrap().inputs;
    let mut engines = group.engines(BF16, ROWS).unwrap();
    let mut step = || call_all(&mut engines, 0, &inputs, &uneven(ROWS, 2)).unwrap();
    let expected = step();
    until("a placement in force", || {
        Ok(control.get(LAYER)?.1["in_force"].is_object().then_some(()))
    })
    .unwrap();
    assert_says(&run(&control, &["splitting"]), &["evenly"]);
    let policy = ["splitting", "--policy", "locality-split", "--reason", "try it"];
    let settings = ["--settings", r#"{"locality":"even"}"#];
    assert_says(&run(&control, &[&policy[..], &settings].concat()), &["locality-split"]);

    // No expert may move: only another split is left.
    let ask = json!({ "ask": { "budget": { "moves_per_layer": 0 } } });
    let mut proposal = Value::Null;
    until("a proposal by the load of a window", || {
        assert!(step() == expected);
        let (status, made) = control.post("/api/v1/groups/g/proposals", &ask)?;
        assert_eq!(status, 200, "{made}");
        proposal = made;
        Ok((proposal["changes"] != json!([])).then_some(()))
    })
    .unwrap();
    let change = &proposal["changes"][0];
    assert_eq!((&change["moved"], &proposal["moved"]), (&json!(0), &json!(0)));
    let ratio = |name: &str| change["max_over_mean"][name].as_f64().unwrap();
    assert!(ratio("after") < ratio("before"), "{change}");
    assert_eq!(proposal["split_by"]["policy"], "locality-split");
    let id = proposal["id"].as_str().unwrap();
    let (status, _) = control.post(&format!("/api/v1/proposals/{id}/approve"), &json!({})).unwrap();
    assert_eq!(status, 200);
    let in_force = |epoch: u64, step: &mut dyn FnMut() -> Vec<u16>| {
        let mut placed = Value::Null;
        until("another split in force", || {
            assert!(step() == expected, "other bits");
            placed = control.get(LAYER)?.1["in_force"].clone();
            Ok((placed["epoch"] == epoch).then_some(()))
        })
        .unwrap();
        assert!(step() == expected, "other bits");
        placed
    };
    let placed = in_force(2, &mut step);
    for name in ["sources", "weights"] {
        assert_eq!(placed["split"][name], change["split"][name], "{name}");
    }
    assert_eq!(placed["phy2log"], change["phy2log"]);
    // What is in force counts: the same split gains nothing any more.
    let (_, again) = control.post("/api/v1/groups/g/proposals", &ask).unwrap();
    assert_eq!(again["changes"], json!([]));
    let back = json!({ "layers": [{ "layer": 0, "epoch": 1 }] });
    assert_eq!(control.post("/api/v1/groups/g/rollback", &back).unwrap().0, 200);
    assert_eq!(in_force(3, &mut step)["split"], Value::Null);
}

#[test]
fn what_cannot_split_tokens_is_refused() {
    if !has_policies() {
        return;
    }
    let control = Control::start_patient().unwrap();
    let _workers = crate::proposals::group(&control);
    let put = |splitting: Value| {
        let (status, said) = control.put(SPLITTING, &json!({ "splitting": splitting })).unwrap();
        (status, said.to_string())
    };
    let (status, said) = put(json!({ "policy": "greedy_swap" }));
    assert_eq!(status, 400);
    assert_says(&said, &["greedy_swap", "a routing policy"]);
    let (status, said) =
        put(json!({ "policy": "locality_split", "settings": { "locality": "far" } }));
    assert_eq!(status, 422);
    assert_says(&said, &["/locality"]);
    assert_eq!(put(json!({ "policy": "nobody" })).0, 404);
    assert_eq!(control.get(SPLITTING).unwrap().1["policy"], Value::Null);
}
