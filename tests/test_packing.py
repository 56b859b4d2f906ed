"""Packed codes are one little-endian stream of bits per row, and give back what was packed."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qframe.contracts import Grid, QuantizedWeight
from qframe.errors import PluginError, WeightsError
from qframe.packing import PackedWeight, pack_codes, unpack_codes
from qframe.rounding import dequantize, group_index, round_up
from qframe.scheme import Scheme
from qframe_conformance.strategies import generators, schemes

BITS = range(1, 9)


# Words ----------------------------------------------------------------------------------------


def stream(codes, num_bits):
    """The layout in words: each row is the number sum_j code_j 2^(b j)."""
    return [sum(code << num_bits * j for j, code in enumerate(row)) for row in codes.tolist()]


def number(words):
    """Each row of 32-bit words as one number, the first word the lowest."""
    return [sum((word % 2**32) << 32 * j for j, word in enumerate(row)) for row in words.tolist()]


@st.composite
def code_arrays(draw, max_rows=4, max_columns=80):
    """(codes, num_bits): any shape, none and single ones included, and any codes."""
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.tuples(st.integers(0, max_rows), st.integers(0, max_columns)))
    return torch.from_numpy(
        draw(hnp.arrays(np.int16, shape, elements=st.integers(0, 2**bits - 1)))
    ), bits


def packs(pack, codes, bits):
    """The property: whole words, and the codes' stream of bits in them."""
    words = pack(codes, bits)
    rows, columns = codes.shape
    width = (columns * bits + 31) // 32
    return (
        words.dtype == torch.int32
        and words.shape == (rows, width)
        and number(words) == stream(codes, bits)
    )


@given(code_arrays())
def test_codes_are_packed_as_one_stream_of_bits_per_row(drawn):
    assert packs(pack_codes, *drawn)


