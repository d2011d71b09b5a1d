//! How checkpoints name the tensors of an expert, and which of those ways a layer uses.
//!
//! ```text
//! split          P.experts.7.gate_proj.weight     ModelOpt; w1, w3, w2 in Mixtral's form
//! fused          P.experts.7.gate_up_proj.weight  [2i, ...], gate rows first
//! stacked        P.experts.gate_up_proj.weight    [E, 2i, ...], gate rows first
//! stacked, bare  P.experts.gate_up_proj           with gate_up_proj_weight_scale, ...
//! ```
//! `compressed-tensors` has other words after the last dot.

use std::collections::BTreeMap;

use super::error::CheckpointError;
use super::quantiser::Quantiser;
use super::tensors::Tensors;

/// One of the tensors of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Codes,
    BlockScales,
    WeightScale,
    InputScale,
}

/// One of an expert's projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Gate,
    Up,
    Down,
}

/// The way a layer names its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Three projections of each expert: the words for gate, up and down.
    Split([&'static str; 3]),
    /// Gate and up of each expert in one tensor.
    Fused,
    /// All experts in one tensor; `bare` joins the parts with an underscore.
    Stacked { bare: bool },
}

const FORMS: [Form; 5] = [
    Form::Split(["gate_proj", "up_proj", "down_proj"]),
    Form::Split(["w1", "w3", "w2"]),
    Form::Fused,
    Form::Stacked { bare: false },
    Form::Stacked { bare: true },
];

/// Endings of tensors that would change an expert's result and are part of no NVFP4 expert here.
const UNSERVED: [(&str, &str); 2] = [
    ("bias", "experts have no bias here"),
    ("pre_quant_scale", "inputs are not rescaled before quantisation here"),
];

/// Names of the tensors of one layer's experts.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// Up to and with `experts`.
    prefix: String,
    form: Form,
    quantiser: Quantiser,
}

impl Names {
    /// Finds the form whose tensors exist for expert 0; the first form where there are none, so
    /// that its missing tensors are named.
    pub(super) fn detect(tensors: &Tensors, prefix: &str, quantiser: Quantiser) -> Self {
        let all = FORMS.map(|form| Self { prefix: prefix.to_owned(), form, quantiser });
        let [first, ..] = &all;
        all.iter().find(|names| names.any_exists(tensors)).unwrap_or(first).clone()
    }

    fn any_exists(&self, tensors: &Tensors) -> bool {
        let parts = [Part::Codes, Part::BlockScales, Part::WeightScale, Part::InputScale];
        // The down projection has the same name in fused as in split experts: look at the others.
        parts.iter().any(|&part| {
            [Which::Gate, Which::Up].iter().any(|&w| tensors.contains(&self.tensor(0, w, part)))
        })
    }

    /// Whether one tensor holds all experts.
    pub(super) fn stacked(&self) -> bool {
        matches!(self.form, Form::Stacked { .. })
    }

    /// How many projections of an expert share the tensor of this one.
    pub(super) fn projections_together(&self, which: Which) -> usize {
        let fused = !matches!(self.form, Form::Split(_));
        if fused && which != Which::Down { 2 } else { 1 }
    }

    /// First row of a projection within its expert's rows of the tensor, which has `rows` rows for
    /// each projection.
    pub(super) fn first_row(&self, which: Which, rows: usize) -> usize {
        if which == Which::Up && self.projections_together(which) == 2 { rows } else { 0 }
    }

    /// Name of one tensor of one expert; the expert does not matter to stacked forms.
    pub(super) fn tensor(&self, expert: u32, which: Which, part: Part) -> String {
        let fused = if which == Which::Down { "down_proj" } else { "gate_up_proj" };
        let prefix = &self.prefix;
        match (self.form, part) {
            (Form::Split(words), _) => {
                let word = words[which as usize];
                format!("{prefix}.{expert}.{word}.{}", self.word(part))
            }
            (Form::Fused, _) => format!("{prefix}.{expert}.{fused}.{}", self.word(part)),
            (Form::Stacked { bare: true }, Part::Codes) => format!("{prefix}.{fused}"),
            (Form::Stacked { bare: true }, _) => format!("{prefix}.{fused}_{}", self.word(part)),
            (Form::Stacked { bare: false }, _) => format!("{prefix}.{fused}.{}", self.word(part)),
        }
    }

    fn word(&self, part: Part) -> &'static str {
        match (self.quantiser, part) {
            (Quantiser::ModelOpt, Part::Codes) => "weight",
            (Quantiser::ModelOpt, Part::WeightScale) => "weight_scale_2",
            (Quantiser::ModelOpt, Part::InputScale) => "input_scale",
            (Quantiser::CompressedTensors, Part::Codes) => "weight_packed",
            (Quantiser::CompressedTensors, Part::WeightScale) => "weight_global_scale",
            (Quantiser::CompressedTensors, Part::InputScale) => "input_global_scale",
            (_, Part::BlockScales) => "weight_scale",
        }
    }
}

/// Where a layer's experts are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// The names' part up to and with `experts`.
    pub(super) prefix: &'a str,
    /// A tensor among them that no NVFP4 expert here has, and why it would matter.
    pub(super) unserved: Option<(&'a str, &'static str)>,
}

/// Where each layer's experts are, by its number. Multi-token-prediction heads (`mtp.`) have layers of
/// their own, which are not served.
pub(super) fn expert_places(
    tensors: &Tensors,
) -> Result<BTreeMap<u32, Place<'_>>, CheckpointError> {
    let mut places: BTreeMap<u32, Place<'_>> = BTreeMap::new();
    for name in tensors.names().filter(|name| !name.starts_with("mtp.")) {
        let Some((prefix, layer, rest)) = split_prefix(name) else { continue };
        let place = places.entry(layer).or_insert(Place { prefix, unserved: None });
        if place.prefix != prefix {
            let (first, second) = (place.prefix.to_owned(), prefix.to_owned());
            return Err(CheckpointError::AmbiguousLayer { layer, first, second });
        }
        let ending = UNSERVED.iter().find(|(ending, _)| rest.ends_with(ending));
        place.unserved = place.unserved.or(ending.map(|&(_, reason)| (name, reason)));
    }
    Ok(places)
}

/// `model.layers.3.mlp.experts.0.w1.weight` is (`model.layers.3.mlp.experts`, 3, `0.w1.weight`).
fn split_prefix(name: &str) -> Option<(&str, u32, &str)> {
    const EXPERTS: &str = ".experts.";
    let end = name.find(EXPERTS)? + EXPERTS.len() - 1;
    let prefix = &name[..end];
    let after = prefix.rsplit_once("layers.")?.1;
    let layer = after.split('.').next()?.parse().ok()?;
    Some((prefix, layer, &name[end + 1..]))
}
