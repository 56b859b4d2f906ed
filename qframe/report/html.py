"""A comparison as one HTML page: no script, no font, no picture and no address from elsewhere.

The page depends on the store alone: the same entries give the same bytes. Everything is escaped,
and a policy in the page forbids a browser to load or to run anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qframe.comparison.distributions import BIN, MAGNITUDE, SIGMAS
from qframe.comparison.leaderboard import DONE, Row, number
from qframe.comparison.matrix import Comparison
from qframe.memory import readable_bytes
from qframe.report import pictures
from qframe.report.leaderboard import certificates_text
from qframe.report.pictures import Point, Scale, Tile
from qframe.report.table import figures, percent

TEMPLATES = Path(__file__).parent / "templates"
WORST = 36  # rows of the table of worst layers, shared among the cells
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def page(found: Comparison) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "figures": _figures,
        "percent": lambda value: percent(_known(value)),
        "bytes": lambda value: "" if value is None else readable_bytes(value),
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    layers = _layers(found)
    return environment.get_template("report.html.jinja").render(
        found=found,
        rows=found.rows,
        done=[row for row in found.rows if row.status == DONE],
        failed=[row for row in found.rows if row.status != DONE],
        certificates=certificates_text,
        methods=list(dict.fromkeys(row.method for row in found.rows)),
        shape=lambda kind: pictures.shape(kind, 8, 8),
        plots=_plots(found),
        unplotted=[row for row in found.rows if row.status == DONE and _point(row, [], "") is None],
        heat=_heat(found, layers),
        worst=_worst(found),
        distributions=_distributions(found),
        machines=_machines(found),
        recipes=_recipes(found),
        sigmas=SIGMAS,
        magnitude=MAGNITUDE,
    )


# Points -------------------------------------------------------------------------------------------


def _plots(found: Comparison) -> list[tuple[str, Any]]:
    """Return (class, picture): one for a wide screen, one for a narrow one; none without points."""
    methods = list(dict.fromkeys(row.method for row in found.rows))
    made = []
    for css, width, height in (("wide", 880, 440), ("narrow", 360, 380)):
        labels = [row.label if css == "wide" else str(row.number) for row in found.rows]
        points = [
            point
            for row, label in zip(found.rows, labels, strict=True)
            if (point := _point(row, methods, label)) is not None
        ]
        if points:
            picture = pictures.scatter(
                points,
                width=width,
                height=height,
                x_title="bits per weight",
                y_title="mean KL, nats (log)",
                name="KL against bits per weight; the leaderboard has the same numbers",
            )
            made.append((css, picture))
    return made


def _point(row: Row, methods: Sequence[str], label: str) -> Point | None:
    if row.kl_mean is None or row.bits_per_weight is None or row.kl_mean != row.kl_mean:
        return None
    return Point(
        x=row.bits_per_weight,
        y=row.kl_mean,
        label=label,
        title=f"{row.number}. {row.label}: mean KL {figures(row.kl_mean)} nats, "
        f"{row.bits_per_weight:.3f} bits per weight{', Pareto-optimal' if row.pareto else ''}",
        kind=methods.index(row.method) if methods else 0,
        marked=row.pareto,
    )


# Layers -------------------------------------------------------------------------------------------


def _layers(found: Comparison) -> dict[str, list[str]]:
    """Return kind -> the layers of it, over all cells and distributions, in the network's order."""
    names = [
        layer["name"]
        for content in found.contents
        if content["status"] == DONE
        for layer in content["report"]["layers"]
    ]
    names += list(found.distributions["layers"]) if found.distributions else []
    return _by_kind(dict.fromkeys(names))


