"""`qframe compare`: cells are what quantize and eval say, made once, and never taken for others."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe.comparison.leaderboard import Row, is_optimal, ranked

REQUEST, NUMBERS, INTERNAL = 2, 3, 1  # exit codes

PLUGIN = """
from dataclasses import dataclass
from qframe import Capabilities, hookimpl
from qframe.errors import NonFiniteError

@dataclass(frozen=True)
class Odd:
    name: str
    what: str
    needs = frozenset()
    capabilities = Capabilities(num_bits=frozenset({{4}}))

    def round(self, problem, rng):
        if self.what == "crash":
            raise ZeroDivisionError("a mistake of its own")
        raise NonFiniteError("numbers that are none")

@hookimpl
def qframe_rounders():
    return [Odd("crashes", "crash"), Odd("overflows", "overflow")]  # {comment}
"""


def cells(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["cells"]


# What a cell is ---------------------------------------------------------------------------------


def test_cells_are_what_quantize_and_eval_say(finished, model, texts, run, tmp_path):
    """To the last bit: the reference's logits come from disk here, and from the network there."""
    options = dict(zip(texts[::2], texts[1::2], strict=True))
    evaluation = {"--dataset": options.pop("--eval-dataset")}
    evaluation |= {name: options.pop(name) for name in ("--window", "--limit")}
    flat = [part for option in options.items() for part in option]
    out = tmp_path / "out"
    done = run("quantize", model, "-m", "gptq", "--scheme", "W3A16", *flat, "-o", out)
    assert done.code == 0, done.err
    flat = [part for option in evaluation.items() for part in option]
    scored = run("eval", out, "--reference", model, *flat, "--json")
    [reference, theirs] = json.loads(scored.out)["networks"]
    [ours] = [c for c in cells(finished) if (c["method"], c["scheme"]) == ("gptq", "W3A16")]
    names = ("kl_mean", "kl_p99", "top1", "perplexity", "perplexity_stderr", "bits_per_weight")
    for name in (*names, "weights_bytes", "folder_bytes"):
        assert ours[name] == theirs[name], name
    full = json.loads((finished / "results.json").read_text())["reference"]
    assert full["score"]["perplexity"] == reference["perplexity"]
    assert full["bytes"]["weights"] == reference["weights_bytes"]


def test_a_second_run_makes_nothing_and_writes_the_same_page(finished, compare, figures):
    page = (finished / "report.html").read_bytes()
    before = figures(finished)
    again = compare(finished)
    assert (again.code, again.made()) == (0, [])
    assert again.err.count("kept from before") == 4
    assert (finished / "report.html").read_bytes() == page
    assert figures(finished) == before


def test_neither_threads_nor_kept_logits_change_a_figure(finished, compare, figures, tmp_path):
    done = compare(tmp_path / "out", "--threads", "2", "--reference-disk", "0")
    assert done.code == 0
    assert not list((tmp_path / "out").glob("logits/*/*"))
    assert figures(tmp_path / "out") == figures(finished)


def test_kept_logits_stay_within_their_limit(compare, tmp_path):
    each = 48 * 256 * 4  # a window's, of the tiny vocabulary
    out = tmp_path / "out"
    compare(out, "--reference-disk", str(2.5 * each / 1e9), methods=["rtn"], schemes=["W4A16"])
    kept = sorted(out.glob("logits/*/*.f32"))
    assert [file.stat().st_size for file in kept] == [each + 32, each + 32]
    compare(out, "--window", "32", "--reference-disk", str(2.5 * each / 1e9), methods=["rtn"])
    [folder] = {file.parent for file in out.glob("logits/*/*.f32")}
    assert folder != kept[0].parent  # the older reference made room


