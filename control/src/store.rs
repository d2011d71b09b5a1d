//! What outlives this process: one SQLite file.

pub(crate) mod answers;
pub(crate) mod audit;
pub(crate) mod events;
pub(crate) mod placements;
pub(crate) mod policies;
pub(crate) mod proposals;
pub(crate) mod scores;
pub(crate) mod settings;
pub(crate) mod tactics;
pub(crate) mod tokens;
pub(crate) mod windows;

use std::path::Path;

use protocol::session::Register;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use sqlx::{Sqlite, Transaction};
use tokio::sync::watch;

static SCHEMA: Migrator = sqlx::migrate!("./migrations");

/// Connections of the pool: one writes at a time, whatever their number.
const CONNECTIONS_MAX: u32 = 4;

/// The database.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pool: SqlitePool,
    /// Counts transactions that may have written what others look at.
    told: watch::Sender<u64>,
}

/// The database failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refuses or cannot be reached.
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    /// It cannot be brought to this version's form.
    #[error("the database cannot be brought to this version's form")]
    Schema(#[from] MigrateError),
    /// What it holds is not what this version writes.
    #[error("the registration of rank {rank} of the group {group} cannot be read")]
    Register {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("the load of layer {layer} that ended at {end_ms} cannot be read")]
    Load {
        /// The layer.
        layer: u32,
        /// The end, in milliseconds since 1970.
        end_ms: i64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("epoch {epoch} of the placement of layer {layer} cannot be read")]
    Placement {
        /// The layer.
        layer: u32,
        /// The epoch.
        epoch: i64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("the proposal {id} cannot be read")]
    Proposal {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("what is kept of tactics cannot be read")]
    Tactics(#[source] serde_json::Error),
    /// The same.
    #[error("what is kept of the policy {digest} cannot be read")]
    Policy {
        /// The digest of its component.
        digest: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("the setting {kind} of the group {group} cannot be read")]
    Setting {
        /// The group.
        group: String,
        /// The setting.
        kind: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("entry {id} of the audit log cannot be read")]
    Audit {
        /// The entry.
        id: i64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The same.
    #[error("a token has the role {0}, which there is not")]
    Role(String),
    /// A number that SQLite has no room for.
    #[error("{0} does not fit the database")]
    Number(u64),
}

/// A worker as it was when it was written.
#[derive(Debug)]
pub(crate) struct StoredWorker {
    pub(crate) register: Register,
    pub(crate) first_seen_ms: u64,
    pub(crate) last_seen_ms: u64,
}

impl Store {
    /// Opens or makes the file, and brings it to the newest form.
    pub(crate) async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal);
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS_MAX);
        let pool = pool.connect_with(options).await?;
        SCHEMA.run(&pool).await?;
        Ok(Self { pool, told: watch::Sender::new(0) })
    }

    /// Counts whenever there may be a new event, or another placement or setting.
    pub(crate) fn told(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// Ends a transaction that may have written what others look at.
    async fn commit(&self, transaction: Transaction<'_, Sqlite>) -> Result<(), StoreError> {
        transaction.commit().await?;
        self.told.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Every worker that has ever registered.
    pub(crate) async fn workers(&self) -> Result<Vec<StoredWorker>, StoreError> {
        let rows: Vec<(String, u32, String, i64, i64)> = sqlx::query_as(
            "SELECT group_name, rank, register, first_seen_ms, last_seen_ms FROM workers",
        )
        .fetch_all(&self.pool)
        .await?;
        let worker = |(group, rank, register, first, last): (String, u32, String, i64, i64)| {
            let register = serde_json::from_str(&register);
            Ok(StoredWorker {
                register: register.map_err(|source| StoreError::Register {
                    group,
                    rank,
                    source,
                })?,
                first_seen_ms: first.unsigned_abs(),
                last_seen_ms: last.unsigned_abs(),
            })
        };
        rows.into_iter().map(worker).collect()
    }

    /// A worker has registered.
    pub(crate) async fn keep_worker(&self, of: &Register, now_ms: u64) -> Result<(), StoreError> {
        let text = serde_json::to_string(of);
        let text = text.map_err(|source| StoreError::Register {
            group: of.group.clone(),
            rank: of.rank,
            source,
        })?;
        sqlx::query(
            "INSERT INTO workers (group_name, rank, register, first_seen_ms, last_seen_ms)
             VALUES (?1, ?2, ?3, ?4, ?4)
             ON CONFLICT (group_name, rank)
             DO UPDATE SET register = excluded.register, last_seen_ms = excluded.last_seen_ms",
        )
        .bind(&of.group)
        .bind(of.rank)
        .bind(text)
        .bind(signed(now_ms)?)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// A worker has left.
    pub(crate) async fn saw_worker(&self, of: &Register, last_ms: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE workers SET last_seen_ms = ?3 WHERE group_name = ?1 AND rank = ?2")
            .bind(&of.group)
            .bind(of.rank)
            .bind(signed(last_ms)?)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Whether the database answers.
    pub(crate) async fn answers(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Writes everything to the file and closes it.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

fn signed(number: u64) -> Result<i64, StoreError> {
    i64::try_from(number).map_err(|_too_large| StoreError::Number(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::register;

    #[tokio::test]
    async fn workers_are_there_again_when_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("50% of a #1? file.sqlite");
        let store = Store::open(&path).await.unwrap();
        store.keep_worker(&register(0, 10), 100).await.unwrap();
        store.keep_worker(&register(1, 10), 110).await.unwrap();
        store.keep_worker(&register(0, 20), 120).await.unwrap();
        store.saw_worker(&register(0, 20), 130).await.unwrap();
        store.close().await;
        let store = Store::open(&path).await.unwrap();
        store.answers().await.unwrap();
        let workers = store.workers().await.unwrap();
        let facts: Vec<_> = workers
            .iter()
            .map(|w| (w.register.rank, w.register.incarnation, w.first_seen_ms, w.last_seen_ms))
            .collect();
        assert_eq!(facts, [(0, 20, 100, 130), (1, 10, 110, 110)]);
    }
}
