//! Which policy a name stands for, what is asked of it, and what went wrong with it.

use std::sync::Arc;

use policy_host::contract::placer::{Budget, Plan};
use policy_host::{Answer, Component, Question, Verdict, shipped};

use crate::balancing::Balancing;
use crate::policies::{AskError, decide, validate};
use crate::propose::{ProposeError, request};
use crate::state::{State, now_ms};
use crate::store::StoreError;
use crate::store::policies::{Active, Uploaded};

/// Hexadecimal digits of a SHA-256.
const DIGEST_DIGITS: usize = 64;

/// A policy's name, as it is looked up: dashes and underscores are the same.
pub(crate) fn key(name: &str) -> String {
    name.replace('-', "_")
}

/// Whether this is a digest, and no name.
pub(crate) fn is_digest(name: &str) -> bool {
    name.len() == DIGEST_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The policy that a name stands for, or the version that a digest is of.
pub(crate) async fn policy(state: &State, name: &str) -> Result<Arc<Component>, AskError> {
    if is_digest(name) {
        return version(state, name).await;
    }
    let name = key(name);
    match state.store.active(&name).await? {
        Some(Active::Uploaded(digest)) => version(state, &digest).await,
        Some(Active::Shipped) | None if is_shipped(&name) => state.policies.shipped(&name).await,
        Some(Active::Shipped) | None => Err(unknown(state, name).await?),
    }
}

/// Whether a policy of this name comes with moeplane.
pub(crate) fn is_shipped(name: &str) -> bool {
    shipped::POLICIES.iter().any(|(known, _)| *known == name)
}

async fn unknown(state: &State, name: String) -> Result<AskError, StoreError> {
    let mut known: Vec<String> = shipped::POLICIES.map(|(name, _)| name.to_owned()).to_vec();
    let uploaded = state.store.policies().await?;
    known.extend(uploaded.into_iter().map(|version| version.name));
    known.sort_unstable();
    known.dedup();
    // One that nobody has activated is known, and stands for nothing.
    let known = known.into_iter().filter(|known| *known != name).collect::<Vec<_>>().join(", ");
    Ok(AskError::Unknown { name, known })
}

/// The version with this digest.
async fn version(state: &State, digest: &str) -> Result<Arc<Component>, AskError> {
    // What is loaded may have been refused since: only what is kept is a version.
    let kept = state.store.policy(digest).await?.is_some();
    if let Some(loaded) = state.policies.loaded(digest).filter(|_| kept) {
        return Ok(loaded);
    }
    if let Some(component) = state.store.component(digest).await? {
        let failed = |verdict| AskError::Verdict { name: digest.to_owned(), verdict };
        return state.policies.load(component).await.map_err(failed);
    }
    for (name, _) in shipped::POLICIES {
        if let Ok(policy) = state.policies.shipped(name).await
            && policy.digest() == digest
        {
            return Ok(policy);
        }
    }
    Err(unknown(state, digest.to_owned()).await?)
}

/// Asks a policy by its name or digest, with settings that it accepts: who answered, and the answer. What went wrong with it
/// is kept.
pub(crate) async fn ask<Q: Question + 'static>(
    state: &State,
    group: &str,
    (name, settings): (&str, String),
    question: &Arc<Q>,
) -> Result<(Arc<Component>, Answer<Q::Decision>), AskError> {
    let policy = policy(state, name).await?;
    let failed = |verdict| AskError::Verdict { name: name.to_owned(), verdict };
    validate(&policy, settings).await.map_err(failed)?;
    let answer = decide_kept(state, group, &policy, question).await?.map_err(failed)?;
    Ok((policy, answer))
}

/// What a policy decides about a group; what went wrong with it is kept.
async fn decide_kept<Q: Question + 'static>(
    state: &State,
    group: &str,
    policy: &Arc<Component>,
    question: &Arc<Q>,
) -> Result<Result<Answer<Q::Decision>, Verdict>, StoreError> {
    let decided = decide(policy, question).await;
    if let Err(verdict) = &decided
        && verdict.is_fault()
    {
        let name = key(&policy.info().name);
        tracing::warn!(group, name, digest = policy.digest(), %verdict, "a policy failed");
        let of = (&name[..], policy.digest());
        state.store.keep_verdict(of, group, verdict, now_ms()).await?;
    }
    Ok(decided)
}

/// What a placement policy would do with a group; nothing is kept but what went wrong.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tried {
    pub(crate) group: String,
    /// Whether the group is balanced by the policy's name.
    pub(crate) uses: bool,
    pub(crate) outcome: Outcome,
}

/// What came of a try.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Plan(Answer<Plan>),
    Verdict(Verdict),
    /// Nothing can be asked about the group now.
    Unaskable(String),
}

impl Tried {
    /// Why the policy must not come to be what the group is balanced by.
    pub(crate) fn obstacle(&self) -> Option<String> {
        match &self.outcome {
            Outcome::Verdict(verdict) if self.uses && verdict.is_fault() => {
                Some(format!("the group {} is balanced by it: {verdict}", self.group))
            }
            _ => None,
        }
    }
}

/// Tries a placement policy on every group, as the group would ask it: with the settings of groups that are balanced by its
/// name, `{}` for others.
pub(crate) async fn try_on_groups(
    state: &State,
    policy: &Arc<Component>,
) -> Result<Vec<Tried>, StoreError> {
    let groups = state.fleet().models();
    let mut tried = Vec::with_capacity(groups.len());
    for (group, _) in groups {
        let balancing: Balancing = state.store.setting(&group).await?;
        let uses = key(&balancing.ask.policy) == key(&policy.info().name);
        let outcome = try_on(state, policy, &group, uses.then_some(&balancing)).await?;
        tried.push(Tried { group, uses, outcome });
    }
    Ok(tried)
}

async fn try_on(
    state: &State,
    policy: &Arc<Component>,
    group: &str,
    balancing: Option<&Balancing>,
) -> Result<Outcome, StoreError> {
    let none = Budget { layers: None, moves_per_layer: None, bytes: None };
    let (settings, budget) = match balancing {
        Some(Balancing { ask, .. }) => (ask.settings_text(), ask.budget.into()),
        None => ("{}".to_owned(), none),
    };
    if let Err(verdict) = validate(policy, settings.clone()).await {
        return Ok(Outcome::Verdict(verdict));
    }
    let question = match request(state, group, &settings, budget).await {
        Ok((_, request)) => Arc::new(request),
        Err(ProposeError::Store(error)) => return Err(error),
        Err(error) => return Ok(Outcome::Unaskable(error.to_string())),
    };
    Ok(match decide_kept(state, group, policy, &question).await? {
        Ok(answer) => Outcome::Plan(answer),
        Err(verdict) => Outcome::Verdict(verdict),
    })
}

/// A version as the store keeps it.
pub(crate) fn described(policy: &Component, actor: &str, uploaded_ms: u64) -> Uploaded {
    let info = policy.info();
    Uploaded {
        digest: policy.digest().to_owned(),
        name: key(&info.name),
        kind: policy.kind().world().to_owned(),
        described: info.into(),
        uploaded_ms,
        actor: actor.to_owned(),
    }
}
