"""What a quantized layer is stored as, in qframe's own layout: names after the layer's name."""

from qframe.transforms import STEP, TRANSFORM_PARTS

WEIGHT_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
)
"""Of its weight."""

KEPT_WEIGHT = "weight_kept"
PARTS = (*WEIGHT_PARTS, KEPT_WEIGHT, *TRANSFORM_PARTS, STEP)
"""All that there may be."""
