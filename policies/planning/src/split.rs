//! Shares of an expert's tokens over its replicas: even ranks first, then as local as evenness allows.
//! Moves no expert.

use alloc::vec;
use alloc::vec::Vec;

use crate::cost::speed;
use crate::layer::EMPTY;

/// Rounds of levelling. Each lets every replicated expert fill its ranks up anew; loads settle within
/// a few, and a bound keeps the time known.
const ROUNDS: usize = 32;

/// One layer to split.
#[derive(Debug, Clone, Copy)]
pub struct SplitProblem<'a> {
    /// Expert of every slot.
    pub slots: &'a [u32],
    /// Slots of each rank.
    pub slots_per_rank: usize,
    /// Load by the rank that it comes from, [ranks][experts].
    pub sources: &'a [Vec<f64>],
    /// Relative speeds; an empty list stands for 1 everywhere.
    pub speeds: &'a [f64],
    /// Node of each rank; an empty list stands for one node.
    pub nodes: &'a [u32],
}

/// Shares by source, expert and replica (slots ascending), each expert's adding up to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares {
    /// [sources][experts][replicas].
    pub share: Vec<Vec<Vec<f64>>>,
    /// Fullest rank over the level were all even, by load over speed, with these shares.
    pub max_over_mean: f64,
    /// Share of all load that stays on its rank.
    pub local: f64,
}

/// Splits as locally as `max_over_mean` allows; where even balance is beyond it, evenly.
///
/// Two extremes are computed: every source keeps to its own rank, else to its node; and the ranks are
/// levelled whatever the way. Loads are linear in between, so the most local mixture within the bound
/// is one division away.
#[must_use]
pub fn split(problem: &SplitProblem<'_>, max_over_mean: f64) -> Shares {
    let experts = problem.sources.iter().map(Vec::len).max().unwrap_or(0);
    let holders = holders(problem, experts);
    let near = nearest(problem, &holders);
    let level = level(problem, &holders);
    let (near_loads, level_loads) =
        (loads(problem, &holders, &near), loads(problem, &holders, &level));
    let total: f64 = problem.sources.iter().flatten().sum();
    let speeds: f64 = (0..problem.sources.len()).map(|rank| speed(problem.speeds, rank)).sum();
    let mean = if speeds > 0.0 { total / speeds } else { 0.0 };
    let bound = level_loads.iter().copied().fold(mean * max_over_mean, f64::max);
    // The smallest part of `level` that brings every rank within the bound.
    let mut part = 0.0_f64;
    for (near, level) in near_loads.iter().zip(&level_loads) {
        if *near > bound && near > level {
            part = part.max((near - bound) / (near - level));
        }
    }
    let mix = |near: &f64, level: &f64| near + part.min(1.0) * (level - near);
    let share: Vec<Vec<Vec<f64>>> = near
        .iter()
        .zip(&level)
        .map(|(near, level)| {
            let rows = near.iter().zip(level);
            rows.map(|(n, l)| n.iter().zip(l).map(|(n, l)| mix(n, l)).collect()).collect()
        })
        .collect();
    let loads = loads(problem, &holders, &share);
    let fullest = loads.iter().copied().fold(0.0, f64::max);
    let local = local(problem, &holders, &share);
    Shares { share, max_over_mean: if mean > 0.0 { fullest / mean } else { 1.0 }, local }
}

/// Ranks that hold each expert, by slot.
fn holders(problem: &SplitProblem<'_>, experts: usize) -> Vec<Vec<usize>> {
    let mut holders = vec![Vec::new(); experts];
    for (slot, &expert) in problem.slots.iter().enumerate().filter(|(_, e)| **e != EMPTY) {
        if let Some(ranks) = holders.get_mut(expert as usize) {
            ranks.push(slot / problem.slots_per_rank.max(1));
        }
    }
    holders
}

