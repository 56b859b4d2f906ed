"""LLM.int8(): `linear_int8_outliers`.

Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2.
Method: columns with an outlier are marked and listed, all on the device. Tokens are quantized
        without them and multiplied as in int8_products.py; then a thread takes a row and four
        tokens, and adds the products of the listed columns, read from the transposed weight.
Error:  docs/bounds.md, B5.a, B5.b, B5.d: the outliers' sum is made in float32, in the order of the
        columns, and added once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numba import cuda, float32, int8, int32, uint8, uint32

from qframe_plugins.kernels.cuda import int8_products, tokens
from qframe_plugins.kernels.cuda.compile import inlined, source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.int8_layout import Int8Weight, lay_out_channels
from qframe_plugins.kernels.cuda.tokens import (
    FULL,
    THREADS,
    WARPS,
    code_of,
    largest_of_block,
    magnitude,
    scale_of,
)

if TYPE_CHECKING:
    import torch

TOKENS = 4  # that a thread adds outliers to


@dataclass(frozen=True)
class Int8AndColumns:
    """A weight in eight bits, and as it is: [columns, rows] float32."""

    codes: Int8Weight
    columns: torch.Tensor


def lay_out_both(
    w_codes: torch.Tensor, w_scale: torch.Tensor, weight: torch.Tensor
) -> Int8AndColumns:
    """Return both; w_codes [rows, columns] int8, w_scale [rows], weight [rows, columns] float32."""
    return Int8AndColumns(lay_out_channels(w_codes, w_scale), dense(weight.T))


def multiply(
    on: Launcher, x: torch.Tensor, threshold: float, weight: Int8AndColumns
) -> torch.Tensor:
    """Return x W^T, [tokens, rows] float32, of x [tokens, columns] float32."""
    import torch

    many, columns = x.shape
    if threshold <= 0 or not many:
        return int8_products.multiply(on, *tokens.quantize(on, x), weight.codes)
    x, device = dense(x), x.device
    marks = torch.empty(columns, dtype=torch.uint8, device=device)
    listed = torch.zeros(columns, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    codes = torch.empty(many, columns, dtype=torch.int8, device=device)
    scale = torch.empty(many, dtype=torch.float32, device=device)
    on.launch(
        mark_outliers, -(-columns // THREADS), THREADS, x, Fresh(marks), threshold, many, columns
    )
    on.launch(list_outliers, 1, 32, marks, listed, Fresh(count), columns)
    on.launch(quantize_rest, many, THREADS, x, marks, Fresh(codes), Fresh(scale), columns)
    y = int8_products.multiply(on, codes, scale, weight.codes)
    rows = y.shape[1]
    if rows:
        grid = -(-rows // THREADS), -(-many // TOKENS)
        given = x, weight.columns, listed, count, y, many, columns, rows
        on.launch(add_outliers, grid, THREADS, *given)
    return y


@source("float32*, uint8*, float32, uint32, uint32")
def mark_outliers(x, marks, threshold, tokens, columns):  # type: ignore[no-untyped-def]
    """Set 1 for a column in which any token is as large as the threshold, else 0."""
    column = uint32(cuda.blockIdx.x * uint32(THREADS) + cuda.threadIdx.x)
    if column < columns:
        found, token = uint8(0), uint32(0)
        while token < tokens:
            if abs(x[uint32(uint32(token * columns) + column)]) >= threshold:
                found = uint8(1)
            token = uint32(token + uint32(1))
        marks[column] = found


@source("uint8*, int32*, int32*, uint32")
def list_outliers(marks, listed, count, columns):  # type: ignore[no-untyped-def]
    """List the marked columns, in their order, and count them; by one warp."""
    lane, start, before = uint32(cuda.threadIdx.x), uint32(0), uint32(0)
    while start < columns:
        column = uint32(start + lane)
        marked = column < columns and marks[min(column, uint32(columns - uint32(1)))] != uint8(0)
        lanes = uint32(cuda.ballot_sync(FULL, marked))
        below = uint32(lanes & uint32(uint32(uint32(1) << lane) - uint32(1)))
        if marked:
            listed[uint32(before + uint32(cuda.popc(below)))] = int32(column)
        before = uint32(before + uint32(cuda.popc(lanes)))
        start = uint32(start + uint32(32))
    if lane == uint32(0):
        count[uint32(0)] = int32(before)


@source("float32*, uint8*, int8*, float32*, uint32")
def quantize_rest(x, marks, codes, scale, columns):  # type: ignore[no-untyped-def]
    """Set the codes and the scale of a token, marked columns taken for zeros."""
    found = cuda.shared.array(WARPS, int32)
    token, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x)
    row, bits, column = uint32(token * columns), int32(0), thread
    while column < columns:
        if marks[column] == uint8(0):
            bits = max(bits, magnitude(x[uint32(row + column)]))
        column = uint32(column + uint32(THREADS))
    bits = largest_of_block(bits, found)
    step = scale_of(bits)
    if thread == uint32(0):
        scale[token] = step
    column = thread
    while column < columns:
        code = int32(0)
        if marks[column] == uint8(0):
            code = code_of(x[uint32(row + column)], bits, step)
        codes[uint32(row + column)] = int8(code)
        column = uint32(column + uint32(THREADS))


@inlined
def product_of(x, token, tokens, columns, column, weight, total):  # type: ignore[no-untyped-def]
    """Return the total with a token's product; tokens beyond the last one take its numbers."""
    row = uint32(min(token, uint32(tokens - uint32(1))) * columns)
    return cuda.fma(x[uint32(row + column)], weight, total)


@inlined
def add_to(y, total, token, row, tokens, rows):  # type: ignore[no-untyped-def]
    """Add a total to an output."""
    if token < tokens and row < rows:
        place = uint32(uint32(token * rows) + row)
        y[place] = y[place] + total


@source("float32*, float32*, int32*, int32*, float32*, uint32, uint32, uint32")
def add_outliers(x, weight, listed, count, y, tokens, columns, rows):  # type: ignore[no-untyped-def]
    """Add the products of the listed columns, for a row and TOKENS tokens."""
    row = uint32(cuda.blockIdx.x * uint32(THREADS) + cuda.threadIdx.x)
    token = uint32(cuda.blockIdx.y * uint32(TOKENS))
    inside = min(row, uint32(rows - uint32(1)))
    one, two, three = (
        uint32(token + uint32(1)),
        uint32(token + uint32(2)),
        uint32(token + uint32(3)),
    )
    a, b, c, d = float32(0), float32(0), float32(0), float32(0)
    number, last = uint32(0), uint32(count[uint32(0)])
    while number < last:
        column = uint32(listed[number])
        w = weight[uint32(uint32(column * rows) + inside)]
        a = product_of(x, token, tokens, columns, column, w, a)
        b = product_of(x, one, tokens, columns, column, w, b)
        c = product_of(x, two, tokens, columns, column, w, c)
        d = product_of(x, three, tokens, columns, column, w, d)
        number = uint32(number + uint32(1))
    add_to(y, a, token, row, tokens, rows)
    add_to(y, b, one, row, tokens, rows)
    add_to(y, c, two, row, tokens, rows)
    add_to(y, d, three, row, tokens, rows)
