"""`Module`, `Kernel` and `Run`: what a user of this package calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import qframe_plugins.ptx_host.table  # noqa: F401 - fills the table of instructions
from qframe_plugins.ptx_host import arguments, layout
from qframe_plugins.ptx_host.arguments import Buffer
from qframe_plugins.ptx_host.compiled import Code, compile_program
from qframe_plugins.ptx_host.counters import Counters, Recorder
from qframe_plugins.ptx_host.errors import KernelFaultError, LaunchError, PtxError
from qframe_plugins.ptx_host.findings import KINDS, LOCAL, NOWHERE, SHARED, SLOTS, Finding
from qframe_plugins.ptx_host.flow import Program, program
from qframe_plugins.ptx_host.forms import Instruction
from qframe_plugins.ptx_host.frame import Options
from qframe_plugins.ptx_host.parsing import parse
from qframe_plugins.ptx_host.syntax import Source

ORDERS = ("forward", "reverse", "random")
SHUFFLES = 8  # orders of threads that blocks take in turn
CELLS_MOST = 1 << 32  # bytes of the checker's cells

FAULTS = {
    layout.TRAP: "a trap",
    layout.NO_FUEL: "more jumps back than `fuel` allows: a loop without end, or one that waits "
    "for another thread without a barrier",
    layout.TOO_MANY_COPIES: f"more than {layout.COPIES_MOST} copies of cp.async under way in a "
    "thread",
    -10: "a deadlock: threads wait for others that never come",
    -11: "an operation that needs all 32 lanes of a warp is reached by some",
    -12: "a lane that its own mask leaves out",
}


@dataclass(frozen=True)
class Run:
    """What a launch has shown: what the checker found, and counters where they were asked for."""

    findings: tuple[Finding, ...]
    counters: Counters | None = None


class Module:
    """A PTX text. Its variables keep their values from launch to launch, as on a GPU.

    >>> module = Module.from_ptx('''
    ... .version 8.0
    ... .target sm_80
    ... .address_size 64
    ... .visible .entry negate(.param .u64 x) {
    ...     .reg .b32 %r<3>; .reg .b64 %a<4>;
    ...     ld.param.u64 %a1, [x];
    ...     mov.u32 %r1, %tid.x;
    ...     mul.wide.u32 %a2, %r1, 4;
    ...     add.u64 %a3, %a1, %a2;
    ...     ld.global.u32 %r2, [%a3];
    ...     neg.s32 %r2, %r2;
    ...     st.global.u32 [%a3], %r2;
    ...     ret;
    ... }''')
    >>> x = np.arange(4, dtype=np.int32)
    >>> module.kernel("negate").launch(1, 4, x).findings
    ()
    >>> x.tolist()
    [0, -1, -2, -3]
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.buffers = {}
        for variable in source.variables.values():
            if variable.space in ("global", "const"):
                memory = arguments.aligned(variable.size)
                initial = variable.initial or b""
                memory[: len(initial)] = np.frombuffer(initial, np.uint8)
                array = memory.copy()
                array.flags.writeable = variable.space != "const"
                self.buffers[variable.name] = Buffer(variable.name, array, memory)

    @classmethod
    def from_ptx(cls, text: str) -> Module:
        """Read a text. Raises PtxError and PtxUnsupportedError."""
        return cls(parse(text))

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels' names."""
        return tuple(f.name for f in self.source.functions.values() if f.is_kernel)

    def variable(self, name: str) -> np.ndarray[Any, Any]:
        """Return the bytes of a variable, uint8, as a view."""
        if name not in self.buffers:
            raise LaunchError(
                f"no variable {name!r}; there are {', '.join(self.buffers) or 'none'}"
            )
        return self.buffers[name].memory

    def kernel(self, name: str | None = None) -> Kernel:
        """Return a kernel; without a name, the only one there is."""
        if name is None and len(self.kernels) == 1:
            name = self.kernels[0]
        if name not in self.kernels:
            raise LaunchError(f"no kernel {name!r}; there are {', '.join(self.kernels) or 'none'}")
        return Kernel(self, program(self.source, self.source.functions[name]))


