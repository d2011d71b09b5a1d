//! What the rank's thread tells the uplink's, without waiting for it: engine and counts of calls.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use protocol::session::{EngineState, Heartbeat};

/// Written by the rank's thread alone. A reader may see a call that another word does not have yet.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    engine: AtomicU8,
    calls: AtomicU64,
    refused: AtomicU64,
}

impl Pulse {
    pub(crate) fn set_engine(&self, engine: EngineState) {
        self.engine.store(engine as u8, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, answered: bool) {
        let count = if answered { &self.calls } else { &self.refused };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let engine = match self.engine.load(Ordering::Relaxed) {
            0 => EngineState::Absent,
            1 => EngineState::Idle,
            _ => EngineState::Attached,
        };
        let [calls, refused] = [&self.calls, &self.refused].map(|n| n.load(Ordering::Relaxed));
        Heartbeat { engine, calls, refused }
    }
}
