"""Checks of outlier handlers: a rewrite changes nothing but what rounding will lose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qframe import Rewrite, bounds
from qframe.claims import (
    FunctionPreserving,
    RowOrderFree,
    ScaleEquivariant,
    SignSymmetric,
    claims_of,
    has_claim,
)
from qframe.claims.handlers import RewriteClaim
from qframe.errors import QframeError
from qframe_conformance.checks import (
    SKIPPED,
    Outcome,
    certified,
    check,
    require,
    same_bits,
    within,
)
from qframe_conformance.outlier_cases import HandlerCase, fault
from qframe_conformance.outlier_draws import scenarios
from qframe_conformance.values import copied, same_value

__all__ = ["scenarios"]

KIND = "outlier handler"


def _only(*subjects: str, claim: type | None = None) -> Callable[[Any, Any], str | None]:
    """Return an objection for other scenarios, and for handlers without a claim."""

    def objection(handler: Any, subject: str) -> str | None:
        if claim is not None and not has_claim(handler, claim):
            return f"{claim.__name__} is not claimed"
        if subject not in subjects:
            return f"it is about groups that are {' or '.join(subjects)}"
        return None

    return objection


_FINITE = _only("ordinary", "planted")


# Structure ------------------------------------------------------------------------------------


@check(KIND, "structure", unless=_FINITE)
def rewrite_fits(case: HandlerCase) -> Outcome:
    """All layers come back, with their shapes and finite, and one input scale, finite and > 0."""
    wrong = fault(case.answer, case.weights)
    require(not wrong, wrong)
    return None


@check(KIND, "structure", unless=_FINITE)
def information(case: HandlerCase) -> Outcome:
    """`info` holds finite numbers and texts by name, as reports and manifests do."""
    for name, value in case.rewrite.info.items():
        require(isinstance(name, str), f"info has the key {name!r}, expected a text")
        kind = type(value).__name__
        require(isinstance(value, (int, float, str)), f"info[{name!r}] is a {kind}")
        if isinstance(value, float):
            require(math.isfinite(value), f"info[{name!r}] is {value}")
    return None


@check(KIND, "structure", unless=_FINITE)
def handler_leaves_inputs(case: HandlerCase) -> Outcome:
    """Neither the weights nor the statistics that a handler was given are changed."""
    weights, statistics = case.second.weights, case.second.statistics
    require(weights.keys() == case.weights.keys(), "layers were added to, or taken from, `weights`")
    for name, weight in case.weights.items():
        same_bits(weight, weights[name], f"the weight of {name!r} that was given")
    for name, value in case.statistics.items():
        same_value(copied(value), statistics[name], f"the statistic {name!r} that was given")
    return None


@check(KIND, "structure", unless=_only("not finite"))
def non_finite_statistics_show(case: HandlerCase) -> Outcome:
    """A statistic that is not finite raises a typed error, or shows in the rewrite."""
    try:
        made = case.ask(case.weights, case.poisoned())
    except QframeError:
        return None
    require(isinstance(made, Rewrite), f"returned {type(made).__name__}, expected qframe.Rewrite")
    tensors = [made.input_scale, *made.weights.values()]
    require(
        not all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
        "a number in a statistic that is not finite leaves no trace",
    )
    return None


# Determinism ----------------------------------------------------------------------------------


def _deterministic(handler: Any, subject: str) -> str | None:
    """Object where results may differ from call to call."""
    if not handler.capabilities.deterministic:
        return "it is declared not to be deterministic"
    return _FINITE(handler, subject)


@check(KIND, "determinism", unless=_deterministic)
def rewriting_repeats(case: HandlerCase) -> Outcome:
    """The same group and generator give the same bits, whatever the global random states."""
    first = case.rewrite
    wrong = fault(case.second.made, case.weights)
    require(not wrong, f"once more: {wrong}")
    _same_rewrite(first, case.second.made, "once more")
    return None


@check(KIND, "determinism", unless=_FINITE)
def rewriting_leaves_global_rng(case: HandlerCase) -> Outcome:
    """A rewrite neither uses nor seeds the global random states of Python, NumPy and torch."""
    touched = case.second.touched
    require(not touched, f"the global random state of {', '.join(touched)} is not what it was")
    return None


# Algebra --------------------------------------------------------------------------------------


def _powers(handler: Any, subject: str) -> str | None:
    """Object where input scales may be any numbers."""
    claims = [c for c in claims_of(handler) if isinstance(c, FunctionPreserving)]
    if not any(claim.powers_of_two for claim in claims):
        return "FunctionPreserving(powers_of_two=True) is not claimed"
    return _FINITE(handler, subject)


@check(KIND, "algebra", "B4.a", unless=_powers)
def powers_of_two(case: HandlerCase) -> Outcome:
    """Input scales that are claimed to be powers of two are, and W' = W s to the last bit."""
    scale = case.rewrite.input_scale
    mantissa, _ = torch.frexp(scale)
    require(bool((mantissa == 0.5).all()), f"not all scales are powers of two: {scale.tolist()}")
    for name, weight in case.weights.items():
        wanted = case.transform.rest(weight * scale)
        same_bits(wanted, case.rewrite.weights[name], f"the weight of {name!r}")
    return None


