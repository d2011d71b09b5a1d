//! What a placement policy is asked about a group, and what its answer is worth: requests and proposals. Pure.

use std::collections::{BTreeMap, BTreeSet};

use planning::layer::{moved, rank_loads};
use policy_host::Answer;
use policy_host::contract::EMPTY;
use policy_host::contract::placer::{self, Budget, Plan, Purpose, Request};
use policy_host::contract::types::{
    Context, CostPoint, Layer, Model, Phase, PinKind, Rank, RankState, Topology, Window,
};
use policy_host::store::digest;
use protocol::ids::ExpertId;
use protocol::message::ServedLayer;
use protocol::session::{LayerPlacement, Register};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::balance::max_over_mean;
use crate::constraints::Constraints;
use crate::splitting::{ProposedSplit, SplitBy};
use crate::store::windows::Load;

/// Windows of each phase that a policy is given.
pub(crate) const WINDOWS: usize = 8;

/// Why a group cannot be asked about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unaskable {
    #[error("no placement is in force, expected one that all ranks hold")]
    NothingInForce,
    #[error("layer {layer} has {what}, layer {first} another, expected all layers alike")]
    Unlike { layer: u32, first: u32, what: String },
}

/// What a policy is asked with.
#[derive(Debug, Clone)]
pub(crate) struct Question<'a> {
    /// Every rank of the group, by number.
    pub(crate) ranks: Vec<&'a Register>,
    /// Those of them that were given up.
    pub(crate) lost: BTreeSet<u32>,
    pub(crate) in_force: &'a [LayerPlacement],
    /// In the order of end, layer and phase.
    pub(crate) loads: &'a [Load],
    pub(crate) window_ms: u64,
    pub(crate) settings: &'a str,
    pub(crate) budget: Budget,
    /// What a rank's part of a call costs, where it was measured.
    pub(crate) costs: Vec<CostPoint>,
    pub(crate) constraints: &'a Constraints,
}

impl Question<'_> {
    /// The request. Its time is the end of the newest window, so that equal loads make equal requests.
    pub(crate) fn request(&self) -> Result<Request, Unaskable> {
        let first = self.ranks.first().ok_or(Unaskable::NothingInForce)?;
        let served = &first.model.layers;
        let (layer, placed) =
            served.first().zip(self.in_force.first()).ok_or(Unaskable::NothingInForce)?;
        let slots_per_rank = placed.placement.slots_per_rank();
        let sizes = |of: &ServedLayer| (of.experts, of.top_k, of.hidden, of.intermediate);
        for (other, held) in served.iter().zip(self.in_force) {
            let slots = held.placement.slots_per_rank();
            if sizes(other) != sizes(layer) || slots != slots_per_rank {
                let what = format!("{:?} with {slots} slots a rank", sizes(other));
                return Err(Unaskable::Unlike { layer: other.number, first: layer.number, what });
            }
        }
        let now_ms = self.loads.iter().map(|load| load.end_ms).max().unwrap_or(0);
        Ok(Request {
            context: Context { now_ms, seed: 0, settings: self.settings.to_owned() },
            topology: self.topology(slots_per_rank),
            model: Model {
                experts: layer.experts,
                expert_groups: 1,
                top_k: layer.top_k,
                expert_bytes: expert_bytes(layer),
            },
            layers: self.in_force.iter().map(placed_layer).collect(),
            windows: self.windows(served, layer.experts as usize),
            costs: self.costs.clone(),
            budget: self.budget,
            pins: self.constraints.pins(),
        })
    }

    fn topology(&self, slots_per_rank: u32) -> Topology {
        let mut hosts: Vec<&str> = Vec::new();
        let ranks = self.ranks.iter().map(|register| {
            let known = hosts.iter().position(|host| *host == register.host);
            let node = known.unwrap_or_else(|| {
                hosts.push(&register.host);
                hosts.len() - 1
            });
            let node = u32::try_from(node).unwrap_or(u32::MAX);
            let rank = self.constraints.rank(register.rank, node);
            match self.lost.contains(&register.rank) {
                true => Rank { state: RankState::Lost, ..rank },
                false => rank,
            }
        });
        Topology { ranks: ranks.collect(), slots_per_rank, staging_slots: 0 }
    }

    /// The newest windows of each phase, oldest first.
    fn windows(&self, layers: &[ServedLayer], experts: usize) -> Vec<Window> {
        let mut found: BTreeMap<(u64, &str), Vec<&Load>> = BTreeMap::new();
        for load in self.loads {
            found.entry((load.end_ms, &load.phase)).or_default().push(load);
        }
        let mut ends: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
        for (end_ms, phase) in found.keys() {
            ends.entry(phase).or_default().insert(*end_ms);
        }
        let newest = |(end_ms, phase): &(u64, &str)| {
            ends.get(phase).is_some_and(|ends| ends.iter().rev().take(WINDOWS).any(|e| e == end_ms))
        };
        let wanted = found.iter().filter(|(key, _)| newest(key));
        wanted
            .map(|(&(end_ms, phase), loads)| {
                let mut window = Window {
                    start_ms: end_ms.saturating_sub(self.window_ms),
                    end_ms,
                    phase: if phase == "decode" { Phase::Decode } else { Phase::Prefill },
                    workload: String::new(),
                    calls: 0.0,
                    tokens: 0.0,
                    distinct_experts: Vec::with_capacity(layers.len()),
                    load: Vec::with_capacity(layers.len() * experts),
                };
                for layer in layers {
                    let load = loads.iter().find(|load| load.layer == layer.number);
                    let rows = load.map(|load| &load.expert_tokens[..]).unwrap_or_default();
                    let rows = rows.iter().copied().chain(std::iter::repeat(0)).take(experts);
                    window.load.extend(rows.map(single));
                    let calls = load.map_or(0, |load| load.calls);
                    let distinct = load.map_or(0, |load| load.distinct_experts);
                    window.distinct_experts.push(single(distinct) / single(calls.max(1)));
                    if single(calls) > window.calls {
                        window.calls = single(calls);
                        window.tokens = single(load.map_or(0, |load| load.tokens));
                    }
                }
                window
            })
            .collect()
    }
}

