"""Checkpoints of others that readers open: weights to the bit, and planted faults by name."""

import json
import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qframe import Host, bounds
from qframe.audit import audit
from qframe.contracts import CodedLayer, CodedWeight, Grid
from qframe.errors import UnsupportedError, VerifyError, WeightsError
from qframe_plugins.readers.bitsandbytes import BitsAndBytesReader
from qframe_plugins.readers.gguf import GGUFReader
from qframe_plugins.readers.gguf_blocks import KINDS
from tests import others

from .packed import imported

LAYER, OTHER = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
UP, GATE = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"  # 96 x 64
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")  # by the package gguf itself
BITSANDBYTES = ("int8", "nf4", "fp4", "nested")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny Llama whose output layer is one of its own."""
    return others.tiny_model(tmp_path_factory.mktemp("readers") / "model")


def decoded(coded):
    """Return scale v + offset in float32, group by group."""
    codes, grid = coded.codes.numpy(), coded.grid
    values = codes if grid.values is None else np.array(grid.values)[codes - grid.qmin]
    grouped = np.float32(values).reshape(*coded.scale.shape, -1)
    scale, offset = (np.float32(each.numpy())[..., None] for each in (coded.scale, coded.offset))
    return (grouped * scale + offset).reshape(codes.shape)


# Numbers ----------------------------------------------------------------------------------------


@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**32), count=st.integers(1, 3))
def test_blocks_stand_for_what_the_package_gguf_says(tmp_path_factory, kind, seed, count):
    raw = others.random_blocks(kind, count, seed)
    file = tmp_path_factory.mktemp("blocks") / "any.gguf"
    checkpoint = GGUFReader().open(others.write_blocks(file, {kind: raw}))
    [(name, layer)] = checkpoint.layers.items()
    coded = checkpoint.read(name)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(1, -1)
    assert np.array_equal(coded.weight.numpy(), wanted)
    assert np.array_equal(decoded(coded), wanted)
    assert layer.kind == kind
    assert coded.grid.qmin <= int(coded.codes.min()) <= int(coded.codes.max()) <= coded.grid.qmax


@pytest.mark.parametrize("kind", WRITTEN)
def test_rows_and_names_are_those_of_transformers(model, tmp_path, kind):
    checkpoint = GGUFReader().open(others.write_gguf(model, tmp_path / "a.gguf", kind))
    original = load_file(model / "model.safetensors")
    stored = gguf.GGMLQuantizationType[kind]
    assert checkpoint.missing() == []
    assert len(checkpoint.layers) == 14
    for name in checkpoint.layers:
        weight = original[f"{name}.weight"].numpy()
        wanted = gguf.quants.dequantize(gguf.quants.quantize(weight, stored), stored)
        assert np.array_equal(checkpoint.read(name).weight.numpy(), wanted), name
    assert set(checkpoint.carried) == {n for n in original if not n.endswith("_proj.weight")}


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_folders_of_bitsandbytes_are_what_they_were_made_of(model, tmp_path, kind):
    checkpoint = BitsAndBytesReader().open(
        others.write_bitsandbytes(model, tmp_path / "out", kind, 32)
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert checkpoint.missing() == []
    assert len(checkpoint.layers) == 14
    for name in checkpoint.layers:
        coded = checkpoint.read(name)
        raw = tensors[f"{name}.weight"]
        if kind == "int8":
            wanted = raw.float() * tensors[f"{name}.SCB"][:, None] * (1 / 127)
        else:
            table = torch.tensor(others.FP4 if kind == "fp4" else others.NF4)
            both = torch.stack([raw.flatten() >> 4, raw.flatten() & 15], 1).flatten().int()
            scale = tensors[f"{name}.weight.absmax"]
            if kind == "nested":
                state = tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"]
                of = torch.arange(len(scale)) // 256
                scale = tensors[f"{name}.weight.nested_quant_map"][scale.int()]
                scale = scale * tensors[f"{name}.weight.nested_absmax"][of]
                scale = scale + torch.tensor(json.loads(bytes(state.tolist()))["nested_offset"])
            wanted = table[both].reshape(-1, 32) * scale[:, None]
        assert torch.equal(coded.weight.flatten(), wanted.flatten()), name
        if kind != "int8":
            assert np.array_equal(decoded(coded), coded.weight.numpy())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4", "nested"])
def test_bitsandbytes_itself_decodes_the_same(model, tmp_path, kind, dtype):
    functional = imported("bitsandbytes.functional", "bitsandbytes")
    folder = others.write_bitsandbytes(model, tmp_path / "out", "int8" if kind == "int8" else "nf4")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.startswith(f"{LAYER}.")]:
        del tensors[name]
    if kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        tensors |= {f"{LAYER}.weight": codes, f"{LAYER}.SCB": largest}
        wanted = functional.int8_vectorwise_dequant(codes, largest)
    else:
        codes, state = functional.quantize_4bit(
            weight,
            blocksize=64,
            quant_type="fp4" if kind == "fp4" else "nf4",
            compress_statistics=kind == "nested",
        )
        tensors[f"{LAYER}.weight"] = codes
        tensors |= {f"{LAYER}.weight.{n}": t for n, t in state.as_dict(packed=True).items()}
        wanted = functional.dequantize_4bit(codes, state)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    coded = BitsAndBytesReader().open(folder).read(LAYER)
    assert torch.equal(coded.weight, wanted.float())
    found = one_layer(coded, weight.float())
    assert found.half_steps <= 1


def one_layer(coded, weight):
    """Return the figures of a layer, compared with its original."""
    from qframe import audit_coded
    from qframe.audit_report import AuditReport

    layer = CodedLayer(
        name="a", rows=len(weight), columns=weight.shape[1], kind="any", num_bits=4, bytes=0
    )
    report = AuditReport(folder="", layout="any")
    folder = SimpleNamespace(tensors={"a.weight": None}, read=lambda name: weight)
    figures = audit_coded._figures(layer, coded)
    return audit_coded._compared(report, folder, layer, coded, figures, Host.discover(), None)


@given(data=st.data())
def test_b1h_holds_for_codes_that_are_chosen_before_scales_are_stored(data):
    """Codes for s' in float64, scales stored as float16; a code that is one off breaks it."""
    seed = data.draw(st.integers(0, 2**32))
    size = data.draw(st.sampled_from([1.0, 2.0**-10, 2.0**-20]))
    offsets = data.draw(st.booleans())
    rng = np.random.default_rng(seed)
    weight = np.float32(rng.normal(size=(4, 64)) * size)
    groups = weight.reshape(4, 4, 16).astype(np.float64)
    sign = rng.choice([-1.0, 1.0], (4, 4)) if not offsets else np.ones((4, 4))
    low = groups.min(-1) if offsets else np.zeros((4, 4))
    span = (groups.max(-1) - low) / 15 if offsets else np.abs(groups).max(-1) / 7.5 * sign
    grid = Grid(0, 15) if offsets else Grid(-8, 7)
    codes = np.clip(np.rint((groups - low[..., None]) / span[..., None]), grid.qmin, grid.qmax)
    scale, offset = np.float64(np.float16(span)), np.float64(np.float16(low))

    def coded(codes):
        values = np.float32(codes * scale[..., None] + offset[..., None])
        return CodedWeight(
            codes=torch.from_numpy(codes.astype(np.int16).reshape(4, 64)),
            grid=grid,
            scale=torch.from_numpy(scale),
            offset=torch.from_numpy(offset),
            weight=torch.from_numpy(values.reshape(4, 64)),
            scale_moved=torch.from_numpy(bounds.stored_apart(scale, "float16")),
            offset_moved=torch.from_numpy(bounds.stored_apart(offset, "float16")),
        )

    found = one_layer(coded(codes), torch.from_numpy(weight))
    assert found.half_steps <= 1
    assert found.farther == 0
    if size == 1:
        codes[1, 2, 3] += 1 if codes[1, 2, 3] < 0 + 8 * offsets else -1
        codes[1, 2, 4] += 2 if codes[1, 2, 4] < 0 + 8 * offsets else -2
        assert one_layer(coded(codes), torch.from_numpy(weight)).farther >= 1


