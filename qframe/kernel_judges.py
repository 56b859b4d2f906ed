"""Whether a kernel's answer is right: each answer held against its oracle, theorem by theorem.

A judge takes the operands of one call and what came of it, and returns comparisons: an error, and
what is allowed of it by a theorem of docs/bounds.md. It needs nothing but the operands, so it works
for any call on any data: in the conformance suite, and beside a user's own run.

Where the oracle is not finite, because a NaN or an infinity went in, the answer must not be finite
either. The oracle is float64; its own error is covered by `kernel_comparisons.checked`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from qframe import bounds, kernel_judges_int8, reference_ops
from qframe.kernel_comparisons import (
    Answer,
    Comparison,
    Float64,
    Judged,
    Operands,
    checked,
    difference,
    exactly,
    integer_tokens,
    kept_as_operands,
    of_output,
    only_where,
    powers_of_two,
    representable,
)
from qframe.kernels import Arithmetic


def judge(
    op: str, operands: Operands, answer: Answer, arithmetic: Arithmetic, *, dense: bool = False
) -> Judged:
    """Return theorem -> comparison for one call.

    operands     name -> NumPy array or number, as before the call
    answer       what came out, as NumPy arrays; the operands changed in place for an op that has
                 such operands
    arithmetic   what the kernel declares (`kernels.arithmetic_of`)
    dense        the kernel declares that it multiplies with Hadamard matrices as they are
    """
    with np.errstate(all="ignore"):  # infinities are compared on purpose
        if op == "hadamard":
            return _hadamard(operands, answer, arithmetic, dense)
        return _JUDGES[op](operands, answer, arithmetic)


THEOREMS: Final[Mapping[str, tuple[str, ...]]] = {
    "dequantize": ("B1.d",),
    "linear_weight_only": ("B9.b", "B9.c"),
    "quantize_activations": ("B6.a", "B6.b"),
    "linear_int8": ("B5.b",),
    "linear_int8_groups": ("B5.f",),
    "linear_int8_outliers": ("B5.a", "B5.b", "B5.d"),
    "hadamard": ("B8.a", "B8.b", "B9.c"),
    "rms_norm": ("B13.a",),
    "attention_kv": ("B7.e", "B7.i"),
    "attention_rotary": ("B7.e", "B13.b"),
    "hessian_update": ("B9.c", "B9.d"),
}
"""The theorems that an operation is judged by."""


# Weights --------------------------------------------------------------------------------------


def _dequantize(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    codes, index = np.asarray(operands["codes"], np.float64), operands["group_index"]
    scale = reference_ops.per_weight(operands["scale"], index, len(codes))
    steps = codes - reference_ops.per_weight(operands["zero_point"], index, len(codes))
    error = difference(answer[0], scale * steps)
    return {"B1.d": Comparison("|w - s (c - z)|", error, bounds.decode(scale, steps))}


def _linear_weight_only(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    x, codes = (np.asarray(operands[name], np.float64) for name in ("x", "codes"))
    index, columns = operands["group_index"], x.shape[1]
    scale = reference_ops.per_weight(operands["scale"], index, len(codes))
    zero = reference_ops.per_weight(operands["zero_point"], index, len(codes))
    weight = scale * (codes - zero)
    expected = x @ weight.T
    magnitude = np.abs(x) @ (scale * (np.abs(codes) + np.abs(zero))).T
    allowed = bounds.weight_only(
        magnitude, columns, arithmetic.unit, arithmetic.inputs, arithmetic.depth
    )
    outputs = arithmetic.outputs

    # A row whose scales are powers of two, times integers: multiples of the smallest scale.
    plain = powers_of_two(scale).all(1)
    quantum = np.where(plain, scale.min(1, initial=np.inf), 0)
    exact = bounds.exact_sum(magnitude, quantum) & integer_tokens(x)[:, None]
    exact &= kept_as_operands(weight, arithmetic.inputs)  # and of tokens eight bits are enough
    # A token that is 1 in one place: one product, if it and its parts are float32 numbers.
    single = ((x == 1).sum(1) == 1) & ((x != 0).sum(1) == 1)
    kept = representable(weight) & representable(scale * codes) & representable(scale * zero)
    chosen = kept[:, x.argmax(1)].T if columns else np.zeros_like(exact)
    rounded = 2 * arithmetic.inputs * (1 + arithmetic.inputs) * np.abs(expected)
    chosen = single[:, None] & chosen
    precise = exact | (chosen if arithmetic.inputs == 0 else np.zeros_like(chosen))
    what = "|y - x W^T| where it is exact"
    tight = exactly(what, precise, answer[0], expected, outputs)
    loose = of_output(what, answer[0], expected, rounded, outputs)
    return {
        "B9.b": of_output("|y - x W^T|", answer[0], expected, checked(allowed, columns), outputs),
        "B9.c": Comparison(
            what,
            np.where(precise, tight.error, only_where(chosen, loose.error)),
            np.where(chosen & ~precise, loose.allowed, 0),
        ),
    }


# Rotation, norms, attention, statistics ----------------------------------------------------------


def _hadamard(operands: Operands, answer: Answer, arithmetic: Arithmetic, dense: bool) -> Judged:
    x, block = np.asarray(operands["x"], np.float64), int(operands["block"])
    y = np.asarray(answer[0], np.float64)
    expected = reference_ops.hadamard(x, operands["signs"], block)
    tokens, columns = x.shape
    cut = (tokens, columns // block, block)
    size = np.linalg.norm(x.reshape(cut), axis=-1)  # [tokens, blocks]
    unit, inputs = arithmetic.unit, arithmetic.inputs
    reach = checked(bounds.hadamard(size, block, unit, inputs, dense=dense), block * block)
    outputs = arithmetic.outputs
    error = of_output("", y, expected, np.repeat(reach, block, 1), outputs).error
    if outputs != "float32":
        known = np.where(np.isfinite(size), size, 0)
        reach = bounds.short_output(known, reach, outputs, block)

    finite = np.isfinite(size).all(1) & np.isfinite(y).all(1)
    a, b, ea = x[finite], y[finite], reach[finite]
    pairs = bounds.rotated_product(
        size[finite][:, None], size[finite][None], ea[:, None], ea[None]
    ).sum(-1)
    integers = integer_tokens(x)[:, None] & (block.bit_length() % 2 == 1)
    exact = np.repeat(integers & bounds.exact_sum(np.abs(x).reshape(cut).sum(-1), 1), block, 1)
    return {
        "B8.a": Comparison(
            "||y - x diag(signs) H||", np.linalg.norm(error.reshape(cut), axis=-1), reach
        ),
        "B8.b": Comparison("|y_i y_j - x_i x_j|", b @ b.T - a @ a.T, pairs),
        "B9.c": exactly("|y - x diag(signs) H| where it is exact", exact, y, expected, outputs),
    }


def _rms_norm(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    x, weight = (np.asarray(operands[name], np.float64) for name in ("x", "weight"))
    expected = reference_ops.rms_norm(x, weight, operands["eps"])
    columns = x.shape[1]
    unit, inputs = arithmetic.unit, arithmetic.inputs
    allowed = bounds.rms_norm(expected, weight, columns, unit, inputs)
    what = "|y - w x / sqrt(mean(x^2) + eps)|"
    allowed = checked(allowed, columns)
    return {"B13.a": of_output(what, answer[0], expected, allowed, arithmetic.outputs)}


def _attention_kv(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    q = np.asarray(operands["q"], np.float64)
    unit, rounded = arithmetic.unit, 2 * arithmetic.inputs * (1 + arithmetic.inputs)
    (keys, key_sizes), (values, value_sizes) = (_cached(operands, letter, q) for letter in "kv")
    tokens, width = keys.shape[-2:]
    logits = reference_ops.logits(q, keys)
    weights = reference_ops.softmax(logits)
    # What the declared arithmetic does to a product counts as an error of the number in the cache:
    # so sums may be cut, operands rounded, scale and offset taken out of the sums.
    in_logits = bounds.gamma(width + 7, unit) + rounded
    in_output = bounds.gamma(2 * tokens + 18 * (tokens + 1), unit) + rounded
    elements = (
        bounds.gamma(3) * key_sizes + in_logits * key_sizes,
        bounds.gamma(3) * value_sizes + in_output * value_sizes,
    )
    _, allowed = bounds.kv_attention(q, keys, values, weights, elements, rescalings=tokens)
    out = (weights[..., None] * values).sum(-2)
    length = 4 * (tokens + width)
    in_lse = bounds.kv_lse(q, keys, elements[0], rescalings=tokens)
    lse = difference(answer[1], reference_ops.log_sum_exp(logits))
    return {
        "B7.e": of_output(
            "|out - softmax(q k) v|", answer[0], out, checked(allowed, length), arithmetic.outputs
        ),
        "B7.i": Comparison("|lse - log sum exp(q k)|", lse, checked(in_lse, length)),
    }


def _cached(operands: Operands, letter: str, q: Float64) -> tuple[Float64, Float64]:
    """Return s c + o and s |c| + |o| of keys or values, as each query head reads them."""
    words, scale, offset, scheme = (
        operands[f"{letter}_{part}"] for part in ("words", "scale", "offset", "scheme")
    )
    codes = reference_ops.unpacked(words, scheme, operands["tokens"], q.shape[-1])
    s, o = (reference_ops.spread_groups(each, scheme, codes.shape) for each in (scale, offset))
    both = (s * codes + o, s * np.abs(codes) + np.abs(o))
    return reference_ops.shared(both[0], q), reference_ops.shared(both[1], q)


def _attention_rotary(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    names = ("q", "k", "v", "cos", "sin", "keys", "values")
    q, k, v, cos, sin, keys, values = (np.asarray(operands[name], np.float64) for name in names)
    unit, rounded = arithmetic.unit, 2 * arithmetic.inputs * (1 + arithmetic.inputs)
    query, key = (reference_ops.turned(each, cos, sin) for each in (q, k))
    in_query, in_key = (
        bounds.rotary(_turned_size(each, cos, sin), unit, arithmetic.inputs) for each in (q, k)
    )
    factor = operands["scaling"] * np.sqrt(q.shape[-1])
    query, in_query = query * factor, in_query * factor
    all_keys, all_values, off = (
        reference_ops.shared(reference_ops.with_newest(*pair), query)
        for pair in ((keys, key), (values, v), (np.zeros_like(keys), in_key))
    )
    tokens, width = all_keys.shape[-2:]
    weights = reference_ops.softmax(reference_ops.logits(query, all_keys))
    # As in `_attention_kv`: what the declared arithmetic does to products counts as an error of
    # the numbers in the cache.
    in_logits = bounds.gamma(width + 7, unit) + rounded
    in_output = bounds.gamma(2 * tokens + 18 * (tokens + 1), unit) + rounded
    sizes = np.abs(all_keys) + off, np.abs(all_values)
    elements = off + in_logits * sizes[0], in_output * sizes[1]
    _, allowed = bounds.kv_attention(
        query, all_keys, all_values, weights, elements, rescalings=tokens, query_error=in_query
    )
    out, outputs = (weights[..., None] * all_values).sum(-2), arithmetic.outputs
    allowed = checked(allowed, 4 * (tokens + width))
    return {
        "B7.e": of_output("|out - softmax(q k) v|", answer[0], out, allowed, outputs),
        "B13.b": of_output("|k_turned - k'|", answer[1], key, in_key, outputs),
    }


def _turned_size(x: Float64, cos: Float64, sin: Float64) -> Float64:
    """Return |x cos| + |x' sin|."""
    other = np.roll(np.abs(x), x.shape[-1] // 2, -1)
    return np.asarray(np.abs(x) * np.abs(cos)[:, None] + other * np.abs(sin)[:, None])


def _hessian_update(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    before, x = (np.asarray(operands[name], np.float64) for name in ("hessian", "x"))
    tokens, columns = x.shape
    magnitude = np.tril(np.abs(x).T @ np.abs(x))
    below = np.tril(np.ones((columns, columns), bool))
    error = only_where(below, difference(answer[0], reference_ops.hessian_update(before, x)))
    allowed = bounds.second_moments(
        magnitude, before, tokens, arithmetic.unit, arithmetic.inputs, arithmetic.depth
    ) + bounds.accumulate(magnitude + np.abs(before), tokens + 1, bounds.UNIT["float64"])
    exact = bounds.exact_sum(magnitude, 1) & (integer_tokens(x).all() and _whole(before))
    return {
        "B9.c": Comparison(
            "|H - sum| where it is exact", only_where(exact, error), np.zeros_like(error)
        ),
        "B9.d": Comparison("|H - sum|", error, np.where(np.isnan(allowed), 0, allowed)),
    }


def _whole(numbers: Float64) -> bool:
    """Return whether all are integers to which a float64 adds others exactly."""
    return bool(((numbers == np.rint(numbers)) & (np.abs(numbers) <= 2.0**52)).all())


_JUDGES: Mapping[str, Callable[[Operands, Answer, Arithmetic], Judged]] = {
    "dequantize": _dequantize,
    "linear_weight_only": _linear_weight_only,
    "quantize_activations": kernel_judges_int8.quantize_activations,
    "linear_int8": kernel_judges_int8.linear_int8,
    "linear_int8_groups": kernel_judges_int8.linear_int8_groups,
    "linear_int8_outliers": kernel_judges_int8.linear_int8_outliers,
    "rms_norm": _rms_norm,
    "attention_kv": _attention_kv,
    "attention_rotary": _attention_rotary,
    "hessian_update": _hessian_update,
}
