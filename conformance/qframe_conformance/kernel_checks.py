"""Checks of kernels: is the answer what the operation's operands and the declared sums allow?

An operation (`qframe.kernels`) names its operands; its judge (`qframe.kernel_judges`) compares an
answer with the oracle, theorem by theorem. Here are the promises that hold for every operation,
and a check for each theorem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qframe import bounds
from qframe.contracts import Unsupported
from qframe.kernel_comparisons import rounded_to
from qframe.kernel_judges import THEOREMS
from qframe.kernels import OPS
from qframe_conformance import kernel_agreement
from qframe_conformance.checks import (
    SKIPPED,
    Outcome,
    Violation,
    check,
    require,
    same_bits,
    within,
)
from qframe_conformance.engine import Refused
from qframe_conformance.kernel_case import KernelCase, compared
from qframe_conformance.kernel_scenarios import scenarios

__all__ = ["KernelCase", "kernel_agreement", "scenarios"]

POISONED = ("x", "x_scale", "q")
"""Operands in which a NaN may stand, whichever an op has."""

_LEAST = np.float32(2.0**-149)  # a scale that would vanish is this

SPIKE = 2.0**-60
"""The probability with which B8.c is wrong about one answer, over the signs that are drawn."""


def _for(*ops: str) -> Callable[[Any, Any], str | None]:
    def objection(kernel: Any, subject: Any) -> str | None:
        return None if kernel.op in ops else f"it says nothing about {kernel.op}"

    return objection


def _judged_by(theorem: str) -> Callable[[Any, Any], str | None]:
    return _for(*(op for op, theorems in THEOREMS.items() if theorem in theorems))


# Structure ------------------------------------------------------------------------------------


@check("kernel", "structure")
def answers(case: KernelCase) -> Outcome:
    """A supported call is answered: with tensors of the promised shapes and dtypes."""
    try:
        case.answer  # noqa: B018 - the call itself
    except Refused as refusal:
        if case.optional and "UnsupportedError" in str(refusal):
            return SKIPPED
        raise Violation(str(refusal)) from None
    return None


@check("kernel", "structure")
def leaves_operands_alone(case: KernelCase) -> Outcome:
    """Nothing is written but the answer: not into operands, not beside them in memory."""
    case.answer  # noqa: B018 - the call itself
    for name, framed in case.frames.items():
        if name in case.op.in_place:
            shape = framed.tensor.shape
            framed.restore(torch.ones(shape, dtype=torch.bool).tril().to(framed.tensor.device))
        require(framed.unchanged(), f"{name!r}, or the memory around it, was changed")
    return None


@check("kernel", "structure")
def says_why_not(case: KernelCase) -> Outcome:
    """`supports` returns None or a reason, and refuses operations and devices that are not its."""
    if case.call is None:
        return SKIPPED
    [other, *_] = [name for name in OPS if name != case.op.name]
    for call in (replace(case.call, op=other), replace(case.call, device="no such device")):
        said = case.kernel.supports(call)
        require(
            isinstance(said, Unsupported) and said.reason.strip(),
            f"supports({call.op!r} on {call.device!r}) returned {said!r}, "
            f"expected Unsupported with a reason",
        )
    return None


@check("kernel", "structure")
def few_tokens(case: KernelCase) -> Outcome:
    """No token to four (rows, sequences) are as good as many; none give an empty answer."""
    if case.optional:
        return SKIPPED
    along, largest = case.op.along, 0.0
    for count in range(min(5, case.sizes()[along])):
        part = case.cut(count)
        if part.call is not None and case.kernel.supports(part.call) is not None:
            continue
        try:
            part.answer  # noqa: B018 - the call itself
        except Refused as refusal:
            raise Violation(f"{count} of the {along}: {refusal}") from None
        for theorem in part.judged:
            largest = max(largest, compared(part, theorem))
    return largest


@check("kernel", "structure", unless=lambda kernel, _: _takes_none(kernel))
def takes_activations(case: KernelCase) -> Outcome:
    """Declared: activations give the bits that the codes which are made of them give."""
    if case.optional:
        return SKIPPED
    for count in (1, 3, case.sizes()[case.op.along]):
        part = case.cut(min(count, case.sizes()[case.op.along]))
        x = part.operands["x_codes"].astype(np.float32) * part.operands["x_scale"][:, None]
        x = rounded_to(x, case.dtype).astype(np.float32)
        largest = np.abs(x).max(1, initial=0)
        scale = np.where(largest > 0, np.maximum(largest / np.float32(127), _LEAST), np.float32(1))
        codes = np.rint(x / scale[:, None]).astype(np.int8)
        wanted = part.with_operands(x_codes=codes, x_scale=scale).answer[0]
        rounded = rounded_to(wanted, case.dtype).astype(np.float32)
        same_bits(rounded, part.of_activations(x), "the answer to activations")
    return None


@check("kernel", "structure", unless=lambda kernel, _: _not_poisoned(kernel))
def nan_comes_out(case: KernelCase) -> Outcome:
    """A NaN or an infinity makes its token's answer not finite; all others are as right as ever."""
    [name] = [name for name in POISONED if name in case.operands]
    operand = case.operands[name].copy()
    rng = np.random.default_rng(case.seed)
    flat = rng.permutation(operand.size)[:2]
    operand.flat[flat] = (np.nan, np.inf)[: len(flat)]
    spoilt = case.with_operands(**{name: operand})
    with np.errstate(all="ignore"):
        oracle = spoilt.op.oracle(*(spoilt.operands[o.name] for o in spoilt.op.operands))
    expected = oracle if isinstance(oracle, tuple) else (oracle,)
    for part, exact in zip(spoilt.answer, expected, strict=True):
        if part.dtype.kind != "f":
            continue  # integers cannot say it; the scale beside them does
        beyond = bounds.OVERFLOW.get(case.dtype, np.inf) / 2  # it may, or may not, overflow
        differs = (np.isfinite(part) != np.isfinite(exact)) & ~(np.abs(exact) > beyond)
        differs |= np.isfinite(part) & ~np.isfinite(exact)
        wrong = np.argwhere(differs).tolist()
        require(
            not wrong,
            f"with {operand.flat[flat]} in {name!r}, the answer at {wrong[:1]} is "
            f"{part[tuple(wrong[0])] if wrong else None}",
        )
    return max(compared(spoilt, theorem) for theorem in spoilt.judged)


