//! Cases of one shape: one generated checkpoint, one set of workers for each number of ranks, and
//! both activation formats with the weights in FC1. Answers are compared with the reference, by our
//! tolerances and by the original system's.

use anyhow::{Context, Result, ensure};
use protocol::client::Engine;
use reference::compare::Comparison;
use reference::layer::{Inputs, Variant, layer_outputs};
use reference::model::Model;
use tempfile::TempDir;

use crate::call::first_layer;
use crate::group::{Group, Spec, call_all};
use crate::plan::{PlannedCase, Shape};
use crate::synthetic::Pool;
use crate::worker_process::Worker;

/// The formats that cases run in.
const VARIANTS: [Variant; 2] = [
    Variant { nvfp4: false, weights_in_combine: false },
    Variant { nvfp4: true, weights_in_combine: false },
];
/// Tokens that workers take in a call: more than any rank of a case has.
const MAX_TOKENS: &str = "64";

/// What a case came to.
#[derive(Debug)]
pub struct Verdict {
    /// The case and what was measured, or what went wrong.
    pub line: String,
    /// Whether it passed in both formats, by both criteria.
    pub passed: bool,
}

/// The cases cut into lists of one shape each, in the order of first appearance.
#[must_use]
pub fn by_shape(cases: &[PlannedCase]) -> Vec<Vec<&PlannedCase>> {
    let mut lists: Vec<Vec<&PlannedCase>> = Vec::new();
    for case in cases {
        match lists.iter_mut().find(|list| list[0].shape == case.shape) {
            Some(list) => list.push(case),
            None => lists.push(vec![case]),
        }
    }
    lists
}

/// Runs cases of one shape on workers with a device, `cpu` or `cuda`; `report` hears of each as soon as it is known.
pub fn run(
    pool: &Pool,
    cases: &[&PlannedCase],
    device: &str,
    mut report: impl FnMut(Verdict) -> Result<()>,
) -> Result<()> {
    let Some(first) = cases.first() else { return Ok(()) };
    let Shape { experts, hidden, intermediate, .. } = first.shape;
    let seed = u64::from(experts) << 40 ^ u64::from(hidden) << 20 ^ u64::from(intermediate);
    let top_k = cases.iter().map(|case| case.top_k).max().unwrap_or(1);
    let folder = pool.write(&first.shape, (1, top_k), seed)?;
    let model = Model::open(folder.path())?;
    let mut servers = Servers { folder: &folder, device, running: None };
    for case in cases {
        let inputs = case.inputs()?;
        let expected = layer_outputs(&model, 0, &inputs, &VARIANTS)?;
        let zero = |output: &Vec<u16>| output.iter().all(|bits| bits & 0x7fff == 0);
        ensure!(!expected.iter().any(zero), "case {} expects zeros, which prove nothing", case.id);
        let outcome = compare(case, &inputs, &expected, &mut servers);
        report(verdict(case, outcome))?;
    }
    Ok(())
}

fn verdict(case: &PlannedCase, outcome: Result<Vec<Comparison>>) -> Verdict {
    let PlannedCase { id, shape, top_k, ranks, tokens, routing, slots } = case;
    let Shape { experts, hidden, intermediate, clamp } = shape;
    let mut line =
        format!("{id} e{experts} k{top_k} h{hidden} i{intermediate} t{tokens} r{ranks} {routing}");
    if let Some(clamp) = clamp {
        line += &format!(" clamp {clamp}");
    }
    if let Some(slots) = slots {
        line += &format!(" {slots} slots, two placements, the same bits");
    }
    let mut passed = outcome.is_ok();
    match outcome {
        Ok(comparisons) => {
            for (variant, comparison) in VARIANTS.into_iter().zip(comparisons) {
                let original = 100.0 * comparison.original_share;
                line += &format!(" | {} {comparison}, original {original:.2} %", variant.act());
                passed &= comparison.passes(variant) && comparison.passes_original();
            }
        }
        Err(error) => line += &format!(" | {error:#}"),
    }
    line += if passed { ": pass" } else { ": FAIL" };
    Verdict { line, passed }
}

