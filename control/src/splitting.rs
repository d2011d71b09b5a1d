//! How an expert's tokens are split over its replicas: what a routing policy is asked about a proposal, and what the proposal is
//! with its answer. Pure.

use policy_host::contract::placer::Request;
use policy_host::contract::splitter::{self, Split, Splits};
use policy_host::contract::types::{Context, Layer};
use policy_host::store::digest;
use protocol::placement::{Placement, Split as PlacedSplit};
use protocol::session::LayerPlacement;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::balance::{max_over_mean, rank_tokens};
use crate::proposing::{Pair, Proposal, ProposedChange};

/// What a layer has to gain in rows of the busiest rank beside the mean to get another split and nothing else: less is noise.
const GAIN_MIN: f64 = 0.01;

/// Who decides how tokens of a group are split over replicas.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Splitting {
    /// A routing policy by its name, or the digest of a version; null splits tokens evenly, as nobody has said otherwise.
    pub(crate) policy: Option<String>,
    /// Its settings.
    #[schema(value_type = Object)]
    pub(crate) settings: Map<String, Value>,
}

impl Splitting {
    /// Settings as policies take them.
    pub(crate) fn settings_text(&self) -> String {
        Value::Object(self.settings.clone()).to_string()
    }
}

/// How tokens of a layer would be split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProposedSplit {
    /// Rows of `weights`: 1, or one for each rank that tokens come from.
    pub(crate) sources: u32,
    /// Weight of each replica beside the sum over its expert's, row by row; replicas in the order of experts, then of slots.
    pub(crate) weights: Vec<u16>,
    /// Rows of the busiest rank beside the mean with it, by all windows that the policy was given.
    pub(crate) max_over_mean: f32,
}

/// Who split a proposal's tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SplitBy {
    /// The routing policy, as it was asked for.
    pub(crate) policy: String,
    /// SHA-256 of the version that answered; empty if none did.
    pub(crate) policy_digest: String,
    /// Its settings, a JSON object.
    pub(crate) settings: String,
    /// The policy's own words.
    pub(crate) explanation: String,
    /// What went wrong with it: tokens are split evenly where placements change, and as before elsewhere.
    pub(crate) problem: Option<String>,
}

/// What a routing policy is asked: how tokens are to be split once `changes` are in force.
pub(crate) fn question(
    request: &Request,
    (changes, in_force): (&[ProposedChange], &[LayerPlacement]),
    settings: &str,
) -> splitter::Request {
    let Request { context, topology, model, layers, windows, costs, .. } = request;
    let layer = |layer: &Layer| match changes.iter().find(|change| change.layer == layer.id) {
        Some(change) => {
            let slots = change.phy2log.iter();
            let placement = slots.map(|&expert| u32::try_from(expert).unwrap_or(u32::MAX));
            Layer { placement: placement.collect(), ..layer.clone() }
        }
        None => layer.clone(),
    };
    let changes = |layer: u32| changes.iter().any(|change| change.layer == layer);
    let previous = |placed: &LayerPlacement| {
        let PlacedSplit { sources, weights } = placed.placement.split()?;
        let (layer, sources, weights) = (placed.layer, *sources, weights.clone());
        Some(Split { layer, sources, weights })
    };
    splitter::Request {
        context: Context { settings: settings.to_owned(), ..context.clone() },
        topology: topology.clone(),
        model: *model,
        layers: layers.iter().map(layer).collect(),
        windows: windows.clone(),
        source_load: Vec::new(),
        costs: costs.clone(),
        previous: in_force.iter().filter(|p| !changes(p.layer)).filter_map(previous).collect(),
    }
}

