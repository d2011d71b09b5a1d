//! `golden`: worked examples of DeepSeek's EPLB as requests to a policy, its plan held against theirs slot by slot.
//!
//! A plan of the algorithm may hold an expert twice on a rank, so it is compared as it is given, without the host's
//! checks. It does not number the replicas of an expert, so `log2phy` is compared as the set of each expert's slots.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use planning::layer::{max_over_mean, rank_loads, replica_counts};
use policy_host::Component;
use policy_host::contract::EMPTY;
use policy_host::contract::placer::{Budget, Request};
use policy_host::contract::types::{
    Context as About, Layer, Model, Phase, Rank, RankState, Topology, Window,
};
use serde::Deserialize;

/// Sums of the examples may have been made in another precision.
const TOLERANCE: f64 = 1e-6;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A list of cases as JSON: weight [layers, experts], num_replicas, num_groups, num_nodes, num_gpus, phy2log, and
    /// log2phy, logcnt, gpu_load, max_over_mean where they are to be compared.
    file: PathBuf,
    /// A placement policy, as a file or by its name.
    #[arg(long)]
    policy: PathBuf,
    /// Its settings, a JSON object.
    #[arg(long, default_value = r#"{"repair":false}"#)]
    settings: String,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    weight: Vec<Vec<f64>>,
    num_replicas: usize,
    num_groups: u32,
    num_nodes: usize,
    num_gpus: usize,
    phy2log: Vec<Vec<i64>>,
    log2phy: Option<Vec<Vec<Vec<i64>>>>,
    logcnt: Option<Vec<Vec<i64>>>,
    gpu_load: Option<Vec<Vec<f64>>>,
    max_over_mean: Option<Vec<f64>>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let named = || arguments.file.display().to_string();
    let text = std::fs::read(&arguments.file).with_context(named)?;
    let cases: Vec<Case> = serde_json::from_slice(&text).with_context(named)?;
    ensure!(!cases.is_empty(), "{} has no case", named());
    let policy = crate::load(&arguments.policy, None, Some(crate::PATIENCE))?;
    policy.validate(&arguments.settings)?;
    let mut equal = 0;
    for case in &cases {
        equal += usize::from(judge(case, &policy, &arguments.settings).context(case.name.clone())?);
    }
    println!("{equal} of {} cases equal", cases.len());
    Ok(if equal == cases.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the policy's plan is that of the case.
fn judge(case: &Case, policy: &Component, settings: &str) -> Result<bool> {
    let answer = match policy.decide_unchecked(&request(case, settings)?) {
        Ok(answer) => answer,
        Err(verdict) => {
            println!("{}: NO PLAN, {verdict}", case.name);
            return Ok(false);
        }
    };
    let mut slots = vec![vec![EMPTY; case.num_replicas]; case.weight.len()];
    for change in answer.value.changes {
        let layer = slots.get_mut(change.layer as usize);
        let layer = layer.with_context(|| format!("the plan has layer {}", change.layer))?;
        *layer = change.placement;
    }
    let plan = Plan::of(case, &slots);
    let mut compared = Vec::new();
    let mut differs = Vec::new();
    let mut note = |name: &'static str, difference: Option<String>| {
        compared.push(name);
        differs.extend(difference.map(|found| format!("{name} {found}")));
    };
    note("phy2log", difference(&plan.phy2log, &case.phy2log));
    if let Some(expected) = &case.log2phy {
        let expected: Vec<Vec<Vec<i64>>> =
            expected.iter().map(|layer| layer.iter().map(|row| set(row)).collect()).collect();
        note("log2phy", difference(&plan.log2phy, &expected));
    }
    if let Some(expected) = &case.logcnt {
        note("logcnt", difference(&plan.logcnt, expected));
    }
    if let Some(expected) = &case.gpu_load {
        note("gpu_load", far(&plan.gpu_load.concat(), &expected.concat()));
    }
    if let Some(expected) = &case.max_over_mean {
        note("max_over_mean", far(&plan.max_over_mean, expected));
    }
    let verdict = if differs.is_empty() { "equal" } else { "DIFFERS" };
    println!("{}: {verdict} in {}; {} units of fuel", case.name, compared.join(", "), answer.fuel);
    differs.iter().for_each(|found| println!("  {found}"));
    // Times differ from run to run; all else must not.
    eprintln!("{}: {:.3} ms", case.name, answer.elapsed.as_secs_f64() * 1e3);
    Ok(differs.is_empty())
}

