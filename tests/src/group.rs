//! Groups of worker processes, and steps that all of their engines make together.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Result;
use protocol::client::{ClientError, Engine};
use protocol::message::Phase;
use reference::layer::{Inputs, Variant};
use tempfile::TempDir;

use crate::call::through;
use crate::random::Random;
use crate::worker_process::Worker;

/// A running group.
#[derive(Debug)]
pub struct Group {
    /// One worker for each rank.
    pub workers: Vec<Worker>,
    model: PathBuf,
    options: Vec<String>,
    /// Holds the heap, and the placement.
    folder: TempDir,
}

/// How a group is started.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// Ranks.
    pub ranks: u32,
    /// The expert of every slot, `[layer][slot]`; experts in order otherwise.
    pub placement: Option<Vec<Vec<i64>>>,
    /// Further options of each worker.
    pub options: Vec<String>,
}

impl Group {
    /// Starts every rank and waits until all are ready.
    pub fn start(model: &Path, spec: &Spec) -> Result<Self> {
        // In shared memory, as in operation; a name of its own keeps groups apart.
        let folder = tempfile::Builder::new().prefix("moe-group").tempdir_in("/dev/shm")?;
        let text = |path: &Path| path.display().to_string();
        let mut options = vec![
            "--group".to_owned(),
            "g".to_owned(),
            "--group-dir".to_owned(),
            text(folder.path()),
        ];
        options.extend(["--ranks".to_owned(), spec.ranks.to_string()]);
        if let Some(placement) = &spec.placement {
            let path = folder.path().join("placement.json");
            fs::write(&path, serde_json::to_vec(placement)?)?;
            options.extend(["--placement".to_owned(), text(&path)]);
        }
        options.extend(spec.options.iter().cloned());
        let mut group = Self { workers: Vec::new(), model: model.to_owned(), options, folder };
        for rank in 0..spec.ranks {
            let worker = group.spawn(rank)?;
            group.workers.push(worker);
        }
        group.workers.iter_mut().try_for_each(Worker::ready)?;
        Ok(group)
    }

    fn spawn(&self, rank: u32) -> Result<Worker> {
        let rank = rank.to_string();
        let mut options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        options.extend(["--rank", &rank]);
        Worker::spawn(&self.model, &options)
    }

    /// Starts another process of a rank with options of its own, and does not wait.
    pub fn spawn_with(&self, rank: u32, model: &Path, more: &[&str]) -> Result<Worker> {
        let rank = rank.to_string();
        let mut options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        options.extend(["--rank", &rank]);
        options.extend(more);
        Worker::spawn(model, &options)
    }

    /// Replaces a rank that has ended.
    pub fn restart(&mut self, rank: usize) -> Result<()> {
        self.workers[rank] = self.spawn(u32::try_from(rank)?)?;
        self.workers[rank].ready()
    }

    /// The heap's file.
    #[must_use]
    pub fn heap(&self) -> PathBuf {
        self.folder.path().join("moeplane-g")
    }

    /// Attaches an engine to every rank.
    pub fn engines(&self, variant: Variant, max_tokens: usize) -> Result<Vec<Engine>> {
        self.workers.iter().map(|worker| worker.engine(variant, max_tokens)).collect()
    }
}

/// Cuts `tokens` into a share for each of `ranks`, uneven, some of them empty.
#[must_use]
pub fn uneven(tokens: usize, ranks: usize) -> Vec<Range<usize>> {
    // 1 : 2 : 3 : ... of the tokens, rounded down; the last takes the rest.
    let parts = ranks * (ranks + 1) / 2;
    let end = |rank: usize| match rank + 1 {
        last if last == ranks => tokens,
        n => tokens * (n * (n + 1) / 2) / parts,
    };
    (0..ranks).map(|rank| if rank == 0 { 0 } else { end(rank - 1) }..end(rank)).collect()
}

/// One call by all engines, each with its share of the rows; returns the whole output.
pub fn call_all(
    engines: &mut [Engine],
    layer: u32,
    inputs: &Inputs,
    shares: &[Range<usize>],
) -> Result<Vec<u16>> {
    let outputs = call_each(engines, layer, inputs, shares);
    let outputs: Vec<Vec<u16>> = outputs.into_iter().collect::<Result<_, _>>()?;
    Ok(outputs.concat())
}

/// One call by all engines; what each got.
pub fn call_each(
    engines: &mut [Engine],
    layer: u32,
    inputs: &Inputs,
    shares: &[Range<usize>],
) -> Vec<Result<Vec<u16>, ClientError>> {
    together(engines.iter_mut().zip(shares), |(engine, share)| {
        through(engine, layer, Phase::Decode, &inputs.rows(share.clone()))
    })
}

/// Runs `work` on every item at once, each in a thread of its own; what each gave, in order.
pub fn together<I: Send, T: Send>(
    items: impl IntoIterator<Item = I>,
    work: impl Fn(I) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let items = items.into_iter();
        let threads: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// A placement in which every expert is on two ranks, so that one may be lost.
#[must_use]
pub fn twice(experts: u32, ranks: u32) -> Vec<i64> {
    // One more than the mean: experts do not divide evenly.
    let slots = (2 * experts).div_ceil(ranks) as usize + 1;
    let on = |rank: u32| {
        let here = move |expert: &u32| [expert % ranks, (expert + 1) % ranks].contains(&rank);
        let row = (0..experts).filter(here).map(i64::from);
        row.chain(std::iter::repeat(-1)).take(slots)
    };
    (0..ranks).flat_map(on).collect()
}

/// A placement of `slots_per_rank` slots a rank that the seed decides: every expert somewhere, none
/// twice on a rank, some slots empty where there are many.
#[must_use]
pub fn random_placement(
    experts: usize,
    ranks: usize,
    slots_per_rank: usize,
    random: &mut Random,
) -> Vec<i64> {
    let mut rows: Vec<Vec<usize>> = vec![Vec::new(); ranks];
    let mut order: Vec<usize> = (0..experts).collect();
    random.shuffle(&mut order);
    for expert in order {
        let mut free: Vec<usize> = (0..ranks).collect();
        free.retain(|&rank| rows[rank].len() < slots_per_rank);
        assert!(!free.is_empty(), "{ranks} x {slots_per_rank} slots for {experts} experts");
        rows[free[random.below(free.len())]].push(expert);
    }
    let mut placement = Vec::new();
    for mut row in rows {
        while row.len() < slots_per_rank.min(experts) && random.below(8) > 0 {
            let expert = random.below(experts);
            if !row.contains(&expert) {
                row.push(expert);
            }
        }
        let mut row: Vec<i64> = row.into_iter().map(|e| i64::try_from(e).unwrap_or(-1)).collect();
        row.resize(slots_per_rank, -1);
        random.shuffle(&mut row);
        placement.extend(row);
    }
    placement
}
