//! What every request and session shares.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::config::Config;
use crate::fleet::Fleet;
use crate::limits::HEARTBEATS_MISSED_MAX;
use crate::placing::PlacementFile;
use crate::store::Store;

pub(crate) type Shared = Arc<State>;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Config,
    /// Placements by group, from files.
    pub(crate) files: BTreeMap<String, PlacementFile>,
    pub(crate) store: Store,
    /// SHA-256 of the workers' credential.
    pub(crate) credential: [u8; 32],
    /// True once control ends.
    pub(crate) stop: watch::Receiver<bool>,
    fleet: Mutex<Fleet>,
}

impl State {
    pub(crate) fn new(
        (config, files): (Config, BTreeMap<String, PlacementFile>),
        store: Store,
        credential: [u8; 32],
        stop: watch::Receiver<bool>,
        fleet: Fleet,
    ) -> Self {
        Self { config, files, store, credential, stop, fleet: Mutex::new(fleet) }
    }

    /// Who is there. Never held over a wait.
    pub(crate) fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
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
