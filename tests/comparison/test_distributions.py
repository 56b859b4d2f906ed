"""Distributions are what numpy says of the same numbers, and cover every value once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import bounds
from qframe.calibration import CalibrationData
from qframe.comparison.distributions import BIN, BINS, SIGMAS, TOKENS, observe, record
from qframe.model import Network
from qframe.weights import ModelFolder


def close(found, expected, terms):
    """Up to the rounding of a float64 sum of so many squares, and of what is made of it."""
    return abs(found - expected) <= bounds.gamma(2 * terms, bounds.UNIT["float64"]) * abs(expected)


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    outlier=st.sampled_from([0.0, 7.0, 1e6]),
)
def test_a_record_is_what_numpy_says(seed, rows, columns, outlier):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[0, 0] += outlier
    found = record([values])
    x = values.double().numpy()
    sigma = x.std()
    assert close(found["sigma"], sigma, x.size + 8)
    assert found["absmax"] == np.abs(x).max()
    assert found["columns"] == (np.abs(x).max(0) >= 6).mean()
    assert sum(found["counts"]) == x.size
    assert len(found["counts"]) == 2 * BINS + 1
    if sigma:
        z = np.abs((x - found["mean"]) / found["sigma"])
        assert found["outliers"] == (z > SIGMAS).mean()
        bins = np.clip(np.round(np.arcsinh(z) / BIN), 0, BINS)
        folded = np.array(found["counts"][BINS:])
        folded[1:] += found["counts"][:BINS][::-1]
        # a value on the edge between two bins may fall on either side
        assert np.abs(np.cumsum(folded) - np.cumsum(np.bincount(bins.astype(int).ravel(),
                      minlength=BINS + 1))).max() <= 1  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_has_a_record(shape):
    found = record([torch.zeros(shape)])
    assert sum(found["counts"]) == 0
    assert all(math.isfinite(found[name]) for name in ("mean", "sigma", "absmax", "outliers"))


def test_constants_have_no_outliers():
    found = record([torch.full((5, 3), 7.0)])
    assert (found["sigma"], found["outliers"], found["columns"]) == (0.0, 0.0, 1.0)
    assert found["counts"][BINS] == 15


def test_pieces_do_not_change_a_record():
    """Counts to the last one; figures up to the order of a sum."""
    values = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    whole, parts = record([values]), record(values.split(2))
    assert whole["counts"] == parts["counts"]
    assert close(parts["sigma"], whole["sigma"], values.numel())


def test_layers_are_seen_with_the_inputs_of_the_full_network(model, tiny):
    tokens = torch.arange(96).reshape(3, 32) % 251
    data = CalibrationData.from_tokens(tokens, tokens[:0], {})
    found = observe(model, tiny.LINEAR_LAYERS, data, threads=2, dtype=torch.float32)
    assert found["tokens"] == 96
    assert list(found["layers"]) == tiny.LINEAR_LAYERS
    network = Network.from_folder(ModelFolder(model))
    network.load(network.module, recurse=True)
    seen = {}
    for name in tiny.LINEAR_LAYERS:
        layer = network.module.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
        )
    with torch.no_grad():
        network.module(tokens)
    for name in tiny.LINEAR_LAYERS:
        here = found["layers"][name]
        assert here["weight"] == record([network.weight(name)])
        assert sum(here["input"]["counts"]) == seen[name].numel()
        assert here["input"] == record([seen[name]])
    assert found == observe(model, tiny.LINEAR_LAYERS, data, threads=1, dtype=torch.float32)


def test_no_more_tokens_are_looked_at_than_promised(model, tiny):
    tokens = torch.arange(1024 * 24).reshape(-1, 64) % 251
    data = CalibrationData.from_tokens(tokens, tokens[:0], {})
    first = tiny.LINEAR_LAYERS[:1]
    found = observe(model, first, data, threads=1, dtype=torch.float32)
    assert found["tokens"] == TOKENS < tokens.numel()


def test_a_layer_that_no_token_reaches_has_weights_only(model, tiny, monkeypatch):
    data = CalibrationData.from_tokens(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(0, 8), {})
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(x.repeat(1, 1, 2)[..., :96])
    )
    found = observe(model, tiny.LINEAR_LAYERS, data, threads=1, dtype=torch.float32)["layers"]
    assert found["model.layers.0.mlp.up_proj"]["input"] is None
    assert sum(found["model.layers.0.mlp.up_proj"]["weight"]["counts"]) == 64 * 96
    assert found["model.layers.0.mlp.down_proj"]["input"] is not None
