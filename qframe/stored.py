"""A quantized layer as it is stored and as it computes: y = W_s z + b.

z is the input, scaled and rotated (`qframe.transforms`), and quantized where activations are
(`qframe.activations`); W_s is what the codes stand for, with the columns put in that are kept in
16 bits. Those are multiplied with z as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qframe import scales
from qframe.activations import InputQuantizer
from qframe.contracts import Grid, LayerOutline
from qframe.errors import NonFiniteError, WeightsError
from qframe.packing import PackedWeight
from qframe.parts import KEPT_WEIGHT, PARTS
from qframe.scheme import Scheme
from qframe.transforms import STEP, InputTransform

FAINTEST = 2.0**-100  # of a divided scale: float32 holds its products with all values of all grids


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """Everything that is stored of a quantized layer, but its bias.

    packed      the codes, scales and zero points
    transform   of the input, from rewrites; None for none
    kept        [rows, k] float16, the weights of the columns that the transform keeps
    inputs      how activations are quantized; None for not at all
    """

    packed: PackedWeight
    transform: InputTransform | None = None
    kept: torch.Tensor | None = None
    inputs: InputQuantizer | None = None

    @property
    def bits(self) -> int:
        """All stored bits: of the weight, of what is kept, and of what is done to the input."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that they have in a file after the layer's name."""
        found = self.packed.tensors()
        if self.transform is not None:
            found |= self.transform.tensors()
        if self.kept is not None:
            found[KEPT_WEIGHT] = self.kept
        if self.inputs is not None and self.inputs.scale is not None:
            found[STEP] = self.inputs.scale.clone()  # each layer its own
        return found

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        scheme: Scheme,
        grid: Grid,
        input_grid: Grid | None,
        *,
        name: str,
        rows: int,
        columns: int,
    ) -> StoredLayer:
        """Return the layer that `tensors` held.

        grid, input_grid   the codes of the weight, and of activations where they are quantized
        name               of the layer, for messages

        Raises WeightsError when a tensor is missing, or has a shape, dtype or value that `tensors`
        cannot have returned.
        """
        packed = PackedWeight.from_tensors(
            tensors, name=name, rows=rows, columns=columns, scheme=scheme, grid=grid
        )
        transform = InputTransform.stored(tensors)
        wrong = "" if transform is None else transform.fault(columns)
        wrong = wrong or _fault_of_kept(tensors.get(KEPT_WEIGHT), transform, rows)
        wrong = wrong or _fault_of_inputs(tensors.get(STEP), scheme, input_grid)
        if wrong:
            raise WeightsError(f"layer {name!r}: {wrong}")
        inputs = None
        if scheme.input_activations is not None and input_grid is not None:
            inputs = InputQuantizer(scheme.input_activations, input_grid, tensors.get(STEP))
        return cls(packed, transform, tensors.get(KEPT_WEIGHT), inputs)

    @classmethod
    def of_outline(cls, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer that `tensors` held, given what it is. Raises WeightsError."""
        return cls.from_tensors(
            tensors,
            layer.scheme,
            layer.grid,
            layer.input_grid,
            name=layer.info.name,
            rows=layer.info.rows,
            columns=layer.info.columns,
        )

    @property
    def extras(self) -> frozenset[str]:
        """What it has besides codes, scales and zero points (`qframe.contracts.EXTRAS`)."""
        found = {"group index"} if self.packed.group_index is not None else set()
        transform = self.transform
        if transform is not None:
            parts = {
                "scale": transform.scale,
                "rotation": transform.rotation,
                "kept columns": transform.kept,
                "threshold": transform.threshold,
            }
            found |= {name for name, part in parts.items() if part is not None}
        return frozenset(found)

    def weight(self) -> torch.Tensor:
        """Return W_s, [rows, columns] float32."""
        return self.with_kept(self.packed.dequantize())

    def with_kept(self, values: torch.Tensor) -> torch.Tensor:
        """Return W_s, given what the codes stand for."""
        return values if self.transform is None else self.transform.with_kept(values, self.kept)

    def plain(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that does to plain inputs what W_s does to z, nothing being rounded."""
        return weight if self.transform is None else self.transform.undo(weight)

    def weight_in_network(self) -> torch.Tensor:
        """Return what takes the weight's place in the network, [rows, columns] float32.

        W_s where inputs are quantized, which `inputs_of` does before; else what does to plain
        inputs what W_s does.
        """
        weight = self.weight()
        return weight if self.inputs is not None else self.plain(weight)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return W_s z + b for x [..., columns], in the dtype of x.

        weight   W_s
        """
        z = self.inputs_of(x)
        bias = None if bias is None else bias.to(z.dtype)
        return nn.functional.linear(z, weight.to(z.dtype), bias).to(x.dtype)

    def inputs_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return what W_s is multiplied with, for x [..., columns]; float32 where it is rounded."""
        return self.quantized(x if self.transform is None else self.transform.move(x))

    def quantized(self, z: torch.Tensor) -> torch.Tensor:
        """Return z [..., columns], scaled and rotated inputs, as they are multiplied, float32."""
        if self.inputs is None:
            return z
        if self.transform is None:
            return self.inputs.apply(z)
        values = self.inputs.apply(self.transform.rest(z), self.transform.threshold)
        kept = self.transform.kept
        if kept is None:
            return values
        return values.index_copy(-1, kept, z.index_select(-1, kept).to(values.dtype))

    def divided(self, exponents: torch.Tensor) -> StoredLayer:
        """Return the layer with its rows divided by 2^exponents, [rows] int64.

        Its codes are the same. It is exact where `can_divide` says so.
        """
        packed, kept = self.packed, self.kept
        dtype, whole = packed.scheme.scale_dtype, packed.global_scale
        scale = divided_rows(scales.read(packed.scale, dtype, whole), exponents)
        return dataclasses.replace(
            self,
            packed=dataclasses.replace(packed, scale=scales.store(scale, dtype, whole)),
            kept=None if kept is None else divided_rows(kept, exponents),
        )

    def can_divide(self, exponents: torch.Tensor) -> torch.Tensor:
        """Return for each row whether dividing it by 2^exponents changes exponents alone.

        What it makes can be divided by 2^-exponents then, and is the layer again.
        """
        there = self.divided(exponents)
        back = there.divided(-exponents)
        same = self._fits() & there._fits() & (back.packed.scale == self.packed.scale).all(1)
        if self.kept is not None and back.kept is not None:
            same &= (back.kept == self.kept).all(1)
        return same | (exponents == 0)

    def _fits(self) -> torch.Tensor:
        """Return for each row whether no value of any grid times a scale leaves float32, [rows]."""
        packed = self.packed
        scale = scales.read(packed.scale, packed.scheme.scale_dtype, packed.global_scale)
        return ((scale >= FAINTEST) & (scale <= 1 / FAINTEST)).all(1)


def divided_rows(values: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return values [rows, ...] divided by 2^exponents [rows], rounded to their own dtype."""
    powers = torch.from_numpy(np.ldexp(1.0, -exponents.numpy()))
    return (values.double() * powers.view(-1, *[1] * (values.ndim - 1))).to(values.dtype)


def kept_weight(weight: torch.Tensor, kept: torch.Tensor, name: str) -> torch.Tensor:
    """Return the columns of W [rows, columns] that are kept, as they are stored, float16.

    Raises NonFiniteError where a weight is too large for that.
    """
    found = weight.index_select(1, kept).to(torch.float16)
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(
            f"layer {name!r}: a weight of a column that is kept does not fit float16: the largest "
            f"is {float(weight.index_select(1, kept).abs().max()):.4g}"
        )
    return found


def _fault_of_kept(weight: torch.Tensor | None, transform: InputTransform | None, rows: int) -> str:
    """Return what is wrong with kept weights, "" for nothing."""
    kept = None if transform is None else transform.kept
    if (weight is None) != (kept is None):
        return "input_kept and weight_kept come together, or neither does"
    if weight is None or kept is None:
        return ""
    if weight.dtype != torch.float16 or tuple(weight.shape) != (rows, len(kept)):
        shape, dtype = list(weight.shape), weight.dtype
        return f"{KEPT_WEIGHT} should be float16 [{rows}, {len(kept)}], got {dtype} {shape}"
    return "" if bool(torch.isfinite(weight).all()) else f"{KEPT_WEIGHT} must be finite"


def _fault_of_inputs(step: torch.Tensor | None, scheme: Scheme, grid: Grid | None) -> str:
    """Return what is wrong with the stored scale of activations, "" for nothing."""
    activations = scheme.input_activations
    if (activations is None) != (grid is None):
        return "input_grid and input_activations come together, or neither does"
    static = activations is not None and not activations.dynamic
    if (step is not None) != static:
        return f"{STEP} is for activations with a stored scale, and they need it"
    if step is None:
        return ""
    if step.dtype != torch.float32 or tuple(step.shape) != (1,):
        return f"{STEP} should be float32 [1], got {step.dtype} {list(step.shape)}"
    good = bool(torch.isfinite(step) & (step > 0))
    return "" if good else f"{STEP} must be positive and finite, got {float(step)}"


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored as codes.

    stored   what is stored of it
    bias     [rows] or None
    dense    keep the dequantized weight as well: faster to run, and as large as the original

    no_kernel   why no kernel computes the layer, where one was asked for; else ""
    """

    bias: torch.Tensor | None
    dense: torch.Tensor | None

    def __init__(
        self, stored: StoredLayer, bias: torch.Tensor | None = None, *, dense: bool = False
    ) -> None:
        super().__init__()
        self.no_kernel = ""
        self._layout = stored
        packed = stored.packed
        self.in_features, self.out_features = packed.columns, packed.rows
        tensors = stored.tensors()
        for part in PARTS:
            self.register_buffer(part, tensors.get(part))
        self.register_buffer("bias", bias)
        self.register_buffer("dense", stored.weight() if dense else None, persistent=False)

    @property
    def stored(self) -> StoredLayer:
        """The layer as it is stored, made of this module's buffers."""
        found = {part: getattr(self, part) for part in PARTS}
        tensors = {part: tensor for part, tensor in found.items() if tensor is not None}
        packed, inputs = self._layout.packed, self._layout.inputs
        return StoredLayer(
            packed=dataclasses.replace(
                packed,
                words=tensors["weight_packed"],
                scale=tensors["weight_scale"],
                zero_point=tensors.get("weight_zero_point"),
                group_index=tensors.get("weight_g_idx"),
                global_scale=tensors.get("weight_global_scale"),
            ),
            transform=InputTransform.stored(tensors),
            kept=tensors.get(KEPT_WEIGHT),
            inputs=None if inputs is None else dataclasses.replace(inputs, scale=tensors.get(STEP)),
        )

    @property
    def weight(self) -> torch.Tensor:
        """What the layer multiplies with, [rows, columns] float32."""
        return self.stored.weight() if self.dense is None else self.dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [..., columns], in the dtype of x."""
        return self.stored.multiply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show shape and scheme when the network is printed."""
        scheme = self._layout.packed.scheme
        return f"{self.in_features}, {self.out_features}, {scheme.describe()}"
