"""What layouts have in common: a tensor of a layer, of the dtype and shape that it should have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qframe.errors import WeightsError

if TYPE_CHECKING:
    import torch


def tensor_of(
    tensors: Mapping[str, torch.Tensor],
    part: str,
    name: str,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Return a tensor of the layer `name`. Raises WeightsError where it is missing or another."""
    found = tensors.get(part)
    if found is None:
        raise WeightsError(f"layer {name!r}: {part} missing")
    if dtype not in (None, found.dtype) or shape not in (None, tuple(found.shape)):
        wanted = [str(dtype)] if dtype is not None else []
        wanted += [str(list(shape))] if shape is not None else []
        raise WeightsError(
            f"layer {name!r}: {part} should be {' '.join(wanted)}, got {found.dtype} "
            f"{list(found.shape)}"
        )
    return found
