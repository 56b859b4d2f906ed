"""B7: KV caches.

A stored number is s c + m: s the scale, c the code, m the offset. Keys k and values v
[tokens, head_dim], a query q [head_dim], logits z_t = sum_c q_c k_tc / sqrt(head_dim).
"""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import ETA, NORMAL, UNIT, Array, Numbers, as_array, gamma
from qframe.contracts import Grid


def softmax(oscillation: Numbers) -> Array:
    """B7.c: the distance sum |p' - p| of softmaxes whose logits differ by d.

    oscillation   max d - min d, at most twice max |d|
    """
    return as_array(2 * np.tanh(as_array(oscillation) / 4))


def kv_element(
    x: Numbers,
    scale: Numbers,
    offset: Numbers,
    grid: Grid,
    roundings: int = 1,
    dtype: str = "float32",
) -> Array:
    """B7.a: the error |x - (s c + m)| of c = clip(rint(fl(fl(x - m) / s)), qmin, qmax).

    roundings   of the quotient: 1 for a division, 2 for a multiplication with fl(1 / s)
    dtype       of the encoder's arithmetic

    Inside the range s / 2 + gamma |x - m|, the difference being rounded as well; beyond the range
    the distance to its nearer end, where that is more.
    """
    w, s = as_array(x) - as_array(offset), as_array(scale)
    beyond = np.maximum(s * grid.qmin - w, w - s * grid.qmax)
    return as_array(np.maximum(s / 2 + gamma(roundings + 1, UNIT[dtype]) * np.abs(w), beyond))


def kv_decode(scale: Numbers, codes: Numbers, offset: Numbers, dtype: str = "float32") -> Array:
    """B7.a: the error of s c + m in float32, with one more rounding if `dtype` is not float32.

    dtype   of what is read
    """
    product, shift = as_array(scale) * as_array(codes), as_array(offset)
    own = gamma(2) * (np.abs(product) + np.abs(shift)) + ETA["float32"]
    return kv_returned(product + shift, own, dtype)


def kv_returned(x: Numbers, own: Numbers, dtype: str = "float32") -> Array:
    """B7.a: the error of x, off by `own` in float32, once it is returned in `dtype`."""
    lost = as_array(own)
    if dtype == "float32":
        return lost
    return as_array(lost + UNIT[dtype] * (np.abs(as_array(x)) + lost) + ETA[dtype])


def kv_butterflies(size: Numbers, block: int) -> Array:
    """B7.h: the error of x H by butterflies in float32, over blocks of n = 2^m channels.

    size    sum of |x| over the block; that of |x| / n where the result is divided by n
    """
    return as_array(gamma(block.bit_length() + 2) * as_array(size) + ETA["float32"])


def kv_offset(lo: Numbers, scale_dtype: str) -> tuple[Array, Array]:
    """B7.f: the interval in which a stored offset lies, (lowest, highest).

    lo   the smallest number of each group

    Storage rounds it *down*: by less than 2 u_s of itself, or by one smallest positive number.
    """
    low = as_array(lo)
    if scale_dtype == "float32":
        return low, low
    return low - 2 * UNIT[scale_dtype] * np.abs(low) - 2 * ETA[scale_dtype], low


def kv_logits(query: Numbers, element: Numbers) -> Array:
    """B7.b: how far logits move when keys do: sum_c |q_c| e_tc / sqrt(head_dim), [..., tokens].

    query     [..., head_dim]
    element   what each number of the keys may be off by, [..., tokens, head_dim]
    """
    q, e = np.abs(as_array(query)), as_array(element)
    return as_array((e @ q[..., None])[..., 0] / np.sqrt(q.shape[-1]))


def kv_output(weights: Numbers, element: Numbers, moved: Numbers, values: Numbers) -> Array:
    """B7.d: how far the output moves: sum_t p_t e_tc + moved / 2 * (max_t v_tc - min_t v_tc).

    weights   p, softmax of the logits that moved, [..., tokens]
    element   what each number of the values may be off by, [..., tokens, head_dim]
    moved     how far the weights moved in the sum of magnitudes (`softmax`), [...]
    values    v, [..., tokens, head_dim]
    """
    p, v = as_array(weights), as_array(values)
    own = (p[..., None, :] @ as_array(element))[..., 0, :]
    return as_array(own + as_array(moved)[..., None] / 2 * (v.max(-2) - v.min(-2)))