/// Bytes of an expert: NVFP4 has 4 bits, and a scale of 8 for every 16.
pub(crate) fn expert_bytes(layer: &ServedLayer) -> u64 {
    3 * u64::from(layer.hidden) * u64::from(layer.intermediate) * 9 / 16
}

fn placed_layer(placed: &LayerPlacement) -> Layer {
    let expert = |expert: &Option<ExpertId>| expert.map_or(EMPTY, |expert| expert.0);
    let placement = &placed.placement;
    let ranks = (0..placement.ranks()).map(protocol::ids::RankId);
    let slots = ranks.flat_map(|rank| placement.slots_of_rank(rank).iter().map(expert));
    Layer { id: placed.layer, epoch: placed.epoch, placement: slots.collect() }
}

/// Counts as the contract has them.
#[expect(clippy::cast_precision_loss, reason = "rows are counted to seven digits there")]
fn single(count: u64) -> f32 {
    count as f32
}

/// What a policy proposes for a group. It is named by all that went into it: the same question to the same policy is the
/// same proposal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Proposal {
    /// SHA-256 of group, policy, settings, minimum gain and input.
    pub(crate) id: String,
    /// The group.
    pub(crate) group: String,
    /// Digest of the model that it serves.
    #[serde(default)]
    pub(crate) model: String,
    /// When it was made, in milliseconds since 1970.
    pub(crate) made_ms: u64,
    /// The policy, by its own name.
    pub(crate) policy: String,
    /// SHA-256 of its component.
    pub(crate) policy_digest: String,
    /// Its settings, a JSON object.
    pub(crate) settings: String,
    /// SHA-256 of the request, a JSON record of the contract.
    pub(crate) input_digest: String,
    /// What a layer has to gain in `max_over_mean` to be changed for evenness.
    #[serde(default)]
    pub(crate) minimum_gain: f32,
    /// Layers that the policy would change, and that gain less.
    #[serde(default)]
    pub(crate) withheld: u64,
    /// Units of fuel that the plan took; the same wherever it is repeated.
    pub(crate) fuel: u64,
    /// The policy's own words.
    pub(crate) explanation: String,
    /// Experts that come to ranks, over all layers.
    pub(crate) moved: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// Milliseconds of a step, one call of every layer that changes, where calls were measured.
    #[serde(default)]
    pub(crate) milliseconds: Option<Pair>,
    /// Steps in which a step's gain adds up to the time that ranks take to copy at the group's pace, if each copies as much.
    #[serde(default)]
    pub(crate) payback_steps: Option<f64>,
    /// Who splits tokens over replicas; absent where that is done evenly.
    #[serde(default)]
    pub(crate) split_by: Option<SplitBy>,
    /// Layers that change, most valuable first; then those that get another split alone.
    pub(crate) changes: Vec<ProposedChange>,
}