def test_output_as_json_and_csv(finished, compare):
    shown = json.loads(compare(finished, "--json").out)
    assert [cell["status"] for cell in shown["cells"]] == ["done"] * 4
    assert shown["events"] == []
    assert shown["protocol"]["windows"] == 4
    lines = list(csv.DictReader(io.StringIO(compare(finished, "--csv").out)))
    assert [line["kl_mean"] for line in lines] == [str(c["kl_mean"]) for c in shown["cells"]]
    both = compare(finished, "--csv", "--json")
    assert both.code == REQUEST
    assert "choose one" in both.said


def test_the_leaderboard_fits_a_hundred_columns_and_says_what_it_must(finished, compare):
    shown = compare(finished)
    assert max(map(len, shown.out.splitlines())) <= 100
    for word in ("W4A16", "W3A16", "gptq", "rtn", "hold", "Pareto", "protocol", "sha256"):
        assert word in shown.out, word
    assert " MB" in shown.out or " GB" in shown.out  # peak memory


# What makes another cell ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        ("--seed", "7"),
        ("--limit", "3"),
        ("--window", "40"),
        ("--num-calibration-samples", "5"),
        ("--observer", "mse"),
        ("--group-size", "16"),
        ("--compute-dtype", "float32"),
        ("--ignore", "re:.*v_proj"),
    ],
)
def test_another_option_is_another_cell(tmp_path, finished, compare, option, copied):
    out = copied(finished)
    other = compare(out, *option, methods=["gptq"], schemes=["W4A16"])
    assert other.code == 0, other.err
    assert len(other.made()) == 1
    assert "4 cells that were made with other options" in " ".join(other.out.split())
    assert [cell["method"] for cell in cells(out)] == ["gptq"]
    assert compare(out).made() == []  # the old ones are still there


@pytest.fixture
def copied(tmp_path):
    import shutil

    return lambda folder: shutil.copytree(folder, tmp_path / "copied")


def test_another_model_text_or_plugin_source_is_another_cell(
    tiny, tmp_path, texts, run, compare, model
):
    out, plugin = tmp_path / "out", tmp_path / "odd.py"
    plugin.write_text(PLUGIN.format(comment="one"))
    odd = {"methods": ["overflows"], "schemes": ["W4A16"]}
    assert len(compare(out, "--plugin", str(plugin), **odd).made()) == 1
    assert compare(out, "--plugin", str(plugin), **odd).made() == []
    plugin.write_text(PLUGIN.format(comment="two"))
    assert len(compare(out, "--plugin", str(plugin), **odd).made()) == 1
    other = tiny.write_llama(tmp_path / "model", seed=1)
    common = ["compare", "-o", out, "-m", "overflows", "--plugin", plugin, "--scheme", "W4A16"]
    assert len(run(*common, other, *texts).made()) == 1
    text = tmp_path / "other.txt"
    text.write_text("Something else altogether, and something more of it.\n" * 60)
    assert len(run(*common, other, *texts, "--dataset", text).made()) == 1
    assert len(run(*common, other, *texts, "--eval-dataset", text).made()) == 1
    assert run(*common, other, *texts).made() == []
    copy = tmp_path / "copy" / "renamed"
    copy.parent.mkdir()
    other.rename(copy)
    assert run(*common, copy, *texts).made() == []  # where a model lies does not matter


def test_methods_and_schemes_may_have_options_of_their_own(compare, tmp_path):
    out = tmp_path / "out"
    asked = ["gptq", "gptq:dampening_frac=0.5,actorder=null"]
    done = compare(out, methods=asked, schemes=["W4A16", "W4A16:group_size=16"])
    assert done.code == 0, done.err
    assert len({cell["key"] for cell in cells(out)}) == 4
    bits = {cell["scheme"]: cell["bits_per_weight"] for cell in cells(out)}
    assert bits["W4A16"] < bits["W4A16:group_size=16"]
    # an option for all goes to those that have it
    assert compare(out, "--set", "dampening_frac=0.5", schemes=["W4A16"]).code == 0
    assert {cell["method"] for cell in cells(out)} == {"rtn", "gptq"}


