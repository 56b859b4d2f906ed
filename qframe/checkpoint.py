"""Writing and loading quantized folders.

A folder of the Hugging Face Hub. A quantized layer NAME is stored as NAME.weight_packed,
NAME.weight_scale and so on, as a layout says (`qframe.layouts`); every other tensor and file is
carried over as it was. `qframe.json` says what was done (`qframe.manifest`). Statistics that were
asked to be kept have files of their own.

Everything is written to a temporary folder beside the output, which takes its name at the very
end: no other program sees half of one. Nothing in the folder depends on time, machine or thread
count.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from qframe.contracts import Kernel, LayerInfo, LayerOutline, Layout
from qframe.dispatch import Dispatch
from qframe.errors import OutputError, UnsupportedError, VerifyError
from qframe.fingerprints import sha256
from qframe.fused_norms import fuse_norms
from qframe.host import Host
from qframe.kernel_layer import on_kernels, without_kernels
from qframe.kv_scheme import KVCacheScheme
from qframe.layouts import OTHERS_SIDE_FILES, OWN, OwnLayout, refusal
from qframe.manifest import MANIFEST, STATISTICS, own_hash
from qframe.model import replace_module, set_weight, stored_names
from qframe.shards import Expected, Shards
from qframe.stored import QuantizedLinear, StoredLayer
from qframe.stored_model import StoredModel
from qframe.weights import MODEL, ModelFolder
from qframe.writing import to_disk, write_json, written

MAX_SHARD_BYTES = 1 << 30  # of a file

log = logging.getLogger("qframe")


class CheckpointWriter:
    """Writes a quantized folder shard by shard; use as a context manager.

    out         the folder to make. Raises OutputError when it exists and is not empty, unless
                `overwrite`
    layout      how layers are stored
    strict      refuse a layer that readers of the layout would not read as it is meant
    work        where the folder is made, in a folder that is there; None for one beside `out`
    max_shard_bytes, expected   as `Shards` has them
    """

    def __init__(
        self,
        out: Path,
        layout: Layout | None = None,
        *,
        strict: bool = False,
        overwrite: bool = False,
        work: Path | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        expected: Sequence[Expected] = (),
    ) -> None:
        self.out, self._work = out, work
        self.layout: Layout = layout or OwnLayout()
        self._strict = strict
        self.extras: dict[str, frozenset[str]] = {}  # layer -> what it has besides codes
        self._overwrite = overwrite
        self._limit, self._expected = max_shard_bytes, expected
        check_output(out, overwrite=overwrite)
        self._done = False

    def __enter__(self) -> Self:
        # The name is known before the folder is there: an interrupt may come right after.
        beside = self.out.parent / f".{self.out.name}.{secrets.token_hex(8)}.tmp"
        self._folder = self._work or beside
        try:
            with written(self.out.parent):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._folder.mkdir(mode=0o700)
            self._model = Shards(self._folder, MODEL, self._limit, self._expected)
            self._statistics = Shards(self._folder, STATISTICS, self._limit)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model.close()
        self._statistics.close()
        if not self._done:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where the files are made; what else is put there has to be gone before `finish`."""
        return self._folder

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in tensors of the model by name."""
        for name, tensor in tensors.items():
            self._model.add(name, tensor)

    def add_pieces(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[torch.Tensor]
    ) -> None:
        """Take in a tensor of the model that comes in pieces, as `Shards.add_pieces`."""
        self._model.add_pieces(name, dtype, shape, pieces)

    def add_layer(self, outline: LayerOutline, layer: StoredLayer) -> None:
        """Take in a quantized layer.

        Raises UnsupportedError for one that the layout has no words for, when `strict`.
        """
        name = outline.info.name
        self.extras[name] = layer.extras
        if self._strict:
            said = self.layout.objections([dataclasses.replace(outline, extras=layer.extras)])
            if said:
                raise UnsupportedError(refusal(self.layout.name, said))
        prefix = f"{name}." if name else ""
        self.add({f"{prefix}{part}": t for part, t in self.layout.pack(layer).items()})

    def with_extras(self, outlines: Mapping[str, LayerOutline]) -> dict[str, LayerOutline]:
        """Return outlines that say what their layers have besides codes, now that they came."""
        return {n: dataclasses.replace(o, extras=self.extras[n]) for n, o in outlines.items()}

    def add_statistics(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in tensors that only `qframe verify` needs."""
        for name, tensor in tensors.items():
            self._statistics.add(name, tensor)

    def copy_side_files(self, folder: ModelFolder, config: Mapping[str, Any]) -> None:
        """Carry over everything that is not a weight; `config` replaces config.json."""
        for file in folder.side_files():
            if file.name not in {"config.json", MANIFEST, *OTHERS_SIDE_FILES}:
                with written(self._folder / file.name, file.stat().st_size):
                    shutil.copyfile(file, self._folder / file.name)
        write_json(self._folder / "config.json", config)

    def add_side_files(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> None:
        """Write what readers of the layout look for beside config.json; arguments as for that."""
        make = getattr(self.layout, "side_files", None)
        for name, content in ({} if make is None else make(layers, left)).items():
            write_json(self._folder / name, content)

    def write_text(self, name: str, content: str) -> None:
        """Write a text file into the folder."""
        with written(self._folder / name, len(content)):
            (self._folder / name).write_text(content, encoding="utf-8")

    def finish(
        self,
        manifest: Mapping[str, Any] | None,
        look: Callable[[Path], None] | None = None,
    ) -> dict[str, int]:
        """Write what is pending and the manifest, and give the folder its name.

        manifest   without the hashes of tensors and files, which are added; None for none
        look       is called with the folder before it gets its name

        Returns file name -> size in bytes.
        """
        with written(self._folder):
            self._model.finish()
            self._statistics.finish()
            self._write_manifest(manifest)
        if look is not None:
            look(self._folder)
        with written(self.out):
            return self._place()

    def _write_manifest(self, manifest: Mapping[str, Any] | None) -> None:
        if manifest is not None:
            known = {**self._model.files, **self._statistics.files}  # hashed while written
            content = {
                **manifest,
                "tensors": self._model.records,
                "statistics": self._statistics.records,
                "files": {
                    file.name: known.get(file.name) or sha256(file)
                    for file in sorted(self._folder.iterdir())
                },
            }
            write_json(self._folder / MANIFEST, {**content, "sha256": own_hash(content)})

    def _place(self) -> dict[str, int]:
        """Give the folder its name; return file name -> size in bytes."""
        sizes = {file.name: file.stat().st_size for file in sorted(self._folder.iterdir())}
        for file in self._folder.iterdir():
            file.chmod(0o644)
            to_disk(file)
        self._folder.chmod(0o755)
        to_disk(self._folder)
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
        to_disk(self.out.parent)
        return sizes


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError when the output folder is in the way."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"output {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"output folder {out} exists and is not empty; choose another, or pass --overwrite"
        )


def quantized_config(
    config: Mapping[str, Any],
    layout: Layout,
    layers: Sequence[LayerOutline],
    left: Sequence[LayerInfo],
    kv_cache: KVCacheScheme | None = None,
) -> dict[str, Any]:
    """Return config.json with the quantization_config that readers of the layout look at.

    left       linear layers that are not quantized
    kv_cache   how keys and values are to be stored; only qframe's own section says it, and always
               the manifest
    """
    section = layout.config(layers, left)
    if kv_cache is not None and section["quant_method"] == OWN:
        section["kv_cache_scheme"] = kv_cache.model_dump(mode="json")
    return {**config, "quantization_config": section}


def load(
    folder: str | Path,
    module: nn.Module | None = None,
    *,
    dequantize: bool = False,
    kernels: str | None = None,
) -> nn.Module:
    """Load a quantized folder: one of qframe, or one of others in a layout that a plugin knows.

    module       the unquantized network, for a folder that was made from a module in memory
                 instead of a Hugging Face folder; it is changed in place
    dequantize   keep dequantized weights in memory, as large as the original: faster to run.
                 Layers whose activations are not quantized become plain linear layers
    kernels      the backend whose kernels multiply with the codes themselves, or "auto": for each
                 layer the fastest that serves it. Layers that none serves go on without, which is
                 logged as a warning. A quantized KV cache is attended to as codes, where its
                 quantizer can. None: weights are dequantized in each call

    Raises WeightsError for a folder that no layout knows; VerifyError when it is not what its
    manifest says; UnsupportedError for a backend
    that is not there; ValueError for both `dequantize` and `kernels`.
    """
    if dequantize and kernels is not None:
        raise ValueError("kernels multiply with codes: give either dequantize=True or kernels")
    dispatch = None if kernels is None else Dispatch(_kernels(), kernels)
    model = StoredModel.open(folder)
    if module is None:
        module = model.network()
    for name, layer in model.layers():
        old = module.get_submodule(name)
        bias = model.bias(name)
        bias = None if bias is None else bias.float()
        if dequantize and layer.inputs is None:
            set_weight(old, layer.plain(layer.weight()))
            if bias is not None:
                old._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        else:
            made = QuantizedLinear(layer, bias, dense=dequantize)
            module = replace_module(module, name, made)
    _load_rest(module, model.source)
    if dispatch is not None:
        module = fuse_norms(on_kernels(module, dispatch), dispatch)
        left = without_kernels(module)
        for reason in sorted(set(left.values())):
            names = [name for name, why in left.items() if why == reason]
            log.warning("%d layers run without kernels, %s ...: %s", len(names), names[0], reason)
        if hasattr(module, "set_attn_implementation"):
            from qframe.fused_attention import fuse_attention  # with transformers, which is slow
            from qframe.kv_attention import attend_to_codes

            attend_to_codes(module)
            fuse_attention(module, dispatch)
    return module.eval()


def _kernels() -> list[Kernel]:
    host = Host.discover()
    return [host.get("kernel", name) for name in host.names("kernel")]


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
