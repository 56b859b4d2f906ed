"""What determines a result, so that none is ever taken for that of something else.

A version number does not change while a plugin is being written, so the source counts as well. The
machine counts as far as it changes digits: the instructions that torch uses, and whether matrix
products run in bfloat16. The number of threads does not, as results do not depend on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import qframe
from qframe import parallel
from qframe.fingerprints import sha256
from qframe.pipeline import compute_dtype
from qframe.run_records import plugins_used

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qframe.evaluation import Protocol
    from qframe.pipeline import Job
    from qframe.weights import ModelFolder

LIBRARIES = ("torch", "numpy", "numba", "transformers", "tokenizers")
_PROCESS = uuid.uuid4().hex  # stands for code whose source cannot be read


def model_identity(folder: ModelFolder, threads: int = 1, *, whole: bool = True) -> dict[str, str]:
    """Return the hash of everything that the network or its tokens are made of, by name.

    That is each tensor, which is not hashed again when a layer is made of it, and each file that
    holds none. The names of the folder and of files with tensors do not count: a copy is the same
    model.

    whole   read all tensors for that; else those without a known hash are dtype and shape alone
    """
    if whole:
        parallel.spread(folder.fingerprint, list(folder.tensors), threads)
    tensors = {f"tensor {name}": f"{t.dtype} {list(t.shape)}" for name, t in folder.tensors.items()}
    files = {file.name: sha256(file) for file in folder.side_files()}
    return tensors | tensors_identity(folder) | files


def tensors_identity(folder: ModelFolder) -> dict[str, str]:
    """Return the same of tensors whose hash is known by now."""
    return {
        f"tensor {name}": f"{folder.tensors[name].dtype} {list(folder.tensors[name].shape)} {own}"
        for name, own in folder.known_fingerprints.items()
    }


def evaluation_identity(protocol: Protocol, windows: torch.Tensor) -> dict[str, Any]:
    """Return what the evaluation depends on besides the network."""
    numbers: npt.NDArray[np.int64] = windows.numpy()
    tokens = hashlib.sha256(numbers.tobytes()).hexdigest()
    return {
        **{k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("tokenizer", "text")},
        "tokens_sha256": tokens,
    }


def environment(dtype: str = "float32") -> dict[str, str]:
    """Return what the digits of a result depend on: libraries, instructions, qframe itself.

    dtype   of the recipe: compute_dtype
    """
    return {
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compute_dtype": str(compute_dtype(dtype)).removeprefix("torch."),
        "qframe": qframe.__version__,
        "qframe source": package_source(Path(qframe.__file__).parent),
    }


def machine() -> dict[str, str]:
    """Return what a reader should know of the machine; nothing of it is part of an identity."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def plugin_identity(job: Job) -> list[dict[str, str]]:
    """Return every plugin object that a job uses: who provides it, its version, its source."""
    return [
        {**record, "sha256": source_of(job.host.get(record["kind"], record["name"]))}
        for record in plugins_used(job)
    ]


def source_of(thing: Any) -> str:
    """Return the sha256 of the source that an object's class comes from.

    That is the whole package, since its modules use one another, or a single file. Where there is
    no source, a value that is another one in every process.
    """
    module = sys.modules.get(type(thing).__module__)
    top = sys.modules.get(type(thing).__module__.partition(".")[0])
    try:
        if top is not None and hasattr(top, "__path__"):
            return "+".join(package_source(Path(folder)) for folder in top.__path__)
        file = inspect.getsourcefile(module) if module is not None else None
        return sha256(Path(file)) if file is not None else _PROCESS
    except (OSError, TypeError):
        return _PROCESS


@cache
def package_source(folder: Path) -> str:
    """Return the sha256 of all Python files below a folder, with their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return found.hexdigest()


def _processor() -> str:
    """Return the name of the processor, as well as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
