"""What a recipe would do to a network, without doing it: for `inspect` and `quantize --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from qframe.memory import (
    bits_per_weight,
    folder_size,
    layer_bits_per_weight,
    most_statistics_bytes,
    readable_bytes,
)
from qframe.peak import peak_memory
from qframe.report.table import PlanRow, coverage_text, facts, plan_table, stacked

if TYPE_CHECKING:
    from qframe.pipeline import Job


def plan_rows(job: Job) -> list[PlanRow]:
    """Return every matrix of the network, in its order of layers, then what else is left."""
    rows = []
    shape: tuple[int, ...]
    for name, layer in job.network.layers.items():
        shape = (layer.rows, layer.columns)
        if name in job.plan.schemes:
            rows.append(_quantized_row(job, name, shape))
        else:
            rows.append(PlanRow(name=name, shape=shape, what=job.plan.left[name]))
    for name, why in job.coverage.left.items():
        if name not in job.network.layers:
            shape = tuple(job.network.module.get_parameter(name).shape)
            rows.append(PlanRow(name=name, shape=shape, what=why))
    return rows


def _quantized_row(job: Job, name: str, shape: tuple[int, ...]) -> PlanRow:
    scheme = job.plan.schemes[name].describe()
    found = job.candidates
    if found is None or name in found.fixed:
        bits = layer_bits_per_weight(job, name)
        return PlanRow(name=name, shape=shape, what=scheme, bits_per_weight=bits)
    choices = [each.num_bits for each in found.schemes[name]]
    what = f"{scheme}, but with {', '.join(map(str, choices))} bits: to be chosen"
    least, most = found.range_of(name)
    return PlanRow(name=name, shape=shape, what=what, bits_per_weight=least, most=most)


def plan_screen(
    job: Job, threads: int, budget: int | None = None, *, all_layers: bool
) -> RenderableType:
    """Return the plan as a table, and what it covers and takes.

    budget   bytes of activations that wait in memory; None for all of them
    """
    lines = {"coverage": coverage_text(job.coverage)}
    if job.candidates is not None:
        lines["bits"] = (
            f"at most {job.candidates.target:g} bits per weight; which layer gets how many is "
            f"known only once its sensitivity has been measured, in the run"
        )
    if job.network.folder is not None:
        lines |= _predictions(job, threads, budget)
    if may_fold(job):
        lines["scales"] = (
            "those of inputs that norms or layers can divide by are not stored: bits and bytes are "
            "at most these; which ones is known only in the run, which tries it"
        )
    keeping = [handler.name for handler in job.method.handlers if getattr(handler, "keeps", False)]
    if keeping:
        lines["kept"] = (
            f"the columns that {keeping[0]} keeps come on top, with 2 bytes for each of their "
            f"weights where they are known from calibration; how many is not known before"
        )
    return stacked(plan_table(plan_rows(job), collapse=not all_layers), facts(lines))


def may_fold(job: Job) -> bool:
    """Return whether norms may take up scales that are counted as stored."""
    return job.recipe.fold_scales and job.method.scales


def _predictions(job: Job, threads: int, budget: int | None) -> dict[str, str]:
    """Return what the output will take on disk, and the run in memory."""
    size, peak = folder_size(job), peak_memory(job, threads, budget)
    parts = ", ".join(f"{readable_bytes(count)} {what}" for what, count in peak.items() if count)
    kept = most_statistics_bytes(job)
    most = "at most " if job.candidates or may_fold(job) else ""
    return {
        "output": f"{readable_bytes(size.total)}: {readable_bytes(size.quantized)} quantized "
        f"({most}{bits_per_weight(job):.3f} bits per weight), "
        f"{readable_bytes(size.carried)} as "
        f"stored, {readable_bytes(size.headers + size.others)} for the rest"
        + (f"; statistics take up to {readable_bytes(kept)} more" if kept else ""),
        "memory": f"about {readable_bytes(sum(peak.values()))} at the peak: {parts}",
    }


def _choices(job: Job, name: str) -> dict[str, Any]:
    """Return the candidates for a layer's num_bits, which is not known yet; {} where it is."""
    if job.candidates is None or name in job.candidates.fixed:
        return {}
    return {"candidate_bits": [scheme.num_bits for scheme in job.candidates.schemes[name]]}


def plan_record(job: Job, threads: int, budget: int | None = None) -> dict[str, Any]:
    """Return the plan as plain values; arguments as for `plan_screen`."""
    record: dict[str, Any] = {
        "recipe": job.recipe.model_dump(mode="json"),
        "coverage": {
            "line": job.coverage.line(),
            "parameters": job.coverage.parameters,
            "parameters_quantized": job.coverage.parameters_quantized,
            "matrix_fraction": job.coverage.matrix_fraction,
            "left": dict(job.coverage.left),
        },
        "layers": [
            {
                "name": name,
                "rows": job.network.layers[name].rows,
                "columns": job.network.layers[name].columns,
                "scheme": scheme.model_dump(mode="json"),
                "bits_per_weight": layer_bits_per_weight(job, name),
                **_choices(job, name),
            }
            for name, scheme in job.plan.schemes.items()
        ],
        "bits_per_weight": bits_per_weight(job),
    }
    if job.network.folder is not None:
        size, peak = folder_size(job), peak_memory(job, threads, budget)
        record["output_bytes"] = {
            "total": size.total,
            "weights": size.weights,
            "quantized": size.quantized,
            "carried": size.carried,
        }
        record["peak_memory_bytes"] = {**peak, "total": sum(peak.values())}
    return record
