//! `test`, `bench` and `explain`: requests as JSON files of the contract's records, or small examples.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use policy_host::contract::{chooser, placer, splitter};
use policy_host::replay::{Planner, Trace};
use policy_host::{Answer, Component, Kind, Question, Verdict, example};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::replay;

/// Ends of the names of files.
const REQUEST: &str = ".request.json";
const ANSWER: &str = ".answer.json";

#[derive(clap::Args)]
pub(crate) struct TestArguments {
    /// A policy, as a file or by its name.
    policy: PathBuf,
    /// Folder of requests, NAME.request.json. Where NAME.answer.json is beside one, the answer must be that.
    #[arg(long)]
    requests: Option<PathBuf>,
    /// Writes the answers instead of comparing them.
    #[arg(long, requires = "requests")]
    write_answers: bool,
    /// Recorded load windows: a placement policy plans on each, with 8 ranks.
    #[arg(long)]
    windows: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct ExplainArguments {
    /// A policy, as a file or by its name.
    policy: PathBuf,
    /// The request as JSON; a small example if not given.
    #[arg(long)]
    request: Option<PathBuf>,
    /// Settings, in place of those of the request.
    #[arg(long)]
    settings: Option<String>,
    /// Prints the whole answer as JSON.
    #[arg(long, conflicts_with = "print_request")]
    json: bool,
    /// Prints the request as JSON instead of asking: the file to begin with.
    #[arg(long)]
    print_request: bool,
}

#[derive(clap::Args)]
pub(crate) struct BenchArguments {
    /// A policy, as a file or by its name.
    policy: PathBuf,
    /// The request as JSON; a small example if not given.
    #[arg(long)]
    request: Option<PathBuf>,
    /// Calls.
    #[arg(long, default_value_t = 1000)]
    calls: usize,
}

/// A request of one of the three kinds.
enum Asked {
    Placement(placer::Request),
    Routing(splitter::Request),
    Tactics(chooser::Request),
}

impl Asked {
    /// The request in a file, or an example, of the kind that a policy decides.
    fn new(kind: Kind, file: Option<&Path>) -> Result<Self> {
        const SETTINGS: &str = "{}";
        Ok(match kind {
            Kind::Placement => {
                Self::Placement(read(file)?.unwrap_or_else(|| example::placement(SETTINGS)))
            }
            Kind::Routing => {
                Self::Routing(read(file)?.unwrap_or_else(|| example::routing(SETTINGS)))
            }
            Kind::Tactics => {
                Self::Tactics(read(file)?.unwrap_or_else(|| example::tactics(SETTINGS)))
            }
        })
    }

    fn settings(&mut self) -> &mut String {
        match self {
            Self::Placement(request) => &mut request.context.settings,
            Self::Routing(request) => &mut request.context.settings,
            Self::Tactics(request) => &mut request.context.settings,
        }
    }

    fn json(&self) -> Result<String> {
        Ok(match self {
            Self::Placement(request) => serde_json::to_string_pretty(request),
            Self::Routing(request) => serde_json::to_string_pretty(request),
            Self::Tactics(request) => serde_json::to_string_pretty(request),
        }?)
    }

    fn ask(&self, policy: &Component) -> Result<Told, Verdict> {
        match self {
            Self::Placement(request) => told(policy, request, of_plan),
            Self::Routing(request) => told(policy, request, of_splits),
            Self::Tactics(request) => told(policy, request, |table| of_table(request, table)),
        }
    }

