//! A request of DeepSeek-V3's sizes: 61 layers of 256 experts in 8 groups, 288 slots on 32 ranks of 4 nodes. Popularity by
//! Zipf's law, with an order of its own in each layer, without randomness. Part of the benchmark as well.

use policy_host::contract::placer::Request;
use policy_host::contract::types::{Layer, Phase, Rank, RankState, Window};
use policy_host::example;

const LAYERS: u32 = 61;
const EXPERTS: u32 = 256;
const SLOTS: u32 = 288;
const RANKS: u32 = 32;
const NODES: u32 = 4;
const TOKENS: f32 = 8192.0;
const TOP_K: u32 = 8;

/// Rows of each expert of a layer: the places of Zipf's law, shuffled by a multiplication.
fn load(layer: u32) -> impl Iterator<Item = f32> {
    let sum: f32 = (1..=EXPERTS).map(|place| 1.0 / place as f32).sum();
    let place = move |expert: u32| (expert * 101 + layer * 37) % EXPERTS + 1;
    (0..EXPERTS).map(move |expert| (TOKENS * TOP_K as f32 / sum / place(expert) as f32).round())
}

/// The request: one window, experts in order, replicas of some in the slots that are left over, nothing measured.
pub(crate) fn large(settings: &str) -> Request {
    let mut request = example::placement(settings);
    let rank = |number: u32| Rank {
        node: number / (RANKS / NODES),
        speed: 1.0,
        free_bytes: 0,
        state: RankState::Active,
    };
    request.topology.ranks = (0..RANKS).map(rank).collect();
    request.topology.slots_per_rank = SLOTS / RANKS;
    (request.model.experts, request.model.expert_groups) = (EXPERTS, 8);
    request.model.top_k = TOP_K;
    let placement: Vec<u32> = (0..SLOTS).map(|slot| slot % EXPERTS).collect();
    request.layers =
        (0..LAYERS).map(|id| Layer { id, epoch: 1, placement: placement.clone() }).collect();
    request.windows = vec![Window {
        start_ms: 0,
        end_ms: 10_000,
        phase: Phase::Prefill,
        workload: String::new(),
        calls: 1.0,
        tokens: TOKENS,
        distinct_experts: Vec::new(),
        load: (0..LAYERS).flat_map(load).collect(),
    }];
    request.costs.clear();
    request
}
