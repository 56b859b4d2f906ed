"""Mixed precision: sensitivities are measured, and bits are given to the layers by them.

What is needed before any work is in `qframe.candidates`, measuring in `qframe.sensitivity`, and
choosing in `qframe.allocation`; what is chosen is tried in `qframe.trials`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qframe.allocation import Allocation, LayerBits, Option, Solution, allocate
from qframe.calibration import CalibrationData
from qframe.candidates import UNREACHED, Candidates
from qframe.contracts import Event
from qframe.memory import stored_bits
from qframe.model import Network
from qframe.recipe import Plan
from qframe.scheme import Scheme
from qframe.sensitivity import DIVERGENCE, Sensitivities, check_memory, measure
from qframe.trials import divergences

if TYPE_CHECKING:
    from qframe.pipeline import Job

PREDICTED = "least predicted"
CAUTIONS = (0, 1, 3, 10)  # 0: predictions as they are


def decide(
    job: Job, candidates: Candidates, data: CalibrationData, threads: int
) -> tuple[Plan, Allocation, Sequence[Event]]:
    """Return the plan with the bits that each layer gets, why, and what happened.

    The network of a folder is loaded whole, apart from that of the job, and freed again.

    Raises MemoryLimitError when that takes more than is free, ModelError or NonFiniteError when
    nothing can be measured, RecipeError when layers that no token reaches keep the target from
    being reached.
    """
    network = job.network
    check_memory(network, candidates.schemes)
    if network.folder is not None:
        network = Network.from_folder(network.folder)
        network.load(network.module, recurse=True)
    found = measure(
        network, candidates.schemes, data, job.host, seed=job.recipe.seed, threads=threads
    )
    kept = {name: job.plan.schemes[name] for name in found.unreached}
    if kept:
        bits = {name: (scheme, stored_bits(job, name, scheme)) for name, scheme in kept.items()}
        candidates = candidates.keeping(bits, UNREACHED)
    ways = _ways(candidates, found)
    tried: dict[str, float] = {}
    if found.measure == DIVERGENCE and len(ways) > 1:
        choices = {way: schemes for way, (schemes, _) in ways.items()}
        tried = divergences(network, choices, data.inputs, job.host, threads)
    chosen = min(tried, key=lambda way: tried[way]) if tried else next(iter(ways))
    schemes, solution = ways[chosen]
    allocation = Allocation(
        target_bits=candidates.target,
        average_bits=solution.bits / candidates.weights,
        measure=found.measure,
        predicted=_predicted(schemes, candidates, found),
        gap=solution.gap,
        tokens=found.tokens,
        chosen=chosen,
        tried=tried,
        uniform={
            bits: _predicted(schemes, candidates, found)
            for bits, (schemes, _) in _uniform(candidates).items()
        },
        layers={
            name: LayerBits(
                num_bits=scheme.num_bits,
                losses={
                    each.num_bits: loss
                    for each, loss in zip(
                        candidates.schemes[name], _losses(name, found), strict=True
                    )
                }
                if name not in found.unreached
                else {},
                why=candidates.fixed.get(name, ""),
            )
            for name, scheme in schemes.items()
        },
    )
    return Plan(schemes, job.plan.left), allocation, found.events


def _ways(
    candidates: Candidates, found: Sensitivities
) -> dict[str, tuple[dict[str, Scheme], Solution]]:
    """Return name -> schemes of the layers and how they came about, for every way that is tried.

    With a caution c a layer's predicted loss counts 1 + c r times, r the energy of the weight's
    error over that of the weight: the predictions are of second order in that error, and what they
    leave out grows with it.
    """
    ways: dict[str, tuple[dict[str, Scheme], Solution]] = {}
    for caution in CAUTIONS:
        options = [
            [
                Option(bits, loss * (1 + caution * relative))
                for bits, loss, relative in zip(
                    candidates.bits[name], _losses(name, found), found.relative[name], strict=False
                )
            ]
            for name in candidates.schemes
        ]
        solution = allocate(options, candidates.budget)
        picks = zip(candidates.schemes.items(), solution.picks, strict=True)
        schemes = {name: each[pick] for (name, each), pick in picks}
        ways[f"caution {caution}" if caution else PREDICTED] = schemes, solution
    for bits, (schemes, total) in _uniform(candidates).items():
        if bits == max(_uniform(candidates)):
            ways[f"{bits} bits everywhere"] = schemes, Solution((), total, 0.0, math.inf)
    return {
        name: way
        for number, (name, way) in enumerate(ways.items())
        if all(way[0] != earlier for earlier, _ in list(ways.values())[:number])
    }


def _losses(name: str, found: Sensitivities) -> tuple[float, ...]:
    """Return the predicted losses of a layer; one that no token reached has no loss."""
    return (0.0,) if name in found.unreached else found.losses[name]


def _predicted(
    schemes: Mapping[str, Scheme], candidates: Candidates, found: Sensitivities
) -> float:
    """Return the sum of the predicted losses."""
    total = 0.0
    for name, scheme in schemes.items():
        total += _losses(name, found)[candidates.schemes[name].index(scheme)]
    return total


def _uniform(candidates: Candidates) -> dict[int, tuple[dict[str, Scheme], int]]:
    """Return num_bits -> schemes and bits where all layers with a choice get so many.

    Only of those that the budget allows.
    """
    made: dict[int, tuple[dict[str, Scheme], int]] = {}
    free = [each for name, each in candidates.schemes.items() if name not in candidates.fixed]
    for wanted in sorted({scheme.num_bits for schemes in free for scheme in schemes}):
        places = {
            name: 0
            if name in candidates.fixed
            else next((i for i, scheme in enumerate(each) if scheme.num_bits == wanted), None)
            for name, each in candidates.schemes.items()
        }
        picked = {name: place for name, place in places.items() if place is not None}
        bits = sum(candidates.bits[name][place] for name, place in picked.items())
        if len(picked) == len(places) and bits <= candidates.budget:
            schemes = {name: candidates.schemes[name][place] for name, place in picked.items()}
            made[wanted] = schemes, bits
    return made
