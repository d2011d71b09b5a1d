//! How groups are balanced.

use std::collections::BTreeMap;

use serde_json::json;

use super::audit::{self, Entry};
use super::{Store, StoreError};
use crate::balancing::Balancing;

impl Store {
    /// How each group is balanced for which somebody has said so.
    pub(crate) async fn all_balancing(&self) -> Result<BTreeMap<String, Balancing>, StoreError> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT group_name, balancing FROM balancing")
                .fetch_all(&self.pool)
                .await?;
        rows.into_iter().map(|(group, text)| Ok((group.clone(), read(&group, &text)?))).collect()
    }

    /// How a group is balanced.
    pub(crate) async fn balancing(&self, group: &str) -> Result<Balancing, StoreError> {
        let found: Option<String> =
            sqlx::query_scalar("SELECT balancing FROM balancing WHERE group_name = ?1")
                .bind(group)
                .fetch_optional(&self.pool)
                .await?;
        found.map_or_else(|| Ok(Balancing::default()), |text| read(group, &text))
    }

    /// Changes how a group is balanced.
    pub(crate) async fn set_balancing(
        &self,
        group: &str,
        balancing: &Balancing,
        entry: Entry<'_>,
    ) -> Result<(), StoreError> {
        let before = json!(self.balancing(group).await?);
        let after = json!(balancing);
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query("INSERT OR REPLACE INTO balancing (group_name, balancing) VALUES (?1, ?2)")
            .bind(group)
            .bind(after.to_string())
            .execute(&mut *transaction)
            .await?;
        audit::write(&mut transaction, entry.of(group).changed(&before, &after)).await?;
        self.commit(transaction).await
    }
}

fn read(group: &str, text: &str) -> Result<Balancing, StoreError> {
    serde_json::from_str(text)
        .map_err(|source| StoreError::Balancing { group: group.to_owned(), source })
}
