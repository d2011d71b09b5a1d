//! Other placements of layers while calls go on: what control orders, what is staged beside calls, and what is in force
//! since the last call. The rank's thread takes orders between calls; a thread of its own derives experts, no faster than a
//! limit, so that calls keep the memory and the processor.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, StageError, Staged, Stager};
use kernels::device::{Device, LoadError};
use protocol::session::{FromControl, LayerPlacement, LayerStaging};

use crate::limits::{ORDERS_MAX, STAGE_AGAIN, STAGE_BYTES_PER_SECOND};
use crate::placement::Placements;
use crate::pulse::Pulse;

/// Why an order is not followed.
#[derive(Debug, thiserror::Error)]
enum OrderError {
    #[error("this device cannot hold another placement before its next start")]
    Device,
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("the placement does not fit: {0}")]
    Fit(String),
    #[error("an expert cannot be derived: {0}")]
    Load(#[from] LoadError),
    #[error("the thread that stages is busy or gone")]
    Busy,
}

/// Where orders are put for the rank's thread.
#[derive(Debug, Clone)]
pub(crate) struct Orders {
    orders: SyncSender<FromControl>,
    wake: Arc<UnixStream>,
}

impl Orders {
    /// Has the rank's thread take an order; false if too many wait, and it is to come again.
    pub(crate) fn put(&self, order: FromControl) -> bool {
        let put = self.orders.try_send(order).is_ok();
        wake(&self.wake);
        put
    }
}

/// Wakes the rank's thread: a pipe that is full wakes it as well.
fn wake(pipe: &UnixStream) {
    match (&*pipe).write_all(&[1]) {
        Err(error) if error.kind() != ErrorKind::WouldBlock => {
            tracing::error!(%error, "the rank cannot be woken any more");
        }
        _ => {}
    }
}

/// Something to derive, and how much of it is left.
struct Job {
    epoch: u64,
    stager: Stager,
    left: Arc<AtomicU64>,
}

/// What the thread that stages has to tell: of which layer and epoch.
struct Done {
    layer: u32,
    epoch: u64,
    staged: Result<Option<Staged>, LoadError>,
    digests: Vec<(u32, u64)>,
}

/// A layer for which another placement is on its way.
struct Pending {
    placement: LayerPlacement,
    /// Experts that are still to be derived.
    left: Arc<AtomicU64>,
    staged: bool,
    ready: bool,
    digests: Vec<(u32, u64)>,
    /// Why it does not come to be, and when that was found.
    problem: Option<(String, Instant)>,
}

/// Writes what is in force for a rank that comes back while control is away.
type Remember = Box<dyn Fn(&Placements) -> io::Result<()> + Send>;

/// The rank's part in migrations.
pub(crate) struct Migrate {
    /// Readable when there is something to take.
    pub(crate) bell: UnixStream,
    orders: Receiver<FromControl>,
    jobs: SyncSender<Job>,
    done: Receiver<Done>,
    rank: u32,
    /// In force on this rank.
    placements: Placements,
    pending: BTreeMap<u32, Pending>,
    pulse: Arc<Pulse>,
    remember: Remember,
}

