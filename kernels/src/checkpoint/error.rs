//! Why a checkpoint is refused. Every variant names the file or tensor, the value found and what
//! was expected.

use std::io;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensorError};

use crate::problem::ShapeError;

/// Why a layer of a checkpoint is left to the engine, while others are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WhyUnserved {
    /// It has no experts.
    #[error("it is dense, by config.json")]
    Dense,
    /// The quantiser left it out.
    #[error("its experts are {dtype:?}, not NVFP4: the quantiser left them as they were")]
    Unquantised {
        /// Type of all its weights.
        dtype: Dtype,
    },
    /// Its number lies beyond the model's layers, as of heads that predict further tokens.
    #[error("config.json counts {count} layers, of which it is none")]
    Beyond {
        /// Layers of the model.
        count: u32,
    },
}

/// A checkpoint that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder cannot be read, mapped or given back.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A JSON file does not have the expected form.
    #[error("{} is not the JSON expected", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// There is nothing to map.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// The index names a file outside the checkpoint's folder.
    #[error("the index places tensor {tensor} in {file:?}, expected a plain file name")]
    ShardName {
        /// A tensor of that file.
        tensor: String,
        /// The name.
        file: String,
    },
    /// A safetensors header that is truncated, oversized, overlapping or no JSON, or a file that
    /// is shorter or longer than its header says.
    #[error("{file} of {bytes} bytes has no valid safetensors header")]
    Header {
        /// The file.
        file: String,
        /// Its size.
        bytes: usize,
        /// What is wrong with it.
        #[source]
        source: SafeTensorError,
    },
    /// The index and a file disagree.
    #[error("the index places tensor {tensor} in {file}, which does not hold it")]
    IndexMismatch {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A configuration value that is missing.
    #[error("{file} lacks {field}")]
    ConfigMissing {
        /// The file.
        file: &'static str,
        /// The field, or its alternatives.
        field: &'static str,
    },
    /// A configuration value that is not served.
    #[error("{file}: {field} is {value}, expected {expected}")]
    ConfigValue {
        /// The file.
        file: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is served.
        expected: &'static str,
    },
    /// A shape that no device runs.
    #[error("config.json describes a layer that cannot be served")]
    Shape(#[from] ShapeError),
    /// A layer that should have experts and has none.
    #[error("layer {layer} has no experts, expected tensors named ...layers.{layer}.*.experts.*")]
    MissingLayer {
        /// The layer.
        layer: u32,
    },
    /// A checkpoint without one layer that can be served.
    #[error("no layer can be served; layer {layer}: {why}")]
    NothingServed {
        /// The first layer.
        layer: u32,
        /// Why it is not served.
        why: WhyUnserved,
    },
    /// Two sets of experts for one layer.
    #[error("layer {layer} has experts at both {first} and {second}, expected one place")]
    AmbiguousLayer {
        /// The layer.
        layer: u32,
        /// One place.
        first: String,
        /// The other.
        second: String,
    },
    /// A tensor that an expert needs.
    #[error("tensor {tensor} is missing, expected {expected}")]
    MissingTensor {
        /// Its name.
        tensor: String,
        /// What it should be.
        expected: String,
    },
    /// A tensor of another type.
    #[error("{file}: tensor {tensor} has dtype {dtype:?}, expected {expected:?}")]
    Dtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// The type it should have.
        expected: Dtype,
    },
    /// A tensor of another shape.
    #[error("{file}: tensor {tensor} has shape {shape:?}, expected {expected}")]
    TensorShape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The shape it should have.
        expected: String,
    },
    /// A tensor that would change the result and is not part of an NVFP4 MoE layer here.
    #[error("{file}: tensor {tensor} is not served: {reason}")]
    Unserved {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Why.
        reason: &'static str,
    },
    /// A global scale that is not a scale.
    #[error("{file}: tensor {tensor} is {value} at {index}, expected {expected}")]
    Scale {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Position in the tensor.
        index: usize,
        /// The value.
        value: f32,
        /// What a scale must be.
        expected: &'static str,
    },
    /// A block scale that is NaN or negative.
    #[error(
        "{file}: tensor {tensor} is {value} (0x{bits:02x}) at row {row}, column {column}, \
         expected a finite scale that is not negative"
    )]
    BlockScale {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Row within the expert's part of the tensor.
        row: usize,
        /// Column.
        column: usize,
        /// The e4m3 bits.
        bits: u8,
        /// Their value.
        value: f32,
    },
    /// An activation format that needs scales which the checkpoint lacks.
    #[error(
        "act=nvfp4 needs the input_scale of every projection, absent are {}",
        tensors.join(", ")
    )]
    NoInputScales {
        /// Every absent tensor.
        tensors: Vec<String>,
    },
    /// Files that the index names and that are not there.
    #[error("{} are named by the index and absent in {}", files.join(", "), folder.display())]
    MissingShards {
        /// The files.
        files: Vec<String>,
        /// Where they should be.
        folder: PathBuf,
    },
    /// Gate and up were calibrated for different inputs.
    #[error("{gate_tensor} is {gate} and {up_tensor} is {up}, expected the same value")]
    InputScalesDiffer {
        /// Name of the gate's scale.
        gate_tensor: String,
        /// Its value.
        gate: f32,
        /// Name of the up projection's scale.
        up_tensor: String,
        /// Its value.
        up: f32,
    },
    /// A layer or expert that the checkpoint does not have.
    #[error("{what} {value} is outside the checkpoint's {count}")]
    OutOfRange {
        /// `layer` or `expert`.
        what: &'static str,
        /// The number asked for.
        value: usize,
        /// How many there are.
        count: usize,
    },
}
