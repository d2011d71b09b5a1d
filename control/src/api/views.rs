//! What the API shows: its own types, so that it changes when somebody decides so, not when a message
//! between processes does.

use std::collections::BTreeMap;

use protocol::message::{ServedLayer, UnservedLayer};
use protocol::session::{EngineState, ModelInfo};
use serde::Serialize;
use utoipa::ToSchema;

use crate::fleet::{Presence, Worker};

/// A part of a list.
#[derive(Serialize, ToSchema)]
pub(crate) struct Page<T> {
    /// The part.
    pub(crate) items: Vec<T>,
    /// Where the next part begins: a value for `cursor`; null after the last.
    pub(crate) next: Option<String>,
}

impl<T> Page<T> {
    /// The first `limit` of `found`, of which one more than that was asked for.
    pub(crate) fn of<F>(
        mut found: Vec<F>,
        limit: usize,
        cursor: impl Fn(&F) -> String,
        view: impl Fn(F) -> T,
    ) -> Self {
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(cursor);
        Self { items: found.into_iter().map(view).collect(), next }
    }
}

/// A worker.
#[derive(Serialize, ToSchema)]
pub(crate) struct WorkerView {
    /// Its group.
    group: String,
    /// Its rank.
    rank: u32,
    /// Ranks of the group.
    ranks: u32,
    /// Whether it is there.
    state: WorkerState,
    /// When it registered first, in milliseconds since 1970.
    first_seen_ms: u64,
    /// When it was heard of last.
    last_seen_ms: u64,
    /// When its process started.
    started_ms: u64,
    /// Number of its process.
    pid: u32,
    /// Its host.
    host: String,
    /// Path of its socket for engines.
    socket: String,
    /// Its device, in words.
    device: String,
    /// The model's name.
    model: String,
    /// The model's digest.
    digest: String,
    /// Activation formats that engines may attach for.
    act: Vec<String>,
    /// Slots in the layer that has most.
    slots_per_rank: u32,
    /// Most tokens of a call.
    max_tokens: u32,
    /// Its engine: absent, idle or attached; null while it was not heard of.
    #[schema(value_type = Option<String>)]
    engine: Option<EngineState>,
    /// Calls that it has answered since its start.
    calls: u64,
    /// Calls that were refused or given up since its start.
    refused: u64,
    /// The same by the code of the refusal.
    refusals: BTreeMap<String, u64>,
}

/// Whether a worker is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WorkerState {
    /// Heard of lately, and ready: engines can connect to it.
    Connected,
    /// Heard of lately; it has not said what it holds yet.
    Loading,
    /// Not heard of.
    Lost,
}

impl From<Presence> for WorkerState {
    fn from(presence: Presence) -> Self {
        match presence {
            Presence::Ready => Self::Connected,
            Presence::Loading => Self::Loading,
            Presence::Lost => Self::Lost,
        }
    }
}

impl WorkerView {
    pub(crate) fn new(worker: &Worker, presence: Presence) -> Self {
        let register = &worker.register;
        let beat = worker.heartbeat.as_ref();
        Self {
            group: register.group.clone(),
            rank: register.rank,
            ranks: register.ranks,
            state: presence.into(),
            first_seen_ms: worker.first_seen_ms,
            last_seen_ms: worker.last_seen_ms,
            started_ms: register.incarnation,
            pid: register.pid,
            host: register.host.clone(),
            socket: register.socket.clone(),
            device: register.device.clone(),
            model: register.model.name.clone(),
            digest: register.model.digest.clone(),
            act: register.model.act.iter().map(ToString::to_string).collect(),
            slots_per_rank: register.slots_per_rank,
            max_tokens: register.max_tokens,
            engine: beat.filter(|_| presence != Presence::Lost).map(|beat| beat.engine),
            calls: beat.map_or(0, |beat| beat.calls),
            refused: beat.map_or(0, |beat| beat.refused),
            refusals: beat.map(|beat| beat.refusals.clone()).unwrap_or_default(),
        }
    }
}

/// A group.
#[derive(Serialize, ToSchema)]
pub(crate) struct GroupView {
    /// Its name.
    pub(crate) name: String,
    /// The model's name.
    pub(crate) model: String,
    /// The model's digest.
    pub(crate) digest: String,
    /// Ranks that it has when it is whole.
    pub(crate) ranks: u32,
    /// Ranks that are not there, or not ready.
    pub(crate) missing: Vec<u32>,
    /// Why it was not told what to hold; its workers hold what their configuration says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
    /// Layers that are served.
    pub(crate) layers: usize,
}

/// A model.
#[derive(Serialize, ToSchema)]
pub(crate) struct ModelView {
    /// Of shapes, scales, and a sample of every tensor.
    digest: String,
    /// Its name: that of the checkpoint's folder.
    name: String,
    /// Activation formats that engines may attach for.
    act: Vec<String>,
    /// Its layers.
    layers: Vec<LayerView>,
    /// The groups that serve it.
    pub(crate) groups: Vec<String>,
}

impl From<&ModelInfo> for ModelView {
    fn from(model: &ModelInfo) -> Self {
        Self {
            digest: model.digest.clone(),
            name: model.name.clone(),
            act: model.act.iter().map(ToString::to_string).collect(),
            layers: layers_of(model),
            groups: Vec::new(),
        }
    }
}

/// Those that are served, and the others, ascending.
pub(crate) fn layers_of(model: &ModelInfo) -> Vec<LayerView> {
    let mut all: Vec<LayerView> = model.layers.iter().map(LayerView::from).collect();
    all.extend(model.unserved.iter().map(LayerView::from));
    all.sort_by_key(|layer| layer.number);
    all
}

/// A layer of a group's model.
#[derive(Serialize, ToSchema)]
pub(crate) struct LayerView {
    /// The model's number of the layer.
    number: u32,
    /// Whether the group serves it.
    served: bool,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Its shape, if it is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<ShapeView>,
}

/// The shape of a layer.
#[derive(Serialize, ToSchema)]
pub(crate) struct ShapeView {
    /// Experts.
    experts: u32,
    /// Experts of a token.
    top_k: u32,
    /// Width of a token.
    hidden: u32,
    /// Width of an expert's intermediate.
    intermediate: u32,
}

impl From<&ServedLayer> for LayerView {
    fn from(layer: &ServedLayer) -> Self {
        let ServedLayer { number, experts, top_k, hidden, intermediate } = *layer;
        let shape = Some(ShapeView { experts, top_k, hidden, intermediate });
        Self { number, served: true, reason: None, shape }
    }
}

impl From<&UnservedLayer> for LayerView {
    fn from(layer: &UnservedLayer) -> Self {
        let reason = Some(layer.reason.clone());
        Self { number: layer.number, served: false, reason, shape: None }
    }
}
