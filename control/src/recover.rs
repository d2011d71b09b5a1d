//! Gives up ranks that are lost for longer than their grace, and commits placements in which the others have what only those
//! had. Decides by `recovering`; how experts then come to ranks is the business of `migrate`.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;

use crate::access::Role;
use crate::advise::CONTROL;
use crate::constraints::Constraints;
use crate::limits::RECOVER_TICK_MS;
use crate::recovering::{Recovery, repaired};
use crate::state::{Shared, State, now_ms};
use crate::store::StoreError;
use crate::store::audit::Entry;
use crate::store::windows::{Of, Part, Span};

/// Looks after every group, again and again.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(Duration::from_millis(RECOVER_TICK_MS));
    loop {
        time.tick().await;
        let groups = state.fleet().models();
        for (group, model) in groups {
            if let Err(error) = look_after(&state, (&group, &model)).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(group, error, "lost ranks are not recovered from");
            }
        }
    }
}

async fn look_after(state: &State, (group, model): (&str, &str)) -> Result<(), StoreError> {
    let (now_ms, patience_ms) = (now_ms(), state.patience_ms());
    let (lost, ranks) = {
        let fleet = state.fleet();
        let ranks = fleet.register_of(group).map_or(0, |register| register.ranks);
        (fleet.lost(group, now_ms, patience_ms), ranks)
    };
    let mut gone = BTreeSet::new();
    if !lost.is_empty() {
        let recovery: Recovery = state.store.setting(group).await?;
        gone = recovery.given_up(&lost, ranks, (state.started_ms, now_ms));
    }
    let changed = state.fleet().give_up(group, &gone, (now_ms, patience_ms));
    if changed {
        tracing::warn!(group, ranks = ?gone, "lost ranks are given up until they are back");
        let told = json!({ "group": group, "given_up": gone });
        state.store.tell("recovery", &told, now_ms).await?;
        // What was held up by them goes on.
        state.staged.notify_one();
    }
    if !gone.is_empty() {
        repair(state, (group, model), &gone).await?;
    }
    Ok(())
}

/// Has a place for what only the ranks `gone` have, unless nothing was committed since that was done.
async fn repair(
    state: &State,
    (group, model): (&str, &str),
    gone: &BTreeSet<u32>,
) -> Result<(), StoreError> {
    let newest = state.store.present((group, model), now_ms()).await?.epochs;
    let register = {
        let fleet = state.fleet();
        let known = fleet.recovered(group).is_some_and(|epochs| *epochs == newest);
        let still = fleet.still(group, now_ms(), state.patience_ms());
        match fleet.register_of(group) {
            // Others are missing as well, or take nothing up before they start again.
            Some(register) if !known && still.is_none() => register.clone(),
            _ => return Ok(()),
        }
    };
    let constraints: Constraints = state.store.setting(group).await?;
    let of = Of { group, model, span: Span::Window };
    let mut rows: Vec<(u32, Vec<u64>)> = Vec::new();
    if let Some(end_ms) = state.store.newest_end(of, state.settled_ms()).await? {
        let phases_and_layers = 2 * register.model.layers.len();
        let part = Part::between(end_ms.saturating_sub(1), end_ms, phases_and_layers);
        let loads = state.store.loads(of, &part).await?;
        rows.extend(loads.into_iter().map(|load| (load.layer, load.expert_tokens)));
    }
    let rows_of = |layer: u32| {
        let mut sum: Vec<u64> = Vec::new();
        for (_, rows) in rows.iter().filter(|(of, _)| *of == layer) {
            sum.resize(rows.len(), 0);
            sum.iter_mut().zip(rows).for_each(|(sum, rows)| *sum += rows);
        }
        sum
    };
    let reason = format!("ranks {gone:?} are lost");
    let entry = Entry::new((CONTROL, Role::Admin), "placement.repair", now_ms(), (&reason, ""));
    let epochs = state
        .store
        .repair(&register, entry, |layer, placement| {
            repaired(layer, placement, gone, (&rows_of(layer), &constraints))
        })
        .await?;
    state.fleet().recover(group, gone, epochs);
    state.staged.notify_one();
    Ok(())
}
