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
        Event,
        Grid,
        InputGroup,
        LayerInfo,
        QuantizedWeight,
        Rewrite,
        RoundingProblem,
    )
    from qframe.evaluate import evaluate
    from qframe.hookspecs import hookimpl
    from qframe.host import Host
    from qframe.pipeline import Result, quantize
    from qframe.recipe import Recipe
    from qframe.scheme import Scheme

_HOME = {
    "CalibrationData": "calibration",
    "Capabilities": "contracts",
    "Event": "contracts",
    "Grid": "contracts",
    "Host": "host",
    "InputGroup": "contracts",
    "LayerInfo": "contracts",
    "QuantizedWeight": "contracts",
    "Recipe": "recipe",
    "Result": "pipeline",
    "Rewrite": "contracts",
    "RoundingProblem": "contracts",
    "Scheme": "scheme",
    "evaluate": "evaluate",
    "hookimpl": "hookspecs",
    "load": "checkpoint",
    "quantize": "pipeline",
}

__all__ = [
    "CalibrationData",
    "Capabilities",
    "Event",
    "Grid",
    "Host",
    "InputGroup",
    "LayerInfo",
    "QuantizedWeight",
    "Recipe",
    "Result",
    "Rewrite",
    "RoundingProblem",
    "Scheme",
    "__version__",
    "evaluate",
    "hookimpl",
    "load",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qframe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qframe' has no attribute {name!r}")
