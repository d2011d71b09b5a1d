//! What a tactics policy is asked about a group, and what its answer says. Pure.

use policy_host::contract::chooser::{
    ActivationFormat, Candidate, Measurement as Asked, Problem as AskedProblem, Request, Table,
};
use policy_host::contract::types::{Context, CostPoint, Phase};
use protocol::message::{ActFormat, ServedLayer};
use protocol::tactics::{Choice, Measurement, Problem, Provenance, Tactics};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// Who chooses the tactics of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Chooser {
    /// A tactics policy by its name, or the digest of a version; `measured_table` if nobody has said otherwise.
    pub(crate) policy: String,
    /// Its settings.
    #[schema(value_type = Object)]
    pub(crate) settings: Map<String, Value>,
}

impl Default for Chooser {
    fn default() -> Self {
        Self { policy: "measured_table".to_owned(), settings: Map::new() }
    }
}

impl Chooser {
    /// Settings as policies take them.
    pub(crate) fn settings_text(&self) -> String {
        Value::Object(self.settings.clone()).to_string()
    }
}

/// What is asked about one problem by its measurements, `previous` being what was chosen for it before; none where nothing was
/// measured. Every size that was measured is a bucket.
pub(crate) fn question(
    tactics: &Tactics,
    problem: &Problem,
    measurements: &[Measurement],
    previous: &[Choice],
    settings: &str,
) -> Option<Request> {
    let place = |tactic: &String| {
        let at = tactics.candidates.iter().position(|known| known == tactic)?;
        u32::try_from(at).ok()
    };
    let asked = |measured: &Measurement| {
        let Measurement { tokens, runs, median_us, p99_us, measured_ms, .. } = *measured;
        let candidate = place(&measured.tactic)?;
        Some(Asked { candidate, tokens, runs, median_us, p99_us, measured_ms })
    };
    let measurements: Vec<Asked> = measurements.iter().filter_map(asked).collect();
    let mut buckets: Vec<u32> = measurements.iter().map(|measured| measured.tokens).collect();
    buckets.sort_unstable();
    buckets.dedup();
    let now_ms = measurements.iter().map(|measured| measured.measured_ms).max()?;
    let of = |tokens: &u32| {
        let choice = previous.iter().find(|choice| choice.tokens == *tokens)?;
        place(&choice.tactic)
    };
    // What nobody has chosen yet is left to the device, which is its first candidate.
    let previous = buckets.iter().map(|tokens| of(tokens).unwrap_or(0)).collect();
    let Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act } = *problem;
    let activation_format = match act {
        ActFormat::Bf16 => ActivationFormat::Bf16,
        ActFormat::Nvfp4 => ActivationFormat::Nvfp4,
    };
    let device = tactics.provenance.device.clone();
    Some(Request {
        context: Context { now_ms, seed: 0, settings: settings.to_owned() },
        problem: AskedProblem {
            device,
            experts,
            top_k,
            hidden,
            intermediate,
            ranks,
            slots_per_rank,
            activation_format,
        },
        candidates: tactics
            .candidates
            .iter()
            .map(|name| Candidate { name: name.clone(), workspace_bytes: 0 })
            .collect(),
        measurements,
        demands: Vec::new(),
        buckets,
        previous,
    })
}

/// What a table says, by names.
pub(crate) fn choices(problem: &Problem, request: &Request, table: &Table) -> Vec<Choice> {
    let chosen = request.buckets.iter().zip(&table.choices);
    let choice = |(&tokens, choice): (&u32, &policy_host::contract::chooser::Choice)| {
        let candidate = request.candidates.get(choice.candidate as usize)?;
        Some(Choice { problem: *problem, tokens, tactic: candidate.name.clone() })
    };
    chosen.filter_map(choice).collect()
}

/// The problem of a rank that is alone with a layer: what is measured of it says what a rank's part of a group's call costs.
pub(crate) fn alone(layer: &ServedLayer) -> Problem {
    let ServedLayer { experts, top_k, hidden, intermediate, .. } = *layer;
    let (ranks, slots_per_rank, act) = (1, experts, ActFormat::Bf16);
    Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act }
}

/// What a rank's part of a call costs, from calls of a rank that was alone and whose experts were chosen evenly: for each size the
/// fastest tactic. Both phases cost the same.
pub(crate) fn cost_points(problem: &Problem, measurements: &[Measurement]) -> Vec<CostPoint> {
    let mut sizes: Vec<u32> = measurements.iter().map(|measured| measured.tokens).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let points = sizes.iter().filter_map(|&tokens| {
        let of_size = measurements.iter().filter(|measured| measured.tokens == tokens);
        let median_us = of_size.map(|measured| measured.median_us).reduce(f32::min)?;
        let (experts, top_k) = (f64::from(problem.experts), f64::from(problem.top_k));
        // Of experts that have the same chance each, those that some token goes to.
        let none = (1.0 - top_k / experts).powf(f64::from(tokens));
        let (pairs, distinct) = (f64::from(tokens) * top_k, experts * (1.0 - none));
        Some((single(pairs), single(distinct), median_us / 1e3))
    });
    let points: Vec<(f32, f32, f32)> = points.collect();
    let of_phase = |phase| {
        let point = move |&(pairs, experts, milliseconds): &(f32, f32, f32)| CostPoint {
            phase,
            pairs,
            experts,
            milliseconds,
        };
        points.iter().map(point)
    };
    of_phase(Phase::Prefill).chain(of_phase(Phase::Decode)).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "the contract has single precision")]
