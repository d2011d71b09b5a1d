//! Tactics that were measured: tables in files, used where they hold, and measured anew by `tune`.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::checkpoint::{Checkpoint, CheckpointError, MoeLayer};
use kernels::cpu::CpuDevice;
use kernels::cuda::CudaDevice;
use kernels::device::{
    CallError, CallOffsets, Device, DeviceError, LayerCall, LoadError, NoSuchTactic,
};
use kernels::memory::SharedMemory;
use kernels::problem::{ActFormat, Form, WeightsIn};
use kernels::tactics::{BY_TOKENS, Choice, Measurement, Problem, TacticTable};
use protocol::buffer::BufferLayout;
use protocol::{message, tactics as session};

use crate::config::{ConfigError, DeviceConfig, DeviceKind};
use crate::limits::{TOKENS_MAX, TUNE_RUNS, TUNE_SECONDS};
use crate::pulse::now_ms;

/// Why a table cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The file.
    #[error("cannot read {}", path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("{} is no table of tactics", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A tactic that the device does not have.
    #[error("{} cannot be used", path.display())]
    Tactic {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: NoSuchTactic,
    },
}

/// Which tactics a rank's calls get, and what it knows of them.
#[derive(Debug)]
pub(crate) struct Tuned {
    pub(crate) tactics: session::Tactics,
}

impl Tuned {
    /// Has a device use the table of a file, if there is one. One that was measured on another device, driver or kernel is said
    /// to be stale and not used: a worker serves on after an upgrade.
    pub(crate) fn new(
        device: &mut dyn Device,
        checkpoint: &Checkpoint,
        path: Option<&Path>,
    ) -> Result<Self, TableError> {
        let problems = problems_of(device, checkpoint).into_iter().map(|(_, p)| told_problem(&p));
        let provenance = device.provenance();
        let mut tactics = session::Tactics {
            provenance: session::Provenance {
                device: provenance.device.clone(),
                driver: provenance.driver.clone(),
                kernels: provenance.kernels.clone(),
            },
            problems: problems.collect(),
            candidates: device.tactics(),
            measurements: Vec::new(),
            chosen: Vec::new(),
        };
        let Some(path) = path else { return Ok(Self { tactics }) };
        let of = || path.to_owned();
        let text = fs::read(path).map_err(|source| TableError::Read { path: of(), source })?;
        let table: TacticTable = serde_json::from_slice(&text)
            .map_err(|source| TableError::Json { path: of(), source })?;
        if let Err(stale) = provenance.holds(&table.provenance) {
            let path = path.display();
            tracing::warn!(%path, %stale, "tactics are stale and not used: tune again");
            return Ok(Self { tactics });
        }
        let TacticTable { measured_ms, measurements, choices, .. } = table;
        device.choose(&choices).map_err(|source| TableError::Tactic { path: of(), source })?;
        let (path, count) = (path.display(), choices.len());
        tracing::info!(%path, choices = count, "tactics are used as measured");
        let told = |measured: &Measurement| session::Measurement {
            problem: told_problem(&measured.problem),
            tactic: measured.tactic.clone(),
            tokens: measured.tokens,
            runs: measured.runs,
            median_us: measured.median_us,
            p99_us: measured.p99_us,
            measured_ms,
        };
        tactics.measurements = measurements.iter().map(told).collect();
        let told = |choice: &Choice| session::Choice {
            problem: told_problem(&choice.problem),
            tokens: choice.tokens,
            tactic: choice.tactic.clone(),
        };
        tactics.chosen = choices.iter().map(told).collect();
        Ok(Self { tactics })
    }

    /// Has a device use what control has chosen.
    pub(crate) fn choose(&mut self, device: &mut dyn Device, choices: Vec<session::Choice>) {
        let here = choices.iter().map(|choice| Choice {
            problem: heard_problem(&choice.problem),
            tokens: choice.tokens,
            tactic: choice.tactic.clone(),
        });
        match device.choose(&here.collect::<Vec<_>>()) {
            Ok(()) => {
                tracing::info!(choices = choices.len(), "tactics are used as control has chosen");
                self.tactics.chosen = choices;
            }
            Err(error) => tracing::warn!(%error, "what control has chosen is not used"),
        }
    }
}

/// What the layers of a device are, each problem once with the position of a layer that it is.
fn problems_of(device: &dyn Device, checkpoint: &Checkpoint) -> Vec<(usize, Problem)> {
    let acts = [ActFormat::Bf16, ActFormat::Nvfp4];
    let acts = acts.into_iter().filter(|&act| checkpoint.check_act(act).is_ok());
    let mut found: Vec<(usize, Problem)> = Vec::new();
    for act in acts {
        for position in 0..checkpoint.layers().len() {
            let Some(problem) = device.problem(position, act) else { continue };
            // Layers that are alike take the same time.
            if !found.iter().any(|(_, known)| *known == problem) {
                found.push((position, problem));
            }
        }
    }
    found
}

