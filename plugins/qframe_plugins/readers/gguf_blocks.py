"""The blocks of ggml as codes, scales and offsets: w = scale * v + offset.

Sources: ggml's blocks, ggml-common.h and ggml-quants.c. With d, m float16, q the bits of a code and
a, b scales of 4 or 6 bits, a block stands for

Q4_0, Q5_0, Q8_0   d (q - 8), d (q - 16), d q            32 weights; d of either sign
Q4_1, Q5_1         d q + m                               32 weights
Q2_K               d a q - m b                           16 groups of 16 weights, 2 bits
Q3_K, Q6_K         d a (q - 4), d a (q - 32)             16 groups of 16; a of either sign
Q4_K, Q5_K         d a q - m b                           8 groups of 32
IQ4_NL, IQ4_XS     d v(q), d a v(q)                      32 weights; 8 groups of 32; a table v
MXFP4              2^(e - 127) v(q)                      32 weights; the numbers of fp4_e2m1

The products of a scale and a code are exact in float32, so that their sum with an offset, where
there is one, is the only thing that is rounded, and no order of operations gives another weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qframe import Grid

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_RANKS = (0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7)  # of codes, from 0 on


@dataclass(frozen=True, slots=True)
class BlockKind:
    """How a type of ggml has its weights.

    bits     of a code
    width    weights that share a scale
    grid     the codes, and what they stand for
    split    bytes of blocks [n, bytes] -> codes [n, weights] int16, scales and offsets [n, groups]
             float32
    stored   the dtype that d and m are rounded to after codes have been chosen; None where codes
             are chosen for the scale that is stored
    most     the largest number of steps of d that a scale may have
    scheme   the nearest one of qframe's; None for none
    """

    bits: int
    width: int
    grid: Grid
    split: Callable[[Array], tuple[Array, Array, Array]]
    stored: str | None
    scheme: Mapping[str, Any] | None
    most: int = 1


def _float16(raw: Array) -> Array:
    """Return float16 [n, 1] float32, of two bytes each."""
    import numpy as np

    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Array) -> Array:
    """Return codes [n, 2 k] of bytes [n, k]: low halves first."""
    import numpy as np

    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.int16)


def _fields(raw: Array, run: int, bits: int) -> Array:
    """Return fields [n, bytes * 8 / bits] of bytes: of each run of them first the lowest ones."""
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = raw.reshape(len(raw), -1, 1, run) >> shifts & ((1 << bits) - 1)
    return split.reshape(len(raw), -1).astype(np.int16)


def _fifth(raw: Array) -> Array:
    """Return the fifth bits [n, 32] of a word of four bytes, as numbers 0 and 16."""
    import numpy as np

    word = np.ascontiguousarray(raw).view("<u4")
    return ((word >> np.arange(32, dtype=np.uint32) & 1) << 4).astype(np.int16)


def _plain(half: int) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Return what splits Q4_0 and Q5_0."""

    def split(raw: Array) -> tuple[Array, Array, Array]:
        d = _float16(raw[:, :2])
        five = half == 16
        codes = _nibbles(raw[:, 6:] if five else raw[:, 2:])
        if five:
            codes |= _fifth(raw[:, 2:6])
        return codes - half, d, d * 0

    return split


