"""What a folder says of the run that made it: the manifest, the report, who reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import qframe
from qframe.checkpoint import CheckpointWriter, quantized_config
from qframe.contracts import LayerOutline
from qframe.layouts import OWN, USUAL
from qframe.manifest import MANIFEST_VERSION, DivisionRecord, layer_record
from qframe.report.layers import RunReport

if TYPE_CHECKING:
    from qframe.pipeline import Job


def storage_of(job: Job, outlines: Mapping[str, LayerOutline]) -> str:
    """Return in a line how the folder stores its layers, and who reads it."""
    beyond = job.layout.objections(list(outlines.values()))
    if beyond:
        return f"{job.layout.name}, and more, for qframe alone: {beyond[0]}"
    if not job.not_usual:
        return f"{job.layout.name}, for {job.layout.readers}{_rounding_of_scales(job, outlines)}"
    return f"{job.layout.name}, for qframe alone; {USUAL} cannot: {job.not_usual[0]}"


def _rounding_of_scales(job: Job, outlines: Mapping[str, LayerOutline]) -> str:
    """Return what readers do to scales of another dtype than the network's, "" for nothing.

    Networks of 16 bits run in them, and so do readers' scales, whatever they are stored in.
    """
    config = {} if job.network.folder is None else job.network.folder.config
    dtype = config.get("dtype") or config.get("torch_dtype")
    others = {layer.scheme.scale_dtype for layer in outlines.values()} & {*_WHOLE} - {dtype}
    if job.layout.name == OWN or dtype not in ("float16", "bfloat16") or not others:
        return ""
    return (
        f"; they round scales of {' and '.join(sorted(others))} to the network's {dtype}: with "
        f"scale_dtype: {dtype} they have the same weights"
    )


_WHOLE = ("float32", "float16", "bfloat16")  # scale dtypes that are not of 8 bits


def write_records(
    writer: CheckpointWriter,
    job: Job,
    outlines: Mapping[str, LayerOutline],
    report: RunReport,
    look: Callable[[Path], None],
) -> dict[str, int]:
    """Write everything that is not a tensor, and give the folder its name."""
    folder = job.network.folder
    if folder is not None:
        left = [info for name, info in job.network.layers.items() if name not in outlines]
        layers, kv_cache = list(outlines.values()), job.recipe.kv_cache_scheme
        config = quantized_config(folder.config, job.layout, layers, left, kv_cache)
        if any(event.kind == "untied" for event in report.events):
            config["tie_word_embeddings"] = False
        writer.copy_side_files(folder, config)
        writer.add_side_files(layers, left)
    writer.write_text("qframe_report.json", report.to_json(timings=False))
    writer.write_text("quant_log.csv", report.to_csv(timings=False))
    return writer.finish(
        {
            "manifest_version": MANIFEST_VERSION,
            "qframe": qframe.__version__,
            "layout": job.layout.name,
            "recipe": job.recipe.model_dump(mode="json"),
            "plugins": plugins_used(job),
            "calibration": report.calibration,
            "events": [dataclasses.asdict(event) for event in report.events],
            "layers": {
                layer.name: layer_record(layer, outlines[layer.name]) for layer in report.layers
            },
            "divisions": {n: DivisionRecord.of(each) for n, each in report.divisions.items()},
        },
        look,
    )


def plugins_used(job: Job) -> list[dict[str, str]]:
    """Return which plugin provided each object of the run, with its version."""
    schemes = job.plan.schemes.values()
    inputs = {scheme.input_activations for scheme in schemes}
    formats = {s.format_name for s in schemes} | {s.format_name for s in inputs if s}
    used = [
        *((("layout", job.layout.name),) if job.layout.name != OWN else ()),
        ("rounder", job.method.rounder.name),
        *(("outlier handler", handler.name) for handler in job.method.handlers),
        *(("observer", name) for name in sorted(job.method.needs | job.plan.observers)),
        *(("number format", name) for name in sorted(formats)),
    ]
    if job.recipe.kv_cache_scheme is not None:
        used.append(("kv cache", job.recipe.kv_cache_scheme.method))
    records = []
    for kind, name in used:
        record = job.host.origin(kind, name)
        source = Path(record.source).name  # of a single file, where it lies is no one's business
        records.append(
            {
                "kind": kind,
                "name": name,
                "plugin": record.name,
                "source": source,
                "version": record.version,
            }
        )
    return records
