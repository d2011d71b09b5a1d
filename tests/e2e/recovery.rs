//! Ranks that are lost for longer than their grace: the others come to have what only those had, while calls go on, and who
//! comes back has its experts again.

use protocol::client::{ClientError, Engine};
use protocol::message::Phase;
use protocol::refusal::Refusal;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::call::through;
use tests::case::Case;
use tests::control_process::Control;
use tests::group::{Group, Spec, call_all, call_each, uneven};
use tests::worker_process::{Worker, until};

use crate::command::run;
use crate::{BF16, assert_says, skewed};

const RECOVERY: &str = "/api/v1/groups/g/recovery";
const LAYER: &str = "/api/v1/groups/g/placements/0";
/// Rows of a step.
const ROWS: usize = 300;

/// Sixteen experts on three ranks of nine slots each, of which two have room for all.
fn group(control: &Control) -> Group {
    let mut options = control.options();
    options.extend(["--slots-per-rank".to_owned(), "9".to_owned()]);
    let group = Group::start(&skewed(), &Spec { ranks: 3, placement: None, options }).unwrap();
    in_force(control, 1);
    group
}

/// Waits for the placement of an epoch to be in force.
fn in_force(control: &Control, epoch: u64) -> Value {
    let mut placed = Value::Null;
    until("a placement in force", || {
        placed = control.get(LAYER)?.1;
        Ok((placed["in_force"]["epoch"] == epoch).then_some(()))
    })
    .unwrap();
    placed
}

fn lose(group: &mut Group, rank: usize) {
    group.workers[rank].signal(Signal::KILL).unwrap();
    group.workers[rank].wait().unwrap();
}

/// The answer to all rows.
fn expected() -> Vec<u16> {
    let alone = Worker::start(&skewed(), &[]).unwrap();
    let mut engine = alone.engine(BF16, ROWS).unwrap();
    through(&mut engine, 0, Phase::Prefill, &Case::open(&skewed()).unwrap().inputs).unwrap()
}

/// Calls until all engines are answered, rightly; until then each hears of the loss once, and otherwise that an expert is not to
/// be had. How often that was.
fn call_until_served(engines: &mut [Engine], expected: &[u16]) -> usize {
    let inputs = Case::open(&skewed()).unwrap().inputs;
    let shares = uneven(ROWS, engines.len());
    let (mut named, mut refused) = (vec![0; engines.len()], 0);
    until("answers of all", || {
        let mut answers = Vec::new();
        for (rank, answer) in call_each(engines, 0, &inputs, &shares).into_iter().enumerate() {
            match answer {
                Ok(answer) => answers.extend(answer),
                Err(ClientError::Refused(Refusal::Group { rank: 2, .. })) => named[rank] += 1,
                Err(ClientError::Refused(Refusal::Unavailable { lost, .. })) => {
                    assert_eq!(lost, [2]);
                    refused += 1;
                }
                Err(error) => panic!("rank {rank}: {error}"),
            }
        }
        assert!(answers.len() < expected.len() || answers == expected, "wrong answers");
        Ok((answers.len() == expected.len()).then_some(()))
    })
    .unwrap();
    assert_eq!(named, vec![1; engines.len()], "how often each engine heard of the loss");
    refused
}

