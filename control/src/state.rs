//! What every request and session shares.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, Semaphore, watch};

use crate::access::rate::Rates;
use crate::balancing::Last;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::limits::{BURST_SECONDS, HEARTBEATS_MISSED_MAX, SESSIONS_MAX, SETTLED_MS, WATCHERS_MAX};
use crate::motion::Motions;
use crate::placing::PlacementFile;
use crate::policies::Policies;
use crate::store::Store;

pub(crate) type Shared = Arc<State>;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Config,
    /// When control started, in milliseconds since 1970.
    pub(crate) started_ms: u64,
    /// Placements by group, from files.
    pub(crate) files: BTreeMap<String, PlacementFile>,
    pub(crate) store: Store,
    pub(crate) policies: Arc<Policies>,
    /// True once control ends.
    pub(crate) stop: watch::Receiver<bool>,
    fleet: Mutex<Fleet>,
    rates: Mutex<Rates>,
    /// What came of questions that control asked by itself, by group.
    advice: Mutex<BTreeMap<String, Last>>,
    /// Layers on their way, by group, as they were seen last.
    motions: Mutex<BTreeMap<String, Motions>>,
    /// Told when a rank has said something new of what is on its way.
    pub(crate) staged: Notify,
    /// Told when a worker has said something new of its tactics.
    pub(crate) tactics_told: Notify,
    /// Idempotency keys, by token, whose requests run.
    running: Mutex<BTreeSet<(u64, String)>>,
    /// Places of workers' sessions: all are free again when no session is left.
    pub(crate) sessions: Arc<Semaphore>,
    /// Places of those who watch events.
    pub(crate) watchers: Arc<Semaphore>,
}

impl State {
    pub(crate) fn new(
        (config, files): (Config, BTreeMap<String, PlacementFile>),
        (store, policies): (Store, Policies),
        stop: watch::Receiver<bool>,
        fleet: Fleet,
    ) -> Self {
        let policies = Arc::new(policies);
        let per_second = config.requests_per_second;
        let rates = Mutex::new(Rates::new(per_second, per_second.saturating_mul(BURST_SECONDS)));
        let (fleet, running, advice) = (Mutex::new(fleet), Mutex::default(), Mutex::default());
        let (motions, staged) = (Mutex::default(), Notify::new());
        let tactics_told = Notify::new();
        let sessions = Arc::new(Semaphore::new(SESSIONS_MAX as usize));
        let watchers = Arc::new(Semaphore::new(WATCHERS_MAX));
        Self {
            config,
            started_ms: now_ms(),
            files,
            store,
            policies,
            stop,
            fleet,
            rates,
            advice,
            motions,
            staged,
            tactics_told,
            running,
            sessions,
            watchers,
        }
    }

    /// Who is there. Never held over a wait.
    pub(crate) fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often callers have asked. Never held over a wait.
    pub(crate) fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came of questions that control asked by itself, by group. Never held over a wait.
    pub(crate) fn advice(&self) -> MutexGuard<'_, BTreeMap<String, Last>> {
        self.advice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Layers on their way, by group. Never held over a wait.
    pub(crate) fn motions(&self) -> MutexGuard<'_, BTreeMap<String, Motions>> {
        self.motions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Idempotency keys whose requests run. Never held over a wait.
    pub(crate) fn running(&self) -> MutexGuard<'_, BTreeSet<(u64, String)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when windows must have ended for all ranks to have had the time to tell theirs.
    pub(crate) fn settled_ms(&self) -> u64 {
        now_ms().saturating_sub(SETTLED_MS.min(self.config.window_ms / 2))
    }

    /// Silence after which a worker counts as lost.
    pub(crate) fn patience_ms(&self) -> u64 {
        self.config.heartbeat_ms * HEARTBEATS_MISSED_MAX
    }
}

/// Control ends; so it does when there is nobody left to say so.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
