"""Reports as tables for a terminal. Functions return what rich can print; nothing is printed here.

Tables fit in 100 columns. A number that deserves attention is marked in words or with a sign as
well as in colour, as colours do not reach a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qframe import strict
from qframe.memory import FormatMemory, readable_bytes
from qframe.report.layers import Coverage, LayerReport, RunReport

MANY_LAYERS = 20  # more than these are summed up by kind, and the worst are shown
WORST = 10
NAMES_SHOWN = 5  # of layers, in a sentence
NAME_WIDTH = 12  # of a first column, at least

GOOD, BAD, WARN, FAINT = "green", "bold red", "yellow", "dim"
HARM = "!"  # marks a layer that is worse than round-to-nearest on held-out tokens


def table(*columns: str, names: int = 1) -> Table:
    """Return an empty table; the first `names` columns hold words, the others numbers."""
    made = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for number, column in enumerate(columns):
        if number < names:
            made.add_column(column, overflow="fold", min_width=NAME_WIDTH if number == 0 else None)
        else:
            made.add_column(column, justify="right", no_wrap=True)
    return made


def titled(title: str, content: RenderableType) -> RenderableType:
    """Return a title with something below it. A table's own title would wrap at its width."""
    return Group(Text(title, style="bold"), content)


def facts(lines: Mapping[str, str]) -> Table:
    """Return lines of text, each after a word that says what it is about."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for what, text in lines.items():
        made.add_row(what, text)
    return made


def stacked(*parts: RenderableType | None) -> RenderableType:
    """Return parts under one another with an empty line between them; None is left out."""
    shown = [part for part in parts if part is not None]
    return Group(*[item for part in shown for item in (part, Text())][:-1])


# Numbers ----------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """Return a share as percent, three figures.

    >>> [percent(x) for x in (0.123456, 0.00123456, 0.0, None)]
    ['12.3', '0.123', '0', '']
    """
    if value is None:
        return ""
    return figures(100 * value)


def figures(value: float | None, count: int = 3) -> str:
    """Return a number with so many figures, in scientific notation where it is small or huge.

    >>> [figures(x) for x in (1234.5, 12.345, 0.0123, 0.000123, 7.5e13, math.inf)]
    ['1234', '12.3', '0.0123', '1.2e-04', '7.5e+13', 'inf']
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -2 or exponent > 6:
        return f"{value:.1e}"
    return f"{value:.{max(0, count - 1 - exponent)}f}"


def times(value: float | None) -> Text:
    """Return a gain, "1.83x"; below 1 it is harm and marked."""
    if value is None:
        return Text()
    text = f"{value:.2f}x" if math.isfinite(value) else "exact"
    if value < 1:
        return Text(f"{HARM} {text}", style=BAD)
    return Text(text, style=GOOD if value > 1 else "")


def some(names: Sequence[str], shown: int = NAMES_SHOWN) -> str:
    """Return names in a sentence: "a, b and 3 more"."""
    return strict.some(names, shown)


# What a run did ---------------------------------------------------------------------------------


def run_summary(report: RunReport, *, all_layers: bool = False) -> RenderableType:
    """Return the layers, the marks explained, and the events of a run."""
    parts: list[RenderableType | None] = []
    if all_layers or len(report.layers) <= MANY_LAYERS:
        parts.append(layer_table(report.layers))
    else:
        worst = sorted(report.layers, key=_badness, reverse=True)[:WORST]
        by = "error on held-out tokens" if _held_out(report.layers) else "error"
        by = by if _measured(report.layers) else "SQNR"
        parts += [
            titled(
                f"{len(report.layers)} layers by kind (medians; seconds are sums)",
                kind_table(report.layers),
            ),
            titled(f"the {len(worst)} worst layers, by {by}", layer_table(worst)),
        ]
    if _measured(report.layers):
        parts.append(Text(_legend(report.layers), style=FAINT))
    parts += [harm(report.layers), event_table(report)]
    return stacked(*parts)


