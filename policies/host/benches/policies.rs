//! Policies linked in and as components, the same source on the same request: a plan of DeepSeek-V3's sizes, and a table of
//! tactics. A component gets a fresh instance, fuel and a deadline at every call, and its answer is checked. Prints times
//! and ratios, and asserts none. `cargo xtask bench-policies`
#![expect(clippy::print_stdout, reason = "a benchmark reports to a person")]

#[path = "../tests/policies/question.rs"]
mod question;

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use deepseek_eplb::DeepseekEplb;
use greedy_swap::GreedySwap;
use measured_table::MeasuredTable;
use policy_guest::{placement::placer, tactics::chooser};
use policy_host::{Component, Host, HostOptions, example, shipped};
use serde::Serialize;
use serde::de::DeserializeOwned;

const PROGRAM: &str = env!("CARGO_BIN_EXE_moeplane-policy");
const PLANS: usize = 201;
const TABLES: usize = 20_001;

fn main() -> Result<()> {
    let store = tempfile::tempdir()?;
    let (store, compiler) = (store.path().to_owned(), PROGRAM.into());
    let host = Host::new(&HostOptions { store, compiler, deadline: None })?;
    println!("a plan: 61 layers x 256 experts in 8 groups, 288 slots, 32 ranks on 4 nodes");
    plans::<DeepseekEplb>(&host, "deepseek_eplb", "{}")?;
    plans::<GreedySwap>(&host, "greedy_swap", "{}")?;
    println!("a table of tactics: 3 candidates, 3 buckets");
    let policy = load(&host, "measured_table")?;
    let request = example::tactics("{}");
    let guest: chooser::Request = converted(&request)?;
    let native = times(TABLES, || {
        let request = guest.clone();
        timed(|| <MeasuredTable as chooser::Guest>::decide(request))
    })?;
    let component = times(TABLES, || Ok(policy.decide(&request)?.elapsed))?;
    show("native", &native, "us", 1.0);
    show("component", &component, "us", 1.0);
    Ok(())
}

fn plans<P: placer::Guest>(host: &Host, name: &str, settings: &str) -> Result<()> {
    let policy = load(host, name)?;
    let request = question::large(settings);
    let guest: placer::Request = converted(&request)?;
    let answer = policy.decide(&request)?;
    let plan = P::decide(guest.clone()).map_err(|error| anyhow::anyhow!("{error:?}"))?;
    ensure!(answer.value == converted(&plan)?, "{name} plans differently as a component");
    let native = times(PLANS, || {
        let request = guest.clone();
        timed(|| P::decide(request))
    })?;
    let component = times(PLANS, || Ok(policy.decide(&request)?.elapsed))?;
    println!("  {name}: {}", answer.value.explanation);
    show("native", &native, "ms", 1e-3);
    show("component", &component, "ms", 1e-3);
    let ratio = us(&component, 50) / us(&native, 50);
    println!("    component over native {ratio:.2}, {} units of fuel", answer.fuel);
    Ok(())
}

fn load(host: &Host, name: &str) -> Result<Component> {
    let path = shipped::file(&shipped::folder(Path::new(PROGRAM)), name);
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{}: cargo xtask policies makes it", path.display()))?;
    Ok(host.load(&bytes)?)
}

/// Records of host and guest are generated from the same folder, each for its side.
fn converted<T: DeserializeOwned>(record: &impl Serialize) -> Result<T> {
    Ok(serde_json::from_value(serde_json::to_value(record)?)?)
}

fn timed<T>(call: impl FnOnce() -> T) -> Result<Duration> {
    let began = Instant::now();
    let answer = black_box(call());
    let elapsed = began.elapsed();
    drop(answer);
    Ok(elapsed)
}

/// Times of `calls` calls, ascending, after a tenth as many that are not counted.
fn times(calls: usize, mut call: impl FnMut() -> Result<Duration>) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(calls);
    for number in 0..calls + calls / 10 {
        let took = call()?;
        if number >= calls / 10 {
            times.push(took);
        }
    }
    times.sort_unstable();
    Ok(times)
}

fn show(name: &str, times: &[Duration], unit: &str, scale: f64) {
    let [least, median, p99] = [0, 50, 99].map(|percent| us(times, percent) * scale);
    println!("    {name:<10} least {least:>8.3}  median {median:>8.3}  p99 {p99:>8.3} {unit}");
}

fn us(ascending: &[Duration], percent: usize) -> f64 {
    ascending[(ascending.len() - 1) * percent / 100].as_secs_f64() * 1e6
}
