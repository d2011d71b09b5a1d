//! The rules of a plan: shape, experts, no expert lost or doubled, ranks that drain or are lost, pins, moves, budget.

use super::{Fault, Layers, below, finite, length, not_negative, text, within};
use crate::contract::EMPTY;
use crate::contract::placer::{Change, Plan, Request};
use crate::contract::types::{Layer, PinKind, RankState};

/// Checks a plan against the request that it answers.
///
/// # Errors
/// The first rule that it breaks.
pub fn placement(request: &Request, plan: &Plan) -> Result<(), Fault> {
    text("the explanation", &plan.explanation)?;
    let mut layers = Layers::of(&request.layers);
    let budget = &request.budget;
    let mut moves = 0_u64;
    for change in &plan.changes {
        let layer = layers.take(change.layer)?;
        let arrivals = check_change(request, layer, change)?.len() as u64;
        let what = format!("moves in layer {}", change.layer);
        within(&what, arrivals, budget.moves_per_layer.map(u64::from))?;
        moves += arrivals;
    }
    within("layers changed", plan.changes.len() as u64, budget.layers.map(u64::from))?;
    within("bytes moved", moves.saturating_mul(request.model.expert_bytes), budget.bytes)
}

/// (expert, rank) of what comes to a rank: its moves.
type Arrivals = Vec<(u32, u32)>;

fn check_change(request: &Request, layer: &Layer, change: &Change) -> Result<Arrivals, Fault> {
    let id = layer.id;
    length(&format!("the placement of layer {id}"), change.placement.len(), layer.placement.len())?;
    let per_rank = request.topology.slots_per_rank as usize;
    let mut has_slot = vec![false; request.model.experts as usize];
    let mut arrivals = Vec::new();
    let rows =
        change.placement.chunks(per_rank.max(1)).zip(layer.placement.chunks(per_rank.max(1)));
    for ((number, (row, before)), rank) in (0_u32..).zip(rows).zip(&request.topology.ranks) {
        for &expert in &held(id, number, row, has_slot.len())? {
            let new = !before.contains(&expert);
            let problem = match rank.state {
                RankState::Active => None,
                RankState::Draining => new.then_some("drains"),
                RankState::Lost => Some("is lost"),
            };
            if let Some(problem) = problem {
                let problem = problem.to_owned();
                return Err(Fault::Rank { layer: id, expert, rank: number, problem });
            }
            has_slot[expert as usize] = true;
            if new {
                arrivals.push((expert, number));
            }
        }
    }
    if let Some((expert, _)) = (0_u32..).zip(&has_slot).find(|(_, has)| !**has) {
        return Err(Fault::Lost { layer: id, expert });
    }
    check_pins(request, id, change)?;
    check_moves(request, layer, change, &arrivals)?;
    not_negative("max-over-mean before", change.max_over_mean.before)?;
    not_negative("max-over-mean after", change.max_over_mean.after)?;
    if let Some(milliseconds) = &change.milliseconds {
        not_negative("milliseconds before", milliseconds.before)?;
        not_negative("milliseconds after", milliseconds.after)?;
    }
    Ok(arrivals)
}

/// The experts of one rank, each once.
fn held(layer: u32, rank: u32, row: &[u32], experts: usize) -> Result<Vec<u32>, Fault> {
    let mut held = Vec::with_capacity(row.len());
    for (slot, &expert) in row.iter().enumerate().filter(|(_, expert)| **expert != EMPTY) {
        if expert as usize >= experts {
            below(&format!("layer {layer}: slot {slot} of rank {rank}"), expert, experts)?;
        }
        if held.contains(&expert) {
            return Err(Fault::Duplicate { layer, rank, expert });
        }
        held.push(expert);
    }
    Ok(held)
}

fn check_pins(request: &Request, layer: u32, change: &Change) -> Result<(), Fault> {
    let per_rank = request.topology.slots_per_rank as usize;
    let of_layer = request.pins.iter().filter(|pin| pin.layer.is_none_or(|own| own == layer));
    for pin in of_layer {
        let row = change.placement.chunks(per_rank.max(1)).nth(pin.rank as usize);
        let has = row.unwrap_or_default().contains(&pin.expert);
        let problem = match pin.kind {
            PinKind::Must if !has => "lacks",
            PinKind::Never if has => "may not have",
            PinKind::Must | PinKind::Never => continue,
        };
        let (expert, rank, problem) = (pin.expert, pin.rank, problem.to_owned());
        return Err(Fault::Pin { layer, expert, rank, problem });
    }
    Ok(())
}

