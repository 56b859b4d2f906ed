"""What a kernel is tried on: for each operation the variants that it supports."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qframe import KVScheme, Scheme, bounds
from qframe.contracts import OpCall
from qframe.kernel_comparisons import rounded_to
from qframe.kernels import op_of, short_dtypes
from qframe_conformance import (
    kernel_draws,
    kernel_draws_int8,
    kernel_draws_other,
    kernel_rounds,
)
from qframe_conformance.engine import Scenario
from qframe_conformance.kernel_case import KernelCase

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator], dict[str, Any]]
Variant = tuple[str, OpCall, Draw]  # the scenario's id, what `supports` is asked, the operands
KVPair = tuple[KVScheme, KVScheme]

W8A8 = Scheme(num_bits=8, strategy="channel", scale_rule="restricted")
SHORT = (7, 1, 2, 3, 17, 65, 200)
TILES = ((70, 130, 131), (53, 4101, 67), (35, 257, 259), (129, 96, 65))
"""(tokens, columns, rows) that take several tiles each way, none of them whole."""

SMALL_TILES = ((70, 33, 67), (35, 97, 70))


def call_of(kernel: Any, shape: tuple[int, ...], scheme: Scheme | KVPair | None = None) -> OpCall:
    """Return the call that `supports` is asked about."""
    device = getattr(kernel, "device", "cpu")
    return OpCall(op=kernel.op, device=device, dtype="float32", scheme=scheme, shape=shape)


LARGEST_SIMULATED = 1 << 18
"""Products of a call that a kernel is tried on which simulates another machine."""


def scenarios(kernel: Any) -> list[Scenario]:
    """Return a scenario for every family of variants of which the kernel supports some."""
    families: dict[str, list[Variant]] = {}
    for variant in itertools.chain(variants(kernel), _short_variants(kernel)):
        if _within_reach(kernel, variant[1]) and kernel.supports(variant[1]) is None:
            families.setdefault(variant[0], []).append(variant)
    return [
        Scenario(name, cases(kernel, tuple(supported)), supported[0][1])
        for name, supported in families.items()
    ]


def _within_reach(kernel: Any, call: OpCall) -> bool:
    sizes = call.shape[:2] if call.op == "hadamard" else call.shape  # not its block: butterflies
    simulates = getattr(kernel, "by_name_only", False)
    return not simulates or math.prod(sizes) <= LARGEST_SIMULATED


def _tiles(kernel: Any) -> tuple[tuple[int, int, int], ...]:
    """Return shapes of several tiles; of a kernel that simulates, smaller ones beside them."""
    return (*SMALL_TILES, *TILES) if getattr(kernel, "by_name_only", False) else TILES


def _in_blocks(kernel: Any) -> bool:
    """Return whether threads of a kernel come in blocks, which go round and stand beside others."""
    return getattr(kernel, "by_name_only", False) or getattr(kernel, "device", "cpu") != "cpu"


def variants(kernel: Any) -> Iterator[Variant]:
    """Yield what a kernel of this op could support, a small and awkward one first."""
    yield from _VARIANTS[kernel.op](kernel)
    if _in_blocks(kernel):
        for name, shape, scheme, draw in kernel_rounds.of(kernel.op):
            yield name, call_of(kernel, shape, scheme), draw


def _short_variants(kernel: Any) -> Iterator[Variant]:
    """Yield the variants of which there are some with activations of 16 bits."""
    if not op_of(kernel.op).takes_activations and not hasattr(kernel, "from_activations"):
        return
    for name, call, draw in variants(kernel):
        if kernel.op in _IN_SHORT and name not in _IN_SHORT[kernel.op]:
            continue
        for dtype in short_dtypes(kernel, call):
            yield f"{name}, {dtype}", replace(call, dtype=dtype), draw


_IN_SHORT = {
    "linear_weight_only": (
        "int4-asymmetric-group",
        "int8-asymmetric-channel",
        "few, rounds",
        "few, rounds of 8 bits",
        "few, odd groups",
        "few, odd groups of 8 bits",
        "one, rounds",
        "one, rounds of 8 bits",
        "one, odd groups",
        "one, odd groups of 8 bits",
        "one, a step of 8 bits",
        "many, tiles",
        "many, odd tiles",
        "many, tiles of 8 bits",
        *(name for name, *_ in kernel_rounds.HALVES),
    ),
    "linear_int8": ("short", "few", "nearly two tiles"),
    "linear_int8_groups": (
        "int4-asymmetric-group",
        *(name for name, *_ in kernel_rounds.GROUPS),
    ),
    "attention_kv": ("token token int4", "channel channel int3"),
    "hessian_update": ("runs", "floats"),
}
"""Families that are drawn with 16 bits, too, of operations that have many; of others all."""


@st.composite
def cases(draw: st.DrawFn, kernel: Any, supported: tuple[Variant, ...]) -> KernelCase:
    """Draw one of the variants, and operands from a seed.

    The first variant is what counterexamples shrink to. The others are turned round by the name of
    the family, so that families that are drawn from the same seed meet different ones.
    """
    turn = zlib.crc32(supported[0][0].encode())
    choice = draw(st.integers(0, len(supported) - 1))
    if choice > 0:
        choice = 1 + (choice - 1 + turn) % (len(supported) - 1)
    _, call, operands = supported[choice]
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng([seed, turn])
    made = operands(rng)
    scattered = (
        isinstance(call.scheme, Scheme)
        and "group_index" in made
        and call.scheme.strategy == "group"
        and len(set(made["group_index"].tolist())) > 1
        and int(rng.integers(4)) == 0
    )
    if scattered:
        made = kernel_draws.shuffled_groups(rng, made)
    for operand in op_of(kernel.op).operands:
        if operand.activation and call.dtype != "float32":
            made[operand.name] = _held_by(call.dtype, made[operand.name])
    as_drawn = supported[0][0].removesuffix(f", {call.dtype}") in kernel_rounds.AS_DRAWN
    if call.dtype == "float16" and call.op in _LINEAR and not as_drawn:
        x = made["x"]
        for token, most in zip(rng.permutation(len(x)), (LOUD, FAINT), strict=False):
            size = np.abs(x[token]).max(initial=0) or 1
            x[token] = _held_by(call.dtype, x[token] * (most / size))
    return KernelCase(kernel, made, seed, optional=scattered, call=call, dtype=call.dtype)


LOUD, FAINT = 3e4, 2.0**-14
"""The largest numbers of tokens whose outputs are beyond what float16 holds, or subnormal there."""

_LINEAR = ("linear_weight_only", "linear_int8_outliers", "hadamard")


def _held_by(dtype: str, numbers: Array) -> Array:
    """Return the nearest finite numbers of a dtype of 16 bits, as float32."""
    largest = bounds.OVERFLOW[dtype] * (1 - bounds.UNIT[dtype])
    return rounded_to(np.clip(numbers, -largest, largest), dtype).astype(np.float32)


# The variants of each op ----------------------------------------------------------------------


@cache
def _schemes() -> tuple[tuple[str, tuple[Scheme, ...]], ...]:
    """Return the families of weight schemes."""
    found: list[tuple[str, tuple[Scheme, ...]]] = []
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        kind = f"int{bits}-{'symmetric' if symmetric else 'asymmetric'}"
        for strategy in ("tensor", "channel"):
            scheme = Scheme(num_bits=bits, symmetric=symmetric, strategy=strategy)
            found.append((f"{kind}-{strategy}", (scheme,)))
        sizes = (*kernel_draws.GROUPS, *kernel_draws.COLUMNS[3:])
        groups = tuple(
            Scheme(num_bits=bits, symmetric=symmetric, group_size=size) for size in sizes
        )
        found.append((f"{kind}-group", groups))
    return tuple(found)


def _of_weights(kernel: Any) -> Iterator[Variant]:
    linear = kernel.op == "linear_weight_only"
    for (name, schemes), columns, rows in itertools.product(
        _schemes(), kernel_draws.COLUMNS, kernel_draws.ROWS
    ):
        for scheme in schemes:
            if scheme.group_size is not None and scheme.group_size > columns + 32:
                continue
            shape = (17, columns, rows) if linear else (rows, columns)
            yield name, call_of(kernel, shape, scheme), _weights(scheme, columns, rows, linear)


def _weights(scheme: Scheme, columns: int, rows: int, linear: bool) -> Draw:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        made = kernel_draws.weight(rng, scheme, rows, columns)
        if not linear:
            return made
        width = scheme.group_width(columns)
        return {"x": kernel_draws.activations(rng, columns, width), **made}

    return draw


def _of_groups(kernel: Any) -> Iterator[Variant]:
    small = ((9, 17, 3), (5, 65, 8), (9, 131, 17), (2, 1, 1), (8, 257, 33))
    shapes = (*small, *_tiles(kernel)[:3])
    for (name, schemes), (tokens, columns, rows) in itertools.product(_schemes(), shapes):
        for scheme in schemes:
            if scheme.group_size is not None and scheme.group_size > columns + 32:
                continue
            call = call_of(kernel, (tokens, columns, rows), scheme)
            yield name, call, _draw(kernel_draws_int8.groups, tokens, columns, rows, scheme)


def _of_activations(kernel: Any) -> Iterator[Variant]:
    for columns in SHORT:
        call = call_of(kernel, (kernel_draws_int8.TOKENS, columns), W8A8)
        yield "tokens", call, _draw(kernel_draws_int8.activations, columns)


def _of_int8(kernel: Any) -> Iterator[Variant]:
    shapes = [("short", 9, columns, rows) for columns in SHORT for rows in (3, 1, 8, 17)]
    shapes += [("long", 9, columns, 3) for columns in (1101, 1600)]
    shapes += [("long", 5, kernel_draws_int8.LIMIT, 3)]
    if getattr(kernel, "by_name_only", False):
        shapes += [("long", 1, kernel_draws_int8.LIMIT, 1)]
    shapes += [("tiles", *shape) for shape in _tiles(kernel)]
    for name, *shape in shapes:
        call = call_of(kernel, tuple(shape), W8A8)
        yield name, call, _draw(kernel_draws_int8.codes, *shape)


def _of_outliers(kernel: Any) -> Iterator[Variant]:
    for columns, rows, threshold in itertools.product(SHORT, (3, 1, 8, 17), (6.0, 0.25, 1.0, 0.0)):
        name = "outliers" if threshold else "plain"
        call = call_of(kernel, (13, columns, rows), W8A8)
        yield name, call, _draw(kernel_draws_int8.outliers, columns, rows, threshold)
    for columns, threshold in itertools.product((4001, 1601), (6.0, 0.0)):
        call = call_of(kernel, (13, columns, 3), W8A8)
        yield "long", call, _draw(kernel_draws_int8.outliers, columns, 3, threshold)
    for (_, columns, rows), threshold in itertools.product(_tiles(kernel), (6.0, 1.0)):
        call = call_of(kernel, (13, columns, rows), W8A8)
        yield "tiles", call, _draw(kernel_draws_int8.outliers, columns, rows, threshold)


def _of_hadamard(kernel: Any) -> Iterator[Variant]:
    sizes = [("short", block, n) for block in (4, 1, 2, 8, 16, 64) for n in (2, 1, 3)]
    sizes += [("long", block, n) for block in (128, 256) for n in (2, 1, 3)]
    for name, block, blocks in sizes:
        call = call_of(kernel, (9, block * blocks, block))
        yield name, call, _draw(kernel_draws_other.hadamard, block * blocks, block)


def _of_norms(kernel: Any) -> Iterator[Variant]:
    for columns in (*SHORT, 576, 4097):
        name = "long" if columns > 500 else "short"
        call = call_of(kernel, (9, columns))
        yield name, call, _draw(kernel_draws_other.norm, columns)


CACHES = (
    ((4, 2), 5, 8, 3, False),
    ((6, 3), 33, 20, None, True),
    ((2, 1), 70, 32, 8, False),
    ((2, 2), 70, 64, 32, True),
    ((2, 1), 1, 16, 16, False),
    ((4, 2), 33, 20, None, False),
    ((2, 2), 2, 11, 3, True),
)
"""((heads, kv heads), tokens, head_dim, group_size, symmetric)"""


def _of_attention(kernel: Any) -> Iterator[Variant]:
    kinds = itertools.product(("token", "channel"), ("token", "channel"), (4, 8, 2, 3))
    for keys, values, bits in kinds:
        for heads, tokens, width, size, symmetric in CACHES:
            name = f"{keys} {values} int{bits}"
            schemes = (
                _kv(bits, keys, size, symmetric=symmetric),
                _kv(bits, values, size, symmetric=symmetric),
            )
            yield _attention(kernel, name, (*heads, tokens, width), schemes)
        for tokens, size in ((2500, 64), (1025, None), (1100, 48)):
            schemes = _kv(bits, keys, size, symmetric=False), _kv(8, values, size, symmetric=True)
            yield _attention(kernel, "pieces", (2, 1, tokens, 16), schemes)


def _attention(
    kernel: Any, name: str, shape: tuple[int, int, int, int], schemes: KVPair
) -> Variant:
    *heads, tokens, width = shape
    draw = _draw(kernel_draws_other.attention, heads, tokens, width, *schemes)
    return name, call_of(kernel, (5, *shape), schemes), draw


def _of_newest(kernel: Any) -> Iterator[Variant]:
    sizes = (((4, 2), 5, 8), ((9, 3), 40, 64), ((2, 2), 0, 16), ((6, 1), 33, 20), ((1, 1), 1, 2))
    for (heads, tokens, width), scaling in itertools.product(
        (*sizes, ((2, 1), 2500, 16)), (None, 0.3)
    ):
        call = call_of(kernel, (4, *heads, tokens, width))
        factor = width**-0.5 if scaling is None else scaling
        draw = _draw(kernel_draws_other.newest, heads, tokens, width, factor)
        yield "long" if tokens > 1000 else "short", call, draw


@cache
def _kv(bits: int, axis: Any, size: int | None, *, symmetric: bool) -> KVScheme:
    size = 128 if size is None and axis == "channel" else size
    return KVScheme(num_bits=bits, axis=axis, group_size=size, symmetric=symmetric)


def _of_moments(kernel: Any) -> Iterator[Variant]:
    for tokens, columns in itertools.product((3, 1, 8, 70), (5, 1, 3, 17, 65, 131)):
        for whole in (False, True):
            call = call_of(kernel, (tokens, columns))
            draw = _draw(kernel_draws_other.moments, tokens, columns, whole=whole)
            yield "integers" if whole else "floats", call, draw


def _draw(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    return lambda rng: function(rng, *args, **options)


_VARIANTS: dict[str, Callable[[Any], Iterator[Variant]]] = {
    "dequantize": _of_weights,
    "linear_weight_only": _of_weights,
    "quantize_activations": _of_activations,
    "linear_int8": _of_int8,
    "linear_int8_groups": _of_groups,
    "linear_int8_outliers": _of_outliers,
    "hadamard": _of_hadamard,
    "rms_norm": _of_norms,
    "attention_kv": _of_attention,
    "attention_rotary": _of_newest,
    "hessian_update": _of_moments,
}
