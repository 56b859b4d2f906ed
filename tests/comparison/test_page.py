"""report.html: one file that asks for nothing, shows everything, and lets nothing in."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from qframe.comparison import matrix
from qframe.report.html import page
from qframe.report.pictures import Point, Scale, Tile, heat, histogram, scatter

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&{{ 7*7 }}"


class Reader(HTMLParser):
    """Reads a page strictly: every tag is closed, in the right order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def said(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="session")
def found(model, texts, finished):
    """The finished comparison as an object; its store has everything."""
    options = dict(zip(texts[::2], texts[1::2], strict=True))
    from qframe.cli.compare import _methods, _schemes
    from qframe.cli.flags import RecipeFlags
    from qframe.host import Host

    flags = RecipeFlags(
        group_size=32,
        dataset=[options["--dataset"]],
        num_calibration_samples=6,
        max_seq_length=48,
    )
    host, base = Host.discover(), flags.to_recipe()
    cells = matrix.cells_of(
        _methods(["rtn", "gptq"]), _schemes(["W4A16", "W3A16"], flags, base), base, host
    )
    said = []
    made = matrix.compare(
        model,
        cells,
        finished,
        host=host,
        evaluation=matrix.Evaluation(dataset=options["--eval-dataset"], window=48, limit=4),
        say=said.append,
    )
    assert not [line for line in said if line.endswith(": quantizing")]
    return made


def hostile(found):
    """The same with names and messages of someone who means ill."""
    rows = [
        dataclasses.replace(row, method=f"{row.method}{HOSTILE}", scheme=f"{row.scheme}{HOSTILE}")
        for row in found.rows
    ]
    rows[3] = dataclasses.replace(
        rows[3], status="failed", message=HOSTILE, exit_code=3, kl_mean=None, bits_per_weight=None
    )
    contents = [
        {
            **content,
            "report": {
                **content["report"],
                "layers": [
                    {**layer, "name": f"{layer['name']}{HOSTILE}"}
                    for layer in content["report"]["layers"]
                ],
            },
        }
        for content in found.contents[:3]
    ]
    contents.append({"status": "failed", "error": {"message": HOSTILE}, "measured": {}})
    layers = {f"{name}{HOSTILE}": v for name, v in found.distributions["layers"].items()}
    return dataclasses.replace(
        found,
        model=HOSTILE,
        rows=rows,
        contents=contents,
        files={HOSTILE: HOSTILE},
        calibration={**found.calibration, "name": HOSTILE},
        distributions={**found.distributions, "layers": layers},
    )


def test_it_is_well_formed_and_its_links_lead_somewhere(found):
    read = Reader(page(found))
    assert len(read.ids) == len(set(read.ids))
    for _, name, value in read.attributes:
        if name in ("aria-labelledby", "href") and not value.startswith("data:"):
            assert value.removeprefix("#") in read.ids


@pytest.mark.parametrize("make", [lambda f: f, hostile], ids=["plain", "hostile"])
def test_it_asks_for_nothing_and_runs_nothing(found, make):
    text = page(make(found))
    read = Reader(text)
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & set(read.tags)
    for _, name, value in read.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "data", "action", "xlink:href", "srcset"):
            assert value.startswith(("#", "data:,"))
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert not re.search(r"url\(|@import|@font-face|https?:|expression", style)
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text


def test_hostile_names_are_text(found):
    """They add no tag and no attribute, and are shown as they are."""
    mine, theirs = Reader(page(found)), Reader(page(hostile(found)))
    assert set(theirs.tags) <= {*mine.tags, "a"}
    known = {(tag, name) for tag, name, _ in mine.attributes}
    assert {(tag, name) for tag, name, _ in theirs.attributes} <= {
        *known,
        ("dt", "id"),
        ("td", "colspan"),
    }
    assert " ".join(HOSTILE.split()) in theirs.said()
    assert "49" not in [part.strip() for part in theirs.text]


def test_everything_is_there(found):
    read = Reader(page(found))
    said = read.said()
    titles = " ".join(value for _, name, value in read.attributes if name == "aria-label")
    for row in found.rows:
        assert f"{row.number} {row.method}" in said
        assert row.scheme in said
        assert f"{row.number}. {row.label}" in titles
    for content in found.contents:
        for layer in content["report"]["layers"]:
            assert layer["name"] in said
    for hash_ in (
        found.protocol.text_sha256,
        found.calibration["sha256"],
        found.calibration["tokens_sha256"],
        *found.files.values(),
    ):
        assert hash_ in said
    for version in found.environment.values():
        assert version[:12] in said
    assert found.contents[0]["measured"]["machine"]["processor"] in said
    # a table for each picture: the board for the points, and one each for errors, distributions
    assert read.tags.count("table") == 4


def test_the_same_store_gives_the_same_bytes(found, finished):
    assert page(found) == page(found)
    assert page(found) == (finished / "report.html").read_text(encoding="utf-8")


