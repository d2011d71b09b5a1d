//! Plans of few steps for many layers: what must be settled first, then the steps of [`planning::greedy`], within a budget,
//! most valuable layers first. What is expected of a layer, and what a step must gain, is the policy's.

use planning::cost::{PhaseLoad, predict};
use planning::greedy::{Change as StepChange, LayerPlan, Objective, Options, plan_layer};
use planning::layer::{EMPTY, Row, moved, rank_loads};
use planning::settle::{Arrival, Unsettled, Why, settle};

use crate::group::{Group, Pins, invalid};
use crate::load::{Costs, Expected};
use crate::placement::placer::{Change, Comparison, Move, Purpose};
use crate::plan::Purse;
use crate::types::{Error, Layer};

/// A layer, and what is known of it.
#[derive(Debug, Clone)]
pub struct Work<'a> {
    /// The layer.
    pub layer: &'a Layer,
    /// Its pins.
    pub pins: Pins,
    /// What is expected of it.
    pub loads: Vec<Expected>,
    /// What a unit of each load's cost counts; its calls if not given.
    pub weights: Option<Vec<f64>>,
    /// When to stop.
    pub options: Options,
}

/// What became of all layers.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Layers that change, most valuable first.
    pub changes: Vec<Change>,
    /// Moves of all of them.
    pub moves: usize,
    /// Layers that the budget cut short or left out.
    pub cut: usize,
    /// Experts that could not leave draining ranks.
    pub left: usize,
    /// Layers of which no placement could be made, with the reason.
    pub unsettled: Vec<(u32, Unsettled)>,
}

/// One layer's plan.
struct Found {
    arrivals: Vec<Arrival>,
    left: usize,
    plan: LayerPlan,
}

impl Found {
    fn gain(&self) -> f64 {
        self.plan.before_ms - self.plan.after_ms
    }
}

/// Plans all layers.
///
/// # Errors
/// [`Error::InvalidInput`] for loads that are none.
pub fn plan_layers(
    group: &Group,
    costs: &Costs,
    works: &[Work<'_>],
    mut purse: Purse,
) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut found = Vec::with_capacity(works.len());
    for work in works {
        let Some(moves_max) = purse.moves() else { break };
        match plan(group, costs, work, moves_max)? {
            Ok(layer) => found.push((layer, work)),
            Err(unsettled) => outcome.unsettled.push((work.layer.id, unsettled)),
        }
    }
    // What must be settled comes first, whatever it costs.
    found.sort_by(|(a, _), (b, _)| {
        b.arrivals.len().cmp(&a.arrivals.len()).then(b.gain().total_cmp(&a.gain()))
    });
    let per_rank = group.shape.slots_per_rank;
    for (mut layer, work) in found {
        outcome.left += layer.left;
        let before = &work.layer.placement;
        if layer.plan.slots == *before {
            continue;
        }
        let Some(affordable) = purse.moves() else {
            outcome.cut += 1;
            continue;
        };
        if moved(before, &layer.plan.slots, per_rank) > affordable {
            outcome.cut += 1;
            match plan(group, costs, work, affordable)? {
                Ok(less) if less.plan.slots != *before => layer = less,
                _ => continue,
            }
        }
        let moves = moved(before, &layer.plan.slots, per_rank);
        if purse.pay(moves) {
            outcome.moves += moves;
            outcome.changes.push(change(group, costs, work, &layer));
        }
    }
    Ok(outcome)
}

fn plan(
    group: &Group,
    costs: &Costs,
    work: &Work<'_>,
    moves_max: usize,
) -> Result<Result<Found, Unsettled>, Error> {
    let ranks = work.pins.ranks(group);
    let mut slots = work.layer.placement.clone();
    let (arrivals, left) =
        match settle(&mut slots, group.shape, &total(group, work), &ranks, moves_max) {
            Ok(settled) => settled,
            Err(unsettled) => return Ok(Err(unsettled)),
        };
    let mut phases = costs.phases(&work.loads);
    if let Some(weights) = &work.weights {
        phases.iter_mut().zip(weights).for_each(|(phase, weight)| phase.weight = *weight);
    }
    let options = Options { moves_max: moves_max - arrivals.len(), ..work.options };
    let plan = plan_layer(group.shape, &slots, &phases, &ranks, &options)
        .map_err(|error| invalid(work.layer, &error))?;
    Ok(Ok(Found { arrivals, left, plan }))
}

/// Rows of each expert in all loads.
fn total(group: &Group, work: &Work<'_>) -> Vec<f64> {
    let mut sums = vec![0.0; group.shape.experts];
    for load in &work.loads {
        sums.iter_mut().zip(&load.pairs).for_each(|(sum, rows)| *sum += rows * load.calls);
    }
    sums
}

