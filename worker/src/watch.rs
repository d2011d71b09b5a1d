//! A thread that sleeps until peers announce a call while this rank waits for its engine, and wakes
//! the rank's loop by a byte in a pipe: sockets and words of shared memory have no common wait.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kernels::heap::SymmetricHeap;

/// Longest sleep. Nothing depends on it: a ring ends the sleep.
const SLEEP: Duration = Duration::from_secs(1);

/// Ends the thread when dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Readable when peers rang.
    pub(crate) bell: UnixStream,
    heap: Arc<dyn SymmetricHeap>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start(heap: &Arc<dyn SymmetricHeap>) -> io::Result<Self> {
        let (bell, rings) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        rings.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, stopped) = (Arc::clone(heap), Arc::clone(&stop));
        // Kept over the sleeps: what rings while the thread is at work ends the next one at once.
        let mut heard = heap.rung_parked();
        let watch = move || {
            while !stopped.load(Ordering::Acquire) {
                watched.sleep_parked(heard, SLEEP);
                let rung = watched.rung_parked();
                if std::mem::replace(&mut heard, rung) != rung
                    && let Err(error) = (&rings).write_all(&[1])
                    && error.kind() != ErrorKind::WouldBlock
                {
                    tracing::error!(%error, "the rank cannot be woken any more");
                }
            }
        };
        let thread = std::thread::Builder::new().name("watch".to_owned()).spawn(watch)?;
        Ok(Self { bell, heap: Arc::clone(heap), stop, thread: Some(thread) })
    }

    /// Takes the bytes out of the pipe.
    pub(crate) fn hear(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.bell).read(&mut bytes), Ok(read) if read > 0) {}
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.heap.set_parked(true);
        self.heap.ring_parked(self.heap.rank());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches for peers panicked");
        }
        self.heap.set_parked(false);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use kernels::heap::HeapShape;
    use kernels::heap::shm::ShmHeap;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    /// Also a ring that comes while the thread is at work on the one before.
    #[test]
    fn no_ring_is_lost() {
        let shape = HeapShape { ranks: 1, max_tokens: 1, max_pairs: 1, hidden: 32 };
        let heap: Arc<dyn SymmetricHeap> = Arc::new(ShmHeap::alone(shape).unwrap());
        let watch = Watch::start(&heap).unwrap();
        heap.set_parked(true);
        let deadline = Timespec { tv_sec: 20, tv_nsec: 0 };
        for ring in 0..20_000 {
            heap.ring_parked(0);
            let mut bell = [PollFd::from_borrowed_fd(watch.bell.as_fd(), PollFlags::IN)];
            assert_eq!(poll(&mut bell, Some(&deadline)).unwrap(), 1, "ring {ring} was not heard");
            watch.hear();
        }
    }
}