@dataclass
class Kernel:
    """One kernel, translated for the host when it is first launched."""

    module: Module
    program: Program
    _codes: dict[Options, Code] = field(default_factory=dict)

    def code(self, options: Options) -> Code:
        """Return the machine code."""
        if options not in self._codes:
            addresses = {name: buffer.address for name, buffer in self.module.buffers.items()}
            self._codes[options] = compile_program(self.program, addresses, options)
        return self._codes[options]

    def launch(
        self,
        grid: int | Iterable[int],
        block: int | Iterable[int],
        *given: Any,
        shared_bytes: int = 0,
        order: str = "forward",
        seed: int = 0,
        check: bool = True,
        count: bool = False,
        fuel: int = 10**8,
    ) -> Run:
        """Run the kernel to its end.

        `given` are C-contiguous arrays, which are pointers, `Fresh` ones among them, and numbers:
        of a NumPy type, or Python's where the parameter's type leaves no doubt. `shared_bytes` is
        dynamic shared memory. Threads take turns in `order`: "forward", "reverse" or "random"
        (by `seed`). With `check`, every access is looked at, and one that is not allowed is not
        made; without it a wrong kernel may do anything, like any machine code. `count` fills
        `Run.counters`. `fuel` is the number of jumps back that a block may make.

        Raises LaunchError for arguments that do not fit, KernelFaultError where the kernel cannot
        go on; the error's `findings` say what was found until then.
        """
        from qframe_plugins.ptx_host import checker, scheduler

        shape = [
            _three(self.program.name, what, v) for what, v in (("grid", grid), ("block", block))
        ]
        threads = int(np.prod(shape[1]))
        if threads > 1024:
            raise LaunchError(
                f"{self.program.name}: {threads} threads in a block, expected <= 1024"
            )
        if order not in ORDERS:
            raise LaunchError(f"order {order!r}, expected one of {', '.join(ORDERS)}")
        if np.float32(2.0**-126) * np.float32(0.5) == 0:
            raise LaunchError(
                "this thread of the process flushes subnormal numbers to zero, which PTX does not; "
                "undo it, such as by torch.set_flush_denormal(False)"
            )
        if shared_bytes < 0 or fuel < 0:
            raise LaunchError("shared_bytes and fuel are not negative")
        code = self.code(Options(checker.address() if check else 0, count))
        params, buffers = arguments.pack(self.program, given)
        every = [*buffers, *self.module.buffers.values()]
        total = self.program.shared_size
        total = self.program.dynamic_at + shared_bytes if shared_bytes else total
        memory = arguments.aligned(max(total, 16))
        contexts = np.zeros((threads, code.slots), np.int64)
        row = np.zeros(layout.BLOCK_SLOTS, np.int64)
        row[layout.NTID : layout.NTID + 3], row[layout.NCTAID : layout.NCTAID + 3] = shape[::-1]
        row[layout.SHARED] = memory.ctypes.data
        row[layout.DYNAMIC], row[layout.TOTAL] = shared_bytes, total
        found = np.zeros((len(KINDS), len(self.program.code), SLOTS), np.int64)
        clocks = np.zeros((threads if check else 0,) * 2, np.int64)
        width = -(-self.program.local_size // 16) * 16
        local = arguments.aligned(threads * width).reshape(threads, width)
        state = _state(every, found, memory, total, self.program.local_size, clocks, threads) if (
            check) else None  # fmt: skip
        row[layout.STATE] = state[0].ctypes.data if state else 0
        recorder = Recorder(self.program, row, every) if count else None
        last, step = int(np.prod(shape[0])), 1 if count else int(np.prod(shape[0]))
        ended = 0
        for first in range(0, last, max(step, 1)):
            ended = scheduler.run_blocks(
                code.address, contexts, params.ctypes.data, code.sites,
                _orders(threads, order, seed), np.zeros(threads, np.int64),
                np.zeros((17, threads), np.int64), clocks, row, found, np.zeros(threads, np.bool_),
                memory, local, first, min(first + step, last), fuel,
            )  # fmt: skip
            if recorder:
                recorder.take(memory.ctypes.data)
            if ended:
                break
        findings = _findings(self.program, found, every, threads)
        if ended:
            message = f"{self.program.name}: {FAULTS[int(ended)]}, in block {row[layout.BLOCK]}"
            raise KernelFaultError("\n".join([message, *map(str, findings)]), findings)
        for buffer in buffers:
            buffer.copy_back()
        return Run(findings, recorder.counters() if recorder else None)


def _three(name: str, what: str, value: int | Iterable[int]) -> list[int]:
    sizes = [value] if isinstance(value, (int, np.integer)) else list(value)
    if not 1 <= len(sizes) <= 3 or any(int(size) < 1 for size in sizes):
        raise LaunchError(f"{name}: {what} {value!r}, expected one to three positive numbers")
    return [*map(int, sizes), *[1] * (3 - len(sizes))]


def _orders(threads: int, order: str, seed: int) -> np.ndarray[Any, Any]:
    forward = np.arange(threads, dtype=np.int64)
    if order == "random":
        rng = np.random.default_rng(seed)
        return np.stack([rng.permutation(forward) for _ in range(SHUFFLES)])
    return np.ascontiguousarray((forward if order == "forward" else forward[::-1])[None])


def _state(
    every: list[Buffer],
    found: np.ndarray[Any, Any],
    memory: np.ndarray[Any, Any],
    total: int,
    local: int,
    clocks: np.ndarray[Any, Any],
    threads: int,
) -> list[np.ndarray[Any, Any]]:
    """Return the checker's state, and the arrays that it points to."""
    from qframe_plugins.ptx_host import checker

    needed = 8 * checker.CELL * (total + sum(buffer.memory.size for buffer in every))
    if needed > CELLS_MOST:
        raise LaunchError(
            f"the checker would need {needed >> 20} MiB for its cells, "
            f"{8 * checker.CELL} bytes for each byte, and "
            f"has {CELLS_MOST >> 20}; check a smaller problem, or launch with check=False"
        )
    cells = [np.zeros(checker.CELL * buffer.memory.size, np.int64) for buffer in every]
    shared = np.zeros(checker.CELL * max(total, 1), np.int64)
    table = np.zeros((max(len(every), 1), checker.BUFFER), np.int64)
    for entry, buffer, cell in zip(table, every, cells, strict=False):
        flags = checker.READ_ONLY * buffer.is_constant | checker.IS_FRESH * buffer.is_fresh
        entry[:] = buffer.address, buffer.address + buffer.memory.size, cell.ctypes.data, flags
    state = np.zeros(checker.STATE_SLOTS, np.int64)
    state[checker.BUFFERS], state[checker.BUFFER_COUNT] = table.ctypes.data, len(every)
    state[checker.FOUND], state[checker.SITES] = found.ctypes.data, found.shape[1]
    state[checker.SHARED_CELLS], state[checker.SHARED_SIZE] = shared.ctypes.data, total
    state[checker.LOCAL_SIZE], state[checker.CLOCKS] = local, clocks.ctypes.data
    state[checker.THREADS] = threads
    return [state, table, shared, *cells]


def _findings(
    program: Program, found: np.ndarray[Any, Any], every: list[Buffer], threads: int
) -> tuple[Finding, ...]:
    """Return the table as findings, in the order of the instructions."""
    made = []
    for site, kind in zip(*np.nonzero(found[:, :, 0].T), strict=True):
        count, block, thread, where, offset, other, other_site, size = map(int, found[kind, site])
        piece = program.code[site]
        if not isinstance(piece, Instruction):
            raise PtxError(f"{program.name}: a finding at a label")
        detail = ""
        if size:
            names = {SHARED: "shared memory", LOCAL: "local memory", NOWHERE: "no known memory"}
            name = names.get(where) or every[where].name
            of = f" of {every[where].memory.size}" if where >= 0 else ""
            detail = f"{size} bytes at byte {offset}{of} of {name}, "
        if other:
            writer = program.code[other_site - 1] if other_site else None
            at = f", at {writer.statement.place}" if isinstance(writer, Instruction) else ""
            block_, thread_ = divmod(other - 1, threads)
            detail += f"with block {block_}, thread {thread_}{at}, "
        statement = piece.statement
        made.append(
            Finding(
                KINDS[kind],
                program.name,
                statement.text,
                str(statement.place),
                count,
                block,
                thread,
                detail,
            )
        )
    return tuple(made)
