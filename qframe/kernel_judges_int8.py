"""Judges of the eight-bit operations: the codes of tokens, products of codes, LLM.int8()."""

from __future__ import annotations

from typing import Final

import numpy as np

from qframe import bounds, reference_ops
from qframe.contracts import Grid
from qframe.kernel_comparisons import (
    Answer,
    Comparison,
    Judged,
    Operands,
    checked,
    difference,
    of_output,
    only_where,
)
from qframe.kernels import Arithmetic

INT8: Final = Grid(-127, 127)


def quantize_activations(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    """B6.a the scale of each token, B6.b its codes."""
    x = np.asarray(operands["x"], np.float64)
    codes, scale = (np.asarray(part, np.float64) for part in answer)
    absmax = np.abs(x).max(1, initial=0)
    ideal = reference_ops.token_scale(x)
    lowest, highest = bounds.token_scale(absmax)
    zeros, finite = absmax == 0, np.isfinite(absmax)
    allowed = np.where(scale < ideal, ideal - lowest, highest - ideal)
    of_scale = Comparison(
        "|scale - absmax / 127|",
        difference(scale, np.where(finite, ideal, np.nan)),
        np.where(zeros | ~finite, 0, allowed),
    )
    delta = np.where(finite[:, None], scale[:, None] * codes - x, 0)
    allowance = np.where(finite[:, None], bounds.gamma(2) * np.abs(x), 0)
    step = np.where(finite, scale, 1)[:, None]
    error, allowed = bounds.nearest(delta, codes, step, INT8, allowance)
    outside = (np.abs(codes) > INT8.qmax) & finite[:, None]
    of_codes = Comparison("|x - scale code|", np.where(outside, np.inf, error), allowed)
    return {"B6.a": of_scale, "B6.b": of_codes}


def linear_int8(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    """B5.b the output as codes and scales say."""
    scales = [np.asarray(operands[name], np.float64) for name in ("x_scale", "w_scale")]
    product = reference_ops.integer_product(operands["x_codes"], operands["w_codes"])
    expected = product * scales[0][:, None] * scales[1]
    allowed = bounds.int8_decode(product, scales[0][:, None], scales[1])
    error = difference(answer[0], expected)
    return {"B5.b": Comparison("|y - s_x s_w sum of codes|", error, checked(allowed, 0))}


def linear_int8_groups(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    """B5.f the output as codes and scales say, the sum of each group without error."""
    x_scale = np.asarray(operands["x_scale"], np.float64)[:, None]
    parts = (operands[name] for name in ("x_codes", "codes", "scale", "zero_point", "group_index"))
    sums, scales = reference_ops.group_sums(*parts)
    terms = sums * scales
    allowed = bounds.int8_groups(np.abs(terms).sum(0) * np.abs(x_scale), len(terms), x_scale)
    error = difference(answer[0], terms.sum(0) * x_scale)
    return {"B5.f": Comparison("|y - s_x sum s_g a_g|", error, checked(allowed, len(terms)))}


def linear_int8_outliers(operands: Operands, answer: Answer, arithmetic: Arithmetic) -> Judged:
    """B5.a the output, B5.b as the codes say, B5.d of tokens of outliers alone."""
    x, w_codes, w_scale, weight = (
        np.asarray(operands[name], np.float64) for name in ("x", "w_codes", "w_scale", "weight")
    )
    unit, inputs, columns = arithmetic.unit, arithmetic.inputs, x.shape[1]
    outlier = reference_ops.outlier_columns(x, float(operands["threshold"]))
    count = int(outlier.sum())
    rest = np.where(outlier, 0, x)
    scale = reference_ops.token_scale(rest)
    quotient = rest / scale[:, None]
    main = np.rint(quotient) @ w_codes.T * scale[:, None] * w_scale
    kept = x[:, outlier] @ weight[:, outlier].T
    kept_size = np.abs(x[:, outlier]) @ np.abs(weight[:, outlier]).T
    doubt = bounds.doubtful_codes(quotient, w_codes, scale, w_scale)
    decoded = bounds.int8_mixed(np.abs(main) + kept_size, doubt, count, unit, inputs)
    step = np.where(rest.any(1), scale, 0)  # zeros are not rounded
    output = bounds.int8_output(x, weight, w_codes * w_scale[:, None], step, outlier, unit, inputs)
    only = (rest == 0).all(1)[:, None]
    spared = bounds.int8_mixed(kept_size, 0.0, count, unit, inputs)
    y, outputs = answer[0], arithmetic.outputs
    alone = "|y - x W^T| of tokens that are outliers alone"
    alone_held = of_output(alone, y, kept, checked(spared, columns), outputs)
    return {
        "B5.a": of_output("|y - x W^T|", y, x @ weight.T, checked(output, columns), outputs),
        "B5.b": of_output(
            "|y - (s_x s_w sum of codes + outliers)|",
            y,
            main + kept,
            checked(decoded, columns),
            outputs,
        ),
        "B5.d": Comparison(alone, only_where(only, alone_held.error), alone_held.allowed),
    }
