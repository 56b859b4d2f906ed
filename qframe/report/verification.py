"""What `qframe verify` found, on one screen: problems first, then what was looked at, and how."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from qframe.report.certificates import certificate_table, summary_text
from qframe.report.table import BAD, GOOD, facts, some, table, titled

if TYPE_CHECKING:
    from qframe.verification import VerifyReport

PROBLEMS = 12  # that are shown


def verification_parts(report: VerifyReport) -> list[RenderableType | None]:
    """Return what to put under one another."""
    return [
        problem_table(report),
        _recomputed_table(report),
        facts(lines(report)),
        verdict(report),
    ]


def problem_table(report: VerifyReport) -> RenderableType | None:
    """Return what is wrong, or None."""
    if not report.problems:
        return None
    made = table("what", "name", "problem", names=3)
    for problem in report.problems[:PROBLEMS]:
        made.add_row(Text(problem.kind, style=BAD), problem.name, problem.message)
    rest = len(report.problems) - PROBLEMS
    if rest > 0:
        made.add_row("", f"and {rest} more", "--json has them all")
    return titled("problems", made)


def _recomputed_table(report: VerifyReport) -> RenderableType | None:
    made = certificate_table(report.recomputed)
    return None if made is None else titled("certificates, computed once more", made)


def lines(report: VerifyReport) -> dict[str, str]:
    """Return what was looked at, and what was found."""
    wrong = Counter(problem.kind for problem in report.problems)
    hashed = f"{report.tensors} hashed"
    if report.statistics:
        hashed += f" ({report.tensors + report.statistics} with the statistics that were kept)"
    found = {
        "files": f"{report.files} hashed{_but(wrong['file'])}",
        "tensors": f"{hashed}{_but(wrong['tensor'])}",
        "layers": f"{report.layers} packed weights are well-formed; manifest, tensors and "
        f"config.json agree{_but(wrong['layer'] + wrong['config'])}",
        "recorded": f"certificates: {summary_text(report.recorded)}",
    }
    count = sum(map(len, report.recomputed.values()))
    if report.reference is not None:
        found["recomputed"] = (
            f"{count} certificates from {report.reference}; {report.carried} tensors that were "
            f"carried over compared with it{_but(wrong['reference'])}"
        )
    for (why, claims), layers in _unchecked(report).items():
        found[f"read only{' ' * len(found)}"] = f"{claims} on {layers} layers: {why}"
    for number, text in enumerate(report.notes):
        found["note" + " " * number] = text
    return found


def verdict(report: VerifyReport) -> Text:
    """Return the last line."""
    if report.exit_code == 4:
        return Text("this is not the folder that was written", style=BAD)
    if report.exit_code:
        return Text("the files are what was written, but a bound does not hold", style=BAD)
    if report.reference is None:
        return Text("the files are what was written, as far as hashes tell", style=GOOD)
    if report.unchecked:
        return Text("verified, but for the certificates that were read only", style=GOOD)
    return Text("verified: every certificate was computed once more and holds", style=GOOD)


def _unchecked(report: VerifyReport) -> dict[tuple[str, str], int]:
    """Return (why, claims) -> on how many layers they were read only."""
    by_layer: dict[tuple[str, str], list[str]] = {}
    for item in report.unchecked:
        by_layer.setdefault((item.layer, item.why), []).append(f"{item.claim} ({item.theorem})")
    return Counter((why, some(claims)) for (_, why), claims in by_layer.items())


def _but(wrong: int) -> str:
    return f"; {wrong} wrong" if wrong else ""
