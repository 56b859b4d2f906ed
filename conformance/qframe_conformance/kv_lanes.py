"""Keys and values, the nasty kinds by name; a lane is one head of one sequence.

A kind is a function of a random generator and a shape [tokens, head_dim], as in `kinds`.
"""

from __future__ import annotations

import numpy as np
import torch

from qframe_conformance import kinds
from qframe_conformance.kinds import Float64, Kind

LARGEST = 2.0**14  # of what is drawn: below float16's end, so that every scale fits its dtype


def outlier_channel(rng: np.random.Generator, shape: tuple[int, int]) -> Float64:
    """Return keys as models have them: one channel is large in all tokens, and of one sign."""
    x = rng.normal(size=shape)
    x[:, int(rng.integers(shape[1]))] += 64
    return x


def constant_channels(rng: np.random.Generator, shape: tuple[int, int]) -> Float64:
    """Return tokens that are all the same: every channel is without a range."""
    return np.tile(rng.normal(size=shape[1]) * 3, (shape[0], 1))


def far_from_zero(rng: np.random.Generator, shape: tuple[int, int]) -> Float64:
    """Return a small range far from zero, below it or above."""
    return (1 - 2 * int(rng.integers(2))) * (100 + rng.random(shape))


def tokens_of_all_sizes(rng: np.random.Generator, shape: tuple[int, int]) -> Float64:
    """Return tokens of very different size."""
    return rng.normal(size=shape) * 2.0 ** rng.integers(-12, 8, (shape[0], 1))


LANES: tuple[Kind, ...] = (
    kinds.normal,
    outlier_channel,
    constant_channels,
    far_from_zero,
    kinds.one_outlier,
    tokens_of_all_sizes,
    kinds.halves,
    kinds.zeros,
    kinds.ties,
    kinds.one_sided,
    kinds.subnormal,
    kinds.tiny_and_huge,
)


def lanes(
    rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: str, first: int = 0
) -> torch.Tensor:
    """Return [batch, heads, tokens, head_dim] with lanes of one kind after the other."""
    batch, heads, tokens, head_dim = shape
    made = [LANES[(first + n) % len(LANES)](rng, (tokens, head_dim)) for n in range(batch * heads)]
    numbers = np.clip(np.stack(made), -LARGEST, LARGEST).astype(np.float32).reshape(shape)
    return torch.from_numpy(numbers).to(getattr(torch, dtype))
