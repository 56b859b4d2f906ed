"""Writing and loading quantized folders.

Layout: that of the Hugging Face Hub. A quantized layer NAME is stored as NAME.weight_packed,
NAME.weight_scale and, where the scheme needs them, NAME.weight_zero_point, NAME.weight_g_idx and
NAME.input_scale; every other tensor and file is carried over as it was. `qframe.json` says what
was done: recipe, versions, one record per layer, and the sha256 of every file.

Everything is written to a temporary folder beside the output, which takes its name at the very
end: a run that fails leaves nothing behind. Nothing in the folder depends on time, machine or
thread count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

import qframe
from qframe.contracts import Grid
from qframe.errors import OutputError, RecipeError, VerifyError
from qframe.model import QuantizedLinear, build, replace_module, set_weight, stored_names
from qframe.packing import PackedWeight
from qframe.scheme import Scheme
from qframe.strict import Strict
from qframe.weights import INDEX, ModelFolder, read_json

MANIFEST = "qframe.json"
MANIFEST_VERSION = 1
MAX_SHARD_BYTES = 1 << 30  # what waits in memory to be written


class CheckpointWriter:
    """Writes a quantized folder shard by shard; use as a context manager.

    out         the folder to make. Raises OutputError when it exists and is not empty, unless
                `overwrite`
    """

    def __init__(
        self, out: Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.out = out
        self._overwrite = overwrite
        self._limit = max_shard_bytes
        check_output(out, overwrite=overwrite)
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._sizes = 0
        self._done = False

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(
                tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".tmp", dir=self.out.parent)
            )
        except OSError as error:
            raise OutputError(f"cannot write to {self.out.parent}: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in tensors by name; a shard is written when enough have come."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes() + size > self._limit:
                self._flush()
            self._pending[name] = tensor.detach().contiguous()

    def copy_side_files(self, folder: ModelFolder, config: Mapping[str, Any]) -> None:
        """Carry over everything that is not a weight; `config` replaces config.json."""
        for file in folder.side_files():
            if file.name not in {"config.json", MANIFEST}:
                shutil.copyfile(file, self._folder / file.name)
        self.write_json("config.json", config)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a text file into the folder."""
        (self._folder / name).write_text(content, encoding="utf-8")

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, int]:
        """Write what is pending and the manifest, and give the folder its name.

        Returns file name -> size in bytes.
        """
        self._flush()
        self._name_shards()
        files = sorted(self._folder.iterdir())
        hashes = {file.name: sha256(file) for file in files}
        self.write_json(MANIFEST, {**manifest, "files": hashes})
        sizes = {file.name: file.stat().st_size for file in sorted(self._folder.iterdir())}
        for file in self._folder.iterdir():
            file.chmod(0o644)
        self._folder.chmod(0o755)
        if self._overwrite and self.out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
            os.replace(self.out, old / "old")
            os.replace(self._folder, self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            if self.out.exists():
                self.out.rmdir()  # empty, as was checked
            os.replace(self._folder, self.out)
        self._done = True
        return sizes

    def _pending_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._pending.values())

    def _flush(self) -> None:
        if not self._pending:
            return
        file = self._folder / f"shard-{len(self._shards) + 1}"
        self._sizes += self._pending_bytes()
        try:
            save_file(self._pending, str(file), metadata={"format": "pt"})
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error}") from None
        self._shards.append(sorted(self._pending))
        self._pending = {}

    def _name_shards(self) -> None:
        total = len(self._shards)
        if total == 1:
            (self._folder / "shard-1").rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{total:05d}.safetensors"
            (self._folder / f"shard-{number}").rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        self.write_json(
            INDEX,
            {
                "metadata": {"total_size": self._sizes},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError when the output folder is in the way."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"output {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"output folder {out} exists and is not empty; choose another, or pass --overwrite"
        )


def quantized_config(config: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Return config.json with a quantization_config that names qframe as the reader."""
    distinct = sorted({scheme.describe() for scheme in schemes.values()})
    section = {
        "quant_method": "qframe",
        "version": qframe.__version__,
        "schemes": distinct,
        "note": "load with qframe.load(folder)",
    }
    return {**config, "quantization_config": section}


def load(
    folder: str | Path, module: nn.Module | None = None, *, dequantize: bool = False
) -> nn.Module:
    """Load a quantized folder.

    module       the unquantized network, for a folder that was made from a module in memory
                 instead of a Hugging Face folder; it is changed in place
    dequantize   give plain linear layers with the dequantized weights (faster to run, and as
                 large as the original in memory) instead of QuantizedLinear

    Raises VerifyError when the folder is not what its manifest says.
    """
    source = ModelFolder(folder)
    manifest = read_manifest(source)
    if module is None:
        source.config.pop("quantization_config", None)
        module = build(source)
    stored = source.tensors
    for name, packed, scale in packed_layers(source, manifest):
        old = module.get_submodule(name)
        if dequantize:
            weight = packed.dequantize()
            set_weight(old, weight if scale is None else weight / scale)
            bias = stored.get(f"{name}.bias")
            if bias is not None:
                old._parameters["bias"] = nn.Parameter(
                    source.read(f"{name}.bias").float(), requires_grad=False
                )
        else:
            bias_values = source.read(f"{name}.bias").float() if f"{name}.bias" in stored else None
            module = replace_module(module, name, QuantizedLinear(packed, bias_values, scale))
    _load_rest(module, source)
    return module.eval()


def _load_rest(module: nn.Module, source: ModelFolder) -> None:
    """Read every tensor that is not part of a quantized layer."""
    names = stored_names(module, source.tensors)
    loaded: dict[str, nn.Parameter] = {}
    for path, child in module.named_modules():
        for key, parameter in child._parameters.items():
            if parameter is None:
                continue
            name = names.get(f"{path}.{key}".lstrip("."))
            if name is None or (name not in source.tensors and not parameter.is_meta):
                continue
            if name not in source.tensors:
                raise VerifyError(f"{source.path}: tensor {name!r} is missing")
            if name not in loaded:
                loaded[name] = nn.Parameter(source.read(name).float(), requires_grad=False)
            child._parameters[key] = loaded[name]
        for key in child._buffers:
            name = f"{path}.{key}".lstrip(".")
            if name in source.tensors and not isinstance(child, QuantizedLinear):
                child._buffers[key] = source.read(name)


class GridRecord(Strict):
    """A grid as the manifest stores it."""

    qmin: int
    qmax: int
    values: tuple[float, ...] | None = None


class LayerRecord(Strict):
    """One quantized layer as the manifest stores it."""

    rows: Annotated[int, Field(ge=0)]
    columns: Annotated[int, Field(ge=0)]
    method: str
    scheme: Scheme
    grid: GridRecord


def read_manifest(source: ModelFolder) -> dict[str, Any]:
    """Return qframe.json of a folder. Raises VerifyError when it is not a qframe folder."""
    file = source.path / MANIFEST
    if not file.is_file():
        raise VerifyError(f"{source.path}: no {MANIFEST}; it was not written by qframe quantize")
    manifest = read_json(file)
    version = manifest.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise VerifyError(
            f"{file}: manifest_version {version!r}, this qframe reads {MANIFEST_VERSION}"
        )
    return manifest


def packed_layers(
    source: ModelFolder, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, PackedWeight, torch.Tensor | None]]:
    """Yield (layer name, packed weight, input_scale) for every quantized layer."""
    where = source.path / MANIFEST
    layers = manifest.get("layers")
    if not isinstance(layers, dict):
        raise VerifyError(f"{where}: 'layers' must map layer names to records")
    for name, raw in layers.items():
        try:
            record = LayerRecord.parse(raw, f"{where}: layer {name!r}")
        except RecipeError as error:
            raise VerifyError(str(error)) from None
        prefix = f"{name}." if name else ""
        tensors = {
            key.removeprefix(prefix): source.read(key)
            for key in source.tensors
            if key.startswith(f"{prefix}weight_")
        }
        packed = PackedWeight.from_tensors(
            tensors,
            name=name,
            rows=record.rows,
            columns=record.columns,
            scheme=record.scheme,
            grid=Grid(record.grid.qmin, record.grid.qmax, record.grid.values),
        )
        scale_name = f"{prefix}input_scale"
        scale = source.read(scale_name) if scale_name in source.tensors else None
        yield name, packed, scale


def sha256(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
