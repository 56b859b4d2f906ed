"""The oracle of every kernel operation, in NumPy float64 and int64.

An answer is what real numbers would give, but for the float64 arithmetic of the oracle itself; it
is rounded nowhere else, not even where a kernel has to. Only codes are what they are. Operands and
their shapes are those of `qframe.kernels`. It imports neither torch nor numba.

Sources: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339 (the decomposition, section
3.2); Ashkboos et al., QuaRot, NeurIPS 2024, arXiv:2404.00456 (randomized Hadamard transforms).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from qframe.kv_scheme import KVScheme

Numbers: TypeAlias = npt.ArrayLike
Float64: TypeAlias = npt.NDArray[np.float64]
Bool: TypeAlias = npt.NDArray[np.bool_]


def _float(numbers: Numbers) -> Float64:
    return np.asarray(numbers, np.float64)


def per_weight(per_group: Numbers, group_index: Numbers, rows: int) -> Float64:
    """Return [rows, columns] of values [rows or 1, groups]."""
    spread = _float(per_group)[:, np.asarray(group_index, np.int64)]
    return np.broadcast_to(spread, (rows, spread.shape[1]))


def dequantize(
    codes: Numbers, scale: Numbers, zero_point: Numbers, group_index: Numbers
) -> Float64:
    """Return scale * (code - zero_point), [rows, columns]."""
    c = _float(codes)
    s, z = (per_weight(each, group_index, len(c)) for each in (scale, zero_point))
    return s * (c - z)


def linear_weight_only(
    x: Numbers, codes: Numbers, scale: Numbers, zero_point: Numbers, group_index: Numbers
) -> Float64:
    """Return x W^T, [tokens, rows]."""
    return _float(x) @ dequantize(codes, scale, zero_point, group_index).T


# Eight bits -----------------------------------------------------------------------------------


def token_scale(x: Numbers) -> Float64:
    """Return absmax / 127 of each token, and 1 for a token of zeros, [tokens]."""
    absmax = np.abs(_float(x)).max(1, initial=0)
    return np.where(absmax == 0, 1, absmax / 127)


def quantize_activations(x: Numbers) -> tuple[Float64, Float64]:
    """Return (codes, scale): the nearest codes of each token, and its scale."""
    scale = token_scale(x)
    with np.errstate(invalid="ignore"):  # infinity / infinity
        return np.rint(_float(x) / scale[:, None]), scale


def integer_product(x_codes: Numbers, w_codes: Numbers) -> Float64:
    """Return the sum of the products of codes, [tokens, rows]: integers below 2^53, so exact."""
    return _float(x_codes) @ _float(w_codes).T


def linear_int8(x_codes: Numbers, x_scale: Numbers, w_codes: Numbers, w_scale: Numbers) -> Float64:
    """Return x W^T, [tokens, rows], both as their codes and scales say."""
    product = integer_product(x_codes, w_codes)
    return product * _float(x_scale)[:, None] * _float(w_scale)


def linear_int8_groups(
    x_codes: Numbers,
    x_scale: Numbers,
    codes: Numbers,
    scale: Numbers,
    zero_point: Numbers,
    group_index: Numbers,
) -> Float64:
    """Return x W^T, [tokens, rows], both as their codes and scales say."""
    sums, scales = group_sums(x_codes, codes, scale, zero_point, group_index)
    return np.asarray((sums * scales).sum(0) * _float(x_scale)[:, None])


def group_sums(
    x_codes: Numbers, codes: Numbers, scale: Numbers, zero_point: Numbers, group_index: Numbers
) -> tuple[Float64, Float64]:
    """Return the sum of products of codes in each group, and its scale.

    sums     [groups, tokens, rows], integers below 2^53, so exact
    scales   [groups, 1, rows]
    """
    x, c, index = _float(x_codes), _float(codes), np.asarray(group_index, np.int64)
    s, z = (
        np.broadcast_to(_float(each), (len(c), _float(each).shape[1]))
        for each in (scale, zero_point)
    )
    steps = c - z[:, index]
    sums = [x[:, index == g] @ steps[:, index == g].T for g in range(s.shape[1])]
    return np.stack(sums), s.T[:, None]


def outlier_columns(x: Numbers, threshold: float) -> Bool:
    """Return which columns hold |x| >= threshold in any token, [columns]; none for threshold 0."""
    size = np.abs(_float(x))
    if threshold <= 0:
        return np.zeros(size.shape[1], bool)
    return np.asarray((size >= threshold).any(0))


def linear_int8_outliers(
    x: Numbers, threshold: float, w_codes: Numbers, w_scale: Numbers, weight: Numbers
) -> Float64:
    """Return x W^T, [tokens, rows]: outlier columns as they are, the others in eight bits."""
    outlier = outlier_columns(x, threshold)
    codes, scale = quantize_activations(np.where(outlier, 0, _float(x)))
    kept = _float(x)[:, outlier] @ _float(weight)[:, outlier].T
    return linear_int8(codes, scale, w_codes, w_scale) + kept


# Rotation, attention, statistics --------------------------------------------------------------


def hadamard_matrix(size: int) -> Float64:
    """Return Sylvester's matrix of +1 and -1: entry ij is (-1)^popcount(i & j).

    size   a power of two
    """
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard(x: Numbers, signs: Numbers, block: int) -> Float64:
    """Return x diag(signs) H / sqrt(block), block of columns by block, [tokens, columns]."""
    signed = _float(x) * _float(signs)
    blocks = signed.reshape(len(signed), signed.shape[1] // block, block)
    turned = blocks @ hadamard_matrix(block) / np.sqrt(block)
    return np.asarray(turned.reshape(signed.shape))


def rms_norm(x: Numbers, weight: Numbers, eps: float) -> Float64:
    """Return weight x / sqrt(mean(x^2) + eps), token by token, [tokens, columns]."""
    numbers = _float(x)
    root = np.sqrt((numbers**2).mean(1, keepdims=True) + eps)
    return np.asarray(_float(weight) * (numbers / root))


def unpacked(words: Numbers, scheme: KVScheme, tokens: int, width: int) -> Float64:
    """Return the codes of a cache, [batch, heads, tokens, head_dim].

    words   int32 [batch, heads, rows, words], a row being a token, or a channel of a token group
    """
    bits, channel = scheme.num_bits, scheme.axis == "channel"
    codes = scheme.step if channel else width
    little = np.ascontiguousarray(words, "<i4").view(np.uint8)
    stream = np.unpackbits(little, axis=-1, bitorder="little")[..., : codes * bits]
    numbers = stream.reshape(*stream.shape[:-1], codes, bits) @ (1.0 * (1 << np.arange(bits)))
    if channel:
        batch, heads, rows = numbers.shape[:3]
        groups = rows // width if width else 0
        cut = numbers.reshape(batch, heads, groups, width, codes).swapaxes(3, 4)
        numbers = cut.reshape(batch, heads, groups * codes, width)[:, :, :tokens]
    return np.asarray(numbers + scheme.grid.qmin)


def spread_groups(per_group: Numbers, scheme: KVScheme, shape: tuple[int, ...]) -> Float64:
    """Return scales or offsets for every number of `shape` [..., tokens, head_dim]."""
    tokens, width = shape[-2:]
    rows, columns = np.arange(tokens), np.arange(width)
    if scheme.axis == "channel":
        rows = rows // scheme.step
    else:
        columns = columns // (scheme.group_size or max(width, 1))
    return _float(per_group)[..., rows[:, None], columns]


def cached(
    words: Numbers, scale: Numbers, offset: Numbers, scheme: KVScheme, tokens: int, width: int
) -> Float64:
    """Return scale * code + offset, [batch, heads, tokens, head_dim]."""
    c = unpacked(words, scheme, tokens, width)
    return c * spread_groups(scale, scheme, c.shape) + spread_groups(offset, scheme, c.shape)


def attention_kv(
    q: Numbers,
    k_words: Numbers,
    k_scale: Numbers,
    k_offset: Numbers,
    k_scheme: KVScheme,
    v_words: Numbers,
    v_scale: Numbers,
    v_offset: Numbers,
    v_scheme: KVScheme,
    tokens: int,
) -> tuple[Float64, Float64]:
    """Return softmax(z) V and log sum exp z, z = q K^T / sqrt(head_dim).

    They are [batch, heads, head_dim] and [batch, heads].
    """
    width = np.shape(q)[-1]
    keys = cached(k_words, k_scale, k_offset, k_scheme, tokens, width)
    values = cached(v_words, v_scale, v_offset, v_scheme, tokens, width)
    z = logits(q, shared(keys, q))
    out = (softmax(z)[..., None] * shared(values, q)).sum(-2)
    return np.asarray(out), log_sum_exp(z)


def shared(per_kv_head: Float64, q: Numbers) -> Float64:
    """Return the head of K or V that each query head reads, [batch, heads, tokens, head_dim]."""
    times = np.shape(q)[1] // max(per_kv_head.shape[1], 1)
    return np.repeat(per_kv_head, times, axis=1)


def logits(q: Numbers, keys: Float64) -> Float64:
    """Return q k / sqrt(head_dim), [batch, heads, tokens]; keys as each query head reads them."""
    query = _float(q)
    products = keys @ query[..., None]
    return np.asarray(products[..., 0] / np.sqrt(query.shape[-1]))


def softmax(z: Float64) -> Float64:
    """Return exp(z) / sum exp(z) over the last axis."""
    powers = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def log_sum_exp(z: Float64) -> Float64:
    """Return log sum exp(z) over the last axis."""
    largest = z.max(-1)
    return np.asarray(largest + np.log(np.exp(z - largest[..., None]).sum(-1)))


def turned(x: Numbers, cos: Numbers, sin: Numbers) -> Float64:
    """Return x cos + x' sin, x' being (- second half, first half); x is [batch, heads, head_dim].

    cos, sin   [batch, head_dim]
    """
    numbers, c, s = _float(x), _float(cos)[:, None], _float(sin)[:, None]
    first, second = np.split(numbers, 2, -1)
    return np.asarray(numbers * c + np.concatenate([-second, first], -1) * s)


def attention_rotary(
    q: Numbers,
    k: Numbers,
    v: Numbers,
    cos: Numbers,
    sin: Numbers,
    keys: Numbers,
    values: Numbers,
    scaling: float,
) -> tuple[Float64, Float64]:
    """Return (softmax(scaling q' K^T) V, k'): q' and k' are turned, k' and v stand last in K, V."""
    query, key = turned(q, cos, sin), turned(k, cos, sin)
    width = np.sqrt(query.shape[-1])
    cache = (shared(with_newest(*pair), query) for pair in ((keys, key), (values, v)))
    all_keys, all_values = cache
    weights = softmax(logits(query * scaling * width, all_keys))
    return (weights[..., None] * all_values).sum(-2), key


def with_newest(cache: Numbers, newest: Numbers) -> Float64:
    """Return [batch, kv heads, tokens + 1, head_dim] of a cache and what comes after it."""
    return np.concatenate([_float(cache), _float(newest)[:, :, None]], 2)


def hessian_update(hessian: Numbers, x: Numbers) -> Float64:
    """Return hessian + x^T x below and on the diagonal, and hessian above it."""
    before = _float(hessian)
    return before + np.tril(_float(x).T @ _float(x))