/// A layer that would get another placement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProposedChange {
    /// The model's number of the layer.
    pub(crate) layer: u32,
    /// Number of the placement that it would replace.
    pub(crate) epoch: u64,
    /// Rows of the busiest rank beside the mean, now and then, with the load that the policy expects.
    pub(crate) max_over_mean: Pair,
    /// Milliseconds of a call, where they are known.
    pub(crate) milliseconds: Option<Pair>,
    /// Experts that come to a rank.
    pub(crate) moved: u64,
    /// Those of them that the policy tells a reason for.
    pub(crate) moves: Vec<ProposedMove>,
    /// The expert of every slot, rank by rank; -1 is an empty slot.
    pub(crate) phy2log: Vec<i64>,
    /// How tokens would be split over replicas; null for evenly.
    #[serde(default)]
    pub(crate) split: Option<ProposedSplit>,
}

/// Before and after.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Pair {
    /// With what is in force.
    pub(crate) before: f32,
    /// With what is proposed.
    pub(crate) after: f32,
}

impl From<placer::Comparison> for Pair {
    fn from(placer::Comparison { before, after }: placer::Comparison) -> Self {
        Self { before, after }
    }
}

/// An expert that would come to a rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProposedMove {
    /// The expert.
    pub(crate) expert: u32,
    /// A rank that has it; null where it comes from the checkpoint.
    pub(crate) source: Option<u32>,
    /// The rank that it comes to.
    pub(crate) destination: u32,
    /// `spread`, `replicate`, `repair` or `drain`.
    pub(crate) purpose: String,
    /// What it does to `max_over_mean`.
    pub(crate) gain: f32,
}

impl From<&placer::Move> for ProposedMove {
    fn from(step: &placer::Move) -> Self {
        let purpose = match step.purpose {
            Purpose::Spread => "spread",
            Purpose::Replicate => "replicate",
            Purpose::Repair => "repair",
            Purpose::Drain => "drain",
        };
        let placer::Move { expert, source, destination, gain, .. } = *step;
        Self { expert, source, destination, purpose: purpose.to_owned(), gain }
    }
}

/// What a proposal is made of, besides the question and the answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) group: &'a str,
    /// Digest of the model.
    pub(crate) model: &'a str,
    /// The policy's name and digest.
    pub(crate) policy: (&'a str, &'a str),
    /// See [`Proposal::minimum_gain`].
    pub(crate) minimum_gain: f32,
    /// At most, by each rank.
    pub(crate) bytes_per_second: u64,
}

