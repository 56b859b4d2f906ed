"""Numbers of bytes as people write them."""

from __future__ import annotations

import math
import re

from qframe.errors import RecipeError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, flag: str) -> int:
    """Return a number of bytes. Raises RecipeError.

    GB are 10^9 bytes, GiB 2^30. A number alone is bytes.

    >>> [parse_size(text, "--max-memory") for text in ("8GB", "1.5 gib", "500M", "1e9")]
    [8000000000, 1610612736, 500000000, 1000000000]
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise RecipeError(f"{flag} {text}: expected a number of bytes, such as 8GB or 500MB")
    size: float = float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]
    if not 1 <= size < math.inf:
        raise RecipeError(f"{flag} {text}: that is no memory; give a size, such as 8GB or 500MB")
    return round(size)
