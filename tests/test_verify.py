"""`qframe.verify`: nothing that was changed passes, and what cannot be checked is said."""

import json
import shutil
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import (
    CalibrationData,
    Capabilities,
    Host,
    checkpoint,
    hookimpl,
    pipeline,
    rounding,
)
from qframe.claims import HalfStep
from qframe.errors import CertificateError, HessianError, RecipeError, VerifyError
from qframe.fingerprints import Origin, fingerprint, sha256
from qframe.manifest import STATISTICS, own_hash
from qframe.model import Network, set_weight
from qframe.weights import ModelFolder

FLIPS = settings(suppress_health_check=list(HealthCheck))
MODEL = "model.safetensors"


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 20, bias=False))


def data():
    generator = torch.Generator().manual_seed(1)
    return CalibrationData.from_tensors(
        [torch.randn(40, 36, generator=generator) for _ in range(3)]
    )


@dataclass(frozen=True)
class Stretch:
    """Multiplies every weight column by a number that is no power of two."""

    name: str = "stretch"
    needs: frozenset = frozenset()
    capabilities: Capabilities = field(default=Capabilities())

    def rewrite(self, problem, rng):
        return problem.scaled(torch.linspace(0.3, 3, problem.columns))


@dataclass(frozen=True)
class Mine:
    """Round to nearest under another name; it claims only half of what it could."""

    name: str = "mine"
    needs: frozenset = frozenset()
    capabilities: Capabilities = field(default=Capabilities())
    claims = (HalfStep(),)

    def round(self, problem, rng):
        return rounding.to_nearest(problem)


class Plugin:
    @hookimpl
    def qframe_outlier_handlers(self):
        return [Stretch()]

    @hookimpl
    def qframe_rounders(self):
        return [Mine()]


@pytest.fixture(scope="module")
def host():
    made = Host.discover()
    made.add(Plugin(), "mine")
    return made


RECIPES = {
    "rtn": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 12}},
    "rtn, 3 bits, asymmetric": {
        "method": "rtn",
        "scheme": {"num_bits": 3, "group_size": 16, "symmetric": False, "scale_dtype": "bfloat16"},
    },
    "gptq": {
        "method": "gptq",
        "scheme": {"num_bits": 4, "group_size": 12, "symmetric": False},
        "keep_statistics": True,
    },
    "gptq, groups by activation": {
        "method": "gptq",
        "options": {"actorder": "group", "static_groups": True},
        "scheme": {"num_bits": 4, "group_size": 12},
        "keep_statistics": True,
    },
    "stretch+gptq": {
        "method": "stretch+gptq",
        "options": {"actorder": "group"},
        "scheme": {"num_bits": 5, "group_size": 8, "symmetric": False},
        "keep_statistics": True,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, host):
    made = {}
    for name, recipe in RECIPES.items():
        made[name] = tmp_path_factory.mktemp("out") / "out"
        qframe.quantize(network(), recipe, out=made[name], calibration=data(), host=host)
    return made


@pytest.fixture
def folder(folders, tmp_path):
    """Return a function that copies a folder, so that the test may damage it."""

    def copy(name):
        return shutil.copytree(folders[name], tmp_path / "out")

    return copy


def spans(file):
    """Return tensor name -> (first byte, bytes) in a safetensors file."""
    content = file.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


@contextmanager
def flipped(file, place, bit):
    """Flip a bit of a file until the end of the context."""

    def flip():
        with file.open("r+b") as stream:
            stream.seek(place)
            [byte] = stream.read(1)
            stream.seek(place)
            stream.write(bytes([byte ^ (1 << bit)]))

    flip()
    try:
        yield
    finally:
        flip()


@contextmanager
def hashed_anew(folder):
    """Let the manifest say of the files what they are now, as an attacker would."""
    manifest = folder / "qframe.json"
    before = manifest.read_text()
    content = json.loads(before)
    for kind, stem in (("tensors", "model"), ("statistics", STATISTICS)):
        source = ModelFolder(folder, stem)
        for name, record in content[kind].items():
            record["blake3"] = fingerprint(source.raw(name))
    content["files"] = {name: sha256(folder / name) for name in content["files"]}
    content["sha256"] = own_hash(content)
    manifest.write_text(json.dumps(content))
    try:
        yield
    finally:
        manifest.write_text(before)


def rewrite_manifest(folder, change):
    """Change the manifest, and give it the hash that fits."""
    file = folder / "qframe.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps({**content, "sha256": own_hash(content)}))


