"""`hqq` and `autoround` beside the packages that their methods come from. Writes docs/roundings.md.

    python benchmarks/compare_roundings.py --peer-python PEERS/bin/python

Same model, same scheme, same calibration tokens, same scoring, one run. benchmarks/peers/README.md
says how PEERS is made. The packages' weights are those that they themselves decode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from compare_gptq import PEERS, load_reference, quantized_copy, run, tokens_of
from kept import kept
from safetensors.torch import load_file
from torch import nn

import qframe
from qframe import CalibrationData
from qframe.comparison.identity import model_identity
from qframe.comparison.store import digest
from qframe.embedded import model_folder
from qframe.evaluation import evaluate
from qframe.fingerprints import sha256
from qframe.stored_model import StoredModel
from qframe.weights import ModelFolder

DOCUMENT = Path(__file__).parent.parent / "docs" / "roundings.md"
GROUP = 64
ROWS = {
    "rtn": "rtn",
    "hqq": "hqq",
    "hqq package, whole zero points": "hqq --whole-zero-points",
    "hqq package": "hqq",
    "autoround, correction 0": "autoround:correction=0",
    "autoround, correction 1": "autoround:correction=1",
    "autoround, no sweeps": "autoround:sweeps=0",
    "autoround": "autoround",
    "autoround, 200 iterations": "autoround:iterations=200",
    "autoround_block": "autoround_block",
    "auto-round package": "autoround",
}


@dataclass(frozen=True)
class Setting:
    """What all networks share: the folder, and a file and array of calibration tokens."""

    folder: Path
    tokens: Path
    peer_python: str
    iterations: int


def by_qframe(setting: Setting, method: str, bits: int) -> Mapping[str, torch.Tensor]:
    """Return the weights that a method of qframe's decodes to."""
    windows = torch.from_numpy(np.load(setting.tokens))
    method, _, words = method.partition(":")
    options = {"iterations": setting.iterations} if method.startswith("autoround") else {}
    options |= {key: json.loads(value) for key, value in (w.split("=") for w in words.split())}
    recipe = {
        "method": method,
        "options": options,
        "scheme": {"num_bits": bits, "group_size": GROUP, "symmetric": False},
    }
    data = CalibrationData.from_tokens(windows, windows[:0], {"name": "topics"})
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        qframe.quantize(setting.folder, recipe, out=out, calibration=data)
        return {name: each.weight() for name, each in StoredModel.open(out).layers()}


def by_package(setting: Setting, words: str, bits: int) -> Mapping[str, torch.Tensor]:
    """Return the weights that a package decodes to."""
    package, *options = words.split()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.safetensors"
        command = [setting.peer_python, str(PEERS / "rounding_packages.py"), package]
        command += [str(setting.folder), str(out), "--bits", str(bits), *options]
        command += ["--group-size", str(GROUP), "--tokens", str(setting.tokens)]
        run([*command, "--iterations", str(setting.iterations)])
        weights: Mapping[str, torch.Tensor] = load_file(out)
        return weights


def version_of(peer_python: str, package: str) -> str:
    """Return the version of a package that another Python has."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    done = subprocess.run([peer_python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer_python} has no {package}: {done.stderr}")
    return done.stdout.strip()


def measured(
    setting: Setting, name: str, bits: int, reference: nn.Module, windows: torch.Tensor
) -> dict[str, float]:
    """Return the score of a row."""
    made = by_package if "package" in name else by_qframe
    weights = made(setting, ROWS[name], bits)
    network = quantized_copy(setting.folder, weights)
    return evaluate({"it": network}, reference, windows)["it"].record()


def document(
    found: Mapping[int, Mapping[str, Mapping[str, float]]],
    perplexity: float,
    versions: Mapping[str, str],
    given: argparse.Namespace,
) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Beside the packages that methods come from",
        "",
        "<!-- Written by benchmarks/compare_roundings.py. Do not edit. -->",
        "",
        f"SmolLM2-135M-Instruct, asymmetric, groups of {GROUP}; {packages}. AutoRounds "
        f"have {given.iterations} iterations",
        f"on {given.windows} windows of 512 tokens; all are scored on {given.limit} windows of the "
        f"rest of the text.",
        f"Full precision has a perplexity of {perplexity:.3f}. The package `hqq` stores zero "
        f"points as floats;",
        "qframe's are integers, which the package has as an option for its start. The package "
        "`auto-round` learns",
        "for the outputs of a whole block in the original network, as `autoround_block` does; "
        "`autoround` learns for those",
        "of a layer, of which `correction` takes a share from the original network, and betters "
        "codes one by one",
        "after that, in sweeps.",
        "",
        "| bits | | mean KL | perplexity | top-1 % |",
        "|--:|---|--:|--:|--:|",
    ]
    for bits, scores in found.items():
        for name, score in scores.items():
            lines.append(
                f"| {bits} | {name} | {score['kl_mean']:.4f} | {score['perplexity']:.3f} "
                f"| {100 * score['top1']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--windows", type=int, default=48, help="of calibration text")
    parser.add_argument("--limit", type=int, default=24, help="windows of evaluation text")
    parser.add_argument("--iterations", type=int, default=200, help="of both AutoRounds")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--store", type=Path, help="folder that keeps finished measurements")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    folder = model_folder()
    evaluation = torch.from_numpy(tokens_of(folder, "evaluation", given.limit))
    calibration = tokens_of(folder, "calibration", given.windows)
    reference = load_reference(folder)
    versions = {name: version_of(given.peer_python, name) for name in ("hqq", "auto-round")}
    found: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, calibration)
        setting = Setting(folder, tokens, given.peer_python, given.iterations)
        for bits in given.bits:
            found[bits] = {}
            for name in given.only:
                identity = {
                    "model": model_identity(ModelFolder(folder)),
                    "tokens": [digest(each.tolist()) for each in (calibration, evaluation)],
                    "row": [ROWS[name], bits, GROUP, given.iterations],
                    "packages": [versions, sha256(PEERS / "rounding_packages.py")],
                }
                work = partial(measured, setting, name, bits, reference, evaluation)
                found[bits][name] = kept(given.store, f"W{bits} {name}", identity, work)
                print(bits, name, found[bits][name], flush=True)
    perplexity = evaluate({}, reference, evaluation)[""].perplexity
    given.out.write_text(document(found, perplexity, versions, given), encoding="utf-8")


if __name__ == "__main__":
    main()