def kv_attention(
    query: Numbers,
    keys: Numbers,
    values: Numbers,
    weights: Numbers,
    elements: tuple[Numbers, Numbers] = (0.0, 0.0),
    dtype: str = "float32",
    rescalings: int = 0,
    query_error: Numbers = 0.0,
) -> tuple[Array, Array]:
    """B7.e: how far off attention may be: (weights, sum of magnitudes [...]; output [..., d]).

    query, keys, values   [..., d], [..., tokens, d], [..., tokens, d]
    weights      p of these in exact arithmetic, [..., tokens]
    elements     what each number of the keys, and of the values, may be off by in the computation
    dtype        of the arithmetic; its exp is within 8 u
    rescalings   how often a weight may be scaled down after it was made: 0 if the largest logit is
                 known before, up to the number of tokens for an online softmax
    query_error  what each number of the query may be off by, [..., d]

    Logits move by B7.b, by gamma_{d+3} of their magnitude, and by u |z_t - max z| for the
    subtraction; B7.c carries that on. Sums, products, exp, quotient: gamma_{2T + 18 (n + 1)}.
    """
    q, k, v, p = (as_array(a) for a in (query, keys, values, weights))
    off_k, off_v = (np.broadcast_to(as_array(e), k.shape) for e in elements)
    (tokens, d), unit, tiny = k.shape[-2:], UNIT[dtype], NORMAL[dtype]
    off_q = np.broadcast_to(as_array(query_error), q.shape)
    largest_k = np.abs(k) + off_k
    magnitude = kv_logits(np.abs(q) + off_q, largest_k)
    spread = 2 * magnitude.max(-1)[..., None]
    logits = (
        kv_logits(q, off_k)
        + kv_logits(off_q, largest_k)
        + gamma(d + 3, unit) * magnitude
        + gamma(2, unit) * spread
    )
    moved = softmax(2 * (logits.max(-1) + d * tiny))
    relative, lost = gamma(2 * tokens + 18 * (rescalings + 1), unit), 2 * tokens * tiny

    def mean(numbers: Array) -> Array:  # of what is >= 0, with weights that moved
        own: Array = (p[..., None, :] @ numbers)[..., 0, :]
        return as_array(own + moved[..., None] * numbers.max(-2))

    size = np.abs(v) + off_v
    output = mean(off_v) + moved[..., None] / 2 * (v.max(-2) - v.min(-2)) + relative * mean(size)
    return as_array(moved + relative + lost), as_array(output + lost * (1 + size.max(-2)))


def kv_lse(
    query: Numbers,
    keys: Numbers,
    element: Numbers = 0.0,
    dtype: str = "float32",
    rescalings: int = 0,
) -> Array:
    """B7.i: how far off log sum exp of the logits may be, [...]. The arguments of `kv_attention`.

    It moves by no more than the logits do; T exponentials and their sum are off by gamma_{T + 9
    (n + 1)}, which the logarithm makes absolute; the logarithm, and the largest logit that is added
    to it, are rounded.
    """
    q, k = as_array(query), as_array(keys)
    off = np.broadcast_to(as_array(element), k.shape)
    (tokens, d), unit, tiny = k.shape[-2:], UNIT[dtype], NORMAL[dtype]
    size = kv_logits(q, np.abs(k) + off).max(-1)
    moved = kv_logits(q, off).max(-1) + (gamma(d + 3, unit) + 2 * gamma(2, unit)) * size + d * tiny
    relative = gamma(tokens + 9 * (rescalings + 1), unit) + 2 * tokens * tiny
    rounded = gamma(6, unit) * (size + moved + np.log(tokens) + 1)
    return as_array(moved + relative / (1 - relative) + rounded)
