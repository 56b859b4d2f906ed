"""The manifest, `qframe.json`: what was done to a network, and what the files must still be.

It holds the recipe, the plugins with their versions, one record per layer with its certificates
and the fingerprint of the weight that it was made of, the fingerprint of every tensor
(`qframe.fingerprints`), and the sha256 of every file. Nothing in it depends on time, machine or
thread count.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Base64Bytes, Field, field_validator

from qframe.certificates import Certificate
from qframe.contracts import Grid, LayerInfo, LayerOutline
from qframe.errors import RecipeError, VerifyError, WeightsError
from qframe.folds import Division
from qframe.recipe import Recipe
from qframe.report.layers import LayerReport, words_for_infinities
from qframe.scheme import Scheme
from qframe.strict import Strict
from qframe.weights import ModelFolder, read_json

MANIFEST = "qframe.json"
MANIFEST_VERSION = 8
STATISTICS = "qframe_statistics"  # the stem of the files that --keep-statistics writes
ORDER = "processing_order"  # after a layer's name: the order of its columns, in those files


def own_hash(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, without the entry that holds it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Records --------------------------------------------------------------------------------------


class TensorRecord(Strict):
    """A tensor of the folder: its dtype as safetensors names it, shape, and fingerprint."""

    dtype: str
    shape: tuple[int, ...]
    blake3: str


class GridRecord(Strict):
    """A grid as the manifest stores it."""

    qmin: int
    qmax: int
    values: tuple[float, ...] | None = None

    def grid(self) -> Grid:
        """Return it as the object that it was."""
        return Grid(self.qmin, self.qmax, self.values)


class CertificateRecord(Strict):
    """A certificate as the manifest stores it; see `qframe.certificates.Certificate`."""

    claim: str
    theorem: str
    ratio: float
    place: tuple[int, ...] = ()
    error: float | None = None
    allowed: float | None = None
    note: str = ""

    def certificate(self) -> Certificate:
        """Return it as the object that it was."""
        return Certificate(**self.model_dump())


class LayerRecord(Strict):
    """One quantized layer as the manifest stores it.

    input_grid    the codes of activations, where they are quantized
    source        fingerprint of the weight that it was made of, as it was stored, in `source_dtype`
    rewritten     that of what the outlier handlers made of it, [rows, columns] float32; None
                  without any
    input_group   the first layer of those that read the same input; names the kept statistics
    folded        the norm, or the layer before it, that divides by the scale of that input; None
                  where nothing does
    tokens        calibration tokens behind the statistics
    info          what the rounder told, e.g. {"damp": 0.01}
    clipped       share of weights more than half a step outside the range of the codes
    inputs        what became of the layer's inputs; see `LayerReport`
    kind          the class of the module that it stands for
    """

    rows: Annotated[int, Field(ge=0)]
    columns: Annotated[int, Field(ge=0)]
    method: str
    scheme: Scheme
    grid: GridRecord
    input_grid: GridRecord | None = None
    source: str
    source_dtype: str
    rewritten: str | None = None
    input_group: str
    folded: str | None = None
    tokens: Annotated[int, Field(ge=0)] = 0
    info: Mapping[str, float | int | str] = Field(default_factory=dict)
    clipped: float = 0.0
    inputs: Mapping[str, float | int | str] = Field(default_factory=dict)
    certificates: tuple[CertificateRecord, ...] = ()
    kind: str = "Linear"

    def outline(self, name: str) -> LayerOutline:
        """Return what the layer `name` is, without its numbers."""
        return LayerOutline(
            info=LayerInfo(name=name, rows=self.rows, columns=self.columns, kind=self.kind),
            scheme=self.scheme,
            grid=self.grid.grid(),
            input_grid=None if self.input_grid is None else self.input_grid.grid(),
        )


def layer_record(report: LayerReport, layer: LayerOutline) -> dict[str, Any]:
    """Return the record of a layer as plain values."""
    inputs = layer.input_grid
    record: dict[str, Any] = {
        "rows": report.rows,
        "columns": report.columns,
        "kind": layer.info.kind,
        "method": report.method,
        "scheme": layer.scheme.model_dump(),
        "grid": dataclasses.asdict(layer.grid),
        "input_grid": None if inputs is None else dataclasses.asdict(inputs),
        "source": report.source,
        "source_dtype": report.source_dtype,
        "rewritten": report.rewritten,
        "input_group": report.input_group,
        "folded": report.folded,
        "tokens": report.tokens,
        "info": dict(report.info),
        "clipped": report.clipped,
        "inputs": dict(report.inputs),
        "certificates": [certificate.record() for certificate in report.certificates],
    }
    finite: dict[str, Any] = words_for_infinities(record)
    return finite


class DivisionRecord(Strict):
    """By what the rows of a layer are divided, and which channels of an input they are.

    exponents   of 2, of each row: int8, in base64
    rows        of each channel of the input: int32, little-endian, in base64; None for all rows in
                their order
    """

    exponents: Base64Bytes
    rows: Base64Bytes | None = None

    @field_validator("rows")
    @classmethod
    def _whole_numbers(cls, rows: bytes | None) -> bytes | None:
        if rows is not None and len(rows) % 4:
            raise ValueError(f"int32 have 4 bytes each, these are {len(rows)}")
        return rows

    @classmethod
    def of(cls, division: Division) -> dict[str, str | None]:
        """Return it as plain values."""
        exponents = division.exponents.numpy().astype("<i1")
        rows = division.rows.numpy().astype("<i4")
        in_order = np.array_equal(rows, np.arange(len(exponents)))
        return {
            "exponents": _base64(exponents),
            "rows": None if in_order else _base64(rows),
        }

    def division(self) -> Division:
        """Return it as the object that it was."""
        exponents = np.frombuffer(self.exponents, dtype="<i1").astype(np.int64)
        if self.rows is None:
            rows = np.arange(len(exponents))
        else:
            rows = np.frombuffer(self.rows, dtype="<i4").astype(np.int64)
        return Division(torch.from_numpy(exponents), torch.from_numpy(rows))


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


class PluginRecord(Strict):
    """Which plugin provided an object of the run."""

    kind: str
    name: str
    plugin: str
    source: str
    version: str


class EventRecord(Strict):
    """Something that happened, `qframe.contracts.Event`."""

    kind: str
    layer: str
    message: str


class Manifest(Strict):
    """The whole of qframe.json.

    layout       how the folder stores its layers (`qframe.layouts`)
    divisions    of layers whose rows divide by the scale of another layer's input
    tensors      of the model, by name
    statistics   that were kept, by name: GROUP.OBSERVER, and LAYER.processing_order
    files        name -> sha256, of every file but this one
    sha256       of this one's content, `own_hash`
    """

    manifest_version: int
    qframe: str
    layout: str
    recipe: Recipe
    plugins: tuple[PluginRecord, ...]
    calibration: Mapping[str, Any] | None
    events: tuple[EventRecord, ...]
    layers: Mapping[str, LayerRecord]
    divisions: Mapping[str, DivisionRecord]
    tensors: Mapping[str, TensorRecord]
    statistics: Mapping[str, TensorRecord]
    files: Mapping[str, str]
    sha256: str


# Reading --------------------------------------------------------------------------------------


def read_manifest(source: ModelFolder) -> dict[str, Any]:
    """Return qframe.json of a folder. Raises VerifyError when it is not a qframe folder."""
    file = source.path / MANIFEST
    if not file.is_file():
        raise VerifyError(f"{source.path}: no {MANIFEST}; it was not written by qframe quantize")
    manifest = read_json(file)
    version = manifest.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise VerifyError(
            f"{file}: manifest_version {version!r}, but this qframe reads {MANIFEST_VERSION}; "
            f"quantize the model again, or use the qframe that wrote the folder "
            f"({manifest.get('qframe', 'unknown')})"
        )
    return manifest


def parse_manifest(source: ModelFolder) -> Manifest:
    """Return qframe.json of a folder, every field of it checked. Raises VerifyError."""
    where = source.path / MANIFEST
    try:
        content = read_manifest(source)
        if own_hash(content) != content.get("sha256"):
            raise VerifyError(f"{where}: its content is not what was written: sha256 differs")
        return Manifest.parse(content, str(where))
    except (RecipeError, WeightsError) as error:
        raise VerifyError(str(error)) from None


def record_of(raw: Mapping[str, Any], where: str) -> LayerRecord:
    """Return the record of a layer that a manifest holds as plain values. Raises VerifyError."""
    try:
        return LayerRecord.parse(raw, where)
    except RecipeError as error:
        raise VerifyError(str(error)) from None