def test_without_distributions_it_says_so(found):
    bare = dataclasses.replace(found, distributions=None, missing="not asked for")
    assert "Distributions were not collected: not asked for." in Reader(page(bare)).said()


def test_a_comparison_of_failures_is_a_page(found):
    rows = [
        dataclasses.replace(r, status="failed", kl_mean=None, bits_per_weight=None, pareto=False)
        for r in found.rows
    ]
    failed = {"status": "failed", "error": {}, "measured": {}}
    nothing = dataclasses.replace(
        found, rows=rows, contents=[failed] * len(rows), distributions=None, missing="no cell"
    )
    read = Reader(page(nothing))
    assert "There is no cell to show." in read.said()
    assert "Nothing was measured." in read.said()


# Pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [(4.0, 0.1)],
        [(4.0, 0.0), (4.0, 0.0)],
        [(4.0, float("inf")), (3.0, -1e-9), (3.0, 1e-300)],
        [(4.25, 0.1 + 1e-6 * i) for i in range(12)],
    ],
)
def test_points_lie_inside_whatever_their_values(values):
    points = [
        Point(x=x, y=y, label=f"cell {i}", title="t", kind=i, marked=i == 0)
        for i, (x, y) in enumerate(values)
    ]
    text = str(scatter(points, width=360, height=380, x_title="x", y_title="y", name="n"))
    Reader(text)
    assert "nan" not in text
    assert "inf" not in text.replace("info", "")
    places = re.findall(r'<text class="label" x="([\d.-]+)" y="([\d.-]+)"', text)
    assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 380 for x, y in places)
    assert len(set(places)) == len(values)
    if len(values) == 12:  # labels of one column do not cover one another
        heights = sorted(float(y) for _, y in places)
        assert min(b - a for a, b in pairwise(heights)) >= 10


def test_colours_follow_the_logarithm_and_nothing_has_none():
    scale = Scale.of([None, 0.0, 1e-4, 1e-2, 1.0, float("nan"), float("inf")])
    classes = [scale.css_class(v) for v in (1e-4, 1e-2, 1.0, 0.0, None, float("nan"), 9e9)]
    assert classes == ["h0", "h4", "h8", "z", "na", "na", "h8"]
    assert Scale.of([]).css_class(1.0) == "h4"
    assert Scale.of([2.0]).css_class(2.0) == "h4"


def test_a_heat_map_has_a_tile_with_a_title_for_each_value():
    rows = [("<a>", [Tile(value=v, title=f"<{v}>") for v in (0.1, None, 0.0)])]
    text = str(heat(rows, Scale.of([0.1]), name="n"))
    assert Reader(text).tags.count("rect") == 3
    assert "&lt;0.1&gt;" in text
    assert str(heat([], Scale.of([]), name="n"))


def test_a_histogram_has_a_bar_for_each_count_and_marks_outliers():
    counts = [0] * 65
    counts[32], counts[33], counts[60], counts[0] = 10**6, 10, 1, 2
    text = str(histogram(counts, width=0.25, sigmas=6, name="n"))
    assert Reader(text).tags.count("rect") == 4
    assert text.count('class="bar out"') == 2
    assert Reader(str(histogram([0] * 65, width=0.25, sigmas=6, name="n"))).tags


# In a browser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 1280])
@pytest.mark.parametrize("make", [lambda f: f, hostile], ids=["plain", "hostile"])
def test_it_fits_the_window_and_the_console_is_silent(browser, found, tmp_path, width, dark, make):
    file = tmp_path / "report.html"
    file.write_text(page(make(found)), encoding="utf-8")
    browser.show(file, width=width, height=800, dark=dark)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(247, 246, 243)"
    )
    assert browser.value("document.querySelectorAll('section').length") >= 6
    wide = browser.value("getComputedStyle(document.querySelector('.wide')).display")
    assert wide == ("none" if width < 640 else "block")
    for details in ("true", "false"):
        browser.value(f"document.querySelectorAll('details').forEach(d => d.open = {details})")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.said == []
    assert browser.asked == [file.resolve().as_uri()]


def test_every_text_can_be_told_from_its_ground(browser, found, tmp_path):
    """WCAG AA: a contrast of 4.5 for text, in light and dark."""
    file = tmp_path / "report.html"
    file.write_text(page(hostile(found)), encoding="utf-8")
    script = """(() => {
      const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
        return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
      const ground = e => { for (; e; e = e.parentElement) {
        const c = getComputedStyle(e).backgroundColor;
        if (!c.startsWith('rgba(0, 0, 0, 0')) return c; } return 'rgb(255,255,255)'; };
      let least = 99;
      for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!own || e.closest('title')) continue;
        const s = getComputedStyle(e), c = e.closest('svg') ? s.fill : s.color;
        const [a, b] = [light(c), light(ground(e))].sort((x, y) => y - x);
        least = Math.min(least, (a + 0.05) / (b + 0.05));
      }
      return least;
    })()"""
    for dark in (False, True):
        browser.show(file, width=1280, height=800, dark=dark)
        assert browser.value(script) >= 4.5
