"""Whether a launcher such as torchrun has started several processes, of which this is one."""

from __future__ import annotations

import os

from qframe.errors import RanksError

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int]:
    """Return the number of this process and how many there are: 0 of 1 without a launcher.

    Raises RanksError for an environment that no launcher makes.
    """
    if not all(name in os.environ for name in _ENVIRONMENT):
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise RanksError(
            f"the environment says RANK={rank!r} and WORLD_SIZE={size!r}, which is no process of "
            f"several; start them with torchrun, or unset these variables"
        )
    return int(rank), int(size)
