"""What the codes of a weight stand for, code - zero, as float32: in registers, and in the cache.

Method: codes are looked up in registers that hold what sixteen bits stand for, or thirty-two, where
        the processor can (Intel's vpermps and vpermi2ps); elsewhere they are converted. An index
        may have bits that its code has not: a table repeats for them. So one shift serves two
        codes of two bits, and the planes of three bits are joined for eight columns at once.
Error:  none, code - zero is an integer below 2^24.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES
from qframe_plugins.kernels.numba_cpu.packed import moved, planes_at
from qframe_plugins.kernels.numba_cpu.simd import kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

_NIBBLES = 0x0F0F0F0F

Raws = Sequence[Sequence[Any]]
Place = tuple[int, int]


class Values:
    """Emits what the codes of registers stand for.

    v       where it emits; tables are made where this object is
    bits    of each plane of a code
    zeros   a list, of each register of rows, int32; or a register, one for all
    """

    def __init__(self, v: Vectors, bits: tuple[int, ...], zeros: Any) -> None:
        self.v, self.b, self.bits, self.zeros = v, v.builder, bits, zeros
        one_for_all = not isinstance(zeros, list)
        self.ints = zeros.type if one_for_all else zeros[0].type
        self.floats = ir.VectorType(FLOAT32, self.ints.count)
        self.looked_up = v.has("avx512f") and bits != (8,)
        if not self.looked_up:
            return
        self.tables = [
            self._table(codes, zeros if one_for_all else None) for codes in _meanings(bits)
        ]
        self.lows = [] if one_for_all else [self.b.sitofp(each, self.floats) for each in zeros]

    def _table(self, codes: Sequence[int], zero: Any) -> list[Any]:
        """Return registers of what codes stand for, less zero if it is one for all."""
        found = []
        for first in range(0, len(codes), self.ints.count):
            numbers = ir.Constant(self.ints, list(codes[first : first + self.ints.count]))
            numbers = numbers if zero is None else self.b.sub(numbers, zero)
            found.append(self.b.sitofp(numbers, self.floats))
        return found

    def of_step(self, raws: Raws, register: int) -> Callable[[int, int], Any]:
        """Return what gives code - zero of a column of a step: of its quad, and its place in it.

        raws       of each plane the registers that hold the step
        register   which of a panel's it is
        """
        if not self.looked_up:
            return lambda quad, byte: self._converted(raws, register, quad, byte)
        index = self._joined(raws) if len(self.bits) > 1 else self._shifted(raws[0])

        def value(quad: int, byte: int) -> Any:
            which, found = index(quad, byte)
            table = self.tables[which]
            if len(table) == 1:
                name = "llvm.x86.avx512.permvar.sf.512"
                entry = self.v.call(name, self.floats, table[0], found)
            else:
                name = "llvm.x86.avx512.vpermi2var.ps.512"
                entry = self.v.call(name, self.floats, table[0], found, table[1])
            return self.b.fsub(entry, self.lows[register]) if self.lows else entry

        return value

    def _shifted(self, raws: Sequence[Any]) -> Callable[[int, int], tuple[int, Any]]:
        """Return what gives (table, index) of a column, whose code is in one plane.

        Four bits are an index: a code of four, or two of two.
        """
        found: dict[Place, Any] = {}
        each = 4 // self.bits[0]  # codes of an index

        def index(quad: int, byte: int) -> tuple[int, Any]:
            key = quad // each, byte
            if key not in found:
                found[key] = moved(self.v, raws[0], 8 * byte + 4 * key[0])
            return quad % each, found[key]

        return index

    def _joined(self, raws: Raws) -> Callable[[int, int], tuple[int, Any]]:
        """Return the same for planes of two bits and of one.

        Two quads' codes of two bits are joined with their upper bits, the first of which is made
        the fifth of the byte: five bits from there down are an index of the first quad, and those
        one further to the left of the second.
        """
        b, (low, high), found = self.b, raws, {}
        mask = self.v.const(self.ints, _NIBBLES)
        others = self.v.const(self.ints, ~_NIBBLES)

        def index(quad: int, byte: int) -> tuple[int, Any]:
            pair, second = divmod(quad, 2)
            if pair not in found:
                lower = moved(self.v, low[pair // 2], 4 * (pair % 2))
                upper = moved(self.v, high[0], 2 * pair - 4)
                found[pair] = b.or_(b.and_(lower, mask), b.and_(upper, others))
            return second, moved(self.v, found[pair], 8 * byte + second)

        return index

    def _converted(self, raws: Raws, register: int, quad: int, byte: int) -> Any:
        """Return code - zero, of fields that are masked out and converted."""
        b, code, shift = self.b, None, 0
        for width, pieces in zip(self.bits, raws, strict=True):
            fields = 8 // width
            move = 8 * byte + width * (quad % fields) - shift
            mask = self.v.const(self.ints, ((1 << width) - 1) << shift)
            part = b.and_(moved(self.v, pieces[quad // fields], move), mask)
            code = part if code is None else b.or_(code, part)
            shift += width
        zero = self.zeros[register] if isinstance(self.zeros, list) else self.zeros
        return b.sitofp(b.sub(code, zero), self.floats)


def _meanings(bits: tuple[int, ...]) -> list[list[int]]:
    """Return for each table the code that each index stands for, see `Values`."""
    if bits == (4,):
        return [list(range(16))]
    if bits == (2,):
        return [[i >> move & 3 for i in range(16)] for move in (0, 2)]
    return [[i >> move & 3 | i >> 2 & 4 for i in range(32)] for move in (0, 1)]


def load_step(
    v: Vectors, sources: Sequence[tuple[int, Any]], step: Any, spots: Sequence[Any]
) -> list[list[list[Any]]]:
    """Return for each register, of each plane, the registers that hold a step.

    sources   (bits, where its first step is) of the planes
    spots     the bytes of a panel's quad where registers of rows begin
    """
    together = max(8 // width for width, _ in sources)
    kind = ir.VectorType(INT32, v.register_bytes // BYTES)
    found = []
    for spot in spots:
        planes = []
        for width, source in sources:
            pieces = together * width // 8
            here = v.at(v.at(source, v.builder.mul(step, INT64(QUAD_BYTES * pieces))), spot)
            planes.append([v.load(v.at(here, QUAD_BYTES * piece), kind) for piece in range(pieces)])
        found.append(planes)
    return found


@intrinsic
def _decode(
    typing: Any, planes: Any, widths: Any, zero: Any, place: Any, part: Any, out: Any, row: Any
) -> Any:
    bits = tuple(each.count for each in widths)
    signature = types.void(planes, widths, zero, place, part, out, row)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v, b, kinds = Vectors(context, builder), builder, signature.args
        panel, group, groups = cgutils.unpack_tuple(b, values[3], 3)
        first, quads, ahead = cgutils.unpack_tuple(b, values[4], 3)
        sources = planes_at(v, kinds[0], values[0], bits, panel, first)
        out_at = v.at(v.array(kinds[5], values[5])[0], b.mul(values[6], INT64(BYTES * PANEL)))
        lanes = v.register_bytes // BYTES
        ints = ir.VectorType(INT32, lanes)
        together = max(8 // width for width in bits)
        steps = b.sdiv(quads, INT64(together))
        with v.loop(INT64(QUAD_BYTES // v.register_bytes)) as part_:
            left = b.mul(part_.index, INT64(v.register_bytes))
            if isinstance(kinds[2], types.Array):
                taken = b.add(b.mul(panel, groups), group)
                zero_at = v.at(v.array(kinds[2], values[2])[0], b.mul(taken, INT64(4 * PANEL)))
                zeros = [v.load(v.at(zero_at, left), ints)]
            else:
                zeros = v.splat(b.trunc(values[2], INT32), lanes)
            stand_for = Values(v, bits, zeros)
            with v.loop(steps) as loop:
                (raws,) = load_step(v, sources, loop.index, [left])
                for width, source in sources:
                    size = together * width // 8 * QUAD_BYTES
                    skipped = b.sdiv(b.mul(ahead, INT64(QUAD_BYTES * width)), INT64(8))
                    there = b.add(b.mul(loop.index, INT64(size)), b.add(skipped, left))
                    for quad in range(0, size, QUAD_BYTES):
                        v.prefetch(v.at(v.at(source, there), quad), 2)
                value = stand_for.of_step(raws, 0)
                here = b.mul(loop.index, INT64(BYTES * PANEL * BYTES * together))
                target = v.at(out_at, b.add(here, left))
                for quad, byte in itertools.product(range(together), range(BYTES)):
                    stripe = BYTES * PANEL * (BYTES * quad + byte)
                    v.store(value(quad, byte), v.at(target, stripe))
        return context.get_dummy_value()

    return signature, emit


@kernel
def decode(planes, widths, zero, place, part, out, row):  # type: ignore[no-untyped-def]
    """Set rows of `out` to code - zero of quads of a panel, which are all of one group.

    planes   of `PackedPanels`; those that are empty are left out
    widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
             no matter, but code is made for how many they are
    zero     of `PackedPanels`, or a number
    place    (panel, group, groups of a row)
    part     (first, quads, ahead): so many quads from the first on; those that lie so many quads
             further are asked for meanwhile
    out      [any, PANEL] float32, of which rows are set from `row` on
    """
    _decode(planes, widths, zero, place, part, out, row)