impl Proposal {
    /// The same with the splits of a routing policy: those of layers that change, and others that gain by a new split alone.
    pub(crate) fn with_splits(
        mut self,
        by: SplitBy,
        (request, in_force): (&Request, &[LayerPlacement]),
        splits: &Splits,
    ) -> Self {
        let named = (&self.id, &by.policy_digest, &by.settings, in_force_splits(in_force));
        self.id = digest(format!("{named:?}").as_bytes());
        self.split_by = Some(by);
        for (index, layer) in request.layers.iter().enumerate() {
            let rows = rows(request, index);
            let split = splits.layers.iter().find(|split| split.layer == layer.id);
            let split = split.map(|split| PlacedSplit {
                sources: split.sources,
                weights: split.weights.clone(),
            });
            let proposed = |placement: &Placement| {
                let max_over_mean = single(evenness(placement, &rows));
                placement.split().map(|PlacedSplit { sources, weights }| ProposedSplit {
                    sources: *sources,
                    weights: weights.clone(),
                    max_over_mean,
                })
            };
            let known = self.changes.iter_mut().find(|change| change.layer == layer.id);
            let held =
                in_force.iter().find(|held| (held.layer, held.epoch) == (layer.id, layer.epoch));
            match (known, held) {
                (Some(change), Some(held)) => {
                    let (experts, ranks) = (held.placement.experts(), held.placement.ranks());
                    let planned = Placement::from_phy2log(experts, ranks, &change.phy2log);
                    let with = planned.ok().and_then(|planned| with(planned, split));
                    change.split = with.as_ref().and_then(proposed);
                }
                (None, Some(held)) => {
                    let Some(with) = with(without_split(&held.placement), split) else { continue };
                    let [before, after] = [&held.placement, &with].map(|p| evenness(p, &rows));
                    let least = f64::from(self.minimum_gain).max(GAIN_MIN);
                    if with != held.placement && before - after >= least {
                        let (before, after) = (single(before), single(after));
                        self.changes.push(ProposedChange {
                            layer: layer.id,
                            epoch: layer.epoch,
                            max_over_mean: Pair { before, after },
                            milliseconds: None,
                            moved: 0,
                            moves: Vec::new(),
                            phy2log: with.to_phy2log(),
                            split: proposed(&with),
                        });
                    }
                }
                (_, None) => {}
            }
        }
        self
    }

    /// The same where the routing policy has no answer.
    pub(crate) fn without_splits(mut self, by: SplitBy) -> Self {
        self.id =
            digest(format!("{:?}", (&self.id, &by.policy, &by.settings, &by.problem)).as_bytes());
        self.split_by = Some(by);
        self
    }
}

fn in_force_splits(in_force: &[LayerPlacement]) -> Vec<(u32, Option<&PlacedSplit>)> {
    in_force.iter().map(|placed| (placed.layer, placed.placement.split())).collect()
}

fn with(placement: Placement, split: Option<PlacedSplit>) -> Option<Placement> {
    match split {
        Some(split) => placement.with_split(split).ok(),
        None => Some(placement),
    }
}

fn without_split(placement: &Placement) -> Placement {
    let (experts, ranks) = (placement.experts(), placement.ranks());
    let even = Placement::from_phy2log(experts, ranks, &placement.to_phy2log());
    even.unwrap_or_else(|_valid_before| placement.clone())
}

/// Rows of each expert of a layer, by all windows of a request.
fn rows(request: &Request, index: usize) -> Vec<u64> {
    let experts = request.model.experts as usize;
    let mut rows = vec![0.0; experts];
    for window in &request.windows {
        let of_layer = window.load.chunks(experts.max(1)).nth(index).unwrap_or_default();
        rows.iter_mut().zip(of_layer).for_each(|(sum, count)| *sum += f64::from(*count));
    }
    rows.into_iter().map(whole).collect()
}

/// Rows of the busiest rank beside the mean; 1 without rows.
fn evenness(placement: &Placement, rows: &[u64]) -> f64 {
    max_over_mean(&rank_tokens(placement, rows)).unwrap_or(1.0)
}

