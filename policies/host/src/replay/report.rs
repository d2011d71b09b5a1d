//! Outcomes as rows: what a table and its JSON show. Replays nothing.

use serde::Serialize;

use super::Outcome;

/// One policy over one or several replays; means are over the replays too.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// The policy.
    pub policy: String,
    /// Its settings.
    pub settings: String,
    /// Replays: one for each order of the workloads.
    pub replays: usize,
    /// Fullest rank over mean rank in the next window, mean over windows and layers.
    pub max_over_mean: f64,
    /// What 95 of 100 of them do not exceed.
    pub max_over_mean_p95: f64,
    /// The greatest.
    pub max_over_mean_max: f64,
    /// Replicas that came to a rank, for each layer and rebalance.
    pub moved_experts: f64,
    /// Bytes of them in a replay.
    pub moved_bytes: f64,
    /// Predicted milliseconds of a layer's call in the next window.
    pub predicted_ms: f64,
    /// Milliseconds of a plan of all layers, median.
    pub planner_ms: f64,
    /// Fuel of a plan of all layers, mean.
    pub planner_fuel: f64,
    /// `max_over_mean` beside that of the best placement known for each window, less 1.
    pub regret: f64,
}

impl Row {
    /// The replays of one policy. `best` has the best known of each replay, as its `max_over_mean` has what was reached.
    #[must_use]
    pub fn of(
        policy: &str,
        settings: &str,
        outcomes: &[Outcome],
        best: &[Vec<f64>],
        expert_bytes: u64,
    ) -> Self {
        let reached: Vec<f64> = outcomes.iter().flat_map(|o| o.max_over_mean.clone()).collect();
        let mut plans: Vec<f64> =
            outcomes.iter().flat_map(|o| &o.planning).map(|t| t.as_secs_f64() * 1e3).collect();
        plans.sort_by(f64::total_cmp);
        let mut ascending = reached.clone();
        ascending.sort_by(f64::total_cmp);
        let moved: u64 = outcomes.iter().map(|outcome| outcome.moved).sum();
        let fuel: u64 = outcomes.iter().map(|outcome| outcome.fuel).sum();
        let replays = outcomes.len().max(1) as f64;
        let max_over_mean = mean(&reached);
        Self {
            policy: policy.to_owned(),
            settings: settings.to_owned(),
            replays: outcomes.len(),
            max_over_mean,
            max_over_mean_p95: quantile(&ascending, 95),
            max_over_mean_max: quantile(&ascending, 100),
            moved_experts: moved as f64 / reached.len().max(1) as f64,
            moved_bytes: moved as f64 * expert_bytes as f64 / replays,
            predicted_ms: outcomes.iter().map(|o| o.predicted_ms).sum::<f64>() / replays,
            planner_ms: quantile(&plans, 50),
            planner_fuel: fuel as f64 / plans.len().max(1) as f64,
            regret: max_over_mean / mean(&best.concat()).max(1.0) - 1.0,
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The least of ascending values that `percent` of all do not exceed.
fn quantile(ascending: &[f64], percent: usize) -> f64 {
    let at = (ascending.len() * percent).div_ceil(100).saturating_sub(1);
    ascending.get(at).copied().unwrap_or_default()
}

/// The rows as text, a line for each policy.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let heads =
        ["max/mean", "p95", "max", "moved", "moved MB", "predicted ms", "plan ms", "regret %"];
    let mut text = format!("{:<20}", "policy");
    heads.iter().for_each(|head| text += &format!(" {head:>12}"));
    text.push('\n');
    for row in rows {
        text += &format!("{:<20}", row.policy);
        let cells = [
            format!("{:.4}", row.max_over_mean),
            format!("{:.3}", row.max_over_mean_p95),
            format!("{:.3}", row.max_over_mean_max),
            format!("{:.3}", row.moved_experts),
            format!("{:.1}", row.moved_bytes / 1e6),
            format!("{:.4}", row.predicted_ms),
            format!("{:.3}", row.planner_ms),
            format!("{:.2}", row.regret * 100.0),
        ];
        cells.iter().for_each(|cell| text += &format!(" {cell:>12}"));
        text.push('\n');
    }
    text +=
        "moved: experts that came to a rank, for each layer and rebalance; MB: of a whole replay\n";
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_row_is_over_all_replays() {
        let outcome = |reached: [f64; 2], moved| Outcome {
            max_over_mean: reached.to_vec(),
            moved,
            predicted_ms: 0.5,
            planning: vec![Duration::from_millis(4), Duration::from_millis(2)],
            fuel: 10,
        };
        let outcomes = [outcome([1.0, 1.5], 4), outcome([1.5, 2.0], 2)];
        let best = [vec![1.0, 1.0], vec![1.0, 2.0]];
        let row = Row::of("p", "{}", &outcomes, &best, 1000);
        assert_eq!((row.replays, row.max_over_mean, row.max_over_mean_max), (2, 1.5, 2.0));
        assert_eq!((row.moved_experts, row.moved_bytes), (1.5, 3000.0));
        assert_eq!((row.planner_ms, row.planner_fuel), (2.0, 5.0));
        assert!((row.regret - 0.2).abs() < 1e-12);
        assert!(table(&[row]).contains("1.5000"));
    }
}
