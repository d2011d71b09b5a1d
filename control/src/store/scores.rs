//! What plans of shadows would have been worth.

use sqlx::FromRow;

use super::{Store, StoreError, signed};
use crate::limits::SCORES_MAX;

/// What one entrant's plan came to in one window.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Scored {
    /// The end of the window that it was scored by, in milliseconds since 1970.
    pub(crate) end_ms: u64,
    /// As it is asked for; empty for what was in force.
    pub(crate) policy: String,
    /// JSON.
    pub(crate) settings: String,
    /// JSON.
    pub(crate) budget: String,
    pub(crate) digest: String,
    /// Mean and worst rows of the busiest rank beside the mean, over layers; none where there was no plan.
    pub(crate) max_over_mean: Option<f64>,
    pub(crate) worst: Option<f64>,
    pub(crate) moved: u64,
    pub(crate) fuel: u64,
    pub(crate) elapsed_us: u64,
    pub(crate) problem: Option<String>,
}

/// What an entrant came to in all windows.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub(crate) struct Sum {
    pub(crate) policy: String,
    pub(crate) settings: String,
    pub(crate) budget: String,
    pub(crate) digest: String,
    /// Windows that its plans were scored by, and those without a plan.
    pub(crate) windows: i64,
    pub(crate) failed: i64,
    pub(crate) max_over_mean: Option<f64>,
    /// Of what was in force, in the same windows.
    pub(crate) in_force: Option<f64>,
    pub(crate) worst: Option<f64>,
    pub(crate) moved: f64,
    pub(crate) fuel: f64,
    pub(crate) elapsed_us: f64,
    /// The newest.
    pub(crate) problem: Option<String>,
}

impl Store {
    /// Keeps scores of a group's entrants, and forgets the oldest.
    pub(crate) async fn keep_scores(
        &self,
        group: &str,
        scores: &[Scored],
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for scored in scores {
            sqlx::query(
                "INSERT OR REPLACE INTO scores
                     (group_name, end_ms, policy, settings, budget, digest, max_over_mean, worst,
                      moved, fuel, elapsed_us, problem)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )
            .bind(group)
            .bind(signed(scored.end_ms)?)
            .bind(&scored.policy)
            .bind(&scored.settings)
            .bind(&scored.budget)
            .bind(&scored.digest)
            .bind(scored.max_over_mean)
            .bind(scored.worst)
            .bind(signed(scored.moved)?)
            .bind(signed(scored.fuel)?)
            .bind(signed(scored.elapsed_us)?)
            .bind(&scored.problem)
            .execute(&mut *transaction)
            .await?;
        }
        sqlx::query("DELETE FROM scores WHERE id <= (SELECT max(id) FROM scores) - ?1")
            .bind(SCORES_MAX)
            .execute(&mut *transaction)
            .await?;
        self.commit(transaction).await
    }

    /// What each entrant of a group came to in windows that ended after `after_ms`, those that gained most on what was in force
    /// first.
    pub(crate) async fn league(&self, group: &str, after_ms: u64) -> Result<Vec<Sum>, StoreError> {
        let rows = sqlx::query_as(
            "SELECT s.policy, s.settings, s.budget, s.digest,
                    count(s.max_over_mean) AS windows,
                    sum(s.problem IS NOT NULL) AS failed,
                    avg(s.max_over_mean) AS max_over_mean,
                    avg(CASE WHEN s.max_over_mean IS NOT NULL THEN b.max_over_mean END) AS in_force,
                    max(s.worst) AS worst,
                    avg(s.moved) AS moved, avg(s.fuel) AS fuel, avg(s.elapsed_us) AS elapsed_us,
                    (SELECT problem FROM scores p
                     WHERE p.group_name = s.group_name AND p.policy = s.policy
                       AND p.settings = s.settings AND p.budget = s.budget AND p.digest = s.digest
                       AND p.problem IS NOT NULL ORDER BY p.end_ms DESC LIMIT 1) AS problem
             FROM scores s
             LEFT JOIN scores b
               ON b.group_name = s.group_name AND b.end_ms = s.end_ms AND b.policy = ''
             WHERE s.group_name = ?1 AND s.end_ms > ?2 AND s.policy != ''
             GROUP BY s.policy, s.settings, s.budget, s.digest
             ORDER BY avg(s.max_over_mean) - avg(b.max_over_mean) IS NULL,
                      avg(s.max_over_mean) - avg(b.max_over_mean), s.policy",
        );
        Ok(rows.bind(group).bind(signed(after_ms)?).fetch_all(&self.pool).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_league_compares_with_what_was_in_force_in_the_same_windows() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("s.sqlite")).await.unwrap();
        let scored = |end_ms, policy: &str, ratio: Option<f64>, moved| Scored {
            end_ms,
            policy: policy.to_owned(),
            max_over_mean: ratio,
            worst: ratio.map(|ratio| ratio + 1.0),
            moved,
            problem: ratio.is_none().then(|| format!("no plan at {end_ms}")),
            ..Scored::default()
        };
        for (end_ms, in_force, steady, late) in
            [(10, 2.0, 1.5, None), (20, 3.0, 1.5, None), (30, 4.0, 1.5, Some(3.75))]
        {
            let mut scores = vec![
                scored(end_ms, "", Some(in_force), 0),
                scored(end_ms, "steady", Some(steady), 6),
            ];
            scores.push(scored(end_ms, "late", late, 2));
            store.keep_scores("g", &scores).await.unwrap();
        }
        // What comes again is the same.
        store.keep_scores("g", &[scored(30, "steady", Some(1.5), 6)]).await.unwrap();
        let league = store.league("g", 0).await.unwrap();
        let facts: Vec<_> = league
            .iter()
            .map(|s| (&s.policy[..], s.windows, s.failed, s.max_over_mean, s.in_force, s.worst))
            .collect();
        assert_eq!(
            facts,
            [
                ("steady", 3, 0, Some(1.5), Some(3.0), Some(2.5)),
                ("late", 1, 2, Some(3.75), Some(4.0), Some(4.75)),
            ]
        );
        assert_eq!((league[0].moved, &league[0].problem), (6.0, &None));
        assert_eq!(league[1].problem.as_deref(), Some("no plan at 20"));
        let newer = store.league("g", 20).await.unwrap();
        assert_eq!((newer[0].windows, newer[0].in_force), (1, Some(4.0)));
        assert_eq!(store.league("other", 0).await.unwrap(), []);
    }
}
