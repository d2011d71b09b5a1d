//! `fleet`: control under a fleet of ranks that only speak with it, on the real wire, with windows of
//! made-up load; and beside it, requests of operators.

use std::fs;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use protocol::message::Phase;
use protocol::session::{
    EngineState, FromControl, FromWorker, Heartbeat, LayerWindow, Register, Window,
};
use tests::control_process::Control;
use tests::fake_worker::{FakeWorker, register};
use tests::group::together;
use tests::random::Random;
use tests::resident::Resident;
use tests::times::percentile;
use tests::worker_process::until;

/// Time between heartbeats, as control has it by default.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Length of a window, as control has it by default.
const WINDOW_MS: u64 = 10_000;
/// Those who ask at once.
const CALLERS: u32 = 8;
/// Ticks of the system's clock of processes in a second.
const TICKS: f64 = 100.0;
/// Reads that a page of the UI makes, one after the other.
const READS: [&str; 8] = [
    "/api/v1/workers?limit=100",
    "/api/v1/groups",
    "/api/v1/groups/fleet/balancedness",
    "/api/v1/groups/fleet/placements/7",
    "/api/v1/groups/fleet/windows?newest_first=true&limit=122",
    "/api/v1/groups/fleet/layers",
    "/metrics",
    "/readyz",
];
/// What has nothing to read but the token.
const TRIVIAL: &str = "/api/v1/tokens/self";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Ranks of the group.
    #[arg(long, default_value_t = 72)]
    ranks: u32,
    /// Layers of the model.
    #[arg(long, default_value_t = 61)]
    layers: u32,
    /// Experts of a layer.
    #[arg(long, default_value_t = 256)]
    experts: u32,
    /// Slots of a rank and layer.
    #[arg(long, default_value_t = 4)]
    slots_per_rank: u32,
    /// Seconds of measurement.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Requests in a second, half as many again of the trivial one beside them.
    #[arg(long, default_value_t = 200)]
    requests: u32,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { ranks, layers, experts, slots_per_rank, seconds, requests } = *options;
    ensure!(ranks > 0 && layers > 0 && experts > 0 && seconds > 0 && requests > 0, "nothing to do");
    let mut out = io::stdout();
    let control = Control::start_with(&[])?;
    writeln!(out, "control: http://{}, pid {}", control.address(), control.pid())?;
    let fleet = &Fleet {
        options,
        control: &control,
        ends: AtomicBool::new(false),
        told: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || fleet.rank(rank))).collect();
        let measured = fleet.measure(&mut out);
        fleet.ends.store(true, Ordering::Release);
        for rank in ranks {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        measured
    })?;
    writeln!(
        out,
        "{ranks} ranks x {layers} layers x {} slots, {} windows told",
        slots_per_rank * ranks,
        fleet.told.load(Ordering::Relaxed)
    )?;
    Ok(())
}

struct Fleet<'a> {
    options: &'a Options,
    control: &'a Control,
    ends: AtomicBool,
    /// Windows that control has kept.
    told: AtomicU64,
}

