"""How many tokens a network was made for, and how long windows of text are for it.

Beyond its positions some networks fail; others, with rotary positions, go on and compute nonsense.
"""

from __future__ import annotations

import json
from pathlib import Path

from qframe.errors import CalibrationError

CALIBRATION_WINDOW = 2048  # tokens, where nothing else is asked for
EVALUATION_WINDOW = 512

_NAMES = ("max_position_embeddings", "n_positions")  # in config.json, by network


def positions(folder: str | Path) -> int | None:
    """Return how many tokens the network was made for, None where config.json does not say."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    found = (config.get(name) for name in _NAMES)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def window_length(folder: str | Path | None, asked: int | None, usual: int, name: str) -> int:
    """Return how many tokens a window has: what was asked for, or `usual` if the network allows.

    folder   of the network; None where it has none, and nothing is known of its positions
    asked    None: as usual, but no more than the network has positions
    name     what the length is called where it is asked for, for the message

    Raises CalibrationError when more was asked for than the network has positions.
    """
    most = None if folder is None else positions(folder)
    if asked is None:
        return usual if most is None else min(usual, most)
    if most is not None and asked > most:
        raise CalibrationError(
            f"{folder}: the network was made for {most} positions (config.json), fewer than "
            f"{name}={asked}; give at most {most}"
        )
    return asked
