//! A call of one layer: in this process on a CPU device, or through a worker.

use anyhow::{Context, Result, ensure};
use half::bf16;
use kernels::device::{CallError, CallOffsets, Device, LayerCall};
use kernels::memory::SharedMemory;
use kernels::problem;
use protocol::client::{ClientError, Engine};
use protocol::message::{ActFormat, Attach, Call, Phase, WeightsIn};
use reference::layer::{Inputs, Variant};

/// What an engine attaches for.
#[must_use]
pub fn attach(variant: Variant, max_tokens: usize) -> Attach {
    Attach {
        act: if variant.nvfp4 { ActFormat::Nvfp4 } else { ActFormat::Bf16 },
        weights_in: if variant.weights_in_combine { WeightsIn::Combine } else { WeightsIn::Fc1 },
        max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
    }
}

/// The call of a layer that `inputs` are for.
#[must_use]
pub fn call_of(layer: u32, phase: Phase, inputs: &Inputs) -> Call {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let (tokens, top_k) = (number(inputs.tokens()), number(inputs.top_k));
    Call { layer, tokens, top_k, phase }
}

/// Runs `inputs` through one layer of a worker; returns bf16 bits.
pub fn through(
    engine: &mut Engine,
    layer: u32,
    phase: Phase,
    inputs: &Inputs,
) -> Result<Vec<u16>, ClientError> {
    engine.write_inputs(&inputs.x, &inputs.ids, &inputs.weights)?;
    engine.call(call_of(layer, phase, inputs))?;
    let mut output = vec![0; inputs.x.len()];
    engine.read_output(&mut output)?;
    Ok(output)
}

/// A call in this process, its inputs in a buffer.
#[derive(Debug)]
pub struct InProcess {
    buffer: SharedMemory,
    offsets: CallOffsets,
    form: problem::Form,
    /// Layer, tokens and top-k.
    call: (u32, u32, u32),
    elements: usize,
}

impl InProcess {
    /// Writes the inputs.
    pub fn new(layer: u32, variant: Variant, inputs: &Inputs) -> Result<Self> {
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
        let Attach { act, weights_in, .. } = attach(variant, 0);
        let form = problem::Form {
            act: act.to_string().parse()?,
            weights_in: weights_in.to_string().parse()?,
        };
        let call = (layer, u32::try_from(inputs.tokens())?, u32::try_from(inputs.top_k)?);
        Ok(Self { buffer, offsets, form, call, elements: hidden.len() })
    }

    /// Runs the call.
    pub fn run(&self, device: &mut dyn Device) -> Result<(), CallError> {
        let Self { ref buffer, offsets, form, call: (layer, tokens, top_k), .. } = *self;
        device.run(&LayerCall { layer, tokens, top_k, form, buffer, offsets })
    }

    /// The output's bf16 bits.
    #[must_use]
    pub fn output(&self) -> Vec<u16> {
        let mut output = vec![bf16::ZERO; self.elements];
        self.buffer.read(self.offsets.output, &mut output);
        output.into_iter().map(bf16::to_bits).collect()
    }
}

/// Runs `inputs` through one layer of a device in this process; returns bf16 bits.
pub fn in_process(
    device: &mut dyn Device,
    layer: u32,
    variant: Variant,
    inputs: &Inputs,
) -> Result<Vec<u16>> {
    let call = InProcess::new(layer, variant, inputs)?;
    call.run(device)?;
    Ok(call.output())
}

/// The first layer that a worker serves, which is the one that cases are about.
pub fn first_layer(engine: &Engine) -> Result<u32> {
    let layer = engine.layers().first().context("the worker serves no layer")?;
    ensure!(layer.experts > 0, "layer {} has no experts", layer.number);
    Ok(layer.number)
}
