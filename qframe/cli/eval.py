"""`qframe eval`: how a quantized folder does, measured against full precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qframe.evaluation import Score
    from qframe.model import Network
    from qframe.report.table import ScoreRow


def evaluate(
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders that qframe quantize wrote.")
    ],
    reference: Annotated[
        Path, typer.Option("--reference", help="The full-precision folder they were made from.")
    ],
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="Text to score, as for quantize; topics means the half of Python's documentation "
            "that calibration never sees.",
        ),
    ] = "topics",
    window: Annotated[
        int | None,
        typer.Option("--window", min=2, help="Tokens that are scored together. Default: 512."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many windows. Default: all.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, KL divergence and agreement against full precision.

    Example: qframe eval OUT --reference MODEL

    The protocol is always printed with the numbers, for a perplexity means nothing without it.
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        import dataclasses

        from qframe.checkpoint import load
        from qframe.evaluation import evaluate as score
        from qframe.evaluation import windows_of
        from qframe.model import Network
        from qframe.report.table import facts, score_table, stacked
        from qframe.weights import ModelFolder

        networks = {str(out): load(out, dequantize=True) for out in outs}
        full = Network.from_folder(ModelFolder(reference))
        full.load(full.module, recurse=True)
        windows, protocol = windows_of(reference, dataset, length=window, limit=limit)
        count = len(networks) + 1
        progress.step(
            f"scoring {count} networks on {len(windows)} windows of {protocol.window} tokens"
        )
        scores = score(networks, full.module, windows, threads=threads)
    rows = _rows(scores, reference, full)
    if as_json:
        print_json(
            {
                "protocol": dataclasses.asdict(protocol),
                "networks": [dataclasses.asdict(row) for row in rows],
            }
        )
        return
    print_result(stacked(score_table(rows), facts({"protocol": protocol.line()})))


def _rows(scores: Mapping[str, Score], reference: Path, full: Network) -> list[ScoreRow]:
    """Return the rows of the table, full precision first; bits per weight are of linear layers."""
    from qframe.manifest import read_manifest
    from qframe.memory import folder_bytes, stored_bits_per_weight
    from qframe.report.table import ScoreRow
    from qframe.weights import ModelFolder

    rows = []
    for name, score in scores.items():
        folder = ModelFolder(name or reference)
        if name:
            records = read_manifest(folder)["layers"]
            sizes = {layer: int(r["rows"]) * int(r["columns"]) for layer, r in records.items()}
        else:
            sizes = {n: i.size for n, i in full.layers.items() if f"{n}.weight" in folder.tensors}
        size = folder_bytes(folder.path)
        rows.append(
            ScoreRow(
                name=name or f"full precision ({reference.name})",
                perplexity=score.perplexity,
                perplexity_stderr=score.perplexity_stderr,
                kl_mean=score.kl_mean if name else None,
                kl_p99=score.kl_p99 if name else None,
                top1=score.top1 if name else None,
                bits_per_weight=stored_bits_per_weight(folder, sizes),
                weights_bytes=size["weights"],
                folder_bytes=size["total"],
            )
        )
    return rows
