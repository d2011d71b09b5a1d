//! Placements that change while calls go on: real workers, real traffic, every answer the same to the bit.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use protocol::client::Engine;
use protocol::session::{FromControl, FromWorker, LayerStaging, Register};
use rustix::process::Signal;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tests::case::Case;
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, register};
use tests::group::{Group, Spec, call_all, random_placement, uneven};
use tests::random::Random;
use tests::worker_process::until;

use crate::{BF16, assert_says, skewed};

/// Sixteen experts on two ranks of nine slots each, with a placement in force.
fn group(control: &Control) -> Group {
    let mut options = control.options();
    options.extend(["--slots-per-rank".to_owned(), "9".to_owned()]);
    let group = Group::start(&skewed(), &Spec { ranks: 2, placement: None, options }).unwrap();
    until("a placement in force", || Ok(placed(control)["in_force"].is_object().then_some(())))
        .unwrap();
    group
}

fn placed(control: &Control) -> Value {
    control.get("/api/v1/groups/g/placements/0").unwrap().1
}

/// Commits a placement of `slots` a rank that is none of the others; the expert of every slot.
#[track_caller]
fn commit(control: &Control, seed: u64, slots: usize) -> Value {
    let placement = random_placement(16, 2, slots, &mut Random::new(seed));
    let text = json!([placement]).to_string();
    let body = json!({ "format": "deepseek", "text": text });
    let (status, layers) = control.post("/api/v1/groups/g/import", &body).unwrap();
    assert_eq!((status, &layers[0]["changed"]), (200, &json!(true)), "{layers}");
    json!(placement)
}

/// Steps of all engines, each with its share of the tokens, that all have the same answer.
struct Traffic {
    case: Case,
    engines: Vec<Engine>,
    first: Option<Vec<u16>>,
    steps: u32,
}

impl Traffic {
    /// Engines of the first ranks; the others join by themselves.
    fn new(group: &Group, engines: usize) -> Self {
        let workers = &group.workers[..engines];
        let engines = workers.iter().map(|worker| worker.engine(BF16, 300).unwrap()).collect();
        Self { case: Case::open(&skewed()).unwrap(), engines, first: None, steps: 0 }
    }

    #[track_caller]
    fn step(&mut self) {
        let shares = uneven(300, self.engines.len());
        let output = call_all(&mut self.engines, 0, &self.case.inputs, &shares).unwrap();
        let first = self.first.get_or_insert_with(|| output.clone());
        assert!(output == *first, "step {} has other bits", self.steps);
        self.steps += 1;
    }

    /// Goes on until `epoch` is in force, and some steps longer.
    #[track_caller]
    fn until_in_force(&mut self, control: &Control, epoch: u64) -> Value {
        let mut found = Value::Null;
        until("another placement in force", || {
            self.step();
            found = placed(control);
            Ok((found["in_force"]["epoch"] == epoch).then_some(()))
        })
        .unwrap();
        (0..5).for_each(|_| self.step());
        assert_eq!((&found["waiting"], &found["moving"]), (&json!([]), &json!([])));
        found
    }
}

#[test]
fn experts_move_while_calls_go_on_and_a_rank_that_comes_back_has_them() {
    let control = Control::start().unwrap();
    let mut group = group(&control);
    let mut traffic = Traffic::new(&group, 2);
    (0..5).for_each(|_| traffic.step());
    for (seed, epoch) in [(1, 2), (2, 3), (3, 4)] {
        let placement = commit(&control, seed, 9);
        let found = traffic.until_in_force(&control, epoch);
        assert_eq!(found["in_force"]["phy2log"], placement);
        assert_eq!(found["asked"]["source"], "import");
    }
    let expected = traffic.first.clone();
    drop(traffic);
    // The group's memory was founded under another placement.
    group.workers[1].signal(Signal::KILL).unwrap();
    group.workers[1].wait().unwrap();
    group.restart(1).unwrap();
    let mut traffic = Traffic { first: expected, ..Traffic::new(&group, 2) };
    traffic.until_in_force(&control, 4);
    commit(&control, 5, 9);
    traffic.until_in_force(&control, 5);
}

#[test]
fn a_rank_without_an_engine_flips_with_the_others() {
    let control = Control::start().unwrap();
    let group = group(&control);
    let mut traffic = Traffic::new(&group, 1);
    let placement = commit(&control, 1, 9);
    assert_eq!(traffic.until_in_force(&control, 2)["in_force"]["phy2log"], placement);
}

