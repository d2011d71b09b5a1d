//! What a rank does about placements, without threads, sockets and clock: the simulator decides what happens when.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use kernels::checkpoint::Checkpoint;
use kernels::device::{Device, LayerSlots};
use protocol::session::{FromControl, FromWorker, LayerPlacement};

use crate::migrate::{Migrate, Work};
use crate::orders::Inbox;
use crate::placement::Placements;
use crate::pulse::Pulse;

/// What a rank that loads is to hold of the layer at `position`.
///
/// # Panics
/// If there is no such layer.
#[must_use]
pub fn slots(placed: &[LayerPlacement], position: usize, rank: u32) -> LayerSlots {
    Placements::made(placed.to_vec()).slots(position, rank)
}

/// A rank's part in migrations.
pub struct Placing {
    migrate: Migrate,
    work: Work,
    pulse: Arc<Pulse>,
    /// Numbers of what was said of what it holds, and of what is on its way.
    said: (u64, u64),
    _inbox: Inbox,
}

impl Placing {
    /// Of a rank that has loaded `placed`; what it holds after a flip is given to `remember`.
    ///
    /// # Errors
    /// When the system has no pipe.
    pub fn new(
        checkpoint: Checkpoint,
        rank: u32,
        placed: Vec<LayerPlacement>,
        remember: impl Fn(&[LayerPlacement]) + Send + 'static,
    ) -> io::Result<Self> {
        let pulse = Arc::new(Pulse::new());
        let (inbox, _orders) = Inbox::new()?;
        pulse.set_holds(placed.clone());
        let remember = move |placements: &Placements| {
            remember(placements.layers());
            Ok(())
        };
        let placements = Placements::made(placed);
        let (migrate, work) = Migrate::new(
            checkpoint,
            (rank, inbox.bell()),
            placements,
            (Arc::clone(&pulse), Box::new(remember)),
        );
        Ok(Self { migrate, work, pulse, said: (0, 0), _inbox: inbox })
    }

    /// Takes what was staged, and follows orders, between two calls.
    pub fn follow(&mut self, device: &mut dyn Device, orders: Vec<FromControl>) {
        self.migrate.take(device, orders);
    }

    /// Stages the oldest placement that was ordered; false if there is none.
    pub fn stage(&mut self) -> bool {
        self.work.next(Receiver::try_recv)
    }

    /// Looks after a call what is in force.
    pub fn after_call(&mut self, device: &mut dyn Device) {
        self.migrate.after_call(device);
    }

    /// What this rank says that it holds.
    #[must_use]
    pub fn holds(&self) -> &[LayerPlacement] {
        self.migrate.placements().layers()
    }

    /// What a session has to say that it has not said.
    pub fn says(&mut self) -> Vec<FromWorker> {
        let mut says = Vec::new();
        if let Some((number, layers)) = self.pulse.holds(self.said.0) {
            self.said.0 = number;
            says.push(FromWorker::Holds { layers });
        }
        if let Some((number, (layers, bytes_per_second))) = self.pulse.staging(self.said.1) {
            self.said.1 = number;
            says.push(FromWorker::Staging { layers, bytes_per_second });
        }
        says
    }

    /// Another session stands: nothing was said in it.
    pub fn say_again(&mut self) {
        self.said = (0, 0);
    }
}