def _with_offset(five: bool) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Return what splits Q4_1 and Q5_1."""

    def split(raw: Array) -> tuple[Array, Array, Array]:
        codes = _nibbles(raw[:, 8:] if five else raw[:, 4:])
        if five:
            codes |= _fifth(raw[:, 4:8])
        return codes, _float16(raw[:, :2]), _float16(raw[:, 2:4])

    return split


def _q8_0(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    d = _float16(raw[:, :2])
    return raw[:, 2:].view(np.int8).astype(np.int16), d, d * 0


def _q2_k(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    pairs, d, m = raw[:, :16], _float16(raw[:, 80:82]), _float16(raw[:, 82:84])
    scale, offset = d * (pairs & 15).astype(np.float32), -m * (pairs >> 4).astype(np.float32)
    return _fields(raw[:, 16:80], 32, 2), scale, offset


def _q3_k(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    high = _fields(raw[:, :32], 32, 1)  # 1 where 4 is not taken away
    low = _nibbles(raw[:, 96:104])
    six = low | _fields(raw[:, 104:108], 4, 2) << 4
    scale = _float16(raw[:, 108:110]) * (six - 32).astype(np.float32)
    return _fields(raw[:, 32:96], 32, 2) + 4 * high - 4, scale, scale * 0


def _six_bits(raw: Array) -> tuple[Array, Array]:
    """Return the scales a and b, [n, 8] float32, of twelve bytes."""
    import numpy as np

    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    a = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    b = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return a.astype(np.float32), b.astype(np.float32)


def _q4_k(raw: Array) -> tuple[Array, Array, Array]:
    a, b = _six_bits(raw[:, 4:16])
    scale, offset = _float16(raw[:, :2]) * a, -_float16(raw[:, 2:4]) * b
    return _fields(raw[:, 16:], 32, 4), scale, offset


def _q5_k(raw: Array) -> tuple[Array, Array, Array]:
    a, b = _six_bits(raw[:, 4:16])
    scale, offset = _float16(raw[:, :2]) * a, -_float16(raw[:, 2:4]) * b
    return _fields(raw[:, 48:], 32, 4) | _fields(raw[:, 16:48], 32, 1) << 4, scale, offset


def _q6_k(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    low, high = _fields(raw[:, :128], 64, 4), _fields(raw[:, 128:192], 32, 2)
    scale = _float16(raw[:, 208:]) * raw[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high << 4) - 32, scale, scale * 0


def _iq4_nl(raw: Array) -> tuple[Array, Array, Array]:
    d = _float16(raw[:, :2])
    return _nibbles(raw[:, 2:]), d, d * 0


def _iq4_xs(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    word = np.ascontiguousarray(raw[:, 2:4]).view("<u2")
    high = (word >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.int16)
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(len(raw), 8)
    scale = _float16(raw[:, :2]) * ((low | high << 4) - 32).astype(np.float32)
    codes = np.concatenate([_nibbles(raw[:, at : at + 16]) for at in range(8, 136, 16)], axis=1)
    return codes, scale, scale * 0


def _mxfp4(raw: Array) -> tuple[Array, Array, Array]:
    import numpy as np

    scale = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 127)
    return np.array(FP4_RANKS, np.int16)[_nibbles(raw[:, 1:])], scale, scale * 0


_TABLE = Grid(0, 15, tuple(float(value) for value in IQ4))
_SIGNED = {"symmetric": True, "scale_dtype": "float32"}
_OFFSET = {"symmetric": False, "scale_dtype": "float32"}

KINDS: Mapping[str, BlockKind] = {
    "Q4_0": BlockKind(
        4, 32, Grid(-8, 7), _plain(8), "float16", {"num_bits": 4, "group_size": 32, **_SIGNED}
    ),
    "Q5_0": BlockKind(
        5, 32, Grid(-16, 15), _plain(16), "float16", {"num_bits": 5, "group_size": 32, **_SIGNED}
    ),
    "Q8_0": BlockKind(
        8, 32, Grid(-128, 127), _q8_0, "float16", {"num_bits": 8, "group_size": 32, **_SIGNED}
    ),
    "Q4_1": BlockKind(
        4,
        32,
        Grid(0, 15),
        _with_offset(False),
        "float16",
        {"num_bits": 4, "group_size": 32, **_OFFSET},
    ),
    "Q5_1": BlockKind(
        5,
        32,
        Grid(0, 31),
        _with_offset(True),
        "float16",
        {"num_bits": 5, "group_size": 32, **_OFFSET},
    ),
    "Q2_K": BlockKind(2, 16, Grid(0, 3), _q2_k, None, {"num_bits": 2, "group_size": 16, **_OFFSET}),
    "Q3_K": BlockKind(
        3, 16, Grid(-4, 3), _q3_k, None, {"num_bits": 3, "group_size": 16, **_SIGNED}
    ),
    "Q4_K": BlockKind(
        4, 32, Grid(0, 15), _q4_k, None, {"num_bits": 4, "group_size": 32, **_OFFSET}
    ),
    "Q5_K": BlockKind(
        5, 32, Grid(0, 31), _q5_k, None, {"num_bits": 5, "group_size": 32, **_OFFSET}
    ),
    "Q6_K": BlockKind(
        6, 16, Grid(-32, 31), _q6_k, None, {"num_bits": 6, "group_size": 16, **_SIGNED}
    ),
    "IQ4_NL": BlockKind(4, 32, _TABLE, _iq4_nl, "float16", None),
    "IQ4_XS": BlockKind(4, 32, _TABLE, _iq4_xs, "float16", None, most=32),
    "MXFP4": BlockKind(
        4,
        32,
        Grid.of(FP4),
        _mxfp4,
        None,
        {"format": "fp4_e2m1", "group_size": 32, "scale_dtype": "e8m0"},
    ),
}
"""ggml's name of a type -> how its blocks are read."""
