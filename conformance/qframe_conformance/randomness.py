"""The global random states of Python, NumPy and torch, which no plugin may use or change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed all global random states with `seed` modulo 2^32, torch's of the CPU alone."""
    seed %= 1 << 32
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Return whose state -> a copy of it, which can be compared."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        "Python": random.getstate(),
        "NumPy": (numpy_state["key"].tobytes(), numpy_state["pos"]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def changed(before: dict[str, Any]) -> tuple[str, ...]:
    """Return whose state is not what it was."""
    return tuple(whose for whose, state in random_states().items() if state != before[whose])
