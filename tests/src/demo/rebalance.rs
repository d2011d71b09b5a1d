//! The end of the demonstration: a policy proposes by what was counted, the proposal is approved, and experts move while the
//! engines go on.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::control_process::Control;
use tests::replay::{LayerReport, Replay, TOKENS_MAX};
use tests::times::percentile;
use tests::worker_process::until;

use super::system::{GROUP, System, is_placed};
use super::{Played, play};

/// What is asked: as even as it gets, whatever it moves.
const POLICY: &str = "deepseek_eplb";

/// Busiest rank beside the mean that the worst layer may have afterwards, on the traffic that was planned for.
const WORST_MAX: f64 = 1.06;

/// Proposes, approves, and plays on; `quiet` is what was played before in the same form. Answers are verified throughout.
pub(super) fn rebalance(
    system: &System,
    replay: &Replay,
    quiet: &[LayerReport],
    seconds: f64,
    out: &mut impl Write,
) -> Result<Vec<Played>> {
    let System::Whole { control, .. } = system else { return Ok(Vec::new()) };
    let variant = replay.variant();
    let body = json!({ "ask": { "policy": POLICY } });
    // What was counted is asked about once every rank has had the time to tell its part.
    let (status, proposal) = until("a proposal", || {
        let answer = control.post(&format!("{GROUP}/proposals"), &body)?;
        Ok((answer.1["code"] != "policy_declined").then_some(answer))
    })?;
    if proposal["code"] == "policy_absent" {
        writeln!(
            out,
            "no policies here (cargo xtask policies builds them): nothing is rebalanced"
        )?;
        return Ok(Vec::new());
    }
    ensure!(status == 200, "{proposal}");
    let id = proposal["id"].as_str().context("no name")?;
    let [moved, bytes] = ["moved", "bytes"].map(|key| proposal[key].as_u64().unwrap_or(0));
    writeln!(out, "{POLICY} proposes {moved} moves, {:.1} MB", bytes as f64 / 1e6)?;
    let worst_before = worst(control, 0)?;
    let (status, approved) =
        control.post(&format!("/api/v1/proposals/{id}/approve"), &json!({}))?;
    ensure!(status == 200, "{approved}");
    let engines = || system.engines(variant, TOKENS_MAX);
    let moving = play::play(engines()?, replay, seconds, out)?;
    until("the proposal in force", || is_placed(control))?;
    let since_ms = close(control)?;
    let after = play::play(engines()?, replay, seconds, out)?;
    close(control)?;
    let worst_after = worst(control, since_ms)?;
    let p99 = |layers: &[LayerReport]| {
        let times = layers.iter().flat_map(|layer| layer.calls.times.iter().copied());
        percentile(&times.collect::<Vec<_>>(), 99).as_micros()
    };
    writeln!(
        out,
        "the worst layer's busiest rank had {worst_before:.3} times the mean rows and has {worst_after:.3}"
    )?;
    writeln!(
        out,
        "p99 of a call: {} us before, {} us while experts moved, {} us after",
        p99(quiet),
        p99(&moving),
        p99(&after)
    )?;
    ensure!(
        worst_after <= WORST_MAX,
        "the worst layer has {worst_after:.3} after the migration, expected at most {WORST_MAX}"
    );
    Ok(vec![(variant, moving), (variant, after)])
}

/// Closes the open windows; when.
fn close(control: &Control) -> Result<u64> {
    let (status, closed) = control.post(&format!("{GROUP}/windows"), &json!({}))?;
    ensure!(status == 200 && closed["missing"] == json!([]), "{closed}");
    closed["end_ms"].as_u64().with_context(|| format!("control says {closed}"))
}

/// Rows of the busiest rank of the worst layer beside the mean, of all that was counted since.
fn worst(control: &Control, after_ms: u64) -> Result<f64> {
    let (_, balance) = control.get(&format!("{GROUP}/balancedness?after_ms={after_ms}"))?;
    let layers = balance["layers"].as_array().context("no layers")?;
    let ratios = layers.iter().filter_map(|layer: &Value| layer["max_over_mean"].as_f64());
    ratios.reduce(f64::max).with_context(|| format!("control says {balance}"))
}
