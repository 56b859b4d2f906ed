"""What every rounder owes, whatever its method: structure, determinism, storage."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch

from qframe import Event, QuantizedWeight
from qframe.errors import QframeError, UncalibratedLayerError
from qframe.packing import PackedWeight
from qframe_conformance.checks import SKIPPED, Outcome, Violation, check, require, same_bits
from qframe_conformance.rounder_cases import RounderCase, fields_of, pack
from qframe_conformance.rounder_layers import THREADS, statistic
from qframe_conformance.rounder_refusals import justified
from qframe_conformance.rounder_subjects import (
    about,
    either,
    every_third,
    layers,
    unless_calibrated,
    unless_deterministic,
)

# Structure ------------------------------------------------------------------------------------


@check("rounder", "structure", unless=layers())
def answers(case: RounderCase) -> Outcome:
    """A layer of a declared scheme is rounded, or refused with an error that is justified."""
    error = case.answer.error
    if error is None or justified(case.rounder, case.problem, error) is not None:
        return None
    kind = "" if isinstance(error, QframeError) else ", which is no error of qframe,"
    raise Violation(f"raised {type(error).__name__}{kind} for no good reason: {error}")


@check("rounder", "structure", unless=layers())
def packs(case: RounderCase) -> Outcome:
    """What is returned is what `QuantizedWeight` promises: shapes, dtypes, ranges, scales."""
    if case.answer.error is not None:
        return SKIPPED
    try:
        pack(case.answer.made, case.problem)
    except QframeError as error:
        raise Violation(str(error)) from None
    return None


@check("rounder", "structure", unless=layers())
def information(case: RounderCase) -> Outcome:
    """`info` holds finite numbers and texts by name, `events` holds events of this layer."""
    made = case.quantized
    for name, value in made.info.items():
        require(isinstance(name, str), f"info has the key {name!r}, expected a text")
        require(
            isinstance(value, (int, float, str)),
            f"info[{name!r}] is a {type(value).__name__}, expected int, float or str",
        )
        if isinstance(value, float):
            require(math.isfinite(value), f"info[{name!r}] is {value}")
    for event in made.events:
        require(isinstance(event, Event), f"events hold a {type(event).__name__}")
        require(event.kind and event.message, f"an event says nothing: {event}")
        require(event.layer == case.problem.name, f"an event names layer {event.layer!r}")
    return None


@check("rounder", "structure", unless=layers())
@every_third
def non_finite(case: RounderCase) -> Outcome:
    """A weight that is not finite raises an error of qframe, never codes."""
    weight = case.weight.clone()
    if weight.numel() == 0:
        return SKIPPED
    bad = (math.nan, math.inf, -math.inf)[case.seed % 3]
    place = np.unravel_index(case.seed % weight.numel(), weight.shape)
    weight[place] = bad
    _ = case.quantized
    error = case.ask(replace(case.problem, weight=weight)).error
    where = [int(i) for i in place]
    require(error is not None, f"codes were returned for a weight that is {bad} at {where}")
    require(
        isinstance(error, QframeError),
        f"a weight that is {bad} at {where} raised {type(error).__name__}: {error}",
    )
    return None


@check("rounder", "structure", unless=layers(unless_calibrated))
@every_third
def uncalibrated(case: RounderCase) -> Outcome:
    """A layer that no token reached is rounded all the same, or UncalibratedLayerError names it."""
    _ = case.quantized
    nothing = np.zeros((1, case.weight.shape[1]))
    statistics = {name: statistic(name, nothing) for name in case.problem.statistics}
    problem = replace(case.problem, statistics=statistics, tokens=0, held_out=statistics)
    answer = case.ask(problem)
    if answer.error is None:
        try:
            pack(answer.made, problem)
        except QframeError as error:
            raise Violation(f"without tokens: {error}") from None
        return None
    require(
        isinstance(answer.error, UncalibratedLayerError),
        f"without tokens it raised {type(answer.error).__name__}: {answer.error}",
    )
    require(problem.name in str(answer.error), f"the error does not name the layer: {answer.error}")
    return None


# Determinism ----------------------------------------------------------------------------------


@check("rounder", "determinism", unless=layers())
def purity(case: RounderCase) -> Outcome:
    """Weight and statistics are left as they were, to the last bit."""
    given, original = case.answer.given, case.problem
    same_bits(original.weight, given.weight, "the weight after rounding")
    for kind in ("statistics", "held_out"):
        now = getattr(given, kind)
        for name, value in getattr(original, kind).items():
            if isinstance(value, (torch.Tensor, np.ndarray)):
                same_bits(value, now[name], f"{kind}[{name!r}] after rounding")
    return None


@check("rounder", "determinism", unless=layers(unless_deterministic))
@every_third
def determinism(case: RounderCase) -> Outcome:
    """The same layer and seed give the same bits, and an earlier result stays as it was."""
    first = case.quantized
    before = {name: tensor.clone() for name, tensor in fields_of(first)}
    _same(before, case.again(), "the second time")
    _same(before, first, "of the first result after the second call")
    return None


@check("rounder", "determinism", unless=layers())
def global_generators(case: RounderCase) -> Outcome:
    """Randomness comes from the generator that is passed in, never from a global one."""
    touched = case.answer.touched
    require(not touched, f"the global generator of {' and of '.join(touched)} was used or seeded")
    return None


@check("rounder", "determinism", unless=layers(unless_deterministic))
@every_third
def layout(case: RounderCase) -> Outcome:
    """A weight that is a strided view in Fortran order gives the same bits."""
    rows, columns = case.weight.shape
    stored = torch.full((2 * columns, rows + 1), math.nan)
    view = stored[::2, :rows].t()
    view.copy_(case.weight)
    _same(dict(fields_of(case.quantized)), case.again(weight=view), "of a strided weight")
    return None


@check("rounder", "determinism", unless=either(about(THREADS), unless_deterministic))
def threads(case: RounderCase) -> Outcome:
    """The number of threads does not change a bit."""
    with thread_count(1):
        alone = case.quantized
    with thread_count(2):
        _same(dict(fields_of(alone)), case.again(), "with two threads")
    return None


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let torch use so many threads, and numba where it is loaded."""
    numba = sys.modules.get("numba")
    before = torch.get_num_threads()
    compiled = numba.get_num_threads() if numba is not None else 1
    torch.set_num_threads(count)
    if numba is not None:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if numba is not None:
            numba.set_num_threads(compiled)


def _same(expected: dict[str, torch.Tensor], made: QuantizedWeight, what: str) -> None:
    """Raise Violation unless a result has these bits."""
    found = dict(fields_of(made))
    require(
        found.keys() == expected.keys(), f"{what}: {sorted(found)}, expected {sorted(expected)}"
    )
    for name, tensor in expected.items():
        same_bits(tensor, found[name], f"{name} {what}")


# Storage --------------------------------------------------------------------------------------


@check("rounder", "serialization", unless=layers())
@every_third
def serialization(case: RounderCase) -> Outcome:
    """What is packed, written to a file and read again has the same codes and scales."""
    made, packed = case.quantized, case.packed
    file = safetensors.torch.load(safetensors.torch.save(packed.tensors()))
    read = PackedWeight.from_tensors(
        file,
        case.scheme,
        case.problem.grid,
        name=case.problem.name,
        rows=packed.rows,
        columns=packed.columns,
    ).unpack()
    for name in ("codes", "scale", "zero_point", "group_index"):
        same_bits(getattr(made, name), getattr(read, name), f"{name} after reading")
    return None
