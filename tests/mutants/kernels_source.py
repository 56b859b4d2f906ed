"""Kernels of a backend with one piece of their source replaced.

A backend is a module with hooks, such as `numba_ops`, and a folder of modules beside it. Both are
copied under another name.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

from tests.mutants.mutant import Mutant


@cache
def scratch():
    """Return a folder that is imported from, and goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="qframe-mutants-")
    sys.path.append(folder.name)
    return folder


def changed(hooks, folder, op, name, file, old, new, backend=None):
    """Return a function that makes the kernel of an operation from changed source.

    hooks       the module that registers the kernels; `folder`, the name of that beside it
    name        of the mistake, one for each operation
    file        in which `old` becomes `new`; it must stand there once
    backend     of the kernel, where the module registers several
    """
    source = Path(hooks.__file__)
    original = f"{hooks.__name__.rpartition('.')[0]}.{folder}"

    def make():
        package = f"mutant_{folder}_{op}_{name}"
        made = Path(scratch().name) / package
        if package not in sys.modules:
            made.mkdir()
            for each in (*source.parent.joinpath(folder).glob("*.py"), source):
                text = each.read_text(encoding="utf-8")
                if each.name == file:
                    if text.count(old) != 1:
                        raise ValueError(f"{name}: {file} has {text.count(old)} of {old!r}")
                    text = text.replace(old, new)
                made.joinpath(each.name).write_text(text.replace(original, package), "utf-8")
            importlib.invalidate_caches()
        module = importlib.import_module(f"{package}.{source.stem}")
        return kernel_of(module, op, backend)

    return make


def mutants(hooks, folder, op, mistakes):
    """Return mutants of the kernel of an operation, see `changed`.

    mistakes   (name, file, old, new, check that must find it, bug) of each
    """
    right = partial(kernel_of, hooks, op)
    backend = right().backend
    return [
        Mutant(
            name=f"{op}:{backend}_{name}",
            kind="kernel",
            bug=f"{backend}: {bug}",
            make=changed(hooks, folder, op, name, file, old, new),
            correct=right,
            killed_by=killed_by,
        )
        for name, file, old, new, killed_by, bug in mistakes
    ]


def kernel_of(hooks, op, backend=None):
    """Return the kernel of an operation that a module registers; backend: where there are more."""
    kernels = [kernel for kernel in hooks.qframe_kernels() if kernel.op == op]
    [found] = [kernel for kernel in kernels if backend in (None, kernel.backend)]
    return found
