//! Versions of policies that were uploaded, which of them names stand for, and what went wrong with them.

use policy_host::Verdict;
use policy_host::contract::meta::Info;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{FromRow, SqliteConnection};

use super::audit::{self, Entry};
use super::{Store, StoreError, signed};
use crate::limits::VERDICTS_MAX;

/// What a version says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Described {
    pub(crate) version: String,
    pub(crate) summary: String,
    /// JSON Schema.
    pub(crate) settings_schema: String,
}

/// A version that was uploaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uploaded {
    pub(crate) digest: String,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) described: Described,
    /// Milliseconds since 1970.
    pub(crate) uploaded_ms: u64,
    pub(crate) actor: String,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Active {
    /// Whatever comes with moeplane under that name.
    Shipped,
    /// A version that was uploaded, by its digest.
    Uploaded(String),
}

/// A call that gave no usable answer.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Failed {
    pub(crate) at_ms: i64,
    pub(crate) digest: String,
    pub(crate) group_name: String,
    /// JSON.
    pub(crate) verdict: String,
}

/// Why a version is not kept, or not activated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it decides {found}, versions before it {expected}")]
    Kind { found: String, expected: String },
    #[error("nothing was activated that could be rolled back")]
    NothingBefore,
}

#[derive(FromRow)]
struct Row {
    digest: String,
    name: String,
    kind: String,
    info: String,
    uploaded_ms: i64,
    actor: String,
}

impl TryFrom<Row> for Uploaded {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { digest, name, kind, uploaded_ms, actor, .. } = row;
        let described = serde_json::from_str(&row.info)
            .map_err(|source| StoreError::Policy { digest: digest.clone(), source })?;
        Ok(Self { digest, name, kind, described, uploaded_ms: uploaded_ms.unsigned_abs(), actor })
    }
}

impl From<&Info> for Described {
    fn from(info: &Info) -> Self {
        let Info { version, summary, settings_schema, .. } = info;
        let [version, summary, settings_schema] =
            [version, summary, settings_schema].map(String::clone);
        Self { version, summary, settings_schema }
    }
}

