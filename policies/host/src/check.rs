//! Every rule of the contract that an answer can break. Judges form alone: whether a decision is a good one is
//! measured elsewhere.

mod placement;
mod routing;
mod tactics;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use placement::placement;
pub use routing::routing;
pub use tactics::tactics;

use crate::contract::meta::Info;
use crate::contract::types::Layer;
use crate::limits::{SCHEMA_BYTES_MAX, TEXT_BYTES_MAX};

/// The rule that an answer breaks. Every variant names the value and what was expected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Fault {
    /// A text that is missing or too long.
    #[error("{what} has {bytes} bytes, expected 1 to {limit}")]
    Text {
        /// Which text.
        what: String,
        /// Its length.
        bytes: usize,
        /// The length accepted.
        limit: usize,
    },
    /// A name that is none.
    #[error("the name is {name:?}, expected small letters, digits and dashes")]
    Name {
        /// It.
        name: String,
    },
    /// A layer that was not asked about, or one named twice.
    #[error("layer {layer} {problem}")]
    Layer {
        /// The layer.
        layer: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// A list of another length than the request demands.
    #[error("{what} has {found} entries, expected {expected}")]
    Length {
        /// Which list.
        what: String,
        /// Its length.
        found: usize,
        /// The length demanded.
        expected: usize,
    },
    /// A number that refers to nothing.
    #[error("{what} is {found}, expected less than {limit}")]
    Range {
        /// Which number.
        what: String,
        /// The number.
        found: u32,
        /// What it must be less than.
        limit: u32,
    },
    /// An expert without a slot.
    #[error("layer {layer}: expert {expert} has no slot")]
    Lost {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
    },
    /// Two replicas of an expert on one rank.
    #[error("layer {layer}: rank {rank} has two replicas of expert {expert}")]
    Duplicate {
        /// The layer.
        layer: u32,
        /// The rank.
        rank: u32,
        /// The expert.
        expert: u32,
    },
    /// A pin that does not hold.
    #[error("layer {layer}: rank {rank} {problem} expert {expert}")]
    Pin {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// The rank.
        rank: u32,
        /// Lacks what it must have, or has what it must never have.
        problem: String,
    },
    /// Something placed where it must not be: new on a rank that drains, or at all on one that is lost.
    #[error("layer {layer}: expert {expert} is placed on rank {rank}, which {problem}")]
    Rank {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// The rank.
        rank: u32,
        /// Drains, or is lost.
        problem: String,
    },
    /// A move that the placement does not make.
    #[error("layer {layer}: the move of expert {expert} to rank {rank} {problem}")]
    Move {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// The rank that it is said to come to.
        rank: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// More than the budget allows.
    #[error("{what}: {found}, the budget is {limit}")]
    Budget {
        /// Of what.
        what: String,
        /// What the answer uses.
        found: u64,
        /// What it may use.
        limit: u64,
    },
    /// A number that is no number, or a negative one.
    #[error("{what} is {found}, expected {expected}")]
    Number {
        /// Which number.
        what: String,
        /// As text, since JSON has no NaN.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// An expert whose weights are all 0.
    #[error("layer {layer}: row {row} gives none of expert {expert}'s replicas a weight")]
    Weights {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// The row of weights.
        row: u32,
    },
}

fn text(what: &str, text: &str) -> Result<(), Fault> {
    text_within(what, text, TEXT_BYTES_MAX)
}

fn text_within(what: &str, text: &str, limit: usize) -> Result<(), Fault> {
    let bytes = text.len();
    if (1..=limit).contains(&bytes) {
        return Ok(());
    }
    Err(Fault::Text { what: what.to_owned(), bytes, limit })
}

fn length(what: &str, found: usize, expected: usize) -> Result<(), Fault> {
    if found == expected {
        return Ok(());
    }
    Err(Fault::Length { what: what.to_owned(), found, expected })
}

fn below(what: &str, found: u32, limit: usize) -> Result<(), Fault> {
    if (found as usize) < limit {
        return Ok(());
    }
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    Err(Fault::Range { what: what.to_owned(), found, limit })
}

fn finite(what: &str, found: f32) -> Result<(), Fault> {
    if found.is_finite() {
        return Ok(());
    }
    Err(number(what, found, "a finite number"))
}

fn not_negative(what: &str, found: f32) -> Result<(), Fault> {
    if found.is_finite() && found >= 0.0 {
        return Ok(());
    }
    Err(number(what, found, "a finite number of at least 0"))
}

fn number(what: &str, found: f32, expected: &str) -> Fault {
    let (what, expected) = (what.to_owned(), expected.to_owned());
    Fault::Number { what, found: found.to_string(), expected }
}

fn within(what: &str, found: u64, limit: Option<u64>) -> Result<(), Fault> {
    match limit {
        Some(limit) if found > limit => Err(Fault::Budget { what: what.to_owned(), found, limit }),
        _ => Ok(()),
    }
}

/// The layers of a request, each of which an answer may name once.
struct Layers<'a> {
    asked: BTreeMap<u32, &'a Layer>,
    named: BTreeSet<u32>,
}

impl<'a> Layers<'a> {
    fn of(layers: &'a [Layer]) -> Self {
        Self {
            asked: layers.iter().map(|layer| (layer.id, layer)).collect(),
            named: BTreeSet::new(),
        }
    }

    fn take(&mut self, layer: u32) -> Result<&'a Layer, Fault> {
        let fault = |problem: &str| Fault::Layer { layer, problem: problem.to_owned() };
        let found = *self.asked.get(&layer).ok_or_else(|| fault("was not asked about"))?;
        if self.named.insert(layer) { Ok(found) } else { Err(fault("is named twice")) }
    }
}

/// Checks what a policy says of itself.
///
/// # Errors
/// [`Fault::Text`] for a missing name, version, summary or schema; [`Fault::Name`].
pub fn info(info: &Info) -> Result<(), Fault> {
    text("the name", &info.name)?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !info.name.chars().all(plain) {
        return Err(Fault::Name { name: info.name.clone() });
    }
    text("the version", &info.version)?;
    text("the summary", &info.summary)?;
    text_within("the schema of settings", &info.settings_schema, SCHEMA_BYTES_MAX)
}
