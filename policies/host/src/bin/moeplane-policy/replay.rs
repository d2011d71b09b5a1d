//! `replay`: policies over recorded load windows, compared in one table.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;
use planning::cost::{Point, Roofline};
use policy_host::Component;
use policy_host::contract::types::{CostPoint, Phase};
use policy_host::replay::{Cluster, Outcome, Planner, Row, Trace, table};
use serde_json::json;

/// Bytes a second that an H200 reaches when it reads weights.
const READ_BYTES_PER_SECOND: f64 = 4.0e12;
/// Operations a second that it reaches on weights that it decodes from 4 bits.
const FLOPS_PER_SECOND: f64 = 4e14;
/// Bytes of a weight in NVFP4: 4 bits, and a scale of 8 bits for every 16.
const BYTES_PER_WEIGHT: f64 = 0.5625;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Load windows as JSON: first_moe_layer, and windows of task, tokens, logical_count [layers][experts].
    #[arg(long)]
    windows: PathBuf,
    /// A placement policy, as a file or by its name; NAME={...} gives settings. Several are compared.
    #[arg(long = "policy", required = true)]
    policies: Vec<String>,
    /// Workloads in the order in which they come, separated by commas; `all`: the mean over every order. As they are in the
    /// file if not given.
    #[arg(long)]
    order: Option<String>,
    /// Ranks of the group.
    #[arg(long, default_value_t = 8)]
    ranks: usize,
    /// Slots of a layer over all ranks; one for each expert if not given.
    #[arg(long)]
    slots: Option<usize>,
    /// Nodes, of equally many ranks.
    #[arg(long, default_value_t = 1)]
    nodes: usize,
    /// Expert groups of the model's router.
    #[arg(long, default_value_t = 1)]
    expert_groups: u32,
    /// Phase that the windows are of.
    #[arg(long, value_enum, default_value_t = PhaseName::Prefill)]
    phase: PhaseName,
    /// Width of the model, for bytes and milliseconds.
    #[arg(long, default_value_t = 2048)]
    hidden: u32,
    /// Width of an expert, for bytes and milliseconds.
    #[arg(long, default_value_t = 1408)]
    intermediate: u32,
    /// Tokens of the calls that milliseconds are predicted for.
    #[arg(long, default_value_t = 16384)]
    call_tokens: u32,
    /// Measured costs of calls, a JSON list of phase, pairs, experts and milliseconds. Predictions are fitted to them, and
    /// policies are told them. Without, predictions are by the limits of an H200, and policies balance rows.
    #[arg(long)]
    costs: Option<PathBuf>,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PhaseName {
    Prefill,
    Decode,
}

impl From<PhaseName> for Phase {
    fn from(name: PhaseName) -> Self {
        match name {
            PhaseName::Prefill => Self::Prefill,
            PhaseName::Decode => Self::Decode,
        }
    }
}

/// A policy of the command line.
struct Asked {
    name: String,
    settings: String,
    policy: Component,
}

impl Asked {
    fn load(text: &str) -> Result<Self> {
        let (name, settings) = match text.find("={") {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, "{}"),
        };
        let policy = crate::load(Path::new(name), None, Some(crate::PATIENCE))?;
        policy.validate(settings).with_context(|| name.to_owned())?;
        Ok(Self { name: name.to_owned(), settings: settings.to_owned(), policy })
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let named = || arguments.windows.display().to_string();
    let text = std::fs::read(&arguments.windows).with_context(named)?;
    let trace = Trace::read(&text).with_context(named)?;
    let asked: Vec<Asked> =
        arguments.policies.iter().map(|text| Asked::load(text)).collect::<Result<_>>()?;
    let cluster = cluster(arguments, &trace)?;
    let orders = match arguments.order.as_deref() {
        None => vec![trace.as_recorded()],
        Some("all") => trace.orders()?,
        Some(names) => {
            vec![trace.ordered(&names.split(',').map(str::trim).collect::<Vec<&str>>())?]
        }
    };
    let rows = rows(&cluster, &trace, &orders, &asked)?;
    if !arguments.json {
        print!("{}", table(&rows));
        return Ok(ExitCode::SUCCESS);
    }
    let replay = json!({
        "ranks": cluster.ranks,
        "slots": cluster.slots,
        "layers": trace.layers,
        "experts": trace.experts,
        "windows": orders.first().map_or(0, Vec::len),
        "orders": orders.len(),
    });
    println!("{}", serde_json::to_string_pretty(&json!({"replay": replay, "policies": rows}))?);
    Ok(ExitCode::SUCCESS)
}

