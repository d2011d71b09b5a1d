//! What simulated groups serve, and what every call of it has to answer.

use anyhow::Result;
use half::bf16;
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions};
use kernels::device::{CallOffsets, Device, LayerCall};
use kernels::memory::SharedMemory;
use kernels::problem::Form;
use tempfile::TempDir;
use tests::plan::Shape;
use tests::random::Random;
use tests::synthetic::Pool;

pub(crate) const LAYERS: u32 = 2;
pub(crate) const EXPERTS: u32 = 8;
pub(crate) const TOP_K: u32 = 2;
const WIDTH: u32 = 64;
/// Most tokens of a rank in a call.
pub(crate) const TOKENS: u32 = 4;
/// Different inputs of a layer.
pub(crate) const SAMPLES: usize = 8;

const SHAPE: Shape = Shape { experts: EXPERTS, hidden: WIDTH, intermediate: WIDTH, clamp: None };

/// Two checkpoints of one shape, and answers of the first.
#[derive(Debug)]
pub struct Model {
    weights: TempDir,
    /// Weights that nobody should have.
    wrong: TempDir,
    /// For each layer.
    samples: Vec<Vec<Sample>>,
}

/// What an engine brings, and its answer.
#[derive(Debug)]
pub(crate) struct Sample {
    tokens: u32,
    hidden: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    pub(crate) expected: Vec<u16>,
}

/// An engine's buffer.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: SharedMemory,
    offsets: CallOffsets,
}

impl Buffer {
    pub(crate) fn new() -> Result<Self> {
        let rows = u64::from(TOKENS * WIDTH) * 2;
        let entries = u64::from(TOKENS * TOP_K) * 4;
        let offsets = CallOffsets {
            hidden: 0,
            topk_ids: rows,
            topk_weights: rows + entries,
            output: rows + 2 * entries,
        };
        Ok(Self { memory: SharedMemory::create("buffer", 2 * rows + 2 * entries)?, offsets })
    }

    /// The call of a sample, which it writes.
    pub(crate) fn call(&self, layer: u32, sample: &Sample) -> LayerCall<'_> {
        self.memory.write(self.offsets.hidden, &sample.hidden);
        self.memory.write(self.offsets.topk_ids, &sample.ids);
        self.memory.write(self.offsets.topk_weights, &sample.weights);
        let (tokens, top_k, form) = (sample.tokens, TOP_K, Form::default());
        LayerCall { layer, tokens, top_k, form, buffer: &self.memory, offsets: self.offsets }
    }

    pub(crate) fn answer(&self, sample: &Sample) -> Vec<u16> {
        let mut output = vec![bf16::ZERO; (sample.tokens * WIDTH) as usize];
        self.memory.read(self.offsets.output, &mut output);
        output.into_iter().map(bf16::to_bits).collect()
    }
}

impl Model {
    /// Makes it; the same everywhere.
    ///
    /// # Errors
    /// When it cannot be written, or not be served.
    pub fn new() -> Result<Self> {
        let pool = Pool::new(1);
        let [weights, wrong] = [2, 3].map(|seed| pool.write(&SHAPE, (LAYERS, TOP_K), seed));
        let (weights, wrong) = (weights?, wrong?);
        let mut alone = CpuDevice::alone(options(), &Checkpoint::open(weights.path())?, TOKENS)?;
        let (buffer, mut random) = (Buffer::new()?, Random::new(4));
        let mut sample = |layer| {
            let mut sample = Sample::new(&mut random);
            alone.run(&buffer.call(layer, &sample))?;
            sample.expected = buffer.answer(&sample);
            anyhow::Ok(sample)
        };
        let mut of_layer = |layer| (0..SAMPLES).map(|_| sample(layer)).collect::<Result<_>>();
        let samples = (0..LAYERS).map(&mut of_layer).collect::<Result<_>>()?;
        Ok(Self { weights, wrong, samples })
    }

    pub(crate) fn sample(&self, layer: u32, number: usize) -> &Sample {
        &self.samples[layer as usize][number]
    }

    pub(crate) fn open(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(self.weights.path())?)
    }

    pub(crate) fn open_wrong(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(self.wrong.path())?)
    }
}

pub(crate) fn options() -> CpuOptions {
    CpuOptions { threads: 1, ..CpuOptions::default() }
}

impl Sample {
    fn new(random: &mut Random) -> Self {
        // Now and then a rank has nothing to bring.
        let tokens = u32::try_from(random.below(TOKENS as usize + 1)).unwrap_or(0);
        let hidden = (0..tokens * WIDTH).map(|_| bf16::from_f32(random.normal())).collect();
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let first = random.below(EXPERTS as usize);
            let second = (first + 1 + random.below(EXPERTS as usize - 1)) % EXPERTS as usize;
            ids.extend([first, second].map(|id| i32::try_from(id).unwrap_or(-1)));
        }
        let weights = ids.iter().map(|_| random.unit()).collect();
        Self { tokens, hidden, ids, weights, expected: Vec::new() }
    }
}
