"""The suite and KV caches: wrong ones are found, right ones are not, and bounds are sharp."""

import contextlib
import io
import types
from collections import deque

import numpy as np
import pytest
import torch

from qframe import KVScheme, bounds
from qframe.claims.kv import ExactWindow, KVHalfStep, KVScale
from qframe.held import held_bytes
from qframe.kv_evidence import KVEvidence
from qframe_conformance import check_plugin
from qframe_conformance.reproduce import script
from tests.mutants.kv_caches import TWINS, outputs
from tests.mutants.kv_reference import Quantizer, Store, down, up
from tests.mutants.kv_wrong import Truncates

KIND = "kv cache"


def name_of(item):
    return item.name


# The suite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS, ids=name_of)
def test_outputs_of_right_ones_are_finite(twin):
    assert all(np.isfinite(array).all() for array in outputs(twin.make()))


def test_axes_that_are_not_declared_are_not_tried():
    report = check_plugin(Quantizer(axes=("token",)), profile="fast", only=["accepts"])
    assert {record.scenario.rsplit("-", 1)[1] for record in report.records} == {"token"}


def test_what_is_not_claimed_is_not_asked():
    report = check_plugin(Quantizer(claims=(ExactWindow(),)), profile="fast")
    assert report.ok
    idle = {record.check for record in report.records if record.status == "not applicable"}
    assert {"codes_are_the_nearest", "scales_span_their_groups", "codes_are_packed"} <= idle
    assert {"keeps_other_tokens", "lanes_do_not_mix"}.isdisjoint(idle)


def test_a_counterexample_is_a_script_that_shows_the_violation():
    report = check_plugin(Quantizer(store=Truncates), only=["codes_are_the_nearest"])
    record = report.failures[0]
    code = "from tests.mutants.kv_caches import Quantizer, wrong\n\n"
    code += "plugin = Quantizer(store=wrong.Truncates)\n"
    arrays = record.counterexample.arrays
    assert sum(array.size for array in arrays.values()) < 2000
    text = script(record, code, file="arrays.npz")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        lines = [line for line in text.splitlines() if "np.load" not in line]
        exec("\n".join(lines), {"arrays": arrays})
    assert "codes_are_the_nearest is violated" in said.getvalue()


# Memory ---------------------------------------------------------------------------------------


def test_a_view_counts_with_the_buffer_behind_it():
    assert held_bytes(torch.zeros(10)[:2]) == 40
    assert held_bytes(np.zeros(10)[3:4]) == 80
    assert held_bytes(torch.from_numpy(np.zeros(10))[:1]) == 80


def test_a_buffer_counts_once():
    x = torch.zeros(10)
    assert held_bytes([x, x[:3], x.numpy(), {"again": (x,)}]) == 40


def test_buffers_are_found_wherever_they_are_held():
    class Slotted:
        __slots__ = ("inside", "missing")

    slotted = Slotted()
    slotted.inside = deque([np.zeros(2, np.int16)])
    holder = types.SimpleNamespace(a=slotted, b={"c": torch.zeros(1)}, method=slotted.inside.append)
    holder.itself = holder
    assert held_bytes(holder) == 8


# Claims ---------------------------------------------------------------------------------------


def evidence_of(x, **fields):
    scheme = KVScheme(residual_length=0, **fields)
    store = Store(scheme)
    store.append(x)
    return KVEvidence.of(scheme, x, store)


def test_a_certificate_says_where():
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 8).reshape(2, 3, 4, 8)
    evidence = evidence_of(x, group_size=4)
    assert KVHalfStep().certify(evidence).holds
    evidence.blocks[0].codes[1, 2, 3, 5] ^= 1
    broken = KVEvidence(scheme=evidence.scheme, x=x, blocks=evidence.blocks, read=evidence.read)
    certificate = KVHalfStep().certify(broken)
    assert not certificate.holds
    assert certificate.place == (1, 2, 3, 5)
    broken.blocks[0].scale[1, 0, 2, 1] *= 2
    assert KVScale().certify(broken).place == (1, 0, 2, 1)


@pytest.mark.parametrize("flush", ["group", "residual"])
@pytest.mark.parametrize("window", [0, 5, 8])
def test_the_window_has_as_many_tokens_as_b7_g_says(flush, window):
    scheme = KVScheme(axis="channel", group_size=4, residual_length=window, sink_tokens=3)
    claim = ExactWindow(flush=flush)
    for length in range(60):
        kept = length - claim.stop(scheme, length)
        if length >= 3:
            assert kept < claim.kept(scheme) + claim.chunk(scheme)
        assert kept >= min(claim.kept(scheme), max(length - 3, 0))


# Bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_offsets_that_are_rounded_down_keep_b7_f_and_reach_it(dtype):
    rng = np.random.default_rng(0)
    lo = np.float32(rng.normal(size=20_000) * 2.0 ** rng.integers(-30, 14, 20_000))
    lowest, highest = bounds.kv_offset(lo, dtype)
    stored = down(lo, dtype)
    assert (stored <= highest).all()
    assert (stored >= lowest).all()
    assert (up(lo, dtype) >= lo).all()
    if dtype != "float32":
        assert ((highest - stored) / (highest - lowest)).max() > 1 - 2.0**-6


def attention(q, k, v):
    """Logits, weights and output of float64 attention."""
    z = k @ q / np.sqrt(len(q))
    p = np.exp(z - z.max())
    p /= p.sum()
    return z, p, p @ v


def test_b7_c_is_attained_by_two_tokens():
    for osc in (2.0**-10, 0.1, 1.0, 3.0, 12.0):
        share = 1 / (1 + np.exp(osc / 2))
        before = np.array([share, 1 - share])
        after = before * np.exp([osc, 0])
        after /= after.sum()
        moved = np.abs(after - before).sum()
        allowed = bounds.softmax(osc)
        assert bounds.ratio(moved, allowed) <= 1
        assert moved > allowed - bounds.gamma(64, bounds.UNIT["float64"])  # float64's own


def test_b7_b_to_b7_d_hold_when_every_key_and_value_moves_as_far_as_it_may():
    rng = np.random.default_rng(1)
    for _ in range(200):
        tokens, d = rng.integers(1, 30), rng.integers(1, 20)
        k, v = rng.normal(size=(2, tokens, d)) * 2.0 ** rng.integers(-3, 4, d)
        q = rng.normal(size=d) * 2.0 ** rng.integers(-3, 6)
        e_k, e_v = np.abs(rng.normal(size=(2, tokens, d))) * 2.0 ** rng.integers(-6, 1)
        signs = np.sign(q) * np.where(rng.random((tokens, 1)) < 1 / 2, -1, 1)
        k_hat, v_hat = k + signs * e_k, v + rng.choice([-1, 1], (1, d)) * e_v
        (z, p, o), (z_hat, p_hat, o_hat) = attention(q, k, v), attention(q, k_hat, v_hat)
        exact, moved_own = (
            bounds.kv_attention(q, *each, dtype="float64")
            for each in ((k, v, p), (k_hat, v_hat, p_hat))
        )
        logits = bounds.kv_logits(q, e_k)
        size = bounds.kv_logits(q, np.abs(k) + np.abs(k_hat))
        own = bounds.gamma(int(d) + 2, bounds.UNIT["float64"]) * size
        assert bounds.ratio(z_hat - z, logits + own) <= 1
        weights = bounds.softmax(2 * logits.max()) + exact[0] + moved_own[0]
        assert bounds.ratio(np.abs(p_hat - p).sum(), weights) <= 1
        output = bounds.kv_output(p_hat, e_v, weights, v) + exact[1] + moved_own[1]
        assert bounds.ratio(o_hat - o, output) <= 1


@pytest.mark.parametrize("online", [False, True], ids=["two passes", "online"])
def test_b7_e_holds_for_float32_attention(online):
    rng = np.random.default_rng(2)
    for _ in range(100):
        tokens, d = int(rng.integers(1, 60)), int(rng.integers(1, 60))
        k, v = np.float32(rng.normal(size=(2, tokens, d)) * 2.0 ** rng.integers(-3, 6, d))
        q = np.float32(rng.normal(size=d) * 2.0 ** rng.integers(-3, 6))
        _, p, o = attention(*(np.float64(each) for each in (q, k, v)))
        got = in_float32(q, k, v, online)
        count = tokens if online else 0
        _, allowed = bounds.kv_attention(q, k, v, p, rescalings=count)
        _, own = bounds.kv_attention(q, k, v, p, dtype="float64")
        assert bounds.ratio(got - o, allowed + own) <= 1


def in_float32(q, k, v, online):
    """Attention in float32, token by token or with all logits first."""
    z = (k * q).sum(1) / np.float32(np.sqrt(np.float32(len(q))))
    if not online:
        p = np.exp(z - z.max())
        return (p[:, None] * v).sum(0) / p.sum()
    largest, total, output = np.float32(-np.inf), np.float32(0), np.zeros_like(q)
    for logit, value in zip(z, v, strict=True):
        new = np.maximum(largest, logit)
        old, power = np.exp(largest - new), np.exp(logit - new)
        total, output, largest = total * old + power, output * old + power * value, new
    return output / total