impl Proposal {
    /// What the answer to `request` proposes: what it changes but for layers that gain too little.
    pub(crate) fn new(
        origin: Origin<'_>,
        request: &Request,
        answer: &Answer<Plan>,
        made_ms: u64,
    ) -> Result<Self, serde_json::Error> {
        let Origin { group, model, policy: (policy, policy_digest), minimum_gain, .. } = origin;
        let input_digest = digest(&serde_json::to_vec(request)?);
        let settings = request.context.settings.clone();
        let named = (group, model, policy_digest, &settings, minimum_gain, &input_digest);
        let id = digest(&serde_json::to_vec(&named)?);
        let plan = &answer.value;
        let worth = plan.changes.iter().filter(|change| is_worth(request, change, minimum_gain));
        let changes: Vec<ProposedChange> = worth.map(|change| proposed(request, change)).collect();
        let withheld = (plan.changes.len() - changes.len()) as u64;
        let moved = changes.iter().map(|change| change.moved).sum();
        let bytes = moved * request.model.expert_bytes;
        let milliseconds = step_milliseconds(&changes);
        let ranks = request.topology.ranks.len().max(1);
        let copy_ms = 1e3 * bytes as f64 / ranks as f64 / origin.bytes_per_second as f64;
        let gain_ms = milliseconds.map(|ms| f64::from(ms.before) - f64::from(ms.after));
        let payback_steps = gain_ms.filter(|gain| *gain > 0.0).map(|gain| copy_ms / gain);
        Ok(Self {
            id,
            group: group.to_owned(),
            model: model.to_owned(),
            made_ms,
            policy: policy.to_owned(),
            policy_digest: policy_digest.to_owned(),
            settings,
            input_digest,
            minimum_gain,
            withheld,
            fuel: answer.fuel,
            explanation: plan.explanation.clone(),
            moved,
            bytes,
            milliseconds,
            payback_steps,
            split_by: None,
            changes,
        })
    }
}

/// Of all layers that change; none unless all were predicted.
fn step_milliseconds(changes: &[ProposedChange]) -> Option<Pair> {
    let all: Vec<Pair> = changes.iter().map(|change| change.milliseconds).collect::<Option<_>>()?;
    let sum = |of: fn(&Pair) -> f32| all.iter().map(of).sum();
    let sums = Pair { before: sum(|pair| pair.before), after: sum(|pair| pair.after) };
    (!all.is_empty()).then_some(sums)
}

/// Experts that come to ranks by a plan, over all layers.
pub(crate) fn moved_by(request: &Request, plan: &Plan) -> u64 {
    plan.changes.iter().map(|change| proposed(request, change).moved).sum()
}

/// Whether a layer gains enough. What keeps experts from being lost, or what operators have asked for, needs no gain.
fn is_worth(request: &Request, change: &placer::Change, minimum_gain: f32) -> bool {
    let needed = |step: &placer::Move| matches!(step.purpose, Purpose::Repair | Purpose::Drain);
    let placer::Comparison { before, after } = change.max_over_mean;
    let layer = request.layers.iter().find(|layer| layer.id == change.layer);
    before - after >= minimum_gain
        || change.moves.iter().any(needed)
        || layer.is_some_and(|layer| is_broken(request, layer))
}

/// Whether what is in force has an expert where it must not be, lacks one where it must be, or has one on ranks alone that are to
/// leave.
fn is_broken(request: &Request, layer: &Layer) -> bool {
    let slots_per_rank = request.topology.slots_per_rank.max(1) as usize;
    let has = |rank: usize, expert: u32| {
        let slots = layer.placement.chunks(slots_per_rank).nth(rank);
        slots.is_some_and(|slots| slots.contains(&expert))
    };
    let pins = request.pins.iter().filter(|pin| pin.layer.is_none_or(|own| own == layer.id));
    let mut broken =
        pins.filter(|pin| has(pin.rank as usize, pin.expert) != (pin.kind == PinKind::Must));
    let active = |at: &usize| request.topology.ranks[*at].state == RankState::Active;
    let stays = |expert| (0..request.topology.ranks.len()).filter(active).any(|at| has(at, expert));
    broken.next().is_some() || (0..request.model.experts).any(|expert| !stays(expert))
}

fn proposed(request: &Request, change: &placer::Change) -> ProposedChange {
    let layer = request.layers.iter().find(|layer| layer.id == change.layer);
    let before = layer.map(|layer| &layer.placement[..]).unwrap_or_default();
    let signed = |expert: &u32| if *expert == EMPTY { -1 } else { i64::from(*expert) };
    ProposedChange {
        layer: change.layer,
        epoch: layer.map_or(0, |layer| layer.epoch),
        max_over_mean: change.max_over_mean.into(),
        milliseconds: change.milliseconds.map(Pair::from),
        moved: moved(before, &change.placement, request.topology.slots_per_rank as usize) as u64,
        moves: change.moves.iter().map(ProposedMove::from).collect(),
        phy2log: change.placement.iter().map(signed).collect(),
        split: None,
    }
}