#[expect(clippy::cast_possible_truncation, reason = "the contract has single precision")]
fn single(value: f64) -> f32 {
    value as f32
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a sum of counts of rows"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use policy_host::contract::types::{Phase, Window};

    use super::*;
    use crate::proposing::tests::proposal;

    /// Expert 0 on both ranks, beside an idle and a busy one.
    fn placed() -> Vec<LayerPlacement> {
        let placement = Placement::from_phy2log(3, 2, &[0, 1, 0, 2]).unwrap();
        vec![LayerPlacement { layer: 0, epoch: 7, placement }]
    }

    fn asked(load: [f32; 3]) -> Request {
        let mut request = policy_host::example::placement("{}");
        request.model.experts = 3;
        request.topology.slots_per_rank = 2;
        request.layers = vec![Layer { id: 0, epoch: 7, placement: vec![0, 1, 0, 2] }];
        request.windows = vec![Window {
            start_ms: 0,
            end_ms: 1,
            phase: Phase::Decode,
            workload: String::new(),
            calls: 1.0,
            tokens: 1.0,
            distinct_experts: vec![3.0],
            load: load.to_vec(),
        }];
        request
    }

    fn by() -> SplitBy {
        SplitBy {
            policy: "p".to_owned(),
            policy_digest: "d".to_owned(),
            settings: "{}".to_owned(),
            explanation: String::new(),
            problem: None,
        }
    }

    fn splits(weights: &[u16]) -> Splits {
        let split = Split { layer: 0, sources: 1, weights: weights.to_vec() };
        Splits { layers: vec![split], explanation: String::new() }
    }

    #[test]
    fn a_layer_that_only_gains_by_a_split_gets_it() {
        // Rank 0: 50 and nothing; rank 1: 50 and 60.
        let request = asked([100.0, 0.0, 60.0]);
        let none = Proposal { changes: Vec::new(), ..proposal(7, 7) };
        let with = |weights: &[u16], minimum_gain| {
            let none = Proposal { minimum_gain, ..none.clone() };
            none.with_splits(by(), (&request, &placed()), &splits(weights))
        };
        let split = with(&[4, 1, 1, 1], 0.0);
        assert_ne!(split.id, none.id);
        let change = &split.changes[0];
        assert_eq!((change.moved, &change.phy2log[..]), (0, &[0, 1, 0, 2][..]));
        assert_eq!(change.max_over_mean, Pair { before: 110.0 / 80.0, after: 1.0 });
        let proposed = change.split.as_ref().unwrap();
        assert_eq!((proposed.sources, &proposed.weights[..]), (1, &[4, 1, 1, 1][..]));
        assert_eq!(with(&[4, 1, 1, 1], 0.4).changes, [], "it gains less than it must");
        assert_eq!(with(&[1, 4, 1, 1], 0.0).changes, [], "that is worse");
        assert_eq!(with(&[2, 2, 1, 1], 0.0).changes, [], "that is even, as it is");
    }

    #[test]
    fn layers_that_change_get_theirs_whatever_it_gains() {
        let request = asked([100.0, 0.0, 60.0]);
        let mut changed = proposal(7, 7);
        changed.changes[0] = ProposedChange {
            layer: 0,
            phy2log: vec![0, 2, 0, 1],
            split: None,
            ..changed.changes[0].clone()
        };
        let question = question(&request, (&changed.changes, &placed()), r#"{"a":1}"#);
        assert_eq!(question.layers[0].placement, [0, 2, 0, 1]);
        assert_eq!((&question.context.settings[..], question.previous.len()), (r#"{"a":1}"#, 0));
        let with = changed.clone().with_splits(by(), (&request, &placed()), &splits(&[1, 4, 1, 1]));
        let split = with.changes[0].split.as_ref().unwrap();
        assert_eq!((&split.weights[..], split.max_over_mean), (&[1, 4, 1, 1][..], 1.0));
        let even = changed.with_splits(by(), (&request, &placed()), &splits(&[3, 3, 1, 1]));
        assert_eq!(even.changes[0].split, None);
    }

    #[test]
    fn policies_are_told_of_splits_that_stay() {
        let split = PlacedSplit { sources: 1, weights: vec![4, 1, 1, 1] };
        let held = placed().remove(0);
        let held = LayerPlacement { placement: held.placement.with_split(split).unwrap(), ..held };
        let asked = question(&asked([1.0, 1.0, 1.0]), (&[], &[held]), "{}");
        assert_eq!(asked.previous[0].weights, [4, 1, 1, 1]);
    }
}
