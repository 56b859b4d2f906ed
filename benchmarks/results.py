"""What the literature promises, measured by qframe's own commands. Writes docs/results.md.

    python benchmarks/results.py --store results
    python benchmarks/results.py --store results --tables formats "two bits"

Every table is what one `qframe compare` command says, and the document shows the command. All of
them keep their cells in one store, so a run that was stopped goes on where it was; a table that is
finished stands in results.json, from which the document is written, so that some tables can be
measured again without the others. A promise is a comparison of figures from these tables; one that
does not hold is printed as such.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planted import LINE, planted

from qframe.embedded import model_folder

DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"
FOUND = Path(__file__).parent / "results.json"
PROTOCOL = ["--num-calibration-samples", "24", "--max-seq-length", "512", "--window", "512"]
AUTOROUND = "autoround:iterations=50"
TWO_BITS = ("optimal_rtn", "hqq", "gptq", "hadamard+gptq")
Cells = Mapping[tuple[str, str, str], Mapping[str, Any]]  # (table, method, scheme) -> row


@dataclass(frozen=True)
class Table:
    """One command: every method with every scheme.

    name      of the table, for promises
    title     what it shows
    methods, schemes, options   of the command
    planted   whether the network has outlier features planted
    """

    name: str
    title: str
    methods: Sequence[str]
    schemes: Sequence[str]
    options: Sequence[str] = ()
    planted: bool = False

    def command(self, limit: int) -> str:
        """Return the command as the document shows it."""
        model = "PLANTED" if self.planted else "MODEL"
        return shlex.join(["qframe", *self.arguments(model, "CMP", limit)])

    def arguments(self, model: str, store: str, limit: int) -> list[str]:
        """Return the command's arguments."""
        chosen = [f"-m {method}" for method in self.methods]
        chosen += [f"--scheme {scheme}" for scheme in self.schemes]
        words = ["compare", model, *" ".join(chosen).split(), *self.options, *PROTOCOL]
        return [*words, "--limit", str(limit), "--no-distributions", "-o", store]


TABLES = (
    Table(
        "eight bits",
        "Weights of eight bits, symmetric, groups of 64",
        ("rtn", "gptq"),
        ("W8A16",),
        ("--group-size", "64"),
    ),
    Table(
        "weights",
        "Weights, symmetric, groups of 64",
        ("rtn", "gptq", "qronos", "awq+gptq", "hadamard+gptq"),
        ("W4A16", "W3A16"),
        ("--group-size", "64"),
    ),
    Table(
        "asymmetric",
        "Weights, asymmetric, groups of 64",
        ("rtn", "awq", "hqq", "awq+gptq"),
        ("W4A16", "W3A16"),
        ("--group-size", "64", "--asymmetric"),
    ),
    Table(
        "learned",
        "Weights, asymmetric, groups of 64, learned",
        (AUTOROUND, f"hadamard+{AUTOROUND}"),
        ("W3A16",),
        ("--group-size", "64", "--asymmetric"),
    ),
    Table(
        "two bits",
        "Two bits, asymmetric, groups of 64",
        ("rtn", *TWO_BITS),
        ("W2A16",),
        ("--group-size", "64", "--asymmetric"),
    ),
    Table(
        "activations",
        "Weights and activations of eight bits",
        (
            "rtn",
            "llm_int8",
            "llm_int8:threshold=3",
            "llm_int8:threshold=1.5",
            "llm_int8:outliers=dynamic",
            "smoothquant",
            "smoothquant:alpha=search",
            "hadamard",
        ),
        ("W8A8",),
    ),
    Table(
        "planted",
        "The same with outlier features planted",
        ("rtn", "llm_int8", "llm_int8:threshold=1.5", "smoothquant", "hadamard"),
        ("W8A8",),
        planted=True,
    ),
    Table(
        "other activations",
        "Stored scales, FP8, and weights of four bits",
        ("rtn", "hadamard"),
        ("W8A8_STATIC", "FP8_DYNAMIC", "FP8", "W4A8"),
    ),
    Table(
        "formats",
        "Formats of weights that are not integers, rounded to nearest",
        ("rtn",),
        ("MXFP8", "MXFP4", "NVFP4", "NF4", "TERNARY"),
    ),
)


@dataclass(frozen=True)
class Promise:
    """A promise: its words, the figure that decides, and the most that it may be.

    figure   of all cells, and full precision's perplexity
    why      where a document says why it may not hold
    """

    words: str
    most: float
    figure: Callable[[Cells, float], float]
    form: str = "{:.3f}"
    why: str = ""


def ratio(table: str, scheme: str, method: str, other: str) -> Callable[[Cells, float], float]:
    """Return the mean KL of one method over that of another."""

    def figure(cells: Cells, full: float) -> float:
        kl = [float(cells[table, each, scheme]["kl_mean"]) for each in (method, other)]
        return kl[0] / kl[1]

    return figure


