//! Orders of control on their way to the rank's thread, which takes them between calls.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use protocol::session::FromControl;

use crate::limits::ORDERS_MAX;

/// Where orders are put.
#[derive(Debug, Clone)]
pub(crate) struct Orders {
    orders: SyncSender<FromControl>,
    bell: Bell,
}

impl Orders {
    /// Has the rank's thread take an order; false if too many wait, and it is to come again.
    pub(crate) fn put(&self, order: FromControl) -> bool {
        let put = self.orders.try_send(order).is_ok();
        self.bell.ring();
        put
    }
}

/// Wakes the rank's thread.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<UnixStream>);

impl Bell {
    /// A pipe that is full wakes it as well.
    pub(crate) fn ring(&self) {
        match (&*self.0).write_all(&[1]) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                tracing::error!(%error, "the rank cannot be woken any more");
            }
            _ => {}
        }
    }
}

/// Where the rank's thread finds orders.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// Readable when there is something to look at.
    pub(crate) bell: UnixStream,
    orders: Receiver<FromControl>,
    ring: Bell,
}

impl Inbox {
    /// An empty one, and where orders are put.
    pub(crate) fn new() -> io::Result<(Self, Orders)> {
        let (bell, ring) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        ring.set_nonblocking(true)?;
        let ring = Bell(Arc::new(ring));
        let (put, orders) = sync_channel(ORDERS_MAX);
        let inbox = Self { bell, orders, ring: ring.clone() };
        Ok((inbox, Orders { orders: put, bell: ring }))
    }

    /// Rings this inbox's bell.
    pub(crate) fn bell(&self) -> Bell {
        self.ring.clone()
    }

    /// Everything that has come.
    pub(crate) fn take(&mut self) -> Vec<FromControl> {
        let mut bytes = [0; 64];
        while matches!((&self.bell).read(&mut bytes), Ok(read) if read > 0) {}
        self.orders.try_iter().collect()
    }
}
