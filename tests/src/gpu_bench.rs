//! `gpu-bench`: the CUDA device on layers of public models, burst and sustained, beside the peer's
//! output of the same routing where that is given.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ::tests::random::Random;
use anyhow::{Context, Result, ensure};
use kernels::cuda::{CudaBench, CudaOptions, CudaTactic, default_cache};
use kernels::problem::{Form, LayerShape, Swiglu};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Number of the GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Models, of dsv3, qwen3-235b, dsv4-flash, mixtral.
    #[arg(long, value_delimiter = ',', default_value = "dsv3")]
    models: Vec<String>,
    /// Tokens.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64,256")]
    tokens: Vec<usize>,
    /// One tactic, streamed, narrow or wide, whatever the tokens.
    #[arg(long, value_parser = tactic)]
    tactic: Option<CudaTactic>,
    /// Folder of routings, raw i32 `[T, k]` in MODEL_TT.i32; seeded uniform ones otherwise.
    #[arg(long)]
    routing: Option<PathBuf>,
    /// Output of the peer for the same routings.
    #[arg(long)]
    peer: Option<PathBuf>,
}

fn tactic(name: &str) -> Result<CudaTactic, String> {
    CudaTactic::named(name).ok_or_else(|| {
        format!("expected one of {}", CudaTactic::ALL.map(CudaTactic::name).join(", "))
    })
}

/// Experts, top-k, hidden, intermediate.
const MODELS: [(&str, [u32; 4]); 4] = [
    ("dsv3", [256, 8, 7168, 2048]),
    ("qwen3-235b", [128, 8, 4096, 1536]),
    ("dsv4-flash", [256, 6, 4096, 2048]),
    ("mixtral", [8, 2, 4096, 14336]),
];

pub(crate) fn run(options: &Options) -> Result<()> {
    let peer = options.peer.as_deref().map(fs::read_to_string).transpose()?.unwrap_or_default();
    let mut out = io::stdout();
    writeln!(out, "whole layer, act=bf16; TB/s of the packed weights of the experts hit")?;
    for name in &options.models {
        let model = MODELS.iter().find(|(known, _)| known == name);
        let (_, [experts, top_k, hidden, intermediate]) =
            *model.with_context(|| format!("{name} is no model of this list"))?;
        let swiglu = Swiglu::default();
        let shape = LayerShape { experts, top_k, hidden, intermediate, swiglu };
        let cuda = CudaOptions::new(options.gpu, default_cache());
        let cuda = CudaOptions { tactic: options.tactic, ..cuda };
        let mut bench = CudaBench::new(&cuda, shape)?;
        for &tokens in &options.tokens {
            let ids = ids(options.routing.as_deref(), name, tokens, &shape)?;
            let timing = bench.time(&ids, top_k, Form::default())?;
            let hit: std::collections::BTreeSet<i32> = ids.iter().copied().collect();
            let weights = 3.0 * f64::from(hidden) * f64::from(intermediate) * 0.5625;
            let rate = |us: f64| hit.len() as f64 * weights / us / 1e6;
            let (burst, sustained) = (timing.burst_us, timing.sustained_us);
            write!(
                out,
                "{name:<11} T={tokens:<5} hit={:<4} burst {burst:>8.1} us {:.2} TB/s  \
                 sustained {sustained:>8.1} us {:.2} TB/s  host {:.1} us",
                hit.len(),
                rate(burst),
                rate(sustained),
                timing.host_us,
            )?;
            if let Some([peer_burst, peer_sustained]) = peer_times(&peer, name, tokens) {
                let (b, s) = (burst / peer_burst, sustained / peer_sustained);
                write!(
                    out,
                    "  peer {peer_burst:.1} / {peer_sustained:.1} us, ratio {b:.2} / {s:.2}"
                )?;
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

fn ids(folder: Option<&Path>, model: &str, tokens: usize, shape: &LayerShape) -> Result<Vec<i32>> {
    let (experts, top_k) = (shape.experts as usize, shape.top_k as usize);
    let Some(folder) = folder else {
        let mut random = Random::new(tokens as u64);
        let mut all: Vec<i32> = (0..i32::try_from(experts)?).collect();
        let token = |_| {
            random.shuffle(&mut all);
            all[..top_k].to_vec()
        };
        return Ok((0..tokens).flat_map(token).collect());
    };
    let path = folder.join(format!("{model}_T{tokens}.i32"));
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let ids: Vec<i32> = bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
    ensure!(ids.len() == tokens * top_k, "{} has {} ids", path.display(), ids.len());
    Ok(ids)
}

/// Burst and sustained microseconds of a line such as
/// `humming bf16 dsv3 T= 64 rows= 512 hit=222 burst= 1834.0 us sustained= 1999.0 us ...`.
fn peer_times(text: &str, model: &str, tokens: usize) -> Option<[f64; 2]> {
    let of = |line: &str| -> Option<[f64; 2]> {
        let field = |name: &str| {
            let rest = line.split_once(name)?.1.trim_start();
            rest.split_whitespace().next()?.parse::<f64>().ok()
        };
        let this = line.split_whitespace().any(|word| word == model);
        let same = (field("T=")? - tokens as f64).abs() < 0.5;
        (this && same).then_some([field("burst=")?, field("sustained=")?])
    };
    text.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_lines_are_read() {
        let text = "ceilings: x\nhumming bf16  dsv3        T=   64 rows=   512 hit=222 \
                    burst=  1834.0 us sustained=  1999.5 us   1 / 2 TFLOP/s\n";
        assert_eq!(peer_times(text, "dsv3", 64), Some([1834.0, 1999.5]));
        assert_eq!(peer_times(text, "dsv3", 8), None);
        assert_eq!(peer_times(text, "mixtral", 64), None);
    }
}