def by_hand(codes, grid, scale=1.0):
    """Return a layer of one group, at a scale that was not rounded."""
    codes = torch.tensor([codes], dtype=torch.int16)
    scales = torch.tensor([[scale]], dtype=torch.float64)
    return CodedWeight(
        codes=codes,
        grid=grid,
        scale=scales,
        offset=scales * 0,
        weight=codes * scales.float(),
        scale_moved=scales * 0,
        offset_moved=scales * 0,
    )


@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-130])
@pytest.mark.parametrize(
    ("weight", "farther"),
    [(2.5, 0), (2.5625, 1), (1.4375, 1), (7.9, 0), (-8.5, 0), (-9.0, 0), (6.4, 1)],
)
def test_a_code_is_farther_from_half_a_step_on(scale, weight, farther):
    code = 2 if abs(weight) < 4 else (7 if weight > 0 else -8)
    coded = by_hand([0, code], Grid(-8, 7), scale)
    found = one_layer(coded, torch.tensor([[0.0, weight * scale]]))
    assert found.farther == farther
    assert (found.half_steps > 1) == farther


@pytest.mark.parametrize(
    ("grid", "codes", "idle"),
    [
        (Grid(0, 15), [3, 10], 1),
        (Grid(0, 15), [3, 11], 0),
        (Grid(-8, 7), [-3, 3], 1),
        (Grid(-8, 7), [-4, 0], 0),
        (Grid(-8, 7), [0, 4], 0),
    ],
)
def test_a_group_is_idle_that_uses_less_than_half_of_its_codes(grid, codes, idle):
    coded = by_hand(codes, grid)
    assert one_layer(coded, coded.weight).idle == idle


