//! From a configuration to a rank that is ready: checkpoint, placement, group, device, socket, in
//! this order, so that whoever can connect is served.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::checkpoint::{Checkpoint, CheckpointError};
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
use crate::model::Model;
use crate::placement::{PlaceError, Placements};
use crate::pulse::now_ms;
use crate::socket::Listener;
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
        let group = config.group.as_ref();
        let placements =
            group.map(|group| Placements::new(group, checkpoint.layers())).transpose()?;
        // The group and control know the model by it.
        let known = group.is_some() || config.control.is_some();
        let digest = known.then(|| checkpoint.digest()).transpose().map_err(LoadError::from)?;
        let digest = digest.unwrap_or_default();
        let grouped = group.zip(placements.as_ref());
        let mut device: Box<dyn Device> = match (grouped, config.device.kind) {
            (None, DeviceKind::Cpu) => {
                Box::new(CpuDevice::alone(options, &checkpoint, max_tokens)?)
            }
            (None, DeviceKind::Cuda) => {
                Box::new(CudaDevice::alone(&config.device.cuda(), &checkpoint)?)
            }
            (Some(grouped), _) => {
                Box::new(join(grouped, options, (&checkpoint, &digest), max_tokens)?)
            }
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
        let uplink = config.control.as_ref().map(|control| {
            let register = register(config, (&model, digest), placements, device.as_mut());
            Uplink::start(control.clone(), register).map_err(StartError::Uplink)
        });
        Ok(Self::new(device, model, max_tokens, listener, watch, uplink.transpose()?))
    }
}

/// What control is told of this worker.
fn register(
    config: &Config,
    (model, digest): (&Model, String),
    placements: Option<Placements>,
    device: &mut dyn Device,
) -> Register {
    let group = config.group.as_ref();
    let slots_per_rank = match placements {
        Some(placements) => placements.slots_per_rank(),
        None => model.layers.iter().map(|layer| layer.experts).max().unwrap_or(0),
    };
    let act = match model.no_nvfp4 {
        None => vec![ActFormat::Bf16, ActFormat::Nvfp4],
        Some(_) => vec![ActFormat::Bf16],
    };
    Register {
        version: SESSION_VERSION,
        group: group.map_or_else(|| model.name.clone(), |group| group.name.clone()),
        rank: device.group().rank(),
        ranks: device.group().ranks(),
        incarnation: now_ms(),
        pid: std::process::id(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        socket: config.engine.socket.display().to_string(),
        device: device.describe(),
        model: ModelInfo {
            name: model.name.clone(),
            digest,
            act,
            layers: model.layers.clone(),
            unserved: model.unserved.clone(),
        },
        slots_per_rank,
        max_tokens: config.engine.max_tokens,
    }
}

/// Loads this rank's slots and joins the group: last, so that nobody waits for a rank that loads.
fn join(
    (group, placements): (&GroupConfig, &Placements),
    options: CpuOptions,
    (checkpoint, digest): (&Checkpoint, &str),
    max_tokens: u32,
) -> Result<CpuDevice, StartError> {
    let layers = checkpoint.layers();
    let mut slots = CpuSlots::new(options).map_err(LoadError::from)?;
    for position in 0..layers.len() {
        slots.load(checkpoint, position, placements.slots(position, group.rank))?;
    }
    let shape = HeapShape::of_group(group.ranks, max_tokens, layers);
    let device = |tactic: Option<String>| tactic.unwrap_or_else(|| "by tokens".to_owned());
    let terms: Terms = [
        ("protocol version", VERSION.to_string()),
        ("ranks", group.ranks.to_string()),
        ("max_tokens", max_tokens.to_string()),
        ("model digest", digest.to_owned()),
        ("placement digest", placements.digest()),
        ("instruction set", options.chosen_isa().to_string()),
        ("tactic", device(options.tactic.map(|tactic| tactic.to_string()))),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let membership =
        Membership { folder: group.dir.clone(), name: group.name.clone(), rank: group.rank };
    let heap = ShmHeap::join(&membership, shape, &terms)?;
    let deadline = Duration::from_millis(group.deadline_ms);
    Ok(CpuDevice::new(slots, Group::new(Arc::new(heap), deadline)))
}