def test_several_calibration_texts_are_all_named(compare, tmp_path):
    text, out = tmp_path / "second.txt", tmp_path / "out"
    text.write_text("Something else altogether, and something more of it.\n" * 60)
    done = compare(out, "--dataset", str(text), methods=["awq+gptq"], schemes=["W4A16"])
    assert done.code == 0, done.err
    used = json.loads((out / "results.json").read_text())["calibration"]
    assert len(used["sources"]) == 2
    for source in used["sources"]:
        assert source["sha256"][:12] in " ".join(done.out.split())
        assert source["sha256"] in (out / "report.html").read_text()


# What goes wrong --------------------------------------------------------------------------------


def test_cells_that_fail_are_rows_and_stop_nothing(compare, tmp_path):
    plugin, out = tmp_path / "odd.py", tmp_path / "out"
    plugin.write_text(PLUGIN.format(comment=""))
    asked = {"methods": ["crashes", "overflows", "rtn"], "schemes": ["W4A16", "W3A16"]}
    ran = compare(out, "--plugin", str(plugin), **asked)
    assert ran.code == INTERNAL
    states = {(c["method"], c["scheme"]): (c["status"], c["exit_code"]) for c in cells(out)}
    assert states == {
        ("crashes", "W4A16"): ("failed", INTERNAL),
        ("overflows", "W4A16"): ("failed", NUMBERS),
        ("rtn", "W4A16"): ("done", 0),
        ("crashes", "W3A16"): ("failed", REQUEST),  # a number of bits that it does not do
        ("overflows", "W3A16"): ("failed", REQUEST),
        ("rtn", "W3A16"): ("done", 0),
    }
    for words in ("a mistake of its own", "numbers that are none", "num_bits=3 is not supported"):
        assert words in ran.out
        assert words in (out / "report.html").read_text()
    again = compare(out, "--plugin", str(plugin), **asked)
    assert again.made() == ["[1/6] crashes W4A16: quantizing"]  # numbers would fail again
    asked["methods"] = ["overflows", "rtn"]
    assert compare(out, "--plugin", str(plugin), **asked).code == NUMBERS
    asked["schemes"] = ["W3A16"]
    assert compare(out, "--plugin", str(plugin), **asked).code == REQUEST
    asked["methods"] = ["rtn"]
    assert compare(out, "--plugin", str(plugin), **asked).code == 0


def test_a_broken_bound_is_a_row(compare, tmp_path, monkeypatch):
    """Whether or not the run goes on with it."""
    import dataclasses

    from qframe.certificates import Evidence

    original = Evidence.certificates

    def broken(self, claims):
        return tuple(dataclasses.replace(c, ratio=2.0) for c in original(self, claims))

    monkeypatch.setattr(Evidence, "certificates", broken)
    one = {"methods": ["rtn"], "schemes": ["W4A16"]}
    refused = compare(tmp_path / "out", **one)
    assert refused.code == NUMBERS
    assert "is violated" in refused.out
    warned = compare(tmp_path / "out", "--on-violated-certificate", "warn", **one)
    assert warned.code == 0
    [cell] = cells(tmp_path / "out")
    assert cell["violated"] == cell["certificates"] > 0
    assert cell["closest"] == 2.0
    assert "broken" in warned.out


@pytest.mark.parametrize("kind", ["cells", "distributions", "reference"])
def test_damaged_entries_are_made_again_and_said(finished, copied, compare, figures, kind):
    out = copied(finished)
    before = figures(out)
    file = sorted((out / kind).glob("*.json"))[0]
    file.write_bytes(file.read_bytes()[:-40])
    again = compare(out)
    assert again.code == 0
    assert f"damaged entry: {kind}/{file.name}" in again.said
    assert len(again.made()) == (kind == "cells")
    assert figures(out) == before
    assert "damaged" not in compare(out).said


