//! The CPU device beside dequantised fp32 products by the `gemm` crate (0.19, default features), in
//! the same run and on as many threads: 60 experts, top-4, hidden 2048, intermediate 1408.
//!
//! The comparison favours `gemm`: its weights were dequantised beforehand, and it is charged for two
//! products of each expert that is hit, not for routing, activation, rounding or the combination.
//! Each figure is the best mean of several rounds. Routings take turns, so that few tokens do not
//! find their experts in the cache.
//!
//! `cargo bench -p kernels --bench cpu_layer [-- avx2]`
#![expect(unsafe_code, reason = "gemm's interface takes pointers")]
#![expect(clippy::print_stdout, reason = "a benchmark reports by printing")]
#![expect(clippy::cast_possible_truncation, reason = "sizes of the benchmark are small")]
#![expect(clippy::unwrap_used, reason = "a benchmark ends where something fails")]

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use gemm::Parallelism;
use half::bf16;
use kernels::checkpoint::Checkpoint;
use kernels::cpu::{CpuDevice, CpuOptions, Isa};
use kernels::device::{CallOffsets, Device, LayerCall};
use kernels::memory::SharedMemory;
use kernels::numeric::dequantise_row;
use kernels::problem::Form;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

const EXPERTS: usize = 60;
const TOP_K: usize = 4;
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 1408;
const TOKENS: [usize; 4] = [1, 8, 64, 512];
const ROUTINGS: usize = 15;
const WEIGHTS_OF_EXPERT: usize = 3 * HIDDEN * INTERMEDIATE;
const ROUNDS: usize = 7;
/// Time that a round should take.
const ROUND: Duration = Duration::from_millis(400);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn bytes(&mut self, count: usize, of: impl Fn(u8) -> u8) -> Vec<u8> {
        let words = (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(count).map(of).collect()
    }
}

/// FC1 `[2i, h]` and FC2 `[h, i]` of an expert in fp32.
type Dequantised = [Vec<f32>; 2];

/// Writes a checkpoint of random weights; returns them dequantised, too.
fn checkpoint() -> (TempDir, Vec<Dequantised>) {
    let mut random = Random(1);
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut dequantised = Vec::new();
    for expert in 0..EXPERTS {
        let mut values = Vec::new();
        for (word, rows, cols) in [
            ("gate", INTERMEDIATE, HIDDEN),
            ("up", INTERMEDIATE, HIDDEN),
            ("down", HIDDEN, INTERMEDIATE),
        ] {
            let stem = format!("model.layers.0.mlp.experts.{expert}.{word}_proj");
            let codes = random.bytes(rows * cols / 2, |byte| byte);
            let scales = random.bytes(rows * cols / 16, |byte| 0x30 + byte % 16);
            let mut projection = vec![0.0; rows * cols];
            dequantise_row(&codes, &scales, 0.01, &mut projection);
            values.push(projection);
            let global = (Dtype::F32, vec![], 0.01_f32.to_le_bytes().to_vec());
            tensors.insert(format!("{stem}.weight"), (Dtype::U8, vec![rows, cols / 2], codes));
            let shape = vec![rows, cols / 16];
            tensors.insert(format!("{stem}.weight_scale"), (Dtype::F8_E4M3, shape, scales));
            tensors.insert(format!("{stem}.weight_scale_2"), global);
        }
        let down = values.pop().unwrap();
        dequantised.push([values.concat(), down]);
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let config = format!(
        r#"{{"num_hidden_layers": 1, "hidden_size": {HIDDEN}, "num_experts": {EXPERTS},
        "moe_intermediate_size": {INTERMEDIATE}, "num_experts_per_tok": {TOP_K},
        "quantization_config": {{"quant_method": "modelopt", "quant_algo": "NVFP4"}}}}"#
    );
    fs::write(folder.path().join("config.json"), config).unwrap();
    (folder, dequantised)
}

/// A device, and the buffer of its calls.
struct Ours {
    device: CpuDevice,
    buffer: SharedMemory,
    offsets: CallOffsets,
}

impl Ours {
    fn new(checkpoint: &Checkpoint, options: CpuOptions) -> Self {
        let device = CpuDevice::alone(options, checkpoint, 512).unwrap();
        let tokens = TOKENS[TOKENS.len() - 1];
        let (row_bytes, place_bytes) = ((tokens * HIDDEN * 2) as u64, (tokens * TOP_K * 4) as u64);
        let offsets = CallOffsets {
            hidden: 0,
            output: row_bytes,
            topk_ids: 2 * row_bytes,
            topk_weights: 2 * row_bytes + place_bytes,
        };
        let buffer = SharedMemory::create("bench", 2 * (row_bytes + place_bytes)).unwrap();
        let mut random = Random(2);
        let value = |_| bf16::from_f32((random.next() >> 40) as f32 / 16_777_216.0);
        buffer.write(offsets.hidden, &(0..tokens * HIDDEN).map(value).collect::<Vec<_>>());
        buffer.write(offsets.topk_weights, &vec![0.25_f32; tokens * TOP_K]);
        Self { device, buffer, offsets }
    }

    fn call(&mut self, tokens: usize, ids: &[i32]) {
        self.buffer.write(self.offsets.topk_ids, ids);
        let call = LayerCall {
            layer: 0,
            tokens: tokens as u32,
            top_k: TOP_K as u32,
            form: Form::default(),
            buffer: &self.buffer,
            offsets: self.offsets,
        };
        self.device.run(&call).unwrap();
    }

