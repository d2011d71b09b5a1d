//! From a configuration to a rank that is ready: checkpoint, placement, group, device, socket, in
//! this order, so that whoever can connect is served.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::checkpoint::{Checkpoint, CheckpointError, MoeLayer};
use kernels::cpu::{CpuDevice, CpuOptions, CpuSlots};
use kernels::cuda::CudaDevice;
use kernels::device::{Device, LoadError};
use kernels::group::Group;
use kernels::heap::HeapShape;
use kernels::heap::shm::{JoinError, Membership, ShmHeap, Terms};
use protocol::frame::VERSION;
use protocol::message::ActFormat;
use protocol::session::{ModelInfo, Register, SESSION_VERSION};

use crate::Rank;
use crate::config::{Config, ConfigError, DeviceKind, GroupConfig};
use crate::limits::CONTROL_PATIENCE;
use crate::migrate::Migrate;
use crate::model::Model;
use crate::orders::Inbox;
use crate::placement::{PlaceError, Placements};
use crate::pulse::now_ms;
use crate::rank::Ordered;
use crate::socket::Listener;
use crate::tactics::{TableError, Tuned};
use crate::uplink::Uplink;
use crate::watch::Watch;

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A checkpoint that cannot be served.
    #[error("the model at {} cannot be served", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// A placement that cannot be.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A group that cannot be joined.
    #[error("the group cannot be joined")]
    Join(#[from] JoinError),
    /// A device that cannot hold the model.
    #[error("the device cannot hold the model")]
    Load(#[from] LoadError),
    /// A table of tactics that cannot be read.
    #[error(transparent)]
    Tactics(#[from] TableError),
    /// A thread that cannot be started.
    #[error("peers cannot be watched for")]
    Watch(#[source] io::Error),
    /// A thread that cannot be started.
    #[error("control cannot be spoken with")]
    Uplink(#[source] io::Error),
    /// A socket that cannot be listened on.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Rank {
    /// Loads the model and listens.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let ranks = config.group.as_ref().map_or(1, |group| group.ranks);
        let options = config.device.cpu(ranks)?;
        let started = Instant::now();
        let path = &config.model;
        let checkpoint = Checkpoint::open(path)
            .map_err(|source| StartError::Checkpoint { path: path.clone(), source })?;
        let model = Model::new(&checkpoint);
        if let Some(reason) = &model.no_nvfp4 {
            tracing::warn!(reason, "act=nvfp4 is not served");
        }
        let max_tokens = config.engine.max_tokens;
        for layer in &model.unserved {
            tracing::info!(layer = layer.number, reason = layer.reason, "not served");
        }
        // The group and control know the model by it.
        let known = config.group.is_some() || config.control.is_some();
        let digest = known.then(|| checkpoint.digest()).transpose().map_err(LoadError::from)?;
        let digest = digest.unwrap_or_default();
        let known =
            Known { config, checkpoint: &checkpoint, model: &model, digest: digest.clone() };
        let Started { mut device, placements, uplink } = match (&config.group, config.device.kind) {
            (None, DeviceKind::Cpu) => {
                known.alone(Box::new(CpuDevice::alone(options, &checkpoint, max_tokens)?))?
            }
            (None, DeviceKind::Cuda) => {
                known.alone(Box::new(CudaDevice::alone(&config.device.cuda()?, &checkpoint)?))?
            }
            (Some(group), _) => known.in_group(group, options)?,
        };
        let tuned = match (&config.device.tactic, &config.device.tactics) {
            (Some(_), _) => None,
            (None, path) => Some(Tuned::new(&mut *device, &checkpoint, path.as_deref())?),
        };
        let heap = Arc::clone(device.group().heap());
        let watch = config.group.is_some().then(|| Watch::start(&heap)).transpose();
        let watch = watch.map_err(StartError::Watch)?;
        let path = &config.engine.socket;
        let listener = Listener::bind(path)
            .map_err(|source| StartError::Listen { path: path.clone(), source })?;
        tracing::info!(
            model = model.name,
            layers = model.layers.len(),
            rank = heap.rank(),
            ranks,
            device = device.describe(),
            socket = %path.display(),
            loaded_ms = started.elapsed().as_millis(),
            "ready"
        );
        let mut ordered = Ordered { tuned, ..Ordered::default() };
        if let Some(uplink) = uplink {
            let (inbox, orders) = Inbox::new().map_err(StartError::Uplink)?;
            // Now, and not when it was asked for: engines can connect.
            uplink.pulse.set_holds(placements.layers().to_vec());
            if let Some(tuned) = &ordered.tuned {
                uplink.pulse.set_tactics(tuned.tactics.clone());
            }
            let group = config.group.as_ref().filter(|group| group.placement.is_none());
            if let Some(group) = group.filter(|_| device.placed().is_some()) {
                let (pulse, group) = (Arc::clone(&uplink.pulse), group.clone());
                let remember =
                    Box::new(move |placed: &Placements| placed.remember(&group, &digest));
                let of = (heap.rank(), inbox.bell());
                let started = Migrate::start(checkpoint, of, placements, pulse, remember);
                ordered.migrate = Some(started.map_err(StartError::Uplink)?);
            }
            uplink.orders.get_or_init(|| orders);
            (ordered.uplink, ordered.inbox) = (Some(uplink), Some(inbox));
        }
        Ok(Self::new(device, (model, max_tokens), listener, watch, ordered))
    }
}

/// What is known before anything is loaded.
struct Known<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    model: &'a Model,
    /// Of the model; empty if nobody asks for it.
    digest: String,
}

/// A rank that has loaded.
struct Started {
    device: Box<dyn Device>,
    placements: Placements,
    uplink: Option<Uplink>,
}

impl Known<'_> {
    fn alone(self, device: Box<dyn Device>) -> Result<Started, StartError> {
        let placements = Placements::alone(self.checkpoint.layers())?;
        let uplink = self.dial(&placements, device.describe())?;
        Ok(Started { device, placements, uplink })
    }

    /// Asks control what to load, loads, and joins: last, so that nobody waits for a rank that loads.
    fn in_group(self, group: &GroupConfig, options: CpuOptions) -> Result<Started, StartError> {
        let layers = self.checkpoint.layers();
        let own = Placements::own(group, layers)?;
        let mut slots = CpuSlots::new(options).map_err(LoadError::from)?;
        let uplink = self.dial(&own, slots.describe())?;
        let placements = match &uplink {
            // Whoever gave this worker a file has decided.
            Some(uplink) if group.placement.is_none() => self.placed(uplink, group, own),
            Some(_) | None => own,
        };
        for position in 0..layers.len() {
            slots.load(self.checkpoint, position, placements.slots(position, group.rank))?;
        }
        let max_tokens = self.config.engine.max_tokens;
        let device =
            join(group, slots, max_tokens, layers, &self.terms(group, &placements, options))?;
        if uplink.is_some()
            && let Err(error) = placements.remember(group, &self.digest)
        {
            tracing::warn!(%error, "the group's placement is not remembered");
        }
        Ok(Started { device: Box::new(device), placements, uplink })
    }

    /// What control wants this rank to load, what the group held last if control is away, or its own.
    fn placed(&self, uplink: &Uplink, group: &GroupConfig, own: Placements) -> Placements {
        let (from, layers) = match uplink.placed.recv_timeout(CONTROL_PATIENCE) {
            Ok(layers) if layers.is_empty() => return own,
            Ok(layers) => ("control", layers),
            Err(_away) => match Placements::remembered(group, &self.digest) {
                Some(layers) => ("what the group held last, as control is away", layers),
                None => {
                    tracing::warn!("control is away: this rank holds what its configuration says");
                    return own;
                }
            },
        };
        match own.replaced_by(layers) {
            Ok(placements) => {
                tracing::info!(from, digest = placements.digest(), "placed");
                placements
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, from, "a placement does not fit: this rank holds its own");
                own
            }
        }
    }

    /// Starts the session with control, if there is to be one.
    fn dial(&self, own: &Placements, device: String) -> Result<Option<Uplink>, StartError> {
        let Some(control) = &self.config.control else { return Ok(None) };
        let register = self.register(own, device);
        Uplink::start(control.clone(), register).map(Some).map_err(StartError::Uplink)
    }

    /// What control is told of this worker.
    fn register(&self, own: &Placements, device: String) -> Register {
        let Self { config, model, digest, .. } = self;
        let group = config.group.as_ref();
        let layer_slots = own.slots_per_rank();
        let act = match model.no_nvfp4 {
            None => vec![ActFormat::Bf16, ActFormat::Nvfp4],
            Some(_) => vec![ActFormat::Bf16],
        };
        Register {
            version: SESSION_VERSION,
            group: group.map_or_else(|| model.name.clone(), |group| group.name.clone()),
            rank: group.map_or(0, |group| group.rank),
            ranks: group.map_or(1, |group| group.ranks),
            incarnation: now_ms(),
            pid: std::process::id(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            socket: config.engine.socket.display().to_string(),
            device,
            model: ModelInfo {
                name: model.name.clone(),
                digest: digest.clone(),
                act,
                layers: model.layers.clone(),
                unserved: model.unserved.clone(),
            },
            slots_per_rank: layer_slots.iter().copied().max().unwrap_or(0),
            layer_slots,
            max_tokens: config.engine.max_tokens,
            asks: group.is_some_and(|group| group.placement.is_none()),
            stages: group.is_some_and(|group| group.placement.is_none())
                && config.device.kind == DeviceKind::Cpu,
        }
    }

    /// What all ranks of the group must have in common.
    fn terms(&self, group: &GroupConfig, placements: &Placements, options: CpuOptions) -> Terms {
        let device = |tactic: Option<String>| tactic.unwrap_or_else(|| "by tokens".to_owned());
        [
            ("protocol version", VERSION.to_string()),
            ("group version", kernels::group::VERSION.to_string()),
            ("ranks", group.ranks.to_string()),
            ("max_tokens", self.config.engine.max_tokens.to_string()),
            ("model digest", self.digest.clone()),
            ("placement digest", placements.digest()),
            ("instruction set", options.chosen_isa().to_string()),
            ("tactic", device(options.tactic.map(|tactic| tactic.to_string()))),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

fn join(
    group: &GroupConfig,
    slots: CpuSlots,
    max_tokens: u32,
    layers: &[MoeLayer],
    terms: &Terms,
) -> Result<CpuDevice, StartError> {
    let shape = HeapShape::of_group(group.ranks, max_tokens, layers);
    let membership =
        Membership { folder: group.dir.clone(), name: group.name.clone(), rank: group.rank };
    let heap = ShmHeap::join(&membership, shape, terms)?;
    let deadline = Duration::from_millis(group.deadline_ms);
    Ok(CpuDevice::new(slots, Group::new(Arc::new(heap), deadline)))
}
