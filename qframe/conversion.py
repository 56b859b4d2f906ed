"""A quantized folder in another format: read layer by layer, written layer by layer.

Codes, scales and zero points stay the numbers that they are; what the other format cannot hold is
refused. Between layouts of folders the manifest goes along, so that `qframe verify` still holds
every certificate against the new files.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qframe.checkpoint import CheckpointWriter, check_output, quantized_config
from qframe.contracts import Exporter, Layout
from qframe.errors import OutputError, UnsupportedError, VerifyError
from qframe.host import Host
from qframe.kv_scheme import KVCacheScheme
from qframe.layouts import OWN, layout_named, layout_names, refusal
from qframe.manifest import MANIFEST, STATISTICS
from qframe.stored_model import StoredModel
from qframe.strict import suggestion
from qframe.weights import ModelFolder
from qframe.writing import put_in_place, written

DERIVED = ("tensors", "statistics", "files", "sha256")  # entries of a manifest made of the files


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` wrote.

    source, target   names of the formats
    readers          the software that reads the result
    layers           how many quantized layers
    schemes          description of a scheme -> how many layers have it
    sizes            file name -> bytes
    """

    source: str
    target: str
    readers: str
    layers: int
    schemes: Mapping[str, int]
    sizes: Mapping[str, int]


def format_names(host: Host) -> list[str]:
    """Return the names of everything that a quantized network can be written as."""
    return [*layout_names(host), *host.names("exporter")]


def convert(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    host: Host | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Converted:
    """Write a quantized folder in another format.

    folder   a quantized folder, of qframe or of others in a layout that a plugin knows
    to       the name of a layout of folders, or of another kind of file (`format_names`)
    out      the folder or the file to write
    say      told what begins

    Raises UnsupportedError for what the format cannot express; WeightsError or VerifyError for a
    folder that cannot be read; OutputError when `out` is there, unless `overwrite`. Nothing is left
    behind then.
    """
    host = host or Host.discover()
    out, say = Path(out), say or (lambda line: None)
    model = StoredModel.open(folder, host)
    if to in layout_names(host):
        layout = layout_named(to, host)
        sizes = _write_folder(model, layout, out, overwrite=overwrite, say=say)
        readers = layout.readers
    elif to in host.names("exporter"):
        exporter: Exporter = host.get("exporter", to)
        sizes = _write_file(model, exporter, out, overwrite=overwrite, say=say)
        readers = exporter.readers
    else:
        raise UnsupportedError(f"no format {to!r}{suggestion(to, format_names(host))}")
    schemes = Counter(outline.scheme.describe() for outline in model.outlines.values())
    return Converted(
        source=model.layout.name,
        target=to,
        readers=readers,
        layers=len(model.outlines),
        schemes=dict(sorted(schemes.items())),
        sizes=sizes,
    )


def _write_folder(
    model: StoredModel, layout: Layout, out: Path, *, overwrite: bool, say: Callable[[str], None]
) -> dict[str, int]:
    """Write a folder of another layout; return file name -> bytes."""
    if layout.name == OWN and model.manifest is None:
        raise VerifyError(
            f"{model.source.path}: no manifest, which layout {OWN!r} cannot be read without; "
            f"qframe.load and qframe verify read the folder as it is"
        )
    say("looking for what the format cannot express")
    _refuse(layout.name, layout.objections(list(model.outlines.values())))
    left = model.left()
    with CheckpointWriter(out, layout, strict=True, overwrite=overwrite) as writer:
        say("writing layers")
        for name, layer in model.layers():
            writer.add_layer(model.outlines[name], layer)
        for name in model.carried():
            writer.add({name: model.source.raw(name)})
        manifest = model.manifest
        if manifest is not None and manifest["statistics"]:
            kept = ModelFolder(model.source.path, STATISTICS)
            for name in kept.tensors:
                writer.add_statistics({name: kept.raw(name)})
        layers = list(writer.with_extras(model.outlines).values())
        config = quantized_config(model.config, layout, layers, left, _kv_cache(model))
        writer.copy_side_files(model.source, config)
        writer.add_side_files(layers, left)
        if manifest is None:
            return writer.finish(None)
        carried = {key: value for key, value in manifest.items() if key not in DERIVED}
        return writer.finish({**carried, "layout": layout.name})


def _kv_cache(model: StoredModel) -> KVCacheScheme | None:
    stored = None if model.manifest is None else model.manifest["recipe"].get("kv_cache_scheme")
    return stored and KVCacheScheme.parse(stored, f"{model.source.path / MANIFEST}")


def _write_file(
    model: StoredModel,
    exporter: Exporter,
    out: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Write another kind of file; return its name -> bytes."""
    if out.suffix != exporter.suffix:
        raise OutputError(f"{out}: a file of format {exporter.name!r} ends in {exporter.suffix}")
    if out.is_dir():
        check_output(out, overwrite=False)
    if out.exists() and not overwrite:
        raise OutputError(f"output {out} exists; choose another, or pass --overwrite")
    say("looking for what the format cannot express")
    layers = [model.outline(name) for name in model.outlines]
    _refuse(exporter.name, exporter.objections(layers, model.config))
    say("writing the file")
    unfinished = out.parent / f".{out.name}.{secrets.token_hex(8)}.tmp"
    try:
        with written(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            exporter.write(model, unfinished)
            put_in_place(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return {out.name: out.stat().st_size}


def _refuse(name: str, said: list[str]) -> None:
    if said:
        raise UnsupportedError(refusal(name, said))
