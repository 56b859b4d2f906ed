"""Run llm-compressor's GPTQ on a model folder and given tokens; save weights, time, settings.

llm-compressor pins its own versions of transformers and others, so it lives in its own
environment and is run from there (Python 3.11, CPU; torch first, from a CPU wheel, and held in
place, or pip replaces it by the CUDA build, which is several GB):

    python -m venv llmc
    llmc/bin/pip install torch==2.13.0
    echo "torch==2.13.0" > llmc/constraints.txt
    llmc/bin/pip install -c llmc/constraints.txt llmcompressor==0.14.0.1
    llmc/bin/python benchmarks/peers/llmcompressor_gptq.py MODEL tokens.npy out.safetensors --bits 4

MODEL       a Hugging Face folder; loaded in float32, so that scales are float32 too
tokens.npy  int64 [windows, length]; one window is one calibration sample, taken in this order
out         float32 safetensors: module name -> dequantized weight, for every quantized linear;
            beside it out.json with seconds, versions, settings and the machine's load

The scheme is qframe's symmetric one: groups of `--group-size` inputs, scale = absmax / 7.5 and
codes -8..7 for 4 bits, lm_head left alone, order of columns by decreasing diagonal of the Hessian
with static groups. The seconds are those of `oneshot` alone: tracing, calibration and solving,
not imports, loading or saving.

What llm-compressor does, for who compares: the Hessians of all seven linears of a block come from
one pass of the block with its original weights, on inputs from the quantized blocks before it;
then all seven are quantized, and a second pass makes the next block's inputs.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

PACKAGES = ["llmcompressor", "compressed-tensors", "transformers", "torch", "numpy", "datasets"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="windows per forward pass")
    return parser.parse_args()


def dataset_of(tokens: np.ndarray) -> Dataset:
    """Return the windows as a tokenized dataset, every token attended to."""
    columns = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    return Dataset.from_dict(columns)


def quantized_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers that got a weight scheme, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None
    }


def largest_step_error(linears: dict[str, torch.nn.Linear], group_size: int) -> float:
    """Return the largest distance of weight / scale from an integer: 0 up to roundoff."""
    worst = 0.0
    for module in linears.values():
        steps = module.weight.unflatten(-1, (-1, group_size)) / module.weight_scale.unsqueeze(-1)
        worst = max(worst, (steps - steps.round()).abs().max().item())
    return worst


def main() -> None:
    options = arguments()
    tokens = np.load(options.tokens)
    if tokens.ndim != 2 or tokens.dtype != np.int64:
        found = f"{tokens.dtype} {list(tokens.shape)}"
        raise SystemExit(f"{options.tokens}: expected int64 [windows, length], found {found}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
    }
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder="static",
        dampening_frac=options.dampening_frac,
        block_size=options.block_size,
    )
    dataset = dataset_of(tokens)
    load_before = os.getloadavg()
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=modifier,
        batch_size=options.batch_size,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    with torch.no_grad():
        linears = quantized_linears(model)
        save_file(
            {name: module.weight.float().contiguous() for name, module in linears.items()},
            options.out,
        )
        step_error = largest_step_error(linears, options.group_size)
    scheme = next(iter(linears.values())).quantization_scheme.weights
    result: dict[str, Any] = {
        "peer": "llm-compressor GPTQ (oneshot)",
        "quantize_wall_s": round(wall, 2),
        "quantize_cpu_s": round(cpu, 2),
        "quantized_linears": len(linears),
        "largest_step_error": step_error,
        "fallbacks_to_rtn": modifier._rtn_fallback_module_names,
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "settings": scheme.model_dump(mode="json", exclude_none=True)
        | {
            "scale_dtype": str(next(iter(linears.values())).weight_scale.dtype),
            "dampening_frac": options.dampening_frac,
            "block_size": options.block_size,
            "batch_size": options.batch_size,
            "ignore": ["lm_head"],
        },
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
