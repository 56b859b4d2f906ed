"""What weights take: in every format, in the folder that a run would write, in memory meanwhile.

All of it is arithmetic on shapes; nothing is loaded. One GB is 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qframe.contracts import LayerInfo, LayerOutline, Layout
from qframe.layouts import OwnLayout
from qframe.positions import CALIBRATION_WINDOW, window_length
from qframe.report.layers import LayerReport, RunReport
from qframe.scheme import Scheme

if TYPE_CHECKING:
    from qframe.certificates import Certificate
    from qframe.pipeline import Job
    from qframe.weights import ModelFolder

FORMATS: Mapping[str, int] = {"FP32": 32, "FP16, BF16": 16, "INT8": 8, "INT4": 4, "INT2": 2}
"""Format -> bits of a weight."""

GRANULARITIES: Mapping[str, int | None] = {"group 128": 128, "group 64": 64, "channel": None}
"""Name -> weights that share a scale; None for a whole row."""

SCALE_BITS = 16  # of the default scale_dtype, float16
TYPICAL_COLUMNS = 4096  # of a layer when only a number of parameters is known: 7B models have it


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatMemory:
    """The bytes that weights take in one format.

    scales        granularity -> bytes of scales, besides the weights
    zero_points   granularity -> bytes of zero points, besides weights and scales
    """

    format: str
    num_bits: int
    weights: float
    scales: Mapping[str, float]
    zero_points: Mapping[str, float]

    def total(self, granularity: str, *, symmetric: bool) -> float:
        """Return the bytes of weights and scales, and of zero points unless symmetric."""
        more = 0.0 if symmetric else self.zero_points[granularity]
        return self.weights + self.scales[granularity] + more


def memory_of_parameters(
    parameters: float, *, columns: int = TYPICAL_COLUMNS
) -> list[FormatMemory]:
    """Return what a number of weights takes in each format.

    columns   of every layer: what shares a scale at granularity "channel"

    >>> [memory.weights / 1e9 for memory in memory_of_parameters(7e9)]
    [28.0, 14.0, 7.0, 3.5, 1.75]
    """
    found = []
    for name, bits in FORMATS.items():
        shares = {g: parameters / (size or columns) for g, size in _granularities(bits)}
        found.append(
            FormatMemory(
                format=name,
                num_bits=bits,
                weights=parameters * bits / 8,
                scales={g: count * SCALE_BITS / 8 for g, count in shares.items()},
                zero_points={g: count * bits / 8 for g, count in shares.items()},
            )
        )
    return found


def memory_of_layers(layers: Iterable[LayerInfo]) -> list[FormatMemory]:
    """Return what the weights of layers take in each format, to the bit as they are stored."""
    shapes = [(layer.rows, layer.columns) for layer in layers]
    found = []
    for name, bits in FORMATS.items():
        weights = sum(rows * columns for rows, columns in shapes) * bits / 8
        scales: dict[str, float] = {}
        zero_points: dict[str, float] = {}
        for granularity, size in _granularities(bits):
            scheme = Scheme(num_bits=bits, group_size=size, symmetric=False)
            stored = [scheme.storage_bits(*shape) for shape in shapes]
            weights = sum(part["codes"] for part in stored) / 8
            scales[granularity] = sum(part["scale"] for part in stored) / 8
            zero_points[granularity] = sum(part["zero_point"] for part in stored) / 8
        found.append(
            FormatMemory(
                format=name, num_bits=bits, weights=weights, scales=scales, zero_points=zero_points
            )
        )
    return found


def _granularities(bits: int) -> Iterator[tuple[str, int | None]]:
    """Yield granularities with their sizes; floating-point weights have no scales."""
    if bits <= 8:
        yield from GRANULARITIES.items()


def readable_bytes(count: float) -> str:
    """Return a number of bytes for people.

    >>> [readable_bytes(n) for n in (3.5e9, 538090408, 2048, 12)]
    ['3.50 GB', '538 MB', '2.05 kB', '12 B']
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            value = count / unit
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {name}"
    return f"{count:.0f} B"


