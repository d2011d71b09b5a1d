//! Windows of load: kept as ranks tell them, read as sums over ranks.

use protocol::session::{LayerWindow, Register, Window};
use sqlx::FromRow;

use super::{Store, StoreError, signed};

/// One rank's window of a layer and a phase.
#[derive(Debug, FromRow)]
pub(crate) struct RankWindow {
    pub(crate) rank: u32,
    pub(crate) layer: u32,
    pub(crate) phase: String,
    pub(crate) end_ms: i64,
    pub(crate) calls: i64,
    pub(crate) tokens: i64,
    pub(crate) distinct_experts: i64,
    pub(crate) latency_us_p50: i64,
    pub(crate) latency_us_p99: i64,
    pub(crate) expert_tokens: String,
}

impl Store {
    /// Keeps a rank's window, all of it or nothing; one that is there already stays as it is.
    pub(crate) async fn keep_window(
        &self,
        of: &Register,
        window: &Window,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        for layer in &window.layers {
            let LayerWindow { phase, expert_tokens, .. } = layer;
            sqlx::query(
                "INSERT INTO windows (group_name, rank, incarnation, number, layer, phase, start_ms,
                     end_ms, calls, tokens, distinct_experts, latency_us_p50, latency_us_p99,
                     expert_tokens)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
                 ON CONFLICT DO NOTHING",
            )
            .bind(&of.group)
            .bind(of.rank)
            .bind(signed(of.incarnation)?)
            .bind(signed(window.number)?)
            .bind(layer.layer)
            .bind(phase.to_string())
            .bind(signed(window.start_ms)?)
            .bind(signed(window.end_ms)?)
            .bind(signed(layer.calls)?)
            .bind(signed(layer.tokens)?)
            .bind(signed(layer.distinct_experts)?)
            .bind(signed(layer.latency_us_p50)?)
            .bind(signed(layer.latency_us_p99)?)
            .bind(serde_json::to_string(expert_tokens).unwrap_or_default())
            .execute(&mut *transaction)
            .await?;
        }
        Ok(transaction.commit().await?)
    }

    /// The oldest `limit` rows of a group that ended in (`after_ms`, `until_ms`], by their end.
    pub(crate) async fn windows(
        &self,
        group: &str,
        (after_ms, until_ms): (u64, u64),
        limit: u32,
    ) -> Result<Vec<RankWindow>, StoreError> {
        let rows = sqlx::query_as(
            "SELECT rank, layer, phase, end_ms, calls, tokens, distinct_experts, latency_us_p50,
                 latency_us_p99, expert_tokens
             FROM windows WHERE group_name = ?1 AND end_ms > ?2 AND end_ms <= ?3
             ORDER BY end_ms, rank, layer, phase LIMIT ?4",
        )
        .bind(group)
        .bind(signed(after_ms)?)
        .bind(i64::try_from(until_ms).unwrap_or(i64::MAX))
        .bind(limit);
        Ok(rows.fetch_all(&self.pool).await?)
    }

    /// Forgets what ended before `end_ms`; how many rows that were.
    pub(crate) async fn forget_windows(&self, end_ms: u64) -> Result<u64, StoreError> {
        let gone = sqlx::query("DELETE FROM windows WHERE end_ms < ?1").bind(signed(end_ms)?);
        Ok(gone.execute(&self.pool).await?.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use protocol::message::Phase;

    use super::*;
    use crate::fleet::tests::register;

    fn window(number: u64, end_ms: u64) -> Window {
        let layer = LayerWindow {
            layer: 0,
            phase: Phase::Decode,
            calls: 2,
            tokens: 3,
            distinct_experts: 2,
            expert_tokens: vec![3, 1],
            latency_us_p50: 50,
            latency_us_p99: 99,
        };
        Window { number, start_ms: end_ms - 10, end_ms, layers: vec![layer] }
    }

    #[tokio::test]
    async fn a_window_that_comes_twice_counts_once_and_old_ones_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("w.sqlite")).await.unwrap();
        for (of, window) in [
            (register(0, 1), window(1, 100)),
            (register(0, 1), window(1, 100)),
            (register(0, 2), window(1, 110)),
            (register(1, 1), window(1, 120)),
        ] {
            store.keep_window(&of, &window).await.unwrap();
        }
        let ends = async |after: u64, limit| -> Vec<i64> {
            let rows = store.windows("g", (after, u64::MAX), limit).await.unwrap();
            rows.iter().map(|row| row.end_ms).collect()
        };
        assert_eq!(ends(0, 9).await, [100, 110, 120]);
        assert_eq!(ends(100, 1).await, [110]);
        assert_eq!(store.forget_windows(110).await.unwrap(), 1);
        assert_eq!(ends(0, 9).await, [110, 120]);
        let row = &store.windows("g", (0, 115), 9).await.unwrap()[0];
        assert_eq!((row.expert_tokens.as_str(), row.phase.as_str()), ("[3,1]", "decode"));
    }
}
