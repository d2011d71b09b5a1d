//! Placements that control gives to groups: what is in force is what all ranks say that they hold.

use std::fs;
use std::path::{Path, PathBuf};

use reference::compare::Comparison;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::case::Case;
use tests::control_process::Control;
use tests::group::{Group, Spec, call_all, random_placement, uneven};
use tests::random::Random;
use tests::worker_process::until;

use crate::{BF16, assert_says, data, skewed};

const PLACEMENTS: &str = "/api/v1/groups/g/placements";

/// Sixteen experts on two ranks of nine slots each.
fn group(control: &Control) -> Group {
    let mut options = control.options();
    options.extend(["--slots-per-rank".to_owned(), "9".to_owned()]);
    Group::start(&skewed(), &Spec { ranks: 2, placement: None, options }).unwrap()
}

/// A file with a placement that is not the default.
fn file(folder: &Path, seed: u64) -> (PathBuf, Value) {
    let placement = random_placement(16, 2, 9, &mut Random::new(seed));
    let path = folder.join(format!("{seed}.json"));
    fs::write(&path, json!([placement]).to_string()).unwrap();
    (path, json!(placement))
}

/// The layer's placement once one is in force, or none is.
#[track_caller]
fn until_in_force(control: &Control, in_force: bool) -> Value {
    until("another placement in force", || {
        let (_, all) = control.get(PLACEMENTS)?;
        let is = all[0]["in_force"].is_object();
        Ok((is == in_force).then(|| all[0].clone()))
    })
    .unwrap()
}

#[track_caller]
fn serves(group: &Group) {
    let case = Case::open(&skewed()).unwrap();
    let mut engines = group.engines(BF16, 300).unwrap();
    let output = call_all(&mut engines, 0, &case.inputs, &uneven(300, 2)).unwrap();
    let comparison = Comparison::new(&output, &case.expected(BF16).unwrap());
    assert!(comparison.passes(BF16), "{comparison}");
}

#[test]
fn without_a_file_experts_are_in_order_in_all_slots() {
    let mut control = Control::start().unwrap();
    let group = group(&control);
    let placed = until_in_force(&control, true);
    let in_order: Vec<u32> = (0..9).chain(8..16).chain([0]).collect();
    let expected = json!({"epoch": 1, "slots_per_rank": 9, "phy2log": in_order, "split": null});
    assert_eq!((&placed["layer"], &placed["in_force"]), (&json!(0), &expected));
    assert_eq!((&placed["asked"]["source"], &placed["waiting"]), (&json!("default"), &json!([])));
    serves(&group);
    // Who has it already gets it again only when it has changed, which it has not with a new process.
    let (status, tag) = control.get_unless(PLACEMENTS, "\"none\"").unwrap();
    assert_eq!(status, 200);
    control.signal(Signal::TERM).unwrap();
    control.wait().unwrap();
    control.restart(&[]).unwrap();
    until_in_force(&control, true);
    assert_eq!(control.get_unless(PLACEMENTS, &tag).unwrap(), (304, tag));
    let (_, models) = control.get("/api/v1/models").unwrap();
    assert_eq!(
        (&models[0]["groups"], &models[0]["layers"][0]["shape"]["experts"]),
        (&json!(["g"]), &json!(16))
    );
}

#[test]
fn a_placement_is_in_force_while_all_ranks_hold_it() {
    let folder = tempfile::tempdir().unwrap();
    let (path, phy2log) = file(folder.path(), 1);
    let control = Control::start_placing(&path).unwrap();
    let mut group = group(&control);
    let placed = until_in_force(&control, true);
    assert_eq!(
        (&placed["in_force"]["epoch"], &placed["in_force"]["phy2log"]),
        (&json!(1), &phy2log)
    );
    assert_eq!(placed["asked"]["source"], "file");
    serves(&group);
    group.workers[1].signal(Signal::KILL).unwrap();
    group.workers[1].wait().unwrap();
    let placed = until_in_force(&control, false);
    assert_eq!((&placed["waiting"], &placed["asked"]["phy2log"]), (&json!([1]), &phy2log));
    group.restart(1).unwrap();
    until_in_force(&control, true);
    serves(&group);
    let (_, one) = control.get(&format!("{PLACEMENTS}/0")).unwrap();
    assert_eq!(one["in_force"]["phy2log"], phy2log);
}

#[test]
fn a_new_file_is_for_the_whole_group_and_the_old_epoch_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let [(first, old), (second, new)] = [1, 2].map(|seed| file(folder.path(), seed));
    let mut control = Control::start_placing(&first).unwrap();
    let mut group_before = group(&control);
    until_in_force(&control, true);
    control.signal(Signal::TERM).unwrap();
    control.wait().unwrap();
    control.restart(&["--placement", &format!("g={}", second.display())]).unwrap();
    until_in_force(&control, true);
    // A rank that comes back holds what the other does: they could not call together otherwise.
    group_before.workers[0].signal(Signal::KILL).unwrap();
    group_before.workers[0].wait().unwrap();
    until_in_force(&control, false);
    group_before.restart(0).unwrap();
    assert_eq!(until_in_force(&control, true)["in_force"]["phy2log"], old);
    serves(&group_before);
    drop(group_before);
    until_in_force(&control, false);
    let group_after = group(&control);
    let placed = until_in_force(&control, true);
    assert_eq!((&placed["in_force"]["epoch"], &placed["in_force"]["phy2log"]), (&json!(2), &new));
    serves(&group_after);
    let (_, epochs) = control.get(&format!("{PLACEMENTS}/0/epochs?limit=1")).unwrap();
    assert_eq!((&epochs["items"][0]["phy2log"], &epochs["next"]), (&new, &json!("2")));
    let (_, epochs) = control.get(&format!("{PLACEMENTS}/0/epochs?cursor=2")).unwrap();
    assert_eq!((&epochs["items"][0]["phy2log"], &epochs["next"]), (&old, &Value::Null));
}

