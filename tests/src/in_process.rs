//! Calls of a CPU device in this process, with buffers as an engine's.

use anyhow::Result;
use half::bf16;
use kernels::cpu::CpuDevice;
use kernels::device::{CallOffsets, Device, LayerCall};
use kernels::memory::SharedMemory;
use kernels::problem::{ActFormat, Form, WeightsIn};
use reference::layer::{Inputs, Variant};

/// The device's form of a variant of the reference.
#[must_use]
pub fn form(variant: Variant) -> Form {
    Form {
        act: if variant.nvfp4 { ActFormat::Nvfp4 } else { ActFormat::Bf16 },
        weights_in: if variant.weights_in_combine { WeightsIn::Combine } else { WeightsIn::Fc1 },
    }
}

/// Runs `inputs` through one layer; returns bf16 bits.
pub fn call(
    device: &mut CpuDevice,
    layer: u32,
    variant: Variant,
    inputs: &Inputs,
) -> Result<Vec<u16>> {
    let (row_bytes, place_bytes) = (inputs.x.len() as u64 * 2, inputs.ids.len() as u64 * 4);
    let offsets = CallOffsets {
        hidden: 0,
        output: row_bytes,
        topk_ids: 2 * row_bytes,
        topk_weights: 2 * row_bytes + place_bytes,
    };
    let buffer = SharedMemory::create("call", 2 * (row_bytes + place_bytes))?;
    let hidden: Vec<bf16> = inputs.x.iter().map(|&bits| bf16::from_bits(bits)).collect();
    buffer.write(offsets.hidden, &hidden);
    buffer.write(offsets.topk_ids, &inputs.ids);
    buffer.write(offsets.topk_weights, &inputs.weights);
    // What an earlier call might have left there must not come through.
    buffer.write(offsets.output, &vec![bf16::NAN; hidden.len()]);
    device.run(&LayerCall {
        layer,
        tokens: u32::try_from(inputs.tokens())?,
        top_k: u32::try_from(inputs.top_k)?,
        form: form(variant),
        buffer: &buffer,
        offsets,
    })?;
    let mut output = vec![bf16::ZERO; hidden.len()];
    buffer.read(offsets.output, &mut output);
    Ok(output.into_iter().map(bf16::to_bits).collect())
}