@check("kernel", "determinism", unless=lambda kernel, _: _not_deterministic(kernel))
def same_answer_again(case: KernelCase) -> Outcome:
    """The same operands in the same places give the same bits."""
    for part, again in zip(case.answer, case.again(), strict=True):
        same_bits(part, again, "a second call")
    return None


@check("kernel", "determinism", unless=lambda kernel, _: _not_independent(kernel))
def tokens_alone(case: KernelCase) -> Outcome:
    """Declared: a token alone gets the bits that it gets among others."""
    first = case.cut(1)
    for part, whole in zip(first.answer, case.answer, strict=True):
        same_bits(whole[:1], part, "the first token alone")
    return None


# Theorems -------------------------------------------------------------------------------------


@check("kernel", "algebra", "B9.c", unless=_judged_by("B9.c"))
def exact_where_float32_is(case: KernelCase) -> Outcome:
    """Integers that a float32 can add up are added exactly; a token of one 1 returns a column."""
    return compared(case, "B9.c")


@check("kernel", "algebra", "B1.d", unless=_judged_by("B1.d"))
def values_of_codes(case: KernelCase) -> Outcome:
    """Each value is scale * (code - zero_point), rounded at most once."""
    return compared(case, "B1.d")


@check("kernel", "algebra", "B5.b", unless=_judged_by("B5.b"))
def eight_bit_decode(case: KernelCase) -> Outcome:
    """The output is what codes and scales say: integer sums without error."""
    return compared(case, "B5.b")


@check("kernel", "algebra", "B5.f", unless=_judged_by("B5.f"))
def eight_bit_groups(case: KernelCase) -> Outcome:
    """The output is what codes and scales say: the sum of a group has no error."""
    return compared(case, "B5.f")


@check("kernel", "algebra", "B5.d", unless=_judged_by("B5.d"))
def outliers_are_not_rounded(case: KernelCase) -> Outcome:
    """A token of outliers alone carries no error of eight bits."""
    return compared(case, "B5.d")


@check("kernel", "bound", "B5.a", unless=_judged_by("B5.a"))
def eight_bit_output(case: KernelCase) -> Outcome:
    """The output differs from that of the float32 layer by what eight bits may do."""
    return compared(case, "B5.a")


