"""What a run takes in memory at its peak, from headers alone: before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qframe.memory import all_stored_bits, calibrates, most_statistics_bytes, window_of

if TYPE_CHECKING:
    from qframe.model import Network
    from qframe.pipeline import Job

PROGRAM_BYTES = 500_000_000  # Python with torch, transformers and numba; measured on Linux
BLOCK_COPIES = 6  # of a block's weights: original, quantized, to nearest, codes, and in between
LEARNING_COPIES = 10  # besides: weights and slopes of two chunks, and what is kept of each weight
WRITING_COPIES = 2  # of what is written: safetensors makes its own
KEPT_SHARE = 0.25  # of all that: freed memory that the allocator keeps; measured with glibc
STATISTICS_BYTES = 64  # for a pair of columns: sums and factors in float64, calibration, held out
MEASURED_TOKENS = 512  # of a window on which sensitivities are measured, at most
MEASURING_LANES = 2  # windows that are measured at the same time
PASS_COPIES = 2  # of inputs and outputs of layers, between a pass forward and one backward
LOGIT_COPIES = 4  # of logits: they, their gradient, and what a softmax makes in between
ACTIVATION_COPIES = 3  # of a layer's input at the peak: in the network, flattened, and in products


def peak_memory(job: Job) -> dict[str, int]:
    """Return about how many bytes a run takes at its peak, by what takes them.

    Everything that is there at the same time is added: the largest block in float32 with its
    quantized copies, the statistics of its widest input, the activations of all calibration
    tokens, and what waits to be written. Measuring sensitivities comes before all that, where it
    is asked for: what takes more is the peak.
    """
    from qframe.checkpoint import MAX_SHARD_BYTES

    network, settings = job.network, job.recipe.calibration
    folder_tensors = network.folder.tensors if network.folder is not None else {}
    blocks: dict[str, int] = {}
    widest = 0
    for layer in job.plan.schemes:
        info = network.layers[layer]
        block = network.block_of(layer)
        blocks[block] = blocks.get(block, 0) + 4 * info.size
        widest = max(widest, info.columns)
    largest = max(blocks.values())
    size = all_stored_bits(job) // 8
    carried = sum(t.bytes for t in folder_tensors.values()) - sum(
        folder_tensors[name].bytes
        for name in (network.stored_name(f"{layer}.weight") for layer in job.plan.schemes)
        if name in folder_tensors
    )
    learns = job.method.learns
    peak = {
        "program": PROGRAM_BYTES,
        "largest block": (BLOCK_COPIES + LEARNING_COPIES * learns) * largest,
        "being written": WRITING_COPIES
        * (min(size + carried, MAX_SHARD_BYTES) + min(most_statistics_bytes(job), MAX_SHARD_BYTES)),
    }
    if calibrates(job):
        samples = settings.num_calibration_samples * (1 + settings.held_out_fraction)
        tokens = round(samples) * window_of(job)
        inputs = sum({network.layers[n].columns for n in job.plan.schemes})
        peak["embeddings"] = carried
        # One more of the original network, and where blocks are learned their outputs in it.
        passes = 1 + (learns or any(map(job.host.wants_pairs, job.method.needs)))
        kept = inputs + (ACTIVATION_COPIES - 1 + learns) * widest
        peak["activations"] = 4 * passes * tokens * kept
        peak["statistics"] = passes * STATISTICS_BYTES * widest * widest
    peak |= {"kept by the allocator": round(KEPT_SHARE * sum(peak.values()))}
    if job.candidates is not None:
        measuring = measuring_memory(network, job.plan.schemes)
        peak = max(peak, measuring, key=lambda parts: sum(parts.values()))
    return peak


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
        "program": PROGRAM_BYTES,
        "network": 4 * parameters,
        "squared gradients": 4 * MEASURING_LANES * sum(layer.size for layer in measured),
        "activations": 4 * PASS_COPIES * tokens * width,
        "logits": 4 * LOGIT_COPIES * tokens * max(outside, default=0),
        "rounding": 4 * BLOCK_COPIES * max(layer.size for layer in measured),
    }