fn told_problem(problem: &Problem) -> session::Problem {
    let Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act } = *problem;
    let act = match act {
        ActFormat::Bf16 => message::ActFormat::Bf16,
        ActFormat::Nvfp4 => message::ActFormat::Nvfp4,
    };
    session::Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act }
}

fn heard_problem(problem: &session::Problem) -> Problem {
    let session::Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act } =
        *problem;
    let act = match act {
        message::ActFormat::Bf16 => ActFormat::Bf16,
        message::ActFormat::Nvfp4 => ActFormat::Nvfp4,
    };
    Problem { experts, top_k, hidden, intermediate, ranks, slots_per_rank, act }
}

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Tune {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Where.
    pub device: DeviceConfig,
    /// Tokens of calls, the buckets of the table.
    pub tokens: Vec<u32>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// A setting that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint.
    #[error("the model at {} cannot be served", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// The device.
    #[error("the device cannot hold the model")]
    Load(#[from] LoadError),
    /// Memory of the calls.
    #[error(transparent)]
    Memory(#[from] DeviceError),
    /// A call that failed.
    #[error("a call of {tokens} tokens by {tactic} failed")]
    Call {
        /// The tactic.
        tactic: String,
        /// Tokens of the call.
        tokens: u32,
        /// Why.
        #[source]
        source: CallError,
    },
    /// A tactic of the device's own list that it refuses.
    #[error(transparent)]
    Tactic(#[from] NoSuchTactic),
}

impl Tune {
    /// Loads the model on a rank that is alone, and times calls of each of its problems by every tactic that can run them, with
    /// made-up tokens whose experts are chosen evenly.
    ///
    /// # Errors
    /// See [`TuneError`].
    pub fn run(&self) -> Result<TacticTable, TuneError> {
        let max_tokens = self.check()?;
        let path = &self.model;
        let checkpoint = Checkpoint::open(path)
            .map_err(|source| TuneError::Checkpoint { path: path.clone(), source })?;
        let mut device: Box<dyn Device> = match self.device.kind {
            DeviceKind::Cpu => {
                Box::new(CpuDevice::alone(self.device.cpu(1)?, &checkpoint, max_tokens)?)
            }
            DeviceKind::Cuda => Box::new(CudaDevice::alone(&self.device.cuda()?, &checkpoint)?),
        };
        let mut measurements = Vec::new();
        for (position, problem) in problems_of(&*device, &checkpoint) {
            for &tokens in &self.tokens {
                let calls = Calls::new(&checkpoint.layers()[position], problem, tokens)?;
                measurements.extend(calls.measure(&mut *device)?);
            }
        }
        Ok(TacticTable::fastest(device.provenance(), now_ms(), measurements))
    }

    /// The most tokens; refuses what no call may have, and a tactic that is pinned.
    fn check(&self) -> Result<u32, ConfigError> {
        let refused = |key, value: String, expected: &str| {
            Err(ConfigError::Value { key, value, expected: expected.to_owned() })
        };
        if let Some(tactic) = &self.device.tactic {
            return refused("device.tactic", tactic.clone(), "none where all are measured");
        }
        let ascending = self.tokens.is_sorted_by(|a, b| a < b);
        let (first, last) = (self.tokens.first(), self.tokens.last());
        match (first, last) {
            (Some(&first), Some(&last)) if ascending && first > 0 && last <= TOKENS_MAX => Ok(last),
            _ => {
                let expected = format!("ascending numbers from 1 to {TOKENS_MAX}");
                refused("tokens", format!("{:?}", self.tokens), &expected)
            }
        }
    }
}

/// Calls of one size of one layer.
struct Calls {
    layer: u32,
    problem: Problem,
    tokens: u32,
    buffer: SharedMemory,
    offsets: CallOffsets,
}

impl Calls {
    fn new(layer: &MoeLayer, problem: Problem, tokens: u32) -> Result<Self, DeviceError> {
        let layout = BufferLayout::new(tokens, problem.hidden);
        let buffer = SharedMemory::create("calls to be timed", layout.bytes)?;
        let BufferLayout { hidden, topk_ids, topk_weights, output, .. } = layout;
        let mut random = Random(u64::from(tokens));
        // bf16 of 0.5 to 1 and their negatives, without two alike: power depends on the bits.
        let values = u64::from(tokens) * u64::from(problem.hidden);
        let rows: Vec<u8> =
            (0..values).flat_map(|_| bf16_near_one(random.next()).to_le_bytes()).collect();
        buffer.write(hidden, &rows);
        let ids = (0..tokens).flat_map(|_| random.different(problem.top_k, problem.experts));
        let ids: Vec<u8> = ids.flat_map(u32::to_le_bytes).collect();
        buffer.write(topk_ids, &ids);
        let weight = 1.0 / problem.top_k as f32;
        buffer.write(topk_weights, &weight.to_le_bytes().repeat(ids.len() / size_of::<f32>()));
        let offsets = CallOffsets { hidden, topk_ids, topk_weights, output };
        Ok(Self { layer: layer.number, problem, tokens, buffer, offsets })
    }

    /// Times every tactic, all in turn so that none has the cooler machine.
    fn measure(&self, device: &mut dyn Device) -> Result<Vec<Measurement>, TuneError> {
        let mut times: Vec<(String, Vec<f32>)> =
            device.tactics().into_iter().map(|tactic| (tactic, Vec::new())).collect();
        let began = Instant::now();
        for run in 0..=TUNE_RUNS {
            for (tactic, times) in &mut times {
                let us = self.call(device, tactic)?;
                // The first call touches memory for the first time.
                if run > 0 {
                    times.push(us);
                }
            }
            if run > TUNE_RUNS_MIN && began.elapsed() > TUNE_SECONDS {
                break;
            }
        }
        device.choose(&[])?;
        Ok(times.into_iter().map(|(tactic, times)| self.summed(tactic, times)).collect())
    }

    fn call(&self, device: &mut dyn Device, tactic: &str) -> Result<f32, TuneError> {
        let Self { problem, tokens, .. } = *self;
        device.choose(&[Choice { problem, tokens, tactic: tactic.to_owned() }])?;
        let form = Form { act: problem.act, weights_in: WeightsIn::Fc1 };
        let call = LayerCall {
            layer: self.layer,
            tokens,
            top_k: problem.top_k,
            form,
            buffer: &self.buffer,
            offsets: self.offsets,
        };
        let began = Instant::now();
        let called = device.run(&call);
        let us = began.elapsed().as_secs_f32() * 1e6;
        let failed = |source| TuneError::Call { tactic: tactic.to_owned(), tokens, source };
        called.map_err(failed)?;
        Ok(us)
    }

    fn summed(&self, tactic: String, mut times: Vec<f32>) -> Measurement {
        times.sort_by(f32::total_cmp);
        let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1);
        let [median_us, p99_us] = [50, 99].map(|percent| at(percent).copied().unwrap_or(0.0));
        let runs = u32::try_from(times.len()).unwrap_or(u32::MAX);
        Measurement { problem: self.problem, tactic, tokens: self.tokens, runs, median_us, p99_us }
    }
}

/// Fewest calls of a tactic, however long they take.
const TUNE_RUNS_MIN: u32 = 5;

/// bf16 bits of a number from 0.5 to 1, or its negative.
fn bf16_near_one(bits: u64) -> u16 {
    let bits = u16::try_from(bits & 0xffff).unwrap_or(0);
    0x3f00 | bits & 0x807f
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// So many different numbers below `below`.
    fn different(&mut self, count: u32, below: u32) -> Vec<u32> {
        let mut found = Vec::with_capacity(count as usize);
        while found.len() < count.min(below) as usize {
            let next = u32::try_from(self.next() % u64::from(below.max(1))).unwrap_or(0);
            if !found.contains(&next) {
                found.push(next);
            }
        }
        found
    }
}

/// A table as people read it: for each size every tactic, fastest first, beside the device's own choice.
#[derive(Debug)]
pub struct Shown<'a>(pub &'a TacticTable);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TacticTable { provenance, measurements, choices, .. } = self.0;
        writeln!(
            f,
            "{}, {}, kernels {}",
            provenance.device, provenance.driver, provenance.kernels
        )?;
        for Choice { problem, tokens, .. } in choices {
            let Problem { experts, top_k, hidden, intermediate, act, .. } = problem;
            writeln!(
                f,
                "{experts} experts, top-{top_k}, {hidden} x {intermediate}, act={act}, {tokens} tokens"
            )?;
            let of = |m: &&Measurement| (m.problem, m.tokens) == (*problem, *tokens);
            let mut all: Vec<&Measurement> = measurements.iter().filter(of).collect();
            all.sort_by(|a, b| a.median_us.total_cmp(&b.median_us));
            let own = all.iter().find(|m| m.tactic == BY_TOKENS).map_or(0.0, |m| m.median_us);
            for measured in all {
                let Measurement { tactic, median_us, p99_us, runs, .. } = measured;
                let ratio = median_us / own;
                writeln!(
                    f,
                    "  {tactic:<16} {median_us:>10.1} us {ratio:>6.2}x  p99 {p99_us:.1}  ({runs} calls)"
                )?;
            }
        }
        Ok(())
    }
}
