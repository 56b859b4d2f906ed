"""What a rounder is tried on, and what it made of it: the cases that the checks look at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qframe import QuantizedWeight, RoundingProblem, Scheme
from qframe.certificates import Evidence
from qframe.errors import PluginError
from qframe.packing import PackedWeight
from qframe_conformance.checks import Violation
from qframe_conformance.engine import Refused, is_out_of_memory
from qframe_conformance.kinds import Float64
from qframe_conformance.report import Counterexample
from qframe_conformance.rounder_refusals import justified

# Cases ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """What one call of a rounder did.

    given   the problem that it was given, which it may have changed
    made    what it returned, None where it raised
    error   what it raised, None where it returned
    used    whether it took random numbers from the generator that it was given
    touched  modules whose global generator it used or seeded
    """

    given: RoundingProblem
    made: Any = None
    error: Exception | SystemExit | None = None
    used: bool = False
    touched: tuple[str, ...] = ()


@dataclass(eq=False)
class RounderCase:
    """A layer, and what the rounder made of it."""

    rounder: Any
    problem: RoundingProblem
    seed: int = 0

    @cached_property
    def answer(self) -> Answer:
        """What the rounder did; never raises."""
        before = global_states()
        answer = self.ask(copied(self.problem))
        after = global_states()
        answer.touched = tuple(name for name, state in before.items() if state != after[name])
        return answer

    @cached_property
    def quantized(self) -> QuantizedWeight:
        """What the rounder returned.

        Raises Refused where that is nothing, or not what `QuantizedWeight` promises: whether that
        is right is for the checks `answers` and `packs` alone.
        """
        _ = self.packed
        made: QuantizedWeight = self.answer.made
        return made

    @cached_property
    def packed(self) -> PackedWeight:
        """The layer as it is stored. Raises Refused, as `quantized`."""
        if self.answer.error is not None:
            raise Refused(str(self.answer.error)) from self.answer.error
        try:
            return pack(self.answer.made, self.problem)
        except Exception as error:
            raise Refused(str(error)) from error

    @cached_property
    def evidence(self) -> Evidence:
        """What claims are certified on."""
        return Evidence(problem=self.problem, quantized=self.quantized)

    def ask(self, problem: RoundingProblem) -> Answer:
        """Round a layer with the generator of this case; never raises."""
        rng = np.random.default_rng(self.seed)
        before = rng.bit_generator.state
        answer = Answer(problem)
        try:
            answer.made = self.rounder.round(problem, rng)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            answer.error = error
        answer.used = rng.bit_generator.state != before
        return answer

    def again(self, **changes: Any) -> QuantizedWeight:
        """Round the same layer with changes, another weight say.

        Raises Refused where the rounder may refuse that, and Violation where it may not.
        """
        _ = self.quantized
        problem = replace(copied(self.problem), **changes)
        answer = self.ask(problem)
        if answer.error is not None:
            reason = justified(self.rounder, problem, answer.error)
            if reason is None:
                raise Violation(
                    f"the changed layer raised {type(answer.error).__name__}: {answer.error}"
                )
            raise Refused(reason)
        made: QuantizedWeight = answer.made
        return made

    def steps(self) -> Float64:
        """Return what every code stands for at scale 1, [rows, columns] float64."""
        _, zero, codes = self.per_weight()
        if self.problem.grid.values is None:
            return codes - zero
        places = self.quantized.codes.numpy().astype(np.int64) - self.problem.grid.qmin
        return np.array(self.problem.grid.values)[places]

    def per_weight(self) -> tuple[Float64, Float64, Float64]:
        """Return (scale, zero point, code) of every weight, each [rows, columns] float64."""
        made = self.quantized
        index, shape = made.group_index.numpy(), self.weight.shape
        scale, zero = (
            np.broadcast_to(each.numpy().astype(np.float64)[:, index], shape)
            for each in (made.scale, made.zero_point)
        )
        return scale, zero, made.codes.numpy().astype(np.float64)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, [rows, columns] float32."""
        return self.problem.weight

    @property
    def scheme(self) -> Scheme:
        """The scheme of the layer."""
        return self.problem.scheme

    def counterexample(self, check: str) -> Counterexample:
        """Return the layer as plain Python; `plugin` and `arrays` are defined before it."""
        problem = self.problem
        arrays: dict[str, Any] = {"weight": problem.weight.numpy()}
        kept = {"statistics": problem.statistics, "held_out": problem.held_out}
        for kind, given in kept.items():
            arrays |= {f"{kind}_{name}": np.asarray(value) for name, value in given.items()}
        statistics, held_out = (
            ", ".join(f"{name!r}: torch.from_numpy(arrays['{kind}_{name}'])" for name in given)
            for kind, given in kept.items()
        )
        changed = problem.scheme.model_dump(exclude_defaults=True)
        fields = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        grid = problem.grid
        values = "" if grid.values is None else f", {grid.values!r}"
        text = f"""\
import torch

from qframe import Grid, RoundingProblem, Scheme
from qframe_conformance import replay
from qframe_conformance.rounder_cases import RounderCase

problem = RoundingProblem(
    name={problem.name!r},
    weight=torch.from_numpy(arrays["weight"]),
    scheme=Scheme({fields}),
    grid=Grid({grid.qmin}, {grid.qmax}{values}),
    statistics={{{statistics}}},
    tokens={problem.tokens},
    held_out={{{held_out}}},
)
print(replay({check!r}, RounderCase(plugin, problem, seed={self.seed})))
"""
        return Counterexample(snippet=text, arrays=arrays)


