//! What was measured of tactics, and what was chosen by it.

use protocol::tactics::{Choice, Measurement, Problem, Provenance, Tactics};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::FromRow;

use super::{Store, StoreError, signed};

/// What a policy chose for a problem of a group.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) provenance: Provenance,
    pub(crate) problem: Problem,
    pub(crate) choices: Vec<Choice>,
    /// As it is asked for, and the digest of the version that answered.
    pub(crate) policy: (String, String),
    /// SHA-256 of policy and question.
    pub(crate) input: String,
    pub(crate) explanation: String,
    /// Milliseconds since 1970.
    pub(crate) made_ms: u64,
}

#[derive(FromRow)]
struct Row {
    provenance: String,
    problem: String,
    choices: String,
    policy: String,
    digest: String,
    input: String,
    explanation: String,
    made_ms: i64,
}

impl Store {
    /// Keeps what a worker has measured. Of two times for the same the newer one stays, and of equally new ones the slower: the
    /// slowest rank counts.
    pub(crate) async fn keep_measurements(&self, tactics: &Tactics) -> Result<(), StoreError> {
        let provenance = text(&tactics.provenance)?;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for measured in &tactics.measurements {
            sqlx::query(
                "INSERT INTO measurements
                     (provenance, problem, tactic, tokens, runs, median_us, p99_us, measured_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT DO UPDATE SET runs = excluded.runs, median_us = excluded.median_us,
                     p99_us = excluded.p99_us, measured_ms = excluded.measured_ms
                 WHERE excluded.measured_ms > measured_ms
                    OR excluded.measured_ms = measured_ms AND excluded.median_us > median_us",
            )
            .bind(&provenance)
            .bind(text(&measured.problem)?)
            .bind(&measured.tactic)
            .bind(measured.tokens)
            .bind(measured.runs)
            .bind(measured.median_us)
            .bind(measured.p99_us)
            .bind(signed(measured.measured_ms)?)
            .execute(&mut *transaction)
            .await?;
        }
        self.commit(transaction).await
    }

    /// What was measured of a problem.
    pub(crate) async fn measurements(
        &self,
        provenance: &Provenance,
        problem: &Problem,
    ) -> Result<Vec<Measurement>, StoreError> {
        let rows: Vec<(String, u32, u32, f32, f32, i64)> = sqlx::query_as(
            "SELECT tactic, tokens, runs, median_us, p99_us, measured_ms FROM measurements
             WHERE provenance = ?1 AND problem = ?2 ORDER BY tokens, median_us, tactic",
        )
        .bind(text(provenance)?)
        .bind(text(problem)?)
        .fetch_all(&self.pool)
        .await?;
        let measured = |(tactic, tokens, runs, median_us, p99_us, measured_ms): (
            String,
            u32,
            u32,
            f32,
            f32,
            i64,
        )| {
            let (problem, measured_ms) = (*problem, measured_ms.unsigned_abs());
            Measurement { problem, tactic, tokens, runs, median_us, p99_us, measured_ms }
        };
        Ok(rows.into_iter().map(measured).collect())
    }

    /// Keeps what was chosen for a problem of a group, in place of what was.
    pub(crate) async fn keep_chosen(&self, group: &str, chosen: &Chosen) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query(
            "INSERT OR REPLACE INTO tactic_tables
                 (group_name, provenance, problem, choices, policy, digest, input, explanation,
                  made_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )
        .bind(group)
        .bind(text(&chosen.provenance)?)
        .bind(text(&chosen.problem)?)
        .bind(text(&chosen.choices)?)
        .bind(&chosen.policy.0)
        .bind(&chosen.policy.1)
        .bind(&chosen.input)
        .bind(&chosen.explanation)
        .bind(signed(chosen.made_ms)?)
        .execute(&mut *transaction)
        .await?;
        self.commit(transaction).await
    }

    /// Everything that was chosen for a group, newest first.
    pub(crate) async fn chosen(&self, group: &str) -> Result<Vec<Chosen>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT provenance, problem, choices, policy, digest, input, explanation, made_ms
             FROM tactic_tables WHERE group_name = ?1 ORDER BY made_ms DESC, problem",
        )
        .bind(group)
        .fetch_all(&self.pool)
        .await?;
        let chosen = |row: Row| {
            Ok(Chosen {
                provenance: read(&row.provenance)?,
                problem: read(&row.problem)?,
                choices: read(&row.choices)?,
                policy: (row.policy, row.digest),
                input: row.input,
                explanation: row.explanation,
                made_ms: row.made_ms.unsigned_abs(),
            })
        };
        rows.into_iter().map(chosen).collect()
    }
}

fn text(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(StoreError::Tactics)
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(StoreError::Tactics)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choosing::tests::{PROBLEM, measured, tactics};

    #[tokio::test]
    async fn the_newest_measurement_counts_and_the_slowest_of_equally_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("t.sqlite")).await.unwrap();
        let keep = async |measurements: Vec<Measurement>| {
            let all = Tactics { measurements, ..tactics() };
            store.keep_measurements(&all).await.unwrap();
        };
        let at = |measured_ms, of: Measurement| Measurement { measured_ms, ..of };
        keep(vec![at(5, measured("fast", 1, 2.0)), at(5, measured("slow", 1, 3.0))]).await;
        keep(vec![at(5, measured("fast", 1, 1.5)), at(5, measured("slow", 1, 3.5))]).await;
        let times = async || -> Vec<(String, f32)> {
            let all = store.measurements(&tactics().provenance, &PROBLEM).await.unwrap();
            all.into_iter().map(|m| (m.tactic, m.median_us)).collect()
        };
        assert_eq!(times().await, [("fast".to_owned(), 2.0), ("slow".to_owned(), 3.5)]);
        keep(vec![at(4, measured("fast", 1, 9.0)), at(6, measured("slow", 1, 1.0))]).await;
        assert_eq!(times().await, [("slow".to_owned(), 1.0), ("fast".to_owned(), 2.0)]);
        let other = Provenance { kernels: "other".to_owned(), ..tactics().provenance };
        assert_eq!(store.measurements(&other, &PROBLEM).await.unwrap(), []);
        let chosen = |explanation: &str, made_ms| Chosen {
            provenance: tactics().provenance,
            problem: PROBLEM,
            choices: vec![Choice { problem: PROBLEM, tokens: 1, tactic: "fast".to_owned() }],
            policy: ("measured_table".to_owned(), "abc".to_owned()),
            input: "def".to_owned(),
            explanation: explanation.to_owned(),
            made_ms,
        };
        store.keep_chosen("g", &chosen("first", 1)).await.unwrap();
        store.keep_chosen("g", &chosen("second", 2)).await.unwrap();
        assert_eq!(store.chosen("g").await.unwrap(), [chosen("second", 2)]);
        assert_eq!(store.chosen("other").await.unwrap(), []);
    }
}
