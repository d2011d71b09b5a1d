//! What policies proposed.

use sqlx::FromRow;

use super::audit::{self, Entry};
use super::{Store, StoreError, signed};
use crate::proposing::Proposal;

#[derive(FromRow)]
struct Row {
    id: String,
    proposal: String,
}

impl TryFrom<Row> for Proposal {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { id, proposal } = row;
        serde_json::from_str(&proposal).map_err(|source| StoreError::Proposal { id, source })
    }
}

impl Store {
    /// Keeps a proposal, and what was kept under its name if that was before.
    pub(crate) async fn keep_proposal(
        &self,
        proposal: Proposal,
        entry: Entry<'_>,
    ) -> Result<Proposal, StoreError> {
        let id = proposal.id.clone();
        let text = serde_json::to_string(&proposal)
            .map_err(|source| StoreError::Proposal { id: id.clone(), source })?;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let made = sqlx::query(
            "INSERT INTO proposals (id, group_name, made_ms, proposal) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO NOTHING",
        )
        .bind(&id)
        .bind(&proposal.group)
        .bind(signed(proposal.made_ms)?)
        .bind(text)
        .execute(&mut *transaction)
        .await?;
        if made.rows_affected() == 0 {
            drop(transaction);
            return Ok(self.proposal(&id).await?.unwrap_or(proposal));
        }
        let told = serde_json::json!({
            "policy": proposal.policy,
            "moved": proposal.moved,
            "layers": proposal.changes.len(),
        });
        let target = format!("{}/{id}", proposal.group);
        audit::write(&mut transaction, entry.of(&target).made(&told)).await?;
        self.commit(transaction).await?;
        Ok(proposal)
    }

    /// A proposal by its name.
    pub(crate) async fn proposal(&self, id: &str) -> Result<Option<Proposal>, StoreError> {
        let row: Option<Row> = sqlx::query_as("SELECT id, proposal FROM proposals WHERE id = ?1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Proposal::try_from).transpose()
    }

    /// The newest `limit` proposals of a group made before `before`, newest first.
    pub(crate) async fn proposals(
        &self,
        group: &str,
        before: (u64, &str),
        limit: usize,
    ) -> Result<Vec<Proposal>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, proposal FROM proposals
             WHERE group_name = ?1 AND (made_ms, id) < (?2, ?3)
             ORDER BY made_ms DESC, id DESC LIMIT ?4",
        )
        .bind(group)
        .bind(i64::try_from(before.0).unwrap_or(i64::MAX))
        .bind(before.1)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Proposal::try_from).collect()
    }
}
