"""Linear layers of other libraries that kernels.py times, each where it is installed.

bitsandbytes   LLM.int8() on the CPU: Linear8bitLt with threshold 6. Its layer of 4 bits is left
               out: the kernel for CPUs is fetched from the network when it is first used, and
               without it the weight is decoded before every product
torchao        Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig and
               IntxWeightOnlyConfig, as they come, without torch.compile, which needs a compiler;
               Int4WeightOnlyConfig has no kernel for CPUs
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

THRESHOLD = 6.0  # the paper's, and what kernels.py gives qframe


def layers(weight: torch.Tensor, group: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield name -> a layer of the weight [rows, columns] float32, for activations in float32.

    group   columns that share a scale where weights have four bits
    """
    if find_spec("bitsandbytes") is not None:
        yield "bitsandbytes LLM.int8()", _bitsandbytes(weight)
    if find_spec("torchao") is not None:
        yield from _torchao(weight, group)


def _bitsandbytes(weight: torch.Tensor) -> nn.Module:
    library = import_module("bitsandbytes")
    # It says at every call that it casts float32 to float16, which is part of what it does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    rows, columns = weight.shape
    layer = library.nn.Linear8bitLt(
        columns, rows, bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.weight = library.nn.Int8Params(
        weight.clone(), requires_grad=False, has_fp16_weights=False
    )
    moved: nn.Module = layer.to("cpu")  # which is when the weight gets its codes
    if layer.weight.dtype != torch.int8:
        raise RuntimeError(f"bitsandbytes left the weight {layer.weight.dtype}, expected int8")
    return moved


def _torchao(weight: torch.Tensor, group: int) -> Iterator[tuple[str, nn.Module]]:
    library = import_module("torchao.quantization")
    groups = library.PerGroup(group)
    configs = {
        "torchao W8A8": library.Int8DynamicActivationInt8WeightConfig(),
        "torchao W4A8": library.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=groups
        ),
        "torchao W4": library.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
    }
    for name, config in configs.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        network = nn.Sequential(layer)
        library.quantize_(network, config)
        if type(network[0].weight) is nn.Parameter:
            raise RuntimeError(f"torchao left the weight of {name} as it was")
        yield name, network
