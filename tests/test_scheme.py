"""A scheme says what to quantize to; it understands other tools' words and refuses nonsense."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe.errors import RecipeError
from qframe.scheme import PRESETS, Scheme


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("bits", "num_bits", 3),
        ("w_bit", "num_bits", 3),
        ("wbits", "num_bits", 3),
        ("data_type", "type", "float"),
        ("sym", "symmetric", False),
        ("q_group_size", "group_size", 32),
        ("groupsize", "group_size", 32),
    ],
)
def test_the_words_of_other_tools_mean_the_same(alias, name, value):
    assert Scheme.parse({alias: value}, "recipe") == Scheme.parse({name: value}, "recipe")
    assert Scheme().replace(**{alias: value}) == Scheme().replace(**{name: value})


@pytest.mark.parametrize("word", ["asym", "zero_point"])
def test_asym_and_zero_point_are_the_opposite_of_symmetric(word):
    assert not Scheme.parse({word: True}, "recipe").symmetric
    assert Scheme.parse({word: False}, "recipe").symmetric
    assert not Scheme().replace(**{word: True}).symmetric


@pytest.mark.parametrize("word", ["asym", "zero_point"])
@pytest.mark.parametrize("text", ["false", "no", "maybe", None])
def test_a_text_is_never_taken_for_true(word, text):
    # bool("false") is True: such a scheme would be the opposite of what was asked for.
    with pytest.raises(RecipeError, match=f"must be true or false, got {text!r}"):
        Scheme.parse({word: text}, "recipe")


@pytest.mark.parametrize("word", ["group_size", "q_group_size", "groupsize"])
def test_group_size_minus_one_means_one_scale_per_channel(word):
    scheme = Scheme.parse({word: -1}, "recipe")
    assert (scheme.strategy, scheme.group_size) == ("channel", None)
    assert Scheme.preset("W4A16", **{word: -1}) == scheme


@pytest.mark.parametrize(
    ("given_words", "strategy", "group_size"),
    [
        ({}, "channel", None),
        ({"group_size": None}, "channel", None),
        ({"group_size": 64}, "group", 64),
        ({"strategy": "tensor"}, "tensor", None),
        ({"strategy": "channel", "group_size": -1}, "channel", None),
    ],
)
def test_strategy_and_group_size_imply_each_other(given_words, strategy, group_size):
    scheme = Scheme.parse(given_words, "recipe")
    assert (scheme.strategy, scheme.group_size) == (strategy, group_size)


@pytest.mark.parametrize(
    ("given_words", "said"),
    [
        ({"strategy": "group"}, "needs group_size >= 1"),
        ({"group_size": 0}, "needs group_size >= 1"),
        ({"group_size": -2}, "needs group_size >= 1"),
        ({"strategy": "channel", "group_size": 64}, "needs strategy 'group'"),
        ({"strategy": "tensor", "group_size": 64}, "needs strategy 'group'"),
        ({"strategy": "group", "group_size": -1}, "means strategy 'channel'"),
        ({"strategy": "tensor", "group_size": -1}, "means strategy 'channel'"),
        ({"num_bits": 0}, "1..8"),
        ({"num_bits": 9}, "1..8"),
        ({"num_bits": 4, "bits": 4}, "'num_bits' is given twice"),
        ({"group_size": -1, "q_group_size": 64}, "'group_size' is given twice"),
        ({"symmetric": True, "asym": True}, "both given"),
        ({"asym": True, "zero_point": True}, "both given"),
        ({"scale_dtype": "float8"}, "float8"),
        ({"observer": "percentile"}, "percentile"),
        ({"num_bits": "four"}, "four"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_place_and_the_reason(given_words, said):
    with pytest.raises(RecipeError) as error:
        Scheme.parse(given_words, "recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: ")
    assert said in str(error.value)


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match="unknown key 'grup_size'; did you mean 'group_size'"):
        Scheme.parse({"grup_size": 64}, "recipe")


def test_all_mistakes_are_named_at_once():
    with pytest.raises(RecipeError) as error:
        Scheme.parse({"grup_size": 64, "observr": "mse", "type": "complex"}, "recipe")
    assert all(word in str(error.value) for word in ("grup_size", "observr", "complex"))


def test_an_unknown_preset_is_refused_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match="did you mean 'W4A16'"):
        Scheme.preset("W4A15")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_scheme_whatever_the_case_of_its_name(name):
    assert Scheme.preset(name.lower()) == Scheme.preset(name)
    digit = re.search(r"\d", name)
    assert digit is None or int(digit[0]) == Scheme.preset(name).num_bits


def test_a_preset_can_be_changed():
    scheme = Scheme.preset("W4A16", group_size=64, bits=3)
    assert (scheme.num_bits, scheme.group_size, scheme.symmetric) == (3, 64, True)
    assert Scheme.preset("W4A16", strategy="tensor").group_size is None


def test_a_changed_scheme_is_checked_too():
    with pytest.raises(RecipeError, match=r"1\.\.8"):
        Scheme.preset("W4A16", num_bits=16)


def test_a_scheme_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Scheme().num_bits = 3


def test_a_scheme_survives_its_own_json():
    scheme = Scheme.preset("W3A16", asym=True, scale_dtype="bfloat16")
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme


@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 300),
    bits=st.integers(1, 8),
    group_size=st.none() | st.integers(1, 310),
    tensor=st.booleans(),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_storage_is_what_rows_of_whole_words_take(
    rows, columns, bits, group_size, tensor, symmetric, dtype
):
    scheme = Scheme(
        num_bits=bits,
        strategy="tensor" if tensor else "group" if group_size else "channel",
        group_size=None if tensor else group_size,
        symmetric=symmetric,
        scale_dtype=dtype,
    )
    width = columns if tensor or not group_size else group_size
    groups = 1 if tensor else len(range(0, columns, width or 1))
    scale_rows = 1 if tensor else rows

    def words(codes):
        return 32 * ((codes * bits + 31) // 32)

    assert scheme.scale_shape(rows, columns) == (scale_rows, groups)
    assert scheme.storage_bits(rows, columns) == {
        "codes": rows * words(columns),
        "scale": scale_rows * groups * (32 if dtype == "float32" else 16),
        "zero_point": 0 if symmetric else scale_rows * words(groups),
    }


# Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "int4"),
        ({"num_bits": 3}, "int3"),
        ({"type": "float", "num_bits": 8}, "fp8_e4m3"),
        ({"type": "float"}, "fp4_e2m1"),
        ({"type": "float", "num_bits": 6}, "float6"),
        ({"format": "nf4"}, "nf4"),
        ({"format": "fp8_e5m2"}, "fp8_e5m2"),
        ({"format": "mine", "type": "float", "num_bits": 5}, "mine"),
    ],
)
def test_a_scheme_names_its_format(fields, name):
    assert Scheme.parse(fields, "scheme").format_name == name


def test_a_known_format_brings_its_type_and_bits():
    scheme = Scheme(format="fp8_e5m2")
    assert (scheme.type, scheme.num_bits) == ("float", 8)
    assert Scheme().replace(format="ternary").num_bits == 2
    assert Scheme(format="nf4").replace(num_bits=8).format_name == "fp8_e4m3"
    assert Scheme(format="ternary").replace(num_bits=3).format_name == "int3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "nf4", "num_bits": 8}, "has type 'float' and num_bits 4"),
        ({"format": "nf4", "symmetric": False}, "zero points are for type 'int'"),
        ({"scale_rule": "ocp"}, "scale_rule 'ocp' is for type 'float'"),
        ({"format": "fp4_e2m1", "scale_rule": "ocp"}, "'ocp' is for"),
        ({"scale_dtype": "e5m2"}, "scale_dtype"),
    ],
)
def test_what_does_not_go_together_says_what_to_do(fields, message):
    with pytest.raises(RecipeError, match=message):
        Scheme.parse(fields, "scheme")


def test_the_bits_of_microscaling_are_those_of_the_standards():
    bits = {name: Scheme.preset(name).bits_per_weight(64, 256) for name in ("MXFP4", "MXFP8")}
    assert bits == {"MXFP4": 4 + 8 / 32, "MXFP8": 8 + 8 / 32}
    of_tensor = 32 / (64 * 256)
    assert Scheme.preset("NVFP4").bits_per_weight(64, 256) == 4 + 8 / 16 + of_tensor