impl Fleet<'_> {
    /// One rank's life.
    fn rank(&self, rank: u32) -> Result<()> {
        let Options { ranks, layers, experts, slots_per_rank, .. } = *self.options;
        let registered = Register {
            slots_per_rank,
            asks: true,
            stages: false,
            ..register(("fleet", rank, ranks), layers, experts)
        };
        let (mut worker, _) = FakeWorker::dial(self.control, registered)?;
        match worker.hear()? {
            FromControl::Place { layers } => worker.say(&FromWorker::Holds { layers })?,
            other => bail!("control said {other:?}, expected a placement"),
        }
        let mut random = Random::new(rank.into());
        let (mut calls, mut beat, mut number) = (0, Instant::now(), 0);
        let mut window = next_window()?;
        while !self.ends.load(Ordering::Acquire) {
            let now = Instant::now();
            if now >= beat {
                let (engine, refused) = (EngineState::Attached, 0);
                let refusals = Default::default();
                worker.say(&FromWorker::Heartbeat(Heartbeat {
                    engine,
                    calls,
                    refused,
                    refusals,
                }))?;
                beat += HEARTBEAT;
            }
            if now >= window.1 {
                number += 1;
                let layers = self.load(&mut random);
                calls += layers.iter().map(|layer| layer.calls).sum::<u64>();
                let (end_ms, closed_by) = (window.0, None);
                let start_ms = end_ms - WINDOW_MS;
                let told = Window { number, start_ms, end_ms, closed_by, layers };
                worker.say(&FromWorker::Window(told))?;
                window = next_window()?;
            }
            let wait = beat.min(window.1).saturating_duration_since(Instant::now());
            match worker.hear_within(wait.min(Duration::from_millis(200)))? {
                Some(FromControl::Kept { .. }) => {
                    self.told.fetch_add(1, Ordering::Relaxed);
                }
                Some(FromControl::Refused { reason }) => bail!("control refuses: {reason}"),
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    /// A window of load: few experts have most of it.
    fn load(&self, random: &mut Random) -> Vec<LayerWindow> {
        let Options { layers, experts, .. } = *self.options;
        let phases = [Phase::Prefill, Phase::Decode];
        let both = (0..layers).flat_map(|layer| phases.map(|phase| (layer, phase)));
        let window = |(layer, phase)| {
            let rows = |expert: u32| 40_000 / u64::from(1 + (expert * 37 + layer * 11) % experts);
            let expert_tokens: Vec<u64> =
                (0..experts).map(|expert| rows(expert) + random.below(64) as u64).collect();
            LayerWindow {
                layer,
                phase,
                calls: 400,
                tokens: expert_tokens.iter().sum::<u64>() / 8,
                distinct_experts: 400 * 60,
                expert_tokens,
                latency_us_p50: 80,
                latency_us_p99: 200,
            }
        };
        both.map(window).collect()
    }

    /// What control costs, and how soon it answers, with the whole fleet there.
    fn measure(&self, out: &mut impl Write) -> Result<()> {
        let Options { seconds, requests, .. } = *self.options;
        until("the whole fleet", || Ok((self.control.get("/readyz")?.0 == 200).then_some(())))?;
        writeln!(out, "the whole fleet is there")?;
        let (began, ticks) = (Instant::now(), ticks(self.control.pid())?);
        let ends = began + Duration::from_secs(seconds);
        let pause = Duration::from_secs(1) * CALLERS / requests;
        let asked: Result<Vec<Asked>> =
            together(0..CALLERS, |caller| self.ask(caller, pause, ends)).into_iter().collect();
        let (passed, spent) = (began.elapsed(), self::ticks(self.control.pid())? - ticks);
        let resident = Resident::of(self.control.pid())?;
        let mut all = Asked::default();
        asked?.into_iter().for_each(|one| all.add(one));
        let cores = spent / TICKS / passed.as_secs_f64();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(
            out,
            "{cores:.2} cores, {:.0} MiB resident now, {:.0} MiB at most, over {:.0} s",
            mib(resident.held()),
            mib(resident.peak),
            passed.as_secs_f64()
        )?;
        let rate = all.reads.iter().map(|(_, times)| times.len()).sum::<usize>() as f64;
        writeln!(out, "{:.0} requests/s      p50 ms   p99 ms", rate / passed.as_secs_f64())?;
        let ms = |times: &[Duration], percent| percentile(times, percent).as_secs_f64() * 1e3;
        let mut together = Vec::new();
        for (path, times) in &all.reads {
            writeln!(out, "{path:<58} {:>8.2} {:>8.2}", ms(times, 50), ms(times, 99))?;
            together.extend(times.iter().copied());
        }
        let (own, trivial) = (ms(&together, 99), ms(&all.trivial, 99));
        writeln!(out, "{:<58} {:>8.2} {own:>8.2}", "all of them", ms(&together, 50))?;
        writeln!(out, "{TRIVIAL:<58} {:>8.2} {trivial:>8.2}", ms(&all.trivial, 50))?;
        writeln!(out, "p99 beside the trivial one's: {:.1} times", own / trivial)?;
        Ok(())
    }

    /// One caller: a read, every other time a trivial one, at an even pace.
    fn ask(&self, caller: u32, pause: Duration, ends: Instant) -> Result<Asked> {
        let client = self.control.client()?;
        let mut asked = Asked::default();
        let mut next = Instant::now() + pause * caller / CALLERS;
        let mut turn = caller as usize;
        while next < ends {
            thread::sleep(next.saturating_duration_since(Instant::now()));
            next += pause;
            let path = READS[turn % READS.len()];
            let time = client.time(path)?;
            asked.of(path).push(time);
            if turn.is_multiple_of(2) {
                asked.trivial.push(client.time(TRIVIAL)?);
            }
            turn += 1;
        }
        Ok(asked)
    }
}

/// How long answers took.
#[derive(Debug, Default)]
struct Asked {
    reads: Vec<(&'static str, Vec<Duration>)>,
    trivial: Vec<Duration>,
}

impl Asked {
    fn of(&mut self, path: &'static str) -> &mut Vec<Duration> {
        let at = self.reads.iter().position(|(known, _)| *known == path).unwrap_or_else(|| {
            self.reads.push((path, Vec::new()));
            self.reads.len() - 1
        });
        &mut self.reads[at].1
    }

    fn add(&mut self, other: Self) {
        for (path, times) in other.reads {
            self.of(path).extend(times);
        }
        self.trivial.extend(other.trivial);
    }
}

/// The next multiple of a window's length that the clock shows, and when that is.
fn next_window() -> Result<(u64, Instant)> {
    let now_ms = u64::try_from(UNIX_EPOCH.elapsed()?.as_millis())?;
    let end_ms = (now_ms / WINDOW_MS + 1) * WINDOW_MS;
    Ok((end_ms, Instant::now() + Duration::from_millis(end_ms - now_ms)))
}

/// Ticks that a process has spent, in its own code and in the system's.
fn ticks(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let after_name = text.rsplit_once(')').context("no name")?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let field =
        |at: usize| -> Result<f64> { Ok(fields.get(at).context("too few fields")?.parse()?) };
    // The 14th and 15th of the line; the name was the second.
    Ok(field(11)? + field(12)?)
}