# Planted faults: GGUF ---------------------------------------------------------------------------


def in_blocks(part, data):
    """Return a change: of each block of the layer, the bytes of a slice become others."""

    def change(tensors):
        raw = tensors[UP].reshape(-1, 18).copy()
        raw[:, part] = data
        tensors[UP] = raw.reshape(tensors[UP].shape)

    return change


def half(value):
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def put_scale(value, every=None):
    def change(tensors):
        raw = tensors[UP].reshape(-1, 18).copy()
        raw[slice(5, 6) if every is None else slice(None, None, every), :2] = half(value)
        tensors[UP] = raw.reshape(tensors[UP].shape)

    return change


def one_bit(tensors):
    tensors[UP] = tensors[UP].copy()
    tensors[UP][17, 10] ^= 4


def swap(tensors):
    tensors[UP], tensors[GATE] = tensors[GATE], tensors[UP]


def nibbles_swapped(tensors):
    raw = tensors[UP].reshape(-1, 18).copy()
    raw[:, 2:] = raw[:, 2:] >> 4 | raw[:, 2:] << 4
    tensors[UP] = raw.reshape(tensors[UP].shape)


def not_interleaved(tensors):
    name = "blk.0.attn_q.weight"
    rows = tensors[name].reshape(4, 8, 2, -1)
    tensors[name] = rows.swapaxes(1, 2).reshape(tensors[name].shape)


def dead_groups(tensors):
    raw = tensors[UP].reshape(-1, 18).copy()
    raw[::16, 2:] = 0x88
    tensors[UP] = raw.reshape(tensors[UP].shape)


