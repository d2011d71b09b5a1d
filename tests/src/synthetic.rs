//! Checkpoints of any size in seconds: every tensor is cut from one pool of quantised normal numbers,
//! at a place of its own and with scales of its own.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use anyhow::Result;
use reference::quantise::{amax, global_scale, quantise_weights};
use safetensors::tensor::{Dtype, View};
use serde_json::json;
use tempfile::TempDir;

use crate::plan::Shape;
use crate::random::Random;

/// Blocks of 16 weights in the pool: 4.2 million weights; a prime, so that no row of a tensor meets
/// itself again soon.
const POOL_BLOCKS: usize = 262_139;
/// Standard deviation of the weights.
const DEVIATION: f32 = 0.05;
/// Largest magnitude that calibration would have seen in standard normal activations.
const INPUT_AMAX: f32 = 5.0;

/// Quantised normal numbers.
#[derive(Debug)]
pub struct Pool {
    codes: Vec<u8>,
    scales: Vec<u8>,
    global: f32,
}

impl Pool {
    /// Draws and quantises them.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let values: Vec<f32> = (0..POOL_BLOCKS * 16).map(|_| random.normal()).collect();
        let global = global_scale(amax(&values));
        let (codes, scales) = quantise_weights(&values, global);
        Self { codes, scales, global: global * DEVIATION }
    }

    /// Writes a checkpoint of MoE layers of one shape under Qwen3-MoE's names, as ModelOpt would, of a
    /// model whose tokens go to `top_k` experts.
    pub fn write(&self, shape: &Shape, (layers, top_k): (u32, u32), seed: u64) -> Result<TempDir> {
        let folder = TempDir::new()?;
        self.write_files(folder.path(), shape, (layers, top_k), seed)?;
        Ok(folder)
    }

    fn write_files(
        &self,
        folder: &Path,
        shape: &Shape,
        (layers, top_k): (u32, u32),
        seed: u64,
    ) -> Result<()> {
        let Shape { experts, hidden, intermediate, clamp } = *shape;
        let config = json!({
            "model_type": "qwen3_moe",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "moe_intermediate_size": intermediate,
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "swiglu_limit": clamp,
        });
        fs::write(folder.join("config.json"), config.to_string())?;
        let quantisation = json!({
            "producer": { "name": "modelopt" },
            "quantization": { "quant_algo": "NVFP4", "group_size": 16 },
        });
        fs::write(folder.join("hf_quant_config.json"), quantisation.to_string())?;
        let mut random = Random::new(seed);
        let mut tensors = Vec::new();
        for (layer, expert) in (0..layers).flat_map(|l| (0..experts).map(move |e| (l, e))) {
            let prefix = format!("model.layers.{layer}.mlp.experts.{expert}");
            self.expert(&prefix, shape, &mut random, &mut tensors);
        }
        safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors"))?;
        Ok(())
    }

    fn expert<'a>(
        &'a self,
        prefix: &str,
        shape: &Shape,
        random: &mut Random,
        tensors: &mut Vec<(String, Part<'a>)>,
    ) {
        let (hidden, intermediate) = (shape.hidden as usize, shape.intermediate as usize);
        // A scale differs from its neighbours' by up to a quarter, so that none can stand for another.
        let mut vary = |scale: f32| scale * (0.8 + 0.45 * random.unit());
        let input = vary(global_scale(INPUT_AMAX));
        // FC1 sums `hidden` products of deviation 0.05, and y is about the product of two such sums.
        let inner_amax = 2.0 * INPUT_AMAX * hidden as f32 * DEVIATION * DEVIATION;
        let inner = vary(global_scale(inner_amax));
        let scales = [input, input, inner].map(|input| (input, vary(self.global)));
        let extents = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]];
        for ((name, [rows, cols]), (input_scale, weight_scale_2)) in
            ["gate", "up", "down"].into_iter().zip(extents).zip(scales)
        {
            let first = random.below(POOL_BLOCKS);
            let prefix = format!("{prefix}.{name}_proj");
            let blocks = rows * cols / 16;
            let codes = Bytes::Pool { pool: &self.codes, block: 8, first, blocks };
            let block_scales = Bytes::Pool { pool: &self.scales, block: 1, first, blocks };
            let parts = [
                ("weight", Dtype::U8, vec![rows, cols / 2], codes),
                ("weight_scale", Dtype::F8_E4M3, vec![rows, cols / 16], block_scales),
                ("weight_scale_2", Dtype::F32, Vec::new(), Bytes::scalar(weight_scale_2)),
                ("input_scale", Dtype::F32, Vec::new(), Bytes::scalar(input_scale)),
            ];
            tensors.extend(parts.into_iter().map(|(part, dtype, shape, bytes)| {
                (format!("{prefix}.{part}"), Part { dtype, shape, bytes })
            }));
        }
    }
}

/// One tensor, whose bytes are put together when they are written.
struct Part<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes<'a>,
}

enum Bytes<'a> {
    /// Blocks of the pool from `first` on, round and round.
    Pool {
        pool: &'a [u8],
        block: usize,
        first: usize,
        blocks: usize,
    },
    Scalar([u8; 4]),
}

impl Bytes<'_> {
    fn scalar(value: f32) -> Self {
        Self::Scalar(value.to_le_bytes())
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.bytes {
            Bytes::Pool { pool, block, first, .. } => {
                let mut bytes = Vec::with_capacity(self.data_len());
                let mut rest = &pool[first * block..];
                while bytes.len() < self.data_len() {
                    let take = rest.len().min(self.data_len() - bytes.len());
                    bytes.extend_from_slice(&rest[..take]);
                    rest = pool;
                }
                Cow::Owned(bytes)
            }
            Bytes::Scalar(ref bytes) => Cow::Borrowed(bytes),
        }
    }

    fn data_len(&self) -> usize {
        match self.bytes {
            Bytes::Pool { block, blocks, .. } => block * blocks,
            Bytes::Scalar(bytes) => bytes.len(),
        }
    }
}