fn change(group: &Group, costs: &Costs, work: &Work<'_>, found: &Found) -> Change {
    let (before, after) = (&work.layer.placement, &found.plan.slots);
    let compare = |of: &dyn Fn(&[u32]) -> f64| Comparison {
        before: single(of(before)),
        after: single(of(after)),
    };
    let phases = costs.phases(&work.loads);
    let milliseconds = costs
        .cover(&work.loads)
        .then(|| compare(&|slots| milliseconds(group, &phases, work.options.objective, slots)));
    Change {
        layer: work.layer.id,
        placement: after.clone(),
        moves: moves(group, work, found),
        max_over_mean: compare(&|slots| max_over_mean(group, work, slots)),
        milliseconds,
    }
}

/// Milliseconds of a mean call; of the slowest where any workload may come.
#[must_use]
pub fn milliseconds(
    group: &Group,
    phases: &[PhaseLoad<'_>],
    objective: Objective,
    slots: &[u32],
) -> f64 {
    let call = |phase: &PhaseLoad<'_>| {
        predict(slots, group.shape.slots_per_rank, phase, &group.speeds).call_ms
    };
    match objective {
        Objective::Worst => phases.iter().map(call).fold(0.0, f64::max),
        Objective::Sum => {
            let calls: f64 = phases.iter().map(|phase| phase.weight).sum();
            phases.iter().map(|phase| phase.weight * call(phase)).sum::<f64>() / calls
        }
    }
}

/// Of all rows; of the most uneven load where any workload may come.
fn max_over_mean(group: &Group, work: &Work<'_>, slots: &[u32]) -> f64 {
    let ratio =
        |pairs: &[f64]| group.max_over_mean(&rank_loads(slots, group.shape.slots_per_rank, pairs));
    match work.options.objective {
        Objective::Sum => ratio(&total(group, work)),
        Objective::Worst => work.loads.iter().map(|load| ratio(&load.pairs)).fold(1.0, f64::max),
    }
}

/// The moves with their reasons. What several steps did to a slot is told by the last of them.
fn moves(group: &Group, work: &Work<'_>, found: &Found) -> Vec<Move> {
    let LayerPlan { slots, steps, even_ms, .. } = &found.plan;
    let mut reasons: Vec<Option<(Purpose, f64)>> = vec![None; slots.len()];
    for arrival in &found.arrivals {
        reasons[arrival.slot] = Some((of(arrival.why), 0.0));
    }
    for step in steps {
        let gain = if *even_ms > 0.0 { (step.before_ms - step.after_ms) / even_ms } else { 0.0 };
        let gain = gain / step.change.copies().max(1) as f64;
        match step.change {
            StepChange::Swap { slots, .. } => {
                slots.iter().for_each(|slot| reasons[*slot] = Some((Purpose::Spread, gain)));
            }
            StepChange::Replicate { slot, .. } => {
                reasons[slot] = Some((Purpose::Replicate, gain));
            }
        }
    }
    let (per_rank, before) = (group.shape.slots_per_rank, &work.layer.placement);
    let mut held = Row::of(before);
    let mut moves = Vec::new();
    let rows = before.chunks(per_rank).zip(slots.chunks(per_rank));
    for (rank, (old, new)) in rows.enumerate() {
        held.turn(old);
        for (slot, &expert) in (rank * per_rank..).zip(new) {
            let came = expert != EMPTY && !held.holds(expert);
            let Some((mut purpose, gain)) = reasons[slot].filter(|_| came) else { continue };
            // An expert that a step took on from where it was settled came for the first reason.
            let settled = found.arrivals.iter().find(|arrival| arrival.expert == expert);
            if let Some(arrival) = settled.filter(|arrival| slots[arrival.slot] != expert) {
                purpose = of(arrival.why);
            }
            let source = source(group, before, expert, rank);
            let (destination, gain) = (number(rank), single(gain));
            moves.push(Move { expert, source, destination, purpose, gain });
        }
    }
    moves
}

fn of(why: Why) -> Purpose {
    match why {
        Why::Repair => Purpose::Repair,
        Why::Drain => Purpose::Drain,
    }
}

/// A rank that has the expert and is there, on the destination's node if one is.
fn source(group: &Group, before: &[u32], expert: u32, destination: usize) -> Option<u32> {
    let rows = before.chunks(group.shape.slots_per_rank).enumerate();
    let holders = rows.filter(|(_, row)| row.contains(&expert)).map(|(rank, _)| rank);
    let there = holders.filter(|rank| group.uses[*rank] != planning::greedy::Use::Lost);
    let far = |rank: &usize| group.nodes[*rank] != group.nodes[destination];
    there.min_by_key(far).map(number)
}

/// Ranks are counted in u32 on the wire.
fn number(rank: usize) -> u32 {
    u32::try_from(rank).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "numbers to be shown")]
fn single(value: f64) -> f32 {
    value as f32
}
