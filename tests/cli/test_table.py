"""Tables: what is marked, what is summed up, what is left out, and that they fit on a screen."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from qframe.contracts import Event
from qframe.report.layers import Coverage, LayerReport, RunReport
from qframe.report.table import (
    MANY_LAYERS,
    PlanRow,
    ScoreRow,
    collapsed,
    figures,
    plan_table,
    run_summary,
    score_table,
    some,
    times,
)

WIDTH = 100
KINDS = ("self_attn.q_proj", "mlp.down_proj")


def shown(renderable):
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def layer(name, **changes):
    values = {
        "method": "gptq",
        "scheme": "int4 symmetric, group 64, minmax",
        "rows": 576,
        "columns": 576,
        "bits_per_weight": 4.25,
        "error": 0.05,
        "rtn_error": 0.1,
        "held_out_error": 0.06,
        "rtn_held_out_error": 0.09,
        "sqnr_db": 17.5,
        "tokens": 4096,
        "tokens_held_out": 512,
        "info": {"damp": 0.01},
        "seconds": {"calibrate": 0.5, "round": 0.25},
    }
    return LayerReport(name=name, **{**values, **changes})


def run_of(layers, events=()):
    coverage = Coverage(parameters=2, parameters_quantized=1, matrix_fraction=1.0, left={})
    return RunReport(layers=layers, events=events, coverage=coverage, calibration=None)


def blocks(count, **changes):
    return [layer(f"model.layers.{i}.{kind}", **changes) for i in range(count) for kind in KINDS]


def test_few_layers_are_all_shown():
    text = shown(run_summary(run_of(blocks(2))))
    assert text.count("model.layers.") == 4
    assert "1.50x" in text


def test_many_layers_are_summed_up_by_kind_and_the_worst_are_shown():
    layers = [*blocks(MANY_LAYERS), layer("model.layers.77.mlp.up_proj", held_out_error=0.5)]
    text = shown(run_summary(run_of(layers)))
    assert "41 layers by kind" in text
    assert "the 10 worst layers" in text
    assert text.index("model.layers.77.mlp.up_proj") < text.index("model.layers.0")
    assert text.count("model.layers.") < len(layers)


def test_all_layers_can_be_asked_for():
    layers = blocks(MANY_LAYERS)
    assert shown(run_summary(run_of(layers), all_layers=True)).count("model.layers.") == len(layers)


def test_a_layer_that_is_worse_than_rtn_on_held_out_tokens_is_marked_and_named():
    harmed = layer("model.layers.1.mlp.down_proj", held_out_error=0.2, rtn_held_out_error=0.1)
    text = shown(run_summary(run_of([*blocks(1), harmed])))
    assert "! 0.50x" in text
    assert "! 1 of 3 layers are worse than round-to-nearest" in text


def test_without_held_out_tokens_nothing_is_said_about_them():
    text = shown(run_summary(run_of(blocks(1, held_out_error=None, rtn_held_out_error=None))))
    assert "held out %" not in text
    assert "No tokens were held out" in " ".join(text.split())
    assert "2.00x" in text


def test_without_calibration_there_are_no_errors():
    changes = dict.fromkeys(("error", "rtn_error", "held_out_error", "rtn_held_out_error"))
    text = shown(run_summary(run_of(blocks(MANY_LAYERS, **changes, tokens=0, info={}))))
    assert "error" not in text
    assert "by SQNR" in text


def test_events_are_counted_and_named():
    events = [Event(kind="fallback", layer=f"layer{i}", message=f"reason {i}") for i in range(9)]
    text = shown(run_summary(run_of(blocks(1), events)))
    assert "fallback" in text
    assert "layer0, layer1, layer2, layer3, layer4 and 4 more" in text
    assert "reason 0" in text
    assert "reason 1" not in text


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0])
def test_any_number_can_be_shown(value):
    changes = {"held_out_error": value, "rtn_held_out_error": value, "sqnr_db": value}
    layers = blocks(MANY_LAYERS, **changes, info={"damp": "auto"})
    assert shown(run_summary(run_of(layers)))


def test_the_legend_says_which_errors_these_are():
    for changes, words in (({}, "||X(W-Q)||"), ({"drift": 0.07}, "||YW-XQ||")):
        text = shown(run_summary(run_of(blocks(1, **changes)), all_layers=True))
        assert words in text
        assert ("moved %" in text) == bool(changes)
        assert ("7.00" in text) == bool(changes)


def test_dampings_are_shown_where_they_differ():
    text = shown(run_summary(run_of(blocks(1)), all_layers=True))
    assert "damp" not in text
    raised = [*blocks(1), layer("raised", info={"damp": 0.1})]
    text = shown(run_summary(run_of(raised), all_layers=True))
    assert "damp" in text
    assert "0.1" in text


def test_tables_fit_on_a_screen_whatever_the_names():
    name = "model.decoder.layers.117.block_sparse_moe.experts.63.feed_forward.down_projection"
    layers = [layer(name), *blocks(MANY_LAYERS)]
    text = shown(run_summary(run_of(layers), all_layers=True))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text


def test_rows_that_differ_in_the_block_only_are_one():
    rows = [
        PlanRow(name=f"layers.{i}.up", shape=(2, 3), what="int4", bits_per_weight=4.25)
        for i in (0, 1, 2, 5)
    ]
    rows.append(PlanRow(name="layers.3.up", shape=(2, 3), what="int8", bits_per_weight=8.25))
    rows.append(PlanRow(name="head", shape=(9, 3), what="ignored by the recipe"))
    assert [row.name for row in collapsed(rows)] == ["layers.{0..2,5}.up", "layers.3.up", "head"]
    text = shown(plan_table(rows))
    assert "left: ignored by the recipe" in text
    assert shown(plan_table(rows, collapse=False)).count("layers.") == 5


def test_scores_without_a_value_leave_a_column_out():
    rows = [ScoreRow(name="full precision", perplexity=17.0, perplexity_stderr=0.5)]
    text = shown(score_table(rows))
    assert "17.000 ± 0.500" in text
    assert "KL" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "! 0.50x"), (1.0, "1.00x"), (2.0, "2.00x"), (math.inf, "exact")]
)
def test_gains(value, text):
    assert times(value).plain == text


def test_small_numbers_are_scientific():
    assert figures(0.0004321) == "4.3e-04"
    assert figures(0.04321) == "0.0432"


def test_names_in_a_sentence():
    assert some(["a"]) == "a"
    assert some(["a", "b", "c"], shown=2) == "a, b and 1 more"


def test_what_becomes_of_inputs_has_columns_of_its_own():
    plain = shown(run_summary(run_of([layer("a"), layer("b")])))
    assert "inputs %" not in plain
    assert "kept %" not in plain
    first = layer("a", inputs={"error": 0.0123, "kept_columns": 9, "kept_share": 0.25})
    whole = shown(run_summary(run_of([first, layer("b", inputs={"error": 0.5})])))
    lines = [line.split() for line in whole.splitlines()]
    heads = next(line for line in lines if "inputs" in line)
    assert "kept" in heads
    assert {"1.23", "25.0"} <= set(next(line for line in lines if line[:1] == ["a"]))
    assert {"50.0", "0"} <= set(next(line for line in lines if line[:1] == ["b"]))
    assert "Kept %: columns whose weights and inputs stay in 16 bits." in " ".join(whole.split())