# The folder that a run would write --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSize:
    """The bytes of a quantized folder, part by part.

    quantized   codes, scales, zero points and the like
    carried     tensors that no codes stand for: embeddings, norms, what was ignored
    headers     of the safetensors files
    others      configuration, tokenizer, manifest and report
    """

    quantized: int
    carried: int
    headers: int
    others: int

    @property
    def weights(self) -> int:
        """The bytes of the safetensors files."""
        return self.quantized + self.carried + self.headers

    @property
    def total(self) -> int:
        """The bytes of the folder."""
        return self.weights + self.others


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that will be stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def folder_size(job: Job) -> FolderSize:
    """Return the size of the folder that a run would write, from headers alone.

    Of layers that is what the layout of the folder makes of them; the files that describe the run
    are written in advance, with numbers of the usual length. With target_bits layers are counted as
    taking all that they may, and input scales that may go into norms as stored.
    """
    folder = job.network.folder
    if folder is None:
        raise ValueError("the size of a folder is known for a model in a folder only")
    quantized = [t for layer in job.outlines().values() for t in _in_folder(job, layer)]
    stored = sum(t.bytes for t in quantized)
    if job.candidates is not None:  # as many as they may take
        stored += round(all_stored_bits(job) / 8) - sum(
            _own_bytes(job, layer) for layer in job.outlines().values()
        )
    carried = list(_carried_tensors(job, folder))
    return FolderSize(
        quantized=stored,
        carried=sum(t.bytes for t in carried),
        headers=_header_bytes([*quantized, *carried]),
        others=sum(f.stat().st_size for f in folder.side_files())
        + _record_bytes(job, [*quantized, *carried]),
    )


def bits_per_weight(job: Job) -> float:
    """Return the stored bits per quantized weight, everything included; at most, with a target."""
    return all_stored_bits(job) / sum(job.network.layers[layer].size for layer in job.plan.schemes)


def all_stored_bits(job: Job) -> int:
    """Return the bits that quantized layers take; with a target of bits, those that they may."""
    if job.candidates is not None:
        return job.candidates.budget
    return sum(stored_bits(job, layer, scheme) for layer, scheme in job.plan.schemes.items())


def layer_bits_per_weight(job: Job, layer: str) -> float:
    """Return the stored bits per weight of one layer of the plan."""
    return stored_bits(job, layer, job.plan.schemes[layer]) / job.network.layers[layer].size


def stored_bits(job: Job, layer: str, scheme: Scheme) -> int:
    """Return the bits that a layer takes with a scheme, everything that is stored included.

    As qframe's own layout has them, whatever that of the folder is: so figures can be compared.
    """
    return 8 * _own_bytes(job, job.outline(layer, scheme))


def _own_bytes(job: Job, layer: LayerOutline) -> int:
    return sum(t.bytes for t in _tensors(OwnLayout(), _at_most(job, layer)))


def _in_folder(job: Job, layer: LayerOutline) -> list[_Tensor]:
    """Return what a quantized layer is stored as."""
    return list(_tensors(job.layout, _at_most(job, layer)))


def _at_most(job: Job, layer: LayerOutline) -> LayerOutline:
    """Return the outline with input scales; which of them go into norms a run finds out."""
    scales = {"scale"} if job.method.scales else set()
    return dataclasses.replace(layer, extras=layer.extras | scales)


def _tensors(layout: Layout, layer: LayerOutline) -> Iterator[_Tensor]:
    from qframe.weights import SIZES

    prefix = f"{layer.info.name}." if layer.info.name else ""
    for part, (dtype, shape) in layout.shapes(layer).items():
        yield _Tensor(f"{prefix}{part}", dtype, shape, SIZES[dtype] * math.prod(shape))


def _carried_tensors(job: Job, folder: ModelFolder) -> Iterator[_Tensor]:
    """Yield the tensors of the folder that no quantized layer stands for."""
    from qframe.weights import DTYPE_NAMES

    network = job.network
    replaced = {
        network.stored_name(f"{layer}.weight")
        for layer in job.plan.schemes
        if not network.is_tied(layer)
    }
    for name, tensor in folder.tensors.items():
        if name in replaced:
            continue
        dtype = network.carried_dtype(name)
        if dtype is None:
            yield _Tensor(name, tensor.dtype, tensor.shape, tensor.bytes)
        else:
            yield _Tensor(name, DTYPE_NAMES[dtype], tensor.shape, 2 * math.prod(tensor.shape))


def stored_tensors(job: Job) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype as safetensors has it, shape) of what a run is expected to store.

    In the order in which it does so. A run may decide otherwise, of input scales for one. Empty for
    a module in memory.
    """
    folder = job.network.folder
    if folder is None:
        return []
    quantized = [t for layer in job.outlines().values() for t in _in_folder(job, layer)]
    every = [*quantized, *_carried_tensors(job, folder)]
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in every]


def _header_bytes(tensors: Sequence[_Tensor]) -> int:
    """Return the length of the safetensors header of all tensors."""
    header = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.bytes, t.bytes]}
        for t in tensors
    }
    return len(json.dumps(header, separators=(",", ":")))


def calibrates(job: Job) -> bool:
    """Return whether a run shows calibration text to the network."""
    needed = job.method.needs | job.plan.observers
    return bool(needed) or "calibration" in job.recipe.model_fields_set


def _inputs(scheme: Scheme) -> dict[str, float | int | str]:
    """Return what a report says of a layer's inputs, in figures of the usual length."""
    if scheme.input_activations is None:
        return {}
    if scheme.input_activations.dynamic:
        return {"error": 1 / 300}
    return {"step": 1 / 30, "error": 1 / 300, "clipped": 0.0}


