//! Has tactics policies choose by what was measured, and workers use what was chosen: looks whenever a worker has told something
//! new of its tactics, or the store has changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use policy_host::Verdict;
use policy_host::store::digest;
use protocol::session::FromControl;
use protocol::tactics::{Choice, Problem, Tactics};

use crate::choosing::{Chooser, choices, question, same};
use crate::fleet::Command;
use crate::limits::{CHOOSE_TICK_MS, MIGRATE_REST_MS};
use crate::policies::AskError;
use crate::registry::{ask, policy};
use crate::state::{Shared, State, now_ms};
use crate::store::StoreError;
use crate::store::tactics::Chosen;

/// Why nothing was chosen.
#[derive(Debug, thiserror::Error)]
enum ChooseError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the question cannot be written")]
    Json(#[from] serde_json::Error),
}

/// Looks after every group, again and again.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(Duration::from_millis(CHOOSE_TICK_MS));
    let mut told = state.store.told();
    // Groups and questions to which a policy had no answer: the same would have none again.
    let mut failed: BTreeSet<String> = BTreeSet::new();
    loop {
        tokio::select! {
            _ = time.tick() => {}
            () = state.tactics_told.notified() => {}
            changed = told.changed() => if changed.is_err() {
                return;
            },
        }
        let groups = state.fleet().models();
        for (group, _) in groups {
            if let Err(error) = look_after(&state, &group, &mut failed).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(group, error, "tactics stay as they are");
            }
        }
        tokio::time::sleep(Duration::from_millis(MIGRATE_REST_MS)).await;
    }
}

async fn look_after(
    state: &State,
    group: &str,
    failed: &mut BTreeSet<String>,
) -> Result<(), ChooseError> {
    let ranks = state.fleet().tactics(group);
    let mut done: Vec<(Tactics, Vec<Choice>)> = Vec::new();
    for (rank, tactics) in ranks {
        let like = |(known, _): &&(Tactics, _)| {
            let of = |t: &Tactics| (t.provenance.clone(), t.problems.clone(), t.candidates.clone());
            of(known) == of(&tactics)
        };
        let wanted = match done.iter().find(like) {
            Some((_, wanted)) => wanted.clone(),
            None => {
                let wanted = wanted(state, group, &tactics, failed).await?;
                done.push((tactics.clone(), wanted.clone()));
                wanted
            }
        };
        if !wanted.is_empty() && !same(&wanted, &tactics.chosen) {
            let order = Box::new(FromControl::Choose { choices: wanted });
            state.fleet().order(group, rank, Command::Order(order));
        }
    }
    Ok(())
}

/// What ranks like this one are to use.
async fn wanted(
    state: &State,
    group: &str,
    tactics: &Tactics,
    failed: &mut BTreeSet<String>,
) -> Result<Vec<Choice>, ChooseError> {
    let chooser: Chooser = state.store.setting(group).await?;
    let known = state.store.chosen(group).await?;
    let mut wanted = Vec::new();
    for problem in &tactics.problems {
        let mut before = known.iter().filter(|known| known.provenance == tactics.provenance);
        let before = before.find(|known| known.problem == *problem);
        let kept = before.map(|before| before.choices.clone()).unwrap_or_default();
        match choose(state, group, (&chooser, tactics, problem), (before, failed)).await {
            Ok(Some(chosen)) => wanted.extend(chosen.choices),
            Ok(None) => wanted.extend(kept),
            Err(ChooseError::Ask(AskError::Store(error)) | ChooseError::Store(error)) => {
                return Err(error.into());
            }
            // The last good table stands.
            Err(error) => {
                tracing::warn!(group, error = &error as &dyn std::error::Error, "no choice");
                wanted.extend(kept);
            }
        }
    }
    Ok(wanted)
}

/// Has the policy choose for a problem; none where there is nothing new to choose by.
async fn choose(
    state: &State,
    group: &str,
    (chooser, tactics, problem): (&Chooser, &Tactics, &Problem),
    (before, failed): (Option<&Chosen>, &mut BTreeSet<String>),
) -> Result<Option<Chosen>, ChooseError> {
    let measurements = state.store.measurements(&tactics.provenance, problem).await?;
    let settings = chooser.settings_text();
    let previous = before.map(|before| &before.choices[..]).unwrap_or_default();
    let request = question(tactics, problem, &measurements, previous, &settings);
    let Some(request) = request else { return Ok(None) };
    let version = policy(state, &chooser.policy).await?.digest().to_owned();
    let same_without_previous = question(tactics, problem, &measurements, &[], &settings);
    let input = digest(&serde_json::to_vec(&(&version, same_without_previous))?);
    let asked = format!("{group} {input}");
    if before.is_some_and(|before| before.input == input) || failed.contains(&asked) {
        return Ok(None);
    }
    let request = Arc::new(request);
    let answered = ask(state, group, (&chooser.policy, settings), &request).await;
    if let Err(AskError::Verdict { verdict, .. }) = &answered
        && !matches!(verdict, Verdict::Busy { .. } | Verdict::Host { .. })
    {
        failed.insert(asked);
    }
    let (_, answer) = answered?;
    let chosen = Chosen {
        provenance: tactics.provenance.clone(),
        problem: *problem,
        choices: choices(problem, &request, &answer.value),
        policy: (chooser.policy.clone(), version),
        input,
        explanation: answer.value.explanation,
        made_ms: now_ms(),
    };
    state.store.keep_chosen(group, &chosen).await?;
    Ok(Some(chosen))
}
