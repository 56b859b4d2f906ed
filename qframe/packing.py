"""Step 5, packing: codes of b bits as 32-bit words, and a layer's weight as it is stored.

The layout: the codes of a row one after the other, lowest bit first, as one stream of bits, cut
into little-endian 32-bit words; each row is padded with zero bits to whole words. For 2, 4 and 8
bits this is the int32 packing of compressed-tensors and GPTQ; codes of 3, 5, 6 and 7 bits cross
words, so that 32 codes are always b words. Stored codes are unsigned: code - qmin, for a grid with
values the rank of the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qframe import pages, parallel, passes, rounding, scales
from qframe.contracts import Grid, QuantizedWeight
from qframe.errors import PluginError, QframeError, WeightsError
from qframe.scheme import Scheme

BLOCK = 32  # codes: whole words of any number of bits


def pack_codes(codes: torch.Tensor, num_bits: int, lowest: int = 0) -> torch.Tensor:
    """Return unsigned codes as words, [rows, ceil(columns * num_bits / 32)] int32.

    codes    [rows, columns], any integer dtype, each less `lowest` in [0, 2^num_bits)
    lowest   what is stored as 0

    >>> [hex(word) for word in pack_codes(torch.arange(8)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    if codes.numel():
        least, most = (int(end) - lowest for end in torch.aminmax(codes))
        if not 0 <= least <= most < 1 << num_bits:
            raise ValueError(
                f"codes of {num_bits} bits lie in [0, {(1 << num_bits) - 1}], got [{least}, {most}]"
            )
    return _packed(codes, num_bits, lowest)


def _packed(
    codes: torch.Tensor, num_bits: int, lowest: int, words: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the same of codes that are known to have so many bits.

    words   where to put them; in memory of their own unless told
    """
    rows, columns = codes.shape
    if words is None:
        words = pages.empty((rows, -(-columns * num_bits // 32)), torch.int32, waits=True)
    missing = -columns % BLOCK

    def work(part: slice) -> None:
        own, found = codes[part].to(torch.int16).contiguous(), words[part]
        if missing:
            own = torch.nn.functional.pad(own, (0, missing), value=lowest)
            found = torch.empty((len(own), own.shape[1] * num_bits // 32), dtype=torch.int32)
        passes.pack(_fours(own), num_bits, lowest, _stream(found, num_bits))
        if missing:
            words[part] = found[:, : words.shape[1]]

    as_they_are = codes.dtype == torch.int16 and codes.is_contiguous() and not missing
    cut = rounding.shares if as_they_are else rounding.strips
    parallel.each(work, cut(rows, columns))
    return words


def unpack_codes(
    words: torch.Tensor,
    num_bits: int,
    columns: int,
    lowest: int = 0,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """Return the codes that `pack_codes` packed, [rows, columns].

    words    [rows, ceil(columns * num_bits / 32)] int32
    lowest   what is stored as 0
    dtype    of what is returned, which must hold them

    >>> unpack_codes(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows = len(words)
    codes = pages.empty((rows, columns), dtype)

    missing = -columns % BLOCK

    def work(part: slice) -> None:
        stored, own = words[part].contiguous(), codes[part]
        found = own
        if missing:
            width = (columns + missing) * num_bits // 32
            stored = torch.nn.functional.pad(stored, (0, width - stored.shape[1]))
        if missing or dtype != torch.int16:
            found = torch.empty((len(own), columns + missing), dtype=torch.int16)
        passes.unpack(_stream(stored, num_bits), num_bits, lowest, _fours(found))
        if found is not own:
            own.copy_(found[:, :columns])

    cut = rounding.strips if missing or dtype != torch.int16 else rounding.shares
    parallel.each(work, cut(rows, columns))
    return codes


def _fours(codes: torch.Tensor) -> npt.NDArray[np.uint64]:
    """Return codes of 16 bits as `passes.pack` reads them, four in a number."""
    return codes.view(-1).numpy().view(np.uint64)


def _stream(words: torch.Tensor, num_bits: int) -> npt.NDArray[Any]:
    """Return words as the numbers that `passes.pack` writes."""
    return words.view(-1).numpy().view(np.uint32 if num_bits in (4, 8) else np.uint8)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PackedWeight:
    """The quantized weight of one layer as it is stored.

    rows, columns   of the layer
    scheme, grid    what the bits mean
    words           [rows, ceil(columns * num_bits / 32)] int32, packed code - qmin
    scale           [rows or 1, groups] in the scheme's scale_dtype (`qframe.scales`), > 0
    zero_point      [rows or 1, ceil(groups * num_bits / 32)] int32, packed zero point - qmin;
                    None for a symmetric scheme, whose zero points are 0
    group_index     [columns] int32, the group of each column; None for contiguous groups
    global_scale    [1] float32 > 0, what scales are multiples of; None but for two-level schemes
    """

    rows: int
    columns: int
    scheme: Scheme
    grid: Grid
    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

    @classmethod
    def pack(
        cls,
        quantized: QuantizedWeight,
        scheme: Scheme,
        grid: Grid,
        *,
        name: str = "weight",
        words: torch.Tensor | None = None,
    ) -> PackedWeight:
        """Pack what a rounder returned.

        name    of the layer, for messages
        words   where to put packed codes, contiguous; in memory of their own unless told

        Raises PluginError when it is not what `QuantizedWeight` promises.
        """
        rows, columns = quantized.codes.shape
        own = None if quantized.grid is None else quantized.grid.values
        if own != grid.values:
            raise PluginError(
                f"layer {name!r}: the codes do not say for which values they stand; return "
                f"QuantizedWeight(..., grid=problem.grid) where problem.grid has values"
            )
        whole = quantized.global_scale
        _check_global(whole, scheme, name, PluginError)
        scale = scales.store(quantized.scale, scheme.scale_dtype, whole)
        index: torch.Tensor | None = quantized.group_index.to(torch.int32)
        _check_scale(scale, rows, columns, scheme, name, PluginError)
        if not torch.equal(scales.read(scale, scheme.scale_dtype, whole), quantized.scale.float()):
            raise PluginError(
                f"layer {name!r}: scales are not numbers of scale_dtype={scheme.scale_dtype!r}; "
                f"round them with qframe.rounding.round_up before codes are chosen"
            )
        _check_index(quantized.group_index, columns, scheme, name, PluginError)
        if grid.levels > 1 << scheme.num_bits:
            raise PluginError(
                f"layer {name!r}: the grid has {grid.levels} codes, more than {scheme.num_bits} "
                f"bits can tell apart"
            )
        _check_codes(quantized.codes, (rows, columns), grid, "codes", name)
        _check_codes(quantized.zero_point, tuple(scale.shape), grid, "zero points", name)
        if scheme.symmetric and bool(quantized.zero_point.any()):
            raise PluginError(f"layer {name!r}: the zero points of a symmetric scheme must be 0")
        if torch.equal(quantized.group_index, rounding.group_index(columns, scheme)):
            index = None
        zero_point = None
        if not scheme.symmetric:
            zero_point = _packed(quantized.zero_point, scheme.num_bits, grid.qmin)
        return cls(
            rows=rows,
            columns=columns,
            scheme=scheme,
            grid=grid,
            words=_packed(quantized.codes, scheme.num_bits, grid.qmin, words),
            scale=scale.contiguous(),
            zero_point=zero_point,
            group_index=index,
            global_scale=whole,
        )

    @classmethod
    def empty(cls, rows: int, columns: int, scheme: Scheme, grid: Grid) -> PackedWeight:
        """Return a weight with contiguous groups, whose rows are to be `put` in their places.

        Its scheme has scales of every row, and none of the tensor.
        """
        shape = scheme.scale_shape(rows, columns)
        bits = scheme.num_bits
        zero_point = None
        if not scheme.symmetric:
            zero_point = torch.empty((rows, -(-shape[1] * bits // 32)), dtype=torch.int32)
        return cls(
            rows=rows,
            columns=columns,
            scheme=scheme,
            grid=grid,
            words=pages.empty((rows, -(-columns * bits // 32)), torch.int32, waits=True),
            scale=torch.empty(shape, dtype=scales.stored_dtype(scheme.scale_dtype)),
            zero_point=zero_point,
        )

    def put(self, rows: slice, part: PackedWeight) -> None:
        """Put rows, which are a weight of the same scheme and columns, in their place.

        Words that `pack` was told to put there are there.
        """
        if part.words.data_ptr() != self.words[rows].data_ptr():
            self.words[rows] = part.words
        self.scale[rows] = part.scale
        if self.zero_point is not None and part.zero_point is not None:
            self.zero_point[rows] = part.zero_point

    def unpack(self) -> QuantizedWeight:
        """Return what was packed, but for `order`, `info` and `events`."""
        bits, groups = self.scheme.num_bits, self.scale.shape[1]
        codes = unpack_codes(self.words, bits, self.columns, self.grid.qmin, torch.int16)
        if self.zero_point is None:
            zero_point = torch.zeros(self.scale.shape, dtype=torch.int16)
        else:
            zero_point = unpack_codes(self.zero_point, bits, groups, self.grid.qmin, torch.int16)
        index = self.group_index
        if index is None:
            index = rounding.group_index(self.columns, self.scheme)
        return QuantizedWeight(
            codes=codes,
            scale=scales.read(self.scale, self.scheme.scale_dtype, self.global_scale),
            zero_point=zero_point,
            group_index=index,
            grid=None if self.grid.values is None else self.grid,
            global_scale=self.global_scale,
        )

    def dequantize(self) -> torch.Tensor:
        """Return the weight that the codes stand for, [rows, columns] float32."""
        return rounding.dequantize(self.unpack())

    @property
    def bits(self) -> int:
        """The stored bits: of codes, scales, zero points and group index."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that they have in a file after the layer's name."""
        stored = {
            "weight_packed": self.words,
            "weight_scale": self.scale,
            "weight_zero_point": self.zero_point,
            "weight_g_idx": self.group_index,
            "weight_global_scale": self.global_scale,
        }
        return {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        scheme: Scheme,
        grid: Grid,
        *,
        name: str,
        rows: int,
        columns: int,
    ) -> PackedWeight:
        """Return the weight that `tensors` held; other names in the mapping are ignored.

        name   of the layer, for messages

        Raises WeightsError when a tensor is missing, or has a shape, dtype or value that
        `pack` cannot have written.
        """
        needed = ["weight_packed", "weight_scale"]
        if not scheme.symmetric:
            needed.append("weight_zero_point")
        elif "weight_zero_point" in tensors:
            raise WeightsError(f"layer {name!r}: weight_zero_point with a symmetric scheme")
        if scheme.two_level:
            needed.append("weight_global_scale")
        missing = [suffix for suffix in needed if suffix not in tensors]
        if missing:
            raise WeightsError(f"layer {name!r}: {' and '.join(missing)} missing")
        scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
        index, whole = tensors.get("weight_g_idx"), tensors.get("weight_global_scale")
        _check_global(whole, scheme, name, WeightsError)
        _check_scale(scale, rows, columns, scheme, name, WeightsError)
        _check_words(tensors["weight_packed"], (rows, columns), scheme, grid, "weight_packed", name)
        if zero_point is not None:
            shape = (scale.shape[0], scale.shape[1])
            _check_words(zero_point, shape, scheme, grid, "weight_zero_point", name)
        if index is not None:
            _check_index(index, columns, scheme, name, WeightsError)
        return cls(
            rows=rows,
            columns=columns,
            scheme=scheme,
            grid=grid,
            words=tensors["weight_packed"],
            scale=scale,
            zero_point=zero_point,
            group_index=index,
            global_scale=whole,
        )


def _check_global(
    whole: torch.Tensor | None, scheme: Scheme, name: str, error: type[QframeError]
) -> None:
    """Raise `error` unless a tensor has a scale exactly where its scheme wants one."""
    if (whole is not None) != scheme.two_level:
        wanted = "needs" if scheme.two_level else "has no"
        raise error(
            f"layer {name!r}: scale_dtype={scheme.scale_dtype!r} {wanted} global_scale of the "
            f"tensor (qframe.rounding.tensor_scale), got {None if whole is None else [*whole]}"
        )
    if whole is not None:
        _check_tensor(whole, (1,), torch.float32, "global scale", name, error)
        if not bool(torch.isfinite(whole) & (whole > 0)):
            raise error(f"layer {name!r}: the global scale is {float(whole)}, expected > 0")


def _check_scale(
    scale: torch.Tensor,
    rows: int,
    columns: int,
    scheme: Scheme,
    name: str,
    error: type[QframeError],
) -> None:
    """Raise `error` unless scales have their shape and dtype and are positive and finite."""
    dtype = scheme.scale_dtype
    shape = scheme.scale_shape(rows, columns)
    _check_tensor(scale, shape, scales.stored_dtype(dtype), "scale", name, error)
    own = scales.read(scale, dtype)
    good = torch.isfinite(own) & (own > 0)
    if not bool(good.all()):
        raise error(
            f"layer {name!r}: a scale is {float(own[~good][0])}; scales must be positive and finite"
        )


def _check_index(
    index: torch.Tensor, columns: int, scheme: Scheme, name: str, error: type[QframeError]
) -> None:
    """Raise `error` unless every column has a group."""
    _check_tensor(index, (columns,), torch.int32, "group index", name, error)
    groups = scheme.groups(columns)
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise error(
            f"layer {name!r}: group index in [{int(index.min())}, {int(index.max())}], "
            f"but groups are 0..{groups - 1}"
        )


def _check_codes(
    codes: torch.Tensor, shape: tuple[int, ...], grid: Grid, what: str, name: str
) -> None:
    """Raise PluginError unless codes have their shape and dtype and lie on the grid."""
    _check_tensor(codes, shape, torch.int16, what, name, PluginError)
    if not codes.numel():
        return
    least, most = (int(end) for end in torch.aminmax(codes))
    if not grid.qmin <= least <= most <= grid.qmax:
        raise PluginError(
            f"layer {name!r}: {what} in [{least}, {most}], but the grid is "
            f"[{grid.qmin}, {grid.qmax}]"
        )


def _check_words(
    words: torch.Tensor,
    shape: tuple[int, int],
    scheme: Scheme,
    grid: Grid,
    what: str,
    name: str,
) -> None:
    """Raise WeightsError unless words hold `shape` codes of the grid, and zeros after them."""
    rows, columns = shape
    stream = columns * scheme.num_bits
    width = -(-stream // 32)
    _check_tensor(words, (rows, width), torch.int32, what, name, WeightsError)
    last = words[:, -1:].to(torch.int64) & 0xFFFFFFFF
    if bool((last >> (32 - (32 * width - stream))).any()):
        raise WeightsError(f"layer {name!r}: {what} has bits behind its last column")
    if rows and columns and grid.levels < 1 << scheme.num_bits:
        largest = int(unpack_codes(words, scheme.num_bits, columns).max())
        if largest >= grid.levels:
            raise WeightsError(
                f"layer {name!r}: {what} holds code {largest + grid.qmin}, but the grid is "
                f"[{grid.qmin}, {grid.qmax}]"
            )


def _check_tensor(
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    what: str,
    name: str,
    error: type[QframeError],
) -> None:
    """Raise `error` unless the tensor has its shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise error(
            f"layer {name!r}: {what} should be {dtype} {list(shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
