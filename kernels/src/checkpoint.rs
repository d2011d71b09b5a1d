//! NVFP4 checkpoints of Hugging Face's form, mapped and never read as a whole: finds the experts
//! of every MoE layer under the names that ModelOpt and `compressed-tensors` write, checks types,
//! shapes and scales, and lends their bytes. Derives nothing: that is a device's part.

mod config;
mod error;
mod layer;
mod mapped;
mod names;
mod quantiser;
mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use sha2::{Digest, Sha256};

pub use self::error::{CheckpointError, WhyUnserved};

use self::config::Config;
use self::layer::LayerExperts;
use self::names::Place;
use self::tensors::{Files, Tensors};
use crate::expert::RawExpert;
use crate::problem::{ActFormat, LayerShape};

/// One MoE layer of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeLayer {
    /// The model's own number of the layer; dense layers leave gaps.
    pub number: u32,
    /// Its shape.
    pub shape: LayerShape,
    /// Largest `gate_proj.input_scale` of all experts; `None` where an expert has none.
    pub in13: Option<f32>,
    /// Whether every expert has every scale of activations that `act=nvfp4` needs.
    pub scaled: bool,
}

/// A layer that is left to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnservedLayer {
    /// The model's own number of the layer.
    pub number: u32,
    /// Why.
    pub why: WhyUnserved,
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    name: String,
    layers: Vec<MoeLayer>,
    unserved: Vec<UnservedLayer>,
    experts: Vec<LayerExperts>,
    files: Files,
}

impl Checkpoint {
    /// Opens the folder of a checkpoint: `config.json`, `model.safetensors` or the files of
    /// `model.safetensors.index.json`, and `hf_quant_config.json` where ModelOpt wrote one.
    ///
    /// Reads headers and global scales. Afterwards no page of the weights is resident.
    ///
    /// # Errors
    /// See [`CheckpointError`]; block scales are checked by [`Checkpoint::expert`].
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config = Config::read(folder)?;
        let tensors = Tensors::open(folder)?;
        let places = names::expert_places(&tensors)?;
        // Scalars may lie anywhere: reading ahead of each would read much of the weights.
        tensors.files.read_ahead(false)?;
        let mut layers = Vec::with_capacity(config.layers.len());
        let mut experts = Vec::with_capacity(config.layers.len());
        let mut unserved = unserved_by_number(&config, &places);
        for &number in &config.layers {
            let Some(Place { prefix, unserved: tensor }) = places.get(&number) else {
                return Err(CheckpointError::MissingLayer { layer: number });
            };
            // What the tensors are decides, not what a list of exclusions says.
            let dtype = tensors.weights_dtype(prefix).filter(|&dtype| dtype != Dtype::U8);
            if let Some(dtype) = dtype {
                unserved.push(UnservedLayer { number, why: WhyUnserved::Unquantised { dtype } });
                continue;
            }
            if let Some((tensor, reason)) = tensor {
                return Err(tensors.unserved(tensor, reason));
            }
            let resolved = LayerExperts::resolve(&tensors, prefix, &config)?;
            let (shape, in13) = (config.shape, resolved.in13());
            let scaled = resolved.absent_input_scales().next().is_none();
            layers.push(MoeLayer { number, shape, in13, scaled });
            experts.push(resolved);
        }
        unserved.sort_unstable_by_key(|layer| layer.number);
        if let (true, Some(first)) = (layers.is_empty(), unserved.first()) {
            let UnservedLayer { number: layer, why } = *first;
            return Err(CheckpointError::NothingServed { layer, why });
        }
        let files = tensors.files;
        files.read_ahead(true)?;
        files.release_all()?;
        Ok(Self { name: folder_name(folder), layers, unserved, experts, files })
    }

    /// Last component of the folder's path.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The MoE layers that are served, ascending by number.
    #[must_use]
    pub fn layers(&self) -> &[MoeLayer] {
        &self.layers
    }

    /// The model's other layers, ascending by number.
    #[must_use]
    pub fn unserved(&self) -> &[UnservedLayer] {
        &self.unserved
    }

    /// One expert of the layer at `position` of [`Checkpoint::layers`], borrowed from the mapping.
    /// Reads its block scales from disk, and nothing else.
    ///
    /// # Errors
    /// [`CheckpointError::BlockScale`] for a scale that is NaN or negative,
    /// [`CheckpointError::OutOfRange`].
    pub fn expert(&self, position: usize, expert: u32) -> Result<RawExpert<'_>, CheckpointError> {
        let layer = self.layer(position)?;
        layer.expert(&self.files, expert).unwrap_or_else(|| {
            let count = self.layers[position].shape.experts as usize;
            Err(CheckpointError::OutOfRange { what: "expert", value: expert as usize, count })
        })
    }

    /// Whether every layer has the scales that `act` needs.
    ///
    /// # Errors
    /// [`CheckpointError::NoInputScales`], with every absent tensor of every expert.
    pub fn check_act(&self, act: ActFormat) -> Result<(), CheckpointError> {
        if act == ActFormat::Bf16 {
            return Ok(());
        }
        let tensors: Vec<String> =
            self.experts.iter().flat_map(LayerExperts::absent_input_scales).collect();
        if tensors.is_empty() { Ok(()) } else { Err(CheckpointError::NoInputScales { tensors }) }
    }

    /// SHA-256, in hexadecimal: of the layers' shapes and activations, and for every tensor of every
    /// expert of its shape, its global scales, and 64 bytes out of its middle. Different for two
    /// quantisations of one model, and for most other ways in which two checkpoints can differ.
    ///
    /// No more than one layer is resident at a time: with a few bytes of each tensor the system maps
    /// up to a megabyte around them.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn digest(&self) -> Result<String, CheckpointError> {
        let mut hash = Sha256::new();
        for (layer, experts) in self.layers.iter().zip(&self.experts) {
            hash.update(format!("{} {:?}", layer.number, layer.shape));
            experts.sample(&self.files, |bytes| hash.update(bytes));
            experts.release(&self.files)?;
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Gives the resident pages of the layer at `position` back to the system; they are read from
    /// the files again when next looked at.
    ///
    /// # Errors
    /// [`CheckpointError::OutOfRange`], [`CheckpointError::Io`].
    pub fn release(&self, position: usize) -> Result<(), CheckpointError> {
        self.layer(position)?.release(&self.files)
    }

    fn layer(&self, position: usize) -> Result<&LayerExperts, CheckpointError> {
        let count = self.experts.len();
        let absent = CheckpointError::OutOfRange { what: "layer position", value: position, count };
        self.experts.get(position).ok_or(absent)
    }
}

/// Layers without experts, and experts of layers that the model does not count.
fn unserved_by_number(config: &Config, places: &BTreeMap<u32, Place<'_>>) -> Vec<UnservedLayer> {
    let count = config.count;
    let dense = (0..count).filter(|number| !config.layers.contains(number));
    let beyond = places.keys().copied().filter(|&number| number >= count);
    let because = |why| move |number| UnservedLayer { number, why };
    let dense = dense.map(because(WhyUnserved::Dense));
    dense.chain(beyond.map(because(WhyUnserved::Beyond { count }))).collect()
}

fn folder_name(folder: &Path) -> String {
    // Paths such as `.` have no last component of their own.
    let whole = match folder.file_name() {
        Some(_) => folder.to_owned(),
        None => folder.canonicalize().unwrap_or_else(|_| folder.to_owned()),
    };
    let name = whole.file_name().unwrap_or(whole.as_os_str());
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
