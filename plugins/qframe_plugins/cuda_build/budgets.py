"""Budgets: what kernels may cost, and what has to be in them, as a TOML file.

    [every.at_most]              # for each kernel that does not say otherwise
    fp64 = 0

    [kernels.gemm.at_most]
    registers = 64
    [kernels.gemm.at_least]
    dp4a = 16
    [kernels.gemm.sm_100.at_most]
    registers = 80

Words are those of `Figures.counts`. What is said of an architecture goes before what is said of the
kernel, and that before what is said of every kernel.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qframe.errors import QframeError
from qframe.strict import suggestion
from qframe_plugins.cuda_build.assembly import MEMORY, PTX_CLASSES, Figures
from qframe_plugins.cuda_build.sass import CLASSES

COUNTS: Final = (*MEMORY, "instructions", *CLASSES, *PTX_CLASSES)
"""What can be limited."""

SIDES: Final = ("at_most", "at_least")
Limits = Mapping[str, Mapping[str, int]]  # side -> word -> limit

NEVER: Final = ("stack", "spills", "fp64", "local", "call", "div64", "ftz")
"""What no kernel has unless its own budget says so."""

TREASURED: Final = ("dp4a", "mma", "load128", "store128", "shared128", "cp_async", "shuffle")
"""What must not be lost where it once was: without it a kernel is slow, in silence."""

REGISTER_STEP: Final = 8  # in which registers are given to warps


class BudgetError(QframeError):
    """A file of budgets is not as it has to be."""


@dataclass(frozen=True)
class Budget:
    """What a file says.

    every     limits of each kernel
    kernels   name -> limits
    arches    (name, architecture) -> limits
    """

    every: Limits = field(default_factory=dict)
    kernels: Mapping[str, Limits] = field(default_factory=dict)
    arches: Mapping[tuple[str, str], Limits] = field(default_factory=dict)

    def limits(self, name: str, arch: str, side: str) -> dict[str, int]:
        """Return word -> limit, for one kernel on one architecture."""
        levels = (self.every, self.kernels.get(name, {}), self.arches.get((name, arch), {}))
        return {word: limit for level in levels for word, limit in level.get(side, {}).items()}


@dataclass(frozen=True)
class Verdict:
    """One limit, and what was found.

    limit   in words: "at most 0"
    """

    kernel: str
    arch: str
    what: str
    limit: str
    got: str
    holds: bool

    def __str__(self) -> str:
        state = "" if self.holds else "breaks its budget: "
        return (
            f"{state}{self.kernel}, {self.arch}: {self.what}: expected {self.limit}, got {self.got}"
        )


def judge(name: str, figures: Figures, budget: Budget) -> list[Verdict]:
    """Return a verdict on every limit; a kernel of which the budget says nothing breaks it."""
    if name not in budget.kernels:
        return [Verdict(name, figures.arch, "budget", "an entry in the file", "none", False)]
    made = []
    for side in SIDES:
        for word, limit in budget.limits(name, figures.arch, side).items():
            got = figures.counts[word]
            holds = got <= limit if side == "at_most" else got >= limit
            words = f"{side.replace('_', ' ')} {limit}"
            made.append(Verdict(name, figures.arch, word, words, str(got), holds))
    return made


def strangers(names: Iterable[str], budget: Budget) -> list[Verdict]:
    """Return a verdict against every entry whose kernel is not among `names`."""
    return [
        Verdict(name, "any", "budget", "a kernel of this name", "none", False)
        for name in sorted(set(budget.kernels) - set(names))
    ]


def read_budgets(file: str | Path) -> Budget:
    """Read a file. Raises BudgetError that names the key."""
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise BudgetError(f"{file}: {error.strerror}; expected a file of budgets") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BudgetError(f"{file}: no TOML: {error}") from error
    _known(file, "", content, ("every", "kernels"))
    kernels, arches = {}, {}
    for name, entry in _table(file, "kernels", content.get("kernels", {})).items():
        place = f"kernels.{name}"
        inner = {key: value for key, value in _table(file, place, entry).items()}
        for arch in [key for key in inner if key.startswith("sm_")]:
            arches[name, arch] = _limits(file, f"{place}.{arch}", inner.pop(arch))
        kernels[name] = _limits(file, place, inner)
    return Budget(_limits(file, "every", content.get("every", {})), kernels, arches)


def _limits(file: str | Path, place: str, given: Any) -> Limits:
    _known(file, place, _table(file, place, given), SIDES)
    for side, limits in given.items():
        _known(file, f"{place}.{side}", _table(file, f"{place}.{side}", limits), COUNTS)
        for word, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
                raise BudgetError(
                    f"{file}: {place}.{side}.{word} is {limit!r}, expected a whole number >= 0"
                )
    return dict(given)


def _table(file: str | Path, place: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise BudgetError(f"{file}: {place} is {given!r}, expected a table")
    return given


def _known(file: str | Path, place: str, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            whole = f"{place}.{key}" if place else key
            raise BudgetError(f"{file}: unknown key {whole}{suggestion(key, known)}")


def written(measured: Mapping[str, Sequence[Figures]], release: str) -> str:
    """Return a file that these kernels keep: name -> figures of every architecture.

    Registers are rounded up to the step in which warps get them. A kernel that has what no kernel
    should have gets a limit of its own, to be explained by a comment or mended.
    """
    lines = [
        f"# What each kernel may cost, measured with ptxas {release}. A change that breaks it is",
        "# either mended or accepted on purpose: qframe kernels build --write-budgets FILE",
        "",
        "[every.at_most]",
        *(f"{word} = 0" for word in NEVER),
    ]
    for name, figures in sorted(measured.items()):
        most = {word: max(each.counts[word] for each in figures) for word in COUNTS}
        least = {word: min(each.counts[word] for each in figures) for word in TREASURED}
        registers = -(-most["registers"] // REGISTER_STEP) * REGISTER_STEP
        lines += ["", f"[kernels.{name}.at_most]", f"registers = {registers}"]
        lines += [f"shared = {most['shared']}"]
        lines += [f"{word} = {most[word]}" for word in NEVER if most[word]]
        if any(least.values()):
            lines += [f"[kernels.{name}.at_least]"]
            lines += [f"{word} = {count}" for word, count in least.items() if count]
    return "\n".join(lines) + "\n"
