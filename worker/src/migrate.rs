//! Other placements of layers while calls go on: what control orders, what is staged beside calls, and what is in force
//! since the last call. The rank's thread takes orders between calls; a thread of its own derives experts, no faster than a
//! limit, so that calls keep the memory and the processor.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CanaryError, CpuDevice, StageError, Staged, Stager};
use kernels::device::{Device, LoadError};
use protocol::session::{FromControl, LayerPlacement, LayerStaging};

use crate::limits::{ORDERS_MAX, STAGE_AGAIN, STAGE_BYTES_PER_SECOND, STAGE_LOOK, STAGE_REPORT};
use crate::orders::Bell;
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
    #[error("the canary is not answered: {0}")]
    Canary(#[from] CanaryError),
    #[error("the thread that stages is busy or gone")]
    Busy,
}

/// How much of a placement is to be derived.
#[derive(Debug, Default)]
struct Progress {
    experts_left: AtomicU64,
    bytes_left: AtomicU64,
    /// When it began.
    bytes: AtomicU64,
}

impl Progress {
    fn set(&self, stager: &Stager) {
        self.experts_left.store(stager.left() as u64, Ordering::Relaxed);
        self.bytes_left.store(stager.bytes_left(), Ordering::Relaxed);
    }
}

/// By what ranks see whether they have the same of each expert: what it is in memory, and what it answers.
#[derive(Debug, Clone, Default)]
struct Checks {
    digests: Vec<(u32, u64)>,
    canaries: Vec<(u32, u64)>,
}

/// Something to derive, while somebody waits for it.
pub(crate) struct Job {
    epoch: u64,
    stager: Stager,
    progress: Weak<Progress>,
}

/// What the thread that stages has to tell: of which layer and epoch.
struct Done {
    layer: u32,
    epoch: u64,
    staged: Result<Option<Staged>, OrderError>,
    checks: Checks,
}

/// A layer for which another placement is on its way.
struct Pending {
    placement: LayerPlacement,
    /// Its end is seen by the thread that stages.
    progress: Arc<Progress>,
    staged: bool,
    ready: bool,
    checks: Checks,
    /// Why it does not come to be, and when that was found.
    problem: Option<(String, Instant)>,
}

/// Writes what is in force for a rank that comes back while control is away.
type Remember = Box<dyn Fn(&Placements) -> io::Result<()> + Send>;

/// The rank's part in migrations.
pub(crate) struct Migrate {
    jobs: SyncSender<Job>,
    done: Receiver<Done>,
    /// Most bytes that are derived in a second; 0 pauses.
    throttle: Arc<AtomicU64>,
    rank: u32,
    /// In force on this rank.
    placements: Placements,
    pending: BTreeMap<u32, Pending>,
    pulse: Arc<Pulse>,
    remember: Remember,
}

impl Migrate {
    /// Starts the thread that stages, which rings `bell` when it has something; it ends when this is dropped.
    pub(crate) fn start(
        checkpoint: Checkpoint,
        (rank, bell): (u32, Bell),
        placements: Placements,
        pulse: Arc<Pulse>,
        remember: Remember,
    ) -> io::Result<Self> {
        let (migrate, mut work) =
            Self::new(checkpoint, (rank, bell), placements, (pulse, remember));
        let work = move || while work.next(Receiver::recv) {};
        thread::Builder::new().name("stage".to_owned()).spawn(work)?;
        Ok(migrate)
    }

    /// The same, and the work of the thread that stages.
    pub(crate) fn new(
        checkpoint: Checkpoint,
        (rank, bell): (u32, Bell),
        placements: Placements,
        (pulse, remember): (Arc<Pulse>, Remember),
    ) -> (Self, Work) {
        let (jobs, to_do) = sync_channel(ORDERS_MAX);
        let (tell, done) = sync_channel(ORDERS_MAX);
        let throttle = Arc::new(AtomicU64::new(STAGE_BYTES_PER_SECOND));
        let stage = Stage { checkpoint, throttle: Arc::clone(&throttle), bell, owed: 0.0 };
        let pending = BTreeMap::new();
        let migrate = Self { jobs, done, throttle, rank, placements, pending, pulse, remember };
        // Control is told the throttle before it asks for anything.
        migrate.report();
        (migrate, Work { to_do, tell, stage })
    }

    /// What is in force on this rank.
    pub(crate) fn placements(&self) -> &Placements {
        &self.placements
    }

