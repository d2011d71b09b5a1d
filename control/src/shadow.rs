//! Asks shadows whenever a window has settled, and scores the plans that they made before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use policy_host::Verdict;
use policy_host::contract::placer::{Budget, Request};
use serde_json::json;

use crate::balancing::Balancing;
use crate::limits::SETTLED_TICK_MS;
use crate::policies::AskError;
use crate::propose::{ProposeError, request};
use crate::proposing::moved_by;
use crate::registry::{ask, policy};
use crate::shadowing::{Entrant, Shadows, planned, score};
use crate::state::{Shared, State};
use crate::store::StoreError;
use crate::store::scores::Scored;
use crate::store::windows::{Of, Span};

/// Plans that wait for the next window.
struct Waiting {
    /// Digest of the group's model.
    model: String,
    /// The end of the newest window that they were made of.
    end_ms: u64,
    /// First what was in force.
    plans: Vec<Planned>,
}

/// What an entrant has answered.
struct Planned {
    /// All but the score.
    of: Scored,
    /// Every layer's; none if there is no plan.
    placements: Option<Vec<Vec<u32>>>,
}

/// Looks after every group that has shadows, again and again. Plans that wait are not kept over a restart: one window is not
/// scored then.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(Duration::from_millis(SETTLED_TICK_MS));
    let mut waiting: BTreeMap<String, Waiting> = BTreeMap::new();
    loop {
        time.tick().await;
        let all = match state.store.all_settings::<Shadows>().await {
            Ok(all) => all,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "shadows are not asked");
                continue;
            }
        };
        waiting.retain(|group, _| all.get(group).is_some_and(|of| !of.policies.is_empty()));
        for (group, shadows) in all {
            match look_after(&state, &group, &shadows, waiting.get(&group)).await {
                Ok(Some(plans)) => {
                    waiting.insert(group, plans);
                }
                Ok(None) => {}
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(group, error, "shadows are not asked");
                }
            }
        }
    }
}

/// Scores what waits and asks anew, if there is a newer window; new plans.
async fn look_after(
    state: &State,
    group: &str,
    shadows: &Shadows,
    waiting: Option<&Waiting>,
) -> Result<Option<Waiting>, ProposeError> {
    let balancing: Balancing = state.store.setting(group).await?;
    let entrants = shadows.entrants(&balancing);
    let model = state.fleet().model_of(group).map(|model| model.digest.clone());
    let (Some(model), false) = (model, entrants.is_empty()) else { return Ok(None) };
    let of = Of { group, model: &model, span: Span::Window };
    let Some(newest_ms) = state.store.newest_end(of, state.settled_ms()).await? else {
        return Ok(None);
    };
    let waiting = waiting.filter(|waiting| waiting.model == model);
    if waiting.is_some_and(|waiting| waiting.end_ms >= newest_ms) {
        return Ok(None);
    }
    let none = Budget { layers: None, moves_per_layer: None, bytes: None };
    let (model, request) = match request(state, group, "{}", none).await {
        // Nothing is in force for a while: plans wait on.
        Err(ProposeError::Unaskable(_)) => return Ok(None),
        asked => asked?,
    };
    if let Some(waiting) = waiting {
        keep_scores(state, group, waiting, &request).await?;
    }
    let end_ms = request.context.now_ms;
    let mut plans = vec![Planned { of: Scored::default(), placements: Some(in_force(&request)) }];
    for entrant in entrants {
        plans.push(plan(state, group, &entrant, &request).await?);
    }
    Ok(Some(Waiting { model, end_ms, plans }))
}

/// Scores plans by the newest window of `request`.
async fn keep_scores(
    state: &State,
    group: &str,
    waiting: &Waiting,
    request: &Request,
) -> Result<(), StoreError> {
    let end_ms = request.context.now_ms;
    let scored = |Planned { of, placements }: &Planned| {
        let score = placements.as_ref().and_then(|placements| score(request, placements));
        let (max_over_mean, worst) = (score.map(|s| s.max_over_mean), score.map(|s| s.worst));
        Scored { end_ms, max_over_mean, worst, ..of.clone() }
    };
    let scores: Vec<Scored> = waiting.plans.iter().map(scored).collect();
    state.store.keep_scores(group, &scores).await
}

/// What an entrant would do now. One that declines leaves what is in force.
async fn plan(
    state: &State,
    group: &str,
    entrant: &Entrant,
    request: &Request,
) -> Result<Planned, StoreError> {
    let settings = entrant.settings_text();
    let mut question = Request { budget: entrant.budget.into(), ..request.clone() };
    question.context.settings.clone_from(&settings);
    let question = Arc::new(question);
    let of = Scored {
        policy: entrant.policy.clone(),
        settings: settings.clone(),
        budget: json!(entrant.budget).to_string(),
        ..Scored::default()
    };
    let digest = match policy(state, &entrant.policy).await {
        Ok(policy) => policy.digest().to_owned(),
        Err(error) => return failed(of, error),
    };
    let of = Scored { digest, ..of };
    match ask(state, group, (&entrant.policy, settings), &question).await {
        Ok((_, answer)) => {
            let elapsed_us = u64::try_from(answer.elapsed.as_micros()).unwrap_or(u64::MAX);
            let moved = moved_by(request, &answer.value);
            let placements = Some(planned(request, &answer.value));
            Ok(Planned { of: Scored { moved, fuel: answer.fuel, elapsed_us, ..of }, placements })
        }
        Err(AskError::Verdict { verdict: Verdict::Declined { .. }, .. }) => {
            Ok(Planned { of, placements: Some(in_force(request)) })
        }
        Err(error) => failed(of, error),
    }
}

/// An entrant that has no plan for the next window.
fn failed(of: Scored, error: AskError) -> Result<Planned, StoreError> {
    match error {
        AskError::Store(error) => Err(error),
        error => {
            let problem = Some(error.to_string());
            Ok(Planned { of: Scored { problem, ..of }, placements: None })
        }
    }
}

fn in_force(request: &Request) -> Vec<Vec<u32>> {
    request.layers.iter().map(|layer| layer.placement.clone()).collect()
}
