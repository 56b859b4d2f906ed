"""Records as lines of JSON, for a pipe: plain values, and arrays as their bytes. No pickle."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qframe_conformance.report import Counterexample, Record


def plain(record: Record) -> dict[str, Any]:
    """Return a record as values that JSON has."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    example = record.counterexample
    if example is not None:
        values["counterexample"] = {
            "snippet": example.snippet,
            "arrays": {name: _text(array) for name, array in example.arrays.items()},
        }
    if record.ratio is not None and not math.isfinite(record.ratio):
        values["ratio"] = str(record.ratio)
    return values


def record(values: Mapping[str, Any]) -> Record:
    """Return the record that `plain` was given."""
    found = dict(values)
    example = found["counterexample"]
    if example is not None:
        arrays = {name: _array(text) for name, text in example["arrays"].items()}
        found["counterexample"] = Counterexample(snippet=example["snippet"], arrays=arrays)
    if isinstance(found["ratio"], str):
        found["ratio"] = float(found["ratio"])
    return Record(**found)


def _text(array: Any) -> str:
    """Return an array as a .npy file in base64."""
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _array(text: str) -> Any:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
