//! Migrations that are slow, paused, one layer at a time, or given up: real workers, the trained model, every answer the same
//! to the bit.

use std::collections::BTreeMap;

use protocol::client::Engine;
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::group::{Group, Spec, call_all, uneven};
use tests::recorded::{Recorded, RecordedLayer};
use tests::watcher::Watcher;
use tests::worker_process::until;

use crate::command::run;
use crate::{BF16, assert_says, data};

const MIGRATION: &str = "/api/v1/groups/g/migration";

/// The trained model on four ranks of nine slots, with a placement in force.
struct Tiny {
    control: Control,
    _group: Group,
    layers: Vec<RecordedLayer>,
    engines: Vec<Engine>,
    first: Vec<Option<Vec<u16>>>,
}

/// Rows of a step.
const ROWS: usize = 48;

impl Tiny {
    fn start() -> Self {
        let control = Control::start().unwrap();
        let mut options = control.options();
        options.extend(["--slots-per-rank".to_owned(), "9".to_owned()]);
        let model = data("tiny-kjv-moe");
        let spec = Spec { ranks: 4, placement: None, options };
        let group = Group::start(&model.join("model-nvfp4"), &spec).unwrap();
        until("a placement in force", || {
            Ok(control.get(MIGRATION)?.1["problem"].is_null().then_some(()))
        })
        .unwrap();
        let layers = Recorded::open(&model.join("recorded.safetensors")).unwrap().layers().unwrap();
        let engines = group.engines(BF16, ROWS).unwrap();
        let first = vec![None; layers.len()];
        Self { control, _group: group, layers, engines, first }
    }

    /// One call of every layer by all engines.
    #[track_caller]
    fn step(&mut self) {
        let shares = uneven(ROWS, self.engines.len());
        for (layer, first) in self.layers.iter().zip(&mut self.first) {
            let inputs = layer.inputs.rows(0..ROWS);
            let output = call_all(&mut self.engines, layer.number, &inputs, &shares).unwrap();
            let first = first.get_or_insert_with(|| output.clone());
            assert!(output == *first, "layer {} has other bits", layer.number);
        }
    }

    fn migration(&self) -> Value {
        let (status, migration) = self.control.get(MIGRATION).unwrap();
        assert_eq!(status, 200, "{migration}");
        migration
    }

    #[track_caller]
    fn set_pace(&self, pace: &Value) {
        let (status, view) = self.control.put(MIGRATION, &json!({ "pace": pace })).unwrap();
        assert_eq!(status, 200, "{view}");
    }

    /// Commits that every rank has what the one `by` ranks before it has now, and one expert more: no expert stays.
    fn turn(&self, by: usize) -> Vec<Vec<i64>> {
        let (_, placements) = self.control.get("/api/v1/groups/g/placements").unwrap();
        let turned = |layer: &Value| {
            let experts = layer["asked"]["phy2log"].as_array().unwrap();
            let mut slots: Vec<i64> = experts.iter().map(|e| e.as_i64().unwrap()).collect();
            slots.rotate_right(9 * by);
            slots
        };
        let turned: Vec<Vec<i64>> = placements.as_array().unwrap().iter().map(turned).collect();
        let body = json!({ "format": "deepseek", "text": json!(turned).to_string() });
        let (status, said) = self.control.post("/api/v1/groups/g/import", &body).unwrap();
        assert_eq!(status, 200, "{said}");
        turned
    }

    fn in_force(&self) -> Vec<(u64, Value)> {
        let (_, placements) = self.control.get("/api/v1/groups/g/placements").unwrap();
        let of = |layer: &Value| {
            let placed = &layer["in_force"];
            (placed["epoch"].as_u64().unwrap_or(0), placed["phy2log"].clone())
        };
        placements.as_array().unwrap().iter().map(of).collect()
    }

    fn give_up(&self) {
        let body = json!({});
        let (status, said) = self.control.post("/api/v1/groups/g/rollback", &body).unwrap();
        assert_eq!(status, 200, "{said}");
    }

    /// Goes on until nothing is on its way, and looks at every state on the way.
    #[track_caller]
    fn until_quiet(&mut self, mut look: impl FnMut(&Value)) {
        until("nothing on its way", || {
            self.step();
            let migration = self.migration();
            look(&migration);
            Ok((migration["layers"] == json!([])).then_some(()))
        })
        .unwrap();
        self.step();
    }

