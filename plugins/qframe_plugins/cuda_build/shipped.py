"""The GPU kernels that come with qframe, as what `qframe kernels build` compiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from qframe.errors import MissingExtraError
from qframe_plugins.cuda_build.budgets import Verdict, judge, read_budgets, strangers
from qframe_plugins.cuda_build.tools import release

BUDGETS: Final = Path(__file__).parent.parent / "kernels" / "cuda" / "budgets.toml"
"""What they may cost."""


def shipped() -> dict[str, Any]:
    """Return name -> source of every kernel. Raises MissingExtraError without the extra."""
    from qframe_plugins.kernels.cuda.compile import missing

    if package := missing():
        raise MissingExtraError(package, "cuda", "compiling kernels for GPUs")
    from qframe_plugins.kernels.cuda.sources import SOURCES

    return {source.name: source for source in SOURCES}


def compiled(name: str, arch: str) -> str:
    """Return a kernel's PTX."""
    from qframe_plugins.kernels.cuda.compile import compile_ptx

    return compile_ptx(shipped()[name], arch)


def kept_budgets(targets: Sequence[str] | None) -> Iterator[Verdict]:
    """Yield a verdict on every limit of every kernel, for `qframe crosscheck`.

    targets   architectures; None: those that are tested

    Raises MissingExtraError without the extra.
    """
    from qframe.parallel import default_threads, spread
    from qframe_plugins.cuda_build.assembly import Figures, assemble
    from qframe_plugins.kernels.cuda.compile import ARCHS

    release()
    budget, names = read_budgets(BUDGETS), shipped()
    jobs = [(name, arch) for name in names for arch in targets or ARCHS]

    def figures_of(job: tuple[str, str]) -> Figures:
        name, arch = job
        [figures] = assemble(compiled(name, arch), arch)
        return figures

    made = spread(figures_of, jobs, default_threads())  # which wait for the assembler
    for (name, _), figures in zip(jobs, made, strict=True):
        yield from judge(name, figures, budget)
    yield from strangers(names, budget)
