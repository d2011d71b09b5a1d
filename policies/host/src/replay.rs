//! Replays: a placement policy plans on everything up to window t, and its placement is scored on window t + 1. Prints
//! nothing, and has no clock: time is what calls took.

mod report;
mod trace;

use std::time::Duration;

use planning::cost::{PhaseLoad, RankCost, Roofline, predict};
use planning::deepseek::{Request as Sizes, rebalance};
use planning::greedy::{Options, Ranks, plan_layer};
use planning::layer::{PlanError, Shape, max_over_mean, moved, rank_loads};
use planning::repair::repair;

pub use report::{Row, table};
pub use trace::{Recorded, Trace, WINDOWS_MAX, WORKLOADS_MAX};

use crate::component::Component;
use crate::contract::placer::{Budget, Plan, Request};
use crate::contract::types::{
    Context, CostPoint, Layer, Model, Phase, Rank, RankState, Topology, Window,
};
use crate::verdict::Verdict;

/// Ranks of a replay. The largest groups in use have a few hundred.
pub const RANKS_MAX: usize = 4096;

/// Slots of a layer, over all ranks.
pub const SLOTS_MAX: usize = 65_536;

/// Windows that a policy is given, as by control.
pub const HISTORY: usize = 8;

/// Windows have no time of their own in files; policies are told ten seconds.
const WINDOW_MS: u64 = 10_000;

/// Why something cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A file of another form.
    #[error("expected load windows: {0}")]
    Form(#[from] serde_json::Error),
    /// Too few windows to plan on one and score on the next, or more than anybody waits for.
    #[error("{found} windows, expected 2 to {max}")]
    Windows {
        /// Windows found.
        found: usize,
        /// Windows accepted.
        max: usize,
    },
    /// A window that does not fit the others.
    #[error("window {number}: {what}")]
    Window {
        /// Its place in the file.
        number: usize,
        /// What was found and expected.
        what: String,
    },
    /// A workload that no window is of.
    #[error("no window of {name:?}, the file has {known}")]
    Workload {
        /// Its name.
        name: String,
        /// Names that there are.
        known: String,
    },
    /// More workloads than all their orders can be replayed for.
    #[error("the orders of {found} workloads are too many, expected at most {max} workloads")]
    Orders {
        /// Workloads.
        found: usize,
        /// Workloads accepted.
        max: usize,
    },
    /// Sizes that no placement has.
    #[error("{ranks} ranks with {slots} slots: {reason}")]
    Sizes {
        /// Ranks.
        ranks: usize,
        /// Slots of a layer.
        slots: usize,
        /// What was expected.
        reason: String,
    },
    /// A policy that gave no plan.
    #[error("{policy} on window {window}")]
    Policy {
        /// Its name.
        policy: String,
        /// The window that it planned on, its place in the order.
        window: usize,
        /// Why.
        #[source]
        verdict: Verdict,
    },
}

/// The group that is replayed, and how a call of it is priced.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Ranks of the group.
    pub ranks: usize,
    /// Slots of a layer over all ranks; a multiple of `ranks`.
    pub slots: usize,
    /// Nodes, of equally many ranks.
    pub nodes: usize,
    /// Expert groups of the router.
    pub expert_groups: u32,
    /// Bytes of a replica.
    pub expert_bytes: u64,
    /// Phase of the windows.
    pub phase: Phase,
    /// Tokens of the calls that milliseconds are predicted for.
    pub call_tokens: u32,
    /// What a rank's part of such a call costs.
    pub cost: Roofline,
    /// Costs that policies are told; without any they balance rows.
    pub told: Vec<CostPoint>,
}

/// What one replay of one policy came to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Fullest rank over mean rank, rows of the next window: [windows, layers].
    pub max_over_mean: Vec<f64>,
    /// Replicas that came to a rank, over the whole replay.
    pub moved: u64,
    /// Predicted milliseconds of a call in the next window, mean over windows and layers.
    pub predicted_ms: f64,
    /// Time of each plan of all layers.
    pub planning: Vec<Duration>,
    /// Fuel of all plans.
    pub fuel: u64,
}