#[test]
fn a_file_that_does_not_fit_is_shown_and_the_group_serves() {
    let control =
        Control::start_placing(&data("field/import/replicas_once/slots_36.json")).unwrap();
    let group = group(&control);
    let placed = until_in_force(&control, true);
    assert_eq!((&placed["in_force"]["epoch"], &placed["asked"]), (&json!(0), &Value::Null));
    let (_, groups) = control.get("/api/v1/groups").unwrap();
    let problem = groups[0]["problem"].as_str().unwrap();
    assert_says(problem, &["slots_36.json has 4 layers, the model has 1"]);
    serves(&group);
}

#[test]
fn a_rank_that_comes_back_without_control_holds_what_its_group_did() {
    let folder = tempfile::tempdir().unwrap();
    let (path, phy2log) = file(folder.path(), 3);
    let mut control = Control::start_placing(&path).unwrap();
    let mut group = group(&control);
    until_in_force(&control, true);
    control.signal(Signal::KILL).unwrap();
    control.wait().unwrap();
    group.workers[0].signal(Signal::KILL).unwrap();
    group.workers[0].wait().unwrap();
    group.restart(0).unwrap();
    serves(&group);
    control.restart(&[]).unwrap();
    assert_eq!(until_in_force(&control, true)["in_force"]["phy2log"], phy2log);
}

/// C25: maps that can be give the placement they say and come back from export; others are refused by
/// layer, device and expert, and nothing of them is taken.
#[test]
fn maps_of_other_engines_are_taken_whole_or_not_at_all() {
    let control = Control::start().unwrap();
    let start = || {
        let mut options = control.options();
        options.extend(["--slots-per-rank".to_owned(), "9".to_owned()]);
        let spec = Spec { ranks: 4, placement: None, options };
        Group::start(&data("tiny-kjv-moe/model-nvfp4"), &spec).unwrap()
    };
    let group = start();
    until_in_force(&control, true);
    let text = |name: &str| fs::read_to_string(data("field/import/ascend").join(name)).unwrap();
    let import = |text: &str, dry_run: bool| {
        let body = json!({"format": "vllm-ascend", "text": text, "dry_run": dry_run});
        control.post("/api/v1/groups/g/import", &body).unwrap()
    };
    let asked = || {
        let (_, placements) = control.get(PLACEMENTS).unwrap();
        placements
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| layer["asked"].clone())
            .collect::<Vec<_>>()
    };
    let before = asked();
    for (name, expected) in [
        ("bad_device_count", "layer 1: the number of devices is 3, expected 4"),
        ("bad_duplicate_on_device", "layer 0, device 1: expert 19 is there twice"),
        ("bad_expert_nowhere", "layer 0: expert 31 is on no device"),
        ("bad_expert_out_of_range", "layer 3, device 2: expert 32 is there, expected 0 to 31"),
        ("bad_layer_count", "moe_layer_count is 5, expected 4"),
        ("bad_layer_twice", "layer 2 is there twice"),
        ("bad_negative", "layer 1, device 0: expert -1 is there, expected 0 to 31"),
        ("bad_truncated", "not of this form: EOF while parsing"),
        ("bad_uneven_slots", "layer 2, device 3: it has 8 experts, the others have 9"),
    ] {
        let (status, problem) = import(&text(&format!("{name}.json")), false);
        assert_eq!((status, &problem["code"]), (422, &json!("placement")), "{name}");
        assert_says(problem["title"].as_str().unwrap(), &[expected]);
    }
    let (status, imported) = import(&text("valid_shuffled.json"), true);
    assert_eq!((status, &imported[3]), (200, &json!({"layer": 3, "epoch": 2, "changed": true})));
    assert_eq!(asked(), before, "something was taken");
    // Devices out of order are the same map.
    assert_eq!(import(&text("valid_shuffled.json"), false).0, 200);
    let (_, again) = import(&text("valid.json"), false);
    assert_eq!(again[0], json!({"layer": 0, "epoch": 2, "changed": false}));
    // In force once the whole group has started again; and out again in every form.
    drop(group);
    until_in_force(&control, false);
    let _group = start();
    assert_eq!(until_in_force(&control, true)["in_force"]["epoch"], 2);
    let export =
        |form: &str| control.text(&format!("/api/v1/groups/g/export?format={form}")).unwrap();
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(parsed(&export("vllm-ascend")), parsed(&text("valid.json")));
    for form in ["tensorrt-llm", "sglang", "deepseek"] {
        let body = json!({"format": form, "text": export(form)});
        let (status, same) = control.post("/api/v1/groups/g/import", &body).unwrap();
        assert_eq!((status, &same[2]["changed"]), (200, &json!(false)), "{form} {same}");
    }
    let (_, log) = control.get("/api/v1/audit").unwrap();
    let imports = log["items"].as_array().unwrap().iter();
    let imports: Vec<&Value> = imports.filter(|e| e["action"] == "placements.import").collect();
    assert_eq!((imports.len(), &imports[4]["before"]["epochs"][0]), (5, &json!([0, 1])));
}