def loss(table: str, scheme: str, method: str) -> Callable[[Cells, float], float]:
    """Return by which share the perplexity is above full precision's."""

    def figure(cells: Cells, full: float) -> float:
        return float(cells[table, method, scheme]["perplexity"]) / full - 1

    return figure


def planting(scheme: str, method: str) -> Callable[[Cells, float], float]:
    """Return by which share planted features raise the perplexity of a method."""

    def figure(cells: Cells, full: float) -> float:
        names = "planted", "activations"
        after, before = (float(cells[name, method, scheme]["perplexity"]) for name in names)
        return after / before - 1

    return figure


def bits(table: str, scheme: str) -> Callable[[Cells, float], float]:
    """Return the stored bits of a weight as a share of float32's."""

    def figure(cells: Cells, full: float) -> float:
        return float(cells[table, "rtn", scheme]["bits_per_weight"]) / 32

    return figure


def least(table: str, scheme: str, methods: Sequence[str]) -> Callable[[Cells, float], float]:
    """Return the least mean KL of some methods over that of rounding to nearest."""

    def figure(cells: Cells, full: float) -> float:
        return min(ratio(table, scheme, each, "rtn")(cells, full) for each in methods)

    return figure


def over(
    one: Callable[[Cells, float], float], other: Callable[[Cells, float], float]
) -> Callable[[Cells, float], float]:
    """Return one figure over another."""
    return lambda cells, full: one(cells, full) / other(cells, full)


def negative(figure: Callable[[Cells, float], float]) -> Callable[[Cells, float], float]:
    """Return the figure below zero, for what must be at least something."""
    return lambda cells, full: -figure(cells, full)


PROMISES = (
    Promise(
        "INT8 is 4 times smaller than FP32, scales apart: share of its bits",
        0.26,
        bits("eight bits", "W8A16"),
    ),
    Promise(
        "INT4 is 8 times smaller than FP32, scales apart: share of its bits",
        0.133,
        bits("weights", "W4A16"),
    ),
    Promise(
        "RTN is fine at 8 bits: perplexity above full precision's",
        0.01,
        loss("eight bits", "W8A16", "rtn"),
        "{:+.2%}",
    ),
    Promise(
        "RTN hurts at 4 bits: perplexity above full precision's, at least 5 %",
        -0.05,
        negative(loss("weights", "W4A16", "rtn")),
        "{:+.2%}",
    ),
    Promise(
        "GPTQ recovers most of it at 4 bits: KL over RTN's",
        0.5,
        ratio("weights", "W4A16", "gptq", "rtn"),
    ),
    Promise("AWQ at 4 bits: KL over RTN's", 0.6, ratio("asymmetric", "W4A16", "awq", "rtn")),
    Promise(
        "AWQ before GPTQ does no harm at 3 bits: KL over GPTQ's",
        1.0,
        ratio("weights", "W3A16", "awq+gptq", "gptq"),
        why="outliers.md#awq-before-gptq",
    ),
    Promise(
        "A rotation before GPTQ does no harm at 3 bits: KL over GPTQ's",
        1.0,
        ratio("weights", "W3A16", "hadamard+gptq", "gptq"),
    ),
    Promise(
        "Qronos does no worse than GPTQ at 3 bits: KL over GPTQ's",
        1.0,
        ratio("weights", "W3A16", "qronos", "gptq"),
    ),
    Promise(
        "A rotation before AutoRound does no harm at 3 bits: KL over AutoRound's",
        1.0,
        ratio("learned", "W3A16", f"hadamard+{AUTOROUND}", AUTOROUND),
    ),
    Promise(
        "LLM.int8() loses nearly nothing: perplexity above full precision's",
        0.01,
        loss("activations", "W8A8", "llm_int8"),
        "{:+.2%}",
        why="activations.md#the-threshold",
    ),
    Promise(
        "... with a threshold of 3 instead of 6",
        0.01,
        loss("activations", "W8A8", "llm_int8:threshold=3"),
        "{:+.2%}",
    ),
    Promise(
        "... and at most half of what plain W8A8 loses, with 6",
        0.5,
        over(loss("activations", "W8A8", "llm_int8"), loss("activations", "W8A8", "rtn")),
    ),
    Promise(
        "Outlier features, planted, are the end of plain W8A8: perplexity, at least 50 % above",
        -0.5,
        negative(loss("planted", "W8A8", "rtn")),
        "{:+.2%}",
    ),
    Promise(
        "... and cost LLM.int8() nothing: perplexity above its own without them",
        0.005,
        planting("W8A8", "llm_int8"),
        "{:+.2%}",
    ),
    Promise(
        "... which with a threshold of 1.5 loses nothing: perplexity above full precision's",
        0.005,
        loss("planted", "W8A8", "llm_int8:threshold=1.5"),
        "{:+.2%}",
    ),
    Promise(
        "The best method at 2 bits: KL over RTN's, which is of no use",
        0.5,
        least("two bits", "W2A16", TWO_BITS),
    ),
)