/// How even a group would be after a plan, and what that costs.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct Tradeoff {
    /// Experts that may come to ranks in one layer: the budget that the policy was given.
    pub(crate) moves_per_layer: u32,
    /// Experts that come to ranks, over all layers.
    pub(crate) moved: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// Layers that change.
    pub(crate) layers: u64,
    /// Rows of the busiest rank beside the mean, by all windows that the policy was given: the mean over layers that had
    /// traffic.
    pub(crate) max_over_mean: f64,
    /// The same of the worst layer.
    pub(crate) worst: f64,
    /// Whether no other row has as few bytes and is as even.
    pub(crate) worth_it: bool,
}

impl Tradeoff {
    /// What the answer to a request with this budget comes to; none where no layer had traffic.
    pub(crate) fn new(moves_per_layer: u32, request: &Request, plan: &Plan) -> Option<Self> {
        let changes: Vec<ProposedChange> =
            plan.changes.iter().map(|change| proposed(request, change)).collect();
        let moved = changes.iter().map(|change| change.moved).sum();
        let ratios = request.layers.iter().enumerate().filter_map(|(index, layer)| {
            let change = plan.changes.iter().find(|change| change.layer == layer.id);
            let slots = change.map_or(&layer.placement, |change| &change.placement);
            max_over_mean(&rank_rows(request, &request.windows, index, slots))
        });
        let ratios: Vec<f64> = ratios.collect();
        let worst = ratios.iter().copied().reduce(f64::max)?;
        Some(Self {
            moves_per_layer,
            moved,
            bytes: moved * request.model.expert_bytes,
            layers: changes.len() as u64,
            max_over_mean: ratios.iter().sum::<f64>() / ratios.len() as f64,
            worst,
            worth_it: true,
        })
    }

    /// Marks those that another beats or equals in bytes and in evenness; of equal ones the first stays.
    pub(crate) fn mark(all: &mut [Self]) {
        let known: Vec<(u64, f64)> = all.iter().map(|one| (one.bytes, one.max_over_mean)).collect();
        for (at, one) in all.iter_mut().enumerate() {
            one.worth_it = !known.iter().enumerate().any(|(other, &(bytes, ratio))| {
                let no_worse = bytes <= one.bytes && ratio <= one.max_over_mean;
                let better = bytes < one.bytes || ratio < one.max_over_mean;
                no_worse && (better || other < at)
            });
        }
    }
}

/// Rows of each rank of a layer, by some windows of a request, if replicas share their expert's rows evenly.
pub(crate) fn rank_rows<'a>(
    request: &Request,
    windows: impl IntoIterator<Item = &'a Window>,
    index: usize,
    slots: &[u32],
) -> Vec<f64> {
    let experts = request.model.experts as usize;
    let mut rows = vec![0.0; experts];
    for window in windows {
        let of_layer = window.load.chunks(experts.max(1)).nth(index).unwrap_or_default();
        rows.iter_mut().zip(of_layer).for_each(|(sum, count)| *sum += f64::from(*count));
    }
    rank_loads(slots, request.topology.slots_per_rank as usize, &rows)
}

#[cfg(test)]
pub(crate) mod tests {
    use policy_host::contract::placer::{Change, Comparison};
    use policy_host::contract::types::Pin;
    use protocol::placement::Placement;

    use super::*;
    use crate::fleet::tests::register;
    use crate::store::windows::Ranks;

    fn load(end_ms: u64, phase: &str, rows: [u64; 2]) -> Load {
        Load {
            end_ms,
            layer: 0,
            phase: phase.to_owned(),
            ranks: Ranks::default(),
            calls: 4,
            tokens: 9,
            distinct_experts: 8,
            latency_us_p50: 1,
            latency_us_p99: 1,
            expert_tokens: rows.to_vec(),
        }
    }

    fn placed(phy2log: &[i64]) -> Vec<LayerPlacement> {
        let placement = Placement::from_phy2log(32, 2, phy2log).unwrap();
        vec![LayerPlacement { layer: 0, epoch: 7, placement }]
    }