    /// Mean time of a call.
    fn time(&mut self, tokens: usize) -> Duration {
        let routings: Vec<Vec<i32>> = (0..ROUTINGS).map(|routing| ids(tokens, routing)).collect();
        best_mean(|n| self.call(tokens, &routings[n % ROUTINGS]))
    }
}

/// The peer's time for the products of a call.
fn gemm_time(dequantised: &[Dequantised], tokens: usize, threads: usize) -> Duration {
    let rows = (tokens * TOP_K).div_ceil(EXPERTS) + 1;
    let x = vec![0.5_f32; rows * HIDDEN];
    let (mut y, mut out) = (vec![0.0; rows * 2 * INTERMEDIATE], vec![0.0; rows * HIDDEN]);
    let routings: Vec<Vec<i32>> = (0..ROUTINGS).map(|routing| ids(tokens, routing)).collect();
    best_mean(|n| {
        for (expert, [fc1, fc2]) in (0..).zip(dequantised) {
            let rows = routings[n % ROUTINGS].iter().filter(|&&id| id == expert).count();
            if rows > 0 {
                product(fc1, HIDDEN, &x[..rows * HIDDEN], &mut y, threads);
                // gate and up lie one after the other; FC2 takes as many columns as gate has.
                product(fc2, INTERMEDIATE, &y[..rows * INTERMEDIATE], &mut out, threads);
            }
        }
        black_box(&out);
    })
}

/// `weights` `[rows, cols]` times `x` `[tokens, cols]`, into `out` `[tokens, rows]`.
fn product(weights: &[f32], cols: usize, x: &[f32], out: &mut [f32], threads: usize) {
    let (rows, tokens) = (weights.len() / cols, x.len() / cols);
    assert!(out.len() >= rows * tokens, "room for {rows} x {tokens}");
    let (out, weights, x) = (out.as_mut_ptr(), weights.as_ptr(), x.as_ptr());
    let (rows_stride, cols_stride) = (rows.cast_signed(), cols.cast_signed());
    let threads = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    // SAFETY: the strides describe row-major matrices of exactly the lengths of the slices.
    unsafe {
        gemm::gemm(
            rows,
            tokens,
            cols,
            out,
            rows_stride,
            1,
            false,
            weights,
            1,
            cols_stride,
            x,
            cols_stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Ids of `tokens` tokens: each expert is hit about equally often, differently in each routing.
fn ids(tokens: usize, routing: usize) -> Vec<i32> {
    let id = |place: usize| ((place + routing * TOP_K) % EXPERTS) as i32;
    (0..tokens * TOP_K).map(id).collect()
}

/// Runs rounds of about [`ROUND`] each and returns the best mean of a run.
fn best_mean(mut run: impl FnMut(usize)) -> Duration {
    let started = Instant::now();
    run(0);
    let runs = (ROUND.as_nanos() / started.elapsed().as_nanos().max(1)).max(1) as usize;
    let round = |_| {
        let started = Instant::now();
        (0..runs).for_each(&mut run);
        started.elapsed() / runs as u32
    };
    (0..ROUNDS).map(round).min().unwrap_or_default()
}

/// What one thread reads a second, in GB: a sum over memory that no cache holds.
fn read_ceiling() -> f64 {
    let words = vec![1_u64; 1 << 26];
    let time = best_mean(|_| {
        let sums = words.as_chunks::<32>().0.iter().fold([0_u64; 32], |mut sums, words| {
            sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
            sums
        });
        black_box(sums);
    });
    size_of_val(words.as_slice()) as f64 / time.as_secs_f64() / 1e9
}

fn gigabytes_per_second(tokens: usize, time: Duration) -> f64 {
    let experts = EXPERTS.min(tokens * TOP_K);
    (experts * WEIGHTS_OF_EXPERT) as f64 * 4.5 / 8.0 / time.as_secs_f64() / 1e9
}

fn main() {
    let isa = std::env::args().skip(1).find_map(|word| word.parse::<Isa>().ok());
    let threads = available_parallelism().map_or(1, NonZero::get);
    let (folder, dequantised) = checkpoint();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut ours = Ours::new(&checkpoint, CpuOptions { isa, ..CpuOptions::default() });
    println!("{}; e60_k4_h2048_i1408, act=bf16", ours.device.describe());
    println!("gemm 0.19, default features, dequantised fp32, {threads} threads");
    for tokens in TOKENS {
        let (our, their) = (ours.time(tokens), gemm_time(&dequantised, tokens, threads));
        let operations = (2 * tokens * TOP_K * WEIGHTS_OF_EXPERT) as f64;
        println!(
            "T={tokens:<4} device {:>9.3} ms {:>6.1} GB/s {:>7.1} GFLOP/s   gemm {:>9.3} ms   \
             gemm/device {:.2}x",
            our.as_secs_f64() * 1e3,
            gigabytes_per_second(tokens, our),
            operations / our.as_secs_f64() / 1e9,
            their.as_secs_f64() * 1e3,
            their.as_secs_f64() / our.as_secs_f64(),
        );
    }
    let mut one = Ours::new(&checkpoint, CpuOptions { threads: 1, isa, ..CpuOptions::default() });
    let (decoded, ceiling) = (gigabytes_per_second(1, one.time(1)), read_ceiling());
    println!(
        "one thread at T=1: {decoded:.1} GB/s of packed weights, {:.2} G weights/s; it reads {ceiling:.1} \
         GB/s: {:.2} of the ceiling",
        decoded / 0.5625,
        decoded / ceiling,
    );
}
