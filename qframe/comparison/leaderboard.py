"""The rows of a comparison: what each cell came to, in order, and which are Pareto-optimal."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qframe.report.layers import words_for_infinities

DONE, FAILED = "done", "failed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell; None where it failed, or there is nothing to say.

    number               on the leaderboard, from 1
    method, scheme       as they were asked for
    described            the scheme in words
    kl_mean, kl_p99      nats, from full precision to this network
    gain                 KL of rounding to nearest over KL of this method, both with this scheme
    bits_per_weight      stored, of the quantized layers, with scales and zero points
    seconds              of quantizing
    peak_memory          bytes of the process while it quantized and scored, at most
    certificates         how many there are; `violated`: how many do not hold
    closest              the largest error over what is allowed, among all certificates
    fallbacks            layers that got a weaker method than was asked for
    pareto               no other cell has as few bits and as small a KL, and less of one
    message, exit_code   why it failed, and what `qframe quantize` would exit with
    """

    number: int
    method: str
    scheme: str
    described: str
    status: str
    key: str
    kl_mean: float | None = None
    kl_p99: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    top1: float | None = None
    gain: float | None = None
    bits_per_weight: float | None = None
    weights_bytes: int | None = None
    folder_bytes: int | None = None
    seconds: float | None = None
    seconds_scoring: float | None = None
    peak_memory: int | None = None
    certificates: int = 0
    violated: int = 0
    closest: float | None = None
    fallbacks: int = 0
    pareto: bool = False
    message: str = ""
    exit_code: int = 0

    @property
    def label(self) -> str:
        """Method and scheme."""
        return f"{self.method} {self.scheme}"


def row_of(method: str, scheme: str, described: str, key: str, content: Mapping[str, Any]) -> Row:
    """Return the row of a cell, without what depends on the others.

    content   of the cell in the store
    """
    shared: dict[str, Any] = {
        "number": 0,
        "method": method,
        "scheme": scheme,
        "described": described,
        "key": key,
    }
    measured = content.get("measured", {})
    shared["seconds"] = measured.get("seconds")
    shared["peak_memory"] = measured.get("peak_memory")
    if content["status"] != DONE:
        error = content["error"]
        return Row(**shared, status=FAILED, message=error["message"], exit_code=error["exit_code"])
    score = {name: number(value) for name, value in content["score"].items()}
    report = content["report"]
    certificates = [c for layer in report["layers"] for c in layer["certificates"]]
    ratios = [number(c["ratio"]) for c in certificates]
    return Row(
        **shared,
        status=DONE,
        kl_mean=score["kl_mean"],
        kl_p99=score["kl_p99"],
        perplexity=score["perplexity"],
        perplexity_stderr=score["perplexity_stderr"],
        top1=score["top1"],
        bits_per_weight=content["bits_per_weight"],
        weights_bytes=content["bytes"]["weights"],
        folder_bytes=content["bytes"]["total"],
        seconds_scoring=measured["seconds_scoring"],
        certificates=len(certificates),
        violated=sum(not ratio <= 1 for ratio in ratios),  # NaN never holds
        closest=max(ratios, key=badness, default=None),
        fallbacks=len({e["layer"] for e in report["events"] if e["kind"] == "fallback"}),
    )


def ranked(rows: Sequence[Row], baseline: str) -> list[Row]:
    """Return the rows in order: schemes as they were asked for, in each the smallest KL first.

    baseline   the method that gains are relative to
    """
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    base = {row.scheme: row.kl_mean for row in rows if row.method == baseline}
    ordered = sorted(rows, key=lambda row: (schemes.index(row.scheme), *_place(row)))
    return [
        dataclasses.replace(
            row,
            number=number,
            pareto=is_optimal(row, rows),
            gain=None if row.method == baseline else _gain(base.get(row.scheme), row.kl_mean),
        )
        for number, row in enumerate(ordered, 1)
    ]


def is_optimal(row: Row, rows: Sequence[Row]) -> bool:
    """Return whether no other row has as few bits and as small a KL, and less of one of them."""
    mine = _point(row)
    if mine is None:
        return False
    others = [point for other in rows if (point := _point(other)) is not None]
    return not any(bits <= mine[0] and kl <= mine[1] and (bits, kl) != mine for bits, kl in others)


def _point(row: Row) -> tuple[float, float] | None:
    """Return (bits per weight, KL), None for a row that has none or one that is no number."""
    if row.bits_per_weight is None or row.kl_mean is None or math.isnan(row.kl_mean):
        return None
    return row.bits_per_weight, row.kl_mean


def _place(row: Row) -> tuple[int, float]:
    """Return what rows of a scheme are sorted by: what has no KL comes last."""
    point = _point(row)
    if point is None:
        return (2 if row.status == FAILED else 1, 0.0)
    return (0, point[1])


def _gain(base: float | None, kl: float | None) -> float | None:
    if base is None or kl is None:
        return None
    if kl <= 0:  # an exact copy, up to the rounding of its logits
        return 1.0 if base <= 0 else math.inf
    return base / kl


def badness(ratio: float) -> float:
    """Return a certificate's ratio; NaN, which never holds, is the worst."""
    return math.inf if math.isnan(ratio) else ratio


def number(value: Any) -> float:
    """Return a number that may have been stored as a word: "nan", "inf"."""
    return float(value)


def csv_text(rows: Sequence[Row]) -> str:
    """Return one line per cell, with a header."""
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(words_for_infinities(dataclasses.asdict(row)) for row in rows)
    return stream.getvalue()