@check(KIND, "algebra", "B4.e", unless=_only("ordinary", claim=RowOrderFree))
def order_of_rows(case: HandlerCase) -> Outcome:
    """Rows and layers in another order are rewritten to the same rows and layers."""
    turned = {name: weight.flip(0).contiguous() for name, weight in reversed(case.weights.items())}
    made = case.again(turned)
    back = {name: weight.flip(0) for name, weight in made.weights.items()}
    _same_rewrite(case.rewrite, replace(made, weights=back), "rows in another order")
    return None


@check(KIND, "algebra", "B4.e", unless=_only("ordinary", claim=SignSymmetric))
def signs_of_weights(case: HandlerCase) -> Outcome:
    """On a grid that is its own mirror image, -W is rewritten to -W', with the same scale."""
    if case.grid.qmin + case.grid.qmax:
        return SKIPPED
    made = case.again({name: -weight for name, weight in case.weights.items()})
    back = {name: -weight for name, weight in made.weights.items()}
    _same_rewrite(case.rewrite, replace(made, weights=back), "-W")
    return None


@check(KIND, "algebra", "B4.e", unless=_only("ordinary", claim=ScaleEquivariant))
def scales_of_weights(case: HandlerCase) -> Outcome:
    """Weights times a power of two are rewritten to W' times it, with the same scale."""
    if case.scheme.scale_dtype == "float16":
        return SKIPPED  # a stored scale may leave the normal range, and round otherwise
    for power in (2.0**-5, 2.0**4):
        made = case.again({name: weight * power for name, weight in case.weights.items()})
        back = {name: weight / power for name, weight in made.weights.items()}
        _same_rewrite(case.rewrite, replace(made, weights=back), f"weights times {power}")
    return None


def _same_rewrite(wanted: Rewrite, found: Rewrite, what: str) -> None:
    same_bits(wanted.input_scale, found.input_scale, f"{what}: input_scale")
    one, other = (r.rotation.signs if r.rotation else torch.zeros(0) for r in (wanted, found))
    same_bits(one, other, f"{what}: signs of the rotation")
    one, other = (torch.zeros(0) if r.kept is None else r.kept for r in (wanted, found))
    same_bits(one, other, f"{what}: columns that are kept")
    require(wanted.threshold == found.threshold, f"{what}: threshold is {found.threshold}")
    for name, weight in wanted.weights.items():
        # + 0.0: the sign of a zero says nothing
        same_bits(weight + 0.0, found.weights[name] + 0.0, f"{what}: the weight of {name!r}")


# Bounds ---------------------------------------------------------------------------------------


@check(KIND, "bound", "B4.a", unless=_FINITE)
def function_preserved(case: HandlerCase) -> Outcome:
    """Rewritten weights, rotated back and over the input scale, are what they were: W = W' / s."""
    scale, rotation, ratios = case.input_scale, case.rewrite.rotation, []
    for name in case.weights:
        weight, made = case.whole(name)
        if rotation is None:
            allowed = bounds.rewrite_element(weight, scale)
            error, what, theorem = weight - made / scale, "|W - W' / s|", "B4.a"
        else:
            blocks, wanted = (len(weight), *rotation.signs.shape), weight * scale
            norms = np.linalg.norm(wanted.reshape(blocks), axis=2)
            allowed = bounds.rotated_block(norms, rotation.block)
            moved = rotation.undo(torch.from_numpy(made)).numpy() - wanted
            error = np.linalg.norm(moved.reshape(blocks), axis=2)
            what, theorem = "||W' Q^T - W s|| of a block", "B4.f"
        ratios.append(within(error, allowed, f"{what} of {name!r}", theorem))
    return max(ratios)


@check(KIND, "bound", "B4.a", unless=_FINITE)
def output_preserved(case: HandlerCase) -> Outcome:
    """The layers compute what they did from what becomes of x in float32: nothing overflows."""
    scale, rotation, ratios = case.input_scale, case.rewrite.rotation, []
    x = case.inputs.astype(np.float64)
    changed = case.transform.move(torch.from_numpy(case.inputs)).double().numpy()
    for name in case.weights:
        weight, made = case.whole(name)
        with np.errstate(invalid="ignore"):
            error = x @ weight.T - changed @ made.T
        if rotation is None:
            allowed, theorem = bounds.rewrite_output(x, weight, scale), "B4.a"
        else:
            allowed, theorem = bounds.rotated_output(x, weight, scale, rotation.block), "B4.f"
        ratios.append(within(error, allowed, f"the outputs of {name!r}", theorem))
    return max(ratios)


# Objectives -----------------------------------------------------------------------------------


@check(KIND, "objective", "B4.c", unless=_only("ordinary", "planted", "wide", claim=RewriteClaim))
def rewrite_is_as_claimed(case: HandlerCase) -> Outcome:
    """What the handler claims of its rewrites holds after rounding to nearest."""
    ratios = [
        certified(claim.certify(case.rewriting))
        for claim in claims_of(case.handler)
        if isinstance(claim, RewriteClaim) and claim.objection(case.rewriting) is None
    ]
    return max(ratios) if ratios else SKIPPED
