//! Load: ranks' windows, added up as they come; hours of them, once they are old.

use protocol::session::{LayerWindow, Register, Window};
use serde::Deserialize;
use sqlx::{FromRow, SqliteConnection};
use utoipa::ToSchema;

use super::{Store, StoreError, signed};

/// Milliseconds of an hour.
pub(crate) const HOUR_MS: u64 = 3_600_000;

/// What a row covers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Span {
    /// A window.
    #[default]
    Window,
    /// The windows of an hour.
    Hour,
}

impl Span {
    fn as_str(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Hour => "hour",
        }
    }
}

/// What the engines of a group asked of a layer in one phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Load {
    /// The end of what it covers, in milliseconds since 1970.
    pub(crate) end_ms: u64,
    pub(crate) layer: u32,
    pub(crate) phase: String,
    pub(crate) ranks: Ranks,
    pub(crate) calls: u64,
    pub(crate) tokens: u64,
    pub(crate) distinct_experts: u64,
    /// Of the slowest rank and window.
    pub(crate) latency_us_p50: u64,
    pub(crate) latency_us_p99: u64,
    pub(crate) expert_tokens: Vec<u64>,
}

/// A set of ranks, a bit for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ranks(Vec<u8>);

impl Ranks {
    fn one(rank: u32) -> Self {
        let mut bits = vec![0; rank as usize / 8 + 1];
        bits[rank as usize / 8] = 1 << (rank % 8);
        Self(bits)
    }

    fn add(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| *own |= other);
    }

    /// How many they are.
    pub(crate) fn count(&self) -> u32 {
        self.0.iter().map(|bits| bits.count_ones()).sum()
    }
}

impl Load {
    fn of(rank: u32, end_ms: u64, window: &LayerWindow) -> Self {
        Self {
            end_ms,
            layer: window.layer,
            phase: window.phase.to_string(),
            ranks: Ranks::one(rank),
            calls: window.calls,
            tokens: window.tokens,
            distinct_experts: window.distinct_experts,
            latency_us_p50: window.latency_us_p50,
            latency_us_p99: window.latency_us_p99,
            expert_tokens: window.expert_tokens.clone(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.ranks.add(&other.ranks);
        self.calls += other.calls;
        self.tokens += other.tokens;
        self.distinct_experts += other.distinct_experts;
        self.latency_us_p50 = self.latency_us_p50.max(other.latency_us_p50);
        self.latency_us_p99 = self.latency_us_p99.max(other.latency_us_p99);
        let counts = self.expert_tokens.iter_mut().zip(&other.expert_tokens);
        counts.for_each(|(sum, count)| *sum += count);
    }
}

/// A row as it is stored.
#[derive(FromRow)]
struct Row {
    end_ms: i64,
    layer: u32,
    phase: String,
    ranks: Vec<u8>,
    calls: i64,
    tokens: i64,
    distinct_experts: i64,
    latency_us_p50: i64,
    latency_us_p99: i64,
    expert_tokens: String,
}

/// Its columns.
macro_rules! columns {
    () => {
        "end_ms, layer, phase, ranks, calls, tokens, distinct_experts, latency_us_p50, \
         latency_us_p99, expert_tokens"
    };
}

impl TryFrom<Row> for Load {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { layer, end_ms, .. } = row;
        let expert_tokens = serde_json::from_str(&row.expert_tokens)
            .map_err(|source| StoreError::Load { layer, end_ms, source })?;
        Ok(Self {
            end_ms: end_ms.unsigned_abs(),
            layer,
            phase: row.phase,
            ranks: Ranks(row.ranks),
            calls: row.calls.unsigned_abs(),
            tokens: row.tokens.unsigned_abs(),
            distinct_experts: row.distinct_experts.unsigned_abs(),
            latency_us_p50: row.latency_us_p50.unsigned_abs(),
            latency_us_p99: row.latency_us_p99.unsigned_abs(),
            expert_tokens,
        })
    }
}

/// Whose load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Of<'a> {
    pub(crate) group: &'a str,
    /// Digest of the model.
    pub(crate) model: &'a str,
    pub(crate) span: Span,
}

/// Which part of a list of loads, which are in the order of end, layer and phase.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Only what comes after this; with `newest_first`, before it.
    pub(crate) after: (u64, u32, String),
    /// Only what ended later.
    pub(crate) since_ms: u64,
    /// Only what does not end later.
    pub(crate) until_ms: u64,
    pub(crate) newest_first: bool,
    pub(crate) layer: Option<u32>,
    pub(crate) limit: usize,
}

