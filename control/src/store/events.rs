//! What happened, for those who watch. They read from here, each at its own pace: nobody's pace costs
//! memory, and a restart of control loses nothing.

use serde_json::Value;
use sqlx::{FromRow, SqliteConnection};

use super::{Store, StoreError, signed};
use crate::limits::EVENTS_MAX;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub(crate) struct Event {
    pub(crate) id: i64,
    /// Milliseconds since 1970.
    pub(crate) at_ms: i64,
    pub(crate) kind: String,
    /// JSON.
    pub(crate) data: String,
}

/// Writes an event, in whatever transaction the connection is, and forgets the oldest.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    (kind, data): (&str, &Value),
    at_ms: u64,
) -> Result<(), StoreError> {
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO events (at_ms, kind, data) VALUES (?1, ?2, ?3) RETURNING id",
    )
    .bind(signed(at_ms)?)
    .bind(kind)
    .bind(data.to_string())
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query("DELETE FROM events WHERE id <= ?1")
        .bind(id.saturating_sub(EVENTS_MAX))
        .execute(connection)
        .await?;
    Ok(())
}

impl Store {
    /// Something happened.
    pub(crate) async fn tell(
        &self,
        kind: &str,
        data: &Value,
        at_ms: u64,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        write(&mut transaction, (kind, data), at_ms).await?;
        self.commit(transaction).await
    }

    /// The oldest `limit` events after `after`.
    pub(crate) async fn events(&self, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        let events = sqlx::query_as(
            "SELECT id, at_ms, kind, data FROM events WHERE id > ?1 ORDER BY id LIMIT ?2",
        );
        Ok(events.bind(after).bind(limit).fetch_all(&self.pool).await?)
    }

    /// Number of the newest event; 0 before the first.
    pub(crate) async fn newest_event(&self) -> Result<i64, StoreError> {
        let newest: Option<i64> =
            sqlx::query_scalar("SELECT max(id) FROM events").fetch_one(&self.pool).await?;
        Ok(newest.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn events_are_numbered_and_the_oldest_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("e.sqlite")).await.unwrap();
        assert_eq!(store.newest_event().await.unwrap(), 0);
        let mut told = store.told();
        store.tell("worker", &json!({"rank": 1}), 5).await.unwrap();
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        store.tell("worker", &json!({"rank": 2}), 6).await.unwrap();
        let event = &store.events(1, 9).await.unwrap()[0];
        assert_eq!((event.id, event.at_ms, &event.data[..]), (2, 6, "{\"rank\":2}"));
        // The next is so far on that the first is too old.
        sqlx::query("UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'events'")
            .bind(EVENTS_MAX)
            .execute(&store.pool)
            .await
            .unwrap();
        store.tell("worker", &json!({}), 7).await.unwrap();
        let ids: Vec<i64> = store.events(0, 9).await.unwrap().iter().map(|e| e.id).collect();
        assert_eq!(ids, [2, EVENTS_MAX + 1]);
    }
}
