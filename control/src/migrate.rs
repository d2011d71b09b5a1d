//! Drives groups to the placements that were committed last, while calls go on: looks at what ranks say whenever that or
//! what is committed changes, and tells them what `migrating` says, as fast as `motion` allows.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::session::{FromControl, LayerPlacement};
use serde_json::{Value, json};

use crate::fleet::Command;
use crate::limits::{COMMITTED_LOOKED_AT, MIGRATE_REST_MS, MIGRATE_TICK_MS};
use crate::migrating::{RankLayer, orders};
use crate::motion::{Motion, Motions, OnItsWay, Pace, Step, on_their_way, told};
use crate::state::{Shared, State, now_ms};
use crate::store::StoreError;

/// What the store says of a group.
#[derive(Debug, Default)]
struct Known {
    model: String,
    /// The newest committed epoch of each layer.
    newest: BTreeMap<u32, u64>,
    pace: Pace,
}

/// Looks after every group, again and again.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(Duration::from_millis(MIGRATE_TICK_MS));
    let mut told = state.store.told();
    let mut known: BTreeMap<String, Known> = BTreeMap::new();
    loop {
        tokio::select! {
            _ = time.tick() => {}
            () = state.staged.notified() => {}
            changed = told.changed() => match changed {
                Ok(()) => known.clear(),
                Err(_the_store_has_gone) => return,
            },
        }
        let groups = state.fleet().models();
        for (group, model) in groups {
            if let Err(error) = look_after(&state, (&group, &model), &mut known).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(group, error, "placements stay as they are");
            }
        }
        tokio::time::sleep(Duration::from_millis(MIGRATE_REST_MS)).await;
    }
}

async fn look_after(
    state: &State,
    (group, model): (&str, &str),
    known: &mut BTreeMap<String, Known>,
) -> Result<(), StoreError> {
    if known.get(group).is_none_or(|known| known.model != model) {
        let newest = state.store.present((group, model), now_ms()).await?.epochs;
        let pace = state.store.setting(group).await?;
        known.insert(group.to_owned(), Known { model: model.to_owned(), newest, pace });
    }
    let Some(Known { newest, pace, .. }) = known.get(group) else { return Ok(()) };
    throttle(state, group, pace.throttle());
    let now_ms = now_ms();
    let layers = state.fleet().staging(group, None, now_ms, state.patience_ms());
    let Ok(layers) = layers else { return Ok(()) };
    let on_their_way = on_their_way(layers, newest);
    watch(state, group, (&on_their_way, pace), now_ms).await?;
    let told =
        told(&on_their_way, pace, |layer, epoch| state.fleet().is_recovered(group, layer, epoch));
    for (layer, ranks) in told {
        let lowest = ranks.iter().map(|rank| rank.held).min().unwrap_or(0);
        let committed = committed_after(state, (group, model), layer, lowest).await?;
        tell(state, group, ranks, &committed);
    }
    Ok(())
}

/// Keeps what is seen of layers on their way, and tells those who watch of every step, and of ranks that do not get on.
async fn watch(
    state: &State,
    group: &str,
    (on_their_way, pace): (&[OnItsWay], &Pace),
    now_ms: u64,
) -> Result<(), StoreError> {
    let new: Vec<Value> = {
        let mut motions = state.motions();
        let before = motions.remove(group).unwrap_or_default();
        let at = |motion: &Motion| (motion.epoch, motion.step);
        let (mut now, mut new) = (Motions::new(), Vec::new());
        for (layer, epoch, ranks) in on_their_way {
            let known = before.get(layer);
            let here = (*epoch, Step::of(ranks, *epoch));
            let mut motion = Motion::seen(known, ranks, here, now_ms);
            if pace.paused {
                motion.rest(now_ms);
            }
            let stuck = motion.stuck(ranks, pace, now_ms);
            if known.map(at) != Some(at(&motion)) || stuck.is_some() && !motion.told_stuck {
                let (epoch, step) = here;
                new.push(json!({
                    "group": group, "layer": layer, "epoch": epoch, "step": step, "stuck": stuck,
                }));
            }
            if let Some(stuck) = stuck.as_ref().filter(|_| !motion.told_stuck) {
                tracing::warn!(group, layer, epoch, ?stuck, "a migration does not get on");
            }
            motion.told_stuck = stuck.is_some();
            now.insert(*layer, motion);
        }
        motions.insert(group.to_owned(), now);
        new
    };
    for told in new {
        state.store.tell("migration", &told, now_ms).await?;
    }
    Ok(())
}

/// The placements of a layer that are later than `epoch`, newest first.
async fn committed_after(
    state: &State,
    of: (&str, &str),
    layer: u32,
    epoch: u64,
) -> Result<Vec<LayerPlacement>, StoreError> {
    let all = state.store.epochs(of, layer, u64::MAX, COMMITTED_LOOKED_AT).await?;
    Ok(all.into_iter().filter(|placed| placed.epoch > epoch).map(LayerPlacement::from).collect())
}

fn throttle(state: &State, group: &str, bytes_per_second: u64) {
    let mut fleet = state.fleet();
    for rank in fleet.throttled_otherwise(group, bytes_per_second) {
        let order = Box::new(FromControl::Throttle { bytes_per_second });
        fleet.order(group, rank, Command::Order(order));
    }
}

fn tell(state: &State, group: &str, ranks: &[RankLayer], committed: &[LayerPlacement]) {
    let orders: BTreeMap<u32, FromControl> = orders(ranks, committed).into_iter().collect();
    let mut fleet = state.fleet();
    // Whoever has come back meanwhile was told what is in force, and is not to miss that it changes.
    if fleet.still(group, now_ms(), state.patience_ms()).is_some() {
        return;
    }
    for (rank, order) in orders {
        fleet.order(group, rank, Command::Order(Box::new(order)));
    }
}
