"""How fast the kernels of an operation are beside one another, and beside full precision.

Kernels of all backends get the same operands and take turns in every round. Before each call more
memory is read than caches hold, so weights are cold, as in a network that is larger than they are;
then the kernel runs on another weight, so that its code is warm, as after the layer before.
The reading is timed as well: what a kernel reads of its own is a share of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qframe.contracts import Kernel, OpCall
from qframe.errors import RecipeError
from qframe.kernels import OPS, op_of
from qframe.kv_scheme import KVScheme
from qframe.scheme import Scheme
from qframe.timing import in_turn, speedup

FULL = "full precision"  # torch's own product or attention in float32
COLD = 1 << 28  # bytes that are read before each call
_READ = "reading"
_BLOCK, _THRESHOLD, _LOUD, _OUTLIERS, _EPS = 256, 6.0, 30.0, 1000, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is timed.

    rows, columns   of a weight
    tokens          of activations
    num_bits        of a weight in groups of `group_size` columns, and of a cache
    context         tokens of a cache of `heads` heads of `head_dim` channels, for one query each
    """

    rows: int = 4096
    columns: int = 4096
    tokens: int = 1
    num_bits: int = 4
    group_size: int = 128
    context: int = 4096
    heads: int = 32
    head_dim: int = 128

    def __post_init__(self) -> None:
        """Raise RecipeError for sizes that no operation has."""
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.num_bits <= 8:
            raise RecipeError(f"num_bits must lie in 2..8, got {self.num_bits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One operation on operands of one size.

    call      what the kernels were asked for
    times     backend, or FULL -> seconds of each round; the first backend is that of "auto"
    shares    backend -> what it reads a second, over what reading alone does: the median
    refused   backend -> why it does not serve the call
    """

    call: OpCall
    times: Mapping[str, Sequence[float]]
    shares: Mapping[str, float]
    refused: Mapping[str, str]

    def over(self, backend: str, base: str) -> float:
        """Return how many times as fast as another it is: the median of the rounds' ratios."""
        return speedup(self.times[backend], self.times[base])


def measure(
    kernels: Iterable[Kernel],
    ops: Sequence[str] | None = None,
    sizes: Sequence[Sizes] = (Sizes(),),
    *,
    rounds: int = 5,
) -> Iterator[Timed]:
    """Yield what was found for every operation and size.

    kernels   of any backends, in the order of "auto"
    ops       names of operations; None: all

    Raises UnsupportedError for an operation that is not defined, RecipeError for no round.
    """
    if rounds < 1:
        raise RecipeError(f"rounds must be at least 1, got {rounds}")
    chosen = [op_of(name).name for name in ops] if ops is not None else list(OPS)
    known = list(kernels)
    cold = torch.ones(COLD // 4)
    for name in chosen:
        seen: set[tuple[Any, ...]] = set()
        for size in sizes:
            work, twin = (_WORKS[name](size, np.random.default_rng(seed)) for seed in (0, 1))
            if (key := (work.call.shape, str(work.call.scheme))) not in seen:
                seen.add(key)
                asked = [each for each in known if each.op == name]
                yield _timed(work, twin, asked, rounds, cold)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A call: operands that change, those that are laid out before, and what both are in bytes."""

    call: OpCall
    given: tuple[Any, ...]
    constants: tuple[Any, ...]
    nbytes: int
    full: Callable[[], Any] | None = None


def _timed(
    work: _Work, twin: _Work, kernels: list[Kernel], rounds: int, cold: torch.Tensor
) -> Timed:
    refused: dict[str, str] = {}
    served = []
    for kernel in kernels:
        why = kernel.supports(work.call)
        if why is None:
            served.append(kernel)
        else:
            refused[kernel.backend] = why.reason
    calls, twins = _calls(work, served), _calls(twin, served)

    def read() -> float:
        return float(cold.sum())

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        times = in_turn({**calls, _READ: read}, rounds, clock=clock, between=read, twins=twins)
    reading = times.pop(_READ)
    shares = {
        name: statistics.median(
            (work.nbytes / one) / (cold.nbytes / base)
            for one, base in zip(found, reading, strict=True)
        )
        for name, found in times.items()
        if name != FULL
    }
    return Timed(call=work.call, times=times, shares=shares, refused=refused)


def _calls(work: _Work, kernels: list[Kernel]) -> dict[str, Callable[[], Any]]:
    """Return backend -> its call on these operands, laid out; FULL -> that in full precision."""
    calls: dict[str, Callable[[], Any]] = {}
    for kernel in kernels:
        prepare = getattr(kernel, "prepare", None)
        laid = work.constants if prepare is None else (prepare(*work.constants),)
        calls[kernel.backend] = lambda kernel=kernel, laid=laid: kernel(*work.given, *laid)  # type: ignore[misc]
    if work.full is not None and calls:
        calls[FULL] = work.full
    return calls


# Operands ---------------------------------------------------------------------------------------


def _call(op: str, scheme: Any, *shape: int) -> OpCall:
    return OpCall(op=op, device="cpu", dtype="float32", scheme=scheme, shape=shape)


def _x(size: Sizes, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(size.tokens, size.columns)).astype(np.float32))


def _groups(size: Sizes, rng: np.random.Generator) -> tuple[Scheme, tuple[torch.Tensor, ...], int]:
    """Return the scheme of a symmetric weight in groups, its operands, and its bytes, packed."""
    scheme = Scheme(num_bits=size.num_bits, group_size=size.group_size)
    half = 1 << (size.num_bits - 1)
    codes = rng.integers(-half, half, (size.rows, size.columns)).astype(np.int16)
    shape = scheme.scale_shape(size.rows, size.columns)
    scale = (rng.random(shape) + 1).astype(np.float32) / 1000
    index = (np.arange(size.columns) // size.group_size).astype(np.int32)
    parts = codes, scale, np.zeros(shape, np.int16), index
    nbytes = codes.size * size.num_bits // 8 + scale.nbytes
    return scheme, tuple(torch.from_numpy(each) for each in parts), nbytes


def _channels(
    size: Sizes, rng: np.random.Generator
) -> tuple[Scheme, tuple[torch.Tensor, ...], int]:
    """Return the same of one with 8 bits and a scale for each row."""
    codes = rng.integers(-127, 128, (size.rows, size.columns)).astype(np.int8)
    scale = (rng.random(size.rows) + 1).astype(np.float32) / 1000
    scheme = Scheme(num_bits=8, scale_rule="restricted")
    parts = torch.from_numpy(codes), torch.from_numpy(scale)
    return scheme, parts, codes.nbytes + scale.nbytes


def _product(size: Sizes, rng: np.random.Generator) -> Callable[[], torch.Tensor]:
    """Return what a linear layer in full precision does."""
    weight = torch.from_numpy(rng.normal(size=(size.rows, size.columns)).astype(np.float32))
    x = _x(size, rng)
    return lambda: functional.linear(x, weight)


def _codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of tokens, and their scales."""
    scale = x.abs().amax(1) / 127
    return (x / scale[:, None]).round().to(torch.int8), scale


def _dequantize(size: Sizes, rng: np.random.Generator) -> _Work:
    scheme, parts, nbytes = _groups(size, rng)
    call = _call("dequantize", scheme, size.rows, size.columns)
    written = 4 * size.rows * size.columns
    return _Work(call=call, given=(), constants=parts, nbytes=nbytes + written)


def _weight_only(size: Sizes, rng: np.random.Generator) -> _Work:
    scheme, parts, nbytes = _groups(size, rng)
    return _linear("linear_weight_only", size, rng, scheme, (_x(size, rng),), parts, nbytes)


def _int8(size: Sizes, rng: np.random.Generator) -> _Work:
    scheme, parts, nbytes = _channels(size, rng)
    return _linear("linear_int8", size, rng, scheme, _codes_of(_x(size, rng)), parts, nbytes)


def _int8_groups(size: Sizes, rng: np.random.Generator) -> _Work:
    scheme, parts, nbytes = _groups(size, rng)
    codes = _codes_of(_x(size, rng))
    return _linear("linear_int8_groups", size, rng, scheme, codes, parts, nbytes)


def _int8_outliers(size: Sizes, rng: np.random.Generator) -> _Work:
    """One column in a thousand is loud."""
    scheme, (codes, scale), nbytes = _channels(size, rng)
    x, loud = _x(size, rng), -(-size.columns // _OUTLIERS)
    x[:, torch.from_numpy(rng.permutation(size.columns)[:loud])] = _LOUD
    parts = codes, scale, codes.float() * scale[:, None]
    return _linear("linear_int8_outliers", size, rng, scheme, (x, _THRESHOLD), parts, nbytes)


def _linear(
    op: str,
    size: Sizes,
    rng: np.random.Generator,
    scheme: Scheme,
    given: tuple[Any, ...],
    constants: tuple[torch.Tensor, ...],
    nbytes: int,
) -> _Work:
    call = _call(op, scheme, size.tokens, size.columns, size.rows)
    full = _product(size, rng)
    return _Work(call=call, given=given, constants=constants, nbytes=nbytes, full=full)


def _activations(size: Sizes, rng: np.random.Generator) -> _Work:
    x = _x(size, rng)
    call = _call("quantize_activations", None, size.tokens, size.columns)
    return _Work(call=call, given=(x,), constants=(), nbytes=x.nbytes + x.nbytes // 4)


def _hadamard(size: Sizes, rng: np.random.Generator) -> _Work:
    x = _x(size, rng)
    block = math.gcd(size.columns, _BLOCK)
    signs = torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), size.columns))
    call = _call("hadamard", None, size.tokens, size.columns, block)
    return _Work(call=call, given=(x, signs, block), constants=(), nbytes=2 * x.nbytes)


def _rms_norm(size: Sizes, rng: np.random.Generator) -> _Work:
    x, weight = _x(size, rng), _normal(rng, (size.columns,))
    call = _call("rms_norm", None, size.tokens, size.columns)
    return _Work(call=call, given=(x, weight, _EPS), constants=(), nbytes=2 * x.nbytes)


def _hessian(size: Sizes, rng: np.random.Generator) -> _Work:
    x = _x(size, rng)
    hessian = torch.zeros(size.columns, size.columns, dtype=torch.float64)
    call = _call("hessian_update", None, size.tokens, size.columns)
    return _Work(call=call, given=(hessian, x), constants=(), nbytes=x.nbytes + hessian.nbytes)


def _attention(size: Sizes, rng: np.random.Generator) -> _Work:
    """Keys in groups of 64 tokens of a channel, values with a scale for each token."""
    shape = (1, size.heads, size.context, size.head_dim)
    keys = KVScheme(num_bits=size.num_bits, axis="channel", group_size=64)
    values = KVScheme(num_bits=size.num_bits, axis="token")
    given: list[Any] = [_normal(rng, (1, size.heads, size.head_dim))]
    nbytes = 0
    for scheme in (keys, values):
        scales = scheme.scale_shape(shape)
        channel = scheme.axis == "channel"
        long = scheme.step if channel else size.head_dim
        rows = scales[2] * size.head_dim if channel else size.context
        words = -(-long * size.num_bits // 32)
        packed = rng.integers(-(2**31), 2**31, (*shape[:2], rows, words)).astype(np.int32)
        scale = torch.from_numpy((rng.random(scales) + 1).astype(np.float32) / 10)
        given += [torch.from_numpy(packed), scale, -scale * (1 << size.num_bits) / 2, scheme]
        nbytes += packed.nbytes + 2 * scale.nbytes
    query, k, v = (_normal(rng, (*shape[:2], n, size.head_dim)) for n in (1, *[size.context] * 2))
    sizes = (1, size.heads, size.heads, size.context, size.head_dim)
    return _Work(
        call=_call("attention_kv", (keys, values), *sizes),
        given=(*given, size.context),
        constants=(),
        nbytes=nbytes,
        full=lambda: functional.scaled_dot_product_attention(query, k, v),
    )


def _attention_rotary(size: Sizes, rng: np.random.Generator) -> _Work:
    shape = (1, size.heads, size.head_dim)
    past = (1, size.heads, size.context, size.head_dim)
    q, k, v, keys, values = (_normal(rng, each) for each in (*[shape] * 3, *[past] * 2))
    angles = _normal(rng, (1, size.head_dim // 2)).repeat(1, 2)
    scaling = size.head_dim**-0.5
    sizes = (1, size.heads, size.heads, size.context, size.head_dim)
    return _Work(
        call=_call("attention_rotary", None, *sizes),
        given=(q, k, v, angles.cos(), angles.sin(), keys, values, scaling),
        constants=(),
        nbytes=keys.nbytes + values.nbytes,
        full=lambda: functional.scaled_dot_product_attention(q[:, :, None], keys, values),
    )


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


_WORKS: Mapping[str, Callable[[Sizes, np.random.Generator], _Work]] = {
    "dequantize": _dequantize,
    "linear_weight_only": _weight_only,
    "quantize_activations": _activations,
    "linear_int8": _int8,
    "linear_int8_groups": _int8_groups,
    "linear_int8_outliers": _int8_outliers,
    "hadamard": _hadamard,
    "rms_norm": _rms_norm,
    "attention_kv": _attention,
    "attention_rotary": _attention_rotary,
    "hessian_update": _hessian,
}
