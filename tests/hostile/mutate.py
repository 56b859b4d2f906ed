"""Files that are not what they should be: bytes and JSON values changed at random, by a seed."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e-320, 0.5, True, False]
TEXTS = ["", "..", "../../etc/passwd", "/etc/passwd", "\x00", "re:(", "re:(a+)+$", "x" * 5000, "é"]
OTHERS: list[Any] = [None, [], {}, [[]], [None], {"": {}}]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return data with some bytes flipped, cut out, repeated, or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            found[place:place] = rng.randbytes(rng.randrange(1, 16))
        elif kind == 4:
            found[place : place + 8] = rng.choice((2**63 - 1, 2**40, 100, 0)).to_bytes(8, "little")
        else:
            start = rng.randrange(len(found) + 1)
            found[place:place] = found[start : start + rng.randrange(1, 256)]
    return bytes(found)


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Return JSON text with some values changed, removed, doubled or nested deeply."""
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = _changed(rng, content)
    text = json.dumps(content)
    if rng.randrange(20) == 0:
        text = text[: rng.randrange(len(text))]
    if rng.randrange(40) == 0:
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


def _changed(rng: random.Random, value: Any) -> Any:
    """Return a value of JSON with one place in it changed, deeper ones more often."""
    if isinstance(value, dict) and value and rng.randrange(8):
        key = rng.choice(list(value))
        kind, found = rng.randrange(10), dict(value)
        if kind == 0:
            del found[key]
        elif kind == 1:
            found[rng.choice([*TEXTS, key + "x"])] = found[key]
        else:
            found[key] = _changed(rng, found[key])
        return found
    if isinstance(value, list) and value and rng.randrange(8):
        found_list, place = list(value), rng.randrange(len(value))
        if rng.randrange(6) == 0:
            del found_list[place]
        else:
            found_list[place] = _changed(rng, found_list[place])
        return found_list
    return rng.choice(
        (rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(OTHERS), _near(rng, value))
    )


def _near(rng: random.Random, value: Any) -> Any:
    """Return something of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value * 2))
    return value
