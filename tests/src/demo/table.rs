//! What was played, layer by layer.

use std::io::Write;

use anyhow::{Result, ensure};
use tests::replay::LayerReport;
use tests::times::percentile;

use super::Played;
use super::system::Balance;

pub(super) fn write(
    played: &[Played],
    balance: Option<&Balance>,
    out: &mut impl Write,
) -> Result<()> {
    writeln!(
        out,
        "act    layer    calls    tokens  p50 us  p99 us  rows verified  worst relative error"
    )?;
    let mut total = 0;
    for (variant, layers) in played {
        for LayerReport { number, calls, verified, worst } in layers {
            let [p50, p99] = [50, 99].map(|percent| percentile(&calls.times, percent).as_micros());
            let (act, count) = (variant.act(), calls.times.len());
            let of = if variant.nvfp4 { "block" } else { "row" };
            writeln!(
                out,
                "{act:<5} {number:>6} {count:>8} {:>9} {p50:>7} {p99:>7} {verified:>14}  {worst:.2e} of a {of}",
                calls.tokens
            )?;
            ensure!(*verified > 0, "no row of layer {number} was verified");
            total += count;
        }
    }
    if let Some(Balance { layers, summary }) = balance {
        for (layer, ratio) in layers {
            writeln!(out, "layer {layer}: the busiest rank has {ratio:.3} times the mean rows")?;
        }
        writeln!(out, "balancedness over layers: {summary}")?;
    }
    writeln!(out, "{total} calls verified, 0 wrong")?;
    Ok(())
}
