"""Mixed precision: sensitivities are measured, and bits are given to the layers by them.

What is needed before any work is in `qframe.candidates`, measuring in `qframe.sensitivity`, and
choosing in `qframe.allocation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qframe.allocation import Allocation, LayerBits, Option, allocate
from qframe.calibration import CalibrationData
from qframe.candidates import UNREACHED, Candidates
from qframe.contracts import Event
from qframe.memory import stored_bits
from qframe.model import Network
from qframe.recipe import Plan
from qframe.sensitivity import Sensitivities, check_memory, measure

if TYPE_CHECKING:
    from qframe.pipeline import Job


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
    options = {name: _options(name, candidates, found) for name in candidates.schemes}
    solution = allocate(list(options.values()), candidates.budget)
    picks = dict(zip(options, solution.picks, strict=True))
    schemes = {name: candidates.schemes[name][pick] for name, pick in picks.items()}
    allocation = Allocation(
        target_bits=candidates.target,
        average_bits=solution.bits / candidates.weights,
        measure=found.measure,
        predicted=solution.loss,
        gap=solution.gap,
        tokens=found.tokens,
        uniform=_uniform(candidates, found),
        layers={
            name: LayerBits(
                num_bits=schemes[name].num_bits,
                losses={
                    scheme.num_bits: option.loss
                    for scheme, option in zip(candidates.schemes[name], options[name], strict=True)
                },
                why=candidates.fixed.get(name, ""),
            )
            for name in schemes
        },
    )
    return Plan(schemes, job.plan.left), allocation, found.events


def _options(name: str, candidates: Candidates, found: Sensitivities) -> list[Option]:
    """Return what may be chosen for a layer; one that no token reached has no loss."""
    bits = candidates.bits[name]
    losses = (0.0,) if name in found.unreached else found.losses[name]
    return [Option(*pair) for pair in zip(bits, losses, strict=True)]


def _uniform(candidates: Candidates, found: Sensitivities) -> dict[int, float]:
    """Return num_bits -> the loss where all layers with a choice get so many, within the budget."""
    sums: dict[int, float] = {}
    free = [schemes for name, schemes in candidates.schemes.items() if name not in candidates.fixed]
    for wanted in sorted({scheme.num_bits for schemes in free for scheme in schemes}):
        bits, loss = 0, 0.0
        for name, schemes in candidates.schemes.items():
            places = [i for i, scheme in enumerate(schemes) if scheme.num_bits == wanted]
            if name in candidates.fixed:
                places = [0]
            if not places:
                break
            option = _options(name, candidates, found)[places[0]]
            bits, loss = bits + option.bits, loss + option.loss
        else:
            if bits <= candidates.budget:
                sums[wanted] = loss
    return sums
