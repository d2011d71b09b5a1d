//! Engines that play a replay together, with a line of progress.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use protocol::client::Engine;
use reference::layer::Variant;
use tests::replay::{LayerReport, Replay, Steps};
use tests::times::percentile;

/// Time between two lines.
const PROGRESS: Duration = Duration::from_secs(1);
/// Between two looks whether it is time.
const TICK: Duration = Duration::from_millis(50);

/// Plays for so long; what all engines together did, by layer.
pub(super) fn play(
    engines: Vec<Engine>,
    replay: &Replay,
    seconds: f64,
    out: &mut impl Write,
) -> Result<Vec<LayerReport>> {
    let stage = Stage {
        meet: Barrier::new(engines.len()),
        ends: AtomicBool::new(false),
        until: Instant::now() + Duration::from_secs_f64(seconds),
        done: Mutex::new(Steps::default()),
    };
    let mut progress = Progress::new(replay.variant(), engines.len());
    let parts: Vec<Result<Vec<LayerReport>>> = thread::scope(|scope| {
        let part = |(rank, engine)| {
            let (stage, replay) = (&stage, replay.part(rank));
            scope.spawn(move || stage.part(engine, replay).with_context(|| format!("rank {rank}")))
        };
        let threads: Vec<_> = engines.into_iter().enumerate().map(part).collect();
        while !threads.iter().all(|thread| thread.is_finished()) {
            thread::sleep(TICK);
            progress.show(&stage.done, out)?;
        }
        let ends = threads.into_iter().map(|thread| thread.join());
        let parts = ends.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        anyhow::Ok(parts.collect())
    })?;
    progress.end(out)?;
    let mut all: Vec<LayerReport> = Vec::new();
    for part in parts {
        for report in part? {
            match all.iter_mut().find(|known| known.number == report.number) {
                Some(known) => known.add(report),
                None => all.push(report),
            }
        }
    }
    Ok(all)
}

/// Where engines meet.
struct Stage {
    meet: Barrier,
    /// Whether the round that begins is none any more.
    ends: AtomicBool,
    until: Instant,
    /// What was done since the last line.
    done: Mutex<Steps>,
}

impl Stage {
    /// One engine's part. All make the same steps, since their calls are calls of all: they agree on each
    /// round, and one that fails ends it for all.
    fn part(&self, mut engine: Engine, mut replay: Replay) -> Result<Vec<LayerReport>> {
        loop {
            if self.meet.wait().is_leader() && Instant::now() >= self.until {
                self.ends.store(true, Ordering::Release);
            }
            self.meet.wait();
            if self.ends.load(Ordering::Acquire) {
                return replay.finish();
            }
            match replay.round(&mut engine) {
                Ok(steps) => {
                    self.done.lock().unwrap_or_else(PoisonError::into_inner).add(steps);
                }
                Err(error) => {
                    // The others see it when they meet again, or hear of it from their workers.
                    self.ends.store(true, Ordering::Release);
                    self.meet.wait();
                    self.meet.wait();
                    return Err(error);
                }
            }
        }
    }
}

/// The live line.
struct Progress {
    variant: Variant,
    engines: usize,
    shown: Instant,
    verified: usize,
    on_terminal: bool,
}

impl Progress {
    fn new(variant: Variant, engines: usize) -> Self {
        let on_terminal = io::stdout().is_terminal();
        Self { variant, engines, shown: Instant::now(), verified: 0, on_terminal }
    }

    fn show(&mut self, done: &Mutex<Steps>, out: &mut impl Write) -> Result<()> {
        let passed = self.shown.elapsed();
        if passed < PROGRESS {
            return Ok(());
        }
        let done = std::mem::take(&mut *done.lock().unwrap_or_else(PoisonError::into_inner));
        self.verified += done.times.len();
        let rate = |count: usize| count as f64 / passed.as_secs_f64();
        let [p50, p99] = [50, 99].map(|percent| percentile(&done.times, percent).as_micros());
        let line = format!(
            "act={:<5} {} engines {:>7.0} calls/s {:>8.0} tokens/s  p50 {p50:>6} us  p99 {p99:>6} us  \
             {:>8} calls verified",
            self.variant.act(),
            self.engines,
            rate(done.times.len()),
            rate(done.tokens),
            self.verified,
        );
        let (before, after) = if self.on_terminal { ("\r", "") } else { ("", "\n") };
        write!(out, "{before}{line}{after}")?;
        out.flush()?;
        self.shown = Instant::now();
        Ok(())
    }

    fn end(&self, out: &mut impl Write) -> Result<()> {
        if self.on_terminal {
            writeln!(out)?;
        }
        Ok(())
    }
}
