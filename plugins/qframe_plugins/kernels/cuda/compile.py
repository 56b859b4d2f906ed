"""A kernel in Python -> PTX, with no GPU and no driver, kept in a folder.

It needs the extra "cuda": numba-cuda with NVIDIA's NVVM, in the pinned versions, as two inner
things of numba-cuda are used. Products and sums are never contracted: a kernel that wants a fused
multiply-add writes `cuda.fma`. So every architecture rounds in the same places.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, Final

from qframe.errors import MissingExtraError, UnsupportedError

ARCHS: Final = ("sm_80", "sm_90", "sm_100")
"""The architectures that kernels are tested for; those above, and between, compile too."""

_PACKAGES = ("numba", "llvmlite", "numba-cuda", "nvidia-nvvm")  # whose versions make the PTX
_LOCK = Lock()  # what is put in the place of the device is seen by all threads

Function = Callable[..., Any]


@dataclass(frozen=True)
class Source:
    """A kernel in Python.

    function    what numba.cuda compiles
    types       types of its parameters, as numba's names them; "*" after one makes a pointer
    fp64        whether it computes in float64 on purpose
    """

    function: Function
    types: tuple[str, ...]
    fp64: bool = False

    @property
    def name(self) -> str:
        """The kernel's name, in the PTX as well."""
        return self.function.__name__

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters; in the PTX they are {name}_{parameter}."""
        return tuple(inspect.signature(self.function).parameters)


def source(types: str, *, fp64: bool = False) -> Callable[[Function], Source]:
    """Make a `Source` of a function: @source("float32*, uint32")."""

    def make(function: Function) -> Source:
        _sources(Path(inspect.getfile(function)).parent)  # as they are while they are imported
        return Source(function, tuple(each.strip() for each in types.split(",")), fp64)

    return make


_HELPERS: list[Any] = []


def inlined(function: Function) -> Any:
    """Make a function that kernels call, and that becomes a part of them."""
    from numba import cuda

    _HELPERS.append(cuda.jit(device=True, forceinline=True)(function))
    return _HELPERS[-1]


def missing() -> str | None:
    """Return the package without which nothing compiles, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda"
    try:
        importlib.metadata.version("nvidia-nvvm")
    except importlib.metadata.PackageNotFoundError:
        return "nvidia-nvvm"
    return None


def compile_ptx(kernel: Source, arch: str) -> str:
    """Return the PTX of a kernel for an architecture such as "sm_90".

    Raises MissingExtraError without the extra, UnsupportedError for what is no architecture.
    """
    package = missing()
    if package is not None:
        raise MissingExtraError(package, "cuda", "compiling kernels for GPUs")
    found = re.fullmatch(r"sm_(\d+)(\d)", arch)
    if found is None or int(found[1]) < 8:
        raise UnsupportedError(
            f"architecture {arch!r}, expected sm_80 or above: {', '.join(ARCHS)}, ..."
        )
    return _kept(kernel, arch, (int(found[1]), int(found[2])))


@cache
def _kept(kernel: Source, arch: str, capability: tuple[int, int]) -> str:
    """Return the PTX from the folder, or compile it and put it there."""
    folder = cache_folder()
    key = f"{kernel.name}-{arch}-{_fingerprint(kernel)}"
    path = folder / f"{key}.ptx"
    if path.exists():
        return path.read_text(encoding="utf-8")
    text = _compile(kernel, capability)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Others see a whole file or none.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=folder, suffix=".new", delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return text  # a folder that cannot be written to costs time and nothing else
    return text


def cache_folder() -> Path:
    """Return where PTX is kept: NUMBA_CACHE_DIR, else the user's folder for caches."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "ptx"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qframe" / "ptx"


@cache
def _sources(folder: Path) -> bytes:
    """Return what tells the Python files of a folder from any others."""
    parts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(parts)).digest()


def _fingerprint(kernel: Source) -> str:
    """Return what tells a kernel, and all that it may call, from any other."""
    folders = {Path(inspect.getfile(kernel.function)).parent, Path(__file__).parent}
    parts = [_sources(folder) for folder in sorted(folders)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    text = "\n".join([*versions, kernel.function.__module__, kernel.name, *kernel.types])
    return hashlib.sha256(b"".join([*parts, text.encode()])).hexdigest()[:16]


def _compile(kernel: Source, capability: tuple[int, int]) -> str:
    from numba.cuda import types

    signature = types.void(*(_type(each, types) for each in kernel.types))
    return _named(text_of(kernel.function, signature, capability), kernel)


def text_of(function: Function, signature: Any, capability: tuple[int, int]) -> str:
    """Return the PTX of a kernel as numba-cuda writes it, without contraction.

    signature    numba's, of a function that returns nothing
    capability   (9, 0) for sm_90
    """
    from numba.cuda import compiler

    with _LOCK, _as_if_on(capability):
        library, _ = compiler._compile_pyfunc_with_fixup(
            function, signature, device=False, abi="numba", cc=capability
        )
        library._nvvm_options["fma"] = False
        [text] = library.get_asm_strs(cc=capability)
    return str(text)


def _type(name: str, types: Any) -> Any:
    kind = getattr(types, name.rstrip("*"))
    return types.CPointer(kind) if name.endswith("*") else kind


@contextmanager
def _as_if_on(capability: tuple[int, int]) -> Iterator[None]:
    """Let numba-cuda find a device, which it asks for its architecture when helpers are compiled.

    It keeps helpers by their types alone, so those of another architecture are let go.
    """
    from numba.cuda import dispatcher

    for helper in _HELPERS:
        helper.overloads.clear()
    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def _named(text: str, kernel: Source) -> str:
    """Return a PTX in which the kernel and its parameters have the names that Python gives them.

    numba's names count what was compiled before, which would make every text another one.
    """
    found = re.search(r"\.visible \.entry (\w+)\(", text)
    if found is None:
        raise UnsupportedError(f"{kernel.name}: numba-cuda has made no kernel of it")
    mangled = found[1]
    text = re.sub(r"\.common \.global [^;]*_ZN08NumbaEnv\w+;\n", "", text)
    for number, parameter in reversed([*enumerate(kernel.parameters)]):
        text = text.replace(f"{mangled}_param_{number}", f"{kernel.name}_{parameter}")
    for number, shared in enumerate(
        re.findall(r"\.shared \.align \d+ \.b8 (_cudapy_smem_\d+)", text)
    ):
        text = re.sub(rf"\b{shared}\b", f"{kernel.name}_shared{number}", text)
    return text.replace(mangled, kernel.name)
