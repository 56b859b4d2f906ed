"""What a run depends on: where any of it is another, going on is refused, and it is named."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qframe
from qframe import run_identity
from qframe.errors import UnfinishedError
from qframe.unfinished import differences, kept_blocks
from qframe.weights import ModelFolder


@pytest.fixture(scope="module")
def begun(model, recipe, stopped, tmp_path_factory):
    """A folder that holds a copy of the model, and what a run left that was stopped."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(model, folder / "model")
    stopped(folder / "model", recipe("gptq"), folder / "out", after=2)
    return folder


@pytest.fixture
def refused(begun, tmp_path, recipe):
    """Go on with a copy of it; check that this is refused, what is named, and that all is kept."""

    def call(named, *, fields=None, change=None, **options):
        here = tmp_path / "here"
        shutil.copytree(begun, here)
        if change is not None:
            change(here / "model")
        with pytest.raises(UnfinishedError) as error:
            qframe.quantize(
                here / "model",
                fields or recipe("gptq"),
                out=here / "out",
                state="resume",
                **options,
            )
        assert f" {named} was " in str(error.value)
        assert "--restart" in str(error.value)
        assert kept_blocks(here / "out") is not None
        return str(error.value)

    return call


def test_the_same_elsewhere_with_other_threads_is_the_same(begun, tmp_path, recipe):
    shutil.copytree(begun, tmp_path / "here")
    qframe.quantize(
        tmp_path / "here" / "model",
        recipe("gptq"),
        out=tmp_path / "here" / "out",
        state="resume",
        threads=1,
    )


def test_one_bit_of_a_weight(refused, begun):
    tensors = ModelFolder(begun / "model").tensors
    last = max(tensors, key=lambda name: tensors[name].start)

    def change(model):
        file = model / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    refused(f"model.tensor {last}", change=change)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_beside_the_weights(refused, name):
    def change(model):
        with (model / name).open("a") as file:
            file.write("\n")

    refused(f"model.{name}", change=change)


def test_a_file_too_many(refused):
    said = refused("model.LICENSE", change=lambda model: (model / "LICENSE").write_text("Mine."))
    assert "was nothing" in said


@pytest.mark.parametrize(
    ("named", "others"),
    [
        ("recipe.seed", {"seed": 1}),
        ("recipe.method", {"method": "qronos"}),
        ("recipe.options.block_size", {"options": {"block_size": 64}}),
        ("recipe.scheme.group_size", {"scheme": {"num_bits": 4, "group_size": 64}}),
        ("recipe.ignore", {"ignore": ["re:.*q_proj"]}),
        ("recipe.on_overfit", {"on_overfit": "rtn"}),
        ("recipe.keep_statistics", {"keep_statistics": True}),
    ],
)
def test_the_recipe(refused, recipe, named, others):
    method = others.pop("method", "gptq")
    refused(named, fields=recipe(method, **others))