/// A row for each policy, after that of nobody.
fn rows(
    cluster: &Cluster,
    trace: &Trace,
    orders: &[Vec<usize>],
    asked: &[Asked],
) -> Result<Vec<Row>> {
    let nobody = ("nothing moves", "", Planner::Nobody);
    let policies = asked.iter().map(|Asked { name, settings, policy }| {
        (name.as_str(), settings.as_str(), Planner::Policy { name, policy, settings })
    });
    let mut replayed = Vec::new();
    for (name, settings, planner) in std::iter::once(nobody).chain(policies) {
        let replay = |order: &Vec<usize>| cluster.replay(trace, order, &planner);
        let outcomes: Vec<Outcome> = orders.iter().map(replay).collect::<Result<_, _>>()?;
        replayed.push((name, settings, outcomes));
    }
    // The best known is a yardstick for all: planned on the very window, or reached by one of them.
    let known = cluster.best_known(trace)?;
    let mut best: Vec<Vec<f64>> = Vec::new();
    for (number, order) in orders.iter().enumerate() {
        let mut of_order: Vec<f64> =
            order[1..].iter().flat_map(|window| known[*window].clone()).collect();
        for (_, _, outcomes) in &replayed {
            let reached = &outcomes[number].max_over_mean;
            of_order.iter_mut().zip(reached).for_each(|(best, reached)| *best = best.min(*reached));
        }
        best.push(of_order);
    }
    let row = |(name, settings, outcomes): &(&str, &str, Vec<Outcome>)| {
        Row::of(name, settings, outcomes, &best, cluster.expert_bytes)
    };
    Ok(replayed.iter().map(row).collect())
}

/// The group that a trace is tried on, where nobody said anything else: eight ranks, a slot for each expert and what makes
/// slots even.
pub(crate) fn cluster_of(trace: &Trace) -> Cluster {
    const RANKS: usize = 8;
    let limits = of_h200(2048, 1408);
    Cluster {
        ranks: RANKS,
        slots: trace.experts.next_multiple_of(RANKS),
        nodes: 1,
        expert_groups: 1,
        expert_bytes: limits.0,
        phase: Phase::Prefill,
        call_tokens: 16384,
        cost: limits.1,
        told: Vec::new(),
    }
}

/// Bytes of an expert in NVFP4, and the limits of an H200 for it.
fn of_h200(hidden: u32, intermediate: u32) -> (u64, Roofline) {
    let weights = 3.0 * f64::from(hidden) * f64::from(intermediate);
    let bytes = weights * BYTES_PER_WEIGHT;
    let cost = Roofline {
        fixed_ms: 0.0,
        ms_per_active: bytes * 1e3 / READ_BYTES_PER_SECOND,
        ms_per_pair: 2.0 * weights * 1e3 / FLOPS_PER_SECOND,
    };
    (whole(bytes), cost)
}

fn cluster(arguments: &Arguments, trace: &Trace) -> Result<Cluster> {
    let (expert_bytes, mut cost) = of_h200(arguments.hidden, arguments.intermediate);
    let mut told: Vec<CostPoint> = Vec::new();
    let phase = Phase::from(arguments.phase);
    if let Some(path) = &arguments.costs {
        let named = || path.display().to_string();
        told = serde_json::from_slice(&std::fs::read(path).with_context(named)?)
            .with_context(named)?;
        let points: Vec<Point> = told
            .iter()
            .filter(|point| point.phase == phase)
            .map(|point| Point {
                pairs: point.pairs.into(),
                active: point.experts.into(),
                ms: point.milliseconds.into(),
            })
            .collect();
        let missing = || format!("{} has no cost of the phase", named());
        cost = Roofline::fit(&points).with_context(missing)?;
    }
    Ok(Cluster {
        ranks: arguments.ranks,
        slots: arguments.slots.unwrap_or(trace.experts),
        nodes: arguments.nodes,
        expert_groups: arguments.expert_groups,
        expert_bytes,
        phase,
        call_tokens: arguments.call_tokens,
        cost,
        told,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a product of two u32 and a small factor"
)]
fn whole(bytes: f64) -> u64 {
    bytes as u64
}
