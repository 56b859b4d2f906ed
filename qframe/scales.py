"""How scales are stored: the numbers of each scale dtype, rounding up to them, and their bytes.

e8m0 are the powers of two 2^-127 .. 2^127, stored as exponent + 127 (OCP, Microscaling Formats
1.0, section 5.4.1). e4m3 are the positive numbers of fp8_e4m3, and count multiples of a float32
scale of the whole tensor, which is a power of two: so the product of both is exact, also for those
who divide by its inverse, and exact again times a value of few bits (docs/bounds.md, B2.e).
"""

from __future__ import annotations

import torch

from qframe.scheme import ScaleDtype, WeightScaleDtype

# What rounding up to a storage dtype needs: mantissa bits dropped from float32, the smallest
# normal and the smallest positive number, and the largest finite number.
_STORAGE = {
    "float16": (13, 2.0**-14, 2.0**-24, 65504.0),
    "bfloat16": (16, 2.0**-126, 2.0**-133, 3.3895313892515355e38),
    "e8m0": (23, 2.0**-126, 2.0**-127, 2.0**127),
    "e4m3": (20, 2.0**-6, 2.0**-9, 448.0),
}
_STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}
_OF_TENSOR = 23  # mantissa bits of float32 that the scale of a tensor does without: all
SMALLEST_OF_TENSOR = 2.0**-117  # times 2^-9, the least of e4m3, it is still a normal number


def round_up(scale: torch.Tensor, dtype: WeightScaleDtype) -> torch.Tensor:
    """Return the least number of `dtype` that is >= scale, as float32; inf where none is.

    scale   any shape, float32, >= 0. For e8m0, which has no 0, 0 becomes the smallest number

    >>> round_up(torch.tensor([1.0, 1.0001]), "float16")
    tensor([1.0000, 1.0010])
    >>> round_up(torch.tensor([3.0, 0.0]), "e8m0").tolist() == [4.0, 2.0**-127]
    True
    """
    if dtype == "float32":
        return scale
    dropped, normal, tiny, largest = _STORAGE[dtype]
    up = _cut_up(scale, dropped)
    subnormal = torch.ceil(scale * (1 / tiny)) * tiny if dtype in ("float16", "e4m3") else up
    up = torch.where(scale < normal, subnormal, up)
    if dtype == "e8m0":
        up = torch.where(scale <= tiny, tiny, up)
    return torch.where(scale <= largest, up, torch.inf)  # inf for NaN too, whatever its bits


def round_down(x: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return the largest number of `dtype` that is <= x, as float32; -inf where none is.

    x   any shape, float32, finite, of any sign

    >>> round_down(torch.tensor([1.0001, -1.0001]), "float16")
    tensor([ 1.0000, -1.0010])
    """
    if dtype == "float32":
        return x
    dropped, normal, tiny, largest = _STORAGE[dtype]
    cut = (x.contiguous().view(torch.int32) & ~((1 << dropped) - 1)).view(torch.float32)
    if dtype == "float16":
        cut = torch.where(x < normal, torch.floor(x * (1 / tiny)) * tiny, cut)
    return torch.where(x < 0, -round_up(-x, dtype), cut.clamp(max=largest))


def round_up_of_tensor(scale: torch.Tensor) -> torch.Tensor:
    """Return the least scale that a tensor can have which is >= `scale`, float32."""
    up = _cut_up(scale, _OF_TENSOR).clamp(min=SMALLEST_OF_TENSOR)
    return torch.where(torch.isfinite(scale), up, torch.inf)


def _cut_up(scale: torch.Tensor, dropped: int) -> torch.Tensor:
    """Return the least float32 >= scale whose last mantissa bits are 0."""
    mask = (1 << dropped) - 1
    bits = scale.contiguous().view(torch.int32)
    return ((bits + mask) & ~mask).view(torch.float32)


def smallest_positive(dtype: WeightScaleDtype) -> float:
    """Return the smallest positive number of a scale dtype."""
    return 2.0**-149 if dtype == "float32" else _STORAGE[dtype][2]


def largest_number(dtype: WeightScaleDtype) -> float:
    """Return the largest finite number of a scale dtype."""
    return torch.finfo(torch.float32).max if dtype == "float32" else _STORAGE[dtype][3]


def stored_dtype(dtype: WeightScaleDtype) -> torch.dtype:
    """Return torch's dtype for scales in a file; exponents of e8m0 are uint8."""
    return _STORED[dtype]


def store(
    scale: torch.Tensor, dtype: WeightScaleDtype, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scales as they lie in a file; what is no number of the dtype becomes another one.

    scale          float32
    global_scale   [1] float32: what scales are multiples of; None for 1
    """
    own = scale if global_scale is None else scale / global_scale
    if dtype != "e8m0":
        return own.to(_STORED[dtype])
    exponent = torch.frexp(own).exponent - 1
    stored = torch.where(torch.isfinite(own) & (own > 0), exponent + 127, 255)
    return stored.clamp(0, 255).to(torch.uint8)


def read(
    stored: torch.Tensor, dtype: WeightScaleDtype, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return stored scales as float32; arguments as in `store`. The exponent 255 is NaN."""
    if dtype == "e8m0":
        power = power_of_two(stored.to(torch.int32) - 127)
        return torch.where(stored == 255, torch.nan, power)
    own = stored.to(torch.float32)
    return own if global_scale is None else own * global_scale


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent, float32; exponents are int32, from -127 to 127."""
    bits = torch.where(exponent > -127, exponent + 127 << 23, 1 << 22)  # 2^-127 is subnormal
    return bits.view(torch.float32)
