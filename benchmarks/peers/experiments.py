"""What the contract of a rounder has no words for: each question asked of the library directly.

Float zero points, codebooks, what is stored for a group of zeros, what becomes of a NaN, a matrix
product's constant. An experiment returns whether what was asked holds (None: nothing is promised,
it is only shown) and what was measured. Bounds come from qframe.bounds, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe import bounds
from qframe_conformance import kinds

Float64 = np.ndarray
ROWS = (kinds.normal, kinds.heavy_tailed, kinds.one_sided, kinds.sparse, kinds.constant)


@dataclass(frozen=True)
class Experiment:
    """A question to a library, and the function that asks it."""

    library: str
    name: str
    question: str
    ask: Callable[[], tuple[bool | None, str]]


EXPERIMENTS: list[Experiment] = []


def experiment(library: str, question: str) -> Callable[[Any], Any]:
    """Register a question; the function's name is its name."""

    def register(ask: Any) -> Any:
        EXPERIMENTS.append(Experiment(library, ask.__name__, question, ask))
        return ask

    return register


def layer(seed: int, columns: int = 128) -> torch.Tensor:
    """Return 40 rows of weights of ordinary size, of several kinds."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.concatenate([np.float32(each(rng, (8, columns))) for each in ROWS]))


def is_nearest(weight: torch.Tensor, levels: Float64, codes: Float64, slack: Float64) -> float:
    """Return the largest error over (the error of the nearest level, plus slack).

    levels   [codes, rows, columns] float64: what each code stands for, in each group
    slack    of the rounding of the library's own arithmetic
    """
    errors = np.abs(levels - weight.double().numpy())
    chosen = np.take_along_axis(errors, codes[None].astype(np.int64), 0)[0]
    return bounds.ratio(chosen, errors.min(0) + slack)


def verdict(ratio: float, what: str) -> tuple[bool, str]:
    return ratio <= 1, f"{what}: error / allowed = {ratio:.4g}"


# HQQ ------------------------------------------------------------------------------------------


def hqq(weight: torch.Tensor, nbits: int = 4, group_size: int = 64, **more: Any) -> dict[str, Any]:
    """Quantize as BaseQuantizeConfig does by default; return what is stored, and the values."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, **(config | more), device="cpu", bitpack=False)
    values = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return {"codes": codes, "scale": meta["scale"], "zero": meta["zero"], "values": values}


def hqq_levels(made: dict[str, Any], nbits: int) -> tuple[Float64, Float64, Float64]:
    """Return (levels, codes, |zero point| times scale), in the library's groups."""
    scale, zero = (made[name].double().numpy() for name in ("scale", "zero"))
    codes = np.arange(2**nbits, dtype=np.float64)[:, None, None]
    return (codes - zero) * scale, made["codes"].double().numpy(), np.abs(zero * scale)


@experiment("hqq", "Default settings: does every weight get the nearest value of its group?")
def hqq_nearest() -> tuple[bool | None, str]:
    worst = 0.0
    for nbits in (2, 3, 4, 8):
        for seed in range(4):
            weight = layer(seed)
            made = hqq(weight, nbits)
            levels, codes, offset = hqq_levels(made, nbits)
            grouped = weight.reshape(codes.shape)
            # W * S + z with S = 1 / s: the product, the sum, and the stored s are rounded.
            slack = 2 * bounds.gamma(4) * (np.abs(grouped.double().numpy()) + offset)
            levels = np.broadcast_to(levels, (len(levels), *codes.shape))
            worst = max(worst, is_nearest(grouped, levels, codes, slack))
    return verdict(worst, "2, 3, 4 and 8 bits, groups of 64")


