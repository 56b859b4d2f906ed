"""Is mixed precision better than as many bits everywhere? Writes docs/mixed_precision.md.

    python benchmarks/mixed_precision.py
    python benchmarks/mixed_precision.py --methods rtn --targets 3.25 --out found.md

Every recipe quantizes the demonstration's model by its protocol (`qframe.demo`), uniformly and to a
target of as many stored bits; what is compared is the mean KL divergence from full precision, on
text that calibration never sees, and beside it what was predicted. Before that, predictions for
single layers are held against KL with that layer rounded and all others as they were.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import kept
from torch import nn
from transformers import AutoModelForCausalLM

from qframe import Recipe, load
from qframe.calibration import prepare
from qframe.comparison.identity import evaluation_identity, model_identity
from qframe.demo import CALIBRATION_SAMPLES, GROUP_SIZE, WINDOW, recipe_of
from qframe.embedded import model_folder
from qframe.evaluation import evaluate, windows_of
from qframe.fisher import Rounded
from qframe.host import Host
from qframe.model import Network, set_weight
from qframe.parallel import default_threads
from qframe.pipeline import quantize
from qframe.recipe import CalibrationSettings
from qframe.scheme import Scheme
from qframe.sensitivity import measure
from qframe.sensitivity import windows_of as windows_to_measure
from qframe.weights import ModelFolder

DOCUMENT = Path(__file__).parent.parent / "docs" / "mixed_precision.md"
ALONE = (2, 3, 4)  # bits at which single layers are looked at
SCALES = 16 / GROUP_SIZE  # bits of a weight


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one recipe gave.

    score      KL divergence, mean and p99
    predicted  sum over layers, and that of as many bits everywhere
    counts     bits -> layers
    tried      allocation -> KL of the network rounded to nearest; `chosen` is one of them

    The last four are empty for a uniform recipe.
    """

    bits: float
    score: dict[str, float]
    predicted: list[float]
    counts: dict[str, int]
    tried: dict[str, float]
    chosen: str


@torch.no_grad()
def alone(folder: Path, every: int, windows: int) -> dict[str, list[float]]:
    """Return bits -> predicted over measured KL of single layers, on text of the calibration."""
    host = Host.discover()
    network = Network.from_folder(ModelFolder(folder))
    network.load(network.module, recurse=True)
    settings = CalibrationSettings(
        num_calibration_samples=CALIBRATION_SAMPLES, max_seq_length=WINDOW
    )
    data = prepare(folder, settings)
    names = [name for name in network.layers if name != "lm_head"][::every]
    schemes = {
        name: [Scheme(num_bits=bits, group_size=GROUP_SIZE) for bits in ALONE] for name in names
    }
    found = measure(network, schemes, data, host, seed=42, threads=default_threads())
    text = [window for (window,) in windows_to_measure(data.inputs)[:windows]]
    rounded = Rounded({name: network.weight(name) for name in names}, schemes, host)
    reference = evaluated(network.module, text)
    ratios: dict[str, list[float]] = {str(bits): [] for bits in ALONE}
    for name in names:
        module, weight = network.module.get_submodule(name), network.weight(name)
        changes = zip(ALONE, found.losses[name], rounded.changes(name), strict=True)
        for bits, predicted, change in changes:
            set_weight(module, weight + change)
            measured = [
                float((p.exp() * (p - q)).sum(-1).mean())
                for p, q in zip(reference, evaluated(network.module, text), strict=True)
            ]
            ratios[str(bits)].append(predicted / statistics.fmean(measured))
            print(f"{name} at {bits} bits: {ratios[str(bits)][-1]:.2f}", flush=True)
        set_weight(module, weight)
    return ratios