@given(code_arrays())
def test_unpacking_gives_back_the_codes(drawn):
    codes, bits = drawn
    unpacked = unpack_codes(pack_codes(codes, bits), bits, codes.shape[1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.to(codes.dtype), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_at_every_place_of_a_word(bits):
    codes = torch.arange(2**bits)[:, None].expand(-1, 33).contiguous()
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 33), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_are_packed_as_small_ones_are(bits):
    codes = torch.randint(0, 2**bits, (70, 1999), generator=torch.Generator().manual_seed(bits))
    words = pack_codes(codes, bits)
    assert torch.equal(words, torch.cat([pack_codes(row[None], bits) for row in codes]))
    assert torch.equal(unpack_codes(words, bits, 1999), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_thirty_two_codes_of_b_bits_are_b_words(bits):
    assert pack_codes(torch.zeros(1, 32, dtype=torch.int16), bits).shape == (1, bits)


@given(code_arrays().filter(lambda drawn: drawn[1] in (2, 4, 8)))
def test_two_four_and_eight_bits_lie_as_in_compressed_tensors(drawn):
    codes, bits = drawn
    factor = 32 // bits  # its rule: code i of a word is shifted by i * num_bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % factor))
    words = sum(padded[:, i::factor] << bits * i for i in range(factor))
    assert torch.equal(pack_codes(codes, bits), words.to(torch.int32))


def test_columns_that_are_not_contiguous_are_packed_as_they_read():
    codes = torch.arange(16).reshape(4, 4).t()
    assert torch.equal(pack_codes(codes, 4), pack_codes(codes.contiguous(), 4))
    words = pack_codes(codes, 4).t().contiguous().t()
    assert torch.equal(unpack_codes(words, 4, 4), codes.to(torch.uint8))


@pytest.mark.parametrize(("bits", "wrong"), [(4, 16), (4, -1), (3, 8), (8, 256), (1, 2)])
def test_a_code_that_does_not_fit_is_refused_before_it_spills_into_its_neighbour(bits, wrong):
    with pytest.raises(ValueError, match=f"codes of {bits} bits"):
        pack_codes(torch.tensor([[0, wrong]]), bits)


def nibbles_swapped(codes, bits):
    words = pack_codes(codes, bits).numpy().view(np.uint8)
    return torch.from_numpy((words << 4 | words >> 4).view(np.int32))


def highest_bit_first(codes, bits):
    return pack_codes(codes.flip(1), bits)


def padded_between_words(codes, bits):
    """No code crosses a word, as GPTQ's int32 layout has it for 3 bits in some kernels."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    words = padded.reshape(-1, per_word).to(torch.int64)
    packed = sum(words[:, i] << bits * i for i in range(per_word))
    return packed.to(torch.int32).reshape(len(codes), -1)


def rows_run_together(codes, bits):
    words = pack_codes(codes.reshape(1, -1), bits)
    return words.reshape(len(codes), -1) if words.shape[1] % len(codes) == 0 else words


def last_word_forgotten(codes, bits):
    return pack_codes(codes, bits)[:, :-1]


@pytest.mark.parametrize(
    ("wrong", "bits"),
    [
        (nibbles_swapped, 4),
        (highest_bit_first, 4),
        (padded_between_words, 3),
        (padded_between_words, 5),
        (rows_run_together, 4),
        (last_word_forgotten, 4),
    ],
)
def test_the_layout_test_rejects(wrong, bits):
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 2**bits, (3, 45)))
    assert packs(pack_codes, codes, bits)
    assert not packs(wrong, codes, bits)


# Layers ---------------------------------------------------------------------------------------


@st.composite
def layers(draw, **fixed):
    """(QuantizedWeight, Scheme, Grid): any codes, scales and groups that a rounder may return."""
    rows, columns = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    scheme = draw(schemes(columns, **{"num_bits": st.sampled_from(BITS[1:]), **fixed}))
    half = 2 ** (scheme.num_bits - 1)
    first = draw(st.sampled_from([0, -half, 3]))  # another format may count from elsewhere
    grid = Grid(first, first + 2 * half - 1)
    if scheme.symmetric:
        grid = Grid(-half if scheme.scale_rule == "full" else 1 - half, half - 1)
    rng = draw(generators())
    shape = scheme.scale_shape(rows, columns)
    scale = round_up(
        torch.from_numpy(np.float32(2.0 ** rng.uniform(-30, 12, shape))), scheme.scale_dtype
    )
    zero = np.zeros(shape) if scheme.symmetric else rng.integers(grid.qmin, grid.qmax + 1, shape)
    index = group_index(columns, scheme)
    if draw(st.booleans()):
        index = index[torch.from_numpy(rng.permutation(columns))]
    quantized = QuantizedWeight(
        codes=torch.from_numpy(rng.integers(grid.qmin, grid.qmax + 1, (rows, columns), np.int16)),
        scale=scale,
        zero_point=torch.from_numpy(zero.astype(np.int16)),
        group_index=index,
    )
    return quantized, scheme, grid


def a_layer(**fixed):
    """One ordinary layer, [3, 20] in 4 bits and ragged groups of 8."""
    scheme = Scheme(**{"group_size": 8, "symmetric": False, **fixed})
    grid = Grid(0, 15)
    if scheme.symmetric:
        grid = Grid(-8 if scheme.scale_rule == "full" else -7, 7)
    rng = np.random.default_rng(0)
    shape = scheme.scale_shape(3, 20)
    zero = np.zeros(shape) if scheme.symmetric else rng.integers(0, 16, shape)
    quantized = QuantizedWeight(
        codes=torch.from_numpy(rng.integers(grid.qmin, grid.qmax + 1, (3, 20), np.int16)),
        scale=torch.from_numpy(np.float32(rng.integers(1, 99, shape) / 64)),
        zero_point=torch.from_numpy(zero.astype(np.int16)),
        group_index=group_index(20, scheme),
    )
    return quantized, scheme, grid


def same(one, other):
    """Whether two quantized weights are the same numbers of the same types."""
    fields = ("codes", "scale", "zero_point", "group_index")
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def keeps(pack, quantized, scheme, grid):
    """The property: through files and back, nothing changes, and values are bit-identical."""
    packed = pack(quantized, scheme, grid)
    rows, columns = quantized.codes.shape
    stored = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = PackedWeight.from_tensors(
        stored, scheme, grid, name="layer", rows=rows, columns=columns
    )
    return (
        same(packed.unpack(), quantized)
        and same(again.unpack(), quantized)
        and torch.equal(again.dequantize(), dequantize(quantized))
    )


@given(layers())
def test_a_layer_comes_back_from_its_tensors_bit_by_bit(layer):
    assert keeps(PackedWeight.pack, *layer)


@given(layers())
def test_a_layer_takes_exactly_the_bits_that_its_scheme_promises(layer):
    quantized, scheme, grid = layer
    rows, columns = quantized.codes.shape
    promised = sum(scheme.storage_bits(rows, columns).values())
    if not torch.equal(quantized.group_index, group_index(columns, scheme)):
        promised += 32 * columns
    packed = PackedWeight.pack(quantized, scheme, grid)
    assert packed.bits == promised
    assert packed.bits == sum(8 * t.nbytes for t in packed.tensors().values())


def lies_there(pack, quantized, scheme, grid):
    """The property: packed codes go where they are told to, and nothing else is touched."""
    apart = PackedWeight.pack(quantized, scheme, grid).words
    rows, room = len(apart), torch.full((len(apart) + 2, apart.shape[1]), -7, dtype=torch.int32)
    packed = pack(quantized, scheme, grid, words=room[1 : 1 + rows])
    return (
        packed.words.data_ptr() == room[1 : 1 + rows].data_ptr()
        and torch.equal(room[1 : 1 + rows], apart)
        and bool((room[0] == -7).all() and (room[-1] == -7).all())
    )


@given(layers())
def test_codes_are_packed_where_they_are_to_lie(layer):
    assert lies_there(PackedWeight.pack, *layer)


def test_the_place_test_rejects_memory_of_its_own():
    assert lies_there(PackedWeight.pack, *a_layer())
    assert not lies_there(lambda *layer, words: PackedWeight.pack(*layer), *a_layer())


@given(layers())
def test_only_what_says_something_is_stored(layer):
    quantized, scheme, grid = layer
    names = {"weight_packed", "weight_scale"}
    if not scheme.symmetric:
        names.add("weight_zero_point")
    if not torch.equal(quantized.group_index, group_index(quantized.codes.shape[1], scheme)):
        names.add("weight_g_idx")
    tensors = PackedWeight.pack(quantized, scheme, grid).tensors()
    assert set(tensors) == names
    assert str(tensors["weight_scale"].dtype) == f"torch.{scheme.scale_dtype}"


def scale_not_the_stored_one(quantized, scheme, grid):
    return PackedWeight.pack(
        dataclasses.replace(quantized, scale=quantized.scale * 2), scheme, grid
    )


def zero_point_left_out(quantized, scheme, grid):
    return dataclasses.replace(
        PackedWeight.pack(quantized, scheme, grid),
        zero_point=torch.zeros_like(PackedWeight.pack(quantized, scheme, grid).zero_point),
    )


def groups_shifted(quantized, scheme, grid):
    return PackedWeight.pack(
        dataclasses.replace(quantized, group_index=quantized.group_index.roll(1)), scheme, grid
    )


def codes_not_moved_to_zero(quantized, scheme, grid):
    moved = (quantized.codes + 1).clamp(max=grid.qmax)
    return PackedWeight.pack(dataclasses.replace(quantized, codes=moved), scheme, grid)


@pytest.mark.parametrize(
    "wrong",
    [scale_not_the_stored_one, zero_point_left_out, groups_shifted, codes_not_moved_to_zero],
)
def test_the_round_trip_test_rejects(wrong):
    assert keeps(PackedWeight.pack, *a_layer())
    assert not keeps(wrong, *a_layer())


# Refusals -------------------------------------------------------------------------------------


def spoiled(**changes):
    """The tensors of `a_layer`, each change a function of the tensor, or None to leave it out."""
    packed = PackedWeight.pack(*a_layer())
    tensors = packed.tensors()
    for name, change in changes.items():
        tensors[name] = change(tensors[name].clone()) if change else None
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def put(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_packed": None}, "weight_packed missing"),
        ({"weight_scale": None, "weight_zero_point": None}, "weight_scale and weight_zero_point"),
        ({"weight_packed": lambda t: t[:, :-1]}, "weight_packed should be torch.int32 [3, 3]"),
        ({"weight_packed": lambda t: t[:-1]}, "got torch.int32 [2, 3]"),
        ({"weight_packed": lambda t: t.to(torch.int64)}, "got torch.int64"),
        ({"weight_packed": put((1, -1), 1 << 30)}, "bits behind its last column"),
        ({"weight_packed": put((2, -1), -1)}, "bits behind its last column"),
        ({"weight_zero_point": put((0, 0), 1 << 12)}, "bits behind its last column"),
        ({"weight_zero_point": lambda t: t.flatten()}, "weight_zero_point should be"),
        ({"weight_scale": lambda t: t.float()}, "scale should be torch.float16"),
        ({"weight_scale": lambda t: t[:, :1]}, "scale should be torch.float16 [3, 3]"),
        ({"weight_scale": put((1, 2), 0.0)}, "a scale is 0.0"),
        ({"weight_scale": put((1, 2), -1.0)}, "a scale is -1.0"),
        ({"weight_scale": put((1, 2), float("nan"))}, "a scale is nan"),
        ({"weight_scale": put((1, 2), float("inf"))}, "a scale is inf"),
    ],
)
def test_tensors_that_pack_cannot_have_written_are_refused_by_layer(changes, said):
    _, scheme, grid = a_layer()
    with pytest.raises(WeightsError) as error:
        PackedWeight.from_tensors(
            spoiled(**changes), scheme, grid, name="block.3.up", rows=3, columns=20
        )
    assert "'block.3.up'" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (torch.full((20,), 3, dtype=torch.int32), "groups are 0..2"),
        (torch.full((20,), -1, dtype=torch.int32), "groups are 0..2"),
        (torch.zeros(19, dtype=torch.int32), "should be torch.int32 [20]"),
        (torch.zeros(20, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_a_group_index_without_a_group_is_refused_by_layer(index, said):
    _, scheme, grid = a_layer()
    with pytest.raises(WeightsError, match="block") as error:
        PackedWeight.from_tensors(
            {**spoiled(), "weight_g_idx": index}, scheme, grid, name="block", rows=3, columns=20
        )
    assert said in str(error.value)


def test_a_code_above_a_restricted_grid_is_refused_by_layer():
    quantized, scheme, grid = a_layer(symmetric=True, scale_rule="restricted")
    tensors = PackedWeight.pack(quantized, scheme, grid).tensors()
    tensors["weight_packed"][1, 1] |= 0xF  # 15 stands for code 8, which is not on -7..7
    with pytest.raises(WeightsError, match=r"'block': weight_packed holds code 8"):
        PackedWeight.from_tensors(tensors, scheme, grid, name="block", rows=3, columns=20)


def test_zero_points_with_a_symmetric_scheme_are_refused_by_layer():
    _, scheme, grid = a_layer(symmetric=True)
    with pytest.raises(WeightsError, match="'block': weight_zero_point with a symmetric"):
        PackedWeight.from_tensors(spoiled(), scheme, grid, name="block", rows=3, columns=20)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("codes", put((0, 0), 16), "codes in [0, 16], but the grid is [0, 15]"),
        ("codes", put((0, 0), -1), "codes in [-1, 15]"),
        ("codes", lambda t: t.to(torch.int32), "codes should be torch.int16"),
        ("zero_point", put((0, 0), 16), "zero points in"),
        ("zero_point", lambda t: t[:, :1], "zero points should be torch.int16 [3, 3]"),
        ("scale", put((0, 0), 0.1), "not numbers of scale_dtype='float16'"),
        ("scale", put((0, 0), 0.0), "a scale is 0.0"),
        ("scale", put((0, 0), 1e6), "a scale is inf"),
        ("scale", lambda t: t[:, :1], "scale should be"),
        ("group_index", put(0, 3), "groups are 0..2"),
    ],
)
def test_what_a_rounder_must_not_return_is_refused_by_layer(field, change, said):
    quantized, scheme, grid = a_layer()
    spoiled_one = dataclasses.replace(
        quantized, **{field: change(getattr(quantized, field).clone())}
    )
    with pytest.raises(PluginError) as error:
        PackedWeight.pack(spoiled_one, scheme, grid, name="block")
    assert "'block'" in str(error.value)
    assert said in str(error.value)


def test_zero_points_of_a_symmetric_scheme_must_be_zero():
    quantized, scheme, grid = a_layer(symmetric=True)
    shifted = dataclasses.replace(quantized, zero_point=quantized.zero_point + 1)
    with pytest.raises(PluginError, match="symmetric scheme must be 0"):
        PackedWeight.pack(shifted, scheme, grid)
