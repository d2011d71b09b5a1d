//! Kills control in the midst of migrations, while engines go on: no wrong answer, nothing that was committed is lost, and what
//! was committed last comes to be in force.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::invariants;
use crate::moving::{Moving, Traffic};
use crate::random::Random;
use crate::worker_process::until;

/// A kill comes within this of a commit: in it a layer is copied, ready and in force.
const LATEST_US: usize = 300_000;

/// What came of one kill.
#[derive(Debug, Clone)]
pub struct ControlKill {
    /// What was on its way when control was killed, by step; empty where nothing was any more.
    pub step: String,
    /// Whether what was committed had been answered.
    pub answered: bool,
    /// Steps of the engines from the commit until all was in force.
    pub steps: usize,
    /// From the restart until all was in force.
    pub settled: Duration,
}

/// Kills control once, at a moment that `random` decides.
pub fn kill(moving: &mut Moving, random: &mut Random) -> Result<ControlKill> {
    let before = moving.placements("asked")?;
    let layers_at_once = 1 + random.below(4);
    // A rank's slots of a layer are less than a megabyte.
    let bytes_per_second = [500_000_000, 3_000_000][random.below(2)];
    let pace = json!({ "layers_at_once": layers_at_once, "bytes_per_second": bytes_per_second });
    moving.set_pace(&pace)?;
    let turned = moving.turned(1 + random.below(3))?;
    let after = Duration::from_micros(random.below(LATEST_US) as u64);
    let away = Duration::from_micros(random.below(LATEST_US) as u64);
    // In one of three a kill may come before the answer.
    let waits = random.below(3) > 0;
    let stop = AtomicBool::new(false);
    let first = moving.traffic.steps;
    let mut traffic = std::mem::take(&mut moving.traffic);
    let moving_now = &mut *moving;
    let ended = thread::scope(|scope| {
        let calls = scope.spawn(|| call_until(&mut traffic, &stop));
        let ended = killed(moving_now, &turned, (waits, after, away));
        stop.store(true, Ordering::Release);
        let called = calls.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        called.context("while control was killed").and(ended)
    });
    moving.traffic = traffic;
    let (step, answered, settled) = ended?;
    let (asked, in_force) = (moving.placements("asked")?, moving.placements("in_force")?);
    let epochs = |placements: &[(u64, Vec<i64>)]| {
        (0..).zip(placements).map(|(layer, (epoch, _))| (layer, *epoch)).collect()
    };
    invariants::is_in_force(&epochs(&asked), &epochs(&in_force), "the group")?;
    ensure!(asked == in_force, "{asked:?} was committed last, {in_force:?} is in force");
    for (layer, ((now, slots), (epoch, old))) in asked.iter().zip(&before).enumerate() {
        let new = *now == epoch + 1 && *slots == turned[layer];
        let same = now == epoch && slots == old;
        ensure!(new || same && !answered, "layer {layer}: epoch {epoch} became {now}, {slots:?}");
    }
    let all = asked.iter().zip(&before).filter(|((now, _), (epoch, _))| now > epoch).count();
    ensure!(all == 0 || all == asked.len(), "{all} layers of {} were committed", asked.len());
    moving.traffic.step()?;
    Ok(ControlKill { step, answered, steps: moving.traffic.steps - first, settled })
}

/// Commits, kills control, starts it again, and waits for what was committed last; the step of the first layer on its way, whether
/// the commit was answered, and how long it took from the restart on.
fn killed(
    moving: &mut Moving,
    turned: &[Vec<i64>],
    (waits, after, away): (bool, Duration, Duration),
) -> Result<(String, bool, Duration)> {
    let (step, answered) = if waits {
        moving.commit(turned)?;
        thread::sleep(after);
        let migration = moving.migration()?;
        moving.control.signal(Signal::KILL)?;
        let step = migration["layers"][0]["step"].as_str().unwrap_or_default();
        (step.to_owned(), true)
    } else {
        let moving = &*moving;
        thread::scope(|scope| {
            let commit = scope.spawn(|| moving.commit(turned));
            // A commit takes some milliseconds.
            thread::sleep(after / 30);
            moving.control.signal(Signal::KILL)?;
            let answered = commit.join().is_ok_and(|answer| answer.is_ok());
            anyhow::Ok(("commit".to_owned(), answered))
        })?
    };
    moving.control.wait()?;
    thread::sleep(away);
    let began = Instant::now();
    moving.control.restart(&[])?;
    until("what was committed last in force", || {
        let migration = moving.migration()?;
        let quiet = migration["problem"].is_null() && migration["layers"] == json!([]);
        Ok(quiet.then_some(()))
    })?;
    Ok((step, answered, began.elapsed()))
}

fn call_until(traffic: &mut Traffic, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Acquire) {
        traffic.step()?;
    }
    Ok(())
}
