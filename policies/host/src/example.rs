//! Small requests that any policy must cope with: for the preflight, for templates and for tests.

use crate::contract::EMPTY;
use crate::contract::chooser::{self, ActivationFormat, Candidate, Demand, Measurement, Problem};
use crate::contract::placer::{self, Budget};
use crate::contract::splitter;
use crate::contract::types::{
    Context, CostPoint, Layer, Model, Phase, Rank, RankState, Topology, Window,
};

const RANKS: u32 = 4;
const SLOTS_PER_RANK: u32 = 3;
const EXPERTS: u32 = 8;
const TOP_K: u32 = 2;
const NOW_MS: u64 = 1_760_000_000_000;
/// Rows of each expert: one is hot, one sees nothing.
const LOAD: [f32; EXPERTS as usize] = [4000.0, 800.0, 300.0, 200.0, 900.0, 700.0, 100.0, 0.0];

fn context(settings: &str) -> Context {
    Context { now_ms: NOW_MS, seed: 1, settings: settings.to_owned() }
}

/// Four ranks on two nodes, one slow, three slots each.
#[must_use]
pub fn topology() -> Topology {
    let rank = |number: u32| Rank {
        node: number / 2,
        speed: if number == 3 { 0.9 } else { 1.0 },
        free_bytes: 1 << 30,
        state: RankState::Active,
    };
    let ranks = (0..RANKS).map(rank).collect();
    Topology { ranks, slots_per_rank: SLOTS_PER_RANK, staging_slots: 1 }
}

/// Eight experts in two groups.
#[must_use]
pub fn model() -> Model {
    Model { experts: EXPERTS, expert_groups: 2, top_k: TOP_K, expert_bytes: 1 << 20 }
}

/// Two layers. The third slot of a rank is empty, but for the last rank's, which has a second replica of expert 0.
#[must_use]
pub fn layers() -> Vec<Layer> {
    let placement = vec![0, 1, EMPTY, 2, 3, EMPTY, 4, 5, EMPTY, 6, 7, 0];
    let layer = |id| Layer { id, epoch: 1, placement: placement.clone() };
    vec![layer(1), layer(3)]
}

/// Two windows of prompts and one of generation. The second layer saw no token in the first of them.
#[must_use]
pub fn windows() -> Vec<Window> {
    let window = |number: u64, phase: Phase, quiet: bool| {
        let second = LOAD.iter().map(|rows| if quiet { 0.0 } else { *rows });
        Window {
            start_ms: NOW_MS - 1000 * (3 - number),
            end_ms: NOW_MS - 1000 * (2 - number),
            phase,
            workload: String::new(),
            calls: 8.0,
            tokens: LOAD.iter().sum::<f32>() / TOP_K as f32,
            distinct_experts: vec![6.5, if quiet { 0.0 } else { 6.5 }],
            load: LOAD.into_iter().chain(second).collect(),
        }
    };
    vec![
        window(0, Phase::Prefill, true),
        window(1, Phase::Prefill, false),
        window(2, Phase::Decode, false),
    ]
}

/// Many tokens cost arithmetic, few cost the reading of weights.
#[must_use]
pub fn costs() -> Vec<CostPoint> {
    let point =
        |phase, pairs, experts, milliseconds| CostPoint { phase, pairs, experts, milliseconds };
    vec![
        point(Phase::Prefill, 500.0, 3.0, 0.18),
        point(Phase::Prefill, 1000.0, 3.0, 0.31),
        point(Phase::Decode, 1.0, 1.0, 0.03),
        point(Phase::Decode, 8.0, 3.0, 0.06),
    ]
}

/// A request for a placement.
#[must_use]
pub fn placement(settings: &str) -> placer::Request {
    placer::Request {
        context: context(settings),
        topology: topology(),
        model: model(),
        layers: layers(),
        windows: windows(),
        costs: costs(),
        budget: Budget { layers: None, moves_per_layer: None, bytes: None },
        pins: Vec::new(),
    }
}

/// A request for split weights.
#[must_use]
pub fn routing(settings: &str) -> splitter::Request {
    let quarter = |_| LOAD.into_iter().chain(LOAD).map(|rows| rows / RANKS as f32);
    splitter::Request {
        context: context(settings),
        topology: topology(),
        model: model(),
        layers: layers(),
        windows: windows(),
        source_load: (0..RANKS).flat_map(quarter).collect(),
        costs: costs(),
        previous: Vec::new(),
    }
}

/// A request for a table of tactics: three candidates, the third never measured.
#[must_use]
pub fn tactics(settings: &str) -> chooser::Request {
    let names = ["wide", "narrow", "unmeasured"];
    let candidate = |name: &&str| Candidate { name: (*name).to_owned(), workspace_bytes: 0 };
    let measured = |candidate, tokens, median_us| Measurement {
        candidate,
        tokens,
        runs: 20,
        median_us,
        p99_us: median_us * 1.2,
        measured_ms: NOW_MS,
    };
    chooser::Request {
        context: context(settings),
        problem: Problem {
            device: "cpu".to_owned(),
            experts: EXPERTS,
            top_k: TOP_K,
            hidden: 256,
            intermediate: 128,
            ranks: RANKS,
            slots_per_rank: SLOTS_PER_RANK,
            activation_format: ActivationFormat::Bf16,
        },
        candidates: names.iter().map(candidate).collect(),
        measurements: vec![
            measured(0, 16, 90.0),
            measured(1, 16, 60.0),
            measured(0, 256, 400.0),
            measured(1, 256, 700.0),
        ],
        demands: vec![Demand { tokens: 12, phase: Phase::Decode, calls: 1000.0 }],
        buckets: vec![16, 256, 4096],
        previous: Vec::new(),
    }
}
