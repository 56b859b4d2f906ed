"""The peers' matrix: weight quantizers of other libraries in qframe's conformance suite.

    python benchmarks/peer_matrix.py --write                                   # docs/peers.md
    python benchmarks/peer_matrix.py --library torchao --check answers         # one cell
    python benchmarks/peer_matrix.py --library quanto --check packs --extreme  # ... with subnormals
    python benchmarks/peer_matrix.py --experiment int8_constant                # one experiment

benchmarks/peers/README.md says how to set the environment up. An adapter (peers/peer_*.py) is a
single-file plugin that calls the library's own quantizer and says its result in qframe's words.
The layers are those that library and contract both have words for: float32 scales, groups that
divide the row, at least four rows. What cannot be said in the contract is in peers/experiments.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from peers import document, experiments

from qframe import Host, Scheme, bounds
from qframe_conformance import kinds
from qframe_conformance.checks import Outcome, check, checks_of, within
from qframe_conformance.engine import Scenario
from qframe_conformance.report import Record
from qframe_conformance.reproduce import script
from qframe_conformance.rounder_cases import RounderCase, copied
from qframe_conformance.rounder_layers import (
    CALIBRATION,
    KINDS,
    THREADS,
    all_schemes,
    calibration_case,
    is_declared,
    layer,
    scheme_of,
    tall_layer,
)
from qframe_conformance.rounder_subjects import layers
from qframe_conformance.suite import SUITE_VERSION, prepare

PEERS = Path(__file__).resolve().parent / "peers"
RESULTS = PEERS / "results.json"
DOCUMENT = PEERS.parent.parent / "docs" / "peers.md"
SEEDS = 3  # each draws 5 layers in a scenario, of 14 rows mostly

LIBRARIES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "rtn": (None, {}),
    "gptq": (None, {}),
    "compressed-tensors": ("peer_compressed_tensors.py", {}),
    "llmcompressor-gptq": ("peer_compressed_tensors.py", {"block_size": 8}),
    "torchao": ("peer_torchao.py", {}),
    "quanto": ("peer_quanto.py", {}),
    "quanto-zeropoint": ("peer_quanto.py", {}),
    "bitsandbytes": ("peer_bitsandbytes.py", {}),
    "hqq-start": ("peer_hqq.py", {}),
}
"""Rounder -> its file (None: it comes with qframe), and options.

Blocks of 8 columns for GPTQ, because layers have up to 24: so several blocks are met.
"""

PACKAGES = (
    "qframe",
    "torch",
    "compressed-tensors",
    "llmcompressor",
    "torchao",
    "optimum-quanto",
    "bitsandbytes",
    "hqq",
)


# A check of our own ---------------------------------------------------------------------------


def _unless_it_decodes(rounder: Any, subject: Any) -> str | None:
    return None if hasattr(rounder, "decoded") else "it has no decoder of its own"


@check("rounder", "algebra", "B1.d", unless=layers(_unless_it_decodes))
def decoded_by_library(case: RounderCase) -> Outcome:
    """The library's own decoder gives scale times (code - zero point), but for rounding.

    A second opinion on the adapter, and the adapter's on the library.
    """
    made = case.quantized
    _, values = case.rounder.decoded(copied(case.problem))
    index = made.group_index.numpy()
    scale = made.scale.double().numpy()[:, index]
    steps = made.codes.numpy() - made.zero_point.double().numpy()[:, index]
    product = scale * steps
    allowed = bounds.decode(scale, steps)
    roundings = getattr(case.rounder, "decode_roundings", 1)
    if roundings > 1:
        allowed = bounds.gamma(roundings) * np.abs(product) + roundings * bounds.ETA["float32"]
    return within(values.double().numpy() - product, allowed, "|decoded - s (c - z)|", "B1.d")


# What is tried --------------------------------------------------------------------------------

COLUMNS = (2, 4, 6, 8, 12, 16, 20, 24)
WIDTHS = {"group": (0, 3, 4), "channel": (0,), "tensor": (0,)}
"""Which of `rounder_layers.group_sizes` divide the row: all of it, a part, a single column."""

SMALLEST = 2.0**-64
"""In ordinary layers what is smaller is 0: no scale, and no product of two weights, underflows."""


def mapped_schemes(rounder: Any) -> list[Scheme]:
    """Return a scheme of every class that library and contract both have words for."""
    found = []
    for each in all_schemes():
        for rule in ("full", "restricted") if each.symmetric else ("full",):
            scheme, _ = scheme_of(
                each.num_bits, each.symmetric, each.strategy, each.group_size, rule, "float32"
            )
            if is_declared(rounder, scheme) and rounder.capabilities.objection(scheme) is None:
                found.append(scheme)
    return found


def scenarios(rounder: Any, *, extreme: bool) -> Iterator[Scenario]:
    """Yield the suite's scenarios with such layers."""
    schemes = mapped_schemes(rounder)
    for scheme in schemes:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        rule = "-restricted" if scheme.scale_rule == "restricted" else ""
        name = f"{scheme.format_name}-{kind}{rule}-{scheme.strategy}"
        yield Scenario(name, drawn_layers(rounder, scheme, extreme=extreme), scheme)
    for strategy in sorted({scheme.strategy for scheme in schemes}):
        scheme = next(s for s in reversed(schemes) if s.strategy == strategy)
        yield Scenario(f"{THREADS}-{strategy}", tall_layers(rounder, scheme), THREADS)
    if rounder.needs:
        case = calibration_case(rounder, schemes[0])
        yield Scenario(CALIBRATION, st.just(case), CALIBRATION)


