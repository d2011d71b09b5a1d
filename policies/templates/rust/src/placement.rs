//! A placement policy to start from: in each layer the busiest expert of the fullest rank changes places with the idlest of
//! the emptiest one. The contract, and every rule of it, is in `wit`.

wit_bindgen::generate!({ path: "wit", world: "placement", generate_all });

use exports::moeplane::policy::meta::{self, Info, Issue};
use exports::moeplane::policy::placer::{self, Change, Comparison, Move, Plan, Purpose, Request};
use moeplane::policy::types::{Error, Layer, RankState};

struct MyPolicy;

export!(MyPolicy);

const EMPTY: u32 = u32::MAX;

impl meta::Guest for MyPolicy {
    fn describe() -> Info {
        Info {
            name: "my-policy".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Swaps the busiest expert of the fullest rank with an idle one.".into(),
            settings_schema: r#"{"type":"object","additionalProperties":false}"#.into(),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<Issue>> {
        if settings.trim() == "{}" {
            return Ok(());
        }
        let message = format!("got {settings}, expected {{}}: there are no settings");
        Err(vec![Issue { path: String::new(), message }])
    }
}

impl placer::Guest for MyPolicy {
    fn decide(request: Request) -> Result<Plan, Error> {
        if request.windows.is_empty() {
            return Err(Error::Decline("no window has been counted yet".into()));
        }
        let mut changes = Vec::new();
        for (index, layer) in request.layers.iter().enumerate() {
            if !affordable(&request, changes.len() as u64 + 1) {
                break;
            }
            changes.extend(improve(&request, layer, &load(&request, index)));
        }
        let explanation = format!("{} of {} layers change", changes.len(), request.layers.len());
        Ok(Plan { changes, explanation })
    }
}

/// Whether so many layers may change, with two moves in each. A plan beyond the budget is refused as a whole.
fn affordable(request: &Request, layers: u64) -> bool {
    let budget = &request.budget;
    let bytes = 2 * layers * request.model.expert_bytes;
    budget.layers.is_none_or(|most| layers <= u64::from(most))
        && budget.moves_per_layer.is_none_or(|most| most >= 2)
        && budget.bytes.is_none_or(|most| bytes <= most)
}

/// Rows of each expert of a layer, over all windows.
fn load(request: &Request, index: usize) -> Vec<f32> {
    let experts = request.model.experts as usize;
    let mut load = vec![0.0; experts];
    for window in &request.windows {
        let of_layer = &window.load[index * experts..][..experts];
        load.iter_mut().zip(of_layer).for_each(|(sum, rows)| *sum += rows);
    }
    load
}

/// The swap that brings the fullest rank down, if there is one.
fn improve(request: &Request, layer: &Layer, load: &[f32]) -> Option<Change> {
    let placement = &layer.placement;
    let per_rank = request.topology.slots_per_rank as usize;
    let slots = |rank: usize| rank * per_rank..(rank + 1) * per_rank;
    let share = |slot: usize| match placement[slot] {
        EMPTY => 0.0,
        // Rows of an expert are split evenly over its replicas.
        expert => {
            let replicas = placement.iter().filter(|held| **held == expert).count();
            load[expert as usize] / replicas as f32
        }
    };
    let rows = |rank: usize| slots(rank).map(share).sum::<f32>();
    let ranks = &request.topology.ranks;
    let active = (0..ranks.len()).filter(|rank| ranks[*rank].state == RankState::Active);
    let full = active.clone().max_by(|a, b| rows(*a).total_cmp(&rows(*b)))?;
    let empty = active.min_by(|a, b| rows(*a).total_cmp(&rows(*b)))?;
    let pinned = |expert: u32| request.pins.iter().any(|pin| pin.expert == expert);
    let may_go = |slot: &usize, to: usize| {
        let expert = placement[*slot];
        expert != EMPTY && !pinned(expert) && !placement[slots(to)].contains(&expert)
    };
    let by_share = |a: &usize, b: &usize| share(*a).total_cmp(&share(*b));
    let busy = slots(full).filter(|slot| may_go(slot, empty)).max_by(by_share)?;
    let idle = slots(empty).filter(|slot| may_go(slot, full)).min_by(by_share)?;
    let gain = share(busy) - share(idle);
    if gain <= 0.0 || rows(empty) + gain >= rows(full) {
        return None;
    }
    let mean = (0..ranks.len()).map(rows).sum::<f32>() / ranks.len() as f32;
    let fullest = (0..ranks.len()).filter(|rank| *rank != full).map(|rank| {
        if rank == empty { rows(rank) + gain } else { rows(rank) }
    });
    let after = fullest.fold(rows(full) - gain, f32::max) / mean;
    let before = rows(full) / mean;
    let step = |slot: usize, source: usize, destination: usize| Move {
        expert: placement[slot],
        source: Some(source as u32),
        destination: destination as u32,
        purpose: Purpose::Spread,
        gain: (before - after) / 2.0,
    };
    let moves = vec![step(busy, full, empty), step(idle, empty, full)];
    let mut placement = placement.clone();
    placement.swap(busy, idle);
    Some(Change {
        layer: layer.id,
        placement,
        moves,
        max_over_mean: Comparison { before, after },
        milliseconds: None,
    })
}
