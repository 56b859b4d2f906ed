"""`qframe doctor`: what this machine has, what is wrong, and the next step for each problem.

Nothing here fails, and nothing touches a GPU driver unless `--probe-gpu` asks for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe import __version__
from qframe.cli.command import Debug, Json
from qframe.cli.flags import failed, one_line
from qframe.cli.screen import print_json, print_result

if TYPE_CHECKING:
    from qframe.host import Host

PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
)
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512vnni": "AVX-512 VNNI",
    "avxvnni": "AVX VNNI",
    "avx512bf16": "AVX-512 BF16",
    "amx-bf16": "AMX BF16",
    "neon": "NEON",
    "dotprod": "dot product",
    "bf16": "BF16",
}
"""LLVM's name of a processor feature -> the name people know it by."""

GPU_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version")  # there when a driver is


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    next_step   what to do about it when it is a problem, else ""
    """

    what: str
    value: str
    next_step: str = ""


def doctor(
    probe_gpu: Annotated[
        bool, typer.Option("--probe-gpu", help="Ask the driver for the GPU; else it is let alone.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the installation: versions, processor, GPU, caches, plugins.

    Exit code 1 when there is a problem; each has a next step.
    """
    findings = examine(probe=probe_numba_cuda if probe_gpu else None)
    problems = [finding for finding in findings if finding.next_step]
    if as_json:
        from dataclasses import asdict

        print_json(
            {"problems": len(problems), "findings": [asdict(finding) for finding in findings]}
        )
    else:
        from qframe.report.table import finding_table, stacked

        count = len(problems)
        summary = "no problems" if not count else f"{count} problem{'s' if count > 1 else ''}"
        rows = [(f.what, f.value, f.next_step) for f in findings]
        print_result(stacked(finding_table(rows), summary))
    if problems:
        raise typer.Exit(1)


def examine(probe: Callable[[], str] | None = None) -> list[Finding]:
    """Look at everything."""
    findings = [
        Finding(what="qframe", value=__version__),
        Finding(what="python", value=f"{platform.python_version()} ({sys.executable})"),
        Finding(what="system", value=f"{platform.system()} {platform.machine()}"),
    ]
    findings += [package_state(name) for name in PACKAGES]
    findings += [
        Finding(what="processor", value=processor_features()),
        Finding(what="threads", value=thread_state(os.environ)),
        gpu_state(os.environ, probe=probe),
        numba_cache_state(os.environ),
        model_cache_state(),
    ]
    return findings + plugin_state()


def package_state(
    name: str,
    version: Callable[[str], str] = importlib.metadata.version,
    load: Callable[[str], Any] = importlib.import_module,
) -> Finding:
    """Return a package's version, and whether it can be imported."""
    try:
        found = version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            what=name, value="not installed", next_step=f'run: pip install "{name}", or qframe anew'
        )
    try:
        load(name)
    except Exception as error:  # a broken installation raises anything
        return Finding(
            what=name,
            value=f"{found}, but it cannot be imported: {one_line(error)}",
            next_step=f"run: pip install --force-reinstall --no-deps {name}=={found}",
        )
    return Finding(what=name, value=found)


def processor_features() -> str:
    """Return the features that make kernels fast, by name."""
    try:
        from llvmlite import binding

        available = binding.get_host_cpu_features()
        model = binding.get_host_cpu_name()
    except Exception as error:
        return f"{platform.processor() or 'unknown'} (features not known: {one_line(error)})"
    known = [label for name, label in CPU_FEATURES.items() if available.get(name)]
    return f"{model}: {', '.join(known) or 'no vector extensions that matter'}"