def drawn_layers(rounder: Any, scheme: Scheme, *, extreme: bool) -> st.SearchStrategy[Any]:
    """Draw layers as the suite does, but without ragged groups, and with one scale rule."""
    widths = WIDTHS[scheme.strategy]
    if holds_zero(rounder):
        widths = tuple(width for width in widths if width != 4)  # a column alone would be the zero
    drawn = st.tuples(
        st.sampled_from((4, KINDS, KINDS, KINDS)),  # rows
        st.integers(0, KINDS - 1),  # the kind of the first
        st.sampled_from(COLUMNS),
        st.sampled_from(widths),
        st.just((scheme.scale_rule, scheme.scale_dtype, "minmax")),
        st.integers(0, len(kinds.INPUTS) - 1) if rounder.needs else st.just(0),
        st.integers(0, 2**32 - 1),  # the seed of the numbers
    )

    def make(choices: tuple[Any, ...]) -> RounderCase:
        return fitted(layer(rounder, scheme, *choices), extreme=extreme)

    return drawn.map(make)


def tall_layers(rounder: Any, scheme: Scheme) -> st.SearchStrategy[Any]:
    """Draw layers large enough for torch to split its work among threads."""

    def make(seed: int) -> RounderCase:
        case = tall_layer(rounder, scheme, seed)
        case.problem = replace(case.problem, weight=case.weight[:, :16].contiguous())
        statistics = {
            name: value[:16, :16].contiguous() for name, value in case.problem.statistics.items()
        }
        case.problem = replace(case.problem, statistics=statistics)
        return fitted(case, extreme=False)

    return st.integers(0, 1).map(make)


def holds_zero(rounder: Any) -> bool:
    """Return whether a rounder can only be tried on layers with a zero in every group."""
    return bool(getattr(rounder, "every_group_holds_zero", False))


def fitted(case: RounderCase, *, extreme: bool) -> RounderCase:
    """Put zeros where the rounder asks for them; flush tiny weights of ordinary layers."""
    weight = case.weight.clone()
    if not extreme:
        weight[weight.abs() < SMALLEST] = 0
    if holds_zero(case.rounder):
        weight[:, :: case.scheme.group_width(weight.shape[1])] = 0
    return RounderCase(case.rounder, replace(case.problem, weight=weight), case.seed)


# Running it -----------------------------------------------------------------------------------


def rounder_of(name: str) -> Any:
    """Return an adapter, or a rounder of qframe, that has imported all it needs.

    What an import does, to the global random numbers say, is not what a quantizer does.
    """
    file, options = LIBRARIES[name]
    host = Host.discover(files=[PEERS / file] if file else [])
    rounder = host.configured("rounder", name, options, "peer_matrix")
    scheme = mapped_schemes(rounder)[0]
    case = layer(rounder, scheme, 4, 0, 8, 0, (scheme.scale_rule, "float32", "minmax"), 0, 0)
    _ = fitted(case, extreme=False).answer
    return rounder


def code_of(name: str) -> str:
    """Return Python that makes an adapter, to be run from the root of the repository."""
    file, options = LIBRARIES[name]
    files = f"files=['benchmarks/peers/{file}']" if file else ""
    return (
        "from qframe import Host\n\n"
        f"host = Host.discover({files})\n"
        f'plugin = host.configured("rounder", {name!r}, {options!r}, "script")\n'
    )