    /// The answer of two equal requests; also declining is an answer.
    fn ask_twice(&self, policy: &Component) -> Result<Told> {
        let ask = || match self.ask(policy) {
            Err(Verdict::Declined { message }) => Ok(Told {
                json: serde_json::json!({ "declined": message }),
                lines: vec![format!("declines: {message}")],
                fuel: 0,
                elapsed: Duration::ZERO,
            }),
            other => other,
        };
        let (first, second) = (ask()?, ask()?);
        ensure!(first.json == second.json, "the same request gave two answers");
        let (one, other) = (first.fuel, second.fuel);
        ensure!(one == other, "the same request used {one} and {other} units of fuel");
        Ok(first)
    }
}

fn read<T: DeserializeOwned>(path: Option<&Path>) -> Result<Option<T>> {
    let Some(path) = path else { return Ok(None) };
    let named = || path.display().to_string();
    let text = fs::read(path).with_context(named)?;
    serde_json::from_slice(&text).map(Some).with_context(named)
}

/// An answer, as data and in lines for a person.
struct Told {
    json: Value,
    lines: Vec<String>,
    fuel: u64,
    elapsed: Duration,
}

fn told<Q: Question>(
    policy: &Component,
    request: &Q,
    lines: impl FnOnce(&Q::Decision) -> Vec<String>,
) -> Result<Told, Verdict>
where
    Q::Decision: Serialize,
{
    let Answer { value, fuel, elapsed } = policy.decide(request)?;
    let json = serde_json::to_value(&value).map_err(|error| Verdict::Host {
        what: "writing the answer".to_owned(),
        reason: error.to_string(),
    })?;
    Ok(Told { json, lines: lines(&value), fuel, elapsed })
}

fn of_plan(plan: &placer::Plan) -> Vec<String> {
    let mut lines = vec![plan.explanation.clone()];
    for change in &plan.changes {
        let placer::Comparison { before, after } = change.max_over_mean;
        let mut line = format!(
            "layer {}: the busiest rank has {before:.3} times the mean rows, afterwards {after:.3}",
            change.layer
        );
        if let Some(placer::Comparison { before, after }) = change.milliseconds {
            line += &format!("; {before:.4} ms a call, afterwards {after:.4}");
        }
        lines.push(line);
        for step in &change.moves {
            let purpose = match step.purpose {
                placer::Purpose::Spread => "to spread load",
                placer::Purpose::Replicate => "as one more replica",
                placer::Purpose::Repair => "as it had no slot where it must be",
                placer::Purpose::Drain => "as its ranks are to leave",
            };
            let from =
                step.source.map_or("the checkpoint".to_owned(), |rank| format!("rank {rank}"));
            let placer::Move { expert, destination, gain, .. } = step;
            lines.push(format!(
                "  expert {expert} from {from} to rank {destination}, {purpose}: gains {gain:.3}"
            ));
        }
    }
    lines
}

fn of_splits(splits: &splitter::Splits) -> Vec<String> {
    let layer = |split: &splitter::Split| {
        let rows = if split.sources == 1 { "tokens of all ranks alike" } else { "by source rank" };
        format!("layer {}: {} weights, {rows}", split.layer, split.weights.len())
    };
    std::iter::once(splits.explanation.clone()).chain(splits.layers.iter().map(layer)).collect()
}

fn of_table(request: &chooser::Request, table: &chooser::Table) -> Vec<String> {
    let choice = |(bucket, choice): (&u32, &chooser::Choice)| {
        let name = request.candidates.get(choice.candidate as usize).map_or("", |c| &c.name);
        let us = choice.expected_us.map_or("not measured".to_owned(), |us| format!("{us:.1} us"));
        format!("up to {bucket} tokens: {name}, {us}")
    };
    let choices = request.buckets.iter().zip(&table.choices).map(choice);
    std::iter::once(table.explanation.clone()).chain(choices).collect()
}

pub(crate) fn explain(arguments: &ExplainArguments) -> Result<ExitCode> {
    let policy = crate::load(&arguments.policy, None, None)?;
    let mut asked = Asked::new(policy.kind(), arguments.request.as_deref())?;
    if let Some(settings) = &arguments.settings {
        asked.settings().clone_from(settings);
    }
    if arguments.print_request {
        println!("{}", asked.json()?);
        return Ok(ExitCode::SUCCESS);
    }
    policy.validate(asked.settings())?;
    let told = asked.ask(&policy)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&told.json)?);
    } else {
        told.lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn bench(arguments: &BenchArguments) -> Result<ExitCode> {
    ensure!(arguments.calls > 0, "0 calls, expected at least one");
    let policy = crate::load(&arguments.policy, None, None)?;
    let asked = Asked::new(policy.kind(), arguments.request.as_deref())?;
    let first = asked.ask(&policy)?;
    let mut times = Vec::with_capacity(arguments.calls);
    for _ in 0..arguments.calls {
        times.push(asked.ask(&policy)?.elapsed);
    }
    times.sort_unstable();
    let us = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
    let (deadline, fuel) = (policy.kind().deadline(policy.profile()), policy.profile().fuel);
    println!(
        "median of {:<6} {:>12.1} us, the deadline is {} ms",
        times.len(),
        us(50),
        deadline.as_millis()
    );
    println!("99th percentile  {:>12.1} us", us(99));
    println!("fuel             {:>12}, the limit is {fuel}", first.fuel);
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn test(arguments: &TestArguments) -> Result<ExitCode> {
    let policy = crate::load(&arguments.policy, None, Some(crate::PATIENCE))?;
    println!("ok  example: twice the same");
    let mut failed = 0;
    if let Some(folder) = &arguments.requests {
        failed += requests(&policy, folder, arguments.write_answers)?;
    }
    if let Some(windows) = &arguments.windows {
        failed += recorded(&policy, windows)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Asks every request of a folder; returns how many failed.
fn requests(policy: &Component, folder: &Path, write: bool) -> Result<usize> {
    let named = || folder.display().to_string();
    let entries = fs::read_dir(folder).with_context(named)?;
    let files = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = files.collect::<Result<_>>()?;
    names.retain(|name| name.ends_with(REQUEST));
    names.sort();
    ensure!(!names.is_empty(), "{} has no request, expected NAME{REQUEST}", named());
    let mut failed = 0;
    for name in &names {
        let case = name.trim_end_matches(REQUEST);
        match request(policy, folder, case, write) {
            Ok(what) => println!("ok  {case}: {what}"),
            Err(error) => {
                failed += 1;
                println!("BAD {case}: {error:#}");
            }
        }
    }
    Ok(failed)
}

fn request(policy: &Component, folder: &Path, case: &str, write: bool) -> Result<String> {
    let file = folder.join(format!("{case}{REQUEST}"));
    let mut asked = Asked::new(policy.kind(), Some(&file))?;
    policy.validate(asked.settings())?;
    let told = asked.ask_twice(policy)?;
    let answer = folder.join(format!("{case}{ANSWER}"));
    let fuel = told.fuel;
    if write {
        fs::write(&answer, serde_json::to_string_pretty(&told.json)? + "\n")?;
        return Ok(format!("answer written, {fuel} units of fuel"));
    }
    if !answer.exists() {
        return Ok(format!("twice the same, {fuel} units of fuel"));
    }
    let expected: Value = read(Some(&answer))?.context("an answer")?;
    if told.json == expected {
        return Ok(format!("as on record, {fuel} units of fuel"));
    }
    bail!("{} expects another answer; see: moeplane-policy explain --json", answer.display())
}

/// Plans on every window; returns how many replays failed.
fn recorded(policy: &Component, windows: &Path) -> Result<usize> {
    let named = || windows.display().to_string();
    let trace = Trace::read(&fs::read(windows).with_context(named)?).with_context(named)?;
    let cluster = replay::cluster_of(&trace);
    let planner = Planner::Policy { name: &policy.info().name, policy, settings: "{}" };
    let replayed = || cluster.replay(&trace, &trace.as_recorded(), &planner);
    match (replayed(), replayed()) {
        (Ok(first), Ok(second)) if first.same_as(&second) => {
            let mean = first.max_over_mean.iter().sum::<f64>() / first.max_over_mean.len() as f64;
            let plans = first.planning.len();
            println!("ok  {}: {plans} plans, twice the same, max/mean {mean:.4}", named());
            Ok(0)
        }
        (Ok(_), Ok(_)) => {
            println!("BAD {}: two replays differ", named());
            Ok(1)
        }
        (Err(error), _) | (_, Err(error)) => {
            println!("BAD {}: {:#}", named(), anyhow::Error::from(error));
            Ok(1)
        }
    }
}