    #[test]
    fn a_policy_is_told_what_is_in_force_and_the_newest_windows_of_each_phase() {
        let (one, two) = (register(0, 1), Register { host: "other".to_owned(), ..register(1, 1) });
        let slots: Vec<i64> = (0..32).chain([-1, -1]).collect();
        let slots = [&slots[..16], &[-1], &slots[16..32], &[-1]].concat();
        let in_force = placed(&slots);
        let mut loads: Vec<Load> = (1..=10).map(|n| load(n * 100, "prefill", [n, 0])).collect();
        loads.insert(1, load(100, "decode", [50, 1]));
        let question = Question {
            lost: BTreeSet::new(),
            ranks: vec![&one, &two],
            in_force: &in_force,
            loads: &loads,
            window_ms: 100,
            settings: "{}",
            budget: Budget { layers: None, moves_per_layer: None, bytes: None },
            costs: Vec::new(),
            constraints: &Constraints::default(),
        };
        let request = question.request().unwrap();
        let of_ranks: Vec<u32> = request.topology.ranks.iter().map(|rank| rank.node).collect();
        assert_eq!((of_ranks, request.topology.slots_per_rank), (vec![0, 1], 17));
        assert_eq!((request.layers[0].epoch, request.layers[0].placement[16]), (7, EMPTY));
        assert_eq!(request.context.now_ms, 1000);
        let windows: Vec<(u64, Phase, f32)> =
            request.windows.iter().map(|w| (w.start_ms, w.phase, w.load[0])).collect();
        assert_eq!(windows.len(), 9, "eight of prefill and one of decode");
        assert_eq!(windows[0], (0, Phase::Decode, 50.0));
        assert_eq!(windows[1], (200, Phase::Prefill, 3.0));
        let window = &request.windows[8];
        assert_eq!(
            (window.calls, window.tokens, &window.distinct_experts[..]),
            (4.0, 9.0, &[2.0][..])
        );
        assert_eq!(window.load.len(), 32, "experts that nobody counted have no rows");
        let nothing = Question { in_force: &[], ..question };
        assert_eq!(nothing.request(), Err(Unaskable::NothingInForce));
    }

    #[test]
    fn what_costs_more_and_is_no_evener_is_not_worth_it() {
        let request = policy_host::example::placement("{}");
        let plan = Plan { changes: Vec::new(), explanation: "nothing".to_owned() };
        let nothing = Tradeoff::new(0, &request, &plan).unwrap();
        // Of 7000 rows rank 0 has half of expert 0's 4000 in each of its windows, and all of expert 1's 800.
        assert!((nothing.worst - 2800.0 * 4.0 / 7000.0).abs() < 1e-9, "{nothing:?}");
        assert_eq!((nothing.moved, nothing.bytes, nothing.layers), (0, 0, 0));
        let tradeoff = |bytes, max_over_mean| Tradeoff { bytes, max_over_mean, ..nothing.clone() };
        let mut all = [
            tradeoff(0, 1.6),
            tradeoff(1, 1.4),
            tradeoff(2, 1.4),
            tradeoff(1, 1.4),
            tradeoff(3, 1.1),
        ];
        Tradeoff::mark(&mut all);
        assert_eq!(all.map(|one| one.worth_it), [true, true, false, false, true]);
        let quiet = Request { windows: Vec::new(), ..request };
        assert_eq!(Tradeoff::new(0, &quiet, &plan), None);
    }

    /// A proposal that moves one expert in one layer.
    pub(crate) fn proposal(layer: u32, epoch: u64) -> Proposal {
        let mut request = policy_host::example::placement("{}");
        (request.layers[0].id, request.layers[0].epoch) = (layer, epoch);
        propose(("d", 0.25), &request, Purpose::Replicate, 1)
    }

