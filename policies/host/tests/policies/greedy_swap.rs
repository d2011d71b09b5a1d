//! `greedy_swap` as operators see it: through the host, which holds every plan against pins, states and budgets.

use std::process::Command;

use policy_host::contract::EMPTY;
use policy_host::contract::placer::{Plan, Purpose, Request};
use policy_host::contract::types::{Pin, PinKind, RankState};
use policy_host::{Component, Verdict, example};
use serde_json::Value;

use crate::load_patiently;
use crate::shipped::{DATA, PROGRAM, built};

/// The policy, and a question in which balance alone counts, and every difference is worth a move.
fn asked() -> Option<(Component, Request)> {
    let policy = load_patiently(&built("greedy_swap")?).unwrap();
    let mut request = example::placement(r#"{"dead-zone":1,"noise":0}"#);
    request.costs.clear();
    Some((policy, request))
}

fn plan(policy: &Component, request: &Request) -> Plan {
    policy.decide(request).unwrap().value
}

#[test]
fn few_moves_make_the_busiest_rank_less_busy_and_say_why() {
    let Some((policy, request)) = asked() else { return };
    let plan = plan(&policy, &request);
    assert_eq!(plan.changes.len(), 2, "{plan:?}");
    for change in &plan.changes {
        assert!(change.max_over_mean.after < change.max_over_mean.before - 0.1, "{change:?}");
        assert_eq!(change.milliseconds, None, "nothing was measured");
        assert!((1..=6).contains(&change.moves.len()), "{change:?}");
        let gains: f32 = change.moves.iter().map(|step| step.gain).sum();
        let gained = change.max_over_mean.before - change.max_over_mean.after;
        // What a later step did to a slot again is told by that step alone.
        assert!((0.5 * gained..gained + 0.01).contains(&gains), "{gains} of {gained}: {change:?}");
        for step in &change.moves {
            assert!(matches!(step.purpose, Purpose::Spread | Purpose::Replicate), "{change:?}");
            assert!(step.source.is_some() && step.source != Some(step.destination), "{change:?}");
        }
    }
}

#[test]
fn a_settled_layer_is_left_alone() {
    let Some((policy, mut request)) = asked() else { return };
    let first = plan(&policy, &request);
    for layer in &mut request.layers {
        let change = first.changes.iter().find(|change| change.layer == layer.id).unwrap();
        layer.placement.clone_from(&change.placement);
    }
    let again = plan(&policy, &request);
    assert!(again.changes.is_empty(), "{again:?}");
    // So is one within the dead zone, at first.
    let (_, mut request) = asked().unwrap();
    request.context.settings = r#"{"dead-zone":3}"#.to_owned();
    let none = plan(&policy, &request);
    assert!(none.changes.is_empty());
    assert!(none.explanation.contains("within the dead zone of 3"), "{none:?}");
}

#[test]
fn milliseconds_decide_where_costs_are_known() {
    let Some((policy, mut request)) = asked() else { return };
    request.costs = example::costs();
    for change in plan(&policy, &request).changes {
        let milliseconds = change.milliseconds.unwrap();
        assert!(milliseconds.after < milliseconds.before, "{milliseconds:?}");
    }
    // Where reading weights is all that costs, rows on the hot rank are no reason to move anything.
    for point in &mut request.costs {
        point.milliseconds = 0.1 * point.experts;
    }
    for change in plan(&policy, &request).changes {
        let milliseconds = change.milliseconds.unwrap();
        assert!(milliseconds.after <= milliseconds.before, "{milliseconds:?}");
    }
}

#[test]
fn budgets_end_a_plan() {
    let Some((policy, mut request)) = asked() else { return };
    request.budget.moves_per_layer = Some(1);
    let short = plan(&policy, &request);
    assert!(short.changes.iter().all(|change| change.moves.len() == 1), "{short:?}");
    assert!(short.explanation.contains("with 2 moves"), "{short:?}");
    request.budget.bytes = Some(request.model.expert_bytes);
    let one = plan(&policy, &request);
    assert_eq!(one.changes.len(), 1, "{one:?}");
    assert!(one.explanation.contains("the budget cuts 1 short"), "{one:?}");
}

#[test]
fn a_draining_rank_can_leave_and_a_lost_one_is_gone() {
    let Some((policy, mut request)) = asked() else { return };
    request.topology.ranks[2].state = RankState::Draining;
    let drained = plan(&policy, &request);
    for change in &drained.changes {
        let others = || change.placement.iter().enumerate().filter(|(slot, _)| slot / 3 != 2);
        for expert in 0..8 {
            assert!(others().any(|(_, held)| *held == expert), "{expert} only drains: {change:?}");
        }
        assert!(change.moves.iter().any(|step| step.purpose == Purpose::Drain), "{change:?}");
    }
    assert_eq!(drained.changes.len(), 2);
    request.topology.ranks[2].state = RankState::Lost;
    let lost = plan(&policy, &request);
    assert_eq!(lost.changes.len(), 2);
    for change in &lost.changes {
        assert!(change.placement[6..9].iter().all(|held| *held == EMPTY), "{change:?}");
        let repairs = change.moves.iter().filter(|step| step.purpose == Purpose::Repair);
        // Experts 4 and 5 were nowhere else: they come from the checkpoint.
        let mut came: Vec<(u32, Option<u32>)> = repairs.map(|m| (m.expert, m.source)).collect();
        came.sort_unstable();
        assert_eq!(came, [(4, None), (5, None)]);
    }
    // Even if nobody knows what is asked of experts.
    request.windows.clear();
    assert_eq!(plan(&policy, &request).changes.len(), 2);
    request.topology.ranks[2].state = RankState::Active;
    let declined = policy.decide(&request).unwrap_err();
    assert!(matches!(declined, Verdict::Declined { .. }), "{declined}");
}

#[test]
fn pins_hold_and_what_cannot_be_is_said() {
    let Some((policy, mut request)) = asked() else { return };
    let pin = |layer, expert, rank, kind| Pin { layer, expert, rank, kind };
    request.pins = vec![
        pin(None, 7, 0, PinKind::Must),
        pin(Some(1), 0, 1, PinKind::Never),
        pin(Some(1), 0, 2, PinKind::Never),
    ];
    let pinned = plan(&policy, &request);
    for change in &pinned.changes {
        assert!(change.placement[..3].contains(&7), "{change:?}");
    }
    let first = pinned.changes.iter().find(|change| change.layer == 1).unwrap();
    assert!(!first.placement[3..9].contains(&0), "{first:?}");
    request.pins = (0..4).map(|rank| pin(Some(3), 5, rank, PinKind::Never)).collect();
    let other = plan(&policy, &request);
    assert!(other.changes.iter().all(|change| change.layer == 1), "{other:?}");
    let why = "1 cannot be placed, the first is layer 3: no slot is free for expert 5";
    assert!(other.explanation.ends_with(why), "{other:?}");
    request.pins = vec![pin(None, 0, 9, PinKind::Must)];
    let refused = policy.decide(&request).unwrap_err().to_string();
    assert!(refused.contains("a pin of expert 0 and rank 9, expected less than 8 and 4"));
}

/// Real routing of four domains that take turns, over all orders: as balanced as DeepSeek's algorithm, with a thirtieth of
/// its moves.
#[test]
fn real_routing_is_balanced_with_few_moves() {
    if built("greedy_swap").is_none() {
        return;
    }
    let replay = |slots: &str| {
        let windows = format!("{DATA}/esft-deepseek-v2-lite/windows_1024.json");
        let mut replay = Command::new(PROGRAM);
        replay.args([
            "replay",
            "--json",
            "--order",
            "all",
            "--slots",
            slots,
            "--windows",
            &windows,
        ]);
        replay.args(["--policy", "greedy_swap", "--policy", "deepseek_eplb"]);
        let output = replay.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["replay"]["orders"], 24);
        let row = |number: usize| {
            let row = &report["policies"][number];
            ["max_over_mean", "moved_experts"].map(|name| row[name].as_f64().unwrap())
        };
        (row(0)[0], row(1), row(2))
    };
    let (before, greedy, deepseek) = replay("64");
    assert!(before > 1.48 && greedy[0] <= 1.148 && greedy[1] <= 1.8, "{before} {greedy:?}");
    assert!((deepseek[0] - 1.1483).abs() < 1e-4 && (deepseek[1] - 52.39).abs() < 0.01);
    let (_, greedy, deepseek) = replay("72");
    assert!(greedy[0] <= deepseek[0] && greedy[1] <= 0.1 * deepseek[1], "{greedy:?} {deepseek:?}");
}