impl Outcome {
    /// Whether another replay came to the same. Times may differ.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.max_over_mean == other.max_over_mean
            && (self.moved, self.fuel) == (other.moved, other.fuel)
    }
}

/// Who plans in a replay.
pub enum Planner<'a> {
    /// Nobody: the placement that workers start with stays.
    Nobody,
    /// A policy, with settings that it accepted.
    Policy {
        /// Its name, for errors.
        name: &'a str,
        /// It.
        policy: &'a Component,
        /// Its settings.
        settings: &'a str,
    },
}

impl Cluster {
    fn shape(&self, trace: &Trace) -> Result<Shape, ReplayError> {
        let Self { ranks, slots, nodes, .. } = *self;
        let bad = |reason: String| Err(ReplayError::Sizes { ranks, slots, reason });
        if ranks == 0 || ranks > RANKS_MAX || slots > SLOTS_MAX || !slots.is_multiple_of(ranks) {
            return bad(format!(
                "expected 1 to {RANKS_MAX} ranks, and as many slots on each, {SLOTS_MAX} at most"
            ));
        }
        if nodes == 0 || !ranks.is_multiple_of(nodes) {
            return bad(format!("{nodes} nodes, expected as many ranks on each"));
        }
        let shape = Shape { experts: trace.experts, ranks, slots_per_rank: slots / ranks };
        match shape.check() {
            Ok(()) => Ok(shape),
            Err(error) => bad(error.to_string()),
        }
    }

    /// Replays the windows of `order` from the placement that workers start with, experts in order.
    ///
    /// # Errors
    /// [`ReplayError::Sizes`]; [`ReplayError::Policy`]. A policy that declines changes nothing.
    pub fn replay(
        &self,
        trace: &Trace,
        order: &[usize],
        planner: &Planner<'_>,
    ) -> Result<Outcome, ReplayError> {
        let shape = self.shape(trace)?;
        let mut layers = vec![in_order(shape); trace.layers];
        let mut outcome = Outcome::default();
        for next in 1..order.len() {
            let known = &order[next.saturating_sub(HISTORY)..next];
            if let Planner::Policy { name, policy, settings } = planner {
                let request = self.request(trace, known, &layers, (next, settings));
                let plan = self.ask(policy, &request, &mut outcome).map_err(|verdict| {
                    ReplayError::Policy { policy: (*name).to_owned(), window: next - 1, verdict }
                })?;
                for change in plan.map_or(Vec::new(), |plan| plan.changes) {
                    let layer = &mut layers[(change.layer - trace.first_layer) as usize];
                    let copies = moved(layer, &change.placement, shape.slots_per_rank);
                    outcome.moved += copies as u64;
                    *layer = change.placement;
                }
            }
            self.score(trace, order[next], shape, &layers, &mut outcome);
        }
        outcome.predicted_ms /= outcome.max_over_mean.len().max(1) as f64;
        Ok(outcome)
    }

    fn ask(
        &self,
        policy: &Component,
        request: &Request,
        outcome: &mut Outcome,
    ) -> Result<Option<Plan>, Verdict> {
        match policy.decide(request) {
            Ok(answer) => {
                outcome.planning.push(answer.elapsed);
                outcome.fuel += answer.fuel;
                Ok(Some(answer.value))
            }
            Err(Verdict::Declined { .. }) => Ok(None),
            Err(verdict) => Err(verdict),
        }
    }