impl Part {
    /// All that ended in (`after_ms`, `until_ms`], `limit` at a time.
    pub(crate) fn between(after_ms: u64, until_ms: u64, limit: usize) -> Self {
        let (after, layer) = ((0, 0, String::new()), None);
        Self { after, since_ms: after_ms, until_ms, newest_first: false, layer, limit }
    }
}

impl Store {
    /// Adds a rank's window to what ended at `end_ms`, all of it or nothing. One that was added before
    /// changes nothing: a process tells its windows in the order of their numbers.
    pub(crate) async fn keep_window(
        &self,
        of: &Register,
        window: &Window,
        end_ms: u64,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let newer = sqlx::query(
            "INSERT INTO window_numbers (group_name, rank, incarnation, number, kept_ms)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT DO UPDATE SET number = excluded.number, kept_ms = excluded.kept_ms
             WHERE excluded.number > number",
        )
        .bind(&of.group)
        .bind(of.rank)
        .bind(signed(of.incarnation)?)
        .bind(signed(window.number)?)
        .bind(signed(end_ms)?)
        .execute(&mut *transaction)
        .await?;
        if newer.rows_affected() == 0 {
            return Ok(());
        }
        let (group, model) = (&of.group, &of.model.digest);
        for layer in &window.layers {
            let load = Load::of(of.rank, end_ms, layer);
            add(&mut transaction, Of { group, model, span: Span::Window }, load).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// A part of the loads.
    pub(crate) async fn loads(&self, of: Of<'_>, part: &Part) -> Result<Vec<Load>, StoreError> {
        let (end_ms, layer, phase) = &part.after;
        let text = match part.newest_first {
            false => concat!(
                "SELECT ",
                columns!(),
                " FROM windows
                 WHERE group_name = ?1 AND model = ?2 AND span = ?3
                     AND end_ms >= ?4 AND (end_ms, layer, phase) > (?4, ?5, ?6)
                     AND end_ms > ?7 AND end_ms <= ?8 AND (?9 IS NULL OR layer = ?9)
                 ORDER BY end_ms, layer, phase LIMIT ?10"
            ),
            true => concat!(
                "SELECT ",
                columns!(),
                " FROM windows
                 WHERE group_name = ?1 AND model = ?2 AND span = ?3
                     AND end_ms <= ?4 AND (end_ms, layer, phase) < (?4, ?5, ?6)
                     AND end_ms > ?7 AND end_ms <= ?8 AND (?9 IS NULL OR layer = ?9)
                 ORDER BY end_ms DESC, layer DESC, phase DESC LIMIT ?10"
            ),
        };
        let largest = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let rows: Vec<Row> = sqlx::query_as(text)
            .bind(of.group)
            .bind(of.model)
            .bind(of.span.as_str())
            .bind(largest(*end_ms))
            .bind(layer)
            .bind(phase)
            .bind(largest(part.since_ms))
            .bind(largest(part.until_ms))
            .bind(part.layer)
            .bind(largest(part.limit as u64))
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Load::try_from).collect()
    }

    /// The newest end of a load that is not later than `until_ms`.
    pub(crate) async fn newest_end(
        &self,
        of: Of<'_>,
        until_ms: u64,
    ) -> Result<Option<u64>, StoreError> {
        let newest: Option<i64> = sqlx::query_scalar(
            "SELECT max(end_ms) FROM windows
             WHERE group_name = ?1 AND model = ?2 AND span = ?3 AND end_ms <= ?4",
        )
        .bind(of.group)
        .bind(of.model)
        .bind(of.span.as_str())
        .bind(i64::try_from(until_ms).unwrap_or(i64::MAX))
        .fetch_one(&self.pool)
        .await?;
        Ok(newest.map(i64::unsigned_abs))
    }

    /// Adds windows of whole hours that ended up to `until_ms` up to hours; how many rows those are.
    pub(crate) async fn roll_up(&self, until_ms: u64) -> Result<usize, StoreError> {
        let until_ms = until_ms / HOUR_MS * HOUR_MS;
        let hours: Vec<(String, String, u32, String, i64)> = sqlx::query_as(
            "SELECT DISTINCT group_name, model, layer, phase, (end_ms + ?1 - 1) / ?1 * ?1
             FROM windows WHERE span = 'window' AND end_ms <= ?2",
        )
        .bind(signed(HOUR_MS)?)
        .bind(signed(until_ms)?)
        .fetch_all(&self.pool)
        .await?;
        // One at a time: whoever wants to write meanwhile waits for little.
        for (group, model, layer, phase, end_ms) in &hours {
            let of = Of { group, model, span: Span::Hour };
            self.roll_up_hour(of, (*layer, phase), end_ms.unsigned_abs()).await?;
        }
        Ok(hours.len())
    }

    async fn roll_up_hour(
        &self,
        of: Of<'_>,
        (layer, phase): (u32, &str),
        end_ms: u64,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let text = concat!(
            "DELETE FROM windows
             WHERE group_name = ?1 AND model = ?2 AND span = 'window' AND layer = ?3 AND phase = ?4
                 AND end_ms > ?5 AND end_ms <= ?6
             RETURNING ",
            columns!(),
        );
        let rows: Vec<Row> = sqlx::query_as(text)
            .bind(of.group)
            .bind(of.model)
            .bind(layer)
            .bind(phase)
            .bind(signed(end_ms.saturating_sub(HOUR_MS))?)
            .bind(signed(end_ms)?)
            .fetch_all(&mut *transaction)
            .await?;
        let mut sum: Option<Load> = None;
        for row in rows {
            let load = Load { end_ms, ..row.try_into()? };
            match &mut sum {
                Some(sum) => sum.add(&load),
                None => sum = Some(load),
            }
        }
        if let Some(sum) = sum {
            add(&mut transaction, of, sum).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Forgets hours that ended before `end_ms`; how many rows that were.
    pub(crate) async fn forget_hours(&self, end_ms: u64) -> Result<u64, StoreError> {
        let before = signed(end_ms)?;
        sqlx::query("DELETE FROM window_numbers WHERE kept_ms < ?1")
            .bind(before)
            .execute(&self.pool)
            .await?;
        let gone = sqlx::query("DELETE FROM windows WHERE span = 'hour' AND end_ms < ?1");
        Ok(gone.bind(before).execute(&self.pool).await?.rows_affected())
    }
}

/// Adds a load to what is stored of the same time, layer and phase.
async fn add(
    connection: &mut SqliteConnection,
    of: Of<'_>,
    mut load: Load,
) -> Result<(), StoreError> {
    let text = concat!(
        "SELECT ",
        columns!(),
        " FROM windows
         WHERE group_name = ?1 AND model = ?2 AND span = ?3 AND end_ms = ?4 AND layer = ?5
             AND phase = ?6"
    );
    let stored: Option<Row> = sqlx::query_as(text)
        .bind(of.group)
        .bind(of.model)
        .bind(of.span.as_str())
        .bind(signed(load.end_ms)?)
        .bind(load.layer)
        .bind(&load.phase)
        .fetch_optional(&mut *connection)
        .await?;
    if let Some(stored) = stored {
        load.add(&stored.try_into()?);
    }
    let (layer, end_ms) = (load.layer, signed(load.end_ms)?);
    let expert_tokens = serde_json::to_string(&load.expert_tokens)
        .map_err(|source| StoreError::Load { layer, end_ms, source })?;
    let text = concat!(
        "INSERT OR REPLACE INTO windows (group_name, model, span, ",
        columns!(),
        ") VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)"
    );
    sqlx::query(text)
        .bind(of.group)
        .bind(of.model)
        .bind(of.span.as_str())
        .bind(end_ms)
        .bind(layer)
        .bind(load.phase)
        .bind(load.ranks.0)
        .bind(signed(load.calls)?)
        .bind(signed(load.tokens)?)
        .bind(signed(load.distinct_experts)?)
        .bind(signed(load.latency_us_p50)?)
        .bind(signed(load.latency_us_p99)?)
        .bind(expert_tokens)
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use protocol::message::Phase;

    use super::*;
    use crate::fleet::tests::register;

    const ALL: Part = Part {
        after: (0, 0, String::new()),
        since_ms: 0,
        until_ms: u64::MAX,
        newest_first: false,
        layer: None,
        limit: 9,
    };

    fn window(number: u64, expert_tokens: [u64; 2], latency_us: u64) -> Window {
        let layer = |phase| LayerWindow {
            layer: 3,
            phase,
            calls: 2,
            tokens: 3,
            distinct_experts: 2,
            expert_tokens: expert_tokens.to_vec(),
            latency_us_p50: latency_us,
            latency_us_p99: 99,
        };
        let layers = vec![layer(Phase::Prefill), layer(Phase::Decode)];
        Window { number, start_ms: 0, end_ms: 0, closed_by: None, layers }
    }

    fn of(span: Span) -> Of<'static> {
        Of { group: "g", model: "d", span }
    }

    /// End, phase, ranks, calls, median and the rows of each expert.
    async fn facts(
        store: &Store,
        span: Span,
        part: &Part,
    ) -> Vec<(u64, String, u32, u64, Vec<u64>)> {
        let loads = store.loads(of(span), part).await.unwrap();
        let fact = |load: Load| {
            assert_eq!((load.layer, load.latency_us_p99), (3, 99));
            let counts = [vec![load.latency_us_p50], load.expert_tokens].concat();
            (load.end_ms, load.phase, load.ranks.count(), load.calls, counts)
        };
        loads.into_iter().map(fact).collect()
    }

    #[tokio::test]
    async fn ranks_add_up_and_a_window_that_comes_twice_counts_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("w.sqlite")).await.unwrap();
        for (of, window, end_ms) in [
            (register(0, 1), window(1, [3, 1], 50), 100),
            (register(0, 1), window(1, [3, 1], 50), 100),
            (register(1, 1), window(7, [1, 4], 40), 100),
            (register(0, 1), window(2, [0, 1], 10), 200),
            (register(0, 1), window(1, [3, 1], 50), 100),
            // Another process of the rank counts from 1 again.
            (register(0, 2), window(1, [5, 0], 90), 200),
        ] {
            store.keep_window(&of, &window, end_ms).await.unwrap();
        }
        let row = |end_ms, phase: &str, ranks, calls, counts: [u64; 3]| {
            (end_ms, phase.to_owned(), ranks, calls, counts.to_vec())
        };
        let expected = [
            row(100, "decode", 2, 4, [50, 4, 5]),
            row(100, "prefill", 2, 4, [50, 4, 5]),
            row(200, "decode", 1, 4, [90, 5, 1]),
            row(200, "prefill", 1, 4, [90, 5, 1]),
        ];
        assert_eq!(facts(&store, Span::Window, &ALL).await, expected);
        let after = (100, 3, "decode".to_owned());
        let part = Part { after, limit: 2, ..ALL };
        assert_eq!(facts(&store, Span::Window, &part).await, expected[1..3]);
        let after = (200, 3, "decode".to_owned());
        let part = Part { after, newest_first: true, limit: 1, ..ALL };
        assert_eq!(facts(&store, Span::Window, &part).await, expected[1..2]);
        let part = Part { since_ms: 100, ..ALL };
        assert_eq!(facts(&store, Span::Window, &part).await, expected[2..]);
        let part = Part { until_ms: 199, layer: Some(3), ..ALL };
        assert_eq!(facts(&store, Span::Window, &part).await, expected[..2]);
        assert!(facts(&store, Span::Window, &Part { layer: Some(4), ..ALL }).await.is_empty());
    }

