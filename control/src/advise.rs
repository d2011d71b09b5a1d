//! Asks policies when there is new load, for groups whose mode says so, and approves within limits.

use std::collections::BTreeMap;

use protocol::session::Register;

use crate::access::Role;
use crate::balancing::{Balancing, Last, same_as};
use crate::deciding::{Kept, Obstacle};
use crate::limits::{OPEN_PROPOSALS_LOOKED_AT, SETTLED_TICK_MS};
use crate::propose::{ProposeError, propose};
use crate::state::{Shared, State, now_ms};
use crate::store::audit::Entry;
use crate::store::proposals::DecideError;
use crate::store::windows::{Of, Span};

/// Control's own name where a token's would stand.
pub(crate) const CONTROL: &str = "moeplane-control";

/// Why control gave no advice.
#[derive(Debug, thiserror::Error)]
enum AdviseError {
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error(transparent)]
    Decide(#[from] DecideError),
}

/// Looks after every group, again and again.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(std::time::Duration::from_millis(SETTLED_TICK_MS));
    loop {
        time.tick().await;
        match state.store.all_settings().await {
            Ok(all) => look_after(&state, all).await,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "nobody is advised");
            }
        }
    }
}

async fn look_after(state: &State, all: BTreeMap<String, Balancing>) {
    for (group, balancing) in all {
        let Some(model) = state.fleet().model_of(&group).map(|model| model.digest.clone()) else {
            continue;
        };
        let of = Of { group: &group, model: &model, span: Span::Window };
        let newest = state.store.newest_end(of, state.settled_ms()).await;
        let Ok(Some(window_end_ms)) = newest else { continue };
        let now_ms = now_ms();
        let last = state.advice().get(&group).cloned().unwrap_or_default();
        if !balancing.is_due(&last, window_end_ms, now_ms) {
            continue;
        }
        let (proposal, problem) = match advise(state, &group, &balancing).await {
            Ok(kept) => (kept.map(|kept| kept.proposal.id), None),
            Err(error) => {
                tracing::warn!(group, error = &error as &dyn std::error::Error, "no advice");
                (None, Some(error.to_string()))
            }
        };
        // Whoever has changed how the group is balanced meanwhile wants to be advised anew.
        if state.store.setting(&group).await.is_ok_and(|now: Balancing| now != balancing) {
            continue;
        }
        let (asked_ms, window_end_ms) = (Some(now_ms), Some(window_end_ms));
        state.advice().insert(group, Last { asked_ms, window_end_ms, proposal, problem });
    }
}

/// Asks about one group; what is proposed, if anything would change.
async fn advise(
    state: &State,
    group: &str,
    balancing: &Balancing,
) -> Result<Option<Kept>, AdviseError> {
    let proposal = propose(state, group, &balancing.ask).await?;
    if proposal.changes.is_empty() {
        return Ok(None);
    }
    let now_ms = now_ms();
    let of = (group, &proposal.model[..]);
    let present = state.store.present(of, now_ms).await.map_err(ProposeError::Store)?;
    let newest = (u64::MAX, "");
    let known = state.store.proposals(group, newest, OPEN_PROPOSALS_LOOKED_AT).await;
    let known = known.map_err(ProposeError::Store)?;
    let kept = match same_as(&proposal, &known, &present) {
        Some(kept) => kept.clone(),
        None => {
            let born = Kept { proposal, expires_ms: u64::MAX, decision: None };
            // Ranks that do not hold what was approved would only be offered what is superseded already.
            if let Some(obstacle) = born.obstacle(&present) {
                return Err(DecideError::Obstacle(obstacle).into());
            }
            let expires_ms = now_ms + balancing.ask.valid_for_s * 1_000;
            let entry = own_entry("proposal.make", "new load");
            let kept = state.store.keep_proposal(born.proposal, expires_ms, entry).await;
            kept.map_err(ProposeError::Store)?
        }
    };
    let Some(reason) = balancing.approves(&kept.proposal) else { return Ok(Some(kept)) };
    let register = state.fleet().register_of(group).cloned();
    let Some(register) = register.filter(Register::is_placed) else { return Ok(Some(kept)) };
    let entry = own_entry("proposal.approve", &reason);
    match state.store.decide(&register, &kept.proposal.id, true, entry).await {
        // An operator was faster, and has the last word.
        Err(DecideError::Obstacle(Obstacle::Decided { .. })) => Ok(Some(kept)),
        decided => Ok(Some(decided?)),
    }
}

fn own_entry<'a>(action: &'static str, reason: &'a str) -> Entry<'a> {
    Entry::new((CONTROL, Role::Admin), action, now_ms(), (reason, ""))
}
