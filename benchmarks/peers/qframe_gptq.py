"""Run qframe's GPTQ on given calibration tokens, as benchmarks/compare_gptq.py wants it.

Writes the dequantized weight of every quantized layer (name -> float32) to a safetensors file,
and beside it a JSON file with the seconds of the quantization itself: reading the model's weights
and writing the quantized folder are included, imports and loading the kernels are not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import qframe
from qframe import CalibrationData
from qframe.pipeline import plan_job
from qframe.stored_model import StoredModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help=".npy, int64 [windows, length]")
    parser.add_argument("output", type=Path, help=".safetensors to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dampening-frac", type=float, default=None, help="default: qframe's")
    parser.add_argument("--compute-dtype", default="auto")
    arguments = parser.parse_args()

    warm_up(arguments.model)
    windows = torch.from_numpy(np.load(arguments.tokens))
    options = {}
    if arguments.dampening_frac is not None:
        options["dampening_frac"] = arguments.dampening_frac
    recipe = {
        "method": "gptq",
        "options": options,
        "scheme": {
            "num_bits": arguments.bits,
            "group_size": arguments.group_size,
            "scale_dtype": "float32",
        },
        "calibration": {"compute_dtype": arguments.compute_dtype},
    }
    data = CalibrationData.from_tokens(windows, windows[:0], {"name": str(arguments.tokens.name)})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        wall, cpu = time.perf_counter(), time.process_time()
        qframe.quantize(arguments.model, recipe, out=out, calibration=data)
        seconds = {
            "quantize_wall_s": time.perf_counter() - wall,
            "quantize_cpu_s": time.process_time() - cpu,
        }
        layers = StoredModel.open(out).layers()
        weights = {name: layer.weight() for name, layer in layers}
    save_file(weights, str(arguments.output))
    record = {**seconds, "qframe": qframe.__version__, "recipe": recipe}
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(seconds))


def warm_up(model: Path) -> None:
    """Import the network's class and load the compiled kernels, as every process does once."""
    plan_job(model, {"method": "gptq"})
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    data = CalibrationData.from_tensors([torch.randn(64, 64)])
    qframe.quantize(net, {"method": "gptq"}, calibration=data)


if __name__ == "__main__":
    main()