    fn request(
        &self,
        trace: &Trace,
        known: &[usize],
        layers: &[Vec<u32>],
        (next, settings): (usize, &str),
    ) -> Request {
        let node_ranks = self.ranks / self.nodes;
        let rank = |rank: usize| Rank {
            node: number(rank / node_ranks),
            speed: 1.0,
            free_bytes: 0,
            state: RankState::Active,
        };
        let layer = |(id, placement): (u32, &Vec<u32>)| Layer {
            id,
            epoch: next as u64,
            placement: placement.clone(),
        };
        let oldest = next - known.len();
        // As live traffic: a policy is not told which workload it looks at.
        let window = |(age, &at): (usize, &usize)| Window {
            start_ms: (oldest + age) as u64 * WINDOW_MS,
            end_ms: (oldest + age + 1) as u64 * WINDOW_MS,
            phase: self.phase,
            workload: String::new(),
            calls: 1.0,
            tokens: trace.windows[at].tokens,
            distinct_experts: Vec::new(),
            load: trace.windows[at].load.clone(),
        };
        let rows: f32 = trace.load(known[0], 0).iter().sum();
        let tokens = trace.windows[known[0]].tokens.max(1.0);
        Request {
            context: Context {
                now_ms: next as u64 * WINDOW_MS,
                seed: 0,
                settings: settings.to_owned(),
            },
            topology: Topology {
                ranks: (0..self.ranks).map(rank).collect(),
                slots_per_rank: number(self.slots / self.ranks),
                staging_slots: 0,
            },
            model: Model {
                experts: number(trace.experts),
                expert_groups: self.expert_groups,
                top_k: whole(rows / tokens),
                expert_bytes: self.expert_bytes,
            },
            layers: (trace.first_layer..).zip(layers).map(layer).collect(),
            windows: known.iter().enumerate().map(window).collect(),
            costs: self.told.clone(),
            budget: Budget { layers: None, moves_per_layer: None, bytes: None },
            pins: Vec::new(),
        }
    }

    fn score(
        &self,
        trace: &Trace,
        window: usize,
        shape: Shape,
        layers: &[Vec<u32>],
        outcome: &mut Outcome,
    ) {
        let scale = f64::from(self.call_tokens) / f64::from(trace.windows[window].tokens.max(1.0));
        let cost = RankCost::Roofline(self.cost);
        for (number, slots) in layers.iter().enumerate() {
            let rows = wide(trace.load(window, number));
            let loads = rank_loads(slots, shape.slots_per_rank, &rows);
            outcome.max_over_mean.push(max_over_mean(&loads));
            let pairs: Vec<f64> = rows.iter().map(|rows| rows * scale).collect();
            let load =
                PhaseLoad { pairs: &pairs, tokens: self.call_tokens, weight: 1.0, cost: &cost };
            outcome.predicted_ms += predict(slots, shape.slots_per_rank, &load, &[]).call_ms;
        }
    }

    /// The evenest placement that we find for every window that is known beforehand: DeepSeek's plan, swapped on until
    /// nothing improves. A yardstick, not a bound: [windows of the trace, layers].
    ///
    /// # Errors
    /// [`ReplayError::Sizes`].
    pub fn best_known(&self, trace: &Trace) -> Result<Vec<Vec<f64>>, ReplayError> {
        let shape = self.shape(trace)?;
        let sizes = |error: PlanError| ReplayError::Sizes {
            ranks: self.ranks,
            slots: self.slots,
            reason: error.to_string(),
        };
        let of_layer = |window, layer| evenest(shape, trace.load(window, layer)).map_err(sizes);
        let of_window = |window| (0..trace.layers).map(|layer| of_layer(window, layer)).collect();
        (0..trace.windows.len()).map(of_window).collect()
    }
}

fn evenest(shape: Shape, load: &[f32]) -> Result<f64, PlanError> {
    let rows = wide(load);
    let request = Sizes { layers: 1, shape, groups: 1, nodes: 1 };
    let mut slots = rebalance(&request, load)?.phy2log;
    repair(&mut slots, shape, 1, &rows);
    let cost = RankCost::Pairs { ms_per_pair: 1.0 };
    let load = PhaseLoad { pairs: &rows, tokens: 1, weight: 1.0, cost: &cost };
    let options = Options { steps_max: 64, dead_zone: 1.0, ..Options::default() };
    let plan = plan_layer(shape, &slots, &[load], &Ranks::default(), &options)?;
    Ok(max_over_mean(&rank_loads(&plan.slots, shape.slots_per_rank, &rows)))
}