@experiment("hqq", "Default settings: does dequantize give (code - zero) times scale?")
def hqq_decode() -> tuple[bool | None, str]:
    made = hqq(layer(0))
    scale, zero, codes = (made[name].double().numpy() for name in ("scale", "zero", "codes"))
    exact = (codes - zero) * scale
    allowed = bounds.gamma(2) * np.abs(scale) * (np.abs(codes) + np.abs(zero))
    error = made["values"].double().numpy().reshape(exact.shape) - exact
    return verdict(bounds.ratio(error, allowed), "float32, two roundings")


@experiment("hqq", "Is the error of small weights as small, in proportion, as that of large ones?")
def hqq_small_weights() -> tuple[bool | None, str]:
    """It would be, if scales were (max - min) / 15 whatever the size."""
    weight = torch.from_numpy(np.float32(np.random.default_rng(0).normal(size=(64, 256))))
    shown = []
    for power in (0, -6, -8, -10, -12, -14, -16, -18):
        small = weight * 2.0**power
        for nbits in (4, 8):
            error = float((hqq(small, nbits)["values"] - small).norm() / small.norm())
            shown.append((power, nbits, error))
    lines = [
        f"{nbits} bits: " + ", ".join(f"2^{p}: {error:.2%}" for p, n, error in shown if n == nbits)
        for nbits in (4, 8)
    ]
    first = {nbits: next(e for p, n, e in shown if n == nbits) for nbits in (4, 8)}
    held = all(error <= 2 * first[nbits] for _, nbits, error in shown)
    return held, "relative error at a standard deviation of " + "; ".join(lines)


@experiment("hqq", "Groups of 128 in rows of 576: are rows independent of one another?")
def hqq_straddling() -> tuple[bool | None, str]:
    weight = layer(1, columns=576)[:8]
    other = weight.clone()
    other[1] *= 8
    before, after = hqq(weight, group_size=128), hqq(other, group_size=128)
    changed = int((before["values"][0] != after["values"][0]).sum())
    where = torch.nonzero(before["values"][0] != after["values"][0]).flatten()
    columns = f", columns {int(where.min())} to {int(where.max())}" if changed else ""
    return changed == 0, (
        f"groups need only divide the number of weights; accepted, "
        f"{before['scale'].numel()} groups for 8 rows; row 1 times 8 changes {changed} of the 576 "
        f"values of row 0{columns}"
    )


@experiment("hqq", "Does the search lower the squared error of each group? (Nothing promises it.)")
def hqq_search() -> tuple[bool | None, str]:
    weight = torch.cat([layer(seed)[:16] for seed in range(8)])
    grouped = weight.reshape(-1, 64)

    def losses(**more: Any) -> torch.Tensor:
        values = hqq(weight, **more)["values"].reshape(-1, 64)
        return (values - grouped).double().square().sum(1)

    before, after = losses(optimize=False, round_zero=False), losses()
    share = float((after > before).double().mean())
    return None, (
        f"4 bits, normal and heavy-tailed weights: larger in {share:.0%} of the groups, "
        f"{float(after.sum() / before.sum()):.3f} of the plain grid's in all"
    )


# optimum-quanto -------------------------------------------------------------------------------


def quanto(weight: torch.Tensor, bits: int = 4, group_size: int | None = 64) -> dict[str, Any]:
    """Quantize as quanto.quantize does by default; return what is stored, and the values."""
    from optimum.quanto import MaxOptimizer, qint2, qint4
    from optimum.quanto.tensor.weights.quantization import quantize_weight

    qtype = {2: qint2, 4: qint4}[bits]
    scale, shift = MaxOptimizer()(weight, qtype, 0, group_size)
    theirs = quantize_weight(weight, qtype, 0, scale, shift, group_size)
    codes = theirs._data.unpack()
    return {"codes": codes, "scale": scale, "shift": shift, "values": theirs.dequantize()}


