"""Weights of 2, 3, 4 and 8 bits as the kernels of this folder read them, and how they unpack.

Layout: panels of 64 rows. Columns are taken group by group, each group filled up to whole steps; a
step is as many columns as 32 bits hold. The byte of row `lane` and place j < 4 of a step holds the
codes of the columns j, j + 4, j + 8, ... from its lowest bits on, so that a shift and a mask of
whole registers give the codes of four neighbouring columns of 16 rows: what products of bytes take.
Three bits are a plane of two and a plane of one, for steps of 16 and of 32 columns.
Codes are stored less the lowest one, without sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES
from qframe_plugins.kernels.numba_cpu.scratch import aligned
from qframe_plugins.kernels.numba_cpu.simd import inner
from qframe_plugins.kernels.numba_cpu.vectors import INT32, INT64, Vectors

WIDTHS = (2, 3, 4, 8)  # bits that there are layouts for
_UNIT = 32  # columns: a whole number of steps of every width

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class PackedPanels:
    """A weight, scale * (code - zero_point).

    planes    of codes, each [panels, bytes] uint8: one, or two for three bits
    scale     [panels, groups, PANEL] float32, 0 beyond the weight
    zero      [panels, groups, PANEL] int32, the zero point less the lowest code
    centre    the number that all zero points less the lowest code are; None: they differ
    bits      of a code, one of WIDTHS
    quads     of columns that a group takes, filled up
    spread    [columns] int64, where each column lies among all that are taken; None: where it is
    rows, columns   of the weight
    """

    planes: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.int32]
    centre: int | None
    bits: int
    quads: int
    spread: npt.NDArray[np.int64] | None
    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """How many groups a row has."""
        return self.scale.shape[1]

    @cached_property
    def nbytes(self) -> int:
        """How many bytes the codes take."""
        return sum(plane.nbytes for plane in self.planes)

    @cached_property
    def are_bytes(self) -> bool:
        """Whether zero points less the lowest code are bytes without sign; any may be stored."""
        return bool(self.zero.min(initial=0) >= 0 and self.zero.max(initial=0) <= 255)

    @cached_property
    def points(self) -> Any:
        """The zero points less the lowest code: a number, where it is one for all."""
        return self.zero if self.centre is None else np.int64(self.centre)

    @cached_property
    def filled(self) -> tuple[tuple[Array, ...], tuple[tuple[int, ...], ...]]:
        """The planes that hold codes, and for each as many numbers as a code has bits in it."""
        if self.bits == 3:
            return self.planes, ((0, 0), (0,))
        return self.planes[:1], ((0,) * self.bits,)

    def taken(self, x: Array) -> Array:
        """Return x [tokens, columns] in the order of the layout, C-contiguous, filled with 0."""
        if self.spread is None:
            return np.ascontiguousarray(x)
        wide = np.zeros((len(x), self.groups * self.quads * BYTES), x.dtype)
        wide[:, self.spread] = x
        return wide


def pack(codes: Array, scale: Array, zero_point: Array, group_index: Array) -> PackedPanels:
    """Return a weight in panels.

    codes         [rows, columns] integers
    scale         [rows or 1, groups] float32
    zero_point    [rows or 1, groups] integers
    group_index   [columns], the group of each column, which need not be neighbours

    Raises ValueError for codes that take more than 8 bits.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    lowest = int(codes.min(initial=0))
    span = int(codes.max(initial=0)) - lowest
    bits = next((width for width in WIDTHS if span < 1 << width), None)
    if bits is None:
        raise ValueError(f"codes from {lowest} to {lowest + span} take more than 8 bits")
    counts = np.bincount(group_index, minlength=groups)
    unit = 4 * 8 // bits if bits != 3 else _UNIT
    wide = -(-int(counts.max(initial=1)) // unit) * unit
    order = np.argsort(group_index, kind="stable")
    first = np.cumsum(counts) - counts
    spread = np.empty(columns, np.int64)
    spread[order] = np.arange(columns) + np.repeat(np.arange(groups) * wide - first, counts)
    panels = -(-rows // PANEL)
    full = np.zeros((panels * PANEL, groups * wide), np.uint8)
    full[:rows, spread] = codes - lowest
    quads = full.reshape(panels, PANEL, -1, BYTES).transpose(0, 2, 1, 3)
    planes = _planes(quads, bits)
    scales = aligned((panels, groups, PANEL), np.float32)
    zeros = aligned((panels, groups, PANEL), np.int32)
    points = zero_point.astype(np.int32) - lowest
    for values, target in ((scale, scales), (points, zeros)):
        padded = np.zeros((panels * PANEL, groups), target.dtype)
        padded[:rows] = values
        target[:] = padded.reshape(panels, PANEL, groups).transpose(0, 2, 1)
    centre = int(points.flat[0]) if points.size and (points == points.flat[0]).all() else None
    straight = groups * wide == columns and bool((spread == np.arange(columns)).all())
    return PackedPanels(
        planes=planes,
        scale=scales,
        zero=zeros,
        centre=centre,
        bits=bits,
        quads=wide // BYTES,
        spread=None if straight else spread,
        rows=rows,
        columns=columns,
    )


def pack_channels(codes: Array, scale: Array) -> PackedPanels:
    """Return a symmetric weight with a scale for each row, [rows] float32, in panels."""
    none = np.zeros((len(codes), 1), np.int16)
    return pack(codes, scale[:, None], none, np.zeros(codes.shape[1], np.int64))


def _planes(
    quads: npt.NDArray[np.uint8], bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the planes of codes [panels, quads, PANEL, BYTES]; the second may be empty."""
    none = np.empty((len(quads), 0), np.uint8)
    if bits == 3:
        return _plane(quads & np.uint8(3), 2), _plane(quads >> np.uint8(2), 1)
    return _plane(quads, bits), none


def _plane(quads: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return codes of so many bits, [panels, bytes]: those of a byte lie 4 columns apart."""
    panels, count = quads.shape[:2]
    fields = 8 // bits
    steps = quads.reshape(panels, count // fields, fields, PANEL, BYTES)
    plane = aligned((panels, count // fields, PANEL, BYTES), np.uint8)
    for field in range(fields):
        plane |= steps[:, :, field] << np.uint8(bits * field)
    return plane.reshape(panels, -1)


def _make_unpack(planes: tuple[int, ...]) -> Callable[..., Any]:
    """Return the intrinsic for codes whose planes hold so many bits each, the lowest first."""
    together = max(8 // bits for bits in planes)  # quads that whole bytes of every plane hold

    @intrinsic
    def unpack(
        typing: Any, one: Any, other: Any, panel: Any, first: Any, quads: Any, out: Any
    ) -> Any:
        index = types.int64
        signature = types.void(one, other, index, index, index, out)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            lanes = v.register_bytes // BYTES
            vector = ir.VectorType(INT32, lanes)
            sources = []
            for i, bits in enumerate(planes):
                at, (_, size) = v.array(signature.args[i], values[i])
                start = builder.mul(values[2], size)
                skipped = builder.sdiv(builder.mul(values[3], INT64(QUAD_BYTES * bits)), INT64(8))
                sources.append((bits, v.at(at, builder.add(start, skipped))))
            out_at, _ = v.array(signature.args[5], values[5])
            passes = builder.sdiv(values[4], INT64(together))
            with v.loop(passes) as loop:
                here = v.at(out_at, builder.mul(loop.index, INT64(QUAD_BYTES * together)))
                for left in range(0, QUAD_BYTES, v.register_bytes):
                    for quad in range(together):
                        code, shift = None, 0
                        for bits, at in sources:
                            fields = 8 // bits
                            step = builder.mul(loop.index, INT64(QUAD_BYTES * (together // fields)))
                            place = left + QUAD_BYTES * (quad // fields)
                            raw = v.load(v.at(v.at(at, step), place), vector)
                            part = field_of(v, raw, bits, quad % fields, shift)
                            code = part if code is None else builder.or_(code, part)
                            shift += bits
                        v.store(code, v.at(here, QUAD_BYTES * quad + left))
            return context.get_dummy_value()

        return signature, emit

    return unpack


def moved(v: Vectors, raw: Any, move: int) -> Any:
    """Return lanes shifted to the right by so many bits, or to the left."""
    if move > 0:
        return v.builder.lshr(raw, v.const(raw.type, move))
    return v.builder.shl(raw, v.const(raw.type, -move)) if move < 0 else raw


def planes_at(
    v: Vectors, kinds: Any, planes: Any, bits: tuple[int, ...], panel: Any, first: Any
) -> list[tuple[int, Any]]:
    """Return for each plane of a tuple (bits, where the quad `first` of a panel begins)."""
    b, found = v.builder, []
    for i, (kind, width) in enumerate(zip(kinds, bits, strict=True)):
        at, (_, size) = v.array(kind, b.extract_value(planes, i))
        skipped = b.sdiv(b.mul(first, INT64(QUAD_BYTES * width)), INT64(8))
        found.append((width, v.at(at, b.add(b.mul(panel, size), skipped))))
    return found


def field_of(v: Vectors, raw: Any, bits: int, field: int, shift: int) -> Any:
    """Return a field of every byte of raw, moved to the bits from `shift` on."""
    every = (((1 << bits) - 1) << shift) * 0x01010101
    return v.builder.and_(moved(v, raw, bits * field - shift), v.const(raw.type, every))


# out[quad, :, :] = codes of the quads first ... first + quads of a panel, bytes without sign.
# The first plane and the second are [panels, bytes] uint8, out is [quads, PANEL, BYTES] uint8.
# Quads must be a whole number of steps.
_unpack_2, _unpack_3, _unpack_4 = (_make_unpack(planes) for planes in ((2,), (2, 1), (4,)))


@inner
def unpack(one, other, bits, panel, first, quads, out):  # type: ignore[no-untyped-def]
    """Set `out` to the codes of some quads of a panel; see above. There is none for 8 bits."""
    if bits == 2:
        _unpack_2(one, other, panel, first, quads, out)
    elif bits == 3:
        _unpack_3(one, other, panel, first, quads, out)
    else:
        _unpack_4(one, other, panel, first, quads, out)
