"""Checks of kernels that need no bound: integers, and the same kernel run in other ways.

On integers that float32 holds, no order of summation and no rounding makes a difference. So every
kernel of an operation, on every backend, has to give the oracle's number, and with it the number of
every other kernel. Which is the strongest comparison that there is, and the one that mistakes of
one bit do not survive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qframe.kernel_comparisons import rounded_to
from qframe.kernels import arithmetic_of
from qframe_conformance.checks import SKIPPED, Outcome, Violation, check, same_bits
from qframe_conformance.engine import Refused
from qframe_conformance.kernel_case import KernelCase, sides

EXACT = 1 << 24  # up to which float32 holds every integer
Array = np.ndarray[Any, Any]
Whole = Callable[[dict[str, Any], np.random.Generator], dict[str, Any] | None]


# Integers -------------------------------------------------------------------------------------


@check("kernel", "algebra", "B9.c", unless=lambda kernel, _: _never_whole(kernel))
def integers_exactly(case: KernelCase) -> Outcome:
    """On integers, with scales that are powers of two, the answer is the oracle's, to the bit."""
    whole = whole_case(case)
    if whole is None:
        return SKIPPED
    case.answer  # noqa: B018 - a call that is refused is for another check
    try:
        answer = whole.answer
    except Refused as refusal:
        raise Violation(f"on integers: {refusal}") from None
    oracle = case.op.oracle(*(whole.operands[o.name] for o in case.op.operands))
    expected = oracle if isinstance(oracle, tuple) else (oracle,)
    promised = case.op.answer or case.op.operands[:1]
    for number, (part, real, of) in enumerate(zip(answer, expected, promised, strict=True)):
        exact = rounded_to(np.asarray(real), case.dtype) if of.activation else np.asarray(real)
        wrong = part != exact.astype(part.dtype)
        wrong = np.tril(wrong) if case.op.in_place else wrong  # nothing is said of what is above
        if wrong.any():
            raise Violation(f"on integers: {sides(whole, number, exact, wrong)}")
    return None


def whole_case(case: KernelCase) -> KernelCase | None:
    """Return the call with integers in the place of its numbers; None where there is no such."""
    rng = np.random.default_rng([case.seed, EXACT])
    made = _WHOLE[case.op.name](case.operands, rng)
    if made is None:
        return None
    if "zero_point" in made and arithmetic_of(case.kernel, made, case.dtype).inputs:
        # Operands that are rounded hold a difference of two codes, and not of any zero point.
        codes = made["codes"]
        least, largest = codes.min(initial=0), codes.max(initial=0)
        made = {**made, "zero_point": np.clip(made["zero_point"], least, largest)}
    return case.with_operands(**made)


def _never_whole(kernel: Any) -> str | None:
    return None if kernel.op in _WHOLE else f"it says nothing about {kernel.op}"


def _fitting(codes: Array, count: int, other: int) -> Array:
    """Return integers cut so that sums of `count` products with others up to `other` fit."""
    most = max(1, EXACT // max(count * other, 1))
    return np.clip(codes, -most, most).astype(codes.dtype)


def _evenly(count: int) -> int:
    """Return up to which both factors of `count` products may go."""
    return max(1, int(np.sqrt(EXACT // max(count, 1))))


def _ones(operand: Array, rng: np.random.Generator) -> Array:
    """Return scales that are powers of two, the same for all: they change no bit of a sum."""
    return np.full_like(operand, 2.0 ** int(rng.integers(-3, 4)))


def _steps(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**operands, "scale": _ones(operands["scale"], rng)}


def _weight_only(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    made = _steps(operands, rng)
    # Kernels take codes and zero points apart, so both have to fit.
    size = np.abs(made["codes"].astype(np.int64)).max(initial=0)
    size += np.abs(made["zero_point"].astype(np.int64)).max(initial=0)
    x = rng.integers(-8, 9, made["x"].shape)
    made["x"] = _fitting(x, x.shape[1], int(size)).astype(np.float32)
    return made


def _int8(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Full codes where their sums, of 32 bits, are rounded once; or those whose sums fit."""
    made = dict(operands)
    for name in ("x_scale", "w_scale"):
        made[name] = _ones(made[name], rng)
    if rng.integers(2):
        most = _evenly(made["x_codes"].shape[1])
        for name in ("x_codes", "w_codes"):
            made[name] = np.clip(made[name], -most, most).astype(np.int8)
    return made


def _groups(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    made = _steps(operands, rng)
    made["x_scale"] = _ones(made["x_scale"], rng)
    size = np.abs(made["codes"].astype(np.int64)).max(initial=0)
    size += np.abs(made["zero_point"].astype(np.int64)).max(initial=0)
    made["x_codes"] = _fitting(made["x_codes"], made["x_codes"].shape[1], int(size))
    return made


def _outliers(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Tokens whose largest small number is 127, so that their scale is 1, and some outliers."""
    made = dict(operands)
    tokens, columns = made["x"].shape
    threshold = 128.0 if operands["threshold"] else 0.0
    x = rng.integers(-127, 128, (tokens, columns))
    keep = columns - columns // 4 if threshold else columns
    x[:, rng.integers(keep)] = 127
    x[:, keep:] = 0
    x[rng.integers(tokens), keep:] = 128
    made["x"] = x.astype(np.float32)
    limit = max(1, EXACT // (128 * max(columns, 1)))
    made["w_codes"] = np.clip(made["w_codes"], -limit, limit).astype(np.int8)
    made["w_scale"] = np.ones_like(made["w_scale"])
    made["weight"] = made["w_codes"].astype(np.float32)
    return {**made, "threshold": threshold}


def _tokens(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Tokens whose scale is a power of two that float16 holds: codes are numbers themselves."""
    x = rng.integers(-127, 128, operands["x"].shape)
    x[:, rng.integers(x.shape[1])] = 127
    powers = 2.0 ** rng.integers(-20, 10, (len(x), 1))
    return {"x": (x * powers).astype(np.float32)}


def _hadamard(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any] | None:
    """Sums of a block, divided by its root, if that is a power of two."""
    if int(operands["block"]).bit_length() % 2 == 0:
        return None
    return {**operands, "x": rng.integers(-8, 9, operands["x"].shape).astype(np.float32)}


def _moments(operands: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.integers(-100, 101, operands["x"].shape).astype(np.float32)
    return {"x": x, "hessian": np.rint(operands["hessian"])}


_WHOLE: dict[str, Whole] = {
    "dequantize": _steps,
    "linear_weight_only": _weight_only,
    "linear_int8": _int8,
    "linear_int8_groups": _groups,
    "linear_int8_outliers": _outliers,
    "quantize_activations": _tokens,
    "hadamard": _hadamard,
    "hessian_update": _moments,
}
"""Operation -> what makes its operands integers."""


# Other ways of running it ---------------------------------------------------------------------


@check("kernel", "determinism", unless=lambda kernel, _: _has_no_variants(kernel))
def variants_agree(case: KernelCase) -> Outcome:
    """Declared: the kernel's variants, such as other orders of threads, give the same bits."""
    if case.optional:
        return SKIPPED
    for name, other in case.kernel.variants.items():
        try:
            answer = case.by(other).answer
        except Refused as refusal:
            raise Violation(f"variant {name!r}: {refusal}") from None
        for part, again in zip(case.answer, answer, strict=True):
            same_bits(part, again, f"variant {name!r}")
    return None


def _has_no_variants(kernel: Any) -> str | None:
    return None if getattr(kernel, "variants", None) else "the kernel declares no variants"
