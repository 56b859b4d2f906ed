"""What a quantized folder holds, from config.json, the manifest and the headers of its files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from qframe.manifest import MANIFEST
from qframe.memory import readable_bytes
from qframe.report.table import facts, some, stacked, table, titled
from qframe.stored_model import StoredModel
from qframe.weights import SIZES, ModelFolder, read_json

if TYPE_CHECKING:
    from qframe.contracts import Checkpoint, Reader
    from qframe.host import Host
    from qframe.scheme import Scheme


def of_a_reader(path: Path, host: Host) -> tuple[Reader, Checkpoint] | None:
    """Return what a reader opens of a path, and the reader; None where none does."""
    if (path / MANIFEST).is_file():
        return None
    for name in host.names("reader"):
        reader: Reader = host.get("reader", name)
        checkpoint = reader.open(path)
        if checkpoint is not None:
            return reader, checkpoint
    return None


def coded_record(path: Path, reader: Reader, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint of others holds, as plain values."""
    return {
        "path": str(path),
        "format": reader.name,
        "writers": reader.writers,
        "layers": {
            name: {
                "rows": layer.rows,
                "columns": layer.columns,
                "scheme": layer.kind,
                "bytes": layer.bytes,
            }
            for name, layer in checkpoint.layers.items()
        },
        "carried": dict(checkpoint.carried),
    }


def coded_screen(path: Path, reader: Reader, checkpoint: Checkpoint) -> RenderableType:
    """Return the same as a table of kinds, and facts."""
    made = table("stored as", "layers", "weights", "bits per weight", names=1)
    for kind in sorted({layer.kind for layer in checkpoint.layers.values()}):
        every = [layer for layer in checkpoint.layers.values() if layer.kind == kind]
        weights = sum(layer.rows * layer.columns for layer in every)
        bits = 8 * sum(layer.bytes for layer in every) / max(weights, 1)
        made.add_row(kind, str(len(every)), f"{weights:,}", f"{bits:.3f}")
    dtypes = Counter(checkpoint.carried.values())
    size = sum(layer.bytes for layer in checkpoint.layers.values())
    lines = {
        "written": f"by others: {reader.writers}",
        "format": f"{reader.name}; qframe audits it (qframe verify), and does not run it",
        "others": f"{len(checkpoint.carried)} tensors as they were "
        f"({', '.join(f'{n} {dtype}' for dtype, n in sorted(dtypes.items()))})",
        "bytes": f"{readable_bytes(size)} quantized",
    }
    return stacked(titled(str(path), made), facts(lines))


def is_quantized(path: Path) -> bool:
    """Return whether a path is a folder that says it is quantized."""
    if (path / MANIFEST).is_file():
        return True
    config = path / "config.json"
    return config.is_file() and "quantization_config" in read_json(config)


def stored_record(path: Path, host: Host) -> dict[str, Any]:
    """Return what a quantized folder holds, as plain values."""
    model = StoredModel.open(path, host)
    manifest = model.manifest
    layers: dict[str, dict[str, Any]] = {
        name: {
            "rows": outline.info.rows,
            "columns": outline.info.columns,
            "scheme": _described(outline.scheme, known=manifest is not None),
            "tensors": _tensors(model, name),
        }
        for name, outline in model.outlines.items()
    }
    return {
        "folder": str(path),
        "layout": model.layout.name,
        "readers": model.layout.readers,
        "qframe": None if manifest is None else manifest["qframe"],
        "method": None if manifest is None else manifest["recipe"]["method"],
        "layers": layers,
        "bytes": {
            "quantized": sum(sum(each["tensors"].values()) for each in layers.values()),
            "carried": sum(model.source.tensors[name].bytes for name in model.carried()),
        },
        "carried": {name: model.source.tensors[name].dtype for name in model.carried()},
    }


def stored_screen(path: Path, host: Host) -> RenderableType:
    """Return the same as a table of schemes, and facts."""
    record = stored_record(path, host)
    layers = record["layers"]
    made = table("scheme", "stored as", "layers", "weights", "bits per weight", names=2)
    for scheme, count in sorted(Counter(each["scheme"] for each in layers.values()).items()):
        chosen = [each for each in layers.values() if each["scheme"] == scheme]
        weights = sum(each["rows"] * each["columns"] for each in chosen)
        bits = 8 * sum(sum(each["tensors"].values()) for each in chosen) / max(weights, 1)
        parts = sorted({part for each in chosen for part in each["tensors"]})
        made.add_row(scheme, ", ".join(parts), str(count), f"{weights:,}", f"{bits:.3f}")
    dtypes = Counter(record["carried"].values())
    names = [name for name in record["carried"] if "norm" not in name]
    by_whom = "others" if record["qframe"] is None else f"qframe {record['qframe']}"
    sizes = record["bytes"]
    lines = {
        "written": f"by {by_whom}"
        + ("" if record["method"] is None else f", method {record['method']}"),
        "layout": f"{record['layout']}, for {record['readers']}",
        "others": f"{len(record['carried'])} tensors as they were "
        f"({', '.join(f'{n} {dtype}' for dtype, n in sorted(dtypes.items()))}): {some(names)}",
        "bytes": f"{readable_bytes(sizes['quantized'])} quantized, "
        f"{readable_bytes(sizes['carried'])} as they were",
    }
    return stacked(titled(str(path), made), facts(lines))


def _described(scheme: Scheme, *, known: bool) -> str:
    """Return a scheme in words, without how scales were found where that is not known."""
    return scheme.describe() if known else scheme.describe().replace(f", {scheme.observer}", "")


def _tensors(model: StoredModel, name: str) -> dict[str, int]:
    """Return part -> bytes of a layer."""
    found = {}
    for part in model.layout.parts:
        stored = model.source.tensors.get(f"{name}.{part}".lstrip("."))
        if stored is not None:
            found[part] = stored.bytes
    return found


def file_record(file: Path) -> dict[str, Any]:
    """Return the tensors of one safetensors file, from its header."""
    found = ModelFolder(file.parent, file.name.removesuffix(".safetensors")).tensors
    return {
        "file": str(file),
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "bytes": t.bytes}
            for name, t in found.items()
        },
    }


def file_screen(file: Path) -> RenderableType:
    """Return the same as a table of dtypes."""
    tensors = file_record(file)["tensors"]
    made = table("dtype", "tensors", "numbers", "size")
    for dtype, count in sorted(Counter(t["dtype"] for t in tensors.values()).items()):
        size = sum(t["bytes"] for t in tensors.values() if t["dtype"] == dtype)
        numbers = size // SIZES.get(dtype, 1)
        made.add_row(dtype, str(count), f"{numbers:,}", readable_bytes(size))
    return titled(f"{file}: {len(tensors)} tensors", made)
