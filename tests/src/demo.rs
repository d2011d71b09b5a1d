//! `demo`: control and four workers on the small trained checkpoint, and four engines that replay real
//! activations and verify every answer.

mod play;
mod rebalance;
mod system;
mod table;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use reference::layer::Variant;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tests::replay::{LayerReport, Replay, TOKENS_MAX};

use self::system::System;

/// What was played in one form of activations, by layer.
type Played = (Variant, Vec<LayerReport>);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with model-nvfp4/ and recorded.safetensors, of the form of tests/data/tiny-kjv-moe.
    dir: PathBuf,
    /// Seconds of replay, half of them for each activation format; half as many again while experts move, and after.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Ends after the replay; otherwise everything stays up until Ctrl-C.
    #[arg(long)]
    once: bool,
    /// One worker that is alone, without control.
    #[arg(long)]
    alone: bool,
    /// What computes: cpu or, alone, cuda.
    #[arg(long, default_value = "cpu")]
    device: String,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { seconds, once, .. } = *options;
    ensure!(seconds > 0.0 && seconds.is_finite(), "--seconds is {seconds}, expected more than 0");
    let mut out = io::stdout();
    let (signals, signalled) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        pipe::register(signal, signals.try_clone()?)?;
    }
    let model = options.dir.join("model-nvfp4");
    let system = match options.alone {
        true => System::alone(&model, &options.device)?,
        false => System::with_control(&model, &options.device)?,
    };
    system.introduce(&mut out)?;
    let mut played = Vec::new();
    for variant in [false, true].map(|nvfp4| Variant { nvfp4, weights_in_combine: false }) {
        let replay = Replay::open(&options.dir, variant)?;
        let engines = system.engines(variant, TOKENS_MAX)?;
        played.push((variant, play::play(engines, &replay, seconds / 2.0, &mut out)?));
    }
    let balance = system.balance(&played)?;
    let replay = Replay::open(&options.dir, played[0].0)?;
    let more = rebalance::rebalance(&system, &replay, &played[0].1, seconds / 4.0, &mut out)?;
    played.extend(more);
    table::write(&played, balance.as_ref(), &mut out)?;
    if !once {
        writeln!(out, "all stays up until Ctrl-C")?;
        out.flush()?;
        (&signalled).read_exact(&mut [0])?;
    }
    Ok(())
}
