"""What a run takes in memory at its peak, from headers alone: before anything is loaded.

The numbers of copies follow from what the code holds at the places that are named; what libraries
and the C library add is measured, by benchmarks/memory.py, whose table is docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from qframe.memory import all_stored_bits, calibrates, window_of
from qframe.panels import PANEL, apart
from qframe.weights import PIECE_BYTES

if TYPE_CHECKING:
    from qframe.calibration import CalibrationData
    from qframe.contracts import LayerInfo
    from qframe.model import Network
    from qframe.pipeline import Job

PROGRAM_BYTES = 480_000_000  # Python with torch, transformers, numba and kernels; on Linux
TEXT_BYTES = 70_000_000  # more: a tokenizer, the text, and what a pass through the network needs
LAYER_BYTES = 7  # for a weight of the largest layer: itself, its codes, what groups have
BUSY = 8  # threads that have such pieces at the same time, at most
REWRITTEN_BYTES = 12  # more for a weight that is rewritten: that, and what its codes stand for
PANEL_BYTES = 10  # for a weight of a panel, on each thread: as stored, in float32, its codes
NEXT_BYTES = 6  # more for a weight that is read and rounded while the one before it is judged
PIECES_BYTES = 8  # for a weight of a piece, on each thread: what is made of it in the cache
PIECE = 900_000  # weights of a layer beyond which its pieces take no more
ROUNDING_BYTES = 21  # for a weight with statistics: itself, quotients, scales, and in between
JUDGING_BYTES = 15  # itself, what became of it, the difference, codes; beside the next rounding
CODED_BYTES = 1.1  # for a stored byte of a block: its codes wait until the block is done
LEARNING_BYTES = 40  # for a weight of a block: weights and slopes of two chunks, and what is kept
STATISTICS_BYTES = 36  # for a pair of columns: what is held when a layer is certified
MEASURED_TOKENS = 512  # of a window on which sensitivities are measured, at most
MEASURING_LANES = 2  # windows that are measured at the same time
PASS_COPIES = 2  # of inputs and outputs of layers, between a pass forward and one backward
LOGIT_COPIES = 4  # of logits: they, their gradient, and what a softmax makes in between
CHUNK_COPIES = 2  # of inputs and outputs of layers of a block, while a chunk runs
WAITING = "activations"


def peak_memory(
    job: Job, threads: int = 1, budget: int | None = None, *, data: CalibrationData | None = None
) -> dict[str, int]:
    """Return about how many bytes a run takes at its peak, by what takes them.

    budget   bytes of activations that wait in memory; None for all of them
    data     the calibration inputs, where they are known

    Everything that is there at the same time is added. Measuring sensitivities comes before all
    that, where it is asked for: what takes more is the peak.
    """
    if calibrates(job) or data is not None:
        peak = _calibrated(job, threads, budget, data)
    else:
        peak = _weights_alone(job, threads)
    if job.candidates is not None:
        measuring = measuring_memory(job.network, job.plan.schemes)
        peak = max(peak, measuring, key=lambda parts: sum(parts.values()))
    return peak


def _weights_alone(job: Job, threads: int) -> dict[str, int]:
    """Layers are made panel by panel, or one by one while the one before is judged; then the rest.

    With several threads the codes of a block are written while those of the next one are made.
    """
    network, layers = job.network, job.plan.schemes
    sizes = {name: network.layers[name].size for name in layers}
    panels = [
        min(sizes[name], max(PANEL, network.layers[name].columns))
        for name, scheme in layers.items()
        if apart(job.method, scheme) and network.rows_of(name) is not None
    ]
    rewritten = REWRITTEN_BYTES if job.method.handlers else 0
    codes = _codes(job) * (2 if threads > 1 else 1)
    by_panels = {
        "program": PROGRAM_BYTES,
        "panels of weights": PANEL_BYTES * max(panels, default=0) * threads,
        "codes of blocks": codes,
    }
    largest = max(sizes.values()) if len(panels) < len(sizes) else 0
    pieces = PIECES_BYTES * min(largest, PIECE) * min(threads, BUSY)
    one_by_one = {
        "program": PROGRAM_BYTES,
        "pieces of weights": pieces,
        "largest layer": (LAYER_BYTES + rewritten) * largest,
        "layer after it": (NEXT_BYTES + rewritten) * largest if threads > 1 else 0,
        "codes of blocks": codes,
    }
    left = 0
    if network.folder is not None:
        coded = {network.stored_name(f"{name}.weight") for name in layers}
        stored = network.folder.tensors.items()
        left = max((there.bytes for name, there in stored if name not in coded), default=0)
    carried = {
        "program": PROGRAM_BYTES,
        "pieces of weights": pieces,
        "tensors as they are": 2 * min(left, PIECE_BYTES),
    }
    return max(by_panels, one_by_one, carried, key=lambda parts: sum(parts.values()))


def _calibrated(
    job: Job, threads: int, budget: int | None, data: CalibrationData | None
) -> dict[str, int]:
    """All chunks wait while a group of the largest block is observed, rounded and judged."""
    network, settings = job.network, job.recipe.calibration
    if data is None:
        samples = settings.num_calibration_samples * (1 + settings.held_out_fraction)
        window = window_of(job)
        tokens, chunk = round(samples) * window, max(2048 // window, 1) * window
    else:
        counts = [x.numel() for each in (*data.inputs, *data.held_out) for x in each[:1]]
        tokens, chunk = sum(counts), max(counts, default=0)
    by_block: dict[str, list[LayerInfo]] = {}
    for name in job.plan.schemes:
        by_block.setdefault(network.block_of(name), []).append(network.layers[name])
    blocks = list(by_block.values())
    weights = max(sum(layer.size for layer in layers) for layers in blocks)
    largest = max(layer.size for layers in blocks for layer in layers)
    widest = max(layer.columns for layers in blocks for layer in layers)
    narrow = min(layer.columns for layers in blocks for layer in layers)
    passes = 1 + (job.method.learns or any(map(job.host.wants_pairs, job.method.needs)))
    # Before the last layer of an MLP its inputs wait, those of the MLP, and what goes around it.
    waiting = 4 * tokens * (passes * (2 * narrow + widest) + job.method.learns * narrow)
    rewritten = bool(job.method.handlers)
    seen = 4 * widest * (tokens if budget is None else chunk) * (passes + rewritten)
    kept = waiting if budget is None else min(waiting, budget)
    running = 4 * CHUNK_COPIES * threads * chunk * (narrow + widest)
    program = PROGRAM_BYTES + TEXT_BYTES
    beginning = {
        "program": program,
        "embeddings": _embeddings(network),
        WAITING: min(kept, passes * 4 * tokens * narrow),
    }
    block = {
        "program": program,
        "largest block": 4 * weights + LEARNING_BYTES * weights * job.method.learns,
        "codes of blocks": 2 * _codes(job),
        "rounding": (ROUNDING_BYTES + JUDGING_BYTES * (threads > 1)) * largest,
        "statistics": passes * STATISTICS_BYTES * widest * widest,
        "inputs of a layer": seen,
        "chunks that run": running,
        WAITING: kept,
    }
    return max(block, beginning, key=lambda parts: sum(parts.values()))


def _embeddings(network: Network) -> int:
    """Return the bytes of embeddings in float32, and of what they are read from."""
    stored = {} if network.folder is None else network.folder.tensors
    total = 0
    for name, module in network.module.named_modules():
        if isinstance(module, nn.Embedding):
            there = stored.get(network.stored_name(f"{name}.weight"))
            total += 4 * module.weight.numel()
            total += 0 if there is None or there.dtype == "F32" else there.bytes
    return total


def _codes(job: Job) -> int:
    """Return the bytes of the largest block as it is stored."""
    sizes: dict[str, int] = {}
    for name in job.plan.schemes:
        block = job.network.block_of(name)
        sizes[block] = sizes.get(block, 0) + job.network.layers[name].size
    share = max(sizes.values()) / max(sum(sizes.values()), 1)
    return round(CODED_BYTES * share * all_stored_bits(job) / 8)


def measuring_memory(network: Network, layers: Iterable[str]) -> dict[str, int]:
    """Return about how many bytes measuring sensitivities takes (`qframe.sensitivity`).

    layers   whose sensitivities are measured
    """
    parameters = sum(p.numel() for p in network.module.parameters())
    measured = [network.layers[name] for name in layers]
    width = sum(layer.rows + layer.columns for layer in measured)
    outside = [i.rows for name, i in network.layers.items() if not network.block_of(name)]
    tokens = MEASURING_LANES * MEASURED_TOKENS
    return {
        "program": PROGRAM_BYTES + TEXT_BYTES,
        "network": 4 * parameters,
        "squared gradients": 4 * MEASURING_LANES * sum(layer.size for layer in measured),
        "activations": 4 * PASS_COPIES * tokens * width,
        "logits": 4 * LOGIT_COPIES * tokens * max(outside, default=0),
        "rounding": ROUNDING_BYTES * max(layer.size for layer in measured),
    }
