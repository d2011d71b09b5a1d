//! Answers to requests with an idempotency key.

use sqlx::FromRow;

use super::{Store, StoreError, signed};

/// An answer that was given.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub(crate) struct Answer {
    /// SHA-256 of the request.
    pub(crate) request: String,
    pub(crate) status: u16,
    /// None where it had a secret.
    pub(crate) body: Option<String>,
}

impl Store {
    pub(crate) async fn answer(&self, token: u64, key: &str) -> Result<Option<Answer>, StoreError> {
        let answer = sqlx::query_as(
            "SELECT request, status, body FROM answers WHERE token = ?1 AND key = ?2",
        );
        Ok(answer.bind(signed(token)?).bind(key).fetch_optional(&self.pool).await?)
    }

    pub(crate) async fn keep_answer(
        &self,
        (token, key): (u64, &str),
        answer: &Answer,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT OR REPLACE INTO answers (token, key, request, status, body, at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(signed(token)?)
        .bind(key)
        .bind(&answer.request)
        .bind(answer.status)
        .bind(&answer.body)
        .bind(signed(now_ms)?)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets answers that were given before `at_ms`.
    pub(crate) async fn forget_answers(&self, at_ms: u64) -> Result<(), StoreError> {
        let gone = sqlx::query("DELETE FROM answers WHERE at_ms < ?1");
        gone.bind(signed(at_ms)?).execute(&self.pool).await?;
        Ok(())
    }
}