def test_the_calibration_text(refused, recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text of another kind. " * 100)
    settings = {"num_calibration_samples": 8, "max_seq_length": 32, "dataset": str(text)}
    said = refused("recipe.calibration.dataset", fields=recipe("gptq", calibration=settings))
    assert "calibration.inputs" in said


def test_the_same_recipe_with_other_data(refused):
    import torch

    from qframe.calibration import CalibrationData

    windows = torch.arange(8 * 32).reshape(8, 32) % 256
    data = CalibrationData.from_tokens(windows, windows[:1], {"name": "mine"})
    refused("calibration.source.name", calibration=data)


def test_the_layout(refused):
    said = refused("layout", format="qframe")
    assert 'was "compressed-tensors", and is "qframe" now' in said


def test_the_version_of_qframe(refused, monkeypatch):
    monkeypatch.setattr(qframe, "__version__", "0.0.9")
    refused("environment.qframe")


def test_the_source_of_qframe(refused, monkeypatch):
    monkeypatch.setattr("qframe.comparison.identity.package_source", lambda folder: "edited")
    refused("environment.qframe source")


@pytest.mark.parametrize("field", ["version", "sha256", "plugin"])
def test_a_plugin(refused, monkeypatch, field):
    real = run_identity.plugin_identity

    def another(job):
        return [{**r, field: "another"} if r["kind"] == "rounder" else r for r in real(job)]

    monkeypatch.setattr(run_identity, "plugin_identity", another)
    refused(f"plugins.rounder gptq.{field}")


def test_another_machine(refused):
    with mock.patch("torch.backends.cpu.get_cpu_capability", return_value="of 1985"):
        refused("environment.instructions")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@given(before=st.dictionaries(st.text(max_size=3), PLAIN), data=st.data())
def test_a_difference_is_found_wherever_it_is_and_nowhere_else(before, data):
    assert list(differences(before, json.loads(json.dumps(before)))) == []
    now = json.loads(json.dumps(before))
    at, path = now, []
    while isinstance(at, dict) and at:
        key = data.draw(st.sampled_from(sorted(at)))
        inner, path = at[key], [*path, key]
        if not isinstance(inner, dict) or not inner:
            at[key] = ["another", inner]
            break
        at = inner
    found = list(differences(before, now))
    assert [place for place, _, _ in found] == ([".".join(path).lstrip(".")] if path else [])


# Weights alone: no weight is read for its hash alone, so those that were not read are not known.


@pytest.fixture
def left_by_rtn(model, recipe, stopped, tmp_path):
    """A folder with a model, and with what a run left that has read some of its weights."""
    shutil.copytree(model, tmp_path / "model")
    stopped(tmp_path / "model", recipe("rtn"), tmp_path / "out", after=2, threads=1)
    done, total = kept_blocks(tmp_path / "out")
    assert 0 < done < total
    return tmp_path


def turn_a_bit(folder, tensor):
    there = ModelFolder(folder).tensors[tensor]
    data = bytearray(there.file.read_bytes())
    data[there.start] ^= 1
    there.file.write_bytes(data)


QUERY = "model.layers.{}.self_attn.q_proj.weight"


def test_a_weight_that_was_read_must_be_the_same(left_by_rtn, recipe):
    turn_a_bit(left_by_rtn / "model", QUERY.format(0))
    with pytest.raises(UnfinishedError, match=rf'model\.tensor {QUERY.format(0)} was "F32 '):
        qframe.quantize(
            left_by_rtn / "model", recipe("rtn"), out=left_by_rtn / "out", state="resume"
        )
    assert kept_blocks(left_by_rtn / "out") is not None


@pytest.mark.parametrize("tensor", [QUERY.format(4), "model.norm.weight"])
def test_one_that_was_not_may_be_another(left_by_rtn, recipe, contents, tensor):
    """The output is that of the model as it is now: nothing was made of what it was."""
    turn_a_bit(left_by_rtn / "model", tensor)
    for out, state in (("out", "resume"), ("anew", "new")):
        qframe.quantize(left_by_rtn / "model", recipe("rtn"), out=left_by_rtn / out, state=state)
    assert contents(left_by_rtn / "out") == contents(left_by_rtn / "anew")


def test_a_run_that_goes_on_knows_all_weights(left_by_rtn, recipe, stopped):
    out = left_by_rtn / "out"
    stopped(left_by_rtn / "model", recipe("rtn"), out, after=4, threads=1, state="resume")
    turn_a_bit(left_by_rtn / "model", "model.norm.weight")
    with pytest.raises(UnfinishedError, match=r'model\.tensor model\.norm\.weight was "F32 '):
        qframe.quantize(left_by_rtn / "model", recipe("rtn"), out=out, state="resume")


def test_a_shape_is_known_before_a_weight_is_read(left_by_rtn):
    state = json.loads((left_by_rtn / ".out.qframe-unfinished" / "state.json").read_text())
    tensors = ModelFolder(left_by_rtn / "model").tensors
    model = state["fingerprint"]["model"]
    assert all(f"tensor {name}" in model for name in tensors)
    assert model["tensor model.norm.weight"] == f"F32 {list(tensors['model.norm.weight'].shape)}"
    assert len(model[f"tensor {QUERY.format(0)}"].split()[-1]) == 64
