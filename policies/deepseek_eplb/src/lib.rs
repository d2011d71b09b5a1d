//! The placement policy `deepseek-eplb`: DeepSeek's algorithm on the newest windows. The algorithm is
//! [`planning::deepseek`], bit for bit; what this adds is the contract, and the mending of its duplicates.

use planning::deepseek::{Request as Sizes, rebalance};
use planning::greedy::{Objective, Use};
use planning::layer::{keep_slots, max_over_mean, moved, rank_loads};
use planning::repair::repair;
use policy_guest::group::{Group, invalid};
use policy_guest::load::{Costs, Expected, Of, average, check_windows, newest};
use policy_guest::placement::{meta, placer};
use policy_guest::plan::Purse;
use policy_guest::settings::{Field, Kind, Settings, schema};
use policy_guest::steps::milliseconds;
use policy_guest::types::{Error, Layer, Phase};

/// The policy.
#[derive(Debug)]
pub struct DeepseekEplb;

#[cfg(target_family = "wasm")]
policy_guest::placement::export!(DeepseekEplb with_types_in policy_guest::placement);

const FIELDS: &[Field] = &[
    Field {
        name: "repair",
        kind: Kind::Flag { default: true },
        about: "Mend what is no placement: a second replica on a rank changes places with another \
                expert. Experts that stay on a rank then keep their slots. false: the algorithm's \
                plan bit for bit, for comparisons.",
    },
    Field {
        name: "windows",
        kind: Kind::Integer { min: 1, max: 8, default: 1 },
        about: "Newest windows of a phase that are summed.",
    },
    Field {
        name: "phase",
        kind: Kind::Choice(&["all", "prefill", "decode"]),
        about: "The phase whose load is planned for.",
    },
];

impl meta::Guest for DeepseekEplb {
    fn describe() -> meta::Info {
        meta::Info {
            name: "deepseek-eplb".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "DeepSeek's EPLB: all layers anew from the newest load, hierarchical where \
                      expert groups divide among nodes."
                .to_owned(),
            settings_schema: schema(FIELDS),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<meta::Issue>> {
        policy_guest::placement::validate(FIELDS, &settings)
    }
}

impl placer::Guest for DeepseekEplb {
    fn decide(request: placer::Request) -> Result<placer::Plan, Error> {
        let settings = Settings::accepted(FIELDS, &request.context.settings)?;
        let group = Group::read(&request.topology, &request.model, &request.layers, &request.pins)?;
        expect_what_it_can(&group, &request)?;
        check_windows(&request.windows, &request.layers, group.shape.experts)?;
        let phases: &[Phase] = match settings.choice("phase") {
            "prefill" => &[Phase::Prefill],
            "decode" => &[Phase::Decode],
            _ => &[Phase::Prefill, Phase::Decode],
        };
        let count = settings.integer("windows");
        let load = newest(&request.windows, phases, count)
            .ok_or_else(|| Error::Decline("no window has counted anything".to_owned()))?;
        let planned = plan(&group, &request, &load, settings.flag("repair"))?;
        let pricing = Pricing { costs: Costs::read(&request.costs)?, phases, count };
        Ok(choose(planned, &group, &request, &pricing))
    }
}

/// The algorithm fills every slot of every rank with whatever it likes.
fn expect_what_it_can(group: &Group, request: &placer::Request) -> Result<(), Error> {
    if let Some(rank) = group.uses.iter().position(|used| *used != Use::Active) {
        let message = format!("rank {rank} is not active, and the algorithm fills every rank");
        return Err(Error::Decline(message));
    }
    if let Some(pin) = request.pins.first() {
        let message = format!("expert {} is pinned, which the algorithm cannot keep", pin.expert);
        return Err(Error::Decline(message));
    }
    Ok(())
}

/// A layer planned anew.
struct Planned<'a> {
    /// Its place in the request.
    index: usize,
    layer: &'a Layer,
    slots: Vec<u32>,
    moves: usize,
    duplicates: usize,
    /// Rows of the busiest rank less, with the new placement.
    saved: f64,
    max_over_mean: placer::Comparison,
}

fn plan<'a>(
    group: &Group,
    request: &'a placer::Request,
    load: &[f32],
    mend: bool,
) -> Result<Vec<Planned<'a>>, Error> {
    let shape = group.shape;
    let (groups, nodes) = (request.model.expert_groups as usize, group.even_nodes());
    let sizes = Sizes { layers: request.layers.len(), shape, groups, nodes };
    let refused = |error| match request.layers.first() {
        Some(layer) => invalid(layer, &error),
        None => Error::InvalidInput(format!("{error}")),
    };
    let raw = rebalance(&sizes, load).map_err(refused)?;
    // As the algorithm, which forgets nodes that its groups do not divide among.
    let repair_nodes = if groups.is_multiple_of(nodes) { nodes } else { 1 };
    let rows = raw.phy2log.chunks(shape.slots()).zip(load.chunks(shape.experts));
    let mut planned = Vec::with_capacity(request.layers.len());
    for ((index, layer), (slots, load)) in request.layers.iter().enumerate().zip(rows) {
        let (mut slots, mut duplicates) = (slots.to_vec(), 0);
        let load: Vec<f64> = load.iter().map(|rows| f64::from(*rows)).collect();
        if mend {
            duplicates = repair(&mut slots, shape, repair_nodes, &load).len();
            keep_slots(&layer.placement, &mut slots, shape.slots_per_rank);
        }
        if slots == layer.placement {
            continue;
        }
        let ranks = |slots: &[u32]| rank_loads(slots, shape.slots_per_rank, &load);
        let busiest = |ranks: &[f64]| ranks.iter().copied().fold(0.0, f64::max);
        let (before, after) = (ranks(&layer.placement), ranks(&slots));
        planned.push(Planned {
            index,
            layer,
            moves: moved(&layer.placement, &slots, shape.slots_per_rank),
            duplicates,
            saved: busiest(&before) - busiest(&after),
            max_over_mean: placer::Comparison {
                before: single(max_over_mean(&before)),
                after: single(max_over_mean(&after)),
            },
            slots,
        });
    }
    Ok(planned)
}

