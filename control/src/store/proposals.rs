//! What policies proposed, and what was decided.

use protocol::session::Register;
use serde_json::json;
use sqlx::{FromRow, Sqlite, SqliteConnection, Transaction};

use super::audit::{self, Entry};
use super::placements::{PlaceError, commit_proposal, newest_epochs};
use super::{Store, StoreError, events, signed};
use crate::deciding::{Decision, Kept, Obstacle, Present, Standing};
use crate::proposing::Proposal;

/// Why nothing was decided.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecideError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no such proposal")]
    None,
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    #[error(transparent)]
    Place(#[from] PlaceError),
}

impl From<sqlx::Error> for DecideError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

#[derive(FromRow)]
struct Row {
    id: String,
    proposal: String,
    expires_ms: i64,
    decision: Option<String>,
}

impl TryFrom<Row> for Kept {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { id, proposal, expires_ms, decision } = row;
        let read = || {
            let proposal = serde_json::from_str(&proposal)?;
            Ok((proposal, decision.map(|text| serde_json::from_str(&text)).transpose()?))
        };
        let (proposal, decision) =
            read().map_err(|source| StoreError::Proposal { id: id.clone(), source })?;
        Ok(Self { proposal, expires_ms: expires_ms.unsigned_abs(), decision })
    }
}

impl Store {
    /// Keeps a proposal. One that was kept before under its name stays as it is; if nobody has decided
    /// about it, its time begins anew.
    pub(crate) async fn keep_proposal(
        &self,
        proposal: Proposal,
        expires_ms: u64,
        entry: Entry<'_>,
    ) -> Result<Kept, StoreError> {
        let id = &proposal.id;
        let text = serde_json::to_string(&proposal)
            .map_err(|source| StoreError::Proposal { id: id.clone(), source })?;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let made = sqlx::query(
            "INSERT INTO proposals (id, group_name, made_ms, proposal, expires_ms)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
        )
        .bind(id)
        .bind(&proposal.group)
        .bind(signed(proposal.made_ms)?)
        .bind(text)
        .bind(signed(expires_ms)?)
        .execute(&mut *transaction)
        .await?;
        if made.rows_affected() == 0 {
            sqlx::query("UPDATE proposals SET expires_ms = ?2 WHERE id = ?1 AND decision IS NULL")
                .bind(id)
                .bind(signed(expires_ms)?)
                .execute(&mut *transaction)
                .await?;
            let before = kept(&mut transaction, id).await?;
            transaction.commit().await?;
            return Ok(before.unwrap_or(Kept { proposal, expires_ms, decision: None }));
        }
        let told = json!({
            "policy": proposal.policy,
            "moved": proposal.moved,
            "layers": proposal.changes.len(),
        });
        let target = format!("{}/{id}", proposal.group);
        let at_ms = entry.at_ms;
        audit::write(&mut transaction, entry.of(&target).made(&told)).await?;
        tell(&mut transaction, &proposal, (Standing::Open, at_ms)).await?;
        self.commit(transaction).await?;
        Ok(Kept { proposal, expires_ms, decision: None })
    }

    /// Approves a proposal, which commits its placements, or rejects it. `of` is a worker of its group.
    pub(crate) async fn decide(
        &self,
        of: &Register,
        id: &str,
        approved: bool,
        entry: Entry<'_>,
    ) -> Result<Kept, DecideError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let open = kept(&mut transaction, id).await?.ok_or(DecideError::None)?;
        let (at_ms, model) = (entry.at_ms, &of.model.digest);
        let epochs = newest_epochs(&mut transaction, &of.group, model).await?;
        let present = Present { model: model.clone(), epochs, now_ms: at_ms };
        if let Some(obstacle) = open.obstacle(&present) {
            return Err(obstacle.into());
        }
        if approved && open.proposal.changes.is_empty() {
            return Err(Obstacle::Empty.into());
        }
        if approved {
            commit_proposal(&mut transaction, of, &open.proposal, at_ms).await?;
        }
        let (actor, reason) = entry.who();
        let (actor, reason) = (actor.to_owned(), reason.to_owned());
        let decision = Decision { approved, at_ms, actor, reason };
        self.write_decision(transaction, Kept { decision: Some(decision), ..open }, entry).await
    }

    async fn write_decision(
        &self,
        mut transaction: Transaction<'_, Sqlite>,
        decided: Kept,
        entry: Entry<'_>,
    ) -> Result<Kept, DecideError> {
        let Kept { proposal, decision, .. } = &decided;
        let (id, at_ms) = (&proposal.id, entry.at_ms);
        let text = serde_json::to_string(decision)
            .map_err(|source| StoreError::Proposal { id: id.clone(), source })?;
        sqlx::query("UPDATE proposals SET decision = ?2 WHERE id = ?1")
            .bind(id)
            .bind(text)
            .execute(&mut *transaction)
            .await?;
        let standing = match decision {
            Some(Decision { approved: true, .. }) => Standing::Approved,
            _ => Standing::Rejected,
        };
        let epochs = |next| {
            let changes = proposal.changes.iter();
            changes.map(|change| (change.layer, change.epoch + next)).collect::<Vec<_>>()
        };
        let entry = entry.of(&format!("{}/{id}", proposal.group));
        let entry = match standing {
            Standing::Approved => {
                entry.changed(&json!({ "epochs": epochs(0) }), &json!({ "epochs": epochs(1) }))
            }
            _ => entry,
        };
        audit::write(&mut transaction, entry).await?;
        tell(&mut transaction, proposal, (standing, at_ms)).await?;
        self.commit(transaction).await?;
        Ok(decided)
    }

    /// A proposal by its name.
    pub(crate) async fn proposal(&self, id: &str) -> Result<Option<Kept>, StoreError> {
        kept(&mut *self.pool.acquire().await?, id).await
    }

    /// What a group is now, for its proposals.
    pub(crate) async fn present(
        &self,
        (group, model): (&str, &str),
        now_ms: u64,
    ) -> Result<Present, StoreError> {
        let epochs = newest_epochs(&mut *self.pool.acquire().await?, group, model).await?;
        Ok(Present { model: model.to_owned(), epochs, now_ms })
    }

    /// The newest `limit` proposals of a group made before `before`, newest first.
    pub(crate) async fn proposals(
        &self,
        group: &str,
        before: (u64, &str),
        limit: usize,
    ) -> Result<Vec<Kept>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, proposal, expires_ms, decision FROM proposals
             WHERE group_name = ?1 AND (made_ms, id) < (?2, ?3)
             ORDER BY made_ms DESC, id DESC LIMIT ?4",
        )
        .bind(group)
        .bind(i64::try_from(before.0).unwrap_or(i64::MAX))
        .bind(before.1)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Kept::try_from).collect()
    }
}

async fn kept(connection: &mut SqliteConnection, id: &str) -> Result<Option<Kept>, StoreError> {
    let row: Option<Row> =
        sqlx::query_as("SELECT id, proposal, expires_ms, decision FROM proposals WHERE id = ?1")
            .bind(id)
            .fetch_optional(connection)
            .await?;
    row.map(Kept::try_from).transpose()
}

/// Tells those who watch where a proposal stands.
async fn tell(
    connection: &mut SqliteConnection,
    proposal: &Proposal,
    (standing, at_ms): (Standing, u64),
) -> Result<(), StoreError> {
    let told = json!({ "group": proposal.group, "id": proposal.id, "standing": standing });
    events::write(connection, ("proposal", &told), at_ms).await
}