def _by_kind(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return kind -> names: those that differ in the number of their block alone are of a kind."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        pattern = _NUMBER.sub("#", name)
        patterns.setdefault(pattern if pattern != name else "outside all blocks", []).append(name)
    short = [pattern.rpartition("#.")[2] for pattern in patterns]
    return {
        (s if short.count(s) == 1 else pattern): members
        for s, (pattern, members) in zip(short, patterns.items(), strict=True)
    }


def _error(layer: Mapping[str, Any] | None, prefix: str = "") -> float | None:
    """Return a layer's error on held-out tokens, on calibration tokens where none were held out."""
    if layer is None:
        return None
    value = layer[f"{prefix}held_out_error"]
    value = layer[f"{prefix}error"] if value is None else value
    return None if value is None else number(value)


def _heat(found: Comparison, kinds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the pictures of errors by kind, their scale, and the same as a table."""
    cells = [
        (row, {layer["name"]: layer for layer in content["report"]["layers"]})
        for row, content in zip(found.rows, found.contents, strict=True)
        if row.status == DONE
    ]
    every = [_error(layer) for _, layers in cells for layer in layers.values()]
    scale = Scale.of(every)
    pictured = []
    for kind, names in kinds.items():
        rows = [
            (row.label, [_tile(row, name, layers.get(name)) for name in names])
            for row, layers in cells
        ]
        if rows:
            name = f"errors of {kind} by method and block; the table below has the numbers"
            pictured.append((kind, pictures.heat(rows, scale, name=name)))
    return {
        "pictures": pictured,
        "scale": scale,
        "measured": any(value is not None for value in every),
        "cells": [row for row, _ in cells],
        "table": [
            (name, [_error(layers.get(name)) for _, layers in cells])
            for names in kinds.values()
            for name in names
        ],
    }


def _tile(row: Row, name: str, layer: Mapping[str, Any] | None) -> Tile:
    error, rtn = _error(layer), _error(layer, "rtn_")
    if layer is None:
        return Tile(value=None, title=f"{name}, {row.label}: not quantized")
    if error is None:
        return Tile(value=None, title=f"{name}, {row.label}: not measured")
    said = f"{name}, {row.label}: error {percent(error)} %"
    return Tile(value=error, title=said + (f", RTN's {percent(rtn)} %" if rtn is not None else ""))


def _worst(found: Comparison) -> list[dict[str, Any]]:
    """Return the worst layers of each cell, by error."""
    done = [
        (row, content["report"]["layers"])
        for row, content in zip(found.rows, found.contents, strict=True)
        if row.status == DONE
    ]
    each = max(1, WORST // max(len(done), 1))
    made = []
    for row, layers in done:
        ordered = sorted(layers, key=lambda m: (-(_error(m) or 0.0), number(m["sqnr_db"])))
        for layer in ordered[:each]:
            ratios = [(number(c["ratio"]), c) for c in layer["certificates"]]
            closest = max(
                ratios, key=lambda r: r[0] if r[0] == r[0] else float("inf"), default=None
            )
            made.append(
                {
                    "row": row,
                    "name": layer["name"],
                    "error": _error(layer),
                    "rtn": _error(layer, "rtn_"),
                    "gain": layer["held_out_gain"] or layer["gain"],
                    "sqnr": number(layer["sqnr_db"]),
                    "certificates": len(ratios),
                    "certificate": closest[1] if closest else None,
                    "holds": closest is None or closest[0] <= 1,
                    "method": layer["method"],
                }
            )
    return made


# Distributions ------------------------------------------------------------------------------------


def _distributions(found: Comparison) -> dict[str, Any] | None:
    """Return histograms by kind, outlier shares as heat maps and as a table."""
    if found.distributions is None:
        return None
    layers = found.distributions["layers"]
    kinds = _by_kind(layers)
    made = []
    for kind, names in kinds.items():
        parts = []
        for what in ("weight", "input"):
            known = [layers[n][what] for n in names if layers[n][what] is not None]
            if not known:
                continue
            counts = [sum(column) for column in zip(*(k["counts"] for k in known), strict=True)]
            total = sum(counts)
            outliers = sum(k["outliers"] * sum(k["counts"]) for k in known) / max(total, 1)
            name = f"distribution of the {what}s of {kind}"
            parts.append(
                {
                    "what": f"{what}s",
                    "picture": pictures.histogram(counts, width=BIN, sigmas=SIGMAS, name=name),
                    "outliers": outliers,
                    "largest": max(_in_sigmas(k) for k in known),
                    "columns": max(k["columns"] for k in known) if what == "input" else None,
                }
            )
        made.append({"kind": kind, "parts": parts})
    shares = {
        what: {n: (r["outliers"] if (r := layer[what]) else None) for n, layer in layers.items()}
        for what in ("input", "weight")
    }
    scale = Scale.of([v for values in shares.values() for v in values.values()])
    maps = []
    for what, values in shares.items():
        rows = [
            (
                kind,
                [Tile(value=values[n], title=_share_title(n, what, values[n])) for n in names],
            )
            for kind, names in kinds.items()
        ]
        name = f"share of {what} outliers by kind and block; the table below has the numbers"
        maps.append((f"{what}s", pictures.heat(rows, scale, name=name)))
    return {
        "tokens": found.distributions["tokens"],
        "kinds": made,
        "maps": maps,
        "scale": scale,
        "layers": layers,
        "largest": {
            n: {w: _in_sigmas(m[w]) if m[w] else None for w in m} for n, m in layers.items()
        },
    }


def _in_sigmas(record: Mapping[str, Any]) -> float:
    """Return the largest magnitude in standard deviations."""
    return float(record["absmax"] / record["sigma"]) if record["sigma"] else 0.0


def _share_title(name: str, what: str, value: float | None) -> str:
    if value is None:
        return f"{name}: no token reached it"
    return f"{name}: {percent(value)} % of its {what}s lie beyond {SIGMAS:g} sigma"


# Protocol -----------------------------------------------------------------------------------------


def _machines(found: Comparison) -> list[dict[str, str]]:
    """Return every machine that made a cell, once."""
    made: list[dict[str, str]] = []
    for content in found.contents:
        machine = content.get("measured", {}).get("machine")
        if machine is not None and machine not in made:
            made.append(machine)
    return made


def _recipes(found: Comparison) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (label, recipe) of every cell."""
    return [(row.label, recipe) for row, recipe in zip(found.rows, found.recipes, strict=True)]


def _figures(value: Any, count: int = 3) -> str:
    return figures(_known(value), count)


def _known(value: Any) -> float | None:
    return None if value is None else number(value)
