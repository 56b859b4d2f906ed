"""Attention of the newest token, its position turned in, over numbers: `attention_rotary`.

A network that writes token by token asks for this once for every layer. As operations on tensors it
is some forty, of which each takes longer to begin than to end.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, with the pairs of transformers: the columns i
        and i + head_dim / 2.
Error:  docs/bounds.md, B13.b and B7.e, the largest logit being known before anything is scaled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.attention_steps import (
    LANES,
    dots,
    largest_of,
    mix_rows,
    powers,
)
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel, zeros
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

Float32 = npt.NDArray[np.float32]


def attend(
    q: Float32,
    k: Float32,
    v: Float32,
    cos: Float32,
    sin: Float32,
    keys: Float32,
    values: Float32,
    scaling: float,
) -> tuple[Float32, Float32]:
    """Return (the output [batch, heads, head_dim], the key, turned, like k), float32.

    q              [batch, heads, head_dim], head_dim even
    k, v           [batch, kv heads, head_dim]
    cos, sin       [batch, head_dim]
    keys, values   [batch, kv heads, tokens, head_dim], of those before
    """
    batch, kv_heads, tokens, width = keys.shape
    out, turned = np.empty(q.shape, np.float32), np.empty(k.shape, np.float32)
    if not out.size:
        return out, turned
    newest = [np.ascontiguousarray(each) for each in (q, k, v, cos, sin)]
    tasks = worth_sharing(batch * kv_heads, 8 * batch * kv_heads * tokens * width, 0)
    past = _rows(keys), _rows(values)
    share(_share_lanes, tasks, *newest, *past, np.float32(scaling), out, turned)
    return out, turned


def _rows(cache: Float32) -> Float32:
    """Return a cache whose rows lie one after another, and are whole registers."""
    *outer, width = cache.shape
    if width % LANES:
        wide = np.zeros((*outer, -(-width // LANES) * LANES), np.float32)
        wide[..., :width] = cache
        return wide
    whole = cache.strides[3] == cache.itemsize and cache.strides[2] == width * cache.itemsize
    return cache if whole else np.ascontiguousarray(cache)


@kernel
def _turn(x, cos, sin, out):  # type: ignore[no-untyped-def]
    """Set `out` to x, its pairs being turned."""
    half = len(x) // 2
    for i in range(half):
        out[i] = x[i] * cos[i] - x[i + half] * sin[i]
        out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]


@kernel
def _share_lanes(counter, q, k, v, cos, sin, keys, values, scaling, out, turned):  # type: ignore[no-untyped-def]
    """Claim heads of keys, and compute the outputs of the queries that read them."""
    batch, kv_heads, tokens, wide = keys.shape
    width, group = q.shape[2], q.shape[1] // kv_heads
    queries, sums = zeros(group, wide), zeros(group, wide)
    filled = -(-(tokens + 1) // LANES) * LANES
    logits = zeros(group, filled)
    lane = claim(counter)
    while lane < batch * kv_heads:
        b, h = lane // kv_heads, lane % kv_heads
        _turn(k[b, h], cos[b], sin[b], turned[b, h])
        for g in range(group):
            _turn(q[b, h * group + g], cos[b], sin[b], queries[g])
            own = np.float32(0)
            for c in range(width):
                queries[g, c] *= scaling
                own += queries[g, c] * turned[b, h, c]
            dots(queries, g, keys[b, h], tokens, logits, 0)
            logits[g, tokens] = own
            logits[g, tokens + 1 :] = -np.inf
            most = largest_of(logits, g, filled)
            total = powers(logits, g, filled, most) + (most - most)  # NaN where that is not finite
            sums[g, :] = 0
            mix_rows(sums, g, logits, 0, values[b, h], tokens)
            for c in range(width):
                own = sums[g, c] + logits[g, tokens] * v[b, h, c]
                out[b, h * group + g, c] = own / total
        lane = claim(counter)