def layer_table(layers: Sequence[LayerReport]) -> Table:
    """Return one row per layer; errors in percent of the layer's output."""
    columns = _columns(layers)
    made = table("layer", *columns)
    for layer in layers:
        made.add_row(layer.name, *(show(layer) for show in columns.values()))
    return made


def kind_table(layers: Sequence[LayerReport]) -> Table:
    """Return one row per kind of layer, which is the last part of its name; medians of each."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    columns: dict[str, Callable[[Sequence[LayerReport]], str | Text]] = {}
    columns["layers"] = lambda kind: str(len(kind))
    if _measured(layers):
        columns["error %"] = lambda kind: percent(_median(m.error for m in kind))
        columns["RTN's"] = lambda kind: percent(_median(m.rtn_error for m in kind))
        if _held_out(layers):
            columns["held out %"] = lambda kind: percent(_median(m.held_out_error for m in kind))
            columns["RTN's "] = lambda kind: percent(_median(m.rtn_held_out_error for m in kind))
        columns["gain"] = lambda kind: times(_median(map(_gain, kind)))
        columns["least gain"] = lambda kind: times(
            min((g for g in map(_gain, kind) if g is not None), default=None)
        )
    columns["SQNR dB"] = lambda kind: f"{median(m.sqnr_db for m in kind):.1f}"
    columns["seconds"] = lambda kind: f"{sum(_seconds(m) for m in kind):.1f}"
    made = table("kind", *columns)
    for kind, members in kinds.items():
        made.add_row(kind, *(show(members) for show in columns.values()))
    return made


def harm(layers: Sequence[LayerReport]) -> Text | None:
    """Return a warning that names the layers worse than RTN on held-out tokens, or None."""
    harmed = [m.name for m in layers if m.held_out_gain is not None and m.held_out_gain < 1]
    if not harmed:
        return None
    return Text.assemble(
        (f"{HARM} {len(harmed)} of {len(layers)} layers are worse than round-to-nearest ", BAD),
        f"on held-out tokens: {some(harmed)}",
    )


def event_table(report: RunReport) -> RenderableType | None:
    """Return what happened, by kind, with the names of the layers, or None when nothing did."""
    if not report.events:
        return None
    kinds: dict[str, list[tuple[str, str]]] = {}
    for event in report.events:
        kinds.setdefault(event.kind, []).append((event.layer, event.message))
    made = table("event", "count", "layers, and what was said of the first", names=3)
    for kind, found in kinds.items():
        names = some([name for name, _ in found])
        style = BAD if kind == "fallback" else "yellow"
        made.add_row(Text(kind, style=style), str(len(found)), f"{names}\n{found[0][1]}")
    return titled("events", made)


def coverage_text(coverage: Coverage) -> str:
    """Return the coverage line, with the names of what was left when they are few."""
    names = f" ({', '.join(coverage.left)})" if 0 < len(coverage.left) <= NAMES_SHOWN else ""
    return coverage.line() + names


def _columns(layers: Sequence[LayerReport]) -> dict[str, Callable[[LayerReport], str | Text]]:
    """Return the columns of the layer table, without those that nothing was measured for."""
    columns: dict[str, Callable[[LayerReport], str | Text]] = {}
    if _measured(layers):
        columns["error %"] = lambda m: percent(m.error)
        columns["RTN's"] = lambda m: percent(m.rtn_error)
        if _held_out(layers):
            columns["held out %"] = lambda m: percent(m.held_out_error)
            columns["RTN's "] = lambda m: percent(m.rtn_held_out_error)
        columns["gain"] = lambda m: times(_gain(m))
        if _drifted(layers):
            columns["moved %"] = lambda m: percent(m.drift)
    else:
        columns["shape"] = lambda m: f"{m.rows} x {m.columns}"
        columns["bits/weight"] = lambda m: f"{m.bits_per_weight:.3f}"
    columns["SQNR dB"] = lambda m: f"{m.sqnr_db:.1f}"
    if len({m.info.get("damp") for m in layers}) > 1:  # else it is what was asked for
        columns["damp"] = lambda m: _plain(m.info.get("damp", ""))
    if any("error" in m.inputs for m in layers):
        columns["inputs %"] = lambda m: percent(_number(m.inputs.get("error")))
    if any("kept_share" in m.inputs for m in layers):
        columns["kept %"] = lambda m: percent(_number(m.inputs.get("kept_share", 0.0)))
    if any("alpha" in m.inputs for m in layers):
        columns["alpha"] = lambda m: _plain(m.inputs.get("alpha", ""))
    if len({m.tokens for m in layers}) > 1:  # else the legend says how many
        columns["tokens"] = lambda m: str(m.tokens)
    columns["s"] = lambda m: f"{_seconds(m):.2f}"
    return columns


def _legend(layers: Sequence[LayerReport]) -> str:
    more = ""
    if _drifted(layers):
        more += (
            " Y are the layer's inputs in the original network; moved %: by how much its outputs "
            "differ from those that it would have with them, ||(Y-X)W|| / ||XW||."
        )
    if any("error" in layer.inputs for layer in layers):
        more += " Inputs %: what rounding the inputs alone loses, weights as they are stored."
    if any("kept_share" in layer.inputs for layer in layers):
        more += " Kept %: columns whose weights and inputs stay in 16 bits."
    return _errors_legend(layers) + more


def _errors_legend(layers: Sequence[LayerReport]) -> str:
    tokens = f"{max(m.tokens for m in layers):,}"
    what = "||YW-XQ||" if _drifted(layers) else "||X(W-Q)||"
    text = f"Errors are {what} / ||XW|| of a layer's output, on the {tokens} calibration tokens"
    rtn = "beside round-to-nearest's (RTN) on the same"
    if not _held_out(layers):
        return (
            f"{text}, {rtn}; gain is RTN's error over the method's. No tokens were held out, so "
            f"nothing tells how it does on others."
        )
    held_out = f"{max(m.tokens_held_out for m in layers):,}"
    return (
        f"{text} and on {held_out} held-out ones, {rtn}; gain is RTN's held-out error over the "
        f"method's, and below 1 it is marked {HARM}."
    )


def _drifted(layers: Iterable[LayerReport]) -> bool:
    return any(layer.drift is not None for layer in layers)


def _held_out(layers: Iterable[LayerReport]) -> bool:
    return any(layer.held_out_error is not None for layer in layers)


def _gain(layer: LayerReport) -> float | None:
    return layer.gain if layer.held_out_gain is None else layer.held_out_gain


def _number(value: float | int | str | None) -> float | None:
    return None if value is None else float(value)


def _plain(value: float | int | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _measured(layers: Iterable[LayerReport]) -> bool:
    return any(layer.error is not None for layer in layers)


def _badness(layer: LayerReport) -> tuple[float, float]:
    """Return what layers are ranked by: held-out error, else error, else lack of SQNR."""
    error = layer.error if layer.held_out_error is None else layer.held_out_error
    return (0.0 if error is None else error, -layer.sqnr_db)


def _seconds(layer: LayerReport) -> float:
    return sum(layer.seconds.values())


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


# What a run would do ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One matrix of a network: what is done with it, or why nothing is.

    bits_per_weight   None for one that is left as it is
    most              of bits per weight, where they have not been chosen yet
    """

    name: str
    shape: tuple[int, ...]
    what: str
    bits_per_weight: float | None = None
    most: float | None = None