PLANTED = {
    "a scale is NaN": (put_scale(np.nan), "structure", "a scale is nan (row 2 of the file"),
    "a scale is infinite": (put_scale(np.inf), "structure", "a scale is inf"),
    "a layer is missing": (lambda t: t.pop(UP), "completeness", "not in the file"),
    "all scales are 1": (put_scale(1.0, 1), "default scales", "all 192 scales are 1"),
    "a scale is huge": (put_scale(3000.0), "scale range", "times the median"),
    "all codes are 0": (in_blocks(slice(2, 18), 0x88), "dead groups", "100 % of groups"),
    "all scales are 0": (put_scale(0.0, 1), "dead groups", "100 % of groups"),
    "some groups are 0": (dead_groups, "dead groups", "6.25 % of groups"),
    "all codes are the least": (in_blocks(slice(2, 18), 0), "saturated codes", "100 %"),
    "halves are swapped": (nibbles_swapped, "reference", "||W - Q|| is 1."),
    "layers are swapped": (swap, "reference", "||W - Q|| is 1."),
    "rows of heads as others have them": (not_interleaved, "reference", "||W - Q|| is 1."),
    "a bit has flipped": (one_bit, "single codes", "1 of 6144 codes are not the nearest"),
    "a plain weight as well": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}),
        "completeness",
        "both as codes and as a weight",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_faults_of_gguf_files_are_named(model, tmp_path, fault):
    change, check, message = PLANTED[fault]
    report = audit(others.write_gguf(model, tmp_path / "a.gguf", change=change), model)
    layer = "model.layers.0.self_attn.q_proj" if "heads" in fault else LAYER
    found = [f for f in report.findings if f.layer == layer]
    assert check in [f.check for f in found if message in f.message]
    assert {f.layer for f in report.findings} <= {layer, OTHER}
    assert (report.exit_code == 4) == any(f.severity == "error" for f in report.findings)
    assert str(found[0]).startswith(f"{found[0].severity} {layer}: ")


@pytest.mark.parametrize("kind", WRITTEN)
def test_nothing_is_found_in_sound_gguf_files(model, tmp_path, kind):
    report = audit(others.write_gguf(model, tmp_path / "a.gguf", kind), model)
    assert report.findings == []
    assert len(report.layers) == 14
    assert all(f.half_steps <= 1 and f.farther == 0 for f in report.layers.values())
    known = [f.above_least for f in report.layers.values() if f.above_least is not None]
    assert len(known) == (14 if kind == "Q4_0" else 0)
    assert all(found >= 1 for found in known)


def damaged(file, place, data):
    raw = bytearray(file.read_bytes())
    raw[place : place + len(data)] = data
    file.write_bytes(raw)
    return file


def offset_of(file, name):
    """Return where the place of a tensor stands in the file."""
    raw = file.read_bytes()
    return raw.index(name.encode()) + len(name) + 4 + 16 + 4


