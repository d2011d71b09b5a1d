"""Writes this folder: a Mixtral-like layer quantised by the package `compressed-tensors`.

The package does everything that a file of its format depends on: global scales
(`generate_gparam`), block scales (`calculate_qparams`), codes and names (`ModelCompressor`), the
configuration (`update_config`). `expected.safetensors` holds the weights that it reads back, in
fp32, under each projection's name.

Made with Python 3.11, compressed-tensors 0.20.0, torch 2.15.0 (on the CPU), safetensors 0.8.0:

    pip install compressed-tensors==0.20.0 torch==2.15.0 safetensors==0.8.0
    python make.py
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 32


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.w3 = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block_sparse_moe = Moe()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer()])


def calibrate(linear, inputs):
    """Sets the scales of one projection from its weight and some inputs."""
    args = linear.quantization_scheme.weights
    weight = linear.weight.data.float()
    gparam = generate_gparam(weight.min(), weight.max())
    groups = weight.unflatten(-1, (-1, args.group_size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=gparam)
    linear.weight_global_scale.data.copy_(gparam)
    linear.weight_scale.data.copy_(scale)
    linear.input_global_scale.data.copy_(generate_gparam(inputs.min(), inputs.max()))


def main():
    torch.manual_seed(7)
    model = Model()
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme("NVFP4", ["Linear"])},
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(model, config)
    for number, expert in enumerate(model.model.layers[0].block_sparse_moe.experts):
        # Gate and up see the same inputs but have weights of their own size.
        x, y = torch.randn(16, HIDDEN) * (number + 1), torch.randn(16, INTERMEDIATE)
        expert.w3.weight.data *= 3
        calibrate(expert.w1, x)
        calibrate(expert.w3, x)
        calibrate(expert.w2, y)

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, HERE / "model.safetensors", metadata={"format": "pt"})

    facts = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_local_experts": EXPERTS,
    }
    (HERE / "config.json").write_text(json.dumps(facts))
    compressor.update_config(str(HERE))

    expected = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, half = module.weight_packed.shape
        codes = unpack_fp4_from_uint8(module.weight_packed, rows, 2 * half, dtype=torch.float32)
        expected[name] = dequantize(
            x_q=codes,
            scale=module.weight_scale.float(),
            args=module.quantization_scheme.weights,
            global_scale=module.weight_global_scale,
            dtype=torch.float32,
        ).contiguous()
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