fn nearest(problem: &SplitProblem<'_>, holders: &[Vec<usize>]) -> Vec<Vec<Vec<f64>>> {
    let node = |rank: usize| problem.nodes.get(rank).copied().unwrap_or(0);
    let row = |source: usize, ranks: &Vec<usize>| {
        let own: Vec<bool> = ranks.iter().map(|rank| *rank == source).collect();
        let same: Vec<bool> = ranks.iter().map(|rank| node(*rank) == node(source)).collect();
        let all = vec![true; ranks.len()];
        let chosen = [own, same, all].into_iter().find(|set| set.contains(&true));
        let chosen = chosen.unwrap_or_default();
        let count = chosen.iter().filter(|near| **near).count().max(1) as f64;
        chosen.into_iter().map(|near| if near { 1.0 / count } else { 0.0 }).collect()
    };
    (0..problem.sources.len())
        .map(|source| holders.iter().map(|ranks| row(source, ranks)).collect())
        .collect()
}

/// The same shares for every source: experts in turn take their load off their ranks and pour it back
/// onto the emptiest of them.
fn level(problem: &SplitProblem<'_>, holders: &[Vec<usize>]) -> Vec<Vec<Vec<f64>>> {
    let ranks = problem.sources.len();
    let total =
        |expert: usize| -> f64 { problem.sources.iter().filter_map(|row| row.get(expert)).sum() };
    let mut amounts: Vec<Vec<f64>> = (0..holders.len())
        .map(|e| vec![total(e) / holders[e].len().max(1) as f64; holders[e].len()])
        .collect();
    let mut load = vec![0.0; ranks];
    for (amounts, ranks) in amounts.iter().zip(holders) {
        amounts.iter().zip(ranks).for_each(|(amount, rank)| load[*rank] += amount);
    }
    for _ in 0..ROUNDS {
        for (expert, ranks) in holders.iter().enumerate().filter(|(_, ranks)| ranks.len() > 1) {
            ranks.iter().zip(&amounts[expert]).for_each(|(rank, amount)| load[*rank] -= amount);
            let levels: Vec<(f64, f64)> =
                ranks.iter().map(|rank| (load[*rank], speed(problem.speeds, *rank))).collect();
            amounts[expert] = pour(&levels, total(expert));
            ranks.iter().zip(&amounts[expert]).for_each(|(rank, amount)| load[*rank] += amount);
        }
    }
    let share = |amounts: &Vec<f64>| -> Vec<f64> {
        let sum: f64 = amounts.iter().sum();
        let even = 1.0 / amounts.len().max(1) as f64;
        amounts.iter().map(|amount| if sum > 0.0 { amount / sum } else { even }).collect()
    };
    vec![amounts.iter().map(share).collect(); ranks]
}

/// Pours `amount` into vessels of (content, width) so that the fullest level stays lowest.
fn pour(vessels: &[(f64, f64)], amount: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..vessels.len()).collect();
    let level = |index: usize| vessels[index].0 / vessels[index].1;
    order.sort_by(|a, b| level(*a).total_cmp(&level(*b)));
    let (mut content, mut width, mut surface) = (amount, 0.0, 0.0);
    for &index in &order {
        if width > 0.0 && content / width <= level(index) {
            break;
        }
        content += vessels[index].0;
        width += vessels[index].1;
        surface = content / width;
    }
    let fill = |(held, width): &(f64, f64)| f64::max(surface * width - held, 0.0);
    vessels.iter().map(fill).collect()
}

/// Load over speed of each rank.
fn loads(problem: &SplitProblem<'_>, holders: &[Vec<usize>], share: &[Vec<Vec<f64>>]) -> Vec<f64> {
    let mut loads = vec![0.0; problem.sources.len()];
    for (source, rows) in problem.sources.iter().zip(share) {
        for ((load, shares), ranks) in source.iter().zip(rows).zip(holders) {
            let parts = ranks.iter().zip(shares);
            parts.for_each(|(rank, s)| loads[*rank] += load * s / speed(problem.speeds, *rank));
        }
    }
    loads
}

fn local(problem: &SplitProblem<'_>, holders: &[Vec<usize>], share: &[Vec<Vec<f64>>]) -> f64 {
    let (mut stays, mut all) = (0.0, 0.0);
    for (rank, (source, rows)) in problem.sources.iter().zip(share).enumerate() {
        for ((load, shares), ranks) in source.iter().zip(rows).zip(holders) {
            let own = ranks.iter().zip(shares).filter(|(holder, _)| **holder == rank);
            stays += load * own.map(|(_, share)| share).sum::<f64>();
            all += load;
        }
    }
    if all > 0.0 { stays / all } else { 1.0 }
}