    #[tokio::test]
    async fn old_windows_become_hours_whatever_comes_late() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("w.sqlite")).await.unwrap();
        let ends = [1, HOUR_MS, HOUR_MS + 1, 2 * HOUR_MS + 5];
        for (number, end_ms) in (1..).zip(ends) {
            store.keep_window(&register(0, 1), &window(number, [1, 2], 9), end_ms).await.unwrap();
        }
        // Both phases of two hours; the third is not over.
        assert_eq!(store.roll_up(3 * HOUR_MS - 1).await.unwrap(), 4);
        store.keep_window(&register(1, 1), &window(1, [10, 0], 8), 2).await.unwrap();
        assert_eq!(store.roll_up(3 * HOUR_MS - 1).await.unwrap(), 2);
        let hours = facts(&store, Span::Hour, &ALL).await;
        let decode: Vec<_> = hours.into_iter().filter(|row| row.1 == "decode").collect();
        let row = |end, ranks, calls, counts: [u64; 3]| {
            (end, "decode".to_owned(), ranks, calls, counts.to_vec())
        };
        let expected = [row(HOUR_MS, 2, 6, [9, 12, 4]), row(2 * HOUR_MS, 1, 2, [9, 1, 2])];
        assert_eq!(decode, expected);
        let left = facts(&store, Span::Window, &ALL).await;
        assert_eq!(left.iter().map(|row| row.0).collect::<Vec<_>>(), [2 * HOUR_MS + 5; 2]);
        assert_eq!(store.forget_hours(2 * HOUR_MS).await.unwrap(), 2);
        assert_eq!(facts(&store, Span::Hour, &ALL).await.len(), 2);
    }
}
