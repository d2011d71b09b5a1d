//! What the rank's thread tells the uplink's: what it holds, engine, counts of calls, and load. Nothing
//! here is held over a wait.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::refusal::Refusal;
use protocol::session::{EngineState, Heartbeat, LayerPlacement, LayerStaging, Window};
use protocol::tactics::Tactics;

use crate::load::Load;

/// Layers of which something is on its way, and at most how many bytes of it come in a second.
type OnItsWay = (Vec<LayerStaging>, Option<u64>);

/// Written by the rank's thread alone. A reader may see a call that another word does not have yet.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// What the rank holds once it is ready, and how often that has changed.
    holds: Mutex<(u64, Vec<LayerPlacement>)>,
    /// What is on its way and its throttle, and how often that has changed.
    staging: Mutex<(u64, OnItsWay)>,
    /// What it knows of tactics, and how often that has changed.
    tactics: Mutex<(u64, Option<Tactics>)>,
    engine: AtomicU8,
    calls: AtomicU64,
    /// By the code of the refusal.
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    load: Mutex<Load>,
}

impl Pulse {
    pub(crate) fn new() -> Self {
        let (holds, staging, tactics, engine, calls, refusals) = Default::default();
        Self {
            holds,
            staging,
            tactics,
            engine,
            calls,
            refusals,
            load: Mutex::new(Load::new(now_ms())),
        }
    }

    pub(crate) fn set_holds(&self, layers: Vec<LayerPlacement>) {
        set(&self.holds, layers);
    }

    /// What the rank holds, if that is another than what was `said`; none while it loads.
    pub(crate) fn holds(&self, said: u64) -> Option<(u64, Vec<LayerPlacement>)> {
        changed(&self.holds, said)
    }

    pub(crate) fn set_staging(&self, layers: Vec<LayerStaging>, bytes_per_second: u64) {
        set(&self.staging, (layers, Some(bytes_per_second)));
    }

    /// What is on its way, if that is another than what was `said`.
    pub(crate) fn staging(&self, said: u64) -> Option<(u64, OnItsWay)> {
        changed(&self.staging, said)
    }

    pub(crate) fn set_tactics(&self, tactics: Tactics) {
        set(&self.tactics, Some(tactics));
    }

    /// What the rank knows of its tactics, if that is another than what was `said`.
    pub(crate) fn tactics(&self, said: u64) -> Option<(u64, Tactics)> {
        let (number, tactics) = changed(&self.tactics, said)?;
        Some((number, tactics?))
    }

    pub(crate) fn set_engine(&self, engine: EngineState) {
        self.engine.store(engine as u8, Ordering::Relaxed);
    }

    /// A call was refused or given up.
    pub(crate) fn count_refused(&self, refusal: &Refusal) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        *refusals.entry(refusal.into()).or_default() += 1;
    }

    /// A call was answered; `count` adds it to the load.
    pub(crate) fn count_answered(&self, count: impl FnOnce(&mut Load)) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        count(&mut self.load.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends the window. None without calls, unless control asked for its end.
    pub(crate) fn close_window(&self, closed_by: Option<u64>) -> Option<Window> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner).close(now_ms(), closed_by)
    }

    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let engine = match self.engine.load(Ordering::Relaxed) {
            0 => EngineState::Absent,
            1 => EngineState::Idle,
            _ => EngineState::Attached,
        };
        let calls = self.calls.load(Ordering::Relaxed);
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let refusals = refusals.iter().map(|(&code, &count)| (code.to_owned(), count)).collect();
        let refused = BTreeMap::values(&refusals).sum();
        Heartbeat { engine, calls, refused, refusals }
    }
}

/// Sets what is numbered, if it changes.
fn set<T: PartialEq>(of: &Mutex<(u64, T)>, value: T) {
    let mut known = of.lock().unwrap_or_else(PoisonError::into_inner);
    if known.0 == 0 || known.1 != value {
        *known = (known.0 + 1, value);
    }
}

fn changed<T: Clone>(of: &Mutex<(u64, T)>, said: u64) -> Option<(u64, T)> {
    let known = of.lock().unwrap_or_else(PoisonError::into_inner);
    (known.0 != said).then(|| known.clone())
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
