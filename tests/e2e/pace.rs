//! Migrations that are slow, paused, one layer at a time, or given up: real workers, the trained model, every answer the same
//! to the bit.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tests::control_kills::kill;
use tests::moving::{MIGRATION, Moving};
use tests::random::Random;
use tests::watcher::Watcher;

use crate::command::run;
use crate::{assert_says, data};

fn start() -> Moving {
    let mut moving = Moving::start(&data("tiny-kjv-moe")).unwrap();
    moving.traffic.step().unwrap();
    moving
}

/// Commits placements in which no expert stays where it is; them.
fn turn(moving: &Moving) -> Vec<Vec<i64>> {
    let turned = moving.turned(1).unwrap();
    moving.commit(&turned).unwrap();
    turned
}

/// `layer_updates_per_iter` = 1 of TensorRT-LLM, seed case S59.
#[test]
fn every_expert_comes_to_another_rank_one_layer_at_a_time_and_no_bit_changes() {
    let mut tiny = start();
    tiny.set_pace(&json!({ "layers_at_once": 1 })).unwrap();
    let turned = turn(&tiny);
    let (mut seen, mut under_way) = (Vec::new(), 0);
    tiny.until_quiet(|migration| {
        let layers = migration["layers"].as_array().unwrap();
        let moving: Vec<u64> = layers
            .iter()
            .filter(|layer| layer["step"] != "queued")
            .map(|layer| layer["layer"].as_u64().unwrap())
            .collect();
        under_way = under_way.max(moving.len());
        seen.extend(moving);
    })
    .unwrap();
    let expected: Vec<(u64, Vec<i64>)> = turned.iter().map(|slots| (2, slots.clone())).collect();
    assert_eq!(tiny.placements("in_force").unwrap(), expected);
    assert_eq!(under_way, 1, "layers under way at once");
    assert!(seen.is_sorted(), "{seen:?}");
    // The events say the same: of each layer what was done, in order.
    let mut watcher = Watcher::open(&tiny.control, Some(0)).unwrap();
    let mut steps: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    loop {
        let (_, kind, data) = watcher.event().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        match &data[&kind] {
            step if kind == "migration" => {
                steps.entry(step["layer"].as_u64().unwrap()).or_default().push(text(&step["step"]));
            }
            placed if kind == "placement" && placed["epochs"] == json!([2, 2, 2, 2]) => break,
            _ => {}
        }
    }
    assert_eq!(steps.len(), turned.len());
    for (layer, steps) in steps {
        // Whether anybody looks between ready and in force is by chance.
        assert_eq!(steps[..2], ["queued", "staging"], "layer {layer}");
        assert!(steps[2..].iter().all(|step| step == "flipping"), "layer {layer}: {steps:?}");
    }
}

#[test]
fn a_migration_waits_while_it_is_paused_and_goes_at_the_pace_that_is_said() {
    let mut tiny = start();
    let pause = ["migration", "--pause", "--reason", "peak hours"];
    assert_says(&run(&tiny.control, &pause), &["true", "nothing is on its way"]);
    turn(&tiny);
    let before = tiny.placements("in_force").unwrap();
    let migration = tiny.until_step("queued").unwrap();
    assert_eq!(migration["layers"].as_array().unwrap().len(), 4);
    (0..3).for_each(|_| tiny.traffic.step().unwrap());
    assert_eq!(tiny.placements("in_force").unwrap(), before);
    assert_eq!(tiny.migration().unwrap()["bytes"], 0);
    // As slow as can be: an expert has some thousand bytes.
    tiny.set_pace(&json!({ "bytes_per_second": 1, "layers_at_once": 4 })).unwrap();
    let migration = tiny.until_step("staging").unwrap();
    assert!(migration["bytes_left"].as_u64() > Some(1_000), "{migration}");
    assert_eq!(migration["layers"][0]["stuck"], Value::Null);
    let said = run(&tiny.control, &["migration"]);
    assert_says(&said, &["false", "staging", "bytes left", "import"]);
    (0..3).for_each(|_| tiny.traffic.step().unwrap());
    assert_eq!(tiny.placements("in_force").unwrap(), before);
    // What copies is woken where it rests.
    tiny.set_pace(&json!({})).unwrap();
    tiny.until_quiet(|_| {}).unwrap();
    let after = tiny.placements("in_force").unwrap();
    assert!(after.iter().all(|(epoch, _)| *epoch == 2), "{after:?}");
    let (status, refused) =
        tiny.control.put(MIGRATION, &json!({ "pace": { "layers_at_once": 0 } })).unwrap();
    assert_eq!(status, 400);
    assert_says(refused["title"].as_str().unwrap(), &["layers_at_once is 0, expected 1 to 1024"]);
}

/// The expert of every slot of each layer.
fn slots_in_force(tiny: &Moving) -> Vec<Vec<i64>> {
    tiny.placements("in_force").unwrap().into_iter().map(|(_, slots)| slots).collect()
}

/// Wherever a migration is given up, what was in force is in force again, and answers have the same bits throughout.
#[test]
fn a_migration_is_given_up_at_every_step() {
    let mut tiny = start();
    let first = slots_in_force(&tiny);
    for (pace, step) in [
        (json!({ "paused": true }), "queued"),
        (json!({ "bytes_per_second": 1, "layers_at_once": 4 }), "staging"),
        // Nobody calls: it is ready, and there is no way back but forward.
        (json!({ "layers_at_once": 4 }), "flipping"),
    ] {
        tiny.set_pace(&pace).unwrap();
        turn(&tiny);
        tiny.until_step(step).unwrap();
        tiny.give_up().unwrap();
        // A pause is of the group, and not of what was given up.
        tiny.set_pace(&json!({})).unwrap();
        tiny.until_quiet(|_| {}).unwrap();
        assert_eq!(slots_in_force(&tiny), first, "given up while {step}");
    }
    // Ranks have no room for it: blocked.
    let slots: Vec<Vec<i64>> = vec![(0..32).collect(); 4];
    let body = json!({ "format": "deepseek", "text": json!(slots).to_string() });
    assert_eq!(tiny.control.post("/api/v1/groups/g/import", &body).unwrap().0, 200);
    let migration = tiny.until_step("blocked").unwrap();
    let problem = migration["layers"][0]["ranks"][0]["problem"].as_str().unwrap();
    assert_says(problem, &["would have 8 slots, expected 9"]);
    tiny.give_up().unwrap();
    tiny.until_quiet(|_| {}).unwrap();
    assert_eq!(slots_in_force(&tiny), first);
}

/// `cargo xtask kill-control` does so a hundred times.
#[test]
fn control_is_killed_in_the_midst_of_migrations_and_nothing_is_lost() {
    let mut tiny = start();
    let mut random = Random::new(7);
    for number in 0..3 {
        let killed = kill(&mut tiny, &mut random);
        killed.unwrap_or_else(|error| panic!("kill {number}: {error:#}"));
    }
}