def records_of(
    name: str, seeds: Sequence[int], *, extreme: bool, only: Sequence[str] | None = None
) -> Iterator[Record]:
    """Run the suite on one library; counterexamples are made small when a check is named."""
    rounder = rounder_of(name)
    for seed in seeds:
        run = prepare(rounder, kind="rounder", seed=seed, only=only, shrink=bool(only))
        for scenario in scenarios(rounder, extreme=extreme):
            yield from run.records(scenario)


def cells(records: Iterator[Record]) -> dict[str, dict[str, Any]]:
    """Return check -> its cell of the matrix, for checks that were tested."""
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, set[str]] = {}
    tested: dict[str, set[str]] = {}
    for record in records:
        if record.status not in ("held", "failed", "crashed"):
            continue
        cell = found.setdefault(record.check, {"layers": 0, "ratio": None, "message": ""})
        cell["layers"] += record.examples
        tested.setdefault(record.check, set()).add(record.scenario)
        if record.status != "held":
            failed.setdefault(record.check, set()).add(record.scenario)
        ratio = record.ratio
        if record.status != "held" and (ratio is None or not cell["message"]):
            cell["message"] = record.message
        if ratio is not None and math.isfinite(ratio):
            if record.status != "held" and ratio >= (cell["ratio"] or 0):
                cell["message"] = record.message
            cell["ratio"] = max(ratio, cell["ratio"] or 0.0)
    for name, cell in found.items():
        cell["scenarios"], cell["violated"] = len(tested[name]), len(failed.get(name, ()))
    return found


def everything() -> dict[str, Any]:
    """Run all libraries and experiments; return what results.json holds."""
    ordinary, extreme = {}, {}
    for name in LIBRARIES:
        print(f"{name} ...", flush=True)
        ordinary[name] = cells(records_of(name, range(SEEDS), extreme=False))
        every = cells(records_of(name, range(SEEDS), extreme=True))
        extreme[name] = {
            check_: cell
            for check_, cell in every.items()
            if cell["violated"] and not ordinary[name].get(check_, {}).get("violated")
        }
    asked = []
    for each in experiments.EXPERIMENTS:
        held, measured = each.ask()
        asked.append(
            {
                "library": each.library,
                "name": each.name,
                "question": each.question,
                "held": held,
                "measured": measured,
            }
        )
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "suite": SUITE_VERSION,
        "seeds": SEEDS,
        "promises": {
            each.name: {"promise": each.promise, "level": each.level, "theorem": each.theorem}
            for each in checks_of("rounder")
            if any(each.name in found for found in ordinary.values())
        },
        "ordinary": ordinary,
        "extreme": extreme,
        "experiments": asked,
    }


def show(name: str, only: Sequence[str] | None, seeds: int, *, extreme: bool) -> None:
    """Print the cells of one library, and a small counterexample for each check that is named."""
    records = list(records_of(name, range(seeds), extreme=extreme, only=only))
    for check_, cell in cells(iter(records)).items():
        state = f"violated in {cell['violated']}" if cell["violated"] else "held in all"
        ratio = "" if cell["ratio"] is None else f", largest error / allowed {cell['ratio']:.9g}"
        print(f"{name}, {check_}: {state} of {cell['scenarios']} scenarios{ratio}")
        if cell["message"]:
            print(f"    {cell['message']}")
    if only:
        failed = next((record for record in records if record.status == "failed"), None)
        if failed is not None:
            print(f"\n{script(failed, code_of(name))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: all")
    parser.add_argument("--check", action="append", help="default: all that apply")
    parser.add_argument("--experiment", choices=[each.name for each in experiments.EXPERIMENTS])
    parser.add_argument("--extreme", action="store_true", help="with subnormal weights as well")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--write", action="store_true", help="write docs/peers.md and its JSON")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the libraries' own
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.write:
        RESULTS.write_text(json.dumps(everything(), indent=1) + "\n", encoding="utf-8")
        DOCUMENT.write_text(document.render(json.loads(RESULTS.read_text())), encoding="utf-8")
        print(f"{RESULTS.name}, {DOCUMENT.name}: written")
    elif arguments.experiment:
        for each in experiments.EXPERIMENTS:
            if each.name == arguments.experiment:
                print(f"{each.library}: {each.question}\n{each.ask()}")
    else:
        for name in arguments.library or LIBRARIES:
            show(name, arguments.check, arguments.seeds, extreme=arguments.extreme)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
