//! Worked examples of costs, estimates and the greedy planner.

use planning::cost::{PhaseLoad, Point, RankCost, Roofline, predict};
use planning::estimate::{Memory, overlap, weights};
use planning::greedy::{Change, Objective, Options, Ranks, Use, plan_layer};
use planning::layer::{EMPTY, PlanError, Shape, max_over_mean, moved, rank_loads};

const PAIRS: RankCost = RankCost::Pairs { ms_per_pair: 1.0 };

fn phase<'a>(pairs: &'a [f64], cost: &'a RankCost) -> PhaseLoad<'a> {
    PhaseLoad { pairs, tokens: 1024, weight: 1.0, cost }
}

#[test]
fn one_swap_is_enough_and_says_why() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let load = [10.0, 10.0, 1.0, 1.0];
    let plan = plan_layer(
        shape,
        &[0, 1, 2, 3],
        &[phase(&load, &PAIRS)],
        &Ranks::default(),
        &Options::default(),
    )
    .unwrap();
    assert_eq!(plan.slots, [2, 1, 0, 3]);
    assert_eq!(plan.steps.len(), 1);
    assert_eq!(plan.steps[0].change, Change::Swap { slots: [0, 2], experts: [0, 2] });
    assert_eq!((plan.before_ms, plan.after_ms, plan.even_ms), (20.0, 11.0, 11.0));
    assert_eq!(plan.moved(&[0, 1, 2, 3], 2), 2);
}

#[test]
fn nothing_moves_within_the_dead_zone() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let load = [10.0, 10.0, 9.0, 9.0];
    let plan = plan_layer(
        shape,
        &[0, 1, 2, 3],
        &[phase(&load, &PAIRS)],
        &Ranks::default(),
        &Options::default(),
    )
    .unwrap();
    assert!(plan.steps.is_empty());
    let strict = Options { dead_zone: 1.0, ..Options::default() };
    let plan =
        plan_layer(shape, &[0, 1, 2, 3], &[phase(&load, &PAIRS)], &Ranks::default(), &strict)
            .unwrap();
    assert_eq!(max_over_mean(&rank_loads(&plan.slots, 2, &load)), 1.0);
}

#[test]
fn a_redundant_slot_takes_a_replica_of_the_hot_expert() {
    let shape = Shape { experts: 3, ranks: 2, slots_per_rank: 2 };
    // Expert 2 is replicated for nothing; expert 0 is hot.
    let load = [100.0, 10.0, 10.0];
    let plan = plan_layer(
        shape,
        &[0, 2, 1, 2],
        &[phase(&load, &PAIRS)],
        &Ranks::default(),
        &Options::default(),
    )
    .unwrap();
    assert_eq!(plan.steps[0].change, Change::Replicate { slot: 3, dropped: 2, expert: 0 });
    assert_eq!(plan.slots, [0, 2, 1, 0]);
    assert_eq!(moved(&[0, 2, 1, 2], &plan.slots, 2), 1);
}

#[test]
fn a_slow_rank_gets_less() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let load = [9.0, 3.0, 9.0, 3.0];
    let options = Options { dead_zone: 1.0, ..Options::default() };
    let plan = plan_layer(
        shape,
        &[0, 1, 2, 3],
        &[phase(&load, &PAIRS)],
        &Ranks { speeds: &[0.5, 1.0], ..Ranks::default() },
        &options,
    )
    .unwrap();
    let loads = rank_loads(&plan.slots, 2, &load);
    assert_eq!(loads, [6.0, 18.0]);
}

#[test]
fn decode_that_is_bound_by_weights_is_left_alone() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let cost =
        RankCost::Roofline(Roofline { fixed_ms: 0.0, ms_per_active: 1.0, ms_per_pair: 0.01 });
    let load = [20.0, 20.0, 10.0, 10.0];
    let plan = plan_layer(
        shape,
        &[0, 1, 2, 3],
        &[phase(&load, &cost)],
        &Ranks::default(),
        &Options::default(),
    )
    .unwrap();
    assert!(plan.steps.is_empty(), "every rank reads two experts either way");
    let pairs = plan_layer(
        shape,
        &[0, 1, 2, 3],
        &[phase(&load, &PAIRS)],
        &Ranks::default(),
        &Options::default(),
    );
    assert_eq!(pairs.unwrap().steps.len(), 1);
}

