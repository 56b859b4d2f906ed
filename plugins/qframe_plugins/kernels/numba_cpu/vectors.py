"""Vector instructions as LLVM IR: what the intrinsics of this folder are made of.

All of it is portable: LLVM lowers it to AVX-512, AVX2, SSE2, NEON or anything else. Where the
processor that is compiled for has one instruction for several steps, that is taken; it is found out
from the features that numba compiles for, which honour NUMBA_CPU_NAME and NUMBA_CPU_FEATURES and
are part of the key of numba's cache. Integers are the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT32 = ir.FloatType()

_ONCE = 4  # for `prefetch`: past the levels of caches

# LLVM 22 gave the dot products of bytes operands of bytes; before, they were 32-bit lanes.
_BYTES_ARE_BYTES = binding.llvm_version_info[0] >= 22


class Loop:
    """for index in range(count), with values that each pass hands to the next.

    index     int64
    values    what the previous pass handed on; after the loop, what the last one did
    """

    def __init__(self, index: Any, values: Sequence[Any]) -> None:
        self.index = index
        self.values = list(values)
        self.next: list[Any] = []

    def hand_on(self, values: Sequence[Any]) -> None:
        """Say what the next pass finds in `values`."""
        self.next = list(values)


class Vectors:
    """Emits vector code at the place where a builder stands."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context = context
        self.builder = builder
        self._triple, _, features = context.codegen().magic_tuple()
        self._features = frozenset(features.split(","))

    # The processor --------------------------------------------------------------------------

    def has(self, *features: str) -> bool:
        """Return whether the processor compiled for has all of the features."""
        return all(f"+{feature}" in self._features for feature in features)

    @property
    def register_bytes(self) -> int:
        """Return how many bytes a vector register holds."""
        if self.has("avx512f"):
            return 64
        return 32 if self.has("avx") else 16

    @property
    def registers(self) -> int:
        """Return how many vector registers there are."""
        return 16 if "x86" in self._triple and not self.has("avx512f") else 32

    @property
    def stream(self) -> tuple[int, int]:
        """Return (bytes, level) for `prefetch`: of what is read once, from its begin to its end.

        What was fastest on AMD's Zen 5, where more than one request for a line is dear, and on
        Intel's Xeons.
        """
        return (5120, _ONCE) if self.has("clzero") else (8192, 2)

    # Memory ---------------------------------------------------------------------------------

    def array(self, kind: Any, value: Any) -> tuple[Any, list[Any]]:
        """Return the address of an array's first element, and its shape."""
        made = self.context.make_array(kind)(self.context, self.builder, value)
        data = self.builder.bitcast(made.data, INT8.as_pointer())
        return data, cgutils.unpack_tuple(self.builder, made.shape, kind.ndim)

    def at(self, pointer: Any, offset: Any) -> Any:
        """Return the address so many bytes further."""
        if isinstance(offset, int):
            offset = INT64(offset)
        return self.builder.gep(pointer, [offset], source_etype=INT8)

    def load(self, pointer: Any, kind: Any) -> Any:
        """Return the value at an address of any alignment."""
        return self.builder.load(
            self.builder.bitcast(pointer, kind.as_pointer()), align=1, typ=kind
        )

    def store(self, value: Any, pointer: Any) -> None:
        """Write a value to an address of any alignment."""
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=1)

    def prefetch(self, pointer: Any, level: int) -> None:
        """Ask for the cache line at an address, which need not exist, in the cache of a level.

        level   1, 2 or 3; _ONCE: near, and to be given up first
        """
        kinds = [pointer.type, INT32, INT32, INT32]
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        self.builder.call(function, [pointer, INT32(0), INT32(4 - level), INT32(1)])

    # Values ---------------------------------------------------------------------------------

    def const(self, kind: Any, number: Any) -> Any:
        """Return a vector of one number."""
        return ir.Constant(kind, [number] * kind.count)

    def splat(self, scalar: Any, lanes: int) -> Any:
        """Return a vector of one value that is known at run time."""
        kind = ir.VectorType(scalar.type, lanes)
        unknown = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(unknown, scalar, INT32(0))
        return self.builder.shuffle_vector(
            first, unknown, ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes)
        )

    def pick(self, vector: Any, lanes: Sequence[int], other: Any = None) -> Any:
        """Return lanes of a vector, or of two one after the other."""
        other = ir.Constant(vector.type, ir.Undefined) if other is None else other
        mask = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(vector, other, mask)

    def call(self, name: str, kind: Any, *operands: Any) -> Any:
        """Call a function of LLVM's, such as "llvm.rint.v16f32"."""
        signature = ir.FunctionType(kind, [operand.type for operand in operands])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, operands)

    def muladd(self, one: Any, other: Any, total: Any) -> Any:
        """Return one * other + total, rounded once where the processor can, else twice."""
        kind = total.type
        return self.call(f"llvm.fmuladd.v{kind.count}f32", kind, one, other, total)

    def total(self, vector: Any) -> Any:
        """Return the sum of float32 lanes, halves first."""
        while vector.type.count > 1:
            half = vector.type.count // 2
            low, high = (self.pick(vector, range(half * i, half * (i + 1))) for i in (0, 1))
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, INT32(0))

    @contextmanager
    def loop(self, count: Any, initial: Sequence[Any] = ()) -> Iterator[Loop]:
        """Emit a loop around what the body emits; `count` is int64 and may be 0."""
        builder = self.builder
        before = builder.block
        head, body, after = (builder.append_basic_block(f"loop.{n}") for n in ("head", "", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INT64)
        index.add_incoming(INT64(0), before)
        phis = [builder.phi(value.type) for value in initial]
        for phi, value in zip(phis, initial, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, count), body, after)
        builder.position_at_end(body)
        loop = Loop(index, phis)
        yield loop
        last = builder.block
        index.add_incoming(builder.add(index, INT64(1)), last)
        for phi, value in zip(phis, loop.next, strict=True):
            phi.add_incoming(value, last)
        builder.branch(head)
        builder.position_at_end(after)
        loop.values = phis

    def either(
        self, condition: Any, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]
    ) -> list[Any]:
        """Return what one of two functions emits: `yes` where the condition holds, else `no`."""
        ways = []
        with self.builder.if_else(condition) as branches:
            for branch, emit in zip(branches, (yes, no), strict=True):
                with branch:
                    values = emit()
                    ways.append((values, self.builder.block))
        merged = [self.builder.phi(value.type) for value in ways[0][0]]
        for values, block in ways:
            for phi, value in zip(merged, values, strict=True):
                phi.add_incoming(value, block)
        return merged

    # Dot products ---------------------------------------------------------------------------

    def dot2(self, one: Any, other: Any) -> Any:
        """Return the sum of two products in each lane, modulo 2^32, of 16-bit halves with signs."""
        b, kind = self.builder, one.type
        halves = ir.VectorType(INT16, 2 * kind.count)
        pair = [b.bitcast(each, halves) for each in (one, other)]
        name = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}[kind.count]
        needed = {16: "avx512bw", 8: "avx2", 4: "sse2"}[kind.count]
        if self.has(needed):
            return self.call(f"llvm.x86.{name}", kind, *pair)
        products = [
            b.mul(*(b.sext(self.pick(each, range(first, halves.count, 2)), kind) for each in pair))
            for first in (0, 1)
        ]
        return b.add(*products)

    def dot4(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """Return total + the sum of four products in each lane, modulo 2^32.

        total      <lanes x i32>
        unsigned   <lanes x i32>, four bytes 0 .. 255 in each
        signed     <lanes x i32>, four bytes -128 .. 127 in each
        """
        lanes = total.type.count
        wide = lanes == 16 and self.has("avx512vnni")
        narrow = lanes in (4, 8) and (self.has("avxvnni") or self.has("avx512vnni", "avx512vl"))
        if not wide and not narrow:
            return self._dot4_in_steps(total, unsigned, signed)
        if _BYTES_ARE_BYTES:
            kind = ir.VectorType(INT8, 4 * lanes)
            unsigned, signed = (self.builder.bitcast(each, kind) for each in (unsigned, signed))
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return self.call(name, total.type, total, unsigned, signed)

    def _dot4_in_steps(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """Return the same by products of 16 bits, of which many processors add pairs at once."""
        b, kind = self.builder, total.type
        halves = ir.VectorType(INT16, 2 * kind.count)
        eight = self.const(halves, 8)
        u, s = (b.bitcast(each, halves) for each in (unsigned, signed))
        even = b.and_(u, self.const(halves, 255)), b.ashr(b.shl(s, eight), eight)
        odd = b.lshr(u, eight), b.ashr(s, eight)
        for pair in (even, odd):
            total = b.add(total, self.dot2(*(b.bitcast(each, kind) for each in pair)))
        return total
