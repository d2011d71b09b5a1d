//! One layer's experts resolved to byte ranges and checked global scales, once, when the
//! checkpoint is opened. Block scales are looked at later, expert by expert: to check them all at
//! once would read a ninth of the weights from disk.

use safetensors::Dtype;

use super::config::Config;
use super::error::CheckpointError;
use super::names::{Names, Part, Which};
use super::quantiser::Quantiser;
use super::tensors::{Extent, Files, Tensors};
use crate::expert::{RawExpert, RawProjection};
use crate::numeric::{BLOCK, e4m3_decode, is_block_scale};
use crate::problem::LayerShape;

/// Bytes between two ranges that are still released as one: a page of the usual size.
const RELEASE_GAP_BYTES: usize = 4096;

/// Bytes of each tensor that go into a checkpoint's digest.
const SAMPLE_BYTES: usize = 64;

/// One projection of one expert.
#[derive(Debug, Clone, Copy)]
struct Projection {
    codes: Extent,
    scales: Extent,
    weight_scale_2: f32,
    input_scale: Option<f32>,
}

/// The experts of one layer.
#[derive(Debug)]
pub(super) struct LayerExperts {
    names: Names,
    shape: LayerShape,
    /// Gate, up and down of every expert.
    experts: Vec<[Projection; 3]>,
}

impl LayerExperts {
    /// Finds every tensor of the layer whose names begin with `prefix`, and checks types, shapes
    /// and global scales.
    pub(super) fn resolve(
        tensors: &Tensors,
        prefix: &str,
        config: &Config,
    ) -> Result<Self, CheckpointError> {
        let names = Names::detect(tensors, prefix, config.quantiser);
        let shape = config.shape;
        let resolver = Resolver { tensors, names: &names, config };
        let experts = (0..shape.experts)
            .map(|expert| {
                let [gate, up, down] = [Which::Gate, Which::Up, Which::Down];
                Ok([
                    resolver.projection(expert, gate)?,
                    resolver.projection(expert, up)?,
                    resolver.projection(expert, down)?,
                ])
            })
            .collect::<Result<Vec<_>, CheckpointError>>()?;
        // Stacked experts are counted by their shape.
        let beyond = names.tensor(shape.experts, Which::Gate, Part::Codes);
        if !names.stacked() && tensors.contains(&beyond) {
            return Err(tensors.unserved(&beyond, "config.json counts fewer experts"));
        }
        let layer = Self { names, shape, experts };
        layer.check_input_scales()?;
        Ok(layer)
    }

    /// Largest `input_scale` of the gate projections of all experts.
    pub(super) fn in13(&self) -> Option<f32> {
        let scales: Option<Vec<f32>> =
            self.experts.iter().map(|[gate, ..]| gate.input_scale).collect();
        scales?.into_iter().reduce(f32::max)
    }

    /// Gives `take` the facts and a few bytes of every tensor, in order.
    pub(super) fn sample(&self, files: &Files, mut take: impl FnMut(&[u8])) {
        for projection in self.experts.iter().flatten() {
            let input_scale = projection.input_scale.unwrap_or(f32::NAN);
            take(&projection.weight_scale_2.to_bits().to_le_bytes());
            take(&input_scale.to_bits().to_le_bytes());
            for extent in [projection.codes, projection.scales] {
                let bytes = files.bytes(extent);
                let middle = &bytes[bytes.len() / 2..];
                take(&(bytes.len() as u64).to_le_bytes());
                take(&middle[..middle.len().min(SAMPLE_BYTES)]);
            }
        }
    }

    /// One expert's bytes, with its block scales checked; `None` for an expert that is not there.
    pub(super) fn expert<'a>(
        &self,
        files: &'a Files,
        expert: u32,
    ) -> Option<Result<RawExpert<'a>, CheckpointError>> {
        let [gate, up, down] = *self.experts.get(expert as usize)?;
        let raw = |projection, which| {
            let raw = self.raw(files, projection, which);
            self.check_block_scales(files, &raw, (expert, which))?;
            Ok(raw)
        };
        Some(raw(gate, Which::Gate).and_then(|gate| {
            Ok(RawExpert { gate, up: raw(up, Which::Up)?, down: raw(down, Which::Down)? })
        }))
    }

    fn raw<'a>(&self, files: &'a Files, projection: Projection, which: Which) -> RawProjection<'a> {
        let (rows, cols) = dimensions(&self.shape, which);
        RawProjection {
            rows,
            cols,
            codes: files.bytes(projection.codes),
            scales: files.bytes(projection.scales),
            weight_scale_2: projection.weight_scale_2,
            input_scale: projection.input_scale,
        }
    }

    fn check_block_scales(
        &self,
        files: &Files,
        raw: &RawProjection<'_>,
        (expert, which): (u32, Which),
    ) -> Result<(), CheckpointError> {
        let Some(position) = raw.scales.iter().position(|&bits| !is_block_scale(bits)) else {
            return Ok(());
        };
        let bits = raw.scales[position];
        let columns = raw.cols / BLOCK;
        let first_row = self.names.first_row(which, raw.rows);
        let [gate, up, down] = self.experts[expert as usize];
        let extent = [gate, up, down][which as usize].scales;
        Err(CheckpointError::BlockScale {
            file: files.name(extent).to_owned(),
            tensor: self.names.tensor(expert, which, Part::BlockScales),
            row: first_row + position / columns,
            column: position % columns,
            bits,
            value: e4m3_decode(bits),
        })
    }

    /// Gives the pages of all experts back.
    pub(super) fn release(&self, files: &Files) -> Result<(), CheckpointError> {
        let projections = self.experts.iter().flatten();
        let mut extents: Vec<Extent> = projections.flat_map(|p| [p.codes, p.scales]).collect();
        extents.sort_unstable();
        let mut extents = extents.into_iter();
        let Some(first) = extents.next() else { return Ok(()) };
        let (mut file, mut start, mut end) = (first.file, first.start, first.start + first.len);
        for next in extents {
            if next.file != file || next.start > end + RELEASE_GAP_BYTES {
                files.release(file, start..end)?;
                (file, start, end) = (next.file, next.start, next.start);
            }
            end = end.max(next.start + next.len);
        }
        files.release(file, start..end)
    }

    /// Names of the scales of activations that are absent: calibration did not reach those experts.
    pub(super) fn absent_input_scales(&self) -> impl Iterator<Item = String> {
        let all = [Which::Gate, Which::Up, Which::Down];
        (0..).zip(&self.experts).flat_map(move |(expert, projections)| {
            let absent = projections.iter().zip(all).filter(|(p, _)| p.input_scale.is_none());
            absent.map(move |(_, which)| self.names.tensor(expert, which, Part::InputScale))
        })
    }

    fn check_input_scales(&self) -> Result<(), CheckpointError> {
        let name = |expert, which| self.names.tensor(expert, which, Part::InputScale);
        for (expert, [gate, up, _]) in (0..).zip(&self.experts) {
            if let (Some(g), Some(u)) = (gate.input_scale, up.input_scale)
                && g.to_bits() != u.to_bits()
            {
                return Err(CheckpointError::InputScalesDiffer {
                    gate_tensor: name(expert, Which::Gate),
                    gate: g,
                    up_tensor: name(expert, Which::Up),
                    up: u,
                });
            }
        }
        Ok(())
    }
}