    /// Expert 0 comes to rank 1, and max / mean from 1.5 to 1.25.
    fn propose(
        (policy, minimum_gain): (&str, f32),
        request: &Request,
        purpose: Purpose,
        made_ms: u64,
    ) -> Proposal {
        let layer = &request.layers[0];
        let mut placement = layer.placement.clone();
        placement[5] = 0;
        placement.swap(0, 1);
        let moves =
            vec![placer::Move { expert: 0, source: Some(0), destination: 1, purpose, gain: 0.25 }];
        let max_over_mean = Comparison { before: 1.5, after: 1.25 };
        let milliseconds = Some(Comparison { before: 2.0, after: 1.5 });
        let change = Change { layer: layer.id, placement, moves, max_over_mean, milliseconds };
        let value = Plan { changes: vec![change], explanation: "one".to_owned() };
        let answer = Answer { value, fuel: 5, elapsed: std::time::Duration::ZERO };
        let (group, model, policy) = ("g", "m", ("p", policy));
        let bytes_per_second = 1_000_000;
        let origin = Origin { group, model, policy, minimum_gain, bytes_per_second };
        Proposal::new(origin, request, &answer, made_ms).unwrap()
    }

    #[test]
    fn a_proposal_is_named_by_what_went_into_it() {
        let request = policy_host::example::placement("{}");
        let made = |policy, gain, at_ms| propose((policy, gain), &request, Purpose::Spread, at_ms);
        let proposal = made("d", 0.0, 1);
        // A replica came to rank 1; two experts of rank 0 only changed slots.
        assert_eq!((proposal.moved, proposal.bytes), (1, request.model.expert_bytes));
        assert_eq!((proposal.changes[0].epoch, proposal.changes[0].phy2log[2]), (1, -1));
        assert_eq!(proposal.milliseconds, Some(Pair { before: 2.0, after: 1.5 }));
        // 2^20 bytes over four ranks of 1 MB/s each, for half a millisecond a step.
        assert_eq!(proposal.payback_steps, Some(262.144 / 0.5));
        assert_eq!(proposal.id, made("d", 0.0, 2).id);
        assert_ne!(proposal.id, made("e", 0.0, 1).id);
        assert_ne!(proposal.id, made("d", 0.1, 1).id);
    }

    #[test]
    fn layers_that_gain_too_little_stay_unless_an_expert_would_be_lost() {
        let request = policy_host::example::placement("{}");
        for (minimum_gain, purpose, changes) in [
            (0.25, Purpose::Spread, 1),
            (0.26, Purpose::Spread, 0),
            (0.26, Purpose::Replicate, 0),
            (0.26, Purpose::Repair, 1),
            (0.26, Purpose::Drain, 1),
        ] {
            let proposal = propose(("d", minimum_gain), &request, purpose, 1);
            let found = (proposal.changes.len() as u64, proposal.withheld, proposal.moved);
            assert_eq!(found, (changes, 1 - changes, changes), "{minimum_gain} {purpose:?}");
            assert_eq!(proposal.payback_steps.is_some(), changes == 1);
        }
    }

    #[test]
    fn what_operators_have_asked_for_needs_no_gain() {
        // Ranks of three slots: 0 and 1, 2 and 3, 4 and 5, and 6, 7 and 0.
        let request = policy_host::example::placement("{}");
        let pin = |layer, expert, rank, kind| Pin { layer, expert, rank, kind };
        for (pin, broken) in [
            (pin(None, 0, 0, PinKind::Must), false),
            (pin(None, 0, 1, PinKind::Must), true),
            (pin(None, 0, 3, PinKind::Never), true),
            (pin(None, 0, 2, PinKind::Never), false),
            (pin(Some(1), 0, 3, PinKind::Never), true),
            (pin(Some(3), 0, 3, PinKind::Never), false),
        ] {
            let request = Request { pins: vec![pin], ..request.clone() };
            assert_eq!(request.layers[0].id, 1);
            assert_eq!(is_broken(&request, &request.layers[0]), broken, "{pin:?}");
            let proposal = propose(("d", 0.26), &request, Purpose::Spread, 1);
            assert_eq!(proposal.changes.len(), usize::from(broken), "{pin:?}");
        }
        let mut drained = request.clone();
        drained.topology.ranks[1].state = RankState::Draining;
        assert!(is_broken(&drained, &drained.layers[0]), "rank 1 alone has 2 and 3");
        (drained.layers[0].placement[2], drained.layers[0].placement[8]) = (2, 3);
        assert!(!is_broken(&drained, &drained.layers[0]), "others have them, too");
    }
}