/// How calls are priced, where something was measured.
struct Pricing<'a> {
    costs: Costs,
    phases: &'a [Phase],
    /// Windows of a phase.
    count: usize,
}

impl Pricing<'_> {
    fn compare(
        &self,
        group: &Group,
        request: &placer::Request,
        planned: &Planned<'_>,
    ) -> Option<placer::Comparison> {
        let of = Of { index: planned.index, experts: group.shape.experts };
        let load = |phase: &Phase| {
            let live = request.windows.iter().rev();
            let live = live.filter(|w| w.phase == *phase && w.workload.is_empty());
            average(*phase, "", live.take(self.count).map(|window| (window, 1.0)), of)
        };
        let loads: Vec<Expected> = self.phases.iter().filter_map(load).collect();
        if !self.costs.cover(&loads) {
            return None;
        }
        let phases = self.costs.phases(&loads);
        let ms = |slots: &[u32]| single(milliseconds(group, &phases, Objective::Sum, slots));
        let (before, after) = (ms(&planned.layer.placement), ms(&planned.slots));
        Some(placer::Comparison { before, after })
    }
}

/// Layers by what they save, as far as the budget goes. A part of a layer's plan is no plan of the algorithm's, so a
/// layer changes whole or not at all.
fn choose(
    mut planned: Vec<Planned<'_>>,
    group: &Group,
    request: &placer::Request,
    pricing: &Pricing<'_>,
) -> placer::Plan {
    planned.sort_by(|a, b| b.saved.total_cmp(&a.saved));
    let mut purse = Purse::of(&request.budget, group.expert_bytes);
    let (mut moves, mut duplicates, mut unaffordable) = (0, 0, 0);
    let mut changes = Vec::with_capacity(planned.len());
    for layer in planned {
        if !purse.pay(layer.moves) {
            unaffordable += 1;
            continue;
        }
        moves += layer.moves;
        duplicates += layer.duplicates;
        changes.push(placer::Change {
            layer: layer.layer.id,
            // The algorithm has no reason for a single move.
            moves: Vec::new(),
            max_over_mean: layer.max_over_mean,
            milliseconds: pricing.compare(group, request, &layer),
            placement: layer.slots,
        });
    }
    let explanation = format!(
        "{} of {} layers are planned anew, with {moves} moves and {duplicates} duplicates mended; \
         {unaffordable} more do not fit the budget",
        changes.len(),
        request.layers.len(),
    );
    placer::Plan { changes, explanation }
}

#[expect(clippy::cast_possible_truncation, reason = "a ratio of a few digits")]
fn single(ratio: f64) -> f32 {
    ratio as f32
}
