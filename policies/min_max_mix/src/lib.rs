//! The placement policy `min-max-mix`: a placement that is even enough for the worst of several named workloads, of which
//! any may come. The search is [`planning::greedy`].

use planning::cost::{PhaseLoad, predict};
use planning::greedy::{Objective, Options};
use policy_guest::group::{Group, Pins};
use policy_guest::load::{Costs, Expected, Of, PHASES, average, check_windows};
use policy_guest::placement::{meta, placer};
use policy_guest::plan::Purse;
use policy_guest::settings::{Field, Kind, Settings, schema};
use policy_guest::steps::{Outcome, Work, plan_layers};
use policy_guest::types::{Error, Layer, Window};

/// The policy.
#[derive(Debug)]
pub struct MinMaxMix;

#[cfg(target_family = "wasm")]
policy_guest::placement::export!(MinMaxMix with_types_in policy_guest::placement);

const FIELDS: &[Field] = &[
    Field {
        name: "workloads",
        kind: Kind::Weights,
        about: "Weight of each named workload: 2 counts what it loses by imbalance double, 0 leaves \
                it out. Workloads that are not named here count 1.",
    },
    Field {
        name: "live-weight",
        kind: Kind::Number { min: 0.0, max: 100.0, default: 1.0 },
        about: "Weight of live traffic, as one more workload; 0 plans for the recorded ones alone.",
    },
    Field {
        name: "steps-per-layer",
        kind: Kind::Integer { min: 1, max: 4096, default: 64 },
        about: "Swaps and replicas of one layer in one plan, at most.",
    },
    Field {
        name: "dead-zone",
        kind: Kind::Number { min: 1.0, max: 10.0, default: 1.05 },
        about: "Slowest rank beside the mean rank in the worst workload, at or below which nothing \
                moves.",
    },
];

impl meta::Guest for MinMaxMix {
    fn describe() -> meta::Info {
        meta::Info {
            name: "min-max-mix".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "Even enough for the worst of several named workloads, of which any may come."
                .to_owned(),
            settings_schema: schema(FIELDS),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<meta::Issue>> {
        policy_guest::placement::validate(FIELDS, &settings)
    }
}

impl placer::Guest for MinMaxMix {
    fn decide(request: placer::Request) -> Result<placer::Plan, Error> {
        let settings = Settings::accepted(FIELDS, &request.context.settings)?;
        let group = Group::read(&request.topology, &request.model, &request.layers, &request.pins)?;
        check_windows(&request.windows, &request.layers, group.shape.experts)?;
        let costs = Costs::read(&request.costs)?;
        let layers = request.layers.iter().enumerate();
        let works: Vec<Work<'_>> =
            layers.map(|layer| work(&request, &group, &costs, layer, &settings)).collect();
        if works.iter().all(|work| work.loads.is_empty()) {
            let message = "no workload that counts has a row".to_owned();
            return Err(Error::Decline(message));
        }
        let purse = Purse::of(&request.budget, group.expert_bytes);
        let outcome = plan_layers(&group, &costs, &works, purse)?;
        let explanation = explain(&outcome, works.len(), settings.number("dead-zone"));
        Ok(placer::Plan { changes: outcome.changes, explanation })
    }
}

fn work<'a>(
    request: &'a placer::Request,
    group: &Group,
    costs: &Costs,
    (index, layer): (usize, &'a Layer),
    settings: &Settings,
) -> Work<'a> {
    let of = Of { index, experts: group.shape.experts };
    let (loads, weights): (Vec<Expected>, Vec<f64>) =
        workloads(&request.windows, of, settings).into_iter().unzip();
    // Workloads are compared by imbalance, not by size: each counts beside its own mean.
    let beside_mean = |(phase, weight): (&PhaseLoad<'_>, &f64)| {
        let slots = &layer.placement;
        let even = predict(slots, group.shape.slots_per_rank, phase, &group.speeds).even_ms;
        if even > 0.0 { weight / even } else { 0.0 }
    };
    let weights = Some(costs.phases(&loads).iter().zip(&weights).map(beside_mean).collect());
    let options = Options {
        steps_max: settings.integer("steps-per-layer"),
        dead_zone: settings.number("dead-zone"),
        min_gain: 0.0,
        moves_max: usize::MAX,
        objective: Objective::Worst,
    };
    Work { layer, pins: Pins::of(layer.id, &request.pins), loads, weights, options }
}

/// Each workload in each phase that it has, with its weight. The same workload in two phases is two that may come.
fn workloads(windows: &[Window], of: Of, settings: &Settings) -> Vec<(Expected, f64)> {
    let mut names: Vec<&str> = Vec::new();
    for window in windows {
        if !names.contains(&window.workload.as_str()) {
            names.push(&window.workload);
        }
    }
    let mut loads = Vec::new();
    for name in names {
        let weight = match name {
            "" => settings.number("live-weight"),
            _ => settings.weight("workloads", name).unwrap_or(1.0),
        };
        for phase in PHASES.into_iter().filter(|_| weight > 0.0) {
            let of_workload = windows.iter().filter(|w| w.phase == phase && w.workload == name);
            let load = average(phase, name, of_workload.map(|window| (window, 1.0)), of);
            loads.extend(load.map(|load| (load, weight)));
        }
    }
    loads
}

fn explain(outcome: &Outcome, layers: usize, dead_zone: f64) -> String {
    let Outcome { changes, moves, cut, unsettled, .. } = outcome;
    let mut text = format!(
        "{} of {layers} layers change, with {moves} moves; in the others the worst workload is within \
         {dead_zone} of even, or no step helps it",
        changes.len(),
    );
    if *cut > 0 {
        text.push_str(&format!("; the budget cuts {cut} short"));
    }
    if let Some((layer, why)) = unsettled.first() {
        let count = unsettled.len();
        text.push_str(&format!("; {count} cannot be placed, the first is layer {layer}: {why}"));
    }
    text
}
