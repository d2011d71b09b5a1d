//! Drives groups to the placements that were committed last, while calls go on: looks at what ranks say, again and again,
//! and tells them what `migrating` says.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::session::{FromControl, LayerPlacement};

use crate::fleet::Command;
use crate::limits::{COMMITTED_LOOKED_AT, MIGRATE_TICK_MS};
use crate::migrating::{RankLayer, orders};
use crate::state::{Shared, State, now_ms};
use crate::store::StoreError;

/// Looks after every group, again and again.
pub(crate) async fn run(state: Shared) {
    let mut time = tokio::time::interval(Duration::from_millis(MIGRATE_TICK_MS));
    loop {
        time.tick().await;
        let groups = state.fleet().models();
        for (group, model) in groups {
            if let Err(error) = look_after(&state, (&group, &model)).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(group, error, "placements stay as they are");
            }
        }
    }
}

async fn look_after(state: &State, (group, model): (&str, &str)) -> Result<(), StoreError> {
    let layers = state.fleet().staging(group, now_ms(), state.patience_ms());
    let Some(layers) = layers else { return Ok(()) };
    let newest = state.store.present((group, model), now_ms()).await?.epochs;
    for (layer, ranks) in layers {
        let lowest = ranks.iter().map(|rank| rank.held).min().unwrap_or(0);
        if newest.get(&layer).is_none_or(|&epoch| epoch <= lowest) {
            continue;
        }
        let committed = committed_after(state, (group, model), layer, lowest).await?;
        tell(state, group, &ranks, &committed);
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

fn tell(state: &State, group: &str, ranks: &[RankLayer], committed: &[LayerPlacement]) {
    let orders: BTreeMap<u32, FromControl> = orders(ranks, committed).into_iter().collect();
    let fleet = state.fleet();
    for (rank, order) in orders {
        fleet.order(group, rank, Command::Order(Box::new(order)));
    }
}