def thread_state(environ: Mapping[str, str]) -> str:
    """Return how many threads there are, and which variables limit them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        cores = os.cpu_count() or 1
    limits = ", ".join(
        f"{name}={environ[name]}"
        for name in ("QFRAME_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        if name in environ
    )
    return f"{cores} cores{f'; {limits}' if limits else ''}"


# GPU --------------------------------------------------------------------------------------------


def gpu_state(
    environ: Mapping[str, str],
    *,
    version: Callable[[str], str] = importlib.metadata.version,
    files: Sequence[str] = GPU_FILES,
    probe: Callable[[], str] | None = None,
) -> Finding:
    """Return whether GPU kernels have a real GPU, the simulator, or nothing.

    version   looks a package's version up
    files     those whose presence tells of a driver, without asking it
    probe     asks the driver and returns the GPU's name; None: it is let alone

    No GPU is no problem, but one that is there and cannot be used is.
    """
    if environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return Finding(
            what="gpu", value="simulator (NUMBA_ENABLE_CUDASIM=1): slow, no measure of a real GPU"
        )
    try:
        package = f"numba-cuda {version('numba-cuda')}"
    except importlib.metadata.PackageNotFoundError:
        package = ""
    driver = next((file for file in files if Path(file).exists()), None)
    if driver is None and probe is None:
        return Finding(
            what="gpu", value=f"none ({package or 'numba-cuda not installed'}, no NVIDIA driver)"
        )
    if not package:
        return Finding(
            what="gpu",
            value="a driver is there, but numba-cuda is not installed",
            next_step='run: pip install "qframe[cuda]"',
        )
    if probe is None:
        return Finding(
            what="gpu", value=f"real: {package}, driver seen at {driver}; --probe-gpu asks it"
        )
    try:
        name = probe()
    except Exception as error:  # a broken toolkit raises anything
        return Finding(
            what="gpu",
            value=f"none: {package} cannot use it: {one_line(error)}",
            next_step="check that nvidia-smi lists the GPU and that its driver is as new as "
            'the CUDA version of "qframe[cuda]"; CPU kernels work without',
        )
    return Finding(what="gpu", value=f"real: {name}, {package}")


def probe_numba_cuda() -> str:
    """Ask the driver for the first GPU, and return its name. Raises when that fails."""
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name
    return name.decode() if isinstance(name, bytes) else str(name)


# Folders ----------------------------------------------------------------------------------------


def numba_cache_state(environ: Mapping[str, str], package: str = "qframe") -> Finding:
    """Return where numba keeps compiled kernels: NUMBA_CACHE_DIR, else beside the code, else home.

    package   one that is installed where the kernels are
    """
    candidates = []
    if environ.get("NUMBA_CACHE_DIR"):
        candidates.append(Path(environ["NUMBA_CACHE_DIR"]))
    else:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            candidates.append(Path(spec.origin).parent / "__pycache__")
        candidates.append(Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba")
    for folder in candidates:
        if is_writable(folder):
            return Finding(what="kernel cache", value=f"{folder} (writable)")
    return Finding(
        what="kernel cache",
        value=f"{candidates[0]} cannot be written: every process compiles the kernels anew",
        next_step="set NUMBA_CACHE_DIR to a folder that you may write to",
    )


def model_cache_state(folder: Path | None = None) -> Finding:
    """Return where the demonstration's model is kept, and whether it is there."""
    from qframe.embedded import FOLDER, cache_folder

    folder = cache_folder() if folder is None else folder
    if (folder / FOLDER).is_dir():
        return Finding(what="model cache", value=f"{folder}: SmolLM2 is there")
    if not is_writable(folder):
        return Finding(
            what="model cache",
            value=f"{folder} cannot be written",
            next_step="set QFRAME_CACHE to a folder with 640 MB that you may write to",
        )
    return Finding(what="model cache", value=f"{folder}: SmolLM2 is fetched when it is asked for")


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, or in the one it would be made in."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# Plugins ----------------------------------------------------------------------------------------


def plugin_state(discover: Callable[[], Host] | None = None) -> list[Finding]:
    """Return how many plugins work, and a finding for each that does not."""
    import warnings

    from qframe.host import Host as Plugins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failures become findings
        try:
            host = (discover or Plugins.discover)()
        except Exception as error:
            return [
                Finding(
                    what="plugins",
                    value=one_line(error),
                    next_step="see qframe plugins; unset QFRAME_STRICT_PLUGINS to go on without",
                )
            ]
    working = sum(record.status == "loaded" for record in host.records)
    missing = "" if working else "install qframe (anew): its own plugins are entry points too"
    findings = [Finding(what="plugins", value=f"{working} loaded", next_step=missing)]
    for record in failed(host):
        findings.append(
            Finding(
                what=f"plugin {record.name}",
                value=f"failed ({record.source} {record.version}): {one_line(record.error)}",
                next_step=f"update or uninstall {record.source}, or set "
                f"QFRAME_DISABLE_PLUGINS={record.name}",
            )
        )
    for (kind, name), rivals in host.contested().items():
        findings.append(
            Finding(
                what=f"{kind} {name}",
                value=f"claimed by {' and '.join(record.label for record in rivals)}",
                next_step=f"set QFRAME_DISABLE_PLUGINS={rivals[-1].name}, or uninstall one",
            )
        )
    return findings
