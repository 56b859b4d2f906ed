"""Wrong kernels of Hadamard transforms, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from qframe.contracts import Unsupported
from qframe.reference_ops import hadamard_matrix
from tests.mutants.kernels_small import F32, SmallKernel, bfloat16, mutant, twin


class Hadamard(SmallKernel):
    op = "hadamard"

    def compute(self, x, signs, block):
        y = self.before(x, signs)
        for half in self.stages(block):
            pairs = y.reshape(len(y), x.shape[1] // (2 * half), 2, half)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            y = self.store(np.stack(self.butterfly(a, b), 2)).reshape(x.shape)
        return self.after(y * self.factor(block), signs).astype(F32)

    def before(self, x, signs):
        return x * signs

    def stages(self, block):
        return [1 << k for k in range(block.bit_length() - 1)]

    def butterfly(self, a, b):
        return a + b, a - b

    def store(self, y):
        return y

    def factor(self, block):
        return F32(block**-0.5)

    def after(self, y, signs):
        return y


def whole_width(self, x, signs, block):
    """Transform all columns as one block, where their number allows."""
    width = x.shape[1]
    block = block if width & (width - 1) else width
    return Hadamard.compute(self, x, signs, block)


def by_stored_products(self, x, signs, block):
    cut = self.before(x, signs).reshape(len(x), x.shape[1] // block, block)
    matrix = hadamard_matrix(block).astype(F32) * F32(block**-0.5)
    return (cut @ matrix).reshape(x.shape)


ROTATIONS = (
    ("not_normalized", "1 / sqrt(block) is missing", "transform", {"factor": lambda s, b: F32(1)}),
    (
        "one_stage_short",
        "the last butterflies are left out",
        "transform",
        {"stages": lambda s, b: Hadamard.stages(s, b)[:-1]},
    ),
    (
        "butterfly_adds_twice",
        "both outputs of a butterfly are the sum",
        "products_are_kept",
        {"butterfly": lambda s, a, b: (a + b, a + b)},
    ),
    (
        "signs_ignored",
        "x is not multiplied with the signs",
        "spikes_are_spread",
        {"before": lambda s, x, g: x},
    ),
    (
        "signs_on_the_other_side",
        "signs are applied after H",
        "transform",
        {"before": lambda s, x, g: x, "after": lambda s, y, g: y * g},
    ),
    (
        "signs_on_both_sides",
        "signs are applied before and after H",
        "transform",
        {"after": lambda s, y, g: y * g},
    ),
    (
        "butterflies_in_fp16",
        "numbers between butterflies are float16",
        "transform",
        {"store": lambda s, y: y.astype(np.float16).astype(F32)},
    ),
    (
        "butterflies_in_bf16",
        "numbers between butterflies are bfloat16",
        "products_are_kept",
        {"store": lambda s, y: bfloat16(y)},
    ),
    ("blocks_ignored", "all columns are one block", "transform", {"compute": whole_width}),
    (
        "order_of_bits_reversed",
        "the outputs of a block come in another order",
        "transform",
        {"after": lambda s, y, g: y.reshape(len(y), -1)[:, ::-1]},
    ),
    (
        "divided_by_block",
        "1 / block for 1 / sqrt(block)",
        "transform",
        {"factor": lambda s, b: F32(1 / b)},
    ),
)

MUTANTS = tuple(
    mutant(Hadamard, name, bug, check, **steps) for name, bug, check, steps in ROTATIONS
)


class Fourfold(Hadamard):
    """Serves blocks that are powers of four."""

    def supports(self, call):
        if call.op == self.op and call.shape[2].bit_length() % 2 == 0:
            return Unsupported("blocks are powers of four")
        return super().supports(call)


TWINS = (
    twin(
        Hadamard,
        "stages_reversed",
        "the widest butterflies first: the stages commute",
        stages=lambda self, b: Hadamard.stages(self, b)[::-1],
    ),
    twin(
        Hadamard,
        "by_the_matrix",
        "a product with H as it is, and declared",
        compute=by_stored_products,
        dense=True,
    ),
    twin(Fourfold, "powers_of_four", "other blocks are refused, with a reason"),
)


def outputs(plugin):
    """Ordinary tokens in one block."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, signs = rng.normal(size=(6, 64)).astype(F32), rng.choice([-1, 1], 64).astype(F32)
        made = kernels.run(plugin, [torch.from_numpy(x), torch.from_numpy(signs), 64])
        found.append(made.numpy())
    return found
