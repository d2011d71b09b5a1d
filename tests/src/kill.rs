//! Kills a rank of a group in the midst of calls, and checks what everybody hears: no wrong answer, the
//! others the victim's name, right answers without it where its experts are elsewhere, too, and all of them right answers
//! once it is back.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protocol::client::{ClientError, Engine};
use protocol::message::Phase;
use protocol::refusal::Refusal;
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant};
use rustix::process::Signal;

use crate::call::through;
use crate::case::Case;
use crate::group::{Group, Spec, call_all, together, uneven};
use crate::worker_process::{Worker, until};

/// A group under way: engines that make two steps by turns, so that what one left in memory is no
/// answer to the next.
#[derive(Debug)]
pub struct Target {
    group: Group,
    engines: Vec<Engine>,
    steps: [Step; 2],
    variant: Variant,
    shares: Vec<Range<usize>>,
    /// Open files of each worker at the start.
    descriptors: Vec<usize>,
    /// The newest generation that was heard of.
    generation: u32,
}

/// What all engines call together, and the answer.
#[derive(Debug)]
struct Step {
    inputs: Inputs,
    expected: Vec<u16>,
}

/// What came of one kill.
#[derive(Debug, Clone)]
pub struct Kill {
    /// The rank.
    pub victim: usize,
    /// Right answers of all engines before it.
    pub answers: usize,
    /// What of the victim the others awaited.
    pub phases: Vec<String>,
    /// From the kill to the last engine's error.
    pub named: Duration,
    /// From then to right answers of all others; none where calls need experts that only the victim has.
    pub without: Option<Duration>,
    /// From the restart to a right answer of all.
    pub served: Duration,
}

/// How an engine's calls came to an end.
struct Ended {
    answers: usize,
    error: ClientError,
    at: Instant,
}

impl Target {
    /// Starts a group on a case of at least twice `tokens`; so many are a step.
    pub fn start(case: &Path, spec: &Spec, variant: Variant, tokens: usize) -> Result<Self> {
        let steps = steps(case, variant, tokens)?;
        let group = Group::start(case, spec)?;
        let engines = group.engines(variant, tokens)?;
        let descriptors = group.workers.iter().map(descriptors).collect::<Result<_>>()?;
        let shares = uneven(tokens, group.workers.len());
        Ok(Self { group, engines, steps, variant, shares, descriptors, generation: 0 })
    }

    /// Kills a rank after engines have called for a while, has the others call without it, and starts it again.
    pub fn kill(&mut self, victim: usize, after: Duration) -> Result<Kill> {
        let mut kill = self.lose(victim, after)?;
        let began = Instant::now();
        if self.serves_without(victim).context("without the victim")? {
            kill.without = Some(began.elapsed());
        }
        let began = Instant::now();
        self.group.restart(victim)?;
        let tokens = self.steps[0].inputs.tokens();
        self.engines[victim] = self.group.workers[victim].engine(self.variant, tokens)?;
        self.serves().context("after the restart")?;
        kill.served = began.elapsed();
        Ok(kill)
    }

    fn lose(&mut self, victim: usize, after: Duration) -> Result<Kill> {
        let logged = self.given_up();
        let (began, ended) = self.call_until_killed(victim, after)?;
        let mut kill = Kill {
            victim,
            answers: ended.iter().map(|ended| ended.answers).sum(),
            phases: Vec::new(),
            named: Duration::ZERO,
            without: None,
            served: Duration::ZERO,
        };
        let mut newest = self.generation;
        for (rank, Ended { error, at, .. }) in ended.into_iter().enumerate() {
            match error {
                ClientError::Closed { .. } | ClientError::Io(_) if rank == victim => {}
                ClientError::Refused(Refusal::Group {
                    rank: lost,
                    phase,
                    layer: 0,
                    generation,
                    reason,
                }) if rank != victim => {
                    let named = reason.contains(&format!("rank {victim} was lost"));
                    ensure!(lost as usize == victim && named, "rank {rank} heard: {reason}");
                    ensure!(generation > self.generation, "generation {generation} is not new");
                    newest = newest.max(generation);
                    kill.phases.push(phase);
                    kill.named = kill.named.max(at.saturating_duration_since(began));
                }
                error => bail!("rank {victim} was killed, rank {rank} heard: {error}"),
            }
        }
        self.generation = newest;
        // The victim's log goes with it.
        for (rank, (before, now)) in logged.into_iter().zip(self.given_up()).enumerate() {
            let lines = now.saturating_sub(before);
            ensure!(rank == victim || lines == 1, "rank {rank} logged it {lines} times");
        }
        Ok(kill)
    }