impl Migrate {
    /// Starts the thread that stages; it ends when this is dropped.
    pub(crate) fn start(
        checkpoint: Checkpoint,
        rank: u32,
        placements: Placements,
        pulse: Arc<Pulse>,
        remember: Remember,
    ) -> io::Result<(Self, Orders)> {
        let (bell, ring) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        ring.set_nonblocking(true)?;
        let ring = Arc::new(ring);
        let (put, orders) = sync_channel(ORDERS_MAX);
        let (jobs, to_do) = sync_channel::<Job>(ORDERS_MAX);
        let (tell, done) = sync_channel(ORDERS_MAX);
        let rings = Arc::clone(&ring);
        let work = move || {
            for job in to_do {
                let told = tell.send(stage(&checkpoint, job));
                wake(&rings);
                if told.is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("stage".to_owned()).spawn(work)?;
        let pending = BTreeMap::new();
        let migrate = Self { bell, orders, jobs, done, rank, placements, pending, pulse, remember };
        Ok((migrate, Orders { orders: put, wake: ring }))
    }

    /// Takes what has come: orders, and what was staged.
    pub(crate) fn take(&mut self, device: &mut dyn Device) {
        let mut bytes = [0; 64];
        while matches!((&self.bell).read(&mut bytes), Ok(read) if read > 0) {}
        while let Ok(done) = self.done.try_recv() {
            let (layer, epoch) = (done.layer, done.epoch);
            let result = self.have(device, done);
            self.note(layer, epoch, result);
        }
        while let Ok(order) = self.orders.try_recv() {
            self.follow(device, order);
        }
        self.report();
    }

    /// Looks after a call which placements are in force now.
    pub(crate) fn after_call(&mut self, device: &mut dyn Device) {
        if !self.pending.values().any(|pending| pending.ready) {
            return;
        }
        let Some(device) = device.placed() else { return };
        let flipped = |(layer, pending): (&u32, &Pending)| {
            (device.epoch(*layer) == Some(pending.placement.epoch)).then_some(*layer)
        };
        let flipped: Vec<u32> = self.pending.iter().filter_map(flipped).collect();
        for layer in &flipped {
            let Some(pending) = self.pending.remove(layer) else { continue };
            tracing::info!(layer, epoch = pending.placement.epoch, "a placement is in force");
            self.placements.replace(pending.placement);
        }
        if flipped.is_empty() {
            return;
        }
        if let Err(error) = (self.remember)(&self.placements) {
            tracing::warn!(%error, "what this rank holds could not be written down");
        }
        self.pulse.set_holds(self.placements.layers().to_vec());
        self.report();
    }

    fn follow(&mut self, device: &mut dyn Device, order: FromControl) {
        let Some(device) = device.placed() else {
            tracing::warn!(error = %OrderError::Device, "an order is not followed");
            return;
        };
        let (layer, epoch, result) = match order {
            FromControl::Stage { placement } => {
                let (layer, epoch) = (placement.layer, placement.epoch);
                (layer, epoch, self.begin(device, placement))
            }
            FromControl::Ready { layer, epoch } => {
                let result = device.make_ready(layer, epoch).map_err(OrderError::from);
                if let Some(pending) = self.pending.get_mut(&layer).filter(|_| result.is_ok()) {
                    pending.ready = true;
                }
                (layer, epoch, result)
            }
            _ => return,
        };
        self.note(layer, epoch, result);
    }

    /// Begins to stage a placement, unless that has begun, or has failed lately.
    fn begin(
        &mut self,
        device: &mut CpuDevice,
        placement: LayerPlacement,
    ) -> Result<(), OrderError> {
        let (layer, epoch) = (placement.layer, placement.epoch);
        if let Some(Pending { placement, problem, .. }) = self.pending.get(&layer)
            && placement.epoch == epoch
            && problem.as_ref().is_none_or(|(_, at)| at.elapsed() < STAGE_AGAIN)
        {
            return Ok(());
        }
        // Said before control heard that it is in force.
        if device.epoch(layer).is_some_and(|held| held >= epoch) {
            return Ok(());
        }
        // Another is not wanted any more, unless it is ready.
        device.drop_staged(layer)?;
        let left = Arc::new(AtomicU64::new(0));
        let (staged, ready, digests, problem) = (false, false, Vec::new(), None);
        let wanted = self.placements.slots_with(&placement, self.rank);
        let pending =
            Pending { placement, left: Arc::clone(&left), staged, ready, digests, problem };
        self.pending.insert(layer, pending);
        let wanted = wanted.map_err(|error| {
            let source = error.source().map_or_else(String::new, |source| format!(": {source}"));
            OrderError::Fit(format!("{error}{source}"))
        })?;
        let stager = device.stager(layer, wanted)?;
        left.store(stager.left() as u64, Ordering::Relaxed);
        let put = self.jobs.try_send(Job { epoch, stager, left });
        put.map_err(|_full_or_gone| OrderError::Busy)
    }

    /// Has at hand what was staged, unless another is wanted by now.
    fn have(&mut self, device: &mut dyn Device, done: Done) -> Result<(), OrderError> {
        let Some(pending) = self.pending.get_mut(&done.layer) else { return Ok(()) };
        if pending.placement.epoch != done.epoch {
            return Ok(());
        }
        let device = device.placed().ok_or(OrderError::Device)?;
        let Some(staged) = done.staged? else { return Ok(()) };
        device.take_staged(staged)?;
        (pending.staged, pending.digests) = (true, done.digests);
        Ok(())
    }

    /// Keeps why something did not go, so that control is told.
    fn note(&mut self, layer: u32, epoch: u64, result: Result<(), OrderError>) {
        let Err(error) = result else { return };
        tracing::warn!(layer, epoch, %error, "a placement is not staged");
        if let Some(pending) = self.pending.get_mut(&layer)
            && pending.placement.epoch == epoch
        {
            pending.problem = Some((error.to_string(), Instant::now()));
        }
    }

    fn report(&self) {
        let of = |(layer, pending): (&u32, &Pending)| LayerStaging {
            layer: *layer,
            epoch: pending.placement.epoch,
            left: pending.left.load(Ordering::Relaxed),
            staged: pending.staged,
            ready: pending.ready,
            digests: pending.digests.clone(),
            problem: pending.problem.as_ref().map(|(problem, _)| problem.clone()),
        };
        self.pulse.set_staging(self.pending.iter().map(of).collect());
    }
}

/// Derives everything that is lacking, as slowly as the limit says.
fn stage(checkpoint: &Checkpoint, job: Job) -> Done {
    let Job { epoch, mut stager, left } = job;
    let layer = stager.layer();
    let (began, mut bytes) = (Instant::now(), 0);
    while stager.left() > 0 {
        match stager.step(checkpoint) {
            Ok(more) => bytes += more.unwrap_or(0),
            Err(error) => {
                return Done { layer, epoch, staged: Err(error), digests: Vec::new() };
            }
        }
        left.store(stager.left() as u64, Ordering::Relaxed);
        let due = Duration::from_secs_f64(bytes as f64 / STAGE_BYTES_PER_SECOND);
        thread::sleep(due.saturating_sub(began.elapsed()));
    }
    Done { layer, epoch, staged: Ok(stager.staged()), digests: stager.digests() }
}