def evaluated(network: nn.Module, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return log-probabilities, [length, vocabulary] for each window."""
    return [torch.log_softmax(network(w, use_cache=False).logits[0], -1) for w in windows]


def alone_table(ratios: Mapping[str, list[float]]) -> list[str]:
    """Return what `alone` found as lines of Markdown."""
    lines = ["| bits | layers | median | off by a factor of, typically | least | most |"]
    lines.append("|--:|--:|--:|--:|--:|--:|")
    for bits, found in ratios.items():
        off = math.exp(math.sqrt(statistics.fmean(math.log(ratio) ** 2 for ratio in found)))
        lines.append(
            f"| {bits} | {len(found)} | {statistics.median(found):.2f} | {off:.2f} | "
            f"{min(found):.2f} | {max(found):.2f} |"
        )
    return lines


def recipes(methods: list[str], targets: list[float]) -> dict[str, Recipe]:
    """Return name -> recipe: as many whole bits everywhere, and mixed."""
    found = {}
    for target in targets:
        for method in methods:
            uniform = recipe_of(method, round(target - SCALES))
            found[f"{method} W{round(target - SCALES)} everywhere"] = uniform
            fields = uniform.model_dump(exclude_unset=True)
            calibration = {"num_calibration_samples": CALIBRATION_SAMPLES, "max_seq_length": WINDOW}
            if method != "rtn":  # which is not to be measured on text
                fields["calibration"] = calibration
            found[f"{method} mixed, {target:g}"] = Recipe.parse(
                {**fields, "target_bits": target}, "mixed"
            )
    return found


def made(
    folder: Path, recipe: Recipe, reference: nn.Module, windows: torch.Tensor
) -> dict[str, Any]:
    """Quantize, and score what comes out; return the fields of a row."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        report = quantize(folder, recipe, out=out).report
        score = evaluate({"it": load(out, dequantize=True)}, reference, windows)["it"]
    size = sum(layer.rows * layer.columns for layer in report.layers)
    bits = sum(layer.bits_per_weight * layer.rows * layer.columns for layer in report.layers)
    found = report.allocation
    row = Row(
        bits=bits / size,
        score=score.record(),
        predicted=[found.predicted, found.uniform[max(found.uniform)]] if found else [],
        counts={str(bits): n for bits, n in found.counts().items()} if found else {},
        tried=dict(found.tried) if found else {},
        chosen=found.chosen if found else "",
    )
    return asdict(row)


def document(rows: Mapping[str, Row], ratios: Mapping[str, list[float]], protocol: str) -> str:
    """Return docs/mixed_precision.md."""
    lines = [
        "# What mixed precision gains",
        "",
        "Made by `benchmarks/mixed_precision.py`. Mean and p99 KL divergence from full precision,",
        "in nats, on text that nothing was measured on. Predicted: the sum over layers, to second",
        "order and rounded to nearest; in brackets as many bits everywhere.",
        "",
        "| recipe | bits/weight | mean KL | p99 KL | predicted | layers x bits |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, row in rows.items():
        predicted = "{:.3f} ({:.3f})".format(*row.predicted) if row.predicted else ""
        counts = ", ".join(f"{n} x {bits}" for bits, n in row.counts.items())
        lines.append(
            f"| {name} | {row.bits:.3f} | {row.score['kl_mean']:.3f} | {row.score['kl_p99']:.2f} | "
            f"{predicted} | {counts} |"
        )
    lines += [
        "",
        f"SmolLM2-135M-Instruct, symmetric, groups of {GROUP_SIZE}; {protocol}.",
        "",
        "What was tried, KL of the network rounded to nearest on four windows of calibration text;",
        "the one that was taken is bold:",
        "",
        "| recipe | tried | KL |",
        "|---|---|--:|",
    ]
    for name, row in rows.items():
        for way, loss in row.tried.items():
            mark = "**" if way == row.chosen else ""
            lines.append(f"| {name} | {mark}{way}{mark} | {mark}{loss:.3f}{mark} |")
    if ratios:
        lines += [
            "",
            "## Predictions for single layers",
            "",
            "Predicted KL over KL as it is measured with that layer rounded and all others as they",
            "were, on two windows of the calibration text. The factor is from the root mean square",
            "of the logarithm.",
            "",
            *alone_table(ratios),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help="of evaluation text")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--targets", nargs="+", type=float, default=[4.25, 3.25])
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    parser.add_argument("--every", type=int, default=8, help="single layer; 0: none")
    parser.add_argument("--store", type=Path, help="folder that keeps finished measurements")
    given = parser.parse_args()
    folder = model_folder()
    windows, protocol = windows_of(folder, length=WINDOW, limit=given.windows)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    identity = {
        "model": model_identity(ModelFolder(folder)),
        "windows": evaluation_identity(protocol, windows),
    }
    ratios = {}
    if given.every:
        said = {**identity, "bits": ALONE, "every": given.every}
        ratios = kept(given.store, "alone", said, partial(alone, folder, given.every, windows=2))
    rows: dict[str, Row] = {}
    for name, recipe in recipes(given.methods, given.targets).items():
        said = {**identity, "recipe": recipe.model_dump(mode="json")}
        work = partial(made, folder, recipe, reference, windows)
        rows[name] = Row(**kept(given.store, name, said, work))
        print(f"{name}: {rows[name].bits:.3f} bits, {rows[name].score}", flush=True)
        given.out.write_text(document(rows, ratios, protocol.line()), encoding="utf-8")


if __name__ == "__main__":
    main()