impl Store {
    /// Keeps a version; false if it was there already.
    pub(crate) async fn keep_policy(
        &self,
        policy: &Uploaded,
        component: &[u8],
        entry: Entry<'_>,
    ) -> Result<bool, RegistryError> {
        let Uploaded { digest, name, kind, described, uploaded_ms, actor } = policy;
        let failed = |source| StoreError::Policy { digest: digest.clone(), source };
        let info = serde_json::to_string(described).map_err(failed)?;
        let begun = self.pool.begin_with("BEGIN IMMEDIATE").await;
        let mut transaction = begun.map_err(StoreError::from)?;
        let before: Option<String> =
            sqlx::query_scalar("SELECT kind FROM policies WHERE name = ?1 LIMIT 1")
                .bind(name)
                .fetch_optional(&mut *transaction)
                .await
                .map_err(StoreError::from)?;
        if let Some(expected) = before.filter(|before| before != kind) {
            return Err(RegistryError::Kind { found: kind.clone(), expected });
        }
        let kept = sqlx::query(
            "INSERT INTO policies (digest, name, kind, info, component, uploaded_ms, actor)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (digest) DO NOTHING",
        )
        .bind(digest)
        .bind(name)
        .bind(kind)
        .bind(info)
        .bind(component)
        .bind(signed(*uploaded_ms)?)
        .bind(actor)
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::from)?;
        let new = kept.rows_affected() > 0;
        if new {
            let after = json!({ "digest": digest, "version": described.version });
            audit::write(&mut transaction, entry.of(name).made(&after)).await?;
        }
        self.commit(transaction).await?;
        Ok(new)
    }

    /// Every version that was uploaded, newest first.
    pub(crate) async fn policies(&self) -> Result<Vec<Uploaded>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT digest, name, kind, info, uploaded_ms, actor FROM policies
             ORDER BY uploaded_ms DESC, digest",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Uploaded::try_from).collect()
    }

    /// One of them.
    pub(crate) async fn policy(&self, digest: &str) -> Result<Option<Uploaded>, StoreError> {
        let row: Option<Row> = sqlx::query_as(
            "SELECT digest, name, kind, info, uploaded_ms, actor FROM policies WHERE digest = ?1",
        )
        .bind(digest)
        .fetch_optional(&self.pool)
        .await?;
        row.map(Uploaded::try_from).transpose()
    }

    /// Its component.
    pub(crate) async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let component = sqlx::query_scalar("SELECT component FROM policies WHERE digest = ?1");
        Ok(component.bind(digest).fetch_optional(&self.pool).await?)
    }

    /// What a name stands for; none if nobody has said so.
    pub(crate) async fn active(&self, name: &str) -> Result<Option<Active>, StoreError> {
        active(&mut *self.pool.acquire().await?, name).await
    }

    /// Has a name stand for a version.
    pub(crate) async fn activate(
        &self,
        name: &str,
        version: &Active,
        entry: Entry<'_>,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let before = active(&mut transaction, name).await?;
        if before.as_ref() == Some(version) {
            return Ok(());
        }
        sqlx::query("INSERT INTO activations (name, digest, at_ms) VALUES (?1, ?2, ?3)")
            .bind(name)
            .bind(version.digest())
            .bind(signed(entry.at_ms)?)
            .execute(&mut *transaction)
            .await?;
        let [before, after] = [before.as_ref(), Some(version)].map(in_audit);
        audit::write(&mut transaction, entry.of(name).changed(&before, &after)).await?;
        self.commit(transaction).await
    }

    /// Has a name stand for what it stood for before; that.
    pub(crate) async fn deactivate(
        &self,
        name: &str,
        entry: Entry<'_>,
    ) -> Result<Option<Active>, RegistryError> {
        let begun = self.pool.begin_with("BEGIN IMMEDIATE").await;
        let mut transaction = begun.map_err(StoreError::from)?;
        let before = active(&mut transaction, name).await?;
        let undone = sqlx::query(
            "UPDATE activations SET rolled_back = 1 WHERE id =
                 (SELECT max(id) FROM activations WHERE name = ?1 AND rolled_back = 0)",
        )
        .bind(name)
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::from)?;
        if undone.rows_affected() == 0 {
            return Err(RegistryError::NothingBefore);
        }
        let after = active(&mut transaction, name).await?;
        let [was, is] = [before.as_ref(), after.as_ref()].map(in_audit);
        audit::write(&mut transaction, entry.of(name).changed(&was, &is)).await?;
        self.commit(transaction).await?;
        Ok(after)
    }

    /// Keeps what became of a call, and forgets the oldest.
    pub(crate) async fn keep_verdict(
        &self,
        (name, digest): (&str, &str),
        group: &str,
        verdict: &Verdict,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let failed = |source| StoreError::Policy { digest: digest.to_owned(), source };
        let text = serde_json::to_string(verdict).map_err(failed)?;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let id: i64 = sqlx::query_scalar(
            "INSERT INTO verdicts (at_ms, name, digest, group_name, verdict)
             VALUES (?1, ?2, ?3, ?4, ?5) RETURNING id",
        )
        .bind(signed(now_ms)?)
        .bind(name)
        .bind(digest)
        .bind(group)
        .bind(text)
        .fetch_one(&mut *transaction)
        .await?;
        sqlx::query("DELETE FROM verdicts WHERE id <= ?1")
            .bind(id.saturating_sub(VERDICTS_MAX))
            .execute(&mut *transaction)
            .await?;
        self.commit(transaction).await
    }

    /// The newest verdicts on a policy, newest first.
    pub(crate) async fn verdicts(&self, name: &str, limit: u32) -> Result<Vec<Failed>, StoreError> {
        let rows = sqlx::query_as(
            "SELECT at_ms, digest, group_name, verdict FROM verdicts WHERE name = ?1
             ORDER BY id DESC LIMIT ?2",
        );
        Ok(rows.bind(name).bind(limit).fetch_all(&self.pool).await?)
    }
}