def run(table: Table, model: str, store: str, limit: int) -> dict[str, Any]:
    """Run a command; return what it found, and the command."""
    arguments = table.arguments(model, store, limit)
    command = [sys.executable, "-m", "qframe", *arguments, "--json"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not ran.stdout.strip():
        raise SystemExit(f"exit code {ran.returncode}: qframe {shlex.join(arguments)}")
    found = json.loads(ran.stdout)
    parts = "cells", "reference", "protocol", "calibration", "environment"
    return {"command": table.command(limit), **{part: found[part] for part in parts}}


def earlier(file: Path, limit: int) -> dict[str, dict[str, Any]]:
    """Return name -> finding of the tables that were measured by the commands of now."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    commands = {table.name: table.command(limit) for table in TABLES}
    return {name: each for name, each in found.items() if each["command"] == commands.get(name)}


def document(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the document.

    found   name of a table -> what its command printed
    """
    cells = {
        (name, row["method"], row["scheme"]): row
        for name, result in found.items()
        for row in result["cells"]
    }
    first = next(iter(found.values()))
    full = float(first["reference"]["score"]["perplexity"])
    protocol, calibration = first["protocol"], first["calibration"]
    lines = [
        "# What the literature promises, measured",
        "",
        "<!-- Written by benchmarks/results.py. Do not edit. -->",
        "",
        "Every figure is from the `qframe compare` command above its table. KL is the mean",
        "divergence of the next token's distribution from full precision's, in nats. MODEL is the",
        f"demonstration's, SmolLM2-135M-Instruct, of perplexity {full:.3f} in full precision.",
        "",
        f"Calibration: {calibration['windows']} windows of {calibration['max_seq_length']} tokens "
        f"of `{calibration['name']}`.",
        f"Scored on {protocol['windows']} windows of {protocol['window']} tokens of the rest.",
        "A small model loses more by quantization than a large one.",
        f"PLANTED is that network with outlier features, by `benchmarks/planted.py`: {LINE}.",
        "",
        "| promise | at most | measured | |",
        "|---|--:|--:|---|",
    ]
    for promise in PROMISES:
        try:
            value = promise.figure(cells, full)
        except (KeyError, TypeError):
            lines.append(f"| {promise.words} | | | not measured |")
            continue
        holds = "holds" if value <= promise.most else "**does not hold**"
        if value > promise.most and promise.why:
            holds += f": [why]({promise.why})"
        most, measured = (promise.form.format(each) for each in (promise.most, value))
        if promise.most < 0:  # of at least something
            most, measured = "", promise.form.format(-value)
        lines.append(f"| {promise.words} | {most} | {measured} | {holds} |")
    for table in TABLES:
        if table.name not in found:
            continue
        result = found[table.name]
        lines += ["", f"## {table.title}", "", "```text", result["command"], "```", ""]
        lines += [
            "| scheme | method | bits/weight | perplexity | mean KL | top-1 % | certificates |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
        for row in result["cells"]:
            if row["status"] != "done":
                said = row["message"].splitlines()[0]
                lines.append(f"| {row['scheme']} | {row['method']} | | | | | failed: {said} |")
                continue
            kept = f"{row['certificates'] - row['violated']} of {row['certificates']} hold"
            lines.append(
                f"| {row['scheme']} | {row['method']} | {row['bits_per_weight']:.2f} "
                f"| {float(row['perplexity']):.3f} | {float(row['kl_mean']):.4f} "
                f"| {100 * float(row['top1']):.1f} | {kept} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", default="results", help="folder that keeps finished cells")
    parser.add_argument("--model", help="Default: the demonstration's.")
    parser.add_argument("--limit", type=int, default=12, help="windows of evaluation text")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    parser.add_argument("--found", type=Path, default=FOUND, help="the tables that are measured")
    names = [table.name for table in TABLES]
    parser.add_argument("--tables", nargs="*", choices=names, default=names, metavar="TABLE")
    given = parser.parse_args()
    model = given.model or str(model_folder())
    models = {False: model, True: str(Path(given.store) / "planted")}
    planted(Path(model), Path(models[True]))
    found = earlier(given.found, given.limit)
    for table in TABLES:
        if table.name in given.tables:
            found[table.name] = run(table, models[table.planted], given.store, given.limit)
            given.found.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{table.name}: {given.out}", flush=True)
        given.out.write_text(document(found), encoding="utf-8")  # also where nothing is measured


if __name__ == "__main__":
    main()