#[test]
fn pins_stay_and_draining_ranks_get_nothing_new() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 3 };
    let load = [10.0, 10.0, 1.0, 1.0];
    let current = [0, 1, EMPTY, 2, 3, EMPTY];
    let options = Options { dead_zone: 1.0, ..Options::default() };
    let plan = |ranks: &Ranks<'_>| {
        plan_layer(shape, &current, &[phase(&load, &PAIRS)], ranks, &options).unwrap()
    };
    let must = [(0, 0), (1, 0)];
    let pinned = plan(&Ranks { must: &must, ..Ranks::default() });
    assert!(pinned.slots[..3].contains(&0) && pinned.slots[..3].contains(&1));
    assert!(pinned.after_ms < pinned.before_ms);
    let kept_out = plan(&Ranks { never: &[(0, 1), (1, 1)], ..Ranks::default() });
    assert!(kept_out.slots[3..].iter().all(|expert| *expert > 1), "{:?}", kept_out.slots);
    let drained = plan(&Ranks { uses: &[Use::Draining, Use::Active], ..Ranks::default() });
    assert!(drained.slots[..3].iter().all(|e| current[..3].contains(e)), "{:?}", drained.slots);
    assert!(drained.after_ms < drained.before_ms);
    let stuck = plan(&Ranks { uses: &[Use::Active, Use::Draining], ..Ranks::default() });
    assert_eq!(stuck.slots, current);
}

#[test]
fn a_lost_rank_is_no_part_of_the_mean() {
    let shape = Shape { experts: 4, ranks: 3, slots_per_rank: 2 };
    let load = [10.0, 10.0, 9.0, 9.0];
    let slots = [0, 1, 2, 3, EMPTY, EMPTY];
    let ranks = Ranks { uses: &[Use::Active, Use::Active, Use::Lost], ..Ranks::default() };
    let plan = plan_layer(shape, &slots, &[phase(&load, &PAIRS)], &ranks, &Options::default());
    let plan = plan.unwrap();
    assert_eq!((plan.even_ms, plan.steps.len()), (19.0, 0));
}

#[test]
fn the_worst_workload_counts_when_any_may_come() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let (day, night) = ([4.0, 4.0, 1.0, 1.0], [1.0, 4.0, 4.0, 1.0]);
    let loads = [phase(&day, &PAIRS), phase(&night, &PAIRS)];
    let options = Options { dead_zone: 1.0, objective: Objective::Worst, ..Options::default() };
    let plan = plan_layer(shape, &[0, 1, 2, 3], &loads, &Ranks::default(), &options).unwrap();
    // Experts 1 apart from 0 and from 2: no workload has two loaded experts on a rank.
    assert_eq!((plan.before_ms, plan.after_ms), (8.0, 5.0));
}

#[test]
fn invalid_current_placements_are_refused() {
    let shape = Shape { experts: 3, ranks: 2, slots_per_rank: 2 };
    let load = [1.0; 3];
    let plan = |slots: &[u32]| {
        plan_layer(shape, slots, &[phase(&load, &PAIRS)], &Ranks::default(), &Options::default())
            .unwrap_err()
    };
    assert_eq!(plan(&[0, 0, 1, 2]), PlanError::Placement { expert: 0 });
    assert_eq!(plan(&[0, 1, 1, 0]), PlanError::Placement { expert: 2 });
    assert_eq!(plan(&[0, 1, 2]), PlanError::Length { of: "slots", length: 3, expected: 4 });
    assert_eq!(plan(&[0, 1, 2, 7]), PlanError::UnknownExpert { slot: 3, expert: 7, experts: 3 });
}