/// What is said of moves must be true of the placement; not every move needs a reason.
fn check_moves(
    request: &Request,
    layer: &Layer,
    change: &Change,
    arrivals: &Arrivals,
) -> Result<(), Fault> {
    let per_rank = request.topology.slots_per_rank as usize;
    let mut told = Vec::with_capacity(change.moves.len());
    for named in &change.moves {
        let (expert, rank) = (named.expert, named.destination);
        let fault = |problem: &str| {
            Err(Fault::Move { layer: layer.id, expert, rank, problem: problem.to_owned() })
        };
        if !arrivals.contains(&(expert, rank)) {
            return fault("is not made by the placement");
        }
        if told.contains(&(expert, rank)) {
            return fault("is named twice");
        }
        told.push((expert, rank));
        if let Some(source) = named.source {
            let row = layer.placement.chunks(per_rank.max(1)).nth(source as usize);
            if !row.unwrap_or_default().contains(&expert) {
                return fault(&format!("names rank {source} as its source, which lacks it"));
            }
        }
        finite("the gain of a move", named.gain)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::placer::{Comparison, Move, Purpose};
    use crate::contract::types::Pin;
    use crate::example;

    /// Brings a third replica of expert 0 into the empty slot of rank 1.
    fn good() -> (Request, Plan) {
        let request = example::placement("{}");
        let mut placement = request.layers[0].placement.clone();
        placement[5] = 0;
        let change = Change {
            layer: 1,
            placement,
            moves: vec![Move {
                expert: 0,
                source: Some(0),
                destination: 1,
                purpose: Purpose::Replicate,
                gain: 0.2,
            }],
            max_over_mean: Comparison { before: 1.8, after: 1.6 },
            milliseconds: Some(Comparison { before: 0.9, after: 0.8 }),
        };
        (request, Plan { changes: vec![change], explanation: "one layer".to_owned() })
    }

    fn broken(alter: impl FnOnce(&mut Request, &mut Plan)) -> String {
        let (mut request, mut plan) = good();
        alter(&mut request, &mut plan);
        placement(&request, &plan).unwrap_err().to_string()
    }

    #[test]
    fn a_good_plan_passes() {
        let (mut request, mut plan) = good();
        assert_eq!(placement(&request, &plan), Ok(()));
        // Reasons are for those who have one.
        plan.changes[0].moves.clear();
        assert_eq!(placement(&request, &plan), Ok(()));
        // What a rank that drains has may stay, and what fits a budget exactly fits.
        request.topology.ranks[0].state = RankState::Draining;
        request.budget.moves_per_layer = Some(1);
        request.budget.bytes = Some(request.model.expert_bytes);
        assert_eq!(placement(&request, &plan), Ok(()));
    }

    #[test]
    fn each_rule_is_named_when_broken() {
        let broken_at = |slot: usize, expert| broken(|_, p| p.changes[0].placement[slot] = expert);
        let cases = [
            (broken_at(0, 8), "layer 1: slot 0 of rank 0 is 8, expected less than 8"),
            (broken_at(2, 1), "layer 1: rank 0 has two replicas of expert 1"),
            (broken_at(1, EMPTY), "layer 1: expert 1 has no slot"),
            (
                broken(|_, p| p.changes[0].placement.truncate(11)),
                "the placement of layer 1 has 11 entries, expected 12",
            ),
            (broken(|_, p| p.changes.extend(good().1.changes)), "layer 1 is named twice"),
            (broken(|_, p| p.changes[0].layer = 2), "layer 2 was not asked about"),
            (
                broken(|_, p| p.explanation.clear()),
                "the explanation has 0 bytes, expected 1 to 4096",
            ),
            (
                broken(|_, p| p.changes[0].max_over_mean.after = f32::NAN),
                "max-over-mean after is NaN, expected a finite number of at least 0",
            ),
            (
                broken(|_, p| p.changes[0].milliseconds.as_mut().unwrap().before = -1.0),
                "milliseconds before is -1, expected a finite number of at least 0",
            ),
        ];
        for (found, expected) in cases {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_is_said_of_moves_is_held_against_the_placement() {
        let of_move = "layer 1: the move of expert 0 to rank 1";
        let found = broken(|_, p| p.changes[0].placement[5] = EMPTY);
        assert_eq!(found, format!("{of_move} is not made by the placement"));
        let again = || good().1.changes.remove(0).moves;
        let found = broken(|_, p| p.changes[0].moves.extend(again()));
        assert_eq!(found, format!("{of_move} is named twice"));
        let found = broken(|_, p| p.changes[0].moves[0].source = Some(2));
        assert_eq!(found, format!("{of_move} names rank 2 as its source, which lacks it"));
        let found = broken(|_, p| p.changes[0].moves[0].gain = f32::INFINITY);
        assert_eq!(found, "the gain of a move is inf, expected a finite number");
    }

    #[test]
    fn budgets_pins_and_the_states_of_ranks_bind() {
        let found = broken(|r, _| r.budget.moves_per_layer = Some(0));
        assert_eq!(found, "moves in layer 1: 1, the budget is 0");
        let found = broken(|r, _| r.budget.bytes = Some(r.model.expert_bytes - 1));
        assert!(found.starts_with("bytes moved: "), "{found}");
        let found = broken(|r, _| r.budget.layers = Some(0));
        assert_eq!(found, "layers changed: 1, the budget is 0");
        let pin = |layer, kind| Pin { layer, expert: 7, rank: 0, kind };
        let found = broken(|r, _| r.pins = vec![pin(None, PinKind::Must)]);
        assert_eq!(found, "layer 1: rank 0 lacks expert 7");
        let never = Pin { expert: 0, ..pin(Some(1), PinKind::Never) };
        let found = broken(|r, _| r.pins = vec![never]);
        assert_eq!(found, "layer 1: rank 0 may not have expert 0");
        let (mut request, plan) = good();
        request.pins = vec![pin(Some(3), PinKind::Must)];
        assert_eq!(placement(&request, &plan), Ok(()), "a pin of another layer");
        let found = broken(|r, _| r.topology.ranks[1].state = RankState::Draining);
        assert_eq!(found, "layer 1: expert 0 is placed on rank 1, which drains");
        let found = broken(|r, _| r.topology.ranks[0].state = RankState::Lost);
        assert_eq!(found, "layer 1: expert 0 is placed on rank 0, which is lost");
    }
}
