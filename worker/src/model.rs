//! What a worker knows of its model besides the weights: what engines may attach for, and call.

use kernels::checkpoint::Checkpoint;
use kernels::problem::ActFormat;
use protocol::message::ServedLayer;

/// The facts of a checkpoint.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) layers: Vec<ServedLayer>,
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
        Self {
            name: checkpoint.name().to_owned(),
            layers: layers.collect(),
            no_nvfp4: checkpoint.check_act(ActFormat::Nvfp4).err().map(|e| e.to_string()),
        }
    }

    /// Width of the widest layer.
    pub(crate) fn hidden_max(&self) -> u32 {
        self.layers.iter().map(|layer| layer.hidden).max().unwrap_or(0)
    }
}