def draw_bit(draw, file, names=lambda name: True):
    """Draw a tensor, and a bit of it as (name, place in the file, bit)."""
    found = {name: span for name, span in spans(file).items() if names(name)}
    name = draw(st.sampled_from(sorted(found)))
    first, length = found[name]
    return name, first + draw(st.integers(0, length - 1)), draw(st.integers(0, 7))


# A good folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_written_is_verified(folders, host, name):
    alone = qframe.verify(folders[name])
    assert alone.problems == []
    assert alone.recomputed == {}
    assert {item.why for item in alone.unchecked} == {"no --reference was given"}
    report = qframe.verify(folders[name], network(), host=host)
    assert report.problems == []
    assert report.unchecked == []
    assert report.recomputed == report_of_the_run(folders[name])
    assert report.exit_code == 0
    report.check()


def report_of_the_run(folder):
    """Return the certificates as they were recorded, with as many figures as they have."""
    return {name: Same(found) for name, found in qframe.verify(folder).recorded.items()}


class Same:
    """Certificates that are equal when what is stored of them is."""

    def __init__(self, certificates):
        self.records = [certificate.record() for certificate in certificates]

    def __eq__(self, other):
        return self.records == [certificate.record() for certificate in other]

    __hash__ = None


def test_a_second_look_at_the_public_name_finds_the_function():
    assert callable(qframe.verify)
    assert callable(qframe.verify)


# Flipped bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@FLIPS
@given(data=st.data())
def test_a_flipped_bit_of_any_tensor_fails_and_names_the_tensor(folders, name, data):
    folder = folders[name]
    file = folder / data.draw(st.sampled_from(sorted(f.name for f in folder.glob("*.safetensors"))))
    tensor, place, bit = draw_bit(data.draw, file)
    with flipped(file, place, bit):
        report = qframe.verify(folder, threads=1)
    assert report.exit_code == 4
    assert tensor in [problem.name for problem in report.problems if problem.kind == "tensor"]
    assert file.name in [problem.name for problem in report.problems if problem.kind == "file"]
    with pytest.raises(VerifyError, match="sha256 differs"):
        report.check()


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_tensor_is_among_those(folders, name):
    parts = {tensor.rpartition(".")[2] for tensor in spans(folders[name] / MODEL)}
    wanted = {"weight_packed", "weight_scale"}
    if not RECIPES[name]["scheme"].get("symmetric", True):
        wanted.add("weight_zero_point")
    if "actorder" in RECIPES[name].get("options", {}):
        wanted.add("weight_g_idx")
    if "stretch" in name:
        wanted.add("input_scale")
    assert parts == wanted | {"bias"}


@pytest.mark.parametrize("name", ["rtn", "rtn, 3 bits, asymmetric", "gptq", "stretch+gptq"])
@FLIPS
@given(data=st.data())
def test_with_hashes_made_anew_the_reference_still_tells(folders, host, name, data):
    """Codes, scales, zero points: each of their bits matters to a certificate."""
    folder, file = folders[name], folders[name] / MODEL

    def certified(tensor):
        part = tensor.rpartition(".")[2]
        # With dynamic groups a scale is certified up to what the compensated weights are known to.
        return part in ("weight_packed", "weight_zero_point") or (
            part == "weight_scale" and name != "stretch+gptq"
        )

    tensor, place, bit = draw_bit(data.draw, file, certified)
    with flipped(file, place, bit), hashed_anew(folder):
        alone = qframe.verify(folder, threads=1)
        report = qframe.verify(folder, network(), host=host, threads=1)
    assume(not alone.problems)  # else the structure has told: a padding bit, a negative scale
    layer = tensor.rpartition(".")[0]
    assert report.exit_code == 3
    assert {problem.name for problem in report.problems} == {layer}
    with pytest.raises(CertificateError, match=f"certificate {layer}: recomputed: .* is violated"):
        report.check()


@FLIPS
@given(data=st.data())
def test_a_column_in_another_group_is_found_by_the_structure(folders, host, data):
    folder = folders["gptq, groups by activation"]
    tensor, place, bit = draw_bit(data.draw, folder / MODEL, lambda name: name.endswith("g_idx"))
    with flipped(folder / MODEL, place, bit), hashed_anew(folder):
        report = qframe.verify(folder, threads=1)
    assert report.exit_code == 4
    assert tensor.rpartition(".")[0] in {problem.name for problem in report.problems}


def test_two_columns_that_changed_groups_are_found_by_the_reference(folder, host):
    out = folder("gptq, groups by activation")
    tensors = dict(checkpoint_tensors(out))
    index = tensors["0.weight_g_idx"]
    other = int((index != index[0]).nonzero()[0])
    index[0], index[other] = index[other].item(), index[0].item()
    save(out, tensors)
    with hashed_anew(out):
        assert qframe.verify(out).problems == []
        report = qframe.verify(out, network(), host=host)
    assert report.exit_code == 3
    assert {problem.name for problem in report.problems} == {"0"}


