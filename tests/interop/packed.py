"""Layers to pack, and GPTQ's and AWQ's formats a second time: one code after the other."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from qframe import Host, LayerInfo, QuantizedWeight, Scheme
from qframe.errors import WeightsError
from qframe.packing import PackedWeight
from qframe.rounding import round_up
from qframe.stored import StoredLayer
from qframe.stored_model import outline_of

HOST = Host.discover()
WORD = (1 << 32) - 1
DTYPES = ("float16", "bfloat16", "float32")


@st.composite
def packed_layers(draw, bits, sizes, *, symmetric=(True, False), dtypes=DTYPES, index=True):
    """Return (outline, layer): any codes, scales, zero points, and groups in any order."""
    fields = {
        "num_bits": draw(st.sampled_from(bits)),
        "symmetric": draw(st.sampled_from(symmetric)),
    }
    fields["scale_dtype"] = draw(st.sampled_from(dtypes))
    if fields["symmetric"]:
        fields["scale_rule"] = draw(st.sampled_from(["full", "restricted"]))
    rows, columns = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    widths = [width for width in (1, 8, 16, 32, columns) if columns % width == 0]
    fields["group_size"] = draw(st.sampled_from([-1, *widths]))
    scheme = Scheme.parse(fields, "drawn")
    order = index and draw(st.booleans())
    return layer_of(scheme, rows, columns, draw(st.integers(0, 2**32)), order=order)


def layer_of(scheme, rows, columns, seed, *, order=False):
    """Return (outline, layer) with any numbers, and groups in any order where that is wanted."""
    outline = outline_of(HOST, LayerInfo(name="block.layer", rows=rows, columns=columns), scheme)
    rng = np.random.default_rng(seed)
    grid, groups = outline.grid, scheme.scale_shape(rows, columns)
    codes = rng.integers(grid.qmin, grid.qmax + 1, (rows, columns))
    zeros = rng.integers(grid.qmin, grid.qmax + 1, groups) * (not scheme.symmetric)
    power = rng.integers(-14, 8, groups)
    scale = torch.from_numpy(np.float32(np.ldexp(1 + rng.random(groups), power)))
    of = np.arange(columns) // scheme.group_width(columns)
    quantized = QuantizedWeight(
        codes=torch.from_numpy(codes.astype(np.int16)),
        scale=round_up(scale, scheme.scale_dtype),
        zero_point=torch.from_numpy(zeros.astype(np.int16)),
        group_index=torch.from_numpy((rng.permutation(of) if order else of).astype(np.int32)),
    )
    return outline, StoredLayer(PackedWeight.pack(quantized, scheme, grid))


def said_shapes(layout, outline):
    """Return what `shapes` says, as torch has it: part -> (dtype, shape)."""
    dtypes = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes["F32"] = torch.float32
    return {part: (dtypes[kind], shape) for part, (kind, shape) in layout.shapes(outline).items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def fields_of(words, bits, count):
    """Return the first `count` numbers of `bits` bits of words, which are one stream of bits."""
    stream = sum((int(word) & WORD) << 32 * place for place, word in enumerate(words))
    return [stream >> bits * place & (1 << bits) - 1 for place in range(count)]


def words_of(numbers, bits):
    """Return words, int32, given numbers of `bits` bits."""
    stream = sum(int(number) << bits * place for place, number in enumerate(numbers))
    words = [stream >> 32 * place & WORD for place in range(len(numbers) * bits // 32)]
    return np.array(words, np.uint32).view(np.int32)


def damaged(draw, tensors):
    """Return tensors of a layer, one of which is missing or has other bits, dtype or shape."""
    tensors = dict(tensors)
    part = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(part)
    kind = draw(st.sampled_from(["missing", "bits", "dtype", "shape", "twice", "empty"]))
    if kind == "bits":
        data = tensor.clone().reshape(-1).view(torch.uint8)
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        tensors[part] = data.view(tensor.dtype).reshape(tensor.shape)
    elif kind == "dtype":
        tensors[part] = tensor.float().to(draw(st.sampled_from([torch.float64, torch.int16])))
    elif kind == "shape":
        tensors[part] = tensor.reshape(-1)
    elif kind == "twice":
        tensors[part] = torch.cat((tensor.reshape(-1), tensor.reshape(-1)))
    elif kind == "empty":
        tensors[part] = tensor[:0]
    return tensors


def refused_or_valued(layout, tensors, outline):
    """Whatever a layer's tensors are: an error that names the layer, or numbers of its shape."""
    try:
        read = layout.unpack(tensors, outline)
    except WeightsError as error:
        said = str(error)
    else:
        said = outline.info.name
        assert tuple(read.weight().shape) == (outline.info.rows, outline.info.columns)
    assert outline.info.name in said


def change(file, how):
    """Change what a JSON file holds."""
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def imported(module, package):
    """Return a module of another package, which may warn while it is imported, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            module, exc_type=ImportError, reason=f"{package} is not installed (docs/formats.md)"
        )
