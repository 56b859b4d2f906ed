"""Pictures for a page, as inline SVG without a library: points, heat maps, histograms.

Colours and fonts are classes of the page's style sheet, so that a picture follows dark mode. What a
colour says is also said by a shape, a place or a title. Everything that comes from outside goes
through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

STEPS = 9  # of a colour scale: the classes h0 to h8
SHAPES = 8  # of points, and as many colours: the classes m0 to m7
_LINE = 15.0  # between two labels
_CHARACTER = 7.0  # about as wide as one of a label
_LABEL = 24  # characters of a label in a heat map; a title has all of it


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point: where it is, what is written beside it, its title, its shape and colour."""

    x: float
    y: float
    label: str
    title: str
    kind: int
    marked: bool


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A field of a heat map; None is one that nothing is known of."""

    value: float | None
    title: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A logarithmic colour scale; 0 and less have a class of their own, z."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Scale:
        """Return the scale that the positive ones of some values need."""
        known = [v for v in values if v is not None and 0 < v < math.inf]
        return cls(low=min(known, default=1.0), high=max(known, default=1.0))

    def css_class(self, value: float | None) -> str:
        """Return the class of a value."""
        if value is None or math.isnan(value):
            return "na"
        if value <= 0:
            return "z"
        if self.high <= self.low:
            return f"h{STEPS // 2}"
        share = (
            math.log(value / self.low) / math.log(self.high / self.low) if value < math.inf else 1
        )
        return f"h{min(STEPS - 1, max(0, int(share * STEPS)))}"

    def edges(self) -> list[float]:
        """Return the values between the colours, both ends included."""
        return [self.low * (self.high / self.low) ** (i / STEPS) for i in range(STEPS + 1)]


def join(parts: Sequence[Markup]) -> Markup:
    """Return parts one after another."""
    return Markup("\n").join(parts)


# Points -------------------------------------------------------------------------------------------


def scatter(
    points: Sequence[Point], *, width: int, height: int, x_title: str, y_title: str, name: str
) -> Markup:
    """Return points over a linear x and a logarithmic y, the marked ones joined by a step line.

    Where y is not positive the point lies on the lower edge; its title has the number.
    """
    left, right, top, bottom = 58.0, 14.0, 26.0, 44.0
    positive = [p.y for p in points if 0 < p.y < math.inf]
    low, high = _wider(min(positive, default=1e-3), max(positive, default=1.0))
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    margin = max(0.08 * (x_high - x_low), 0.05)
    x_low, x_high = x_low - margin, x_high + margin

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        share = math.log(min(max(y, low), high) / low) / math.log(high / low)
        return height - bottom - share * (height - top - bottom)

    parts = []
    for y in _log_ticks(low, high):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                   '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                left, width - right, _n(left - 7), _n(at_y(y) + 4), f"{y:g}", y=_n(at_y(y))
            )
        )  # fmt: skip
    for x in _ticks(x_low, x_high, 4 if width < 500 else 7):
        parts.append(
            Markup('<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/>'
                   '<text class="tick" x="{x}" y="{}" text-anchor="middle">{}</text>').format(
                top, _n(height - bottom), _n(height - bottom + 17), f"{x:g}", x=_n(at_x(x))
            )
        )  # fmt: skip
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>'
               '<text class="axis" x="4" y="14">{}</text>').format(
            _n((left + width - right) / 2), height - 6, x_title, y_title
        )
    )  # fmt: skip
    best = sorted({(p.x, p.y) for p in points if p.marked})
    if len(best) > 1:
        path = f"M{_n(at_x(best[0][0]))} {_n(at_y(best[0][1]))}"
        path += "".join(f"H{_n(at_x(x))}V{_n(at_y(y))}" for x, y in best[1:])
        parts.append(Markup('<path class="front" d="{}"/>').format(path))
    places = [(at_x(p.x), at_y(p.y)) for p in points]
    labels = _labels(points, places, width, height - bottom)
    for point, (x, y), (label_x, label_y, anchor) in zip(points, places, labels, strict=True):
        moved = abs(label_y - 4 - y) > _LINE
        line = Markup('<line class="lead" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            _n(x), _n(y), _n(label_x - (3 if anchor == "start" else -3)), _n(label_y - 4)
        )
        parts.append(
            Markup('{}<g class="point m{}{}" tabindex="0" role="img" aria-label="{title}">'
                   '<title>{title}</title>{}{}'
                   '<text class="label" x="{}" y="{}" text-anchor="{}">{}</text></g>').format(
                line if moved else "", point.kind % SHAPES, " best" if point.marked else "",
                Markup('<circle class="ring" cx="{}" cy="{}" r="10"/>').format(_n(x), _n(y))
                if point.marked else "",
                shape(point.kind, x, y), _n(label_x), _n(label_y), anchor, point.label,
                title=point.title,
            )
        )  # fmt: skip
    return _svg(width, height, name, join(parts), role="group")


def shape(kind: int, x: float, y: float, size: float = 5.5) -> Markup:
    """Return one of SHAPES shapes around a place."""
    outlines = (
        None,
        [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        [(0, -1.15), (1.1, 0.8), (-1.1, 0.8)],
        [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        [(0, 1.15), (1.1, -0.8), (-1.1, -0.8)],
        [(-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4),
         (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)],
        [(0, -1.15), (1, -0.57), (1, 0.57), (0, 1.15), (-1, 0.57), (-1, -0.57)],
        [(0, -1.3), (0.35, -0.35), (1.3, 0), (0.35, 0.35), (0, 1.3), (-0.35, 0.35), (-1.3, 0),
         (-0.35, -0.35)],
    )  # fmt: skip
    outline = outlines[kind % SHAPES]
    if outline is None:
        return Markup('<circle class="dot" cx="{}" cy="{}" r="{}"/>').format(_n(x), _n(y), size)
    corners = " ".join(f"{_n(x + size * a)},{_n(y + size * b)}" for a, b in outline)
    return Markup('<polygon class="dot" points="{}"/>').format(corners)


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], width: float, floor: float
) -> list[tuple[float, float, str]]:
    """Return (x, y, anchor) of each label: beside its point, moved until none covers another."""
    placed: dict[int, tuple[float, float, str]] = {}
    boxes: list[tuple[float, float, float]] = []  # left, right, y of what is written already
    for i in sorted(range(len(points)), key=lambda i: places[i][1]):
        x, y = places[i]
        long = _CHARACTER * len(points[i].label)
        anchor = "start" if x + 14 + long < width else "end"
        begin = x + 14 if anchor == "start" else x - 14
        left = begin if anchor == "start" else begin - long
        wanted = y - 5 if points[i].marked else y + 4  # the line between marked ones runs there
        taken = [b for b in boxes if b[0] < left + long and left < b[1]]
        tries = sorted(
            (wanted + _LINE / 3 * k for k in range(-60, 61)), key=lambda t: abs(t - wanted)
        )
        free = (
            t
            for t in tries
            if 12 < t < floor and all(abs(t - other) >= _LINE for _, _, other in taken)
        )
        at = next(free, wanted)
        boxes.append((left, left + long, at))
        placed[i] = (begin, at, anchor)
    return [placed[i] for i in range(len(points))]


# Heat maps ----------------------------------------------------------------------------------------


def heat(
    rows: Sequence[tuple[str, Sequence[Tile]]], scale: Scale, *, name: str, first: int = 0
) -> Markup:
    """Return a field of tiles, a row for each label.

    first   the number of the first column, for the axis below
    """
    columns = max((len(tiles) for _, tiles in rows), default=0)
    label = 9 + 6.3 * min(_LABEL, max((len(text) for text, _ in rows), default=0))
    width, tall, bottom = 360.0, 17.0, 18.0
    wide = (width - label - 2) / max(columns, 1)
    parts = []
    for i, (text, tiles) in enumerate(rows):
        y = tall * i
        parts.append(
            Markup('<text class="row" x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>')
            .format(_n(label - 5), _n(y + 11.5), _short(text), text)
        )  # fmt: skip
        for j, tile in enumerate(tiles):
            parts.append(
                Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}">'
                       '<title>{}</title></rect>').format(
                    scale.css_class(tile.value), _n(label + wide * j), _n(y),
                    _n(max(wide - (1 if wide > 4 else 0.25), 0.5)), _n(tall - 1.5), tile.title,
                )
            )  # fmt: skip
    step = max(1, round(columns / 6))
    for j in range(0, columns, step):
        parts.append(
            Markup('<text class="tick small" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _n(label + wide * (j + 0.5)), _n(tall * len(rows) + 12), first + j
            )
        )
    return _svg(width, tall * len(rows) + bottom, name, join(parts))


# Histograms ---------------------------------------------------------------------------------------


def histogram(counts: Sequence[int], *, width: float, sigmas: float, name: str) -> Markup:
    """Return bars of the logarithm of counts, over values that lie at sinh(k * width) sigma."""
    wide, tall, top, bottom = 360.0, 128.0, 8.0, 20.0
    half = len(counts) // 2
    total = max(sum(counts), 1)
    used = [k for k in range(-half, half + 1) if counts[k + half]]
    reach = max([abs(k) for k in used] + [round(math.asinh(sigmas) / width) + 3])
    floor = math.floor(math.log10(1 / total))

    def at(k: float) -> float:
        return 36 + (k + reach + 0.5) / (2 * reach + 1) * (wide - 42)

    parts = []
    for power in range(0, floor - 1, -2):
        y = top + (tall - top - bottom) * power / floor if floor else top
        parts.append(
            Markup('<line class="grid" x1="36" x2="{}" y1="{y}" y2="{y}"/>'
                   '<text class="tick small" x="32" y="{}" text-anchor="end">{}</text>').format(
                wide - 6, _n(y + 3), "1" if power == 0 else f"1e{power}", y=_n(y)
            )
        )  # fmt: skip
    each = at(1) - at(0)
    for k in used:
        count = counts[k + half]
        size = (tall - top - bottom) * (1 - math.log10(count / total) / (floor - 0.3))
        outside = math.sinh((abs(k) - 0.5) * width) > sigmas
        low, high = math.sinh((k - 0.5) * width), math.sinh((k + 0.5) * width)
        title = f"{count:,} values ({count / total:.3g} of all) from {low:.3g} to {high:.3g} sigma"
        parts.append(
            Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
            .format("bar out" if outside else "bar", _n(at(k - 0.5) + 0.4),
                    _n(tall - bottom - size), _n(max(each - 0.8, 0.6)), _n(size), title)
        )  # fmt: skip
    for z in (-1000, -100, -sigmas, 0, sigmas, 100, 1000):
        place = math.asinh(z) / width
        if abs(place) > reach:
            continue
        marked = abs(z) == sigmas
        parts.append(
            Markup('{}<text class="tick small" x="{}" y="{}" text-anchor="middle">{}</text>')
            .format(
                Markup('<line class="limit" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
                    top, _n(tall - bottom), x=_n(at(place))
                ) if marked else "",
                _n(at(place)), _n(tall - 6), f"{z:g}\N{GREEK SMALL LETTER SIGMA}" if z else "0",
            )
        )  # fmt: skip
    return _svg(wide, tall, name, join(parts))


# Parts --------------------------------------------------------------------------------------------


def _svg(width: float, height: float, name: str, content: Markup, role: str = "img") -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="{}" aria-label="{}" preserveAspectRatio="xMinYMin meet">'
        "{}</svg>"
    ).format(_n(width), _n(height), role, name, content)


def _n(value: float) -> str:
    """Return a coordinate: two digits are finer than any screen, and the same everywhere."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def _wider(low: float, high: float) -> tuple[float, float]:
    """Return ends of a logarithmic axis with some air, and more than nothing between them."""
    share = max((high / low) ** 0.12, 1.3)
    return low / share, high * share


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values: powers of ten, with 2 and 5 between them where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [v for p in powers for f in factors if low <= (v := float(f"{f}e{p}")) <= high]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most so many round values."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * f for f in (1, 2, 5, 10, 20) if (high - low) / (power * f) <= most)
    first = math.ceil(low / step)
    return [round(k * step, 9) for k in range(first, math.floor(high / step) + 1)]
