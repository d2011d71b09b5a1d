//! DeepSeek's EPLB (github.com/deepseek-ai/EPLB, MIT), bit for bit: sorts are stable, loads are
//! summed and compared in float32. The raw plan knows neither the current placement nor that two
//! replicas of an expert on one rank are a waste; [`repair`](crate::repair) mends the latter.

use alloc::collections::BinaryHeap;
use alloc::collections::binary_heap::PeekMut;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

use crate::layer::{PlanError, Shape, expect_length, number};

/// What to plan for. `groups` are the router's expert groups; they stay within a node when they can
/// be divided among the nodes evenly, otherwise the plan ignores groups and nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Layers, planned each by itself.
    pub layers: usize,
    /// Sizes of each layer; DeepSeek's `num_replicas` is `shape.slots()`, `num_gpus` its ranks.
    pub shape: Shape,
    /// Expert groups.
    pub groups: usize,
    /// Nodes; ranks of a node are contiguous.
    pub nodes: usize,
}

/// The plan as DeepSeek's code returns it, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawPlan {
    /// Expert of every slot, [layers, slots]. May name an expert twice on one rank.
    pub phy2log: Vec<u32>,
    /// Which replica of its expert a slot is, [layers, slots].
    pub replica: Vec<u32>,
    /// Replicas of every expert, [layers, experts].
    pub logcnt: Vec<u32>,
}

impl RawPlan {
    /// Slots of every expert, [layers, experts, most replicas of any], -1 where there are fewer.
    #[must_use]
    pub fn log2phy(&self, layers: usize) -> (usize, Vec<i64>) {
        let widest = self.logcnt.iter().copied().max().unwrap_or(0) as usize;
        let experts = self.logcnt.len() / layers.max(1);
        let slots = (self.phy2log.len() / layers.max(1)).max(1);
        let mut table = vec![-1; self.logcnt.len() * widest];
        let entries = self.phy2log.iter().zip(&self.replica).enumerate();
        for (position, (&expert, &replica)) in entries {
            let (layer, slot) = (position / slots, position % slots);
            let cell = (layer * experts + expert as usize) * widest + replica as usize;
            table[cell] = i64::from(number(slot));
        }
        (widest, table)
    }
}

/// Plans every layer of `weight`, [layers, experts].
///
/// # Errors
/// Sizes that do not divide, lists of another length, loads that are no loads.
pub fn rebalance(request: &Request, weight: &[f32]) -> Result<RawPlan, PlanError> {
    let Request { layers, shape, groups, nodes } = *request;
    shape.check()?;
    expect_length("loads", weight.len(), layers * shape.experts)?;
    let bad = weight.iter().position(|load| !(load.is_finite() && *load >= 0.0));
    if let Some(index) = bad {
        return Err(PlanError::Load { index });
    }
    let divisible = |of, value: usize, by: usize| {
        let even = by > 0 && value.is_multiple_of(by);
        if even { Ok(()) } else { Err(PlanError::Indivisible { of, value, by }) }
    };
    // As the original: groups that cannot be divided among the nodes are ignored with the nodes.
    let hierarchical = nodes > 0 && groups.is_multiple_of(nodes) && groups > 0;
    let (groups, nodes) = if hierarchical { (groups, nodes) } else { (1, 1) };
    divisible("experts", shape.experts, groups)?;
    divisible("ranks", shape.ranks, nodes)?;
    let mut planner = Planner::new(shape, groups, nodes);
    let mut plan = RawPlan {
        phy2log: Vec::with_capacity(layers * shape.slots()),
        replica: Vec::with_capacity(layers * shape.slots()),
        logcnt: Vec::with_capacity(layers * shape.experts),
    };
    for row in weight.chunks(shape.experts) {
        planner.layer(row, &mut plan);
    }
    Ok(plan)
}

/// Sizes and buffers that layers share.
struct Planner {
    shape: Shape,
    groups: usize,
    nodes: usize,
    /// Experts in the order of nodes: DeepSeek's `mlog2log`.
    order: Vec<usize>,
    packing: Packing,
    replication: Replication,
}

impl Planner {
    fn new(shape: Shape, groups: usize, nodes: usize) -> Self {
        Self {
            shape,
            groups,
            nodes,
            order: vec![0; shape.experts],
            packing: Packing::default(),
            replication: Replication::default(),
        }
    }

    fn layer(&mut self, weight: &[f32], plan: &mut RawPlan) {
        self.groups_to_nodes(weight);
        let Shape { experts, ranks, .. } = self.shape;
        let (node_experts, node_ranks) = (experts / self.nodes, ranks / self.nodes);
        let node_slots = self.shape.slots() / self.nodes;
        let (counts_at, slots_at) = (plan.logcnt.len(), plan.phy2log.len());
        plan.logcnt.resize(counts_at + experts, 0);
        plan.phy2log.resize(slots_at + node_slots * self.nodes, 0);
        plan.replica.resize(slots_at + node_slots * self.nodes, 0);
        for node in 0..self.nodes {
            let own = &self.order[node * node_experts..(node + 1) * node_experts];
            self.replication.run(own.iter().map(|&expert| weight[expert]), node_slots);
            let Replication { expert_of, replica, counts, loads, .. } = &self.replication;
            self.packing.run(loads, node_ranks);
            for (item, &position) in self.packing.position.iter().enumerate() {
                let slot = slots_at + node * node_slots + position;
                plan.phy2log[slot] = number(own[expert_of[item]]);
                plan.replica[slot] = replica[item];
            }
            for (&expert, &count) in own.iter().zip(counts) {
                plan.logcnt[counts_at + expert] = count;
            }
        }
    }