@experiment("quanto", "qint2, qint4 by default (float shift): is every code the nearest one?")
def quanto_nearest() -> tuple[bool | None, str]:
    worst = 0.0
    for bits in (2, 4):
        for seed in range(4):
            weight = layer(seed)
            made = quanto(weight, bits)
            scale, shift = (made[name].double().numpy() for name in ("scale", "shift"))
            codes = made["codes"].double().numpy()
            grouped = weight.reshape(codes.shape)
            every = np.arange(2**bits, dtype=np.float64)[:, None, None]
            levels = np.broadcast_to(every * scale - shift, (2**bits, *codes.shape))
            size = np.abs(grouped.double().numpy()) + np.abs(shift)
            worst = max(worst, is_nearest(grouped, levels, codes, 2 * bounds.gamma(2) * size))
    return verdict(worst, "groups of 64")


@experiment("quanto", "qint4 by default: does dequantize give scale times code minus shift?")
def quanto_decode() -> tuple[bool | None, str]:
    made = quanto(layer(0))
    scale, shift, codes = (made[name].double().numpy() for name in ("scale", "shift", "codes"))
    allowed = bounds.gamma(2) * (np.abs(scale * codes) + np.abs(shift))
    error = made["values"].double().numpy().reshape(codes.shape) - (scale * codes - shift)
    return verdict(bounds.ratio(error, allowed), "float32, two roundings")


@experiment("quanto", "A group of zeros, and a constant one: is the stored scale positive?")
def quanto_zero_group() -> tuple[bool | None, str]:
    from optimum.quanto import AbsmaxOptimizer, qint8

    weight = torch.ones(4, 64)
    weight[0] = 0
    affine, symmetric = quanto(weight), AbsmaxOptimizer()(weight, qint8, 0)
    held = bool((affine["scale"] > 0).all()) and bool((symmetric > 0).all())
    finite = bool(torch.isfinite(affine["values"]).all())
    return held, (
        f"qint8, zeros: scale {float(symmetric[0]):g}; qint4, zeros and ones: scales "
        f"{float(affine['scale'][0]):g} and {float(affine['scale'][1]):g}. Codes come from 0 / 0 "
        f"cast to an integer; the decoded values are {'right' if finite else 'not finite'}"
    )


@experiment("quanto", "A layer with one output and one group: is there one scale?")
def quanto_one_row() -> tuple[bool | None, str]:
    weight = layer(0)[:1, :64]
    made = quanto(weight, group_size=None)
    count = made["scale"].numel()
    exact = bool(torch.equal(made["values"], weight))
    return count == 1, (
        f"{count} scales for 64 weights, all {float(made['scale'].max()):g}, and as many float "
        f"shifts" + (", which hold the weights themselves" if exact else "")
    )


@experiment("quanto", "qint4, weights between 2 and 3: are the ends of a group reached?")
def quanto_one_sign() -> tuple[bool | None, str]:
    """The option zeropoint=True beside the default, a float shift."""
    from optimum.quanto import MaxOptimizer, qint4
    from optimum.quanto.tensor.weights.quantization import quantize_weight

    weight = torch.from_numpy(np.float32(2 + np.random.default_rng(0).random((4, 64))))
    scale, zero = MaxOptimizer()(weight, qint4, 0, 64, zeropoint=True)
    values = quantize_weight(weight, qint4, 0, scale, zero, 64).dequantize()
    default = quanto(weight)["values"]
    largest, usual = (float((each - weight).abs().max()) for each in (values, default))
    return largest <= 2 * usual, (
        f"largest error {usual:.3f} with the default float shift; {largest:.3f} with "
        f"zeropoint=True, where all values decode to {float(values.min()):.3f} to "
        f"{float(values.max()):.3f}"
    )


# bitsandbytes ---------------------------------------------------------------------------------