#[test]
fn what_was_committed_goes_on_after_control_was_killed() {
    let mut control = Control::start().unwrap();
    let group = group(&control);
    // Nobody calls: what is staged stays so.
    let placement = commit(&control, 1, 9);
    control.signal(Signal::KILL).unwrap();
    control.wait().unwrap();
    let mut traffic = Traffic::new(&group, 2);
    (0..20).for_each(|_| traffic.step());
    control.restart(&[]).unwrap();
    assert_eq!(traffic.until_in_force(&control, 2)["in_force"]["phy2log"], placement);
}

#[test]
fn what_ranks_have_no_room_for_is_shown_and_the_next_takes_its_place() {
    let control = Control::start().unwrap();
    let group = group(&control);
    let mut traffic = Traffic::new(&group, 2);
    // Slots are what ranks were started with.
    commit(&control, 1, 8);
    let mut moving = Value::Null;
    until("a problem of both ranks", || {
        traffic.step();
        moving = placed(&control)["moving"].clone();
        let ranks = moving.as_array().map_or(&[][..], Vec::as_slice);
        Ok((ranks.len() == 2 && ranks.iter().all(|rank| rank["problem"].is_string())).then_some(()))
    })
    .unwrap();
    assert_eq!((&moving[1]["rank"], &moving[1]["epoch"]), (&json!(1), &json!(2)));
    let expected = "layer 0 would have 8 slots, expected 9";
    assert_says(moving[0]["problem"].as_str().unwrap(), &[expected]);
    assert_eq!(placed(&control)["in_force"]["epoch"], 1);
    let placement = commit(&control, 2, 9);
    assert_eq!(traffic.until_in_force(&control, 3)["in_force"]["phy2log"], placement);
}

fn roll_back(control: &Control, body: &Value) -> (u16, Value) {
    control.post("/api/v1/groups/g/rollback", body).unwrap()
}

#[test]
fn a_layer_goes_back_to_what_it_had_while_calls_go_on() {
    let control = Control::start().unwrap();
    let group = group(&control);
    let mut traffic = Traffic::new(&group, 2);
    let first = placed(&control)["in_force"]["phy2log"].clone();
    commit(&control, 1, 9);
    traffic.until_in_force(&control, 2);
    let to = |layer: u32, epoch: u64| json!({ "layers": [{ "layer": layer, "epoch": epoch }] });
    let (status, done) = roll_back(&control, &to(0, 1));
    assert_eq!((status, &done), (200, &json!([{ "layer": 0, "epoch": 3, "changed": true }])));
    let found = traffic.until_in_force(&control, 3);
    assert_eq!(
        (&found["in_force"]["phy2log"], &found["asked"]["source"]),
        (&first, &json!("rollback"))
    );
    // What is the newest already stays, and what never was is named.
    let (_, same) = roll_back(&control, &to(0, 3));
    assert_eq!(same, json!([{ "layer": 0, "epoch": 3, "changed": false }]));
    for (layer, epoch) in [(0, 9), (7, 1)] {
        let (status, problem) = roll_back(&control, &to(layer, epoch));
        assert_eq!(status, 409, "{problem}");
        let expected = format!("layer {layer} has no committed epoch {epoch}");
        assert_says(problem["title"].as_str().unwrap(), &[&expected]);
    }
}

#[test]
fn what_is_on_its_way_is_given_up() {
    let control = Control::start().unwrap();
    let group = group(&control);
    let mut traffic = Traffic::new(&group, 2);
    traffic.step();
    let first = placed(&control)["in_force"]["phy2log"].clone();
    // Ranks have no room for it, so that it would be on its way for ever.
    commit(&control, 1, 8);
    until("a problem", || Ok(placed(&control)["moving"][0]["problem"].is_string().then_some(())))
        .unwrap();
    let (status, done) = roll_back(&control, &json!({}));
    assert_eq!((status, &done[0]["epoch"]), (200, &json!(3)));
    let found = traffic.until_in_force(&control, 3);
    assert_eq!(found["in_force"]["phy2log"], first);
    let (_, log) = control.get("/api/v1/audit").unwrap();
    assert_eq!(log["items"][0]["action"], "placements.rollback");
    assert_eq!(log["items"][0]["before"], json!({ "epochs": [[0, 2]] }));
}

/// A folder with a checkpoint of its own.
fn copy_of(case: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(case).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    folder
}

/// Turns a byte of a weight of an expert round, in place: whoever has mapped the file has it as well.
fn spoil(folder: &Path, expert: usize) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let name = format!(".experts.{expert}.down_proj.weight");
    let found = tensors.iter().find(|(known, _)| known.ends_with(&name)).unwrap().1;
    let byte = found.data().as_ptr().addr() - bytes.as_ptr().addr() + found.data().len() / 3;
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[!bytes[byte]], byte as u64).unwrap();
}

