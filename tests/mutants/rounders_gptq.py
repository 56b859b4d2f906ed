"""Wrong GPTQs, and right ones that do it otherwise. All claim what qframe's plugin claims.

Each wrong one replaces one step of a right one (`gptq_mistakes`).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from qframe import Scheme, rounding
from qframe_conformance.strategies import correlated, rounding_problem
from qframe_plugins.rounders.gptq import GPTQ
from tests.mutants import gptq_mistakes as wrong
from tests.mutants.gptq_numpy import LDLQ, NumpyGPTQ
from tests.mutants.gptq_otherwise import (
    AnyOrder,
    DeadAsPublished,
    HalfAway,
    HessianScaled,
    LDLQAllFloat32,
    LDLQFloat32,
    NearestPlane,
)
from tests.mutants.mutant import Mutant, Twin

TINY = 2.0**-60  # a damping that leaves a singular Hessian singular
NATURAL = {"actorder": None}  # with dynamic groups
STATIC = {"actorder": None, "static_groups": True}
BY_ORDER = {"actorder": "group"}  # with dynamic groups


def mutant(kind, killed_by, bug, name=None, **options):
    return Mutant(
        name=name or snake(kind.__name__),
        kind="rounder",
        bug=bug,
        make=partial(kind, **options),
        correct=partial(kind.__bases__[0], **options),
        killed_by=killed_by,
    )


def twin(kind, name, why, **options):
    return Twin(name=name, kind="rounder", why=why, make=partial(kind, **options))


def snake(name):
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def residual(kind, bug, **options):
    return mutant(kind, "gptq_residual", bug, **options)


MUTANTS = (
    residual(wrong.NoUpdate, "Errors are fed back to nobody: round to nearest.", **NATURAL),
    residual(wrong.WrongSign, "Errors are fed back with the wrong sign.", **NATURAL),
    residual(
        wrong.ErrorFromOriginal, "The error is that of the original weight, not the compensated."
    ),
    residual(wrong.ErrorNotDivided, "The error is not divided by the diagonal of the factor."),
    residual(wrong.ErrorBeforeClipping, "The error fed back is that before the code was clipped."),
    residual(wrong.ErrorFromFloat16, "The error fed back is that of values rounded to float16."),
    residual(wrong.ErrorWithoutZeroPoint, "Values fed back use a zero point that is off by one."),
    residual(wrong.UpdatesInBfloat16, "Compensated weights are kept in bfloat16.", **STATIC),
    residual(wrong.UpdateOneShort, "Updates inside a block leave out its last column.", **NATURAL),
    residual(
        wrong.LazyUpdateMissing, "Later blocks never hear of the errors of a block.", **STATIC
    ),
    residual(wrong.LazyUpdateForgetsLast, "A block's last column is left out of the lazy update."),
    residual(wrong.LazyUpdateTwice, "The first column of a block reaches later blocks twice."),
    residual(
        wrong.StaleCholesky, "Rows of the full inverse, never downdated, in place of Cholesky's."
    ),
    residual(wrong.WrongTriangle, "The other triangular factor of the inverse."),
    residual(wrong.HessianNotInverted, "Factorizes the Hessian where its inverse belongs."),
    residual(wrong.InverseInFloat16, "The Hessian is rounded to float16 before it is inverted."),
    residual(wrong.DiagonalOnly, "Only the diagonal of the Hessian is used."),
    residual(wrong.TokenLeftOut, "The Hessian lacks a part of the calibration tokens.", **STATIC),
    residual(wrong.NotDamped, "Next to no damping, where 1 % was declared."),
    residual(wrong.DampedTwice, "Damping is twice what was declared."),
    residual(wrong.DampedByLargest, "Damping is a share of the largest diagonal, not of the mean."),
    residual(wrong.DampedByTrace, "Damping is a share of the trace: the mean lacks its 1/n."),
    residual(wrong.DeadIgnored, "Dead columns keep their diagonal of 0 before damping."),
    residual(
        wrong.RescaledBeforeDeadFix,
        "Dead diagonals become 1 in a Hessian of another unit, which changes the damping.",
        dampening_frac=0.3,
        **STATIC,
    ),
    residual(wrong.DeadWeightsZeroed, "Weights of dead columns become 0 though nothing says so."),
    residual(wrong.Ascending, "Columns are taken by rising diagonal."),
    residual(
        wrong.BackwardsUndeclared, "Columns are taken backwards, and the order reported is not."
    ),
    residual(wrong.OrderNotReported, "The order of the columns is not reported."),
    residual(wrong.NotPutBack, "Codes are returned in processing order."),
    residual(wrong.PutBackByInverse, "Codes are permuted by the order where its inverse belongs."),
    residual(
        wrong.GroupsByPlace, "Groups go by the place in the order, scales by where columns are."
    ),
    residual(
        wrong.GroupsAsStored,
        "The group index is that of the stored columns, though groups follow the order.",
        actorder="group",
        static_groups=True,
    ),
    residual(
        wrong.RaisedInSilence, "Damping is raised, and no event says so.", dampening_frac=TINY
    ),
    residual(
        wrong.RaisedTwofold,
        "Damping is raised in steps that were not declared.",
        dampening_frac=TINY,
    ),
    residual(wrong.DampingMisreported, "The damping reported is not the one that was used."),
    residual(wrong.Floor, "Rounds down.", **NATURAL),
    residual(wrong.TowardsZero, "Rounds towards zero.", **NATURAL),
    mutant(
        wrong.HalfUp, "sign_symmetry", "Ties go up, so that -W has other codes than W.", **NATURAL
    ),
    residual(wrong.ZeroPointOffByOne, "Codes are made with a zero point that is off by one."),
    residual(wrong.HighestCodeUnused, "The highest code is never used."),
    residual(wrong.LowestCodeUnused, "The lowest code is never used."),
    residual(wrong.QuotientInFloat16, "The quotient by the scale is rounded to float16."),
    mutant(
        wrong.ScaleFromOriginal,
        "compensated_scale",
        "A group's scale is that of the original weights, not of the compensated ones.",
        **NATURAL,
    ),
    mutant(
        wrong.ScaleFromBlockStart,
        "compensated_scale",
        "A group's scale comes from weights as they were when the block began, as published.",
        **NATURAL,
    ),
    mutant(
        wrong.ScaleMissesLazyUpdate,
        "compensated_scale",
        "A group that reaches into the next block takes its scale before the lazy update.",
        **BY_ORDER,
    ),
    mutant(
        wrong.ScaleOfFirstGroupOnly,
        "compensated_scale",
        "All groups have the scale of the first.",
        **NATURAL,
    ),
    mutant(
        wrong.ScaleFromCompensated,
        "scheme_scale",
        "Scales are taken when groups begin, though static groups were asked for.",
        **STATIC,
    ),
    mutant(wrong.ScaleShrunk, "scheme_scale", "Scales are three quarters of the rule's.", **STATIC),
    mutant(
        wrong.ScaleShrunk,
        "compensated_scale",
        "Scales of dynamic groups are three quarters of the rule's.",
        name="scale_shrunk_dynamic",
        **BY_ORDER,
    ),
    mutant(wrong.ScaleOfNextGroup, "scheme_scale", "Scales are those of the neighbouring group."),
    mutant(
        wrong.ScaleRoundedDown, "coverage", "Scales are stored rounded down, so that ends clip."
    ),
    mutant(wrong.ZeroPointTruncated, "coverage", "The zero point is truncated, not rounded."),
    mutant(
        wrong.ZeroPointTruncated,
        "compensated_scale",
        "The zero point of a dynamic group is truncated, not rounded.",
        name="zero_point_truncated_dynamic",
        **NATURAL,
    ),
)

TWINS = (
    twin(NumpyGPTQ, "published", "Inverts, factorizes the inverse, updates in blocks of 5."),
    twin(NumpyGPTQ, "published_dynamic", "The same with dynamic groups.", **NATURAL),
    twin(NumpyGPTQ, "published_by_order", "The same with groups that follow it.", **BY_ORDER),
    twin(NumpyGPTQ, "blocks_of_4", "Blocks do not change the codes.", block_size=4, **NATURAL),
    twin(NumpyGPTQ, "blocks_of_7", "Blocks do not change the codes.", block_size=7, **BY_ORDER),
    twin(NumpyGPTQ, "one_block", "Blocks do not change the codes.", block_size=128, **STATIC),
    twin(LDLQ, "ldlq", "Feeds back w - q, which is the same in real numbers.", **NATURAL),
    twin(LDLQFloat32, "ldlq_float32", "The same in float32, which is claimed.", **BY_ORDER),
    twin(LDLQAllFloat32, "ldlq_all_float32", "Factorizes in float32 and says so.", **NATURAL),
    twin(
        NearestPlane, "nearest_plane", "Babai's algorithm on the lattice of the codes.", **NATURAL
    ),
    twin(NearestPlane, "nearest_plane_static", "The same with static groups."),
    twin(HessianScaled, "hessian_scaled", "Damping is relative to the Hessian."),
    twin(HalfAway, "half_away", "B3.b holds up to ties.", **NATURAL),
    twin(NumpyGPTQ, "damped_more", "Another damping, which is declared.", dampening_frac=0.07),
    twin(LDLQ, "damping_raised", "Too little at first, and it says so.", dampening_frac=TINY),
    twin(DeadAsPublished, "dead_as_published", "Dead columns as published, and it says so."),
    twin(AnyOrder, "any_order", "An order of its own, which is reported.", **BY_ORDER),
    twin(GPTQ, "qframe", "qframe's plugin with groups that follow the order.", actorder="group"),
)


def outputs(plugin):
    """Return the values of three ordinary layers: what a test with a tolerance would compare."""
    found = []
    for seed, settings in enumerate(
        ({"group_size": 8}, {"group_size": 8, "symmetric": False}, {"num_bits": 8})
    ):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(16, 32)) / 16
        problem = rounding_problem(weight, Scheme(**settings), correlated(rng, 32))
        found.append(rounding.dequantize(plugin.round(problem, rng)).numpy())
    return found