/// Everything that follows from the expert of each slot.
struct Plan {
    phy2log: Vec<Vec<i64>>,
    /// Slots of each expert, ascending.
    log2phy: Vec<Vec<Vec<i64>>>,
    logcnt: Vec<Vec<i64>>,
    gpu_load: Vec<Vec<f64>>,
    max_over_mean: Vec<f64>,
}

impl Plan {
    fn of(case: &Case, slots: &[Vec<u32>]) -> Self {
        let mut plan = Self {
            phy2log: Vec::new(),
            log2phy: Vec::new(),
            logcnt: Vec::new(),
            gpu_load: Vec::new(),
            max_over_mean: Vec::new(),
        };
        for (row, weight) in slots.iter().zip(&case.weight) {
            let signed = |expert: &u32| if *expert == EMPTY { -1 } else { i64::from(*expert) };
            plan.phy2log.push(row.iter().map(signed).collect());
            let mut of_expert = vec![Vec::new(); weight.len()];
            for (slot, expert) in (0..).zip(row) {
                if let Some(slots) = of_expert.get_mut(*expert as usize) {
                    slots.push(slot);
                }
            }
            let load = rank_loads(row, case.num_replicas / case.num_gpus, weight);
            plan.max_over_mean.push(max_over_mean(&load));
            plan.gpu_load.push(load);
            plan.logcnt
                .push(replica_counts(row, weight.len()).into_iter().map(i64::from).collect());
            plan.log2phy.push(of_expert);
        }
        plan
    }
}

fn difference<T: PartialEq + std::fmt::Debug>(ours: &[T], expected: &[T]) -> Option<String> {
    if ours.len() != expected.len() {
        return Some(format!("has {} layers, expected {}", ours.len(), expected.len()));
    }
    let mut pairs = ours.iter().zip(expected).enumerate();
    let (layer, (ours, expected)) = pairs.find(|(_, (ours, expected))| ours != expected)?;
    Some(format!("of layer {layer} is {ours:?}, expected {expected:?}"))
}

fn far(ours: &[f64], expected: &[f64]) -> Option<String> {
    let far = |(a, b): (&f64, &f64)| (a - b).abs() > TOLERANCE * b.abs().max(1.0);
    let differs = ours.len() != expected.len() || ours.iter().zip(expected).any(far);
    differs.then(|| format!("is {ours:?}, expected {expected:?}"))
}

/// Without the -1 that fill rows up, ascending.
fn set(row: &[i64]) -> Vec<i64> {
    let mut slots: Vec<i64> = row.iter().copied().filter(|slot| *slot >= 0).collect();
    slots.sort_unstable();
    slots
}

/// Nothing is placed yet, and one window has the weights.
fn request(case: &Case, settings: &str) -> Result<Request> {
    let (replicas, ranks) = (case.num_replicas, case.num_gpus);
    let experts = case.weight.first().map_or(0, Vec::len);
    ensure!(
        ranks > 0 && replicas > 0 && replicas.is_multiple_of(ranks),
        "{replicas} replicas on {ranks} ranks, expected the same number on each"
    );
    ensure!(case.num_nodes > 0, "0 nodes, expected at least one");
    let ragged = case.weight.iter().position(|row| row.len() != experts);
    ensure!(ragged.is_none(), "the weights of layer {ragged:?} are not {experts}");
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    let rank = |rank: usize| Rank {
        node: number(rank * case.num_nodes / ranks),
        speed: 1.0,
        free_bytes: 0,
        state: RankState::Active,
    };
    let layer = |id: usize| Layer { id: number(id), epoch: 0, placement: vec![EMPTY; replicas] };
    let load: Vec<f32> = case.weight.concat().into_iter().map(single).collect();
    let window = Window {
        start_ms: 0,
        end_ms: 1,
        phase: Phase::Prefill,
        workload: String::new(),
        calls: 1.0,
        tokens: case.weight.first().map_or(0.0, |row| single(row.iter().sum())),
        distinct_experts: Vec::new(),
        load,
    };
    Ok(Request {
        context: About { now_ms: 0, seed: 0, settings: settings.to_owned() },
        topology: Topology {
            ranks: (0..ranks).map(rank).collect(),
            slots_per_rank: number(replicas / ranks),
            staging_slots: 0,
        },
        model: Model {
            experts: number(experts),
            expert_groups: case.num_groups,
            top_k: 1,
            expert_bytes: 1,
        },
        layers: (0..case.weight.len()).map(layer).collect(),
        windows: vec![window],
        costs: Vec::new(),
        budget: Budget { layers: None, moves_per_layer: None, bytes: None },
        pins: Vec::new(),
    })
}

#[expect(clippy::cast_possible_truncation, reason = "float32 is what the algorithm computes in")]
fn single(load: f64) -> f32 {
    load as f32
}
