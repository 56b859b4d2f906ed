"""Every kernel of an operation beside the others: one table of operations, backends and targets.

Each kernel is held to the suite: by its theorems against float64, on integers to the bit, so that
any two that hold agree there, and in the variants that it declares, such as orders of threads. A
kernel that compiles for several machines declares `targets`, and each of them is a row of its own.

Packages may add verdicts of other sorts, such as what kernels cost: entry points of the group
"qframe.crosschecks", each a function of the targets that were asked for (None: all) that returns
verdicts. A verdict has `holds`, and says what it is about as a text.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from qframe.errors import MissingExtraError, RecipeError
from qframe.host import Host
from qframe.kernels import OPS
from qframe.strict import suggestion
from qframe_conformance.kernel_case import beside
from qframe_conformance.kernel_scenarios import variants
from qframe_conformance.report import Report
from qframe_conformance.suite import check_plugin

GROUP: Final = "qframe.crosschecks"
OWN: Final = ""  # the target of a kernel that has no others


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel on one target.

    target    "" where a backend has but one
    report    of the suite; None: it did not run, and `why` says why not
    """

    op: str
    backend: str
    target: str = OWN
    report: Report | None = None
    why: str = ""

    @property
    def label(self) -> str:
        """The backend by its full name: "ptx_host sm_90"."""
        return f"{self.backend} {self.target}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cross-check has found.

    rows       kernels
    verdicts   name of an entry point -> what it says
    absent     name of an entry point -> why it has not run
    seconds    that it took
    """

    rows: Sequence[Row]
    verdicts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def broken(self) -> list[Any]:
        """The verdicts that do not hold."""
        return [each for found in self.verdicts.values() for each in found if not each.holds]

    @property
    def ok(self) -> bool:
        """Whether something was tried and nothing is wrong; what is missing is no failure."""
        ran = [row.report for row in self.rows if row.report is not None]
        return bool(ran) and all(report.ok for report in ran) and not self.broken


def crosscheck(
    host: Host,
    *,
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    profile: str = "fast",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Hold all kernels against one another; None means all of them.

    Raises RecipeError for an operation, a backend or a target that no kernel has.
    """
    started = time.perf_counter()
    kernels = [host.get("kernel", name) for name in host.names("kernel")]
    _known("operation", ops, OPS)
    _known("backend", backends, {each.backend for each in kernels})
    named = {name for each in kernels for name in getattr(each, "targets", {})}
    _known("target", targets, named)
    peers = [each for each in kernels if not getattr(each, "by_name_only", False)]
    rows = []
    for kernel in sorted(kernels, key=lambda each: [*OPS].index(each.op)):
        if kernel.op not in (ops or OPS) or kernel.backend not in (backends or [kernel.backend]):
            continue
        for target, subject in _targets(kernel, targets):
            row = Row(op=kernel.op, backend=kernel.backend, target=target)
            if progress is not None:
                progress(f"{row.op} {row.label}")
            why = refusal(subject)
            report = None
            if not why:
                with beside(peers):
                    report = check_plugin(
                        subject, kind="kernel", profile=profile, seed=seed, host=host
                    )
            rows.append(Row(op=row.op, backend=row.backend, target=target, report=report, why=why))
    verdicts, absent = _others(targets, progress) if backends is None and ops is None else ({}, {})
    return Outcome(
        rows=rows, verdicts=verdicts, absent=absent, seconds=time.perf_counter() - started
    )


def refusal(kernel: Any) -> str:
    """Return why a kernel supports none of the calls that the suite would make; "" if some."""
    said = ""
    for _, call, _ in variants(kernel):
        refused = kernel.supports(call)
        if refused is None:
            return ""
        said = said or refused.reason
    return said or "the suite has no call for it"


def _targets(kernel: Any, wanted: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    known = getattr(kernel, "targets", {})
    if not known:
        yield OWN, kernel
    for target, subject in known.items():
        if wanted is None or target in wanted:
            yield target, subject


def _known(what: str, wanted: Sequence[str] | None, known: Any) -> None:
    for name in wanted or ():
        if name not in known:
            raise RecipeError(f"no kernel has the {what} {name!r}{suggestion(name, known)}")


def _others(
    targets: Sequence[str] | None, progress: Callable[[str], None] | None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return what the entry points say, and why those that say nothing do not."""
    verdicts: dict[str, list[Any]] = {}
    absent: dict[str, str] = {}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda each: each.name):
        if progress is not None:
            progress(point.name)
        try:
            verdicts[point.name] = list(point.load()(targets))
        except MissingExtraError as error:
            absent[point.name] = str(error)
    return verdicts, absent