    /// Step 1: whole groups to nodes, so that a token's groups are met within few nodes.
    fn groups_to_nodes(&mut self, weight: &[f32]) {
        let size = self.shape.experts / self.groups;
        let sums: Vec<f32> = weight.chunks(size).map(pairwise_sum).collect();
        self.packing.run(&sums, self.nodes);
        for (group, &position) in self.packing.position.iter().enumerate() {
            let row = &mut self.order[position * size..(position + 1) * size];
            row.iter_mut().zip(group * size..).for_each(|(place, expert)| *place = expert);
        }
    }
}

/// Items to packs of equal cardinality, heaviest item first, each to the lightest pack with room.
#[derive(Default)]
struct Packing {
    /// Of each item: pack times capacity, plus its place in the pack.
    position: Vec<usize>,
    order: Vec<u64>,
    held: Vec<usize>,
    lightest: BinaryHeap<Reverse<u64>>,
}

impl Packing {
    /// `weights.len()` is a multiple of `packs`.
    fn run(&mut self, weights: &[f32], packs: usize) {
        let capacity = weights.len() / packs;
        self.position.clear();
        self.position.extend(0..weights.len());
        if capacity == 1 {
            return;
        }
        // Loads are not negative, so their bits sort as they do; the index breaks ties, which makes
        // an unstable sort of the pair a stable one of the loads.
        self.order.clear();
        self.order.extend(weights.iter().zip(0_u32..).map(|(&w, i)| key(!order_bits(w), i)));
        self.order.sort_unstable();
        self.held.clear();
        self.held.resize(packs, 0);
        self.lightest.clear();
        self.lightest.extend((0..number(packs)).map(|pack| Reverse(key(0, pack))));
        for &item in &self.order {
            let item = low(item) as usize;
            let Some(mut top) = self.lightest.peek_mut() else { return };
            let pack = low(top.0) as usize;
            self.position[item] = pack * capacity + self.held[pack];
            self.held[pack] += 1;
            if self.held[pack] == capacity {
                PeekMut::pop(top);
            } else {
                let load = f32::from_bits(high(top.0)) + weights[item];
                top.0 = key(order_bits(load), number(pack));
            }
        }
    }
}

/// Slots beyond one for each expert go, one by one, to the expert with the heaviest replica.
#[derive(Default)]
struct Replication {
    expert_of: Vec<usize>,
    replica: Vec<u32>,
    counts: Vec<u32>,
    loads: Vec<f32>,
    weights: Vec<f32>,
    heaviest: BinaryHeap<u64>,
}

impl Replication {
    fn run(&mut self, weights: impl Iterator<Item = f32>, slots: usize) {
        self.weights.clear();
        self.weights.extend(weights);
        let experts = self.weights.len();
        self.counts.clear();
        self.counts.resize(experts, 1);
        self.expert_of.clear();
        self.expert_of.extend(0..experts);
        self.replica.clear();
        self.replica.resize(experts, 0);
        self.heaviest.clear();
        if slots > experts {
            // The complement of the index lets the first of equal loads win.
            let heap = self.weights.iter().zip(0_u32..).map(|(&w, i)| key(order_bits(w), !i));
            self.heaviest.extend(heap);
        }
        for _ in experts..slots {
            let Some(mut top) = self.heaviest.peek_mut() else { break };
            let expert = !low(*top);
            let at = expert as usize;
            self.expert_of.push(at);
            self.replica.push(self.counts[at]);
            self.counts[at] += 1;
            *top = key(order_bits(self.weights[at] / self.counts[at] as f32), !expert);
        }
        self.loads.clear();
        let loads = self.expert_of.iter().map(|&e| self.weights[e] / self.counts[e] as f32);
        self.loads.extend(loads);
    }
}

/// A load's bits above an index: one integer that sorts by load first.
fn key(bits: u32, index: u32) -> u64 {
    u64::from(bits) << 32 | u64::from(index)
}

fn high(key: u64) -> u32 {
    (key >> 32) as u32
}

fn low(key: u64) -> u32 {
    (key << 32 >> 32) as u32
}

/// Bits that sort as the load does; the sum turns a negative zero into the positive one.
fn order_bits(load: f32) -> u32 {
    (load + 0.0).to_bits()
}

/// Sums in the order of numpy's `sum` over a contiguous axis: eight running sums, blocks of 128.
fn pairwise_sum(loads: &[f32]) -> f32 {
    const BLOCK: usize = 128;
    if loads.len() < 8 {
        return loads.iter().fold(0.0, |sum, load| sum + load);
    }
    if loads.len() > BLOCK {
        let half = loads.len() / 2;
        let (left, right) = loads.split_at(half - half % 8);
        return pairwise_sum(left) + pairwise_sum(right);
    }
    let mut sums = [0.0_f32; 8];
    let chunks = loads.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, load)| *sum += load);
    }
    let [a, b, c, d, e, f, g, h] = sums;
    let total = ((a + b) + (c + d)) + ((e + f) + (g + h));
    rest.iter().fold(total, |sum, load| sum + load)
}
