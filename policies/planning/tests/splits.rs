//! Worked examples and properties of splits and of choices.

use planning::choose::{Choice, Timing, fastest};
use planning::layer::EMPTY;
use planning::split::{SplitProblem, split};
use proptest::prelude::*;

fn problem<'a>(slots: &'a [u32], sources: &'a [Vec<f64>]) -> SplitProblem<'a> {
    let slots_per_rank = slots.len() / sources.len();
    SplitProblem { slots, slots_per_rank, sources, speeds: &[], nodes: &[] }
}

#[test]
fn tokens_stay_where_a_replica_is_when_that_is_even() {
    let sources = [vec![10.0, 4.0], vec![10.0, 4.0]];
    let shares = split(&problem(&[0, 1, 0, 1], &sources), 1.1);
    assert_eq!(shares.share[0], [vec![1.0, 0.0], vec![1.0, 0.0]]);
    assert_eq!(shares.share[1], [vec![0.0, 1.0], vec![0.0, 1.0]]);
    assert_eq!((shares.local, shares.max_over_mean), (1.0, 1.0));
}

#[test]
fn only_as_much_leaves_as_evenness_demands() {
    // Rank 0 brings everything; both ranks hold expert 0.
    let sources = [vec![100.0], vec![0.0]];
    let shares = split(&problem(&[0, 0], &sources), 1.2);
    assert!((shares.max_over_mean - 1.2).abs() < 1e-9, "{shares:?}");
    assert!((shares.share[0][0][0] - 0.6).abs() < 1e-9, "{shares:?}");
    let even = split(&problem(&[0, 0], &sources), 1.0);
    assert!((even.share[0][0][0] - 0.5).abs() < 1e-9, "{even:?}");
}

#[test]
fn a_slow_rank_gets_a_smaller_share() {
    let sources = [vec![30.0], vec![30.0]];
    let slow = SplitProblem { speeds: &[1.0, 0.5], ..problem(&[0, 0], &sources) };
    let shares = split(&slow, 1.0);
    // 40 on the fast one and 20 on the slow one take equally long.
    let fast: f64 = shares.share.iter().map(|rows| 30.0 * rows[0][0]).sum();
    assert!((fast - 40.0).abs() < 1e-6, "{shares:?}");
}

#[test]
fn a_node_is_nearer_than_the_rest() {
    let sources = vec![vec![1.0]; 4];
    let far = SplitProblem { nodes: &[0, 0, 1, 1], ..problem(&[EMPTY, 0, EMPTY, 0], &sources) };
    let shares = split(&far, 4.0);
    assert_eq!(shares.share[0][0], [1.0, 0.0]);
    assert_eq!(shares.share[2][0], [0.0, 1.0]);
}

proptest! {
    #[test]
    fn shares_add_up_and_are_never_less_even_than_the_bound_or_an_even_split(
        loads in proptest::collection::vec(proptest::collection::vec(0.0_f64..100.0, 6), 3),
        bound in 1.0_f64..2.0,
    ) {
        let slots = [0, 1, 2, 3, 2, 3, 4, 0, 5, 0, 4, 1];
        let shares = split(&problem(&slots, &loads), bound);
        for rows in shares.share.iter().flatten() {
            prop_assert!((rows.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(rows.iter().all(|share| *share >= 0.0));
        }
        let total: Vec<f64> = (0..6).map(|e| loads.iter().map(|row| row[e]).sum()).collect();
        let ranks = planning::layer::rank_loads(&slots, 4, &total);
        let even = planning::layer::max_over_mean(&ranks);
        prop_assert!(shares.max_over_mean <= bound.max(even) + 1e-6, "{shares:?} {even}");
        prop_assert_eq!(split(&problem(&slots, &loads), bound), shares);
    }
}

#[test]
fn the_fastest_wins_beyond_the_margin() {
    let time = |candidate, tokens, us| Timing { candidate, tokens, us };
    let timings = [time(0, 8, 10.0), time(0, 16, 20.0), time(1, 8, 9.5), time(1, 16, 12.0)];
    let choose = |tokens, previous| fastest(&timings, 3, tokens, previous, 0.1);
    let measured = 2;
    assert_eq!(
        choose(16, Some(0)),
        Choice { candidate: 1, us: Some(12.0), previous_us: Some(20.0), measured }
    );
    // 9.5 instead of 10 is within the margin.
    assert_eq!(
        choose(8, Some(0)),
        Choice { candidate: 0, us: Some(10.0), previous_us: None, measured }
    );
    assert_eq!(choose(8, None).candidate, 1);
    // Between the sizes measured, and beyond them.
    assert_eq!(choose(12, None).us, Some(10.75));
    assert_eq!(choose(99, None).us, Some(12.0));
    // Candidate 2 was never measured: another that was replaces it.
    assert_eq!(choose(8, Some(2)).candidate, 1);
    let none = Choice { candidate: 2, us: None, previous_us: None, measured: 0 };
    assert_eq!(fastest(&[], 3, 8, Some(2), 0.1), none);
    assert_eq!(fastest(&[], 3, 8, Some(7), 0.1).candidate, 0);
}
