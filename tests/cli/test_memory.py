"""The arithmetic of memory, against numbers that everybody can check by hand."""

from __future__ import annotations

import json

import pytest

from qframe.contracts import LayerInfo
from qframe.memory import memory_of_layers, memory_of_parameters, readable_bytes

GB = 10**9


def test_seven_billion_weights_in_every_format():
    sizes = {memory.format: memory.weights / GB for memory in memory_of_parameters(7e9)}
    assert sizes == {"FP32": 28, "FP16, BF16": 14, "INT8": 7, "INT4": 3.5, "INT2": 1.75}


def test_scales_of_16_bits_and_zero_points_of_the_width_of_a_code_are_added():
    int4 = next(m for m in memory_of_parameters(7e9) if m.format == "INT4")
    assert int4.scales["group 128"] == 7e9 * 16 / 128 / 8
    assert int4.zero_points["group 128"] == 7e9 * 4 / 128 / 8
    assert int4.scales["group 64"] == 2 * int4.scales["group 128"]
    assert int4.total("group 128", symmetric=True) / 7e9 * 8 == 4.125
    assert int4.total("group 128", symmetric=False) / 7e9 * 8 == 4.15625


def test_formats_of_floating_point_have_no_scales():
    assert all(not m.scales for m in memory_of_parameters(1e9) if m.num_bits > 8)


def test_layers_are_counted_as_they_are_stored():
    layers = [LayerInfo(name="a", rows=3, columns=100)]
    int4 = next(m for m in memory_of_layers(layers) if m.format == "INT4")
    assert int4.weights == 3 * 13 * 4  # 400 bits of a row take 13 words
    assert int4.scales["group 64"] == 3 * 2 * 2
    assert int4.zero_points["group 64"] == 3 * 4  # a row's zero points take whole words too
    assert int4.scales["channel"] == 3 * 2


def test_many_weights_are_the_same_by_count_and_by_layer():
    layers = [LayerInfo(name="a", rows=4096, columns=4096)]
    by_layer, by_count = memory_of_layers(layers), memory_of_parameters(4096 * 4096)
    for one, other in zip(by_layer, by_count, strict=True):
        assert one.weights == other.weights
        assert one.scales == other.scales


@pytest.mark.parametrize(
    ("count", "text"),
    [(28e9, "28.0 GB"), (1.75e9, "1.75 GB"), (999, "999 B"), (112.5e6, "112 MB"), (0, "0 B")],
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


def test_the_command_prints_the_table(run):
    shown = run("inspect", "--params", "7e9")
    assert shown.code == 0
    for text in ("28.0 GB", "14.0 GB", "7.00 GB", "3.50 GB", "1.75 GB"):
        assert text in shown.out


def test_the_command_gives_numbers_as_json(run):
    found = json.loads(run("inspect", "--params", "7e9", "--json").out)
    assert [m["weights"] / GB for m in found["memory"]] == [28, 14, 7, 3.5, 1.75]


def test_a_model_and_a_number_of_parameters_are_too_much(run, tiny_llama):
    assert run("inspect", tiny_llama, "--params", "7e9").code == 2
    assert run("inspect").code == 2
