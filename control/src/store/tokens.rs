//! Tokens, by the hash of their secret.

use sqlx::{FromRow, SqliteConnection};

use super::audit::{Entry, write};
use super::{Store, StoreError, signed};
use crate::access::{Actor, Role};

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Milliseconds since 1970.
    pub(crate) created_ms: u64,
    pub(crate) expires_ms: Option<u64>,
    pub(crate) revoked_ms: Option<u64>,
}

impl Token {
    /// Whether it lets anybody in.
    pub(crate) fn is_valid(&self, now_ms: u64) -> bool {
        self.revoked_ms.is_none() && self.expires_ms.is_none_or(|ends| now_ms < ends)
    }
}

/// A token to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewToken<'a> {
    pub(crate) name: &'a str,
    pub(crate) role: Role,
    /// Of the secret.
    pub(crate) sha256: &'a str,
    pub(crate) expires_ms: Option<u64>,
}

/// Why a token cannot be ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no such token")]
    None,
    #[error("it ended before")]
    Ended,
    #[error("it is the last admin's: nobody could make another")]
    Last,
}

impl From<sqlx::Error> for EndError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

#[derive(FromRow)]
struct Row {
    id: i64,
    name: String,
    role: String,
    created_ms: i64,
    expires_ms: Option<i64>,
    revoked_ms: Option<i64>,
}

impl TryFrom<Row> for Token {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { id, name, role, .. } = row;
        Ok(Self {
            id: id.unsigned_abs(),
            name,
            role: Role::named(&role).ok_or(StoreError::Role(role))?,
            created_ms: row.created_ms.unsigned_abs(),
            expires_ms: row.expires_ms.map(i64::unsigned_abs),
            revoked_ms: row.revoked_ms.map(i64::unsigned_abs),
        })
    }
}

impl Store {
    /// Whose secret hashes to this, if it is valid.
    pub(crate) async fn actor(
        &self,
        sha256: &str,
        now_ms: u64,
    ) -> Result<Option<Actor>, StoreError> {
        let row: Option<Row> = sqlx::query_as(
            "SELECT id, name, role, created_ms, expires_ms, revoked_ms FROM tokens
             WHERE sha256 = ?1",
        )
        .bind(sha256)
        .fetch_optional(&self.pool)
        .await?;
        let token = row.map(Token::try_from).transpose()?.filter(|token| token.is_valid(now_ms));
        Ok(token.map(|Token { id, name, role, .. }| Actor { token: id, name, role }))
    }

    /// The oldest `limit` tokens after `after`.
    pub(crate) async fn tokens(&self, after: u64, limit: usize) -> Result<Vec<Token>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, name, role, created_ms, expires_ms, revoked_ms FROM tokens
             WHERE id > ?1 ORDER BY id LIMIT ?2",
        )
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Token::try_from).collect()
    }

    /// Whether an admin could get in.
    pub(crate) async fn has_admin(&self, now_ms: u64) -> Result<bool, StoreError> {
        Ok(admins(&mut *self.pool.acquire().await?, now_ms).await? > 0)
    }

    /// Keeps a token.
    pub(crate) async fn make_token(
        &self,
        new: NewToken<'_>,
        entry: Entry<'_>,
    ) -> Result<Token, StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let made = insert(&mut transaction, new, entry).await?;
        self.commit(transaction).await?;
        Ok(made)
    }

    /// Keeps the workers' credential of the data folder, unless it is known.
    pub(crate) async fn know_credential(
        &self,
        new: NewToken<'_>,
        entry: Entry<'_>,
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let known: Option<i64> = sqlx::query_scalar("SELECT id FROM tokens WHERE sha256 = ?1")
            .bind(new.sha256)
            .fetch_optional(&mut *transaction)
            .await?;
        if known.is_none() {
            insert(&mut transaction, new, entry).await?;
        }
        self.commit(transaction).await
    }

    /// Ends a token now.
    pub(crate) async fn revoke_token(&self, id: u64, entry: Entry<'_>) -> Result<Token, EndError> {
        let now_ms = entry.at_ms;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let token = valid(&mut transaction, id, now_ms).await?;
        if token.role == Role::Admin && admins(&mut transaction, now_ms).await? == 1 {
            return Err(EndError::Last);
        }
        let revoked = Token { revoked_ms: Some(now_ms), ..token.clone() };
        sqlx::query("UPDATE tokens SET revoked_ms = ?2 WHERE id = ?1")
            .bind(signed(id)?)
            .bind(signed(now_ms)?)
            .execute(&mut *transaction)
            .await?;
        write(&mut transaction, entry.of(&token.name).changed(&facts(&token), &facts(&revoked)))
            .await?;
        self.commit(transaction).await?;
        Ok(revoked)
    }

    /// Makes a token in place of another, which ends at `until_ms`.
    pub(crate) async fn rotate_token(
        &self,
        id: u64,
        sha256: &str,
        until_ms: u64,
        entry: Entry<'_>,
    ) -> Result<Token, EndError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let old = valid(&mut transaction, id, entry.at_ms).await?;
        let ends = old.expires_ms.map_or(until_ms, |ends| ends.min(until_ms));
        sqlx::query("UPDATE tokens SET expires_ms = ?2 WHERE id = ?1")
            .bind(signed(id)?)
            .bind(signed(ends)?)
            .execute(&mut *transaction)
            .await?;
        let ended = Token { expires_ms: Some(ends), ..old.clone() };
        let audited = entry.of(&old.name).changed(&facts(&old), &facts(&ended));
        write(&mut transaction, audited).await?;
        let Token { name, role, expires_ms, .. } = &old;
        let new = NewToken { name, role: *role, sha256, expires_ms: *expires_ms };
        let made = insert(&mut transaction, new, entry).await?;
        self.commit(transaction).await?;
        Ok(made)
    }
}

