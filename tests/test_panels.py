"""Layers that are quantized panel by panel are what they are when they are quantized whole."""

import dataclasses
import inspect
import json
import math
import shutil
from copy import deepcopy
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import nn

import qframe
from qframe import Capabilities, bounds, claims, panels, rounding, verdicts, weights
from qframe.certificates import Certificate, Evidence, applicable
from qframe.claims import claims_of
from qframe.contracts import Event, RoundingProblem
from qframe.errors import CertificateError, MemoryLimitError, NonFiniteError, PluginError
from qframe.fingerprints import fingerprint
from qframe.grids import grid_of
from qframe.host import Host
from qframe.packing import PackedWeight
from qframe.recipe import Method
from qframe.scheme import Scheme
from qframe.verdicts import Found
from qframe_plugins.rounders.hqq import HQQ
from qframe_plugins.rounders.optimal_rtn import OptimalRTN
from qframe_plugins.rounders.rtn import RTN

HOST = Host.discover()
DOUBLE = 2.0**-53


def method_of(rounder=None, handlers=()):
    return Method(name="rtn", rounder=rounder or RTN(), handlers=handlers)


@st.composite
def layers(draw):
    """A layer with a scheme that may be quantized panel by panel."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["int", "float"]))
    bits = draw(st.sampled_from([2, 3, 4, 8])) if kind == "int" else draw(st.sampled_from([4, 8]))
    scheme = Scheme(
        num_bits=bits,
        type=kind,
        group_size=draw(st.sampled_from([-1, 1, 16, 64])),
        symmetric=kind == "float" or draw(st.booleans()),
        observer=draw(st.sampled_from(["minmax", "mse"])),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.normal(0, 2, (rows, 1)))
    weight[rng.random(weight.shape) < draw(st.sampled_from([0, 0.02, 0.9]))] = 0
    return SimpleNamespace(
        weight=torch.from_numpy(np.float32(weight)),
        scheme=scheme,
        grid=grid_of(HOST, scheme),
        panel=draw(st.integers(1, 200)),
        threads=draw(st.sampled_from([1, 3])),
    )


def sheet_of(module, layer, read=None):
    return module.Sheet(
        name="layer",
        rows=layer.weight.shape[0],
        columns=layer.weight.shape[1],
        scheme=layer.scheme,
        grid=layer.grid,
        read=read or (lambda rows: layer.weight[rows]),
    )


def by_panels(module, layer, rounder=None, read=None):
    method = method_of(rounder)

    def act(problem, first):
        return method.rounder.round(problem, np.random.default_rng(first))

    before, module.PANEL = module.PANEL, layer.panel
    try:
        return module.quantize([sheet_of(module, layer, read)], method, act, layer.threads)[0]
    finally:
        module.PANEL = before


def whole(layer):
    problem = RoundingProblem(
        name="layer", weight=layer.weight, scheme=layer.scheme, grid=layer.grid
    )
    packed = PackedWeight.pack(rounding.to_nearest(problem), layer.scheme, layer.grid)
    evidence = Evidence(problem, packed.unpack())
    return packed, Found.of(evidence, applicable(claims_of(RTN()), layer.scheme))


def panels_are_the_layer(module, layer):
    """Codes, certificates and counts are the same, and sums but for the order of their terms."""
    done, (packed, found) = by_panels(module, layer), whole(layer)
    if done is None:
        return False
    sums = bounds.gamma(2 * layer.weight.numel(), DOUBLE)
    return (
        same_tensors(done.packed, packed)
        and [str(each) for each in done.found.certificates] == list(map(str, found.certificates))
        and done.found.clipped == found.clipped
        and abs(done.found.signal - found.signal) <= sums * found.signal
        and abs(done.found.noise - found.noise) <= sums * found.noise
        and set(done.seconds) == {"round", "pack", "certify"}
        and min(done.seconds.values()) >= 0
    )


def same_tensors(one, other):
    mine, its = one.tensors(), other.tensors()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


@given(layer=layers())
def test_panels_are_the_layer(layer):
    assert panels_are_the_layer(panels, layer)


# Mistakes ---------------------------------------------------------------------------------------

MISTAKES = [
    ("slice(top, min(top + height, self.rows))", "slice(top, min(top + height, self.rows - 1))"),
    ("range(0, self.rows, height)", "range(0, self.rows, height + 1)"),
    (
        "self._packed.put(rows, packed)",
        "self._packed.put(slice(0, rows.stop - rows.start), packed)",
    ),
    ("self._packed.words[rows]", "self._packed.words[: rows.stop - rows.start]"),
    ("for first, (found, _) in parts])", "for first, (found, _) in parts[:1]])"),
    ("[(first, found) for first, (found, _) in parts]", "[(0, found) for _, (found, _) in parts]"),
    ("seconds.get(stage, 0) + each", "seconds.get(stage, 0) - each"),
    ("Evidence(problem, packed.unpack())", "Evidence(problem, self._packed.unpack())"),
]
OF_VERDICTS = [
    ("found.place[0] + top", "found.place[0]"),
    ("ratios.index(max(ratios))", "0"),
    ("ratios.index(max(ratios))", "ratios.index(min(ratios))"),
    ("clipped=sum(found.clipped for found in each)", "clipped=each[0].clipped"),
    ("math.fsum(found.noise for found in each)", "each[-1].noise"),
    ("math.fsum(found.signal for found in each)", "each[-1].signal"),
]


def mistaken(module, old, new, **others):
    source = inspect.getsource(module)
    assert source.count(old) == 1
    made = SimpleNamespace(**others)
    made.__dict__["__name__"] = module.__name__
    exec(compile(source.replace(old, new), "mistaken", "exec"), made.__dict__)
    made.__dict__.update(others)
    return made


def found_out(module):
    def broken(layer):
        try:
            return not panels_are_the_layer(module, layer)
        except (IndexError, RuntimeError, ValueError):
            return True

    chosen = settings(max_examples=300, phases=[Phase.generate], deadline=None, database=None)
    find(layers(), broken, settings=chosen, random=Random(0))


@pytest.mark.parametrize(("old", "new"), MISTAKES)
def test_a_mistake_is_found_out(old, new):
    found_out(mistaken(panels, old, new))


@pytest.mark.parametrize(("old", "new"), OF_VERDICTS)
def test_a_mistake_of_what_is_found_is_found_out(old, new):
    other = mistaken(verdicts, old, new)
    found_out(mistaken(panels, "PANEL = 1", "PANEL = 1", Found=other.Found))


def test_without_a_mistake_nothing_is_found_out():
    with pytest.raises(NoSuchExample):
        found_out(mistaken(panels, "PANEL = 1", "PANEL = 1", Found=verdicts.Found))


def test_a_certificate_that_is_no_number_comes_closest():
    def found(ratio):
        made = Certificate(claim="claim", theorem="B1", ratio=ratio, place=(1, 2))
        return Found(1.0, 1.0, 0, (made,))

    parts = [(0, found(0.5)), (10, found(math.nan)), (20, found(0.9))]
    [together] = Found.together(parts).certificates
    assert math.isnan(together.ratio)
    assert together.place == (11, 2)
    assert not together.holds


# Which layers -----------------------------------------------------------------------------------


class Mixing(RTN):
    capabilities = Capabilities.any_format(row_independent=False)


class Whole(RTN):
    by_rows = False


class OfAll(claims.HalfStep):
    by_rows = False


class AboutAll(RTN):
    claims = (*RTN.claims, OfAll())


class Needy(RTN):
    needs = frozenset({"hessian"})


@pytest.mark.parametrize(
    ("rounder", "scheme", "apart"),
    [
        (RTN, {"group_size": 32}, True),
        (RTN, {"group_size": -1}, True),
        (RTN, {"strategy": "tensor"}, False),
        (RTN, "NVFP4", False),  # a scale of the tensor
        (RTN, "W8A8", False),
        (Whole, {"group_size": 32}, False),
        (Mixing, {"group_size": 32}, False),
        (AboutAll, {"group_size": 32}, False),
        (Needy, {"group_size": 32}, False),
    ],
)
def test_layers_are_quantized_by_panels_where_nothing_is_about_all_rows(rounder, scheme, apart):
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else Scheme(num_bits=4, **scheme)
    assert panels.apart(method_of(rounder()), scheme) == apart


def test_a_handler_sees_whole_layers():
    method = method_of(handlers=(HOST.get("outlier handler", "hadamard"),))
    assert not panels.apart(method, Scheme(num_bits=4, group_size=32))


# What has to be quantized whole -----------------------------------------------------------------


def a_layer(rows=6, columns=32, panel=64):
    scheme = Scheme(num_bits=4, group_size=16)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        weight=weight, scheme=scheme, grid=grid_of(HOST, scheme), panel=panel, threads=1
    )


def changed(**fields):
    """A rounder that says something else of the panel with the largest weight."""

    class Changed(RTN):
        def round(self, problem, rng):
            made = super().round(problem, rng)
            if float(problem.weight.abs().max()) < 100:
                return made
            return dataclasses.replace(made, **fields)

    return Changed()


@pytest.mark.parametrize(
    "fields",
    [
        {"info": {"damp": 0.1}},
        {"events": (Event(kind="fallback", layer="layer", message="so so"),)},
        {"order": torch.arange(32, dtype=torch.int32)},
        {"group_index": torch.arange(32, dtype=torch.int32) % 2},
        {"codes": torch.zeros(1, 1, dtype=torch.int16)},  # is refused, and will be again
    ],
)
@pytest.mark.parametrize("row", [0, 5])
def test_what_is_to_be_told_of_a_layer_is_told_of_the_whole(fields, row):
    layer = a_layer()
    layer.weight[row, 3] = 1000
    assert by_panels(panels, layer, changed(**fields)) is None
    layer.weight[row, 3] = 1
    assert by_panels(panels, layer, changed(**fields)) is not None


def test_memory_that_runs_out_is_told_at_once():
    def read(rows):
        raise MemoryError

    with pytest.raises(MemoryLimitError, match=r"^layer: out of memory while rounding it"):
        by_panels(panels, a_layer(), read=read)


def test_what_a_plugin_raises_is_raised():
    class Broken(RTN):
        def round(self, problem, rng):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        by_panels(panels, a_layer(), Broken())


def test_a_number_that_is_none_is_named_by_its_place_in_the_layer(monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 64)
    net = nn.Sequential(nn.Linear(32, 9))
    net[0].weight.data[7, 5] = math.nan
    recipe = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 16}}
    with pytest.raises(NonFiniteError, match=r"weight of layer '0' holds nan at index \[7, 5\]"):
        qframe.quantize(net, recipe)


def test_a_plugin_error_is_that_of_the_whole_layer(monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 64)
    monkeypatch.setattr(RTN, "round", lambda self, problem, rng: changed_codes(problem))
    net = nn.Sequential(nn.Linear(32, 9))
    recipe = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 16}}
    with pytest.raises(PluginError, match=r"codes in \[99, 99\]"):
        qframe.quantize(net, recipe)


def changed_codes(problem):
    made = rounding.to_nearest(problem)
    return dataclasses.replace(made, codes=torch.full_like(made.codes, 99))


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounder", "panel", "tied"),
    [
        (RTN, 1, True),
        (RTN, 700, True),
        (RTN, 700, False),
        (RTN, 1 << 22, True),
        (HQQ, 700, True),
        (OptimalRTN, 700, True),
    ],
)
def test_a_folder_is_the_one_that_whole_layers_make(
    tiny, tmp_path, monkeypatch, rounder, panel, tied
):
    model = tiny.write_llama(tmp_path / "model", tied=tied)
    recipe = {
        "method": rounder().name,
        "scheme": {"num_bits": 4, "group_size": 32, "symmetric": False},
        "ignore": [],
    }
    made = {}
    for by_rows, threads in ((False, 1), (True, 1), (True, 3)):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(rounder, "by_rows", by_rows)
            patch.setattr(panels, "PANEL", panel)
            qframe.quantize(model, recipe, out=out, threads=threads)
        made[by_rows, threads] = {f.name: f.read_bytes() for f in sorted(out.iterdir())}
        shutil.rmtree(out)
    assert made[True, 1] == made[True, 3]
    assert made[False, 1].keys() == made[True, 1].keys()
    sums = {"qframe_report.json", "quant_log.csv", "qframe.json"}  # that of squares ends otherwise
    for name in made[True, 1].keys() - sums:
        assert made[False, 1][name] == made[True, 1][name]
    told, whole = (json.loads(made[by, 1]["qframe.json"])["layers"] for by in (True, False))
    assert told == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_read_once(tiny, tmp_path, monkeypatch, threads):
    """Their hashes are taken on the way, and are those of whole tensors."""
    model, read = tiny.write_llama(tmp_path / "model"), {}
    plain = weights._numbers

    def counted(stream, there, rows=None):
        found = plain(stream, there, rows)
        if there.file.parent == model:
            key = there.start
            read[key] = read.get(key, 0) + found.nbytes
        return found

    monkeypatch.setattr(weights, "_numbers", counted)
    monkeypatch.setattr(panels, "PANEL", 700)
    recipe = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}
    report = qframe.quantize(model, recipe, out=tmp_path / "out", threads=threads).report
    monkeypatch.undo()
    folder = weights.ModelFolder(model)
    assert read == {there.start: there.bytes for there in folder.tensors.values()}
    for layer in report.layers:
        assert layer.source == fingerprint(folder.raw(f"{layer.name}.weight"))


def test_a_violated_claim_is_named_by_its_place_in_the_layer(monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 64)

    def wrong(self, problem, rng):
        made = rounding.to_nearest(problem)
        far = problem.weight.abs().amax(1) > 100
        made.codes[far, 5] = 7
        return made

    monkeypatch.setattr(RTN, "round", wrong)
    net = nn.Sequential(nn.Linear(32, 9))
    net[0].weight.data[7, 20] = 1000
    net[0].weight.data[7, 5] = 0
    recipe = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 16}}
    with pytest.raises(CertificateError, match=r"half step \(B1.b\) is violated.* at \[7, 5\]"):
        qframe.quantize(deepcopy(net), recipe)
    result = qframe.quantize(net, {**recipe, "on_violated_certificate": "warn"})
    [event] = [e for e in result.report.events if e.kind == "certificate violated"]
    assert event.layer == "0"
    assert "half step (B1.b) is violated" in event.message
    assert "at [7, 5]" in event.message
