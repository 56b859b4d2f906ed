"""Every error that qframe allows, each with the theorem that allows it.

The theorems (B1, B3, ...) are stated and proved in docs/bounds.md. Nothing here is a tolerance:
a bound follows from the step of the grid, the unit roundoff of the arithmetic, the length of the
sums, and the data. Everything is NumPy float64, so that a checker needs neither torch nor numba,
and every bound is *a posteriori* in the stored scale: whether that scale is the right one is a
question of its own (`scale_rule`, `coverage`), or an over-large scale would pass everything.

A module for each family of theorems; `arithmetic` has the notation, and how a bound is used.
"""

from __future__ import annotations

from qframe.bounds.arithmetic import (
    CHECKER,
    ETA,
    UNIT,
    Array,
    Numbers,
    accumulate,
    gamma,
    ratio,
    worst,
)
from qframe.bounds.eight_bit import (
    doubtful,
    int8_decode,
    int8_groups,
    int8_mixed,
    int8_output,
    int32_columns,
    token_scale,
)
from qframe.bounds.formats import float_element, half_cell, nearest_value, representable
from qframe.bounds.gptq import (
    gptq_aim,
    gptq_aim_rounded,
    gptq_allowance,
    gptq_certificate,
    gptq_compensated,
    gptq_factorization,
    gptq_loss,
    gptq_moved,
    gptq_norms,
    gptq_residual,
)
from qframe.bounds.kv import (
    kv_attention,
    kv_butterflies,
    kv_decode,
    kv_element,
    kv_logits,
    kv_lse,
    kv_offset,
    kv_output,
    kv_returned,
    softmax,
)
from qframe.bounds.methods import (
    fitted_scale,
    half_steps,
    no_worse,
    no_worse_power,
    output_bound,
    radius,
)
from qframe.bounds.norms import rms_norm, rotary
from qframe.bounds.rewrites import (
    folded_norm,
    kept_weight,
    rewrite_element,
    rewrite_output,
    rotated_block,
    rotated_output,
    sample_slack,
    search_slack,
)
from qframe.bounds.rotations import hadamard, incoherence, rotated_product
from qframe.bounds.rounding import (
    coverage,
    decode,
    half_step,
    ideal_scale,
    nearest,
    nearest_code,
    ocp_scale,
    scale_rule,
    tensor_scale,
    zero_point_added,
)
from qframe.bounds.statistics import binned_search, magnitudes, quantile
from qframe.bounds.sums import cross_sum, exact_sum, hessian_sum, second_moments, weight_only

__all__ = [
    "CHECKER",
    "ETA",
    "UNIT",
    "Array",
    "Numbers",
    "accumulate",
    "binned_search",
    "coverage",
    "cross_sum",
    "decode",
    "doubtful",
    "exact_sum",
    "fitted_scale",
    "float_element",
    "folded_norm",
    "gamma",
    "gptq_aim",
    "gptq_aim_rounded",
    "gptq_allowance",
    "gptq_certificate",
    "gptq_compensated",
    "gptq_factorization",
    "gptq_loss",
    "gptq_moved",
    "gptq_norms",
    "gptq_residual",
    "hadamard",
    "half_cell",
    "half_step",
    "half_steps",
    "hessian_sum",
    "ideal_scale",
    "incoherence",
    "int8_decode",
    "int8_groups",
    "int8_mixed",
    "int8_output",
    "int32_columns",
    "kept_weight",
    "kv_attention",
    "kv_butterflies",
    "kv_decode",
    "kv_element",
    "kv_logits",
    "kv_lse",
    "kv_offset",
    "kv_output",
    "kv_returned",
    "magnitudes",
    "nearest",
    "nearest_code",
    "nearest_value",
    "no_worse",
    "no_worse_power",
    "ocp_scale",
    "output_bound",
    "quantile",
    "radius",
    "ratio",
    "representable",
    "rewrite_element",
    "rewrite_output",
    "rms_norm",
    "rotary",
    "rotated_block",
    "rotated_output",
    "rotated_product",
    "sample_slack",
    "scale_rule",
    "search_slack",
    "second_moments",
    "softmax",
    "tensor_scale",
    "token_scale",
    "weight_only",
    "worst",
    "zero_point_added",
]