def test_a_carried_tensor_is_compared_with_the_reference(folder):
    out = folder("rtn")
    tensors = dict(checkpoint_tensors(out))
    tensors["0.bias"][3] += 1
    save(out, tensors)
    with hashed_anew(out):
        assert qframe.verify(out).problems == []
        report = qframe.verify(out, network())
    assert [(p.kind, p.name) for p in report.problems] == [("tensor", "0.bias")]
    assert report.exit_code == 4


def checkpoint_tensors(folder):
    source = ModelFolder(folder)
    return {name: source.read(name).clone() for name in source.tensors}


def save(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


# Other damage -----------------------------------------------------------------------------------


def test_files_that_are_missing_or_too_many_are_named(folder):
    out = folder("rtn")
    (out / "quant_log.csv").unlink()
    shutil.copy(out / MODEL, out / "model-2.safetensors")
    (out / "notes.txt").write_text("mine")
    report = qframe.verify(out)
    assert {(p.kind, p.name) for p in report.problems} == {
        ("file", "quant_log.csv"),
        ("file", "model-2.safetensors"),
    }
    assert any("notes.txt" in note for note in report.notes)


def test_a_truncated_file_is_a_finding_and_no_crash(folder):
    out = folder("rtn")
    content = (out / MODEL).read_bytes()
    (out / MODEL).write_bytes(content[: len(content) // 2])
    report = qframe.verify(out)
    assert report.exit_code == 4
    assert any("truncated" in problem.message for problem in report.problems)


def test_a_file_name_cannot_lead_out_of_the_folder(folder, tmp_path):
    out = folder("rtn")
    (tmp_path / "secret").write_text("mine")
    rewrite_manifest(out, lambda m: m["files"].update({"../secret": "0" * 64}))
    report = qframe.verify(out)
    assert [(p.name, p.message) for p in report.problems] == [
        ("../secret", "leads out of the folder")
    ]


def test_a_changed_manifest_is_refused(folder):
    out = folder("rtn")
    file = out / "qframe.json"
    file.write_text(file.read_text().replace('"columns": 36', '"columns": 35'))
    with pytest.raises(VerifyError, match=r"qframe\.json: its content is not what was written"):
        qframe.verify(out)


def test_other_versions_of_the_manifest_are_refused_with_a_way_out(folder):
    out = folder("rtn")
    rewrite_manifest(out, lambda m: m.update(manifest_version=1))
    for look in (qframe.verify, lambda out: qframe.load(out, network())):
        with pytest.raises(VerifyError, match=r"manifest_version 1.* reads 8; quantize .* again"):
            look(out)


def test_a_certificate_that_was_taken_away_is_missed(folder):
    out = folder("rtn")
    rewrite_manifest(out, lambda m: m["layers"]["2"]["certificates"].pop(0))
    assert qframe.verify(out).problems == []
    report = qframe.verify(out, network())
    assert [str(problem) for problem in report.problems] == [
        "certificate 2: half step (B1.b) was not recorded"
    ]


def test_a_recorded_certificate_that_does_not_hold_is_a_problem(folder):
    out = folder("rtn")

    def break_it(manifest):
        manifest["layers"]["0"]["certificates"][1]["ratio"] = "inf"

    rewrite_manifest(out, break_it)
    report = qframe.verify(out)
    assert report.exit_code == 3
    assert report.problems[0].name == "0"
    assert "scale (B1.c) is violated" in report.problems[0].message


# References and statistics ----------------------------------------------------------------------


def test_another_reference_is_refused_by_its_first_tensor(folders):
    other = network()
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    report = qframe.verify(folders["rtn"], other)
    assert [(p.kind, p.name) for p in report.problems] == [("reference", "2.weight")]
    assert report.exit_code == 4
    report = qframe.verify(folders["rtn"], network(seed=1))
    assert [(p.kind, p.name) for p in report.problems] == [("reference", "0.weight")]


def test_a_weight_is_known_again_in_another_dtype():
    short = network().to(torch.bfloat16)
    wide = nn.Sequential(*network().to(torch.bfloat16).float())
    origin, of_wide = (Network(each).origin("0")() for each in (short, wide))
    assert origin == Origin("BF16", fingerprint(short[0].weight))
    assert of_wide == Origin("F32", fingerprint(wide[0].weight))
    for each in (short, wide):
        assert Network(each).is_made_of("0", origin)
        assert Network(each).is_made_of("0", of_wide)
    assert not Network(short).is_made_of("0", Origin("no dtype", origin.fingerprint))
    rare = Network(short)  # a dtype that only files have
    rare.origin = lambda layer: lambda: Origin("no dtype", origin.fingerprint)
    assert rare.is_made_of("0", Origin("no dtype", origin.fingerprint))
    with torch.no_grad():
        wide[0].weight[3, 5] *= 1 + 2.0**-20  # which bfloat16 rounds away
    assert not Network(wide).is_made_of("0", origin)


def test_what_a_weight_was_is_told_whatever_becomes_of_the_module():
    made = network()
    telling = Network(made).origin("2")
    before = fingerprint(made[2].weight)
    set_weight(made[2], torch.zeros(20, 24))
    assert telling() == Origin("F32", before)


def test_without_statistics_what_needs_them_is_read_only(tmp_path, host):
    recipe = {**RECIPES["gptq"], "keep_statistics": False}
    qframe.quantize(network(), recipe, out=tmp_path / "out", calibration=data())
    assert not list((tmp_path / "out").glob(f"{STATISTICS}*"))
    report = qframe.verify(tmp_path / "out", network())
    assert report.problems == []
    assert {(u.claim, u.why) for u in report.unchecked} == {
        ("gptq residual", "its calibration statistics were not kept")
    }
    assert {c.claim for found in report.recomputed.values() for c in found} == {"scale", "coverage"}


def test_each_input_has_its_statistics_once_and_in_files_of_their_own(folders):
    kept = ModelFolder(folders["gptq"], STATISTICS)
    assert {name: t.dtype for name, t in kept.tensors.items()} == {
        "0.hessian": "F64",
        "0.processing_order": "I32",
        "2.hessian": "F64",
        "2.processing_order": "I32",
    }
    assert not any("hessian" in name for name in ModelFolder(folders["gptq"]).tensors)


def test_statistics_may_take_several_files(tmp_path, monkeypatch):
    small = partial(checkpoint.CheckpointWriter, max_shard_bytes=8 * 36 * 36)
    monkeypatch.setattr(pipeline, "CheckpointWriter", small)
    qframe.quantize(network(), RECIPES["gptq"], out=tmp_path / "out", calibration=data())
    assert len(list((tmp_path / "out").glob(f"{STATISTICS}-0*.safetensors"))) > 1
    assert qframe.verify(tmp_path / "out", network()).problems == []


def test_statistics_are_refused_where_there_are_none(tmp_path):
    recipe = {**RECIPES["rtn"], "keep_statistics": True}
    with pytest.raises(RecipeError, match=r"keep_statistics: method 'rtn'.*nothing to keep"):
        qframe.quantize(network(), recipe, out=tmp_path / "out")


# Plugins ----------------------------------------------------------------------------------------


def test_a_plugin_that_is_not_here_is_said(tmp_path, host):
    recipe = {"method": "mine", "scheme": {"num_bits": 4, "group_size": 12}}
    qframe.quantize(network(), recipe, out=tmp_path / "out", host=host)
    report = qframe.verify(tmp_path / "out", network())
    assert report.problems == []
    assert report.recomputed == {"0": (), "2": ()}
    assert all("method 'mine' is not here" in item.why for item in report.unchecked)
    report = qframe.verify(tmp_path / "out", network(), host=host)
    assert report.unchecked == []
    assert len(report.recomputed["0"]) == 1


def test_a_layer_that_was_rounded_to_nearest_instead_needs_no_plugin(tmp_path):
    """What fell back is held against the claims of nearest, whoever could not do it."""

    @dataclass(frozen=True)
    class Unable:
        name: str = "unable"
        needs: frozenset = frozenset({"hessian"})
        capabilities: Capabilities = field(default_factory=Capabilities)

        def round(self, problem, rng):
            if problem.name == "0":
                raise HessianError(f"layer {problem.name!r}: made to fail")
            return Host.discover().get("rounder", "rtn").round(problem, rng)

    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [Unable()]

    host = Host.discover()
    host.add(Plugin(), "unable")
    recipe = {
        "method": "unable",
        "scheme": {"num_bits": 4, "group_size": 12},
        "max_fallback_frac": 1,
    }
    qframe.quantize(network(), recipe, out=tmp_path / "out", calibration=data(), host=host)
    report = qframe.verify(tmp_path / "out", network())
    assert report.problems == []
    assert {c.claim for c in report.recomputed["0"]} == {"half step", "scale", "coverage"}
    assert report.recomputed["2"] == ()
