"""What the numbers of a run depend on: only a run for which all of it is the same may go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from qframe import parallel
from qframe.comparison.identity import environment, model_identity, plugin_identity
from qframe.fingerprints import fingerprint
from qframe.fold_search import digest

if TYPE_CHECKING:
    from qframe.calibration import CalibrationData
    from qframe.pipeline import Job


def run_identity(
    job: Job, calibration: CalibrationData | None, threads: int, *, whole: bool = True
) -> dict[str, Any] | None:
    """Return everything that decides what a run writes, as plain values in mappings.

    None where some of it cannot be told: calibration inputs that are no tensors. The number of
    threads is none of it, nor is where the files are.

    whole   read all of the model's tensors for their hashes, and not only what is known of them
    """
    data = None
    if calibration is not None:
        data = {
            "source": _plain(calibration.source),
            "inputs": digest([list(each) for each in calibration.inputs]),
            "held_out": digest([list(each) for each in calibration.held_out]),
        }
        if data["inputs"] is None or data["held_out"] is None:
            return None
    return {
        "recipe": job.recipe.model_dump(mode="json"),  # first, as the others may follow from it
        "model": _model(job, threads, whole),
        "layout": job.layout.name,
        "calibration": data,
        "environment": environment(job.recipe.calibration.compute_dtype),
        "plugins": {
            f"{record['kind']} {record['name']}": record for record in plugin_identity(job)
        },
    }


def _model(job: Job, threads: int, whole: bool) -> dict[str, str]:
    """Return name of a tensor -> what it is, and its fingerprint; name of a file -> its sha256."""
    network = job.network
    if network.folder is not None:
        return model_identity(network.folder, threads, whole=whole)
    state = {k: v for k, v in network.module.state_dict().items() if isinstance(v, torch.Tensor)}
    hashes = parallel.spread(lambda name: _told(state[name]), list(state), threads)
    return {"class": type(network.module).__name__, **dict(zip(state, hashes, strict=True))}


def _told(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {fingerprint(tensor)}"


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of calibration data, with words for what JSON has none."""
    return {key: value if _simple(value) else str(value) for key, value in source.items()}


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))
