"""KVScheme: its words, what it refuses, its layout and its bytes."""

import ast
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from qframe import Capabilities, Grid, KVScheme
from qframe.errors import RecipeError

HOOKS = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_bits": 1}, "num_bits must lie in 2..8"),
        ({"num_bits": 9}, "num_bits must lie in 2..8"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"axis": "channel"}, "needs group_size"),
        ({"residual_length": -1}, "residual_length must not be negative"),
        ({"sink_tokens": -1}, "sink_tokens must not be negative"),
        ({"grup_size": 8}, "grup_size"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, why):
    with pytest.raises(ValidationError, match=re.escape(why)):
        KVScheme(**changes)


def test_a_misspelt_key_gets_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'residual_length'"):
        KVScheme().replace(residual_lenght=4)


def test_words_of_other_tools_are_understood():
    scheme = KVScheme(nbits=2, q_group_size=64, sym=True)
    assert (scheme.num_bits, scheme.group_size, scheme.symmetric) == (2, 64, True)


@pytest.mark.parametrize(
    ("symmetric", "grid"), [(True, Grid(-8, 7)), (False, Grid(0, 15))], ids=["symmetric", "not"]
)
def test_the_grid_is_signed_only_if_there_is_no_offset(symmetric, grid):
    assert KVScheme(symmetric=symmetric).grid == grid


def test_capabilities_speak_of_axes_as_of_strategies():
    tokens = Capabilities(strategies=frozenset({"token"}))
    assert tokens.objection(KVScheme()) is None
    assert "strategy='channel'" in tokens.objection(KVScheme(axis="channel", group_size=4))


def test_a_token_has_a_ragged_last_group():
    assert KVScheme(group_size=32).scale_shape((2, 3, 5, 48)) == (2, 3, 5, 2)
    assert KVScheme().scale_shape((2, 3, 5, 48)) == (2, 3, 5, 1)


def test_groups_of_a_channel_are_tokens():
    scheme = KVScheme(axis="channel", group_size=4)
    assert scheme.scale_shape((2, 3, 8, 48)) == (2, 3, 2, 48)
    assert (scheme.step, KVScheme(group_size=4).step) == (4, 1)


def test_bytes_are_codes_scales_offsets_and_kept_tokens():
    shape = (2, 3, 12, 48)
    values = KVScheme(num_bits=4, group_size=32)
    row, scales = 24, 2 * 2 * 2  # 48 codes; two groups with a scale and an offset of 2 bytes
    assert values.nbytes(shape, 2, quantized=8) == 6 * (8 * (row + scales) + 4 * 48 * 2)
    keys = KVScheme(num_bits=2, axis="channel", group_size=4, symmetric=True)
    row, scales = 4, 2  # 4 codes are a byte, padded to a word; one scale
    assert keys.nbytes(shape, 4, quantized=8) == 6 * (2 * 48 * (row + scales) + 4 * 48 * 4)


def test_the_document_shows_the_fields_and_their_defaults():
    [shown] = re.findall(r"^class KVScheme:\n((?:    .+\n)+)", HOOKS, re.MULTILINE)
    fields = {
        node.target.id: ast.literal_eval(node.value)
        for node in ast.parse("class KVScheme:\n" + shown).body[0].body
    }
    assert fields == {name: field.default for name, field in KVScheme.model_fields.items()}