/// Rows and columns of a projection.
fn dimensions(shape: &LayerShape, which: Which) -> (usize, usize) {
    let (hidden, intermediate) = (shape.hidden as usize, shape.intermediate as usize);
    match which {
        Which::Gate | Which::Up => (intermediate, hidden),
        Which::Down => (hidden, intermediate),
    }
}

/// What it takes to find the tensors of a layer.
struct Resolver<'a> {
    tensors: &'a Tensors,
    names: &'a Names,
    config: &'a Config,
}

impl Resolver<'_> {
    fn projection(&self, expert: u32, which: Which) -> Result<Projection, CheckpointError> {
        let (_, cols) = dimensions(&self.config.shape, which);
        // Codes first: of a layer that was left unquantised, their type says so.
        let codes = self.matrix((expert, which, Part::Codes), Dtype::U8, cols / 2)?;
        let scales = (expert, which, Part::BlockScales);
        let scales = self.matrix(scales, Dtype::F8_E4M3, cols / BLOCK)?;
        let weight_scale_2 = self.scalar(expert, which, Part::WeightScale)?;
        let calibrated = self.tensors.contains(&self.names.tensor(expert, which, Part::InputScale));
        let input_scale =
            calibrated.then(|| self.scalar(expert, which, Part::InputScale)).transpose()?;
        Ok(Projection { codes, scales, weight_scale_2, input_scale })
    }

    /// The rows of one projection in a tensor that may hold other projections and experts too.
    fn matrix(
        &self,
        (expert, which, part): (u32, Which, Part),
        dtype: Dtype,
        row_bytes: usize,
    ) -> Result<Extent, CheckpointError> {
        let (rows, _) = dimensions(&self.config.shape, which);
        let experts = self.config.shape.experts as usize;
        let rows_together = rows * self.names.projections_together(which);
        let tensor = self.names.tensor(expert, which, part);
        let (extent, before) = if self.names.stacked() {
            let shape = [experts, rows_together, row_bytes];
            (self.tensors.matrix(&tensor, dtype, &shape)?, expert as usize * rows_together)
        } else {
            (self.tensors.matrix(&tensor, dtype, &[rows_together, row_bytes])?, 0)
        };
        let first_row = before + self.names.first_row(which, rows);
        Ok(extent.part(first_row * row_bytes, rows * row_bytes))
    }

    /// A global scale in ModelOpt's sense, from a tensor that may hold those of other projections
    /// and experts too.
    fn scalar(&self, expert: u32, which: Which, part: Part) -> Result<f32, CheckpointError> {
        let experts = self.config.shape.experts as usize;
        let together = self.names.projections_together(which);
        let per_expert = if self.names.stacked() { experts } else { 1 };
        let shapes = [vec![], vec![per_expert], vec![per_expert, together]];
        let tensor = self.names.tensor(expert, which, part);
        let values = self.tensors.scalars(&tensor, &shapes)?;
        // One value serves everything; one an expert serves its gate and up.
        let index = match values.len() {
            1 => 0,
            n if n == per_expert => expert as usize,
            _ => expert as usize % per_expert * together + usize::from(which == Which::Up),
        };
        let scale = |expected| CheckpointError::Scale {
            file: self.tensors.file_of(&tensor),
            tensor: tensor.clone(),
            index,
            value: values[index],
            expected,
        };
        let divides = self.config.quantiser == Quantiser::CompressedTensors;
        checked_scale(values[index], part, divides).map_err(scale)
    }
}

/// The scale that multiplies, or what it should have been. A zero would turn into an infinity, or
/// a whole projection into nothing.
fn checked_scale(value: f32, part: Part, divides: bool) -> Result<f32, &'static str> {
    let inverse = 1.0 / value;
    let inverted = divides || part == Part::InputScale;
    if !(value.is_finite() && value > 0.0 && (!inverted || inverse.is_finite())) {
        return Err("a positive finite number with a finite reciprocal");
    }
    Ok(if divides { inverse } else { value })
}