/// How far the answers in each format are from the expected ones.
fn compare(
    case: &PlannedCase,
    inputs: &Inputs,
    expected: &[Vec<u16>],
    servers: &mut Servers<'_>,
) -> Result<Vec<Comparison>> {
    let outputs = match case.slots {
        Some(slots) => moved(case, slots, inputs, servers)?,
        None => servers.outputs(case.ranks, None, inputs)?,
    };
    Ok(outputs.iter().zip(expected).map(|(got, want)| Comparison::new(got, want)).collect())
}

/// The case whose experts move: two placements with replicas, all ranks started anew between them.
/// No bit may change.
fn moved(
    case: &PlannedCase,
    slots: u32,
    inputs: &Inputs,
    servers: &mut Servers<'_>,
) -> Result<Vec<Vec<u16>>> {
    let experts = case.shape.experts;
    // Each expert in turn; then three apart, which takes them to other ranks.
    let placement = |stride: u32| -> Vec<i64> {
        (0..slots).map(|slot| i64::from(slot * stride % experts)).collect()
    };
    let (before, after) = (placement(1), placement(3));
    ensure!(before != after, "nothing moves");
    let outputs = servers.outputs(case.ranks, Some(before), inputs)?;
    let again = servers.outputs(case.ranks, Some(after), inputs)?;
    ensure!(outputs == again, "the outputs of two placements differ");
    Ok(outputs)
}

/// Workers of one checkpoint: those of the last case go on if the next one wants the same.
struct Servers<'a> {
    folder: &'a TempDir,
    device: &'a str,
    running: Option<(Wanted, Server)>,
}

enum Server {
    Alone(Worker),
    Group(Group),
}

/// How workers are started.
#[derive(Clone, PartialEq)]
struct Wanted {
    ranks: u32,
    /// The expert of every slot; experts in order otherwise.
    placement: Option<Vec<i64>>,
}

impl Servers<'_> {
    /// The answers in each format, each rank with an equal share of the tokens, or nearly so.
    fn outputs(
        &mut self,
        ranks: u32,
        placement: Option<Vec<i64>>,
        inputs: &Inputs,
    ) -> Result<Vec<Vec<u16>>> {
        let wanted = Wanted { ranks, placement };
        if self.running.as_ref().is_none_or(|(running, _)| *running != wanted) {
            // The memory of the old ones is given back before the new ones load.
            self.running = None;
            let server = self.start(wanted.clone())?;
            self.running = Some((wanted, server));
        }
        let (_, server) = self.running.as_ref().context("no server")?;
        let tokens = inputs.tokens();
        let share = |rank: usize| tokens * rank / ranks as usize;
        let shares: Vec<_> = (0..ranks as usize).map(|rank| share(rank)..share(rank + 1)).collect();
        let outputs = VARIANTS.into_iter().map(|variant| {
            let mut engines = server.engines(variant, tokens)?;
            let layer = first_layer(&engines[0])?;
            call_all(&mut engines, layer, inputs, &shares)
        });
        outputs.collect()
    }

    fn start(&self, Wanted { ranks, placement }: Wanted) -> Result<Server> {
        if ranks == 1 {
            return Ok(Server::Alone(Worker::start(
                self.folder.path(),
                &["--device", self.device],
            )?));
        }
        let options = ["--max-tokens", MAX_TOKENS, "--device", self.device];
        let options = options.map(str::to_owned).to_vec();
        let spec = Spec { ranks, placement: placement.map(|layer| vec![layer]), options };
        Ok(Server::Group(Group::start(self.folder.path(), &spec)?))
    }
}

impl Server {
    fn engines(&self, variant: Variant, max_tokens: usize) -> Result<Vec<Engine>> {
        match self {
            Self::Alone(worker) => Ok(vec![worker.engine(variant, max_tokens)?]),
            Self::Group(group) => group.engines(variant, max_tokens),
        }
    }
}
