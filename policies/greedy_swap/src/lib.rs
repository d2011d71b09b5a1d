//! The placement policy `greedy-swap`: the few swaps and replicas that gain most, none within the dead zone. The search is
//! [`planning::greedy`], on what [`planning::estimate`] expects.

use planning::greedy::{Objective, Options, Use};
use policy_guest::group::{Group, Pins};
use policy_guest::load::{
    Costs, DECAY, Expected, OVERLAP_MIN, Of, check_windows, expected, memory,
};
use policy_guest::placement::{meta, placer};
use policy_guest::plan::Purse;
use policy_guest::settings::{Field, Kind, Settings, schema};
use policy_guest::steps::{Outcome, Work, plan_layers};
use policy_guest::types::Error;

/// The policy.
#[derive(Debug)]
pub struct GreedySwap;

#[cfg(target_family = "wasm")]
policy_guest::placement::export!(GreedySwap with_types_in policy_guest::placement);

const FIELDS: &[Field] = &[
    Field {
        name: "steps-per-layer",
        kind: Kind::Integer { min: 1, max: 1024, default: 8 },
        about: "Swaps and replicas of one layer in one plan, at most.",
    },
    Field {
        name: "dead-zone",
        kind: Kind::Number { min: 1.0, max: 10.0, default: 1.06 },
        about: "Slowest rank beside the mean rank, at or below which nothing moves.",
    },
    Field {
        name: "noise",
        kind: Kind::Number { min: 0.0, max: 10.0, default: 0.5 },
        about: "Standard errors of a rank's expected load by which the dead zone is wider: few \
                tokens look uneven by chance.",
    },
    Field {
        name: "min-gain",
        kind: Kind::Number { min: 0.0, max: 1.0, default: 0.0 },
        about: "Share of a layer's time that a step must save for each expert that it moves.",
    },
    DECAY,
    OVERLAP_MIN,
];

impl meta::Guest for GreedySwap {
    fn describe() -> meta::Info {
        meta::Info {
            name: "greedy-swap".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "The few swaps and replicas that gain most; nothing moves within the dead \
                      zone."
                .to_owned(),
            settings_schema: schema(FIELDS),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<meta::Issue>> {
        policy_guest::placement::validate(FIELDS, &settings)
    }
}

impl placer::Guest for GreedySwap {
    fn decide(request: placer::Request) -> Result<placer::Plan, Error> {
        let settings = Settings::accepted(FIELDS, &request.context.settings)?;
        let group = Group::read(&request.topology, &request.model, &request.layers, &request.pins)?;
        check_windows(&request.windows, &request.layers, group.shape.experts)?;
        let costs = Costs::read(&request.costs)?;
        let works = works(&request, &group, &settings);
        let nothing_known = works.iter().all(|work| work.loads.is_empty());
        if nothing_known && group.uses.iter().all(|used| *used == Use::Active) {
            return Err(Error::Decline("no window has counted anything".to_owned()));
        }
        let purse = Purse::of(&request.budget, group.expert_bytes);
        let outcome = plan_layers(&group, &costs, &works, purse)?;
        let explanation = explain(&outcome, works.len(), settings.number("dead-zone"));
        Ok(placer::Plan { changes: outcome.changes, explanation })
    }
}

fn works<'a>(request: &'a placer::Request, group: &Group, settings: &Settings) -> Vec<Work<'a>> {
    let memory = memory(settings);
    let work = |(index, layer)| {
        let of = Of { index, experts: group.shape.experts };
        let loads = expected(&request.windows, of, &memory);
        let noise = settings.number("noise") * chance(&loads, group.shape.ranks);
        let options = Options {
            steps_max: settings.integer("steps-per-layer"),
            dead_zone: settings.number("dead-zone") + noise,
            min_gain: settings.number("min-gain"),
            moves_max: usize::MAX,
            objective: Objective::Sum,
        };
        Work { layer, pins: Pins::of(layer.id, &request.pins), loads, weights: None, options }
    };
    request.layers.iter().enumerate().map(work).collect()
}

/// Relative standard error of an even rank's load, in the phase that is known best.
fn chance(loads: &[Expected], ranks: usize) -> f64 {
    let evidence = loads.iter().map(|load| load.evidence).fold(1.0, f64::max);
    (ranks as f64 / evidence).sqrt()
}

fn explain(outcome: &Outcome, layers: usize, dead_zone: f64) -> String {
    let Outcome { changes, moves, cut, left, unsettled } = outcome;
    let mut text = format!(
        "{} of {layers} layers change, with {moves} moves; the others are within the dead zone of \
         {dead_zone}, as far as chance tells, or no step helps them",
        changes.len(),
    );
    if *cut > 0 {
        text.push_str(&format!("; the budget cuts {cut} short"));
    }
    if *left > 0 {
        text.push_str(&format!("; {left} experts find no second home, and draining ranks wait"));
    }
    if let Some((layer, why)) = unsettled.first() {
        let count = unsettled.len();
        text.push_str(&format!("; {count} cannot be placed, the first is layer {layer}: {why}"));
    }
    text
}
