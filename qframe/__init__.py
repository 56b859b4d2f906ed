"""qframe: quantize real networks with plugins, and judge quantization by proved bounds.

The public names. They are imported when first used, so `import qframe` needs neither torch nor
numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qframe.calibration import CalibrationData
    from qframe.checkpoint import load
    from qframe.contracts import (
        Capabilities,
        CodedLayer,
        CodedWeight,
        Event,
        Grid,
        InputGroup,
        KVBlock,
        LayerInfo,
        LayerOutline,
        OpCall,
        QuantizedWeight,
        Rewrite,
        RewriteProblem,
        RoundingProblem,
        Unsupported,
    )
    from qframe.evaluation import evaluate
    from qframe.hookspecs import hookimpl
    from qframe.host import Host
    from qframe.kv_scheme import KVCacheScheme, KVScheme
    from qframe.pipeline import Result, quantize
    from qframe.recipe import Recipe
    from qframe.scheme import Scheme
    from qframe.transforms import Rotation
    from qframe.verification import VerifyReport, verify

_HOME = {
    "CalibrationData": "calibration",
    "Capabilities": "contracts",
    "CodedLayer": "contracts",
    "CodedWeight": "contracts",
    "Event": "contracts",
    "Grid": "contracts",
    "Host": "host",
    "InputGroup": "contracts",
    "KVBlock": "contracts",
    "KVCacheScheme": "kv_scheme",
    "KVScheme": "kv_scheme",
    "LayerInfo": "contracts",
    "LayerOutline": "contracts",
    "OpCall": "contracts",
    "QuantizedWeight": "contracts",
    "Recipe": "recipe",
    "Result": "pipeline",
    "Rewrite": "contracts",
    "RewriteProblem": "contracts",
    "Rotation": "transforms",
    "RoundingProblem": "contracts",
    "Scheme": "scheme",
    "Unsupported": "contracts",
    "VerifyReport": "verification",
    "evaluate": "evaluation",
    "hookimpl": "hookspecs",
    "load": "checkpoint",
    "quantize": "pipeline",
    "verify": "verification",
}

__all__ = [
    "CalibrationData",
    "Capabilities",
    "CodedLayer",
    "CodedWeight",
    "Event",
    "Grid",
    "Host",
    "InputGroup",
    "KVBlock",
    "KVCacheScheme",
    "KVScheme",
    "LayerInfo",
    "LayerOutline",
    "OpCall",
    "QuantizedWeight",
    "Recipe",
    "Result",
    "Rewrite",
    "RewriteProblem",
    "Rotation",
    "RoundingProblem",
    "Scheme",
    "Unsupported",
    "VerifyReport",
    "__version__",
    "evaluate",
    "hookimpl",
    "load",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qframe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qframe' has no attribute {name!r}")
