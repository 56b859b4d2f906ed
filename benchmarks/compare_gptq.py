"""qframe's GPTQ against llm-compressor's: same model, same tokens, same scheme, one run.

The two run in turn, each in its own process and environment, several times; times are compared
pair by pair. Their results are compared on

  * the summed layer objective tr((W - Q) H (W - Q)^T), H = (2/n) X^T X from the inputs X that the
    layer gets on the calibration tokens, (a) in the full-precision network and (b) in the network
    that is quantized up to that layer's block, each tool's own: what each of them minimizes;
  * mean KL divergence to full precision on evaluation tokens that neither has seen.

Make llm-compressor's environment as the docstring of peers/llmcompressor_gptq.py says, then

    python benchmarks/compare_gptq.py --peer-python PEER_VENV/bin/python --runs 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qframe.calibration import read_text, tokenize
from qframe.embedded import model_folder
from qframe.evaluation import evaluate
from qframe.model import find_layers

PEERS = Path(__file__).parent / "peers"
WINDOW = 512


def tokens_of(folder: Path, part: str, windows: int) -> np.ndarray:
    """Return the first windows of a half of the text, [windows, WINDOW]."""
    tokens = tokenize(folder, read_text("topics", part))
    return tokens[: windows * WINDOW].reshape(windows, WINDOW)


def load_reference(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized_copy(folder: Path, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    model = load_reference(folder)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model


@torch.no_grad()
def objective(
    model: nn.Module, original: nn.Module, weights: Mapping[str, torch.Tensor], tokens: np.ndarray
) -> float:
    """Return sum over layers of tr((W - Q) H (W - Q)^T), H from the inputs in `model`.

    ||X (W - Q)^T||^2 is summed directly, window by window, in float64.
    """
    total = 0.0
    differences = {n: original.get_submodule(n).weight - w for n, w in weights.items()}

    def hook(name: str):
        def measure(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal total
            x = args[0].reshape(-1, args[0].shape[-1])
            total += float((x @ differences[name].T).square().sum(dtype=torch.float64))

        return measure

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in find_layers(model)
        if name in weights
    ]
    for window in torch.from_numpy(tokens).split(4):
        model.model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    return 2 * total / tokens.size


def run(command: list[str]) -> None:
    """Run one tool; its log is shown only when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = model_folder()
    calibration = tokens_of(folder, "calibration", arguments.windows)
    evaluation = torch.from_numpy(tokens_of(folder, "evaluation", arguments.eval_windows))
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, calibration)
        for bits in arguments.bits:
            results[bits] = compare(arguments, folder, tokens, bits, calibration, evaluation)
            print(json.dumps({bits: results[bits]}, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(
    arguments: argparse.Namespace,
    folder: Path,
    tokens: Path,
    bits: int,
    calibration: np.ndarray,
    evaluation: torch.Tensor,
) -> dict[str, object]:
    settings = ["--bits", str(bits), "--dampening-frac", str(arguments.dampening_frac)]
    tools = {
        "llm-compressor": (arguments.peer_python, PEERS / "llmcompressor_gptq.py"),
        "qframe": (sys.executable, PEERS / "qframe_gptq.py"),
    }
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    outputs = {tool: tokens.with_name(f"{tool}-{bits}.safetensors") for tool in tools}
    for _ in range(arguments.runs):
        for tool, (python, script) in tools.items():
            run([python, str(script), str(folder), str(tokens), str(outputs[tool]), *settings])
            record = json.loads(outputs[tool].with_suffix(".json").read_text())
            seconds[tool].append(record["quantize_wall_s"])
            print(f"{bits} bits, {tool}: {seconds[tool][-1]:.1f} s", flush=True)
    return {
        "seconds": seconds,
        "speedup (median of pairs)": statistics.median(
            peer / mine for peer, mine in zip(*seconds.values(), strict=True)
        ),
        **quality(folder, {t: load_file(o) for t, o in outputs.items()}, calibration, evaluation),
    }


def quality(
    folder: Path,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    calibration: np.ndarray,
    evaluation: torch.Tensor,
) -> dict[str, object]:
    """Return objectives and KL of both tools, and qframe's as a share of llm-compressor's."""
    reference = load_reference(folder)
    models = {tool: quantized_copy(folder, w) for tool, w in weights.items()}
    found: dict[str, dict[str, float]] = {
        "objective, full-precision inputs": {
            tool: objective(reference, reference, w, calibration) for tool, w in weights.items()
        },
        "objective, inputs of the quantized network": {
            tool: objective(models[tool], reference, w, calibration) for tool, w in weights.items()
        },
    }
    scores = evaluate(models, reference, evaluation)
    found["mean KL, held-out"] = {tool: scores[tool].kl_mean for tool in models}
    found["perplexity"] = {tool: scores[tool].perplexity for tool in models}
    return {
        measure: {**values, "ratio": values["qframe"] / values["llm-compressor"]}
        for measure, values in found.items()
    }


if __name__ == "__main__":
    main()
