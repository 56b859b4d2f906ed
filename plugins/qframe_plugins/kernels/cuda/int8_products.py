"""Products of codes: `linear_int8`, `linear_int8_groups`.

Method: a group's sum is an integer without error, made by `dp4a` for few tokens and by matrix
        instructions (`mma.sync`, m16n8k32) for more; then sum = fma(group's sum, scale, sum), group
        after group. So how many tokens come together does not change a bit.
        Few: eight lanes for each row, which read 128 neighbouring bytes of it at once, and each
        byte once for four tokens. More: tiles of 32 tokens and 64 rows in shared memory, copied by
        `cp.async` while the tile before is multiplied. Rows of a tile lie 80 bytes apart, which
        spreads what a fragment's lanes read over all banks.
        A zero point is taken off the sum: sum x (c - z) = sum x c - z sum x, modulo 2^32, in which
        the result fits.
Error:  docs/bounds.md, B5.b and B5.f, with a rounding of the sum, one for each group, and one for
        the token's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import cuda, float32, int32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source, inlined
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.int8_layout import Int8Weight, integers_of_lanes, lay_out_tokens
from qframe_plugins.kernels.cuda.intrinsics import (
    copy16,
    dp4a,
    end_of_copies,
    load4,
    mma_s8,
    wait_for_all_but_one,
)
from qframe_plugins.kernels.cuda.places import STEP
from qframe_plugins.kernels.cuda.short_floats import WRITE, as_words, for_activations

if TYPE_CHECKING:
    import torch

THREADS = 128
FEW = 4  # tokens that share a reading of the weight
LANES = 8  # of a row
FEW_ROWS = THREADS // LANES
MOST_FEW = 8  # tokens up to which dp4a is used: a tile would be mostly empty

TOKENS, ROWS = 32, 64  # of a tile
WORDS = 16  # of a row of a tile, 64 codes: two steps
PITCH = 20  # words from one row to the next
A_WORDS, B_WORDS = TOKENS * PITCH, ROWS * PITCH
A_BOTH, B_BOTH = 2 * A_WORDS, 2 * B_WORDS  # one is filled while the other is read


def multiply(
    on: Launcher,
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Int8Weight,
    dtype: str = "float32",
) -> torch.Tensor:
    """Return s_x times the sum over groups of s_g a_g, [tokens, rows], rounded to a dtype.

    x_codes   [tokens, columns] int8
    x_scale   [tokens] float32
    """
    import torch

    tokens, rows = len(x_codes), len(weight.codes)
    y = torch.empty(tokens, rows, dtype=getattr(torch, dtype), device=x_codes.device)
    if not y.numel():
        return y
    codes, sums = lay_out_tokens(on, x_codes, weight)
    groups, pitch = sums.shape[1], weight.codes.shape[1]
    step = groups if len(weight.scale) > 1 else 0
    few = tokens <= MOST_FEW
    given = (
        # Flat, as a token alone may have any stride from itself to the next one.
        *(each.reshape(-1).view(torch.int32) for each in (codes, weight.codes)),
        *(dense(x_scale), sums, weight.scale, weight.zero),
        weight.places.starts if few else weight.places.ends,
        *(Fresh(as_words(y)), tokens, rows, pitch // 4, groups, step),
    )
    if few:
        grid = -(-rows // FEW_ROWS), -(-tokens // FEW)
        on.launch(FEW_TOKENS[dtype], grid, THREADS, *given)
    else:
        on.launch(TILES[dtype], (-(-rows // ROWS), -(-tokens // TOKENS)), THREADS, *given)
    return y


_TYPES = (
    "int32*, int32*, float32*, int32*, float32*, int32*, int32*, x, "
    "uint32, uint32, uint32, uint32, uint32"
)


@inlined
def added(total, products, sum_of_token, scale, zero):  # type: ignore[no-untyped-def]
    """Return the total with one more group."""
    exact = int32(products - int32(zero * sum_of_token))
    return cuda.fma(float32(exact), scale, total)


def _multiply_few(dtype: str) -> Source:
    write = WRITE[dtype]

    def multiply_few(  # type: ignore[no-untyped-def]
        x, w, x_scale, sums, scale, zero, starts, y, tokens, rows, words, groups, step
    ):
        """Multiply FEW tokens with FEW_ROWS rows.

        words   of a row of x and w; step: groups of a row of scales, 0 where rows share theirs
        """
        lane = uint32(cuda.threadIdx.x & uint32(LANES - 1))
        row = uint32(cuda.blockIdx.x * uint32(FEW_ROWS) + uint32(cuda.threadIdx.x // uint32(LANES)))
        first = uint32(cuda.blockIdx.y * uint32(FEW))
        inside = min(row, uint32(rows - uint32(1)))  # lanes beyond the last row still shuffle
        products = cuda.local.array(FEW, int32)
        total = cuda.local.array(FEW, float32)
        for m in range(FEW):
            total[m] = float32(0)
        group = uint32(0)
        while group < groups:
            for m in range(FEW):
                products[m] = int32(0)
            word = uint32(uint32(uint32(starts[group]) >> uint32(2)) + uint32(lane * uint32(4)))
            while word < uint32(uint32(starts[uint32(group + uint32(1))]) >> uint32(2)):
                w0, w1, w2, w3 = load4(w, uint32(uint32(inside * words) + word))
                for m in range(FEW):
                    token = min(uint32(first + uint32(m)), uint32(tokens - uint32(1)))
                    x0, x1, x2, x3 = load4(x, uint32(uint32(token * words) + word))
                    products[m] = dp4a(
                        x0, w0, dp4a(x1, w1, dp4a(x2, w2, dp4a(x3, w3, products[m])))
                    )
                word = uint32(word + uint32(4 * LANES))
            other = uint32(uint32(inside * step) + group)
            for m in range(FEW):
                token = min(uint32(first + uint32(m)), uint32(tokens - uint32(1)))
                whole = integers_of_lanes(products[m], uint32(LANES))
                of_token = sums[uint32(uint32(token * groups) + group)]
                total[m] = added(total[m], whole, of_token, scale[other], zero[other])
            group = uint32(group + uint32(1))
        for m in range(FEW):
            token = uint32(first + uint32(m))
            if lane == uint32(0) and row < rows and token < tokens:
                output = total[m] * x_scale[token]
                write(y, uint32(uint32(token * rows) + row), output)

    return for_activations(multiply_few, _TYPES, dtype)


FEW_TOKENS = {dtype: _multiply_few(dtype) for dtype in ACTIVATIONS}


@inlined
def fetch(tile, at, codes, row, rows, word, words):  # type: ignore[no-untyped-def]
    """Begin to copy 16 bytes of a row to tile[at] .., or set zeros where there are none."""
    if row < rows and word < words:
        copy16(tile, at, codes, uint32(uint32(row * words) + word))
    else:
        for k in range(4):
            tile[uint32(at + uint32(k))] = int32(0)


@inlined
def fetch_tiles(a, b, x, w, stage, thread, token, tokens, row, rows, words):  # type: ignore[no-untyped-def]
    """Begin to copy a stage: the tokens to `a` and the rows to `b`, of two buffers each."""
    down, piece = uint32(thread >> uint32(2)), uint32(uint32(thread & uint32(3)) * uint32(4))
    word = uint32(uint32(stage * uint32(WORDS)) + piece)
    half = uint32(stage & uint32(1))
    place = uint32(uint32(down * uint32(PITCH)) + piece)
    at = uint32(uint32(half * uint32(A_WORDS)) + place)
    fetch(a, at, x, uint32(token + down), tokens, word, words)
    for more in range(ROWS // 32):
        at = uint32(uint32(half * uint32(B_WORDS)) + uint32(place + uint32(32 * more * PITCH)))
        fetch(b, at, w, uint32(row + uint32(down + uint32(32 * more))), rows, word, words)


def _multiply_tile(dtype: str) -> Source:
    write = WRITE[dtype]

    def multiply_tile(  # type: ignore[no-untyped-def]
        x, w, x_scale, sums, scale, zero, ends, y, tokens, rows, words, groups, step
    ):
        """Multiply TOKENS tokens with ROWS rows; a warp takes a quarter of the rows."""
        a = cuda.shared.array(A_BOTH, int32, alignment=16)
        b = cuda.shared.array(B_BOTH, int32, alignment=16)
        thread = uint32(cuda.threadIdx.x)
        across, in_quad = (
            uint32(uint32(thread & uint32(31)) >> uint32(2)),
            uint32(thread & uint32(3)),
        )
        token, row = (
            uint32(cuda.blockIdx.y * uint32(TOKENS)),
            uint32(cuda.blockIdx.x * uint32(ROWS)),
        )
        own = uint32(uint32(thread >> uint32(5)) * uint32(16))  # the warp's first row of the tile
        products = cuda.local.array(16, int32)
        total = cuda.local.array(16, float32)
        for k in range(16):
            products[k] = int32(0)
            total[k] = float32(0)

        stages = uint32(uint32(words + uint32(WORDS - 1)) // uint32(WORDS))
        fetch_tiles(a, b, x, w, uint32(0), thread, token, tokens, row, rows, words)
        end_of_copies()
        stage = uint32(0)
        while stage < stages:
            following = uint32(stage + uint32(1))
            if following < stages:
                fetch_tiles(a, b, x, w, following, thread, token, tokens, row, rows, words)
            end_of_copies()
            wait_for_all_but_one()
            cuda.syncthreads()
            half = uint32(stage & uint32(1))
            for part in range(2):
                word = uint32(uint32(8 * part) + in_quad)
                left = uint32(
                    uint32(half * uint32(A_WORDS)) + uint32(across * uint32(PITCH)) + word
                )
                right = uint32(own + across)
                right = uint32(
                    uint32(half * uint32(B_WORDS)) + uint32(right * uint32(PITCH)) + word
                )
                for i in range(2):
                    upper = uint32(left + uint32(16 * i * PITCH))
                    lower = uint32(upper + uint32(8 * PITCH))
                    a0, a1 = a[upper], a[lower]
                    a2, a3 = a[uint32(upper + uint32(4))], a[uint32(lower + uint32(4))]
                    for j in range(2):
                        beside = uint32(right + uint32(8 * j * PITCH))
                        b0, b1 = b[beside], b[uint32(beside + uint32(4))]
                        k = 8 * i + 4 * j
                        p0, p1, p2, p3 = mma_s8(
                            a0, a1, a2, a3, b0, b1,
                            products[k], products[k + 1], products[k + 2], products[k + 3],
                        )  # fmt: skip
                        products[k], products[k + 1] = p0, p1
                        products[k + 2], products[k + 3] = p2, p3
                at = uint32(uint32(stage * uint32(2)) + uint32(part))
                ended = int32(-1)
                if at < uint32(words // uint32(STEP // 4)):
                    ended = ends[at]
                if ended >= int32(0):
                    for k in range(16):
                        mine = uint32(across + uint32(16 * (k // 8) + 8 * (k % 4 // 2)))
                        mine = min(uint32(token + mine), uint32(tokens - uint32(1)))
                        other = uint32(
                            uint32(in_quad * uint32(2)) + uint32(8 * (k % 8 // 4) + k % 2)
                        )
                        other = min(uint32(row + uint32(own + other)), uint32(rows - uint32(1)))
                        of_token = sums[uint32(uint32(mine * groups) + uint32(ended))]
                        other = uint32(uint32(other * step) + uint32(ended))
                        total[k] = added(total[k], products[k], of_token, scale[other], zero[other])
                        products[k] = int32(0)
            cuda.syncthreads()
            stage = following
        for k in range(16):
            mine = uint32(token + uint32(across + uint32(16 * (k // 8) + 8 * (k % 4 // 2))))
            other = uint32(uint32(in_quad * uint32(2)) + uint32(8 * (k % 8 // 4) + k % 2))
            other = uint32(row + uint32(own + other))
            if mine < tokens and other < rows:
                output = total[k] * x_scale[mine]
                write(y, uint32(uint32(mine * rows) + other), output)

    return for_activations(multiply_tile, _TYPES, dtype)


TILES = {dtype: _multiply_tile(dtype) for dtype in ACTIVATIONS}