#[test]
fn what_only_a_lost_rank_had_comes_to_the_others_and_goes_on_when_it_is_back() {
    let control = Control::start().unwrap();
    let mut group = group(&control);
    let said = ["recovery", "--grace", "1", "--reason", "this is a test"];
    assert_says(&run(&control, &said), &["GRACE S", "no rank is lost"]);
    let (expected, inputs) = (expected(), Case::open(&skewed()).unwrap().inputs);
    let mut engines = group.engines(BF16, ROWS).unwrap();
    let before = in_force(&control, 1)["in_force"]["phy2log"].clone();
    assert!(call_all(&mut engines, 0, &inputs, &uneven(ROWS, 3)).unwrap() == expected);

    lose(&mut group, 2);
    drop(engines.remove(2));
    let refused = call_until_served(&mut engines, &expected);
    assert!(refused > 0, "experts of rank 2 were to be had at once");
    let placed = in_force(&control, 2);
    assert_eq!(placed["asked"]["source"], "repair");
    let rows = |slots: &Value, ranks: std::ops::Range<usize>| {
        slots.as_array().unwrap()[ranks.start * 9..ranks.end * 9].to_vec()
    };
    let after = &placed["in_force"]["phy2log"];
    assert_eq!(rows(after, 2..3), rows(&before, 2..3), "the lost rank's own slots");
    let held = rows(after, 0..2);
    assert!((0..16).all(|expert| held.contains(&json!(expert))), "{held:?}");
    let (_, view) = control.get(RECOVERY).unwrap();
    let lost = &view["lost"][0];
    assert_eq!(
        (&lost["rank"], &lost["given_up"], &view["lacking"]),
        (&json!(2), &json!(true), &json!([]))
    );
    let (_, audit) = control.get("/api/v1/audit?limit=1").unwrap();
    let entry = &audit["items"][0];
    assert_eq!(
        (&entry["action"], &entry["actor"]),
        (&json!("placement.repair"), &json!("moeplane-control"))
    );
    assert_eq!(entry["after"]["left"], json!([]));
    // A policy plans for those that are there.
    let (status, proposal) = control.post("/api/v1/groups/g/proposals", &json!({})).unwrap();
    assert_eq!(status, 200, "{proposal}");
    for change in proposal["changes"].as_array().unwrap() {
        assert_eq!(rows(&change["phy2log"], 2..3), vec![json!(-1); 9], "on the lost rank");
    }
    assert!(call_all(&mut engines, 0, &inputs, &uneven(ROWS, 2)).unwrap() == expected);

    group.restart(2).unwrap();
    engines.push(group.workers[2].engine(BF16, ROWS).unwrap());
    until("a group without lost ranks", || {
        let (_, view) = control.get(RECOVERY)?;
        Ok((view["lost"] == json!([])).then_some(()))
    })
    .unwrap();
    assert_eq!(in_force(&control, 2)["in_force"], placed["in_force"], "all three hold the same");
    assert!(call_all(&mut engines, 0, &inputs, &uneven(ROWS, 3)).unwrap() == expected);
}

#[test]
fn lost_ranks_are_waited_for_where_somebody_says_so() {
    let control = Control::start().unwrap();
    let mut group = group(&control);
    let put = |recovery: Value| control.put(RECOVERY, &json!({ "recovery": recovery })).unwrap();
    let (status, problem) = put(json!({ "grace_s": 0 }));
    assert_eq!(status, 400);
    assert_says(&problem.to_string(), &["grace_s", "expected 1 to 86400"]);
    assert_eq!(put(json!({ "grace_s": 1, "automatic": false })).0, 200);
    lose(&mut group, 2);
    let lacking = until("experts that calls lack", || {
        let (_, view) = control.get(RECOVERY)?;
        let lost = view["lost"] == json!([]);
        Ok((!lost).then(|| view.clone()))
    })
    .unwrap();
    assert_eq!(lacking["lost"][0]["gives_up_ms"], Value::Null);
    assert_eq!(lacking["lacking"][0]["layer"], 0);
    assert!(!lacking["lacking"][0]["experts"].as_array().unwrap().is_empty());
    // Much longer than the grace would be.
    std::thread::sleep(std::time::Duration::from_millis(2_500));
    assert_eq!(control.get(LAYER).unwrap().1["asked"]["epoch"], 1);
    assert_eq!(put(json!({ "grace_s": 1 })).0, 200);
    until("a repair", || Ok((control.get(LAYER)?.1["asked"]["epoch"] == 2).then_some(()))).unwrap();
}