    /// Takes what was staged, and follows orders.
    pub(crate) fn take(&mut self, device: &mut dyn Device, orders: Vec<FromControl>) {
        while let Ok(done) = self.done.try_recv() {
            let (layer, epoch) = (done.layer, done.epoch);
            let result = self.have(device, done);
            self.note(layer, epoch, result);
        }
        for order in orders {
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
        let mut stood_back = false;
        for (layer, pending) in self.pending.iter_mut().filter(|(_, pending)| pending.ready) {
            pending.ready = device.ready(*layer) == Some(pending.placement.epoch);
            stood_back |= !pending.ready;
        }
        if stood_back {
            self.report();
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
        if let FromControl::Throttle { bytes_per_second } = order {
            self.throttle.store(bytes_per_second, Ordering::Relaxed);
            return;
        }
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
        let progress = Arc::new(Progress::default());
        let waits = Arc::downgrade(&progress);
        let (staged, ready, checks, problem) = (false, false, Checks::default(), None);
        let wanted = self.placements.slots_with(&placement, self.rank);
        let pending =
            Pending { placement, progress: Arc::clone(&progress), staged, ready, checks, problem };
        self.pending.insert(layer, pending);
        let wanted = wanted.map_err(|error| {
            let source = error.source().map_or_else(String::new, |source| format!(": {source}"));
            OrderError::Fit(format!("{error}{source}"))
        })?;
        let stager = device.stager(layer, wanted)?;
        progress.set(&stager);
        progress.bytes.store(stager.bytes_left(), Ordering::Relaxed);
        let put = self.jobs.try_send(Job { epoch, stager, progress: waits });
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
        (pending.staged, pending.checks) = (true, done.checks);
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
            left: pending.progress.experts_left.load(Ordering::Relaxed),
            bytes_left: pending.progress.bytes_left.load(Ordering::Relaxed),
            bytes: pending.progress.bytes.load(Ordering::Relaxed),
            staged: pending.staged,
            ready: pending.ready,
            digests: pending.checks.digests.clone(),
            canaries: pending.checks.canaries.clone(),
            problem: pending.problem.as_ref().map(|(problem, _)| problem.clone()),
        };
        let throttle = self.throttle.load(Ordering::Relaxed);
        self.pulse.set_staging(self.pending.iter().map(of).collect(), throttle);
    }
}

/// What there is to stage.
pub(crate) struct Work {
    to_do: Receiver<Job>,
    tell: SyncSender<Done>,
    stage: Stage,
}

impl Work {
    /// Does the next job that `take` finds; false if it finds none, or nobody wants it any more.
    pub(crate) fn next<E>(&mut self, take: impl FnOnce(&Receiver<Job>) -> Result<Job, E>) -> bool {
        let Ok(job) = take(&self.to_do) else { return false };
        let told = self.tell.send(self.stage.run(job));
        self.stage.bell.ring();
        told.is_ok()
    }
}

/// The thread that stages.
struct Stage {
    checkpoint: Checkpoint,
    throttle: Arc<AtomicU64>,
    bell: Bell,
    /// Bytes that are to take their time before anything else is derived.
    owed: f64,
}

impl Stage {
    /// Derives everything that is lacking, as slowly as the throttle says, while somebody waits for it.
    fn run(&mut self, job: Job) -> Done {
        let Job { epoch, mut stager, progress } = job;
        let layer = stager.layer();
        let mut said = Instant::now();
        while stager.left() > 0 {
            let Some(progress) = progress.upgrade().filter(|progress| self.rest(progress)) else {
                tracing::info!(layer, epoch, "a placement is not wanted any more");
                return Done { layer, epoch, staged: Ok(None), checks: Checks::default() };
            };
            match stager.step(&self.checkpoint) {
                Ok(bytes) => self.owed += bytes.unwrap_or(0) as f64,
                Err(error) => {
                    let (staged, checks) = (Err(error.into()), Checks::default());
                    return Done { layer, epoch, staged, checks };
                }
            }
            progress.set(&stager);
            if said.elapsed() >= STAGE_REPORT {
                said = Instant::now();
                self.bell.ring();
            }
        }
        let digests = stager.digests();
        let (staged, checks) = match stager.canaries() {
            Ok(canaries) => (Ok(stager.staged()), Checks { digests, canaries }),
            Err(error) => (Err(error.into()), Checks::default()),
        };
        Done { layer, epoch, staged, checks }
    }

    /// Waits until more may be derived; false once nobody but this thread knows of `progress`.
    fn rest(&mut self, progress: &Arc<Progress>) -> bool {
        loop {
            if Arc::strong_count(progress) == 1 {
                return false;
            }
            let throttle = self.throttle.load(Ordering::Relaxed);
            if throttle > 0 && self.owed <= 0.0 {
                return true;
            }
            // What is said meanwhile is looked for now and then.
            let rest = Duration::try_from_secs_f64(self.owed / throttle as f64);
            let rest = rest.unwrap_or(STAGE_LOOK).min(STAGE_LOOK);
            thread::sleep(rest);
            self.owed -= throttle as f64 * rest.as_secs_f64();
        }
    }
}