impl Active {
    /// That of a version that was uploaded.
    pub(crate) fn digest(&self) -> Option<&str> {
        match self {
            Self::Shipped => None,
            Self::Uploaded(digest) => Some(digest),
        }
    }
}

fn in_audit(active: Option<&Active>) -> serde_json::Value {
    match active {
        None => json!(null),
        Some(active) => json!({ "digest": active.digest() }),
    }
}

async fn active(
    connection: &mut SqliteConnection,
    name: &str,
) -> Result<Option<Active>, StoreError> {
    let row: Option<Option<String>> = sqlx::query_scalar(
        "SELECT digest FROM activations WHERE name = ?1 AND rolled_back = 0
         ORDER BY id DESC LIMIT 1",
    )
    .bind(name)
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|digest| digest.map_or(Active::Shipped, Active::Uploaded)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Role;

    fn entry() -> Entry<'static> {
        Entry::new(("ann", Role::Operator), "policy.x", 5, ("why", ""))
    }

    fn version(digest: &str, kind: &str) -> Uploaded {
        let text = str::to_owned;
        let described =
            Described { version: text("1"), summary: text("s"), settings_schema: text("{}") };
        let (digest, name, kind, actor) = (text(digest), text("mine"), text(kind), text("ann"));
        Uploaded { digest, name, kind, described, uploaded_ms: 7, actor }
    }

    #[tokio::test]
    async fn versions_are_kept_once_and_a_name_goes_back_to_what_it_stood_for() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("p.sqlite")).await.unwrap();
        let [a, b] = ["a", "b"].map(|digest| version(digest, "placement"));
        assert!(store.keep_policy(&a, b"A", entry()).await.unwrap());
        assert!(!store.keep_policy(&a, b"A", entry()).await.unwrap());
        assert!(store.keep_policy(&b, b"B", entry()).await.unwrap());
        let other = store.keep_policy(&version("c", "routing"), b"C", entry()).await.unwrap_err();
        assert_eq!(other.to_string(), "it decides routing, versions before it placement");
        assert_eq!(store.component("b").await.unwrap().unwrap(), b"B");
        assert_eq!(store.component("c").await.unwrap(), None);
        let [is_a, is_b] = ["a", "b"].map(|digest| Active::Uploaded(digest.to_owned()));
        assert_eq!(store.active("mine").await.unwrap(), None);
        for version in [&is_a, &is_b, &is_b, &Active::Shipped] {
            store.activate("mine", version, entry()).await.unwrap();
            assert_eq!(store.active("mine").await.unwrap().as_ref(), Some(version));
        }
        // What is active already was not activated twice.
        for before in [Some(is_b), Some(is_a), None] {
            assert_eq!(store.deactivate("mine", entry()).await.unwrap(), before);
            assert_eq!(store.active("mine").await.unwrap(), before);
        }
        let none = store.deactivate("mine", entry()).await.unwrap_err();
        assert!(matches!(none, RegistryError::NothingBefore), "{none}");
        assert_eq!(store.active("other").await.unwrap(), None);
    }

    #[tokio::test]
    async fn verdicts_are_kept_and_the_oldest_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("v.sqlite")).await.unwrap();
        let verdict = |limit| Verdict::Fuel { limit };
        for at_ms in 1..=3 {
            store.keep_verdict(("mine", "a"), "g", &verdict(at_ms), at_ms).await.unwrap();
        }
        let found = store.verdicts("mine", 2).await.unwrap();
        let texts: Vec<_> = found.iter().map(|f| (f.at_ms, f.verdict.as_str())).collect();
        let expected =
            [(3, "{\"verdict\":\"fuel\",\"limit\":3}"), (2, "{\"verdict\":\"fuel\",\"limit\":2}")];
        assert_eq!(texts, expected);
        sqlx::query("UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'verdicts'")
            .bind(VERDICTS_MAX + 1)
            .execute(&store.pool)
            .await
            .unwrap();
        store.keep_verdict(("other", "b"), "g", &verdict(4), 4).await.unwrap();
        assert_eq!(store.verdicts("mine", 9).await.unwrap().len(), 1);
    }
}
