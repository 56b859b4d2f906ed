"""Layers that are worse than nearest on held-out tokens, and tokens that outweigh all others."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import qframe
from qframe import Capabilities, Host, claims, hookimpl
from qframe.calibration import CalibrationData
from qframe.errors import OverfitError
from qframe.fallbacks import HOST_EVENTS, OVERFIT, energies, massive_token

W3 = {"num_bits": 3, "group_size": 8, "symmetric": False}


def network(width=32):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 8))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def two_kinds(width=32, tokens=24):
    """Few tokens of a few directions to fit on; those held out go the other ways."""
    generator = torch.Generator().manual_seed(1)
    fitted = torch.randn(tokens, width, generator=generator)
    fitted[:, width // 4 :] *= 2.0**-4
    held_out = torch.randn(8 * tokens, width, generator=generator)
    held_out[:, : width // 4] *= 2.0**-4
    return CalibrationData.from_tensors([fitted], [held_out])


def run(**recipe):
    settings = {"method": "gptq", "scheme": W3, **recipe}
    return qframe.quantize(network(), settings, calibration=two_kinds()).report


def test_a_layer_that_overfits_is_rounded_to_nearest_where_that_is_asked_for():
    before, after = run(), run(on_overfit="rtn")
    first, other = before.layers[0], after.layers[0]
    assert first.error < first.rtn_error  # on its own tokens GPTQ is the better one
    assert first.held_out_error > first.rtn_held_out_error
    assert (first.method, other.method) == ("gptq", OVERFIT)
    assert other.held_out_error == other.rtn_held_out_error == first.rtn_held_out_error
    [event] = [e for e in after.events if e.kind == "overfit" and e.layer == "0"]
    assert f"{first.held_out_error:.3%}" in event.message
    assert f"{first.rtn_held_out_error:.3%}" in event.message
    assert not after.fallbacks()  # it was asked for
    names = {certificate.claim for certificate in other.certificates}
    assert names == {claim.name for claim in (claims.HalfStep, claims.SchemeScale, claims.Covers)}
    assert all(certificate.holds for certificate in other.certificates)


def test_no_layer_is_worse_than_nearest_on_held_out_tokens_then():
    for layer in run(on_overfit="rtn").layers:
        assert layer.held_out_error <= layer.rtn_held_out_error


def test_columns_that_are_kept_count_when_overfitting_is_judged():
    recipe = {"method": "llm_int8+gptq", "options": {"threshold": 2.2}}
    first = run(**recipe).layers[0]
    assert 0 < first.inputs["kept_columns"] < 32
    assert first.held_out_error > first.rtn_held_out_error
    events = run(**recipe, on_overfit="rtn").events
    [event] = [e for e in events if e.kind == "overfit" and e.layer == "0"]
    assert f"held-out tokens is {first.held_out_error:.3%}" in event.message


def test_a_layer_that_overfits_is_an_error_where_that_is_asked_for():
    with pytest.raises(OverfitError, match=r"layer '0': its output error.*on_overfit='rtn'"):
        run(on_overfit="error")


def test_without_held_out_tokens_nothing_is_known():
    data = CalibrationData.from_tensors([x for (x,) in two_kinds().inputs])
    recipe = {"method": "gptq", "scheme": W3, "on_overfit": "error"}
    layers = qframe.quantize(network(), recipe, calibration=data).report.layers
    assert {layer.method for layer in layers} == {"gptq"}


def test_automatic_damping_is_certified_and_keeps_to_what_it_tried():
    report = run(options={"dampening_frac": "auto"})
    assert all(certificate.holds for layer in report.layers for certificate in layer.certificates)
    assert report.layers[0].info["damp"] > run().layers[0].info["damp"]
    assert report.layers[0].held_out_error < run().layers[0].held_out_error


def test_a_rewritten_layer_is_judged_by_what_it_does_to_plain_inputs():
    """A handler that makes one channel huge: it overfits, though no code of it is far off."""

    @dataclass(frozen=True)
    class Spoiler:
        name: str = field(init=False, default="spoiler")
        needs: frozenset = field(init=False, default=frozenset())
        capabilities: Capabilities = field(init=False, default=Capabilities())
        claims = (claims.FunctionPreserving(),)

        def rewrite(self, problem, rng):
            scale = torch.ones(problem.columns)
            scale[0] = 2.0**6
            return problem.scaled(scale)

    class Plugin:
        @hookimpl
        def qframe_outlier_handlers(self):
            return [Spoiler()]

    host = Host.discover()
    host.add(Plugin(), "spoiler")
    recipe = {"method": "spoiler+gptq", "scheme": W3, "on_overfit": "rtn"}
    report = qframe.quantize(network(), recipe, calibration=two_kinds(), host=host).report
    layer = report.layers[0]
    [event] = [e for e in report.events if e.layer == "0" and e.kind == "overfit"]
    assert layer.method == OVERFIT
    assert f"and {layer.held_out_error:.3%} when" in event.message


# Massive tokens -------------------------------------------------------------------------------


def test_a_token_with_most_of_the_energy_is_named():
    chunks = [torch.ones(3, 4), torch.ones(2, 4)]
    assert massive_token("up", energies(chunks)) == []
    chunks[1][1] = 5
    [event] = massive_token("up", energies(chunks))
    assert (event.kind, event.layer) == ("massive token", "up")
    assert event.message.startswith("token 1 of chunk 1 has 86% of the energy of all 5 ")


def test_half_of_the_energy_is_not_most_of_it():
    assert massive_token("up", energies([torch.tensor([[2.0], [2.0]])])) == []
    assert massive_token("up", energies([torch.zeros(2, 3)])) == []
    assert massive_token("up", energies([torch.zeros(0, 3)])) == []
    assert massive_token("up", []) == []


def test_a_run_names_massive_tokens_by_the_first_layer_that_reads_them():
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    x[0, 5] *= 50
    data = CalibrationData.from_tensors([x])
    report = qframe.quantize(network(), {"method": "gptq", "scheme": W3}, calibration=data).report
    events = [event for event in report.events if event.kind == "massive token"]
    assert [event.layer for event in events] == ["0", "2"]
    assert events[0].message.startswith("token 5 of chunk 0")


def test_every_event_about_a_layer_that_is_not_its_rounders_is_known():
    """`verify` gives a rounder's claims the rounder's own events, and no others."""
    package = Path(qframe.__file__).parent
    said = set()
    for file in ("fallbacks.py", "solve.py", "verdicts.py", "walk.py", "sensitivity.py"):
        said |= set(re.findall(r'Event\(\s*kind="([^"]+)"', (package / file).read_text("utf-8")))
    assert said == HOST_EVENTS