#[test]
fn limits_are_found_in_measurements_of_both_sides() {
    let limits = Roofline { fixed_ms: 0.02, ms_per_active: 0.01, ms_per_pair: 0.001 };
    let sizes = [(1.0, 1.0), (8.0, 6.0), (64.0, 8.0), (512.0, 8.0), (4096.0, 8.0)];
    let points = sizes.map(|(pairs, active)| Point { pairs, active, ms: limits.ms(pairs, active) });
    let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * b.max(1.0), "{a} {b}");
    for (pairs, active) in [(1.0, 1.0), (30.0, 7.0), (1000.0, 8.0), (20_000.0, 8.0)] {
        close(Roofline::fit(&points).unwrap().ms(pairs, active), limits.ms(pairs, active));
    }
    // Noise moves them little, and nothing becomes negative.
    let noisy = [1.03, 0.98, 1.01, 0.97, 1.02];
    let noisy: Vec<Point> =
        points.iter().zip(noisy).map(|(p, noise)| Point { ms: p.ms * noise, ..*p }).collect();
    let found = Roofline::fit(&noisy).unwrap();
    assert!((found.ms(1000.0, 8.0) / limits.ms(1000.0, 8.0) - 1.0).abs() < 0.05, "{found:?}");
    let falling =
        [Point { pairs: 1.0, active: 1.0, ms: 2.0 }, Point { pairs: 9.0, active: 9.0, ms: 1.0 }];
    let found = Roofline::fit(&falling).unwrap();
    assert!(found.ms(9.0, 9.0) >= found.ms(1.0, 1.0), "{found:?}");
    assert!(Roofline::fit(&[]).is_none());
    let one = Roofline::fit(&[Point { pairs: 3.0, active: 1.0, ms: 5.0 }]).unwrap();
    close(one.ms(3.0, 1.0), 5.0);
}

#[test]
fn active_experts_are_expectations() {
    // One token in two picks the expert; a call of two tokens meets it three times out of four.
    let cost = RankCost::Roofline(Roofline { fixed_ms: 0.0, ms_per_active: 1.0, ms_per_pair: 0.0 });
    let load = PhaseLoad { pairs: &[1.0, 0.0], tokens: 2, weight: 1.0, cost: &cost };
    let prediction = predict(&[0, 1], 1, &load, &[]);
    assert_eq!(prediction.rank_ms, [0.75, 0.0]);
    assert_eq!((prediction.call_ms, prediction.even_ms), (0.75, 0.375));
    // A replica halves the chance, so both ranks read it less often, but together more.
    let replicated = predict(&[0, 1, 0, 1], 2, &load, &[]);
    assert_eq!(replicated.rank_ms, [0.4375, 0.4375]);
}

#[test]
fn estimates_forget_what_was_before_a_drift() {
    let old = [900.0, 50.0, 50.0, 0.0];
    let new = [0.0, 50.0, 50.0, 900.0];
    let similar = [880.0, 60.0, 60.0, 0.0];
    let memory = Memory { decay: 0.5, overlap_min: 0.8 };
    assert_eq!(weights(&[&old, &old, &new], &memory), [1.0]);
    assert_eq!(weights(&[&new, &old, &similar], &memory), [1.0, 0.5]);
    assert_eq!(weights(&[&old, &old, &old], &memory), [1.0, 0.5, 0.25]);
    assert_eq!(overlap(&[1.0, 0.0], &[0.0, 5.0]), 0.0);
    assert_eq!(overlap(&[20.0, 12.0, 20.0, 12.0], &[12.0, 20.0, 8.0, 24.0]), 0.6875);
    assert!(weights(&[], &memory).is_empty());
}

#[test]
fn a_nearly_empty_window_does_not_hide_full_ones() {
    let full = [9000.0, 500.0, 500.0, 0.0];
    let padding = [0.0, 0.0, 0.0, 4.0];
    assert_eq!(weights(&[&full, &full, &padding], &Memory::default()).len(), 3);
}

#[test]
fn small_windows_differ_by_chance() {
    // Of 64 pairs over four experts chance takes 0.14 of the overlap; of a hundred times as many, 0.014.
    let left = [20.0, 12.0, 20.0, 12.0];
    let right = [12.0, 20.0, 8.0, 24.0];
    let memory = Memory { decay: 1.0, overlap_min: 0.8 };
    assert_eq!(weights(&[&left, &right], &memory).len(), 2);
    let many = |loads: [f32; 4]| loads.map(|n| n * 100.0);
    assert_eq!(weights(&[&many(left), &many(right)], &memory).len(), 1);
}