def test_damaged_logits_are_made_again(finished, copied, compare, figures):
    out = copied(finished)
    before = figures(out)
    changed = sorted(out.glob("logits/*/*.f32"))[1]
    data = bytearray(changed.read_bytes())
    data[999] ^= 64
    changed.write_bytes(data)
    for file in (out / "cells").glob("*.json"):
        file.unlink()
    again = compare(out)
    assert "damaged entry: logits" in again.said
    assert len(again.made()) == 4
    assert figures(out) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "gptk"), ["unknown method 'gptk'", "did you mean 'gptq'?"]),
        (("-m", "gptq+awq"), ["must come before the rounder"]),
        (("-m", "gptq:damp=1"), ["no option 'damp'", "dampening_frac"]),
        (("-m", "gptq", "--scheme", "W5A16"), ["unknown scheme 'W5A16'", "did you mean"]),
        (("-m", "gptq", "--scheme", "W4A16:grup_size=3"), ["grup_size", "group_size"]),
        (("-m", "gptq", "--set", "dampening=1"), ["no method has the option", "dampening_frac"]),
        (("-m", "gptq", "--window", "100000"), ["window"]),
        (("-m", "gptq", "--eval-dataset", "nothing.txt"), ["nothing.txt", "no such file"]),
    ],
)
def test_wrong_requests_say_what_to_do_before_any_work(run, model, tmp_path, arguments, words):
    failed = run("compare", model, "-o", tmp_path / "out", *arguments)
    assert failed.code == REQUEST
    assert failed.out == ""
    for word in words:
        assert word in failed.said
    assert not list(tmp_path.glob("out/cells/*"))


def test_the_folder_must_be_usable(run, model, tmp_path):
    (tmp_path / "out").write_text("")
    failed = run("compare", model, "-m", "rtn", "-o", tmp_path / "out")
    assert failed.code == REQUEST
    assert "give another with -o" in failed.said


# The leaderboard --------------------------------------------------------------------------------

KLS = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf, math.nan])
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["rtn", "a", "b"]),
        st.sampled_from(["X", "Y"]),
        st.sampled_from([3.0, 4.0, 4.5]),
        KLS | st.none(),
    ),
    unique_by=lambda r: r[:2],
    max_size=6,
)


def rows_of(drawn):
    return [
        Row(
            number=0,
            method=method,
            scheme=scheme,
            described="",
            status="failed" if kl is None else "done",
            key=str(i),
            kl_mean=kl,
            bits_per_weight=None if kl is None else bits,
        )
        for i, (method, scheme, bits, kl) in enumerate(drawn)
    ]


@given(drawn=ROWS)
def test_the_order_and_the_pareto_front_are_as_defined(drawn):
    rows = ranked(rows_of(drawn), "rtn")
    assert sorted(r.key for r in rows) == sorted(r.key for r in rows_of(drawn))
    assert [r.number for r in rows] == list(range(1, len(rows) + 1))
    known = [r for r in rows if r.kl_mean is not None and not math.isnan(r.kl_mean)]
    for row in rows:
        better = [
            o
            for o in known
            if row in known
            and (o.bits_per_weight <= row.bits_per_weight and o.kl_mean <= row.kl_mean)
            and (o.bits_per_weight < row.bits_per_weight or o.kl_mean < row.kl_mean)
        ]
        assert row.pareto == is_optimal(row, rows) == (row in known and not better)
    if known:
        assert any(row.pareto for row in rows)
    for first, second in pairwise(rows):
        if first.scheme == second.scheme and second in known:
            assert first.kl_mean <= second.kl_mean
        if first.scheme != second.scheme:  # schemes are not mixed
            assert second.scheme not in [r.scheme for r in rows[: first.number]]


def test_gains_are_relative_to_rounding_to_nearest_with_the_same_scheme():
    drawn = [("rtn", "X", 4.0, 1.0), ("a", "X", 4.0, 0.25), ("a", "Y", 3.0, 0.25)]
    gains = {(r.method, r.scheme): r.gain for r in ranked(rows_of(drawn), "rtn")}
    assert gains == {("rtn", "X"): None, ("a", "X"): 4.0, ("a", "Y"): None}