fn single(value: f64) -> f32 {
    value as f32
}

/// Whether two lists choose the same, in whatever order.
pub(crate) fn same(one: &[Choice], other: &[Choice]) -> bool {
    let sorted = |choices: &[Choice]| {
        let mut keys: Vec<(Problem, u32, String)> =
            choices.iter().map(|c| (c.problem, c.tokens, c.tactic.clone())).collect();
        keys.sort_unstable();
        keys
    };
    sorted(one) == sorted(other)
}

/// Why what holds for `measured` is not used on ranks that are `here`; none if it holds for one of them.
pub(crate) fn stale(here: &[Provenance], measured: &Provenance) -> Option<String> {
    if here.contains(measured) {
        return None;
    }
    let Some(one) = here.first() else { return Some("no rank is there".to_owned()) };
    let facts = |of: &Provenance| {
        let Provenance { device, driver, kernels } = of.clone();
        [("device", device), ("driver", driver), ("hash of kernels", kernels)]
    };
    let mut all = facts(one).into_iter().zip(facts(measured));
    let (what, is, was) =
        all.find_map(|((what, is), (_, was))| (is != was).then_some((what, is, was)))?;
    Some(format!("the {what} is {is}, that of the measurements was {was}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const PROBLEM: Problem = Problem {
        experts: 32,
        top_k: 4,
        hidden: 256,
        intermediate: 192,
        ranks: 1,
        slots_per_rank: 32,
        act: ActFormat::Bf16,
    };

    pub(crate) fn tactics() -> Tactics {
        let text = str::to_owned;
        Tactics {
            provenance: Provenance { device: text("cpu"), driver: text("d"), kernels: text("k") },
            problems: vec![PROBLEM],
            candidates: vec![text("by-tokens"), text("fast"), text("slow")],
            measurements: Vec::new(),
            chosen: Vec::new(),
        }
    }

    pub(crate) fn measured(tactic: &str, tokens: u32, median_us: f32) -> Measurement {
        let (problem, tactic, runs) = (PROBLEM, tactic.to_owned(), 50);
        Measurement { problem, tactic, tokens, runs, median_us, p99_us: 9.0, measured_ms: 70 }
    }

    fn choice(tokens: u32, tactic: &str) -> Choice {
        Choice { problem: PROBLEM, tokens, tactic: tactic.to_owned() }
    }

    #[test]
    fn what_was_measured_is_what_is_asked() {
        let ask = |measurements: &[Measurement], previous: &[Choice]| {
            question(&tactics(), &PROBLEM, measurements, previous, "{}")
        };
        assert!(ask(&[], &[]).is_none());
        // A tactic that there is not any more.
        assert!(ask(&[measured("gone", 1, 1.0)], &[]).is_none());
        let all =
            [measured("fast", 64, 1.0), measured("by-tokens", 1, 2.0), measured("slow", 64, 3.0)];
        let previous = [choice(1, "by-tokens"), choice(64, "slow")];
        let request = ask(&all, &previous).unwrap();
        assert_eq!((&request.buckets[..], &request.previous[..]), (&[1, 64][..], &[0, 2][..]));
        let candidates: Vec<u32> = request.measurements.iter().map(|m| m.candidate).collect();
        assert_eq!((candidates, request.context.now_ms), (vec![1, 0, 2], 70));
        assert_eq!(ask(&all, &previous[1..]).unwrap().previous, [0, 2]);
        assert_eq!(ask(&all, &[]).unwrap().previous, [0, 0]);
        let chosen =
            |candidate| policy_host::contract::chooser::Choice { candidate, expected_us: None };
        let table = Table { choices: vec![chosen(0), chosen(1)], explanation: String::new() };
        let said = choices(&PROBLEM, &request, &table);
        assert_eq!(said, [choice(1, "by-tokens"), choice(64, "fast")]);
        assert!(same(&said, &[choice(64, "fast"), choice(1, "by-tokens")]));
        assert!(!same(&said, &previous));
    }

    #[test]
    fn costs_are_those_of_the_fastest_tactic() {
        let all = [measured("slow", 8, 90.0), measured("fast", 8, 50.0), measured("slow", 1, 20.0)];
        let points = cost_points(&PROBLEM, &all);
        let facts: Vec<_> = points.iter().map(|p| (p.phase, p.pairs, p.milliseconds)).collect();
        let (prefill, decode) = (Phase::Prefill, Phase::Decode);
        let expected = [
            (prefill, 4.0, 0.02),
            (prefill, 32.0, 0.05),
            (decode, 4.0, 0.02),
            (decode, 32.0, 0.05),
        ];
        assert_eq!(facts, expected);
        // One token goes to four experts; eight tokens to 32 x (1 - (7/8)^8).
        assert!((points[0].experts - 4.0).abs() < 1e-5, "{}", points[0].experts);
        assert!((points[1].experts - 21.004).abs() < 1e-2, "{}", points[1].experts);
        assert_eq!(cost_points(&PROBLEM, &[]), []);
    }

    #[test]
    fn what_holds_for_no_rank_is_stale() {
        let here = tactics().provenance;
        let was = Provenance { kernels: "old".to_owned(), ..here.clone() };
        assert_eq!(stale(std::slice::from_ref(&here), &here), None);
        let why = stale(&[here], &was).unwrap();
        assert_eq!(why, "the hash of kernels is k, that of the measurements was old");
        assert_eq!(stale(&[], &was).unwrap(), "no rank is there");
    }
}
