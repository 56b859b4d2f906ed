"""The function over the contexts of a warp that carries out what its lanes do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.values import I1, I64, WORDS, const, resize


class Warp:
    """The function that carries out one operation of a warp, on its lanes' contexts.

        i64 resolve(i64* first, i64 stride, i64 lanes, i64 mask)

    It reads what each lane brings and writes what it gets. It returns what it found, by `layout`.
    """

    def __init__(self, module: Any, name: str) -> None:
        function = ir.Function(module, ir.FunctionType(I64, [WORDS, I64, I64, I64]), name)
        self.first, self.stride, self.lanes, self.mask = function.args
        self.b = ir.IRBuilder(function.append_basic_block())
        self.found = self.b.alloca(I64)
        self.b.store(const(64, layout.FINE), self.found)

    def build(self, resolve: Callable[..., None], modifiers: Mapping[str, str]) -> None:
        """Build the function."""
        resolve(self, modifiers)
        self.b.ret(self.b.load(self.found))

    def place(self, lane: Any, slot: Any) -> Any:
        """Return where a slot of a lane's context is."""
        slot = const(64, slot) if isinstance(slot, int) else slot
        return self.b.gep(self.first, [self.b.add(self.b.mul(lane, self.stride), slot)])

    def brought(self, lane: Any, index: Any, bits: int = 32) -> Any:
        """Return what a lane brings."""
        slot = (
            layout.INPUT + index
            if isinstance(index, int)
            else self.b.add(index, const(64, layout.INPUT))
        )
        return resize(self.b, self.b.load(self.place(lane, slot)), bits)

    def give(self, lane: Any, index: int, value: Any) -> None:
        """Write what a lane gets."""
        self.b.store(resize(self.b, value, 64), self.place(lane, layout.OUTPUT + index))

    def loop(self, count: Any, body: Callable[[Any], None]) -> None:
        """Emit body(i) for i = 0 .. count - 1, a loop of the code."""
        b = self.b
        count = const(64, count) if isinstance(count, int) else count
        before, here = b.block, b.append_basic_block()
        after = b.append_basic_block()
        b.cbranch(b.icmp_signed("<", const(64, 0), count), here, after)
        b.position_at_end(here)
        index = b.phi(I64)
        index.add_incoming(const(64, 0), before)
        body(index)
        following = b.add(index, const(64, 1))
        index.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, count), here, after)
        b.position_at_end(after)

    def each(self, body: Callable[[Any], None]) -> None:
        """Emit body(lane) for the lanes that take part."""

        def guarded(lane: Any) -> None:
            with self.b.if_then(self.takes_part(lane)):
                body(lane)

        self.loop(self.lanes, guarded)

    def takes_part(self, lane: Any) -> Any:
        """Return whether a lane is in the mask."""
        return self.b.trunc(self.b.lshr(self.mask, lane), I1)

    def cell(self, value: Any) -> Any:
        """Return memory for a value that a loop changes."""
        with self.b.goto_entry_block():
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    def report(self, condition: Any, what: int) -> None:
        """Say that something was found where the condition holds."""
        seen = self.b.load(self.found)
        found = self.b.or_(seen, const(64, what))
        self.b.store(self.b.select(condition, found, seen), self.found)

    def needs_all(self) -> None:
        """Report where not all 32 lanes take part."""
        self.report(self.b.icmp_unsigned("!=", self.mask, const(64, 0xFFFFFFFF)), layout.PARTIAL)
