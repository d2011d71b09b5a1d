//! What the rank's thread tells the uplink's: what it holds, engine, counts of calls, and load. Nothing
//! here is held over a wait.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::refusal::Refusal;
use protocol::session::{EngineState, Heartbeat, LayerPlacement, Window};

use crate::load::Load;

/// Written by the rank's thread alone. A reader may see a call that another word does not have yet.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// Set once the rank is ready.
    pub(crate) holds: OnceLock<Vec<LayerPlacement>>,
    engine: AtomicU8,
    calls: AtomicU64,
    /// By the code of the refusal.
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    load: Mutex<Load>,
}

impl Pulse {
    pub(crate) fn new() -> Self {
        let (holds, engine, calls, refusals) = Default::default();
        Self { holds, engine, calls, refusals, load: Mutex::new(Load::new(now_ms())) }
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

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
