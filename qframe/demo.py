"""The demonstration: a real language model, quantized five ways, in one table.

Model and text come from `qframe.embedded`. Everything that decides the result stands at the top.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qframe import parallel
from qframe.checkpoint import load
from qframe.embedded import model_folder
from qframe.evaluation import Protocol, Score, evaluate, windows_of
from qframe.host import Host
from qframe.memory import folder_bytes, readable_bytes, stored_bits_per_weight
from qframe.model import Network
from qframe.pipeline import Progress, Result, quantize
from qframe.recipe import Recipe
from qframe.report.table import ScoreRow, figures
from qframe.weights import ModelFolder

GROUP_SIZE = 64  # the hidden size, 576, is not a multiple of 128
CALIBRATION_SAMPLES = 48
WINDOW = 512  # tokens, of calibration and of evaluation
EVALUATION_WINDOWS = 24
GPTQ_OPTIONS: Mapping[str, Any] = {}  # the defaults of the plugin
METHODS = (("rtn", 8), ("rtn", 4), ("gptq", 4), ("rtn", 3), ("gptq", 3))
"""(method, bits), in the order of the table."""

BASELINE = "rtn"
CAUTION = (
    "The weights of this model come from a 4-bit grid of groups of 32 (Q4_1): never judge 4-bit "
    "asymmetric quantization with groups of 32 by it, which would look lossless."
)


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demonstration found.

    rows      one per network, full precision first
    scores    the same as measured, by name
    reports   name -> the layers' report, without full precision
    seconds   name -> how long quantizing took
    """

    rows: list[ScoreRow]
    protocol: Protocol
    calibration: Mapping[str, Any]
    reports: Mapping[str, Any]
    seconds: Mapping[str, float]

    def notes(self) -> dict[str, str]:
        """Return what belongs under the table, by what it is about."""
        used = self.calibration
        calibrated = (
            f"{used['windows']} windows of {used['max_seq_length']} tokens of {used['name']} "
            f"(calibration half, sha256 {str(used['sha256'])[:12]}), "
            f"{used['windows_held_out']} held out"
        )
        return {
            "protocol": self.protocol.line(),
            "calibration": calibrated,
            "scheme": f"symmetric, groups of {GROUP_SIZE} (576 columns are not a multiple of "
            f"128), 16-bit scales, all linear layers of the blocks; embeddings as they are",
            "gain": "mean KL of RTN over mean KL of the method, both with the same bits",
            "caution": CAUTION,
        }

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "networks": [dataclasses.asdict(row) for row in self.rows],
            "protocol": dataclasses.asdict(self.protocol),
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "notes": self.notes(),
            "reports": dict(self.reports),
        }

    def markdown(self) -> str:
        """Return the table and the notes as Markdown."""
        lines = [
            "| network | perplexity | mean KL | p99 KL | top-1 | gain | bits/weight | weights |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in self.rows:
            gain = "" if row.gain is None else f"{row.gain:.2f}x"
            top1 = "" if row.top1 is None else f"{100 * row.top1:.1f} %"
            lines.append(
                f"| {row.name} | {figures(row.perplexity, 5)} ± {figures(row.perplexity_stderr)} "
                f"| {figures(row.kl_mean)} | {figures(row.kl_p99)} | {top1} | {gain} "
                f"| {row.bits_per_weight or 0:.2f} | {readable_bytes(row.weights_bytes or 0)} |"
            )
        return "\n".join([*lines, "", *(f"- {k}: {v}" for k, v in self.notes().items())]) + "\n"


def recipe_of(method: str, bits: int) -> Recipe:
    """Return the recipe of one row of the table."""
    fields: dict[str, Any] = {
        "method": method,
        "scheme": {"num_bits": bits, "symmetric": True, "group_size": GROUP_SIZE},
    }
    if method == "gptq":
        fields["options"] = GPTQ_OPTIONS
        fields["calibration"] = {
            "num_calibration_samples": CALIBRATION_SAMPLES,
            "max_seq_length": WINDOW,
        }
    return Recipe.parse(fields, "demo")


def demonstrate(
    *,
    windows: int = EVALUATION_WINDOWS,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] | None = None,
) -> Demonstration:
    """Quantize the embedded model in every way of METHODS, and evaluate all of them.

    windows    of evaluation text
    say        called with one line for each step
    progress   called after each block of each network

    Raises QframeError when the model cannot be fetched or a run fails.
    """
    threads = threads or parallel.default_threads()
    say("looking for the model")
    folder = model_folder(progress=say)
    say(f"model: {folder}")
    tokens, protocol = windows_of(folder, length=WINDOW, limit=windows)
    host = Host.discover()
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="qframe-demo-") as temporary:
        for method, bits in METHODS:
            name = f"{method.upper()} W{bits}"
            say(f"{name}: quantizing")
            started = time.perf_counter()
            results[name] = quantize(
                folder,
                recipe_of(method, bits),
                out=Path(temporary, f"{method}-{bits}"),
                host=host,
                threads=threads,
                progress=progress,
            )
            seconds[name] = time.perf_counter() - started
            say(f"{name}: {len(results[name].report.layers)} layers in {seconds[name]:.1f} s")
        say(f"scoring {len(results) + 1} networks on {len(tokens)} windows of {WINDOW} tokens")
        started = time.perf_counter()
        scores = _score(folder, Path(temporary), tokens, threads)
        say(f"scored in {time.perf_counter() - started:.1f} s")
        rows = _rows(scores)
    return Demonstration(
        rows=rows,
        protocol=protocol,
        calibration=next(r.report.calibration for r in results.values() if r.report.calibration),
        reports={name: json.loads(r.report.to_json()) for name, r in results.items()},
        seconds=seconds,
    )


def _score(
    folder: Path, temporary: Path, tokens: Any, threads: int
) -> dict[str, tuple[Score, float, int]]:
    """Return name -> (score, bits per weight, bytes of weights); "" is full precision."""
    reference = Network.from_folder(ModelFolder(folder))
    reference.load(reference.module, recurse=True)
    outs = {f"{m.upper()} W{bits}": temporary / f"{m}-{bits}" for m, bits in METHODS}
    networks = {name: load(out, dequantize=True) for name, out in outs.items()}
    scores = evaluate(networks, reference.module, tokens, threads=threads)
    sizes = {name: info.size for name, info in reference.layers.items() if name != "lm_head"}
    return {
        name: (
            score,
            stored_bits_per_weight(ModelFolder(outs.get(name, folder)), sizes),
            folder_bytes(outs.get(name, folder))["weights"],
        )
        for name, score in scores.items()
    }


def _rows(scores: Mapping[str, tuple[Score, float, int]]) -> list[ScoreRow]:
    """Return the rows of the table."""
    rows = []
    for name, (score, bits, size) in scores.items():
        baseline = f"{BASELINE.upper()} {name.rpartition(' ')[2]}"
        compared = baseline in scores and baseline != name
        full_precision = name == ""
        rows.append(
            ScoreRow(
                name="full precision" if full_precision else name,
                perplexity=score.perplexity,
                perplexity_stderr=score.perplexity_stderr,
                kl_mean=None if full_precision else score.kl_mean,
                kl_p99=None if full_precision else score.kl_p99,
                top1=None if full_precision else score.top1,
                bits_per_weight=bits,
                weights_bytes=size,
                gain=scores[baseline][0].kl_mean / score.kl_mean if compared else None,
            )
        )
    return rows