def four_bits(weight: torch.Tensor, kind: str, blocksize: int = 64) -> dict[str, Any]:
    """Quantize to NF4 or FP4; return codes [blocks, blocksize], and what is stored."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=kind)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(-1, blocksize)
    values = functional.dequantize_4bit(packed, state)
    return {"codes": codes, "absmax": state.absmax, "table": state.code, "values": values}


@experiment("bitsandbytes", "NF4 and FP4: does every weight get the nearest value of its block?")
def four_bits_nearest() -> tuple[bool | None, str]:
    worst = 0.0
    for kind in ("nf4", "fp4"):
        for seed in range(8):
            weight = layer(seed)
            made = four_bits(weight, kind)
            absmax = made["absmax"].double().numpy()[:, None]
            table = made["table"].double().numpy()[:, None, None]
            codes = made["codes"].numpy()
            grouped = weight.reshape(codes.shape)
            size = np.abs(grouped.double().numpy()) + absmax
            levels = np.broadcast_to(table * absmax, (16, *codes.shape))
            worst = max(worst, is_nearest(grouped, levels, codes, 2 * bounds.gamma(4) * size))
    return verdict(worst, "blocks of 64")


@experiment("bitsandbytes", "NF4 and FP4: does dequantize give the table's value times absmax?")
def four_bits_decode() -> tuple[bool | None, str]:
    worst = 0.0
    for kind in ("nf4", "fp4"):
        made = four_bits(layer(0), kind)
        table, absmax = made["table"].double().numpy(), made["absmax"].double().numpy()
        exact = table[made["codes"].numpy()] * absmax[:, None]
        error = made["values"].double().numpy().reshape(exact.shape) - exact
        worst = max(worst, bounds.ratio(error, bounds.gamma(1) * np.abs(exact)))
    return verdict(worst, "float32, one rounding")


def int32_product() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Float64]:
    """Return an int32 matrix product, statistics of rows and columns, and the exact result."""
    rng = np.random.default_rng(0)
    product = torch.from_numpy(rng.integers(-(2**20), 2**20, (32, 48)).astype(np.int32))
    rows = torch.from_numpy(np.float32(np.abs(rng.normal(size=32)) + 1))
    columns = torch.from_numpy(np.float32(np.abs(rng.normal(size=48)) + 1))
    sizes = rows.double().numpy()[:, None] * columns.double().numpy()
    return product, rows, columns, product.double().numpy() * sizes / 127**2


@experiment("bitsandbytes", "int8_mm_dequant, float32 output: product * absmax * absmax / 127^2?")
def int8_constant() -> tuple[bool | None, str]:
    product, rows, columns, exact = int32_product()
    made = torch.ops.bitsandbytes.int8_mm_dequant.default(
        product, rows, columns, dtype=torch.float32
    )
    error = made.double().numpy() - exact
    bias = float(np.median(error / exact))
    ratio = bounds.ratio(error, bounds.gamma(5) * np.abs(exact))
    held, text = verdict(ratio, "five roundings")
    return held, (
        f"{text}; every value is {bias:+.3e} of itself off. backends/default/ops.py multiplies by "
        f"6.200124e-05, and 1 / 127^2 = {1 / 127**2:.7e}"
    )


@experiment("bitsandbytes", "int8_mm_dequant, float16 output (the default): within half an ulp?")
def int8_constant_half() -> tuple[bool | None, str]:
    product, rows, columns, exact = int32_product()
    fits = np.abs(exact) < np.finfo(np.float16).max / 2
    made = torch.ops.bitsandbytes.int8_mm_dequant.default(product, rows, columns)
    error = made.double().numpy() - exact
    half = bounds.UNIT["float16"]
    allowed = (half + bounds.gamma(5) * (1 + half)) * np.abs(exact) + bounds.ETA["float16"]
    return verdict(bounds.ratio(error[fits], allowed[fits]), "half an ulp of float16 hides it")


@experiment("bitsandbytes", "Linear8bitLt, whole numbers as float32: is the output right?")
def int8_layer() -> tuple[bool | None, str]:
    """Inputs and weights are whole numbers with absmax 127, so only the last product rounds."""
    import bitsandbytes

    rng = np.random.default_rng(0)
    weight = np.float32(rng.integers(-127, 128, (16, 64)))
    x = np.float32(rng.integers(-127, 128, (8, 64)))
    weight[:, 0] = x[:, 0] = 127
    layer_ = bitsandbytes.nn.Linear8bitLt(64, 16, bias=False, has_fp16_weights=False)
    layer_.load_state_dict({"weight": torch.from_numpy(weight)})
    layer_ = layer_.to("cpu").eval()
    made = layer_(torch.from_numpy(x)).detach().double().numpy()
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    error = made - exact
    ratio = bounds.ratio(error, bounds.gamma(5) * np.abs(exact))
    held, text = verdict(ratio, "float32 output, five roundings")
    return held, f"{text}; median relative error {float(np.median(error / exact)):+.3e}"


@experiment("bitsandbytes", "A row of zeros in int8: is the stored scale positive?")
def int8_zero_row() -> tuple[bool | None, str]:
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(torch.zeros(2, 16))
    values = functional.int8_vectorwise_dequant(codes, absmax)
    return bool((absmax > 0).all()), (
        f"absmax {float(absmax[0]):g}; codes come from 0 * (127 / 0) cast to an integer; decoded "
        f"values {'are zeros' if not bool(values.any()) else 'are not zeros'}"
    )


# torchao --------------------------------------------------------------------------------------


@experiment("torchao", "PerGroup(1), a scale for every weight: is it served?")
def torchao_groups_of_one() -> tuple[bool | None, str]:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    try:
        made = IntxUnpackedToInt8Tensor.from_hp(layer(0), (1, 1), torch.int4)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        return False, (
            f"{type(error).__name__}: {text}. No dimension is left to reduce, and torch.amin "
            f"over no dimension reduces all of them"
        )
    return True, f"{made.scale.numel()} scales"


# NaN ------------------------------------------------------------------------------------------


def spoilt() -> torch.Tensor:
    weight = layer(0)[:4].clone()
    weight[1, 5] = torch.nan
    return weight


def shown_by(values: torch.Tensor, stored: str) -> tuple[bool | None, str]:
    count = int(torch.isnan(values).sum())
    text = f"no error; {stored}; {count} of 512 decoded values are NaN"
    return count > 0, text


@experiment("hqq", "One weight is NaN: can it be seen in what is decoded?")
def hqq_nan() -> tuple[bool | None, str]:
    return shown_by(hqq(spoilt())["values"], "the group's scale is NaN")


@experiment("quanto", "One weight is NaN: can it be seen in what is decoded? (qint4)")
def quanto_nan() -> tuple[bool | None, str]:
    return shown_by(quanto(spoilt())["values"], "the group's scale is NaN")


@experiment("bitsandbytes", "One weight is NaN: can it be seen in what is decoded? (int8)")
def int8_nan() -> tuple[bool | None, str]:
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(spoilt())
    return shown_by(functional.int8_vectorwise_dequant(codes, absmax), "the row's absmax is NaN")


@experiment("bitsandbytes", "One weight is NaN: can it be seen in what is decoded? (NF4)")
def four_bits_nan() -> tuple[bool | None, str]:
    return shown_by(four_bits(spoilt(), "nf4")["values"], "the block's absmax is NaN")


@experiment("torchao", "One weight is NaN: can it be seen in what is decoded?")
def torchao_nan() -> tuple[bool | None, str]:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    made = IntxUnpackedToInt8Tensor.from_hp(spoilt(), (1, 64), torch.int4)
    return shown_by(made.dequantize(), "the group's scale is NaN")


@experiment("compressed-tensors", "One weight is NaN: can it be seen in what is decoded?")
def compressed_tensors_nan() -> tuple[bool | None, str]:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from llmcompressor.observers import Observer

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
    weight = spoilt()
    found = observer(weight).get_qparams()
    scale, zero = found["scale"], found["zero_point"]
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)
    stored = "the group's scale is NaN" if bool(scale.isnan().any()) else "all scales are finite"
    return shown_by(dequantize(codes, scale, zero, args), stored)
