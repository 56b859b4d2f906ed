"""SmolLM2, quantized by qframe, under the software that others use: a nightly check, and a table.

    pip install -c constraints.txt -e '.[dev]'
    python benchmarks/interop.py --out docs/interop.md

Every row loads a folder or file that qframe wrote into another program and compares what that
computes with what qframe does on the same tokens. A row that is not as it should be ends the script
with an error, after the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qframe
from qframe.calibration import tokenize
from qframe.conversion import convert
from qframe.embedded import model_folder, topics_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "interop"))
from llama_cpp import Model, library

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "GPTQ, W4, groups of 64": {
        "method": "gptq",
        "scheme": {"num_bits": 4, "group_size": 64},
        "calibration": {"num_calibration_samples": 16, "max_seq_length": 256},
    },
    "RTN, W8, groups of 64": {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 64}},
}
WINDOW = 512
CLOSE = 0.005  # of perplexity: what llama.cpp may be off by, since it rounds activations


@dataclass(frozen=True)
class Row:
    """A comparison: what was loaded where, what came out, and whether that is as it should be."""

    recipe: str
    reader: str
    found: str
    good: bool


def main() -> None:
    arguments = _arguments()
    folder = model_folder()
    tokens = tokenize(folder, [topics_text()[1]])
    windows = [torch.from_numpy(tokens[i * WINDOW :][:WINDOW]) for i in range(arguments.windows)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, recipe) in enumerate(RECIPES.items()):
            out = Path(scratch) / f"{number}"
            qframe.quantize(folder, recipe, out=out)
            ours = qframe.load(out, dequantize=True)
            for check in CHECKS:
                row = check(name, out, ours, windows)
                print(row, flush=True)
                rows.append(row)
    text = document(rows, len(windows))
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    if wrong := [row for row in rows if not row.good]:
        raise SystemExit(f"not as it should be: {wrong}")


def in_transformers(
    name: str, out: Path, ours: torch.nn.Module, windows: list[torch.Tensor]
) -> Row:
    """The folder as it is, by transformers with compressed-tensors: the same logits."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    same = True
    with torch.no_grad():
        for window in windows[:2]:
            same &= torch.equal(theirs(window[None]).logits, ours(window[None]).logits)
    found = "the same logits, bit for bit" if same else "other logits"
    return Row(name, f"transformers, {_version('compressed-tensors')}", found, same)


def in_llama_cpp(name: str, out: Path, ours: torch.nn.Module, windows: list[torch.Tensor]) -> Row:
    """As GGUF, by llama.cpp: nearly the same perplexity."""
    reader = f"llama.cpp, {_version('xllamacpp')}"
    if util.find_spec("xllamacpp") is None:
        return Row(name, reader, "not installed", False)
    file = out.with_suffix(".gguf")
    convert(out, "gguf", file)
    model = Model(library(), file, tokens=WINDOW)
    mine = perplexity(lambda window: ours(window[None]).logits[0], windows)
    theirs = perplexity(lambda window: torch.from_numpy(model.logits(window.numpy())), windows)
    model.close()
    apart = theirs / mine - 1
    found = f"perplexity {theirs:.3f}, qframe {mine:.3f}: {100 * apart:+.2f} %"
    return Row(name, reader, found, abs(apart) < CLOSE)


def in_onnxruntime(name: str, out: Path, ours: torch.nn.Module, windows: list[torch.Tensor]) -> Row:
    """As an ONNX graph, by onnxruntime: the same perplexity, as far as float32 goes."""
    import onnxruntime

    file = out.with_suffix(".onnx")
    convert(out, "onnx", file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def logits(window: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": window[None].numpy()})[0][0])

    mine = perplexity(lambda window: ours(window[None]).logits[0], windows)
    theirs = perplexity(logits, windows)
    apart = theirs / mine - 1
    found = f"perplexity {theirs:.3f}, qframe {mine:.3f}: {100 * apart:+.4f} %"
    return Row(name, f"ONNX Runtime, {_version('onnxruntime')}", found, abs(apart) < CLOSE)


CHECKS: list[Callable[[str, Path, torch.nn.Module, list[torch.Tensor]], Row]] = [
    in_transformers,
    in_llama_cpp,
    in_onnxruntime,
]


def perplexity(
    logits: Callable[[torch.Tensor], torch.Tensor], windows: list[torch.Tensor]
) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of a window."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            scores = logits(window)[:-1].double().log_softmax(-1)
            total -= float(scores.gather(1, window[1:, None]).sum())
            count += len(window) - 1
    return float(np.exp(total / count))


def document(rows: list[Row], windows: int) -> str:
    """Return the table."""
    lines = [
        "# Measured: what others make of it",
        "",
        "Made by `benchmarks/interop.py`, which runs every night and ends with an error when a row",
        "is not as it should be. SmolLM2-135M-Instruct, quantized by qframe, loaded by other",
        f"software and run on the same tokens ({windows} windows of {WINDOW} of the second half of",
        "Python's `pydoc_data.topics`). llama.cpp rounds activations to eight bits whatever the",
        "weights, so its perplexity is another one: by less than half a per cent.",
        "",
        "| quantized with | read by | what it computes |",
        "|---|---|---|",
    ]
    lines += [f"| {row.recipe} | {row.reader} | {row.found} |" for row in rows]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the document here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
