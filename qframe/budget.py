"""What --max-memory leaves for activations that wait; and what is said where it is too little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qframe.errors import MemoryLimitError
from qframe.memory import readable_bytes
from qframe.peak import WAITING, peak_memory

if TYPE_CHECKING:
    from qframe.calibration import CalibrationData
    from qframe.pipeline import Job


def activation_budget(
    job: Job, data: CalibrationData | None, max_memory: int, threads: int
) -> int | None:
    """Return how many bytes activations may take while they wait; None where all of them fit.

    data   the calibration inputs, where they are known already

    Raises MemoryLimitError where even without them the run takes more than `max_memory`, or where
    its method needs all of them at once.
    """
    whole = peak_memory(job, threads, data=data)
    if sum(whole.values()) <= max_memory:
        return None
    least = peak_memory(job, threads, 0, data=data)
    needed = sum(least.values())
    if needed > max_memory:
        raise MemoryLimitError(
            f"max_memory is {readable_bytes(max_memory)}, but this run takes at least "
            f"{readable_bytes(needed)}: {_listed(least)}; {_advice(job, threads)}"
        )
    if job.method.learns:
        raise MemoryLimitError(
            f"method {job.recipe.method!r} learns from all inputs of a block at once, which takes "
            f"{readable_bytes(sum(whole.values()))}, more than max_memory, "
            f"{readable_bytes(max_memory)}; give --max-memory more, or take fewer "
            f"--num-calibration-samples or a smaller --max-seq-length"
        )
    return min(max_memory - needed, whole[WAITING])


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{readable_bytes(count)} {what}" for what, count in parts.items() if count)


def _advice(job: Job, threads: int) -> str:
    """Return what takes less."""
    layer = max((job.network.layers[name] for name in job.plan.schemes), key=lambda i: i.size)
    fewer = "--threads 1 takes less, or " if threads > 1 else ""
    return (
        f"the largest layer is {layer.name!r}, [{layer.rows}, {layer.columns}]. {fewer}give "
        f"--max-memory more"
    )