    /// Waits, without calls, for the first layer to be at a step.
    #[track_caller]
    fn until_step(&self, step: &str) -> Value {
        until(step, || {
            let migration = self.migration();
            Ok((migration["layers"][0]["step"] == step).then_some(migration))
        })
        .unwrap()
    }
}

/// `layer_updates_per_iter` = 1 of TensorRT-LLM, seed case S59.
#[test]
fn every_expert_comes_to_another_rank_one_layer_at_a_time_and_no_bit_changes() {
    let mut tiny = Tiny::start();
    tiny.step();
    tiny.set_pace(&json!({ "layers_at_once": 1 }));
    let turned = tiny.turn(1);
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
    });
    let expected: Vec<(u64, Value)> = turned.iter().map(|slots| (2, json!(slots))).collect();
    assert_eq!(tiny.in_force(), expected);
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
    let mut tiny = Tiny::start();
    tiny.step();
    let pause = ["migration", "--pause", "--reason", "peak hours"];
    assert_says(&run(&tiny.control, &pause), &["true", "nothing is on its way"]);
    tiny.turn(1);
    let before = tiny.in_force();
    let migration = tiny.until_step("queued");
    assert_eq!(migration["layers"].as_array().unwrap().len(), 4);
    (0..3).for_each(|_| tiny.step());
    assert_eq!((tiny.in_force(), tiny.migration()["bytes"].as_u64()), (before.clone(), Some(0)));
    // As slow as can be: an expert has some thousand bytes.
    tiny.set_pace(&json!({ "bytes_per_second": 1, "layers_at_once": 4 }));
    let migration = tiny.until_step("staging");
    assert!(migration["bytes_left"].as_u64() > Some(1_000), "{migration}");
    assert_eq!(migration["layers"][0]["stuck"], Value::Null);
    let said = run(&tiny.control, &["migration"]);
    assert_says(&said, &["false", "staging", "bytes left", "import"]);
    (0..3).for_each(|_| tiny.step());
    assert_eq!(tiny.in_force(), before);
    // What copies is woken where it rests.
    tiny.set_pace(&json!({}));
    tiny.until_quiet(|_| {});
    assert!(tiny.in_force().iter().all(|(epoch, _)| *epoch == 2), "{:?}", tiny.in_force());
    let (status, refused) =
        tiny.control.put(MIGRATION, &json!({ "pace": { "layers_at_once": 0 } })).unwrap();
    assert_eq!(status, 400);
    assert_says(refused["title"].as_str().unwrap(), &["layers_at_once is 0, expected 1 to 1024"]);
}

/// Wherever a migration is given up, what was in force is in force again, and answers have the same bits throughout.
#[test]
fn a_migration_is_given_up_at_every_step() {
    let mut tiny = Tiny::start();
    tiny.step();
    let first: Vec<Value> = tiny.in_force().into_iter().map(|(_, slots)| slots).collect();
    for (pace, step) in [
        (json!({ "paused": true }), "queued"),
        (json!({ "bytes_per_second": 1, "layers_at_once": 4 }), "staging"),
        // Nobody calls: it is ready, and there is no way back but forward.
        (json!({ "layers_at_once": 4 }), "flipping"),
    ] {
        tiny.set_pace(&pace);
        tiny.turn(1);
        tiny.until_step(step);
        tiny.give_up();
        // A pause is of the group, and not of what was given up.
        tiny.set_pace(&json!({}));
        tiny.until_quiet(|_| {});
        let now: Vec<Value> = tiny.in_force().into_iter().map(|(_, slots)| slots).collect();
        assert_eq!(now, first, "given up while {step}");
    }
    // Ranks have no room for it: blocked.
    let slots: Vec<Vec<i64>> = vec![(0..32).collect(); 4];
    let body = json!({ "format": "deepseek", "text": json!(slots).to_string() });
    assert_eq!(tiny.control.post("/api/v1/groups/g/import", &body).unwrap().0, 200);
    let migration = tiny.until_step("blocked");
    let problem = migration["layers"][0]["ranks"][0]["problem"].as_str().unwrap();
    assert_says(problem, &["would have 8 slots, expected 9"]);
    tiny.give_up();
    tiny.until_quiet(|_| {});
    assert_eq!(tiny.in_force()[0].1, first[0]);
}
