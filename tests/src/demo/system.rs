//! What a demonstration runs on, and what control says of it.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use protocol::client::Engine;
use reference::layer::Variant;
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::group::{Group, Spec};
use tests::worker_process::{Worker, until};

use super::Played;

const RANKS: u32 = 4;
/// 36 slots for the 32 experts of a layer.
const SLOTS_PER_RANK: &str = "9";
pub(super) const GROUP: &str = "/api/v1/groups/g";

/// Workers, and control if it has any part in it.
pub(super) enum System {
    Alone(Worker),
    Whole {
        /// Before control, so that they say farewell to it.
        group: Group,
        control: Box<Control>,
        /// The epoch of each layer's placement, and its slots.
        placed: Vec<(u64, usize)>,
    },
}

/// The busiest rank beside the mean, for each layer, and the summary over layers.
pub(super) struct Balance {
    pub(super) layers: Vec<(u32, f64)>,
    pub(super) summary: String,
}

impl System {
    pub(super) fn alone(model: &Path, device: &str) -> Result<Self> {
        let mut options = vec!["--device", device];
        if device == "cuda" {
            // Answers are compared bit by bit with those of other batches: one order of sums for all of them.
            options.extend(["--tactic", "streamed"]);
        }
        Ok(Self::Alone(Worker::start(model, &options)?))
    }

    /// Waits until the placement that control pushes is in force.
    pub(super) fn with_control(model: &Path, device: &str) -> Result<Self> {
        let control = Control::start_with(&[])?;
        let mut options = control.options();
        options.extend(["--slots-per-rank", SLOTS_PER_RANK, "--device", device].map(str::to_owned));
        let group = Group::start(model, &Spec { ranks: RANKS, placement: None, options })?;
        let placed = until("a placement in force", || placed(&control))?;
        Ok(Self::Whole { group, control: Box::new(control), placed })
    }

    pub(super) fn introduce(&self, out: &mut impl Write) -> Result<()> {
        match self {
            Self::Alone(worker) => {
                let variant = Variant { nvfp4: false, weights_in_combine: false };
                let engine = worker.engine(variant, 1)?;
                let welcome = engine.welcome();
                writeln!(out, "{}: {} on {}", welcome.worker, welcome.model, welcome.device)?;
            }
            Self::Whole { control, placed, .. } => {
                let (_, workers) = control.get("/api/v1/workers")?;
                let workers = workers["items"].as_array().context("no workers")?;
                let first = workers.first().context("no worker")?;
                let text = |key: &str| first[key].as_str().unwrap_or_default().to_owned();
                let (count, model, device) = (workers.len(), text("model"), text("device"));
                writeln!(out, "{count} workers: {model} on {device}")?;
                let address = control.address();
                writeln!(
                    out,
                    "control: http://{address}/api/v1/workers, http://{address}{GROUP}/placements, http://{address}/metrics"
                )?;
                let (epoch, slots) = placed.first().context("no layer is placed")?;
                let layers = placed.len();
                writeln!(
                    out,
                    "in force on all ranks: {slots} slots in each of {layers} layers, epoch {epoch}"
                )?;
            }
        }
        Ok(())
    }

    /// An engine for each worker.
    pub(super) fn engines(&self, variant: Variant, max_tokens: usize) -> Result<Vec<Engine>> {
        match self {
            Self::Alone(worker) => Ok(vec![worker.engine(variant, max_tokens)?]),
            Self::Whole { group, .. } => group.engines(variant, max_tokens),
        }
    }

    /// What control says of all that was played, once it says that everything was counted.
    pub(super) fn balance(&self, played: &[Played]) -> Result<Option<Balance>> {
        let Self::Whole { control, .. } = self else { return Ok(None) };
        let (status, closed) = control.post(&format!("{GROUP}/windows"), &json!({}))?;
        ensure!(status == 200 && closed["missing"] == json!([]), "{closed}");
        let (_, balance) = control.get(&format!("{GROUP}/balancedness?after_ms=0"))?;
        let layers = balance["layers"].as_array().context("no layers")?;
        let judge = |layer: &Value| {
            let number = u32::try_from(layer["layer"].as_u64()?).ok()?;
            Some((number, layer["assignments"].as_u64()?, layer["max_over_mean"].as_f64()?))
        };
        let judged: Option<Vec<_>> = layers.iter().map(judge).collect();
        let judged = judged.with_context(|| format!("control says {balance}"))?;
        for &(number, counted, _) in &judged {
            let reports = played.iter().flat_map(|(_, layers)| layers);
            let of_layer = reports.filter(|report| report.number == number);
            let made: u64 = of_layer.map(|report| report.calls.assignments).sum();
            ensure!(counted == made, "layer {number}: control counted {counted} of {made} pairs");
        }
        let layers = judged.into_iter().map(|(number, _, ratio)| (number, ratio)).collect();
        let of = |key: &str| balance["balancedness"][key].as_f64().unwrap_or(f64::NAN);
        let [min, p50, p90, avg] = ["min", "p50", "p90", "avg"].map(of);
        let summary = format!("min {min:.3}, p50 {p50:.3}, p90 {p90:.3}, avg {avg:.3}");
        Ok(Some(Balance { layers, summary }))
    }
}

/// Whether every layer has in force what was committed last.
pub(super) fn is_placed(control: &Control) -> Result<Option<()>> {
    Ok(placed(control)?.map(|_| ()))
}

/// Epoch and slots of each layer, if all are in force as they were asked for.
fn placed(control: &Control) -> Result<Option<Vec<(u64, usize)>>> {
    let (status, layers) = control.get(&format!("{GROUP}/placements"))?;
    if status != 200 {
        return Ok(None);
    }
    let Some(layers) = layers.as_array() else { bail!("control says {layers}") };
    let placed = layers.iter().map(|layer| {
        let in_force = &layer["in_force"];
        let slots = in_force["phy2log"].as_array()?.len();
        let as_asked = in_force["epoch"] == layer["asked"]["epoch"];
        as_asked.then_some((in_force["epoch"].as_u64()?, slots))
    });
    Ok(placed.collect())
}
