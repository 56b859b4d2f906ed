"""Numbers as PTX writes them, and lists with commas."""

from __future__ import annotations

import re
import struct

from qframe_plugins.ptx_host.syntax import Immediate

INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def split(text: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def number(text: str) -> Immediate | None:
    """Return the literal `text`, or None where it is none."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 32, True)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 64, True)
    if INTEGER.match(text):
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
        digits = digits.rstrip("U")
        octal = re.fullmatch(r"0[0-7]+", digits)
        value = sign * (int(digits, 8) if octal else int(digits, 0))
        if -(1 << 63) <= value < 1 << 64:
            return Immediate(value % (1 << 64))
        return None
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
        return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"), 64, True)
    return None


def signed(value: int, bits: int = 64) -> int:
    """Return what `value` is in two's complement."""
    return value - ((value >> (bits - 1)) << bits)
