//! What somebody has said of a group.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::audit::{self, Entry};
use super::{Store, StoreError};
use crate::balancing::Balancing;
use crate::choosing::Chooser;
use crate::constraints::Constraints;
use crate::motion::Pace;
use crate::recovering::Recovery;
use crate::shadowing::Shadows;
use crate::splitting::Splitting;

/// A setting of a group, which has its default until somebody says otherwise.
pub(crate) trait Setting: Serialize + DeserializeOwned + Default {
    /// Its name in the store.
    const KIND: &str;
}

impl Setting for Balancing {
    const KIND: &str = "balancing";
}

impl Setting for Chooser {
    const KIND: &str = "tactics";
}

impl Setting for Constraints {
    const KIND: &str = "constraints";
}

impl Setting for Recovery {
    const KIND: &str = "recovery";
}

impl Setting for Splitting {
    const KIND: &str = "splitting";
}

impl Setting for Shadows {
    const KIND: &str = "shadows";
}

impl Setting for Pace {
    const KIND: &str = "pace";
}

impl Store {
    /// The setting of each group for which somebody has said so.
    pub(crate) async fn all_settings<T: Setting>(&self) -> Result<BTreeMap<String, T>, StoreError> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT group_name, value FROM settings WHERE kind = ?1")
                .bind(T::KIND)
                .fetch_all(&self.pool)
                .await?;
        rows.into_iter().map(|(group, text)| Ok((group.clone(), read(&group, &text)?))).collect()
    }

    /// The setting of a group.
    pub(crate) async fn setting<T: Setting>(&self, group: &str) -> Result<T, StoreError> {
        let found: Option<String> =
            sqlx::query_scalar("SELECT value FROM settings WHERE group_name = ?1 AND kind = ?2")
                .bind(group)
                .bind(T::KIND)
                .fetch_optional(&self.pool)
                .await?;
        found.map_or_else(|| Ok(T::default()), |text| read(group, &text))
    }

    /// Changes the setting of a group.
    pub(crate) async fn set<T: Setting>(
        &self,
        group: &str,
        setting: &T,
        entry: Entry<'_>,
    ) -> Result<(), StoreError> {
        let before = json!(self.setting::<T>(group).await?);
        let after = json!(setting);
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query(
            "INSERT OR REPLACE INTO settings (group_name, kind, value) VALUES (?1, ?2, ?3)",
        )
        .bind(group)
        .bind(T::KIND)
        .bind(after.to_string())
        .execute(&mut *transaction)
        .await?;
        audit::write(&mut transaction, entry.of(group).changed(&before, &after)).await?;
        self.commit(transaction).await
    }
}

fn read<T: Setting>(group: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|source| StoreError::Setting {
        group: group.to_owned(),
        kind: T::KIND,
        source,
    })
}
