"""Several ways to give bits to layers, each tried: what the network loses with all layers rounded.

Predictions are for one layer at a time and to second order. Where many layers lose much they lose
more together than apart, and a layer with 2 bits beside others does more harm than by itself. So
a few allocations are made, the more cautious ones shunning layers that are hardly themselves any
more, and the one that does best is taken. Measured, not assumed: the network is rounded to nearest
by each, and run on a few of the windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qframe import parallel
from qframe.fisher import Rounded
from qframe.host import Host
from qframe.model import Network, get_weight, set_weight
from qframe.scheme import Scheme
from qframe.sensitivity import Inputs, windows_of
from qframe.walk import accepted

WINDOWS = 4  # that allocations are tried on
ROWS_AT_ONCE = 64  # of distributions, that they still fit the caches

Choice = Mapping[str, Scheme]  # layer -> its scheme


@torch.no_grad()
def divergences(
    network: Network,
    choices: Mapping[str, Choice],
    inputs: Sequence[Inputs],
    host: Host,
    threads: int,
) -> dict[str, float]:
    """Return name of a choice -> KL divergence, nats for a token, of the network rounded by it.

    Infinity where a network so rounded gives no numbers.

    network   its weights must be in memory, and are there again afterwards
    inputs    chunks of text, as `qframe.sensitivity.windows_of` takes them
    threads   how many; the result does not depend on it
    """
    windows = windows_of(inputs, WINDOWS)
    with parallel.one_torch_thread():
        own = parallel.spread(lambda x: _distribution(network, x), windows, threads)
        pairs = list(zip(windows, own, strict=True))
        found = {}
        for name, choice in choices.items():
            with _rounded(network, choice, host, threads):
                lost = parallel.spread(
                    lambda pair: _divergence(pair[1], _distribution(network, pair[0])),
                    pairs,
                    threads,
                )
            mean = sum(lost) / max(1, sum(map(len, own)))
            found[name] = mean if math.isfinite(mean) else math.inf
    return found


@contextmanager
def _rounded(network: Network, choice: Choice, host: Host, threads: int) -> Iterator[None]:
    """Round the layers of a network to nearest, for a while."""
    modules = {name: network.module.get_submodule(name) for name in choice}
    weights = {name: get_weight(module).to(torch.float32) for name, module in modules.items()}
    rounded = Rounded(weights, {name: (scheme,) for name, scheme in choice.items()}, host)
    before = {name: module._parameters["weight"] for name, module in modules.items()}

    def put(name: str) -> None:
        changed = weights[name] + next(rounded.changes(name))
        set_weight(modules[name], changed.to(get_weight(modules[name]).dtype))

    try:
        parallel.spread(put, list(choice), threads)
        yield
    finally:
        for name, module in modules.items():
            module._parameters["weight"] = before[name]


@torch.no_grad()
def _distribution(network: Network, inputs: Inputs) -> torch.Tensor:
    """Return log-probabilities, [tokens, classes] float32."""
    options: dict[str, Any] = {"use_cache": False} if network.folder is not None else {}
    logits = network.module(*inputs, **accepted(network.module, options)).logits
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1]).to(torch.float32), -1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Return the sum over tokens of the divergence of q from p."""
    parts = zip(log_p.split(ROWS_AT_ONCE), log_q.split(ROWS_AT_ONCE), strict=True)
    return sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in parts)