/// Experts in order over the ranks; slots that are left over have replicas of the experts that follow a rank's own.
fn in_order(shape: Shape) -> Vec<u32> {
    let Shape { experts, ranks, slots_per_rank } = shape;
    let mut slots = Vec::with_capacity(shape.slots());
    for rank in 0..ranks {
        let own = rank * experts / ranks..(rank + 1) * experts / ranks;
        let following = (own.end..own.end + experts).map(|expert| expert % experts);
        let others = following.filter(|expert| !own.contains(expert));
        let mut row: Vec<u32> = own.clone().chain(others).map(number).collect();
        row.resize(slots_per_rank, crate::contract::EMPTY);
        slots.extend(row);
    }
    slots
}

fn wide(load: &[f32]) -> Vec<f64> {
    load.iter().map(|rows| f64::from(*rows)).collect()
}

fn number(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small positive ratio; the cast saturates"
)]
fn whole(ratio: f32) -> u32 {
    (ratio + 0.5).max(1.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::EMPTY;

    #[test]
    fn workers_start_with_experts_in_order_and_every_slot_full() {
        let shape = |experts, ranks, slots_per_rank| Shape { experts, ranks, slots_per_rank };
        assert_eq!(in_order(shape(4, 2, 2)), [0, 1, 2, 3]);
        assert_eq!(in_order(shape(4, 2, 3)), [0, 1, 2, 2, 3, 0]);
        assert_eq!(in_order(shape(3, 2, 2)), [0, 1, 1, 2]);
        assert_eq!(in_order(shape(2, 2, 3)), [0, 1, EMPTY, 1, 0, EMPTY]);
        for (experts, ranks, slots) in [(64, 8, 9), (256, 32, 9), (10, 4, 3)] {
            let shape = shape(experts, ranks, slots);
            assert_eq!(shape.check_slots(&in_order(shape)), Ok(()));
        }
    }

    fn cluster() -> Cluster {
        Cluster {
            ranks: 2,
            slots: 4,
            nodes: 1,
            expert_groups: 1,
            expert_bytes: 10,
            phase: Phase::Prefill,
            call_tokens: 8,
            cost: Roofline { fixed_ms: 0.5, ms_per_active: 0.0, ms_per_pair: 0.25 },
            told: Vec::new(),
        }
    }

    fn trace() -> Trace {
        let window =
            |load: [f32; 4]| Recorded { workload: String::new(), tokens: 4.0, load: load.to_vec() };
        let windows =
            vec![window([1.0; 4]), window([3.0, 1.0, 0.0, 0.0]), window([2.0, 0.0, 2.0, 0.0])];
        Trace { first_layer: 0, layers: 1, experts: 4, windows }
    }

    #[test]
    fn the_next_window_is_what_scores() {
        let outcome = cluster().replay(&trace(), &[0, 1, 2], &Planner::Nobody).unwrap();
        assert_eq!(outcome.max_over_mean, [2.0, 1.0]);
        // Eight tokens a call, twice those of a window: 8 and 4 rows on the slower rank.
        assert_eq!(outcome.predicted_ms, (2.5 + 1.5) / 2.0);
        assert_eq!((outcome.moved, outcome.fuel), (0, 0));
        let best = cluster().best_known(&trace()).unwrap();
        assert_eq!(best, [[1.0], [1.5], [1.0]]);
    }

    #[test]
    fn sizes_that_no_placement_has_are_named() {
        let refused = |cluster: Cluster| {
            cluster.replay(&trace(), &[0, 1], &Planner::Nobody).unwrap_err().to_string()
        };
        let found = refused(Cluster { slots: 2, ..cluster() });
        assert!(found.contains("2 ranks with 2 slots") && found.contains("4 experts"), "{found}");
        assert!(refused(Cluster { slots: 5, ..cluster() }).contains("as many slots on each"));
        assert!(refused(Cluster { nodes: 3, ..cluster() }).contains("3 nodes"));
    }
}
