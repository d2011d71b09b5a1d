//! What every request and session shares.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::access::rate::Rates;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::limits::{BURST_SECONDS, HEARTBEATS_MISSED_MAX};
use crate::placing::PlacementFile;
use crate::store::Store;

pub(crate) type Shared = Arc<State>;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Config,
    /// Placements by group, from files.
    pub(crate) files: BTreeMap<String, PlacementFile>,
    pub(crate) store: Store,
    /// True once control ends.
    pub(crate) stop: watch::Receiver<bool>,
    fleet: Mutex<Fleet>,
    rates: Mutex<Rates>,
}

impl State {
    pub(crate) fn new(
        (config, files): (Config, BTreeMap<String, PlacementFile>),
        store: Store,
        stop: watch::Receiver<bool>,
        fleet: Fleet,
    ) -> Self {
        let per_second = config.requests_per_second;
        let rates = Mutex::new(Rates::new(per_second, per_second.saturating_mul(BURST_SECONDS)));
        Self { config, files, store, stop, fleet: Mutex::new(fleet), rates }
    }

    /// Who is there. Never held over a wait.
    pub(crate) fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often callers have asked. Never held over a wait.
    pub(crate) fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Silence after which a worker counts as lost.
    pub(crate) fn patience_ms(&self) -> u64 {
        self.config.heartbeat_ms * HEARTBEATS_MISSED_MAX
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