HEADERS = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "it may be truncated"),
    "overlapping": (
        lambda f: damaged(f, offset_of(f, GATE), f.read_bytes()[offset_of(f, UP) :][:8]),
        "lie in the same place",
    ),
    "not aligned": (lambda f: damaged(f, offset_of(f, UP), struct.pack("<Q", 33)), "not aligned"),
    "an unknown type": (lambda f: damaged(f, offset_of(f, UP) - 4, b"\x63\0\0\0"), "has type 99"),
    "another version": (lambda f: damaged(f, 4, b"\x01"), "GGUF of version 1"),
    "no magic": (lambda f: damaged(f, 0, b"GGML"), "does not begin with GGUF"),
    "many tensors": (lambda f: damaged(f, 8, b"\xff" * 7), "promised, which the file does not"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_cannot_be_are_refused(model, tmp_path, fault):
    change, message = HEADERS[fault]
    file = others.write_gguf(model, tmp_path / "a.gguf")
    change(file)
    with pytest.raises(WeightsError, match=message) as caught:
        audit(file)
    assert str(file) in str(caught.value)


def test_parts_of_files_and_other_files_are_refused(model, tmp_path):
    file = others.write_gguf(model, tmp_path / "a.gguf", **{"split.count": 2})
    with pytest.raises(WeightsError, match="one of 2 parts of a file"):
        audit(file)
    other = tmp_path / "a.txt"
    other.write_text("text")
    with pytest.raises(VerifyError, match="known: bitsandbytes, gguf"):
        audit(other)


def test_types_that_are_not_known_are_said_not_to_have_been_audited(tmp_path):
    raw = {"Q4_0": others.random_blocks("Q4_0", 8, 0), "IQ2_S": np.zeros((1, 82), np.uint8)}
    report = audit(others.write_blocks(tmp_path / "a.gguf", raw))
    said = [f for f in report.findings if "was not audited: IQ2_S" in f.message]
    assert [(f.layer, f.check, f.severity) for f in said] == [
        ("model.layers.1.mlp.up_proj", "completeness", "warning")
    ]


def test_names_that_nobody_gives_are_read(tmp_path):
    raw = {"Q4_0": others.random_blocks("Q4_0", 8, 0)}
    file = others.write_blocks(tmp_path / "a.gguf", raw)
    damaged(file, file.read_bytes().index(b".0.ffn_up"), b"-0-ffn-up")
    assert list(audit(file).layers) == ["blk-0-ffn-up"]


def test_blocks_that_are_not_there_are_missed(model, tmp_path):
    file = others.write_gguf(model, tmp_path / "a.gguf", block_count=3)
    found = audit(file).errors()
    assert {f.layer.split(".")[2] for f in found} == {"2"}
    assert len(found) == 9


# Planted faults: bitsandbytes -------------------------------------------------------------------

STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def replace(part, make):
    def change(tensors):
        tensors[f"{LAYER}.{part}"] = make(tensors[f"{LAYER}.{part}"].clone())

    return change


def put(place, value):
    def make(tensor):
        tensor.view(-1)[place] = value
        return tensor

    return make


def state(**changes):
    def change(tensors):
        content = json.loads(bytes(tensors[STATE].tolist()))
        raw = json.dumps({**content, **changes}).encode()
        tensors[STATE] = torch.tensor(list(raw)).to(torch.uint8)

    return change


def flip(place):
    def make(tensor):
        tensor.view(-1)[place] ^= 16
        return tensor

    return make


def swapped(tensors):
    for part in ("weight", "weight.absmax"):
        first, second = f"{LAYER}.{part}", f"{OTHER}.{part}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


OF_FOLDERS = {
    "absmax is NaN": ("nf4", replace("weight.absmax", put(3, torch.nan)), "structure", "is nan"),
    "absmax is negative": ("nf4", replace("weight.absmax", put(3, -1.0)), "structure", "is -1"),
    "absmax is short": ("nf4", replace("weight.absmax", lambda t: t[1:]), "structure", "[95]"),
    "another quant_map": (
        "nf4",
        replace("weight.quant_map", lambda t: t.roll(1)),
        "structure",
        "quant_map is not that of nf4",
    ),
    "codes are cut": ("nf4", replace("weight", lambda t: t[1:]), "structure", "3071 bytes"),
    "absmax is missing": (
        "nf4",
        lambda t: t.pop(f"{LAYER}.weight.absmax"),
        "structure",
        "weight.absmax missing",
    ),
    "all absmax are 1": (
        "nf4",
        replace("weight.absmax", torch.ones_like),
        "default scales",
        "all 96 scales are 1",
    ),
    "absmax is huge": ("nf4", replace("weight.absmax", put(3, 3e4)), "scale range", "the median"),
    "all codes are 0": ("nf4", replace("weight", lambda t: t * 0 + 0x77), "dead groups", "100 %"),
    "all codes are ends": (
        "nf4",
        replace("weight", lambda t: t * 0 + 0xF0),
        "saturated codes",
        "100 %",
    ),
    "layers are swapped": ("nf4", swapped, "reference", "||W - Q|| is 1."),
    "a bit has flipped": ("nf4", replace("weight", flip(70)), "single codes", "1 of 6144"),
    "the block is another": ("nf4", state(blocksize=32), "structure", "absmax should be 192"),
    "nested_absmax is infinite": (
        "nested",
        replace("weight.nested_absmax", put(0, torch.inf)),
        "structure",
        "nested_absmax is inf",
    ),
    "nested_quant_map descends": (
        "nested",
        replace("weight.nested_quant_map", lambda t: t.flip(0)),
        "structure",
        "does not ascend",
    ),
    "another offset": ("nested", state(nested_offset=9.0), "reference", "||W - Q|| is"),
    "a code is -128": ("int8", replace("weight", put(9, -128)), "structure", "code -128"),
    "SCB is missing": ("int8", lambda t: t.pop(f"{LAYER}.SCB"), "structure", "SCB missing"),
    "SCB is another dtype": (
        "int8",
        replace("SCB", lambda t: t.half()),
        "structure",
        "torch.float16",
    ),
    "rows are reversed": ("int8", replace("weight", lambda t: t.flip(0)), "reference", "is 1."),
    "an SCB is doubled": (
        "int8",
        replace("SCB", lambda t: put(5, 2 * t[5])(t)),
        "rounding",
        "row 5",
    ),
    "the layer is missing": (
        "int8",
        lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)],
        "completeness",
        "neither quantized nor stored",
    ),
}


