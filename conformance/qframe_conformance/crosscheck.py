"""Every kernel of an operation beside the others: one table of operations, backends and targets.

Each kernel is held to the suite: by its theorems against float64, on integers to the bit, so that
any two that hold agree there, and in the variants that it declares, such as orders of threads. A
kernel that compiles for several machines declares `targets`, and each of them is a row of its own.

Kernels are checked here, or, with `Apart`, in processes of their own, several at a time: then one
that hangs or crashes is a finding.

Packages may add verdicts of other sorts, such as what kernels cost: entry points of the group
"qframe.crosschecks", each a function of the targets that were asked for (None: all) that returns
verdicts. A verdict has `holds`, and says what it is about as a text.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from qframe.errors import MissingExtraError, RecipeError
from qframe.host import Host
from qframe.kernels import OPS
from qframe.strict import suggestion
from qframe_conformance.kernel_case import beside, peers_of
from qframe_conformance.kernel_scenarios import variants
from qframe_conformance.report import Report
from qframe_conformance.side_by_side import SECONDS, side_by_side
from qframe_conformance.suite import check_plugin
from qframe_conformance.target import Target

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
class Apart:
    """In processes of their own.

    files       Python files with plugins that the host was given: processes load them, too
    processes   at a time
    seconds     for one case of one scenario
    """

    files: Sequence[str] = ()
    processes: int = 1
    seconds: float = SECONDS

    def reports(
        self, rows: Sequence[Row], begins: Callable[[Row], None], **options: Any
    ) -> dict[Row, Report]:
        """Return the suite's report of every row.

        A kernel's targets share what is compiled, so they are one process's. They come first:
        simulating takes longest.
        """
        named: dict[tuple[str, str], Row] = {}
        groups: dict[str, list[Target]] = {}
        for row in sorted(rows, key=lambda each: each.target == OWN):
            name = f"{row.op}/{row.backend}"
            target = Target(name=name, kind="kernel", files=self.files, machine=row.target)
            groups.setdefault(name, []).append(target)
            named[name, row.target] = row
        found = side_by_side(
            [*groups.values()],
            processes=self.processes,
            seconds=self.seconds,
            begins=lambda target: begins(named[target.name, target.machine]),
            beside=True,
            **options,
        )
        return {
            named[target.name, target.machine]: report
            for group, made in zip(groups.values(), found, strict=True)
            for target, report in zip(group, made, strict=True)
        }


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
    apart: Apart | None = None,
) -> Outcome:
    """Hold all kernels against one another; None means all of them.

    progress   called with what begins; from any thread, where it is `apart`
    apart      None: all of it in this process, for kernels that only this host knows, or a debugger

    Raises RecipeError for an operation, a backend or a target that no kernel has.
    """
    started = time.perf_counter()
    kernels = [host.get("kernel", name) for name in host.names("kernel")]
    _known("operation", ops, OPS)
    _known("backend", backends, {each.backend for each in kernels})
    named = {name for each in kernels for name in getattr(each, "targets", {})}
    _known("target", targets, named)
    subjects = {
        Row(op=kernel.op, backend=kernel.backend, target=target, why=refusal(subject)): subject
        for kernel in sorted(kernels, key=lambda each: [*OPS].index(each.op))
        if kernel.op in (ops or OPS) and kernel.backend in (backends or [kernel.backend])
        for target, subject in _targets(kernel, targets)
    }
    wanted = [row for row in subjects if not row.why]
    numbers = itertools.count(1)

    def begins(row: Row) -> None:
        if progress is not None:
            progress(f"[{next(numbers)}/{len(wanted)}] {row.op} {row.label}")

    options: dict[str, Any] = {"profile": profile, "seed": seed}
    if apart is not None:
        reports = apart.reports(wanted, begins, **options)
    else:
        reports = {}
        with beside(peers_of(host)):
            for row in wanted:
                begins(row)
                reports[row] = check_plugin(subjects[row], kind="kernel", host=host, **options)
    rows = [replace(row, report=reports.get(row)) for row in subjects]
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