/// A checkpoint that changes under a rank: what it has loaded stays, and what it would load anew is never in force.
#[test]
fn weights_that_changed_on_disk_never_come_to_be_in_force() {
    let control = Control::start().unwrap();
    let mut group = group(&control);
    let own = copy_of(&skewed());
    group.workers[1].signal(Signal::KILL).unwrap();
    group.workers[1].wait().unwrap();
    group.workers[1] = group.spawn_with(1, own.path(), &[]).unwrap();
    group.workers[1].ready().unwrap();
    let mut traffic = Traffic::new(&group, 2);
    let first = traffic.until_in_force(&control, 1)["in_force"]["phy2log"].clone();
    // Rank 0 alone has expert 3, and keeps it; rank 1 gets it, too.
    spoil(own.path(), 3);
    let mut slots: Vec<i64> = serde_json::from_value(first.clone()).unwrap();
    assert!(slots[..9].contains(&3) && !slots[9..].contains(&3), "{slots:?}");
    let spare = slots[9..].iter().position(|expert| slots[..9].contains(expert)).unwrap();
    slots[9 + spare] = 3;
    let import = |slots: &[i64]| {
        let body = json!({ "format": "deepseek", "text": json!([slots]).to_string() });
        assert_eq!(control.post("/api/v1/groups/g/import", &body).unwrap().0, 200);
    };
    import(&slots);
    until("a problem", || {
        traffic.step();
        Ok(placed(&control)["moving"][1]["problem"].is_string().then_some(()))
    })
    .unwrap();
    let expected = "expert 3 is not the same on rank 1 as on rank 0";
    assert_says(placed(&control)["moving"][1]["problem"].as_str().unwrap(), &[expected]);
    (0..5).for_each(|_| traffic.step());
    assert_eq!(placed(&control)["in_force"]["phy2log"], first);
    // With the file as it was, the next placement is in force.
    spoil(own.path(), 3);
    slots.swap(0, 1);
    import(&slots);
    assert_eq!(traffic.until_in_force(&control, 3)["in_force"]["phy2log"], json!(slots));
}

/// Made-up ranks: one says that an expert is not in its memory what it is in the other's.
#[test]
fn nobody_flips_before_all_have_the_same_experts() {
    let control = Control::start_patient().unwrap();
    let rank = |rank| {
        let register = Register { asks: true, stages: true, ..register(("g", rank, 2), 1, 4) };
        let (mut worker, _) = FakeWorker::dial(&control, register).unwrap();
        worker.hold_what_is_told().unwrap();
        worker
    };
    let mut ranks: Vec<FakeWorker> = (0..2).map(rank).collect();
    until("a placement in force", || Ok(placed(&control)["in_force"].is_object().then_some(())))
        .unwrap();
    let body = json!({ "format": "deepseek", "text": "[[2,0,1,3]]" });
    assert_eq!(control.post("/api/v1/groups/g/import", &body).unwrap().0, 200);
    let say = |rank: &mut FakeWorker, digests: &[(u32, u64)]| {
        let (epoch, staged, digests) = (2, true, digests.to_vec());
        let layers = vec![LayerStaging { epoch, staged, digests, ..LayerStaging::default() }];
        rank.say(&FromWorker::Staging { layers, bytes_per_second: None }).unwrap();
    };
    assert!(matches!(ranks[0].hear().unwrap(), FromControl::Stage { .. }));
    say(&mut ranks[0], &[(0, 5), (1, 6), (2, 7)]);
    say(&mut ranks[1], &[(1, 6), (2, 8), (3, 9)]);
    until("a problem", || Ok(placed(&control)["moving"][1]["problem"].is_string().then_some(())))
        .unwrap();
    let expected = "expert 2 is not the same on rank 1 as on rank 0";
    assert_says(placed(&control)["moving"][1]["problem"].as_str().unwrap(), &[expected]);
    // Orders to stage may have been on their way before they were heard.
    let heard = |rank: &mut FakeWorker| rank.hear_within(Duration::from_millis(600)).unwrap();
    while let Some(order) = heard(&mut ranks[0]) {
        assert!(matches!(order, FromControl::Stage { .. }), "{order:?}");
    }
    say(&mut ranks[1], &[(1, 6), (2, 7), (3, 9)]);
    assert_eq!(ranks[0].hear().unwrap(), FromControl::Ready { layer: 0, epoch: 2 });
}