@pytest.mark.parametrize("fault", OF_FOLDERS)
def test_faults_of_bitsandbytes_folders_are_named(model, tmp_path, fault):
    kind, change, check, message = OF_FOLDERS[fault]
    folder = others.write_bitsandbytes(model, tmp_path / "out", kind)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = audit(folder, model)
    found = [f for f in report.findings if f.layer == LAYER]
    assert check in [f.check for f in found if message in f.message]
    assert {f.layer for f in report.findings} <= {LAYER, OTHER}
    assert (report.exit_code == 4) == any(f.severity == "error" for f in report.findings)


STATES = {
    "no JSON": (lambda t: t.update({STATE: t[STATE][3:]}), "quant_state is not JSON"),
    "another type": (state(quant_type="fp4"), "is named 'nf4', and says it is 'fp4'"),
    "an unknown block": (state(blocksize=100), "blocksize of its quant_state is 100"),
    "no shape": (state(shape=[6144]), "shape of its quant_state is"),
    "missing": (lambda t: t.pop(STATE), "its quant_state is missing"),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_quant_state_that_cannot_be_is_refused(model, tmp_path, fault):
    change, message = STATES[fault]
    folder = others.write_bitsandbytes(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message) as caught:
        audit(folder, model)
    assert LAYER in str(caught.value)


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize("block", [32, 64])
def test_nothing_is_found_in_sound_folders_of_bitsandbytes(model, tmp_path, kind, block):
    report = audit(others.write_bitsandbytes(model, tmp_path / "out", kind, block), model)
    assert report.findings == []
    assert len(report.layers) == 14
    assert all(f.half_steps <= 1 and f.farther == 0 for f in report.layers.values())


def test_config_is_held_against_the_layers(model, tmp_path):
    folder = others.write_bitsandbytes(model, tmp_path / "out", "int8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_8bit": False, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    [finding] = audit(folder).findings
    assert (finding.check, finding.severity) == ("completeness", "error")
    assert "config.json says load_in_4bit" in finding.message


def test_weights_that_fill_no_whole_blocks_are_not_audited(model, tmp_path):
    folder = others.write_bitsandbytes(model, tmp_path / "out", "nf4")
    tensors = load_file(folder / "model.safetensors")
    state(shape=[95, 63])(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="no whole blocks of 64"):
        BitsAndBytesReader().open(folder).read(LAYER)


# The commands -----------------------------------------------------------------------------------


def test_the_commands_take_files_and_folders(run, model, tmp_path):
    file = others.write_gguf(model, tmp_path / "a.gguf")
    folder = others.write_bitsandbytes(model, tmp_path / "out", "nf4")
    for path, kind in ((file, "Q4_0"), (folder, "nf4, blocks of 64")):
        sound = run("verify", path, "--reference", model)
        assert sound.code == 0, sound.err
        assert "sound, as far as can be told" in sound.out
        assert kind in sound.out
        shown = run("inspect", path)
        assert shown.code == 0, shown.err
        assert kind in shown.out
        record = json.loads(run("inspect", path, "--json").out)
        assert record["layers"][LAYER]["scheme"] == kind
    broken = others.write_gguf(model, tmp_path / "b.gguf", change=PLANTED["a scale is NaN"][0])
    assert run("verify", broken).code == 4


def test_another_network_is_said_once(model, tmp_path):
    raw = {"Q4_0": others.random_blocks("Q4_0", 8, 0)}
    file = others.write_blocks(tmp_path / "a.gguf", raw)
    damaged(file, file.read_bytes().index(b"ffn_up"), b"ffn_xx")
    found = [f for f in audit(file, model).findings if f.check == "reference"]
    assert [f.message for f in found] == [
        "no layer has a name that the reference has: nothing was compared"
    ]