async fn insert(
    connection: &mut SqliteConnection,
    new: NewToken<'_>,
    entry: Entry<'_>,
) -> Result<Token, StoreError> {
    let NewToken { name, role, sha256, expires_ms } = new;
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO tokens (name, role, sha256, created_ms, expires_ms)
         VALUES (?1, ?2, ?3, ?4, ?5) RETURNING id",
    )
    .bind(name)
    .bind(role.name())
    .bind(sha256)
    .bind(signed(entry.at_ms)?)
    .bind(expires_ms.map(signed).transpose()?)
    .fetch_one(&mut *connection)
    .await?;
    let (id, name, created_ms) = (id.unsigned_abs(), name.to_owned(), entry.at_ms);
    let token = Token { id, name, role, created_ms, expires_ms, revoked_ms: None };
    write(connection, entry.of(&token.name).made(&facts(&token))).await?;
    Ok(token)
}

/// The token, if it is valid.
async fn valid(connection: &mut SqliteConnection, id: u64, now_ms: u64) -> Result<Token, EndError> {
    let row: Option<Row> = sqlx::query_as(
        "SELECT id, name, role, created_ms, expires_ms, revoked_ms FROM tokens WHERE id = ?1",
    )
    .bind(i64::try_from(id).unwrap_or(i64::MAX))
    .fetch_optional(connection)
    .await?;
    let token: Token = row.ok_or(EndError::None)?.try_into()?;
    if token.is_valid(now_ms) { Ok(token) } else { Err(EndError::Ended) }
}

/// How many valid tokens of admins there are.
async fn admins(connection: &mut SqliteConnection, now_ms: u64) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar(
        "SELECT count(*) FROM tokens WHERE role = 'admin' AND revoked_ms IS NULL
             AND (expires_ms IS NULL OR expires_ms > ?1)",
    );
    Ok(count.bind(signed(now_ms)?).fetch_one(connection).await?)
}

/// What the audit log says of a token.
fn facts(token: &Token) -> serde_json::Value {
    let Token { id, role, expires_ms, revoked_ms, .. } = token;
    serde_json::json!({
        "id": id, "role": role, "expires_ms": expires_ms, "revoked_ms": revoked_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(at_ms: u64) -> Entry<'static> {
        let (actor, role) = ("root", Role::Admin);
        Entry::new((actor, role), "token.test", at_ms, ("because", "r-1"))
    }

    fn new(name: &'static str, role: Role, expires_ms: Option<u64>) -> NewToken<'static> {
        NewToken { name, role, sha256: name, expires_ms }
    }

    #[tokio::test]
    async fn tokens_end_when_they_are_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("t.sqlite")).await.unwrap();
        assert!(!store.has_admin(0).await.unwrap());
        let admin = store.make_token(new("a", Role::Admin, None), entry(10)).await.unwrap();
        let viewer = store.make_token(new("v", Role::Viewer, Some(50)), entry(10)).await.unwrap();
        let name = async |sha256: &str, now_ms| {
            store.actor(sha256, now_ms).await.unwrap().map(|actor| actor.name)
        };
        assert_eq!(name("v", 49).await.as_deref(), Some("v"));
        assert_eq!(name("v", 50).await, None, "it has expired");
        assert_eq!(name("x", 0).await, None);
        assert!(matches!(store.revoke_token(viewer.id, entry(60)).await, Err(EndError::Ended)));
        assert!(matches!(store.revoke_token(99, entry(60)).await, Err(EndError::None)));
        assert!(matches!(store.revoke_token(admin.id, entry(60)).await, Err(EndError::Last)));
        // A new secret, and the old one for a while.
        let made = store.rotate_token(admin.id, "a2", 100, entry(60)).await.unwrap();
        assert_eq!((made.name.as_str(), made.role, made.expires_ms), ("a", Role::Admin, None));
        assert_eq!(name("a", 99).await.as_deref(), Some("a"));
        assert_eq!(name("a", 100).await, None);
        store.revoke_token(admin.id, entry(70)).await.unwrap();
        assert_eq!((name("a", 80).await, name("a2", 80).await.as_deref()), (None, Some("a")));
        let names: Vec<_> =
            store.tokens(1, 2).await.unwrap().into_iter().map(|t| (t.id, t.name)).collect();
        assert_eq!(names, [(2, "v".to_owned()), (3, "a".to_owned())]);
        // All of it is in the log, the last first.
        let log = store.audit(u64::MAX, 9).await.unwrap();
        let facts: Vec<_> = log.iter().map(|e| (e.target.as_str(), e.at_ms)).collect();
        assert_eq!(facts, [("a", 70), ("a", 60), ("a", 60), ("v", 10), ("a", 10)]);
        assert_eq!((log[0].reason.as_str(), log[0].actor.as_str()), ("because", "root"));
        let [before, after] = [&log[0].before, &log[0].after].map(|json| json.as_ref().unwrap());
        assert_eq!(
            (&before["revoked_ms"], &after["revoked_ms"]),
            (&serde_json::Value::Null, &70.into())
        );
    }

    #[tokio::test]
    async fn a_credential_that_was_revoked_stays_so() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("t.sqlite")).await.unwrap();
        let credential = new("c", Role::Worker, None);
        store.know_credential(credential, entry(1)).await.unwrap();
        store.know_credential(credential, entry(2)).await.unwrap();
        let known = store.tokens(0, 9).await.unwrap();
        assert_eq!(known.len(), 1);
        store.revoke_token(known[0].id, entry(3)).await.unwrap();
        store.know_credential(credential, entry(4)).await.unwrap();
        assert_eq!(store.actor("c", 5).await.unwrap(), None);
    }
}