    /// Both steps, by the others: every answer must be right, and one that there cannot be must say so. Whether all were
    /// answered.
    fn serves_without(&mut self, victim: usize) -> Result<bool> {
        let others = self.engines.iter_mut().enumerate().filter(|(rank, _)| *rank != victim);
        let mut others: Vec<_> = others.collect();
        let mut all = true;
        for Step { inputs, expected } in &self.steps {
            let shares = uneven(inputs.tokens(), others.len());
            let answers = together(others.iter_mut().zip(&shares), |((_, engine), share)| {
                through(engine, 0, Phase::Decode, &inputs.rows(share.clone()))
            });
            for (answer, share) in answers.into_iter().zip(shares) {
                let expected = &expected[share.start * inputs.hidden..share.end * inputs.hidden];
                match answer {
                    Ok(output) => ensure!(output == expected, "a wrong answer"),
                    Err(ClientError::Refused(Refusal::Unavailable { lost, .. })) => {
                        ensure!(lost[..] == [u32::try_from(victim)?], "{lost:?} are lost");
                        all = false;
                    }
                    Err(error) => bail!(error),
                }
            }
        }
        Ok(all)
    }

    /// What each engine got, and when the kill was.
    fn call_until_killed(
        &mut self,
        victim: usize,
        after: Duration,
    ) -> Result<(Instant, Vec<Ended>)> {
        let Self { group, engines, steps, shares, .. } = self;
        let steps = &*steps;
        let (began, ended) = thread::scope(|scope| {
            let calls: Vec<_> = engines
                .iter_mut()
                .zip(&*shares)
                .map(|(engine, rows)| scope.spawn(move || call_until_error(engine, steps, rows)))
                .collect();
            thread::sleep(after);
            let began = Instant::now();
            let killed = group.workers[victim].signal(Signal::KILL);
            let ended: Vec<_> = calls.into_iter().map(|call| call.join()).collect();
            killed.map(|()| (began, ended))
        })?;
        group.workers[victim].wait()?;
        let ended = ended
            .into_iter()
            .map(|call| call.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        Ok((began, ended.collect::<Result<_>>()?))
    }

    /// Both steps, which must be right.
    fn serves(&mut self) -> Result<()> {
        for Step { inputs, expected } in &self.steps {
            let output = call_all(&mut self.engines, 0, inputs, &self.shares)?;
            ensure!(output == *expected, "a wrong answer");
        }
        Ok(())
    }

    /// Calls that each rank has logged as given up.
    fn given_up(&self) -> Vec<usize> {
        let lines = |worker: &Worker| worker.log().matches("a call was given up").count();
        self.group.workers.iter().map(lines).collect()
    }

    /// Bytes that a rank holds in memory.
    pub fn held(&self, rank: usize) -> Result<u64> {
        Ok(self.group.workers[rank].resident()?.held())
    }

    /// Checks that all have as many files open as at the start; then ends the group, which must leave
    /// no heap.
    pub fn end(self) -> Result<()> {
        let Self { mut group, descriptors: before, engines, .. } = self;
        for (rank, (worker, before)) in group.workers.iter().zip(before).enumerate() {
            let released = || Ok((descriptors(worker)? == before).then_some(()));
            until("the release of files", released).with_context(|| format!("rank {rank}"))?;
        }
        drop(engines);
        for worker in &mut group.workers {
            worker.signal(Signal::TERM)?;
            let status = worker.wait()?;
            ensure!(status.success(), "{status}: {}", worker.log());
        }
        ensure!(!group.heap().exists(), "{} was left behind", group.heap().display());
        Ok(())
    }
}

/// Two steps with other rows each, and what one rank alone answers, which the case says is right.
fn steps(case: &Path, variant: Variant, tokens: usize) -> Result<[Step; 2]> {
    let alone = Worker::start(case, &[])?;
    let mut engine = alone.engine(variant, tokens)?;
    let case = Case::open(case)?;
    let golden = case.expected(variant)?;
    let mut step = |rows: Range<usize>| -> Result<Step> {
        let inputs = case.inputs.rows(rows.clone());
        let expected = through(&mut engine, 0, Phase::Decode, &inputs)?;
        let golden = &golden[rows.start * inputs.hidden..rows.end * inputs.hidden];
        let comparison = Comparison::new(&expected, golden);
        ensure!(comparison.passes(variant), "one rank alone: {comparison}");
        Ok(Step { inputs, expected })
    };
    Ok([step(0..tokens)?, step(tokens..2 * tokens)?])
}

/// Calls until a call fails, by turns one step and the other.
fn call_until_error(engine: &mut Engine, steps: &[Step; 2], rows: &Range<usize>) -> Result<Ended> {
    let mine = steps.each_ref().map(|Step { inputs, expected }| {
        (inputs.rows(rows.clone()), &expected[rows.start * inputs.hidden..rows.end * inputs.hidden])
    });
    let mut answers = 0;
    loop {
        let (inputs, expected) = &mine[answers % 2];
        match through(engine, 0, Phase::Decode, inputs) {
            Ok(output) => ensure!(output == *expected, "a wrong answer after {answers} right ones"),
            Err(error) => return Ok(Ended { answers, error, at: Instant::now() }),
        }
        answers += 1;
    }
}

fn descriptors(worker: &Worker) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", worker.pid()))?.count())
}
