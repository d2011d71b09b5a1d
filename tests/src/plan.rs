//! The cases of `tests/data/cases.json`: the 59 of the original system's test plan and the 24 shapes
//! of its kernels' functional matrix, with inputs that their names decide.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use half::bf16;
use reference::layer::Inputs;
use serde::Deserialize;

use crate::random::Random;
use crate::routing::{Parameters, route_checked};

/// Ranks that the functional shapes run on.
const FUNCTIONAL_RANKS: u32 = 4;
/// Tokens of a functional case, over all ranks.
const FUNCTIONAL_TOKENS: u32 = 32;
/// Added to the logits of the experts that a balanced routing wants: far above a normal number.
const WANTED: f32 = 16.0;
/// Exponent of the popularity of experts in a power-law routing.
const POWER: f32 = 1.2;

/// What cases of one checkpoint have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Experts of the layer.
    pub experts: u32,
    /// Width of a token.
    pub hidden: u32,
    /// Width between FC1 and FC2.
    pub intermediate: u32,
    /// Clamp of the activation.
    pub clamp: Option<f32>,
}

/// One case.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedCase {
    /// Its name, S01 to S59 or M01 to M24.
    pub id: String,
    /// The layer.
    pub shape: Shape,
    /// Experts of a token.
    pub top_k: u32,
    /// Ranks that answer.
    pub ranks: u32,
    /// Tokens over all ranks.
    pub tokens: u32,
    /// How experts are chosen: a routing method; `balanced` and `power_law` are Renormalize of logits
    /// that make them so.
    pub routing: String,
    /// Slots over all ranks, for the case whose experts move.
    pub slots: Option<u32>,
}

/// The cases by group.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The original system's 59.
    pub seed: Vec<PlannedCase>,
    /// The 24 functional shapes.
    pub functional: Vec<PlannedCase>,
}

#[derive(Deserialize)]
struct Wire {
    seed: Vec<WireCase>,
    functional: Vec<WireCase>,
}

#[derive(Deserialize)]
struct WireCase {
    id: String,
    experts: u32,
    top_k: u32,
    hidden: u32,
    intermediate: u32,
    routing: String,
    tokens: u32,
    ranks: Option<u32>,
    eplb: Option<WireEplb>,
    clamp: Option<f32>,
}

#[derive(Deserialize)]
struct WireEplb {
    slots: u32,
}

impl Plan {
    /// Reads `cases.json`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        let Wire { seed, functional } =
            serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let seed = seed.into_iter().map(|case| {
            let ranks = case.ranks.with_context(|| format!("case {} has no ranks", case.id))?;
            let tokens = case.tokens * ranks;
            Ok(case.planned(ranks, tokens))
        });
        let functional =
            functional.into_iter().map(|case| case.planned(FUNCTIONAL_RANKS, FUNCTIONAL_TOKENS));
        Ok(Self { seed: seed.collect::<Result<_>>()?, functional: functional.collect() })
    }
}

impl WireCase {
    fn planned(self, ranks: u32, tokens: u32) -> PlannedCase {
        let Self { id, experts, top_k, hidden, intermediate, routing, eplb, clamp, .. } = self;
        let shape = Shape { experts, hidden, intermediate, clamp };
        let slots = eplb.map(|eplb| eplb.slots);
        PlannedCase { id, shape, top_k, ranks, tokens, routing, slots }
    }
}

impl PlannedCase {
    /// Hidden states and logits of the standard normal distribution, the logits routed.
    pub fn inputs(&self) -> Result<Inputs> {
        let seed = self.id.bytes().fold(0, |seed, byte| seed << 8 | u64::from(byte));
        let mut random = Random::new(seed);
        let (hidden, top_k) = (self.shape.hidden as usize, self.top_k as usize);
        let count = self.tokens as usize * hidden;
        let x = (0..count).map(|_| bf16::from_f32(random.normal()).to_bits()).collect();
        let logits = self.logits(&mut random)?;
        let experts = self.shape.experts;
        let bias: Vec<f32> = (0..experts).map(|_| random.unit()).collect();
        let (groups, scale) = if experts == 256 { ((8, 4), 2.5) } else { ((1, 1), 1.0) };
        let parameters = Parameters { bias: &bias, groups, scale };
        let method = if logits.renormalised { "Renormalize" } else { &self.routing };
        let (ids, weights) = route_checked(method, parameters, self.top_k, &logits.values)
            .with_context(|| format!("case {}", self.id))?;
        Ok(Inputs { hidden, top_k, x, ids, weights })
    }

    fn logits(&self, random: &mut Random) -> Result<Logits> {
        let experts = self.shape.experts as usize;
        let mut values: Vec<f32> =
            (0..self.tokens as usize * experts).map(|_| random.normal()).collect();
        let renormalised = match self.routing.as_str() {
            "balanced" => {
                // The experts in turn, k for each token.
                for place in 0..self.tokens as usize * self.top_k as usize {
                    let token = place / self.top_k as usize;
                    values[token * experts + place % experts] += WANTED;
                }
                true
            }
            "power_law" => {
                for (at, value) in values.iter_mut().enumerate() {
                    *value -= POWER * ((at % experts + 1) as f32).ln();
                }
                true
            }
            other if other.chars().next().is_some_and(char::is_uppercase) => false,
            other => bail!("case {}: {other} is no routing", self.id),
        };
        Ok(Logits { values, renormalised })
    }
}

/// Logits `[tokens, experts]`, and whether they were made for Renormalize.
struct Logits {
    values: Vec<f32>,
    renormalised: bool,
}
