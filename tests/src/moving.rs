//! The trained model on four ranks under traffic, and control, which moves its experts: every answer has the bits of the first.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use protocol::client::Engine;
use reference::layer::Variant;
use serde_json::{Value, json};

use crate::control_process::Control;
use crate::group::{Group, Spec, call_all, uneven};
use crate::invariants;
use crate::recorded::{Recorded, RecordedLayer};
use crate::worker_process::until;

/// What is on its way, in control's API.
pub const MIGRATION: &str = "/api/v1/groups/g/migration";

const PLACEMENTS: &str = "/api/v1/groups/g/placements";

/// Ranks, and slots of each.
const RANKS: u32 = 4;
const SLOTS: usize = 9;

/// Rows of a step.
const ROWS: usize = 48;

/// Engines that call every layer with the same rows again and again.
#[derive(Debug, Default)]
pub struct Traffic {
    layers: Vec<RecordedLayer>,
    engines: Vec<Engine>,
    first: Vec<Option<Vec<u16>>>,
    /// Steps so far.
    pub steps: usize,
}

impl Traffic {
    /// One call of every layer by all engines.
    pub fn step(&mut self) -> Result<()> {
        let shares = uneven(ROWS, self.engines.len());
        for (layer, first) in self.layers.iter().zip(&mut self.first) {
            let inputs = layer.inputs.rows(0..ROWS);
            let output = call_all(&mut self.engines, layer.number, &inputs, &shares)?;
            let first = first.get_or_insert_with(|| output.clone());
            invariants::has_its_bits(&format!("layer {}", layer.number), &output, first)?;
        }
        self.steps += 1;
        Ok(())
    }
}

/// A group and its control.
#[derive(Debug)]
pub struct Moving {
    /// The control plane.
    pub control: Control,
    /// The engines of the ranks.
    pub traffic: Traffic,
    _group: Group,
}

impl Moving {
    /// Starts control and the group on the folder of `tiny-kjv-moe`, and waits for a placement in force.
    pub fn start(model: &Path) -> Result<Self> {
        let control = Control::start()?;
        let mut options = control.options();
        options.extend(["--slots-per-rank".to_owned(), SLOTS.to_string()]);
        let spec = Spec { ranks: RANKS, placement: None, options };
        let group = Group::start(&model.join("model-nvfp4"), &spec)?;
        until("a placement in force", || {
            Ok(control.get(MIGRATION)?.1["problem"].is_null().then_some(()))
        })?;
        let layers = Recorded::open(&model.join("recorded.safetensors"))?.layers()?;
        let variant = Variant { nvfp4: false, weights_in_combine: false };
        let engines = group.engines(variant, ROWS)?;
        let first = vec![None; layers.len()];
        let traffic = Traffic { layers, engines, first, steps: 0 };
        Ok(Self { control, traffic, _group: group })
    }

    /// What is on its way.
    pub fn migration(&self) -> Result<Value> {
        let (status, migration) = self.control.get(MIGRATION)?;
        ensure!(status == 200, "{migration}");
        Ok(migration)
    }

    /// Changes how fast experts move.
    pub fn set_pace(&self, pace: &Value) -> Result<()> {
        let (status, view) = self.control.put(MIGRATION, &json!({ "pace": pace }))?;
        ensure!(status == 200, "{view}");
        Ok(())
    }

    /// Placements in which every rank has what the one `by` ranks before it has in the newest one: no expert stays.
    pub fn turned(&self, by: usize) -> Result<Vec<Vec<i64>>> {
        let turned = |(_, mut slots): (u64, Vec<i64>)| {
            slots.rotate_right(SLOTS * by);
            slots
        };
        Ok(self.placements("asked")?.into_iter().map(turned).collect())
    }

    /// Commits placements of all layers; their epochs.
    pub fn commit(&self, placements: &[Vec<i64>]) -> Result<Vec<u64>> {
        let body = json!({ "format": "deepseek", "text": json!(placements).to_string() });
        let (status, layers) = self.control.post("/api/v1/groups/g/import", &body)?;
        ensure!(status == 200, "{layers}");
        let epochs = layers.as_array().into_iter().flatten();
        Ok(epochs.filter_map(|layer| layer["epoch"].as_u64()).collect())
    }

    /// Epoch and expert of every slot of each layer, of what is `asked` or `in_force`; nothing in force is epoch 0.
    pub fn placements(&self, which: &str) -> Result<Vec<(u64, Vec<i64>)>> {
        let (status, layers) = self.control.get(PLACEMENTS)?;
        ensure!(status == 200, "{layers}");
        let of = |layer: &Value| {
            let placed = &layer[which];
            let slots = placed["phy2log"].as_array().into_iter().flatten();
            let slots = slots.filter_map(Value::as_i64).collect();
            (placed["epoch"].as_u64().unwrap_or(0), slots)
        };
        Ok(layers.as_array().context("no layers")?.iter().map(of).collect())
    }

    /// Gives up what is on its way.
    pub fn give_up(&self) -> Result<()> {
        let (status, said) = self.control.post("/api/v1/groups/g/rollback", &json!({}))?;
        ensure!(status == 200, "{said}");
        Ok(())
    }

    /// Goes on until nothing is on its way, and looks at every state on the way.
    pub fn until_quiet(&mut self, mut look: impl FnMut(&Value)) -> Result<()> {
        until("nothing on its way", || {
            self.traffic.step()?;
            let migration = self.migration()?;
            look(&migration);
            let moves = migration["problem"].is_null() && migration["layers"] == json!([]);
            Ok(moves.then_some(()))
        })?;
        self.traffic.step()
    }

    /// Waits, without calls, for the first layer on its way to be at a step.
    pub fn until_step(&self, step: &str) -> Result<Value> {
        until(step, || {
            let migration = self.migration()?;
            Ok((migration["layers"][0]["step"] == step).then_some(migration))
        })
    }
}
