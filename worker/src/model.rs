//! What a worker knows of its model besides the weights: what engines may attach for, and call.

use kernels::checkpoint::Checkpoint;
use kernels::problem::ActFormat;
use protocol::message::{ServedLayer, UnservedLayer};

/// The facts of a checkpoint.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) layers: Vec<ServedLayer>,
    pub(crate) unserved: Vec<UnservedLayer>,
    /// Why `act=nvfp4` cannot be served, if so.
    pub(crate) no_nvfp4: Option<String>,
}

impl Model {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Self {
        let layers = checkpoint.layers().iter().map(|layer| ServedLayer {
            number: layer.number,
            experts: layer.shape.experts,
            top_k: layer.shape.top_k,
            hidden: layer.shape.hidden,
            intermediate: layer.shape.intermediate,
        });
        let unserved = checkpoint.unserved().iter();
        let unserved = unserved
            .map(|layer| UnservedLayer { number: layer.number, reason: layer.why.to_string() });
        Self {
            name: checkpoint.name().to_owned(),
            layers: layers.collect(),
            unserved: unserved.collect(),
            no_nvfp4: checkpoint.check_act(ActFormat::Nvfp4).err().map(|e| e.to_string()),
        }
    }

    /// Why the model's layer `number` is not served.
    pub(crate) fn why_unserved(&self, number: u32) -> Option<String> {
        let layer = self.unserved.iter().find(|layer| layer.number == number)?;
        Some(layer.reason.clone())
    }

    /// Experts of the served layer `number`; none of others.
    pub(crate) fn experts(&self, number: u32) -> u32 {
        self.layers.iter().find(|layer| layer.number == number).map_or(0, |layer| layer.experts)
    }

    /// Width of the widest layer.
    pub(crate) fn hidden_max(&self) -> u32 {
        self.layers.iter().map(|layer| layer.hidden).max().unwrap_or(0)
    }
}