def _record_bytes(job: Job, tensors: Sequence[_Tensor]) -> int:
    """Return about how long manifest, report and configuration will be: they are written once."""
    from qframe.manifest import layer_record

    settings = job.recipe.calibration
    error, rtn_error = (1 / 3, 1 / 7) if calibrates(job) else (None, None)  # of the usual length
    held_out = calibrates(job) and round(
        settings.num_calibration_samples * settings.held_out_fraction
    )
    layers = [
        LayerReport(
            name=name,
            method=job.recipe.method,
            scheme=scheme.describe(),
            rows=job.network.layers[name].rows,
            columns=job.network.layers[name].columns,
            bits_per_weight=layer_bits_per_weight(job, name),
            error=error,
            rtn_error=rtn_error,
            held_out_error=error if held_out else None,
            rtn_held_out_error=rtn_error if held_out else None,
            sqnr_db=100 / 7,
            tokens=settings.num_calibration_samples * window_of(job) if error else 0,
            info={"damp": 0.01, "dead_columns": 0} if job.method.needs else {},
            inputs=_inputs(scheme) if error else {},
            certificates=_certificates(job, scheme),
            source="0" * 64,
            rewritten="0" * 64 if job.method.handlers else None,
            input_group=name,
        )
        for name, scheme in job.plan.schemes.items()
    ]
    outlines = job.outlines()
    source = {"dataset": settings.dataset, "sha256": "0" * 64, "tokens": "0" * 200}
    report = RunReport(
        layers=layers,
        events=(),
        coverage=job.coverage,
        calibration=source if error else None,
    )
    files = [file.name for file in job.network.folder.side_files()] if job.network.folder else []
    manifest = {
        "recipe": job.recipe.model_dump(mode="json"),
        "plugins": [dict.fromkeys(("kind", "name", "plugin", "source", "version"), "0" * 7)] * 3,
        "calibration": report.calibration,
        "layers": {layer.name: layer_record(layer, outlines[layer.name]) for layer in layers},
        "tensors": {
            tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "blake3": "0" * 64}
            for tensor in tensors
        },
        "files": dict.fromkeys([*files, "model.safetensors", "qframe_report.json"], "0" * 64),
        "quantization_config": "0" * 300,  # in config.json
    }
    texts = (
        report.to_json(timings=False),
        report.to_csv(timings=False),
        json.dumps(manifest, indent=2),
    )
    return sum(len(text.encode()) for text in texts)


def _certificates(job: Job, scheme: Scheme) -> list[Certificate]:
    """Return a certificate of the usual length for each claim about layers of this scheme."""
    from qframe.certificates import Certificate, applicable
    from qframe.claims import claims_of

    rounder = applicable(claims_of(job.method.rounder), scheme)
    claimed = [(claim.name, claim.theorem) for claim in rounder]
    if job.method.handlers:
        claimed.append(("function preserved", "B4.a"))
    return [
        Certificate(
            claim=claim,
            theorem=theorem,
            ratio=0.999999,
            place=(10, 10),
            error=0.00123456,
            allowed=0.00123456,
        )
        for claim, theorem in claimed
    ]


def folder_bytes(folder: Path) -> dict[str, int]:
    """Return {"weights": ..., "total": ...}, the bytes of a folder's files on disk."""
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}
    return {"weights": weight_bytes(sizes), "total": sum(sizes.values())}


def weight_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of a folder's weights, without statistics that were kept.

    sizes   file name -> bytes
    """
    return sum(
        size
        for name, size in sizes.items()
        if name.endswith(".safetensors") and not name.startswith("qframe_")
    )


def most_statistics_bytes(job: Job) -> int:
    """Return what kept statistics take at most: as if no two layers read the same input."""
    if not job.recipe.keep_statistics:
        return 0
    return sum(8 * job.network.layers[name].columns ** 2 for name in job.plan.schemes)


def stored_bits_per_weight(folder: ModelFolder, layers: Mapping[str, int]) -> float:
    """Return the bits per weight of some layers of a folder, quantized or not, from headers.

    layers   name -> number of weights
    """
    stored = 0
    for name, tensor in folder.tensors.items():
        layer, _, part = name.rpartition(".")
        # Whatever the layout calls it, but for a bias, and for the shape that some write.
        if layer in layers and part not in ("bias", "weight_shape"):
            stored += tensor.bytes
    return 8 * stored / sum(layers.values())


def window_of(job: Job) -> int:
    """Return the tokens of a calibration window."""
    folder = job.network.folder
    asked = job.recipe.calibration.max_seq_length
    path = None if folder is None else folder.path
    return window_length(path, asked, CALIBRATION_WINDOW, "max_seq_length")