def plan_table(rows: Sequence[PlanRow], *, collapse: bool = True) -> Table:
    """Return the plan, a row for each matrix.

    collapse   put matrices that differ only in the number of their block into one row
    """
    made = table("layer", "shape", "scheme, or why it is left", "bits", names=3)
    for row in collapsed(rows) if collapse else rows:
        extents = " x ".join(str(extent) for extent in row.shape)
        if row.bits_per_weight is None:
            made.add_row(row.name, extents, Text(f"left: {row.what}", style=FAINT), "")
        else:
            most = "" if row.most is None else f"-{row.most:.3f}"
            made.add_row(row.name, extents, row.what, f"{row.bits_per_weight:.3f}{most}")
    return made


def collapsed(rows: Sequence[PlanRow]) -> list[PlanRow]:
    """Return the rows with those that differ only in numbers in their names made one."""
    members: dict[PlanRow, list[str]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", row.name)
        members.setdefault(replace(row, name=pattern), []).append(row.name)
    return [replace(row, name=_common_name(names)) for row, names in members.items()]


def _common_name(names: Sequence[str]) -> str:
    """Return one name for many: the numbers in which they differ become ranges.

    >>> _common_name(["layers.0.up", "layers.1.up", "layers.2.up", "layers.5.up"])
    'layers.{0..2,5}.up'
    """
    parts = []
    for column in zip(*(name.split(".") for name in names), strict=True):
        values = sorted({int(value) for value in column}) if column[0].isdigit() else []
        parts.append(f"{{{_ranges(values)}}}" if len(values) > 1 else column[0])
    return ".".join(parts)


def _ranges(values: Sequence[int]) -> str:
    """Return sorted numbers with runs shortened: 0..2,5."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


# Memory -----------------------------------------------------------------------------------------


def memory_table(formats: Sequence[FormatMemory]) -> Table:
    """Return the bytes of weights in each format, and with scales and zero points."""
    granularities = list(dict.fromkeys(g for memory in formats for g in memory.scales))
    made = table(
        "format",
        "weights",
        *(f"+ scales\n{g}" for g in granularities),
        *(f"+ zero points\n{g}" for g in granularities),
    )
    for memory in formats:
        cells = [readable_bytes(memory.weights)]
        for symmetric in (True, False):
            cells += [
                readable_bytes(memory.total(g, symmetric=symmetric)) if g in memory.scales else ""
                for g in granularities
            ]
        made.add_row(memory.format, *cells)
    return made


# Scores -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One network of an evaluation; None where there is nothing to say.

    kl_mean, kl_p99   nats
    gain              KL of round-to-nearest over KL of this method, both with the same bits
    kv_cache          bytes of the KV cache over those of one in 16 bits, `KVMemory.ratio`
    """

    name: str
    perplexity: float
    perplexity_stderr: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    bits_per_weight: float | None = None
    weights_bytes: float | None = None
    folder_bytes: float | None = None
    gain: float | None = None
    kv_cache: float | None = None


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """Return a row for each network; columns that no row has a value for are left out."""
    columns: dict[str, Callable[[ScoreRow], str | Text]] = {
        "perplexity": lambda r: f"{figures(r.perplexity, 5)} ± {figures(r.perplexity_stderr)}",
        "KL mean": lambda r: figures(r.kl_mean),
        "KL p99": lambda r: figures(r.kl_p99),
        "top-1 %": lambda r: "" if r.top1 is None else f"{100 * r.top1:.1f}",
        "gain": lambda r: times(r.gain),
        "KV %": lambda r: percent(r.kv_cache),
        "bits": lambda r: "" if r.bits_per_weight is None else f"{r.bits_per_weight:.2f}",
        "weights": lambda r: "" if r.weights_bytes is None else readable_bytes(r.weights_bytes),
        "folder": lambda r: "" if r.folder_bytes is None else readable_bytes(r.folder_bytes),
    }
    shown = {name: cell for name, cell in columns.items() if any(str(cell(r)) for r in rows)}
    made = table("network", *shown)
    for row in rows:
        made.add_row(row.name, *(cell(row) for cell in shown.values()))
    return made


# Plugins and findings ---------------------------------------------------------------------------


def plugin_table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Return a row for each plugin: name, source, status, provides (and error)."""
    made = table("plugin", "source", "status", "provides", names=4)
    styles = {"loaded": GOOD, "failed": BAD, "disabled": FAINT}
    for row in rows:
        what = Text(row["error"], style=BAD) if row["error"] else Text(row["provides"])
        status = Text(row["status"], style=styles.get(row["status"], ""))
        made.add_row(row["name"], row["source"], status, what)
    return made


def finding_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Return a row for each (what, value, next step); a next step marks a problem."""
    made = table("", "", names=2)
    made.show_header = False
    for what, value, step in rows:
        text = Text(value)
        if step:
            text = Text.assemble((value, BAD), "\n", ("-> ", "bold"), step)
        made.add_row(what, text)
    return made
