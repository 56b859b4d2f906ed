"""A program -> machine code, by LLVM for the processor that this runs on."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from qframe_plugins.ptx_host import ops_float
from qframe_plugins.ptx_host.flow import Program
from qframe_plugins.ptx_host.frame import Options
from qframe_plugins.ptx_host.layout import WARP_OPERATION
from qframe_plugins.ptx_host.machine import Machine

EFFORT = 1  # of LLVM's: kernels run once or twice, so time to compile counts


@dataclass(frozen=True)
class Code:
    """Machine code: the kernel's address, the places where it waits, and its context's size."""

    engine: Any
    address: int
    sites: np.ndarray[Any, Any]  # kind, resolver's address, instruction, whether memory is ordered
    slots: int


def compile_program(program: Program, addresses: dict[str, int], options: Options) -> Code:
    """Return a program's code. Raises PtxError and PtxUnsupportedError."""
    module = ir.Module(name=program.name)
    module.triple = llvm.get_process_triple()
    machine = Machine(program, module, addresses, options)
    machine.build()
    engine = _engine(str(module))
    sites = np.zeros((len(machine.waits) + 1, 4), np.int64)
    for number, waits in enumerate(machine.waits, 1):
        resolver = engine.get_function_address(waits.function) if waits.function else 0
        piece: Any = program.code[waits.site]
        orders = waits.kind == WARP_OPERATION and piece.form.pattern == "bar.warp.sync"
        sites[number] = waits.kind, resolver, waits.site, orders
    return Code(engine, engine.get_function_address(machine.name), sites, machine.slots)


def _engine(text: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    for name in (*ops_float.LIBRARY.values(), "fma", "fmaf"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    target = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=EFFORT,
        jit=True,
    )
    module = llvm.parse_assembly(text)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=EFFORT)
    builder = llvm.create_pass_builder(target, tuning)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return engine
