"""How weights and inputs are distributed, layer by layer: one pass of the unquantized network.

Chunks of text go through in lockstep (`qframe.calibration`), so that all inputs of a layer are
there at once, and its mean and standard deviation are known before anything is counted. Blocks are
loaded and freed in turn. No more than TOKENS tokens are looked at; what is kept of a layer is
about a hundred numbers.

Values are counted in units of the layer's standard deviation sigma, on a scale that is linear
around zero and logarithmic far out: bin k holds z = (x - mean) / sigma with asinh(z) within BIN / 2
of k * BIN.

An outlier lies more than SIGMAS sigma from the mean. LLM.int8() (Dettmers et al., NeurIPS 2022,
arXiv:2208.07339, section 3.1) instead takes columns that hold a magnitude of at least 6.0, in the
units of the network; their share is counted as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qframe import parallel
from qframe.calibration import Arrival, CalibrationData, Lockstep, Stop, layer_input
from qframe.model import Network
from qframe.walk import accepted, load_on_demand
from qframe.weights import ModelFolder

TOKENS = 4096
SIGMAS = 6.0
MAGNITUDE = 6.0  # of LLM.int8(), in the units of the network
BIN = 0.25
BINS = 32  # on either side of the middle one; the last holds everything beyond 1,490 sigma
_ROWS = 2048  # at a time


def observe(
    folder: Path,
    layers: Sequence[str],
    data: CalibrationData,
    *,
    threads: int,
    dtype: torch.dtype,
    done: Callable[[int, int], None] = lambda seen, of: None,
) -> dict[str, Any]:
    """Return {"tokens": ..., "layers": name -> {"weight": record, "input": record or None}}.

    layers   of which distributions are wanted
    data     chunks of tokens; of more than TOKENS, chunks evenly spread over them are taken
    dtype    of matrix products, as for calibration
    done     called with how many layers were seen, and of how many

    Raises ModelError when the forward pass fails.
    """
    network = Network.from_folder(ModelFolder(folder))
    chunks = _chosen(data.inputs)
    found: dict[str, dict[str, Any]] = {}
    steps = Lockstep(network.module, threads=threads, dtype=dtype)
    inside: dict[str, list[str]] = {name: [] for name in network.blocks}
    for layer in layers:
        inside.setdefault(network.block_of(layer), []).append(layer)
    for name, members in inside.items():
        if name in network.blocks:
            steps.watch(Stop("block", name), network.blocks[name])
        for layer in members:
            steps.watch(Stop("layer", layer), network.module.get_submodule(layer))
    last: tuple[list[torch.Tensor], dict[str, Any]] = ([], {})
    block = ""

    def on_stop(stop: Stop, arrivals: Mapping[int, Arrival]) -> bool:
        nonlocal block, last
        if stop.kind == "block":
            if stop.name != block and block:
                network.release(network.blocks[block])
            block = stop.name
            network.load(network.blocks[block], recurse=True)
        elif stop.name not in found:
            inputs = [layer_input(a.args, a.kwargs) for a in arrivals.values()]
            if not _same(inputs, last[0]):  # layers that read one input get one look
                last = (inputs, record(inputs))
            found[stop.name] = {"weight": record([network.weight(stop.name)]), "input": last[1]}
            done(len(found), len(layers))
        return len(found) < len(layers)

    loaders = load_on_demand(network)
    try:
        with parallel.one_torch_thread():
            options = accepted(network.module, {"use_cache": False})
            steps.run(dict(enumerate(chunks)), options, on_stop)
    finally:
        for handle in loaders:
            handle.remove()
    for layer in layers:
        if layer not in found:  # no token reached it
            found[layer] = {"weight": record([network.weight(layer)]), "input": None}
    tokens = sum(chunk[0].numel() for chunk in chunks)
    return {"tokens": tokens, "layers": {layer: found[layer] for layer in layers}}


def record(parts: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return what is kept of some values, [..., columns] each.

    mean, sigma    of all values
    absmax         the largest magnitude
    outliers       share of values more than SIGMAS sigma from the mean
    columns        share of columns that hold a magnitude of at least MAGNITUDE
    counts         2 BINS + 1 numbers of values
    """
    flat = [p.detach().reshape(-1, p.shape[-1]).split(_ROWS) for p in parts if p.numel()]
    pieces = [piece for part in flat for piece in part]
    count = sum(piece.numel() for piece in pieces)
    if not count:
        return {"mean": 0.0, "sigma": 0.0, "absmax": 0.0, "outliers": 0.0, "columns": 0.0,
                "counts": [0] * (2 * BINS + 1)}  # fmt: skip
    mean = math.fsum(float(p.sum(dtype=torch.float64)) for p in pieces) / count
    square = math.fsum(float((p.double() - mean).square().sum()) for p in pieces) / count
    sigma = math.sqrt(square)
    largest = torch.stack([p.abs().amax(0).double() for p in pieces]).amax(0)
    counts, outliers = torch.zeros(2 * BINS + 1, dtype=torch.int64), 0
    for piece in pieces:
        z = (piece.double() - mean).div_(sigma or 1.0)
        outliers += int((z.abs() > SIGMAS).sum())
        bins = z.asinh_().div_(BIN).round_().clamp_(-BINS, BINS).long() + BINS
        counts += torch.bincount(bins.reshape(-1), minlength=2 * BINS + 1)
    return {
        "mean": mean,
        "sigma": sigma,
        "absmax": float(largest.amax()),
        "outliers": outliers / count,
        "columns": float((largest >= MAGNITUDE).double().mean()),
        "counts": counts.tolist(),
    }


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Return whether these are the very same tensors; both are alive, so identities differ."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _chosen(inputs: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return as many chunks as hold TOKENS tokens, at least one, evenly spread over all."""
    each = max(1, max(chunk[0].numel() for chunk in inputs))
    count = min(len(inputs), max(1, TOKENS // each))
    return [inputs[i * len(inputs) // count] for i in range(count)]