@check("kernel", "bound", "B6.a", unless=_judged_by("B6.a"))
def scales_of_tokens(case: KernelCase) -> Outcome:
    """Each token's scale is absmax / 127, and 1 for a token of zeros."""
    return compared(case, "B6.a")


@check("kernel", "bound", "B6.b", unless=_judged_by("B6.b"))
def codes_of_tokens(case: KernelCase) -> Outcome:
    """Each code is the nearest to its number, in -127..127."""
    return compared(case, "B6.b")


@check("kernel", "bound", "B13.a", unless=_judged_by("B13.a"))
def norms(case: KernelCase) -> Outcome:
    """The output is weight x / sqrt(mean(x^2) + eps), up to float32 arithmetic."""
    return compared(case, "B13.a")


@check("kernel", "bound", "B13.b", unless=_judged_by("B13.b"))
def positions(case: KernelCase) -> Outcome:
    """The key of the newest token is turned by the angles of its position."""
    return compared(case, "B13.b")


@check("kernel", "bound", "B7.e", unless=_judged_by("B7.e"))
def attention_output(case: KernelCase) -> Outcome:
    """The output is attention over what the codes stand for, up to float32 arithmetic."""
    return compared(case, "B7.e")


@check("kernel", "bound", "B7.i", unless=_judged_by("B7.i"))
def attention_denominator(case: KernelCase) -> Outcome:
    """Its logarithm is log sum exp of the logits, up to float32 arithmetic: parts can be merged."""
    return compared(case, "B7.i")


@check("kernel", "bound", "B8.a", unless=_judged_by("B8.a"))
def transform(case: KernelCase) -> Outcome:
    """The output is x diag(signs) H / sqrt(block), up to float32 arithmetic."""
    return compared(case, "B8.a")


@check("kernel", "bound", "B8.b", unless=_judged_by("B8.b"))
def products_are_kept(case: KernelCase) -> Outcome:
    """Products of rotated tokens are those of the tokens: lengths and angles stay."""
    return compared(case, "B8.b")


@check("kernel", "bound", "B8.c", unless=_for("hadamard"))
def spikes_are_spread(case: KernelCase) -> Outcome:
    """No number of a rotated token stands out, not even for a token that is a row of H."""
    x, block = np.asarray(case.operands["x"], np.float64), int(case.operands["block"])
    cut = (len(x), x.shape[1] // block, block)
    size = np.linalg.norm(x.reshape(cut), axis=-1)
    allowed = bounds.incoherence(size, block, x.size, SPIKE) + bounds.hadamard(size, block)
    y = np.abs(case.answer[0]).reshape(cut)
    if case.dtype != "float32":
        beyond = allowed[..., None] >= bounds.OVERFLOW[case.dtype]
        y = np.where(np.isinf(y) & beyond, 0, y)
        allowed = bounds.short_output(allowed, 0.0, case.dtype) + allowed
    return within(y, allowed[..., None], "|y|", "B8.c")


@check("kernel", "bound", "B9.b", unless=_judged_by("B9.b"))
def weight_only_sums(case: KernelCase) -> Outcome:
    """Each output is its sum of products, in any order, in the declared arithmetic."""
    return compared(case, "B9.b")


@check("kernel", "bound", "B9.d", unless=_judged_by("B9.d"))
def second_moments(case: KernelCase) -> Outcome:
    """x^T x is added below and on the diagonal, up to the declared arithmetic."""
    return compared(case, "B9.d")


# What checks ask ------------------------------------------------------------------------------


def _not_deterministic(kernel: Any) -> str | None:
    if not getattr(kernel, "deterministic", True):
        return "the kernel declares that it is not deterministic"
    return None


def _takes_none(kernel: Any) -> str | None:
    if not hasattr(kernel, "from_activations"):
        return "the kernel does not declare from_activations"
    return None


def _not_poisoned(kernel: Any) -> str | None:
    if not {operand.name for operand in OPS[kernel.op].operands} & set(POISONED):
        return "it has no operand in which a NaN may stand"
    return None


def _not_independent(kernel: Any) -> str | None:
    if not getattr(kernel, "token_independent", False):
        return "the kernel does not declare token_independent"
    return None
