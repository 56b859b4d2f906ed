"""The memory that an object holds, measured and not asked: every buffer that can be reached.

A view counts with the whole buffer behind it, and a buffer counts once; but of mapped memory, that
many may share, a view counts alone. What an object says of its size can be compared with this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Set
from mmap import mmap
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_CLOSED = (str, bytes, int, float, complex, type, ModuleType, FunctionType, BuiltinFunctionType)


def held_bytes(item: object) -> int:
    """Return the bytes of all tensors and arrays that `item` holds, in attributes and containers.

    >>> held_bytes({"window": torch.zeros(8)[:2], "codes": [np.zeros(3, np.int8)]})
    35
    """
    return sum(_buffers(item).values())


def _buffers(item: object) -> dict[int, int]:
    """Return address -> bytes of the buffers."""
    found: dict[int, int] = {}
    waiting, seen = [item], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _CLOSED) or each is None:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, np.ndarray):
            view = each
            while isinstance(each.base, np.ndarray):
                each = each.base
            if isinstance(getattr(each.base, "obj", each.base), mmap):
                address = view.__array_interface__["data"][0]
                found[address] = max(view.nbytes, found.get(address, 0))
            elif each.base is not None:
                waiting.append(each.base)  # e.g. a tensor
            elif each.nbytes:
                found[each.__array_interface__["data"][0]] = each.nbytes
        else:
            waiting += _parts(each)
    return found


def _parts(item: Any) -> Iterator[Any]:
    """Yield what an object holds."""
    if isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, (list, tuple, deque, Set)):
        yield from item
    elif isinstance(item, MethodType):
        yield item.__self__
    yield from getattr(item, "__dict__", {}).values()
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                yield getattr(item, name)
