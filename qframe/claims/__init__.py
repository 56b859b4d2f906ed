"""What a plugin promises of its results: theorems that can be checked on any layer.

A plugin lists claims in its attribute `claims`. What is listed is checked twice: by the
conformance suite on drawn and adversarial problems, and by the pipeline on every layer of the
user's own network, where the outcome is the layer's *certificate*. A plugin without claims is a
black box and still meets the checks that hold for every method.

A claim about a layer is any object with `name`, `theorem`, `objection(scheme)` and
`certify(evidence)`, so a plugin may bring a theorem of its own. The others are flags: the suite
knows what to do about them. Importing this needs no torch.
"""

from __future__ import annotations

from typing import Any

from qframe.claims.compensated import CompensatedScale
from qframe.claims.fitted import FittedScale
from qframe.claims.flags import (
    FunctionPreserving,
    Idempotent,
    Mergeable,
    NoWorseBlock,
    Reproducible,
    RowOrderFree,
    ScaleEquivariant,
    SignBlind,
    SignSymmetric,
)
from qframe.claims.formats import Codebook, FloatingPoint, UniformGrid
from qframe.claims.gptq import Babai
from qframe.claims.handlers import (
    Incoherent,
    KeepsOutliers,
    NoWorseOnSample,
    NoWorseThanUnscaled,
    ProtectsSalient,
)
from qframe.claims.kv import (
    ExactWindow,
    FusedAttention,
    KVHalfStep,
    KVRotatedHalfStep,
    KVScale,
    PackedCodes,
    Streaming,
)
from qframe.claims.nearest import HalfStep, Radius
from qframe.claims.objective import NoWorsePower, NoWorseThan, OutputBound
from qframe.claims.observers import (
    ChannelAbsmax,
    Counts,
    CrossMoments,
    LeastError,
    Reach,
    SecondMoments,
    TokensSeen,
)
from qframe.claims.scales import Covers, SchemeScale

__all__ = [
    "Babai",
    "ChannelAbsmax",
    "Codebook",
    "CompensatedScale",
    "Counts",
    "Covers",
    "CrossMoments",
    "ExactWindow",
    "FittedScale",
    "FloatingPoint",
    "FunctionPreserving",
    "FusedAttention",
    "HalfStep",
    "Idempotent",
    "Incoherent",
    "KVHalfStep",
    "KVRotatedHalfStep",
    "KVScale",
    "KeepsOutliers",
    "LeastError",
    "Mergeable",
    "NoWorseBlock",
    "NoWorseOnSample",
    "NoWorsePower",
    "NoWorseThan",
    "NoWorseThanUnscaled",
    "OutputBound",
    "PackedCodes",
    "ProtectsSalient",
    "Radius",
    "Reach",
    "Reproducible",
    "RowOrderFree",
    "ScaleEquivariant",
    "SchemeScale",
    "SecondMoments",
    "SignBlind",
    "SignSymmetric",
    "Streaming",
    "TokensSeen",
    "UniformGrid",
    "claims_of",
    "has_claim",
]


def claims_of(plugin: object) -> tuple[Any, ...]:
    """Return what a plugin claims; () for one that says nothing."""
    return tuple(getattr(plugin, "claims", ()))


def has_claim(plugin: object, kind: type) -> bool:
    """Return whether a plugin makes a claim of this class."""
    return any(isinstance(claim, kind) for claim in claims_of(plugin))
