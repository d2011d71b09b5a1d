//! The audit log: what was changed, by whom and why. Entries are written in the transaction of the change.

use serde_json::{Value, json};
use sqlx::{FromRow, SqliteConnection};

use super::{Store, StoreError, events, signed};
use crate::access::Role;

/// An entry to be written.
#[derive(Debug, Clone)]
pub(crate) struct Entry<'a> {
    actor: (&'a str, Role),
    action: &'static str,
    target: String,
    pub(crate) at_ms: u64,
    /// The reason, and the request's id.
    why: (&'a str, &'a str),
    before: Option<Value>,
    after: Option<Value>,
}

impl<'a> Entry<'a> {
    /// Somebody does something, for a reason and by a request.
    pub(crate) fn new(
        actor: (&'a str, Role),
        action: &'static str,
        at_ms: u64,
        why: (&'a str, &'a str),
    ) -> Self {
        Self { actor, action, target: String::new(), at_ms, why, before: None, after: None }
    }

    /// Who does it, and why.
    pub(crate) fn who(&self) -> (&'a str, &'a str) {
        (self.actor.0, self.why.0)
    }

    /// What it is done to.
    pub(crate) fn of(&self, target: &str) -> Self {
        Self { target: target.to_owned(), ..self.clone() }
    }

    /// Something that was not there before.
    pub(crate) fn made(self, after: &Value) -> Self {
        Self { after: Some(after.clone()), ..self }
    }

    /// Something that was different.
    pub(crate) fn changed(self, before: &Value, after: &Value) -> Self {
        Self { before: Some(before.clone()), after: Some(after.clone()), ..self }
    }
}

/// An entry as it was written.
#[derive(Debug, Clone)]
pub(crate) struct Audited {
    pub(crate) id: u64,
    pub(crate) at_ms: u64,
    pub(crate) actor: String,
    pub(crate) role: String,
    pub(crate) action: String,
    pub(crate) target: String,
    pub(crate) reason: String,
    pub(crate) before: Option<Value>,
    pub(crate) after: Option<Value>,
    pub(crate) request_id: String,
}

#[derive(FromRow)]
struct Row {
    id: i64,
    at_ms: i64,
    actor: String,
    role: String,
    action: String,
    target: String,
    reason: String,
    before: Option<String>,
    after: Option<String>,
    request_id: String,
}

impl TryFrom<Row> for Audited {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let id = row.id;
        let json = |text: Option<String>| {
            let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
            parsed.map_err(|source| StoreError::Audit { id, source })
        };
        Ok(Self {
            id: id.unsigned_abs(),
            at_ms: row.at_ms.unsigned_abs(),
            actor: row.actor,
            role: row.role,
            action: row.action,
            target: row.target,
            reason: row.reason,
            before: json(row.before)?,
            after: json(row.after)?,
            request_id: row.request_id,
        })
    }
}

/// Writes an entry, and tells those who watch, in whatever transaction the connection is.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    entry: Entry<'_>,
) -> Result<(), StoreError> {
    let Entry { actor: (actor, role), action, target, at_ms, why: (reason, request), .. } = entry;
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO audit
             (at_ms, actor, role, action, target, reason, before, after, request_id)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) RETURNING id",
    )
    .bind(signed(at_ms)?)
    .bind(actor)
    .bind(role.name())
    .bind(action)
    .bind(&target)
    .bind(reason)
    .bind(entry.before.map(|json| json.to_string()))
    .bind(entry.after.map(|json| json.to_string()))
    .bind(request)
    .fetch_one(&mut *connection)
    .await?;
    let told = json!({ "id": id, "action": action, "target": target, "actor": actor });
    events::write(connection, ("audit", &told), at_ms).await
}

impl Store {
    /// Writes an entry of something that is not in the store itself.
    pub(crate) async fn write_audit(&self, entry: Entry<'_>) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        write(&mut transaction, entry).await?;
        self.commit(transaction).await
    }

    /// The newest `limit` entries before `before`, newest first.
    pub(crate) async fn audit(
        &self,
        before: u64,
        limit: usize,
    ) -> Result<Vec<Audited>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, at_ms, actor, role, action, target, reason, before, after, request_id
             FROM audit WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
        )
        .bind(i64::try_from(before).unwrap_or(i64::MAX))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Audited::try_from).collect()
    }
}