@dataclass(eq=False)
class DeclarationCase:
    """What a rounder says of itself; it is not called."""

    rounder: Any

    def counterexample(self, check: str) -> Counterexample:
        """Return it as plain Python; `plugin` is defined before it."""
        text = f"""\
from qframe_conformance import replay
from qframe_conformance.rounder_cases import DeclarationCase

print(replay({check!r}, DeclarationCase(plugin)))
"""
        return Counterexample(snippet=text)


@dataclass(eq=False)
class CalibrationCase:
    """A few layers, each with two sets of statistics that have nothing in common.

    layers   pairs of problems that differ in their statistics alone
    """

    rounder: Any
    scheme: Scheme
    layers: tuple[tuple[RounderCase, RounderCase], ...]

    def counterexample(self, check: str) -> Counterexample:
        """Return it as plain Python; `plugin` is defined before it."""
        changed = self.scheme.model_dump(exclude_defaults=True)
        fields = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        text = f"""\
from qframe import Scheme
from qframe_conformance import replay
from qframe_conformance.rounder_layers import calibration_case

print(replay({check!r}, calibration_case(plugin, Scheme({fields}))))
"""
        return Counterexample(snippet=text)


# What belongs to them -------------------------------------------------------------------------


def copied(problem: RoundingProblem) -> RoundingProblem:
    """Return the problem with tensors of its own."""
    statistics, held_out = (
        {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for values in (problem.statistics, problem.held_out)
    )
    return replace(problem, weight=problem.weight.clone(), statistics=statistics, held_out=held_out)


def global_states() -> dict[str, object]:
    """Return the states of the global generators, by the name of their module."""
    _, numbers, *rest = np.random.get_state(legacy=True)
    return {
        "random": random.getstate(),
        "numpy.random": (np.asarray(numbers).tobytes(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def pack(made: Any, problem: RoundingProblem) -> PackedWeight:
    """Pack what a rounder returned for a problem.

    Raises PluginError when it is not what `QuantizedWeight` promises.
    """
    if not isinstance(made, QuantizedWeight):
        raise PluginError(f"round returned {type(made).__name__}, expected QuantizedWeight")
    shape = tuple(problem.weight.shape)
    if tuple(made.codes.shape) != shape:
        raise PluginError(f"codes should be {list(shape)}, got {list(made.codes.shape)}")
    if made.scale.dtype != torch.float32:
        raise PluginError(f"scale should be torch.float32, got {made.scale.dtype}")
    order = made.order
    if order is not None:
        if order.dtype != torch.int32 or tuple(order.shape) != shape[1:]:
            raise PluginError(
                f"order should be torch.int32 [{shape[1]}], got {order.dtype} {list(order.shape)}"
            )
        if not torch.equal(order.sort().values, torch.arange(shape[1], dtype=torch.int32)):
            raise PluginError("order does not name every column once")
    return PackedWeight.pack(made, problem.scheme, problem.grid, name=problem.name)


def fields_of(made: QuantizedWeight) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of everything that says what the codes stand for."""
    for name in ("codes", "scale", "zero_point", "group_index", "order"):
        tensor = getattr(made, name)
        if tensor is not None:
            yield name, tensor
