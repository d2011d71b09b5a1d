//! Shadows: policies that are asked beside the one that a group is balanced by, and whose plans nobody carries out. A plan is
//! scored by the window that comes after those that it was made of: how even its placements would have been then. Pure.

use policy_host::contract::placer::{Plan, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::balance::max_over_mean;
use crate::balancing::Balancing;
use crate::limits::SHADOWS_MAX;
use crate::propose::{BudgetOf, OutOfRange};
use crate::proposing::rank_rows;

/// Who is asked beside the policy that a group is balanced by.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Shadows {
    /// At most 8, all different.
    pub(crate) policies: Vec<Entrant>,
}

/// A policy, and what it is asked with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entrant {
    /// A placement policy by its name, or the digest of a version.
    pub(crate) policy: String,
    /// Its settings.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub(crate) settings: Map<String, Value>,
    /// What its plans may cost.
    #[serde(default)]
    pub(crate) budget: BudgetOf,
}

impl Entrant {
    /// Settings as policies take them.
    pub(crate) fn settings_text(&self) -> String {
        Value::Object(self.settings.clone()).to_string()
    }
}

impl Shadows {
    /// Refuses too many, and one that is there twice.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        let count = self.policies.len();
        let refused =
            |value: String, expected: String| OutOfRange { name: "policies", value, expected };
        if count > SHADOWS_MAX {
            return Err(refused(format!("{count} shadows"), format!("at most {SHADOWS_MAX}")));
        }
        let twice =
            self.policies.iter().enumerate().find(|(at, one)| self.policies[..*at].contains(one));
        match twice {
            Some((_, one)) => Err(refused(format!("{} twice", one.policy), "each once".to_owned())),
            None => Ok(()),
        }
    }

    /// All who are asked: first the policy that the group is balanced by. Nobody where there are no shadows.
    pub(crate) fn entrants(&self, balancing: &Balancing) -> Vec<Entrant> {
        if self.policies.is_empty() {
            return Vec::new();
        }
        let ask = &balancing.ask;
        let (policy, settings, budget) = (ask.policy.clone(), ask.settings.clone(), ask.budget);
        let first = Entrant { policy, settings, budget };
        let others = self.policies.iter().filter(|one| **one != first).cloned().collect();
        [vec![first], others].concat()
    }
}

/// The placements of all layers after a plan.
pub(crate) fn planned(request: &Request, plan: &Plan) -> Vec<Vec<u32>> {
    let of = |layer: &policy_host::contract::types::Layer| {
        let change = plan.changes.iter().find(|change| change.layer == layer.id);
        change.map_or(&layer.placement, |change| &change.placement).clone()
    };
    request.layers.iter().map(of).collect()
}

/// How even placements are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Score {
    /// Rows of the busiest rank beside the mean; the mean over layers that had rows.
    pub(crate) max_over_mean: f64,
    /// The same of the worst layer.
    pub(crate) worst: f64,
}

/// How even `placements`, one for each layer of `request`, were in the newest window of it; none without rows.
pub(crate) fn score(request: &Request, placements: &[Vec<u32>]) -> Option<Score> {
    let newest_ms = request.windows.iter().map(|window| window.end_ms).max()?;
    let newest = || request.windows.iter().filter(|window| window.end_ms == newest_ms);
    let ratio = |(index, slots): (usize, &Vec<u32>)| {
        max_over_mean(&rank_rows(request, newest(), index, slots))
    };
    let ratios: Vec<f64> = placements.iter().enumerate().filter_map(ratio).collect();
    let worst = ratios.iter().copied().reduce(f64::max)?;
    Some(Score { max_over_mean: ratios.iter().sum::<f64>() / ratios.len() as f64, worst })
}

#[cfg(test)]
mod tests {
    use policy_host::example;

    use super::*;

    #[test]
    fn shadows_are_few_and_different() {
        let one = |policy: &str| Entrant { policy: policy.to_owned(), ..Entrant::default() };
        let shadows = |names: &[&str]| Shadows { policies: names.iter().map(|n| one(n)).collect() };
        assert!(shadows(&["a", "b"]).check().is_ok());
        let twice = shadows(&["a", "b", "a"]).check().unwrap_err();
        assert_eq!((&twice.value[..], &twice.expected[..]), ("a twice", "each once"));
        let names: Vec<String> = (0..9).map(|n| n.to_string()).collect();
        let many = shadows(&names.iter().map(String::as_str).collect::<Vec<_>>()).check();
        assert_eq!(many.unwrap_err().value, "9 shadows");
        // The policy that the group is balanced by is asked, too, and once.
        let entrants = |names: &[&str]| {
            let all = shadows(names).entrants(&Balancing::default());
            all.into_iter().map(|one| one.policy).collect::<Vec<_>>()
        };
        assert_eq!(entrants(&[]), Vec::<String>::new());
        assert_eq!(entrants(&["a"]), ["greedy_swap", "a"]);
        assert_eq!(entrants(&["a", "greedy_swap"]), ["greedy_swap", "a"]);
    }

    #[test]
    fn a_plan_is_scored_by_the_newest_window_alone() {
        let mut request = example::placement("{}");
        let newest_ms = request.windows.iter().map(|window| window.end_ms).max().unwrap();
        let experts = request.model.experts as usize;
        for window in &mut request.windows {
            // Two experts of the first layer had rows, in the newest window alone.
            window.load.fill(if window.end_ms == newest_ms { 0.0 } else { 9.0 });
            if window.end_ms == newest_ms {
                (window.load[0], window.load[1]) = (30.0, 10.0);
            }
        }
        assert_eq!(request.windows[0].load.len(), 2 * experts);
        let slots = |first: [u32; 3]| {
            let rest = request.layers[0].placement[3..].to_vec();
            [first.to_vec(), rest].concat()
        };
        let second = request.layers[1].placement.clone();
        // Expert 0 has a replica on the last rank: 15 + 10, 0, 0, 15 rows.
        let now = score(&request, &[slots([0, 1, 7]), second.clone()]).unwrap();
        assert_eq!(now, Score { max_over_mean: 2.5, worst: 2.5 });
        let other = score(&request, &[slots([1, 7, 7]), second]).unwrap();
        assert_eq!(other, Score { max_over_mean: 3.0, worst: 3.0 });
        request.windows.clear();
        assert_eq!(score(&request, &[slots([0, 1, 7])]), None);
    }
}
