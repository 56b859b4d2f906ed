"""`qframe eval`: how a quantized folder does, measured against full precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result
from qframe.errors import RecipeError
from qframe.kv_scheme import KV_CHUNK, KV_PRESETS, KVCacheScheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from qframe.evaluation import Score
    from qframe.kv_cache import CachedNetwork
    from qframe.model import Network
    from qframe.report.table import ScoreRow

NO_CACHE = "none"  # of --kv-scheme: score without one, also where the recipe has a scheme


def evaluate(
    outs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="OUT...",
            help="Folders that qframe quantize wrote; none are needed beside --kv-scheme.",
            show_default=False,
        ),
    ] = None,
    *,
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
    kv_scheme: Annotated[
        str | None,
        typer.Option(
            "--kv-scheme",
            metavar="NAME",
            help=f"Score with a quantized KV cache, full precision as well: {', '.join(KV_PRESETS)}"
            f", or {NO_CACHE}. Default: what the recipe of each folder says.",
        ),
    ] = None,
    kv_chunk: Annotated[
        int,
        typer.Option(
            "--kv-chunk",
            min=1,
            help="Tokens that are read through a KV cache at a time; those of a chunk see each "
            "other as they came. With 1 it is as when generating.",
        ),
    ] = KV_CHUNK,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, KL divergence and agreement against full precision.

    Example: qframe eval OUT --reference MODEL

    The protocol is always printed with the numbers, for a perplexity means nothing without it.
    """
    asked = None if kv_scheme in (None, NO_CACHE) else KVCacheScheme.preset(str(kv_scheme))
    if not outs and asked is None:
        raise RecipeError("nothing to score: give folders, or a KV cache with --kv-scheme")
    with progress_shown() as progress:
        progress.step("loading libraries")
        import dataclasses

        from qframe.evaluation import evaluate as score
        from qframe.evaluation import windows_of
        from qframe.model import Network
        from qframe.report.table import facts, score_table, stacked
        from qframe.weights import ModelFolder

        candidates = [_of_folder(out, asked, kv_scheme, kv_chunk) for out in outs or ()]
        full = Network.from_folder(ModelFolder(reference))
        full.load(full.module, recurse=True)
        if asked is not None:
            name = f"full precision ({reference.name})"
            candidates.append(_candidate(name, reference, full.module, asked, kv_chunk))
        windows, protocol = windows_of(reference, dataset, length=window, limit=limit)
        if any(each.cached for each in candidates):
            protocol = dataclasses.replace(protocol, kv_chunk=kv_chunk)
        progress.step(
            f"scoring {len(candidates) + 1} networks on {len(windows)} windows of "
            f"{protocol.window} tokens"
        )
        networks = {each.name: each.cached or each.network for each in candidates}
        scores = score(networks, full.module, windows, threads=threads)
    rows = _rows(scores, candidates, reference, full)
    if as_json:
        print_json(
            {
                "protocol": dataclasses.asdict(protocol),
                "networks": [dataclasses.asdict(row) for row in rows],
            }
        )
        return
    print_result(
        stacked(score_table(rows), facts({"protocol": protocol.line(), **_caches(candidates)}))
    )


@dataclass(frozen=True)
class _Candidate:
    """A network to score: its name in the table, its files, and how its KV cache is stored.

    cached   the network behind a quantized KV cache; None without one
    """

    name: str
    folder: Path
    network: nn.Module
    scheme: KVCacheScheme | None
    cached: CachedNetwork | None


def _of_folder(
    out: Path, asked: KVCacheScheme | None, kv_scheme: str | None, chunk: int
) -> _Candidate:
    """Return what is in a folder that qframe wrote, with the cache of its recipe or as asked."""
    from qframe.checkpoint import load
    from qframe.manifest import read_manifest
    from qframe.weights import ModelFolder

    network = load(out, dequantize=True)
    scheme = asked
    if kv_scheme is None:
        kept = read_manifest(ModelFolder(out))["recipe"].get("kv_cache_scheme")
        scheme = kept and KVCacheScheme.parse(kept, f"{out}: kv_cache_scheme")
    return _candidate(str(out), out, network, scheme, chunk)


def _candidate(
    name: str, folder: Path, network: nn.Module, scheme: KVCacheScheme | None, chunk: int
) -> _Candidate:
    if scheme is None:
        return _Candidate(name, folder, network, None, None)
    from qframe.host import Host
    from qframe.kv_cache import CachedNetwork, QuantizedKVCache

    host = Host.discover()
    cached = CachedNetwork(network, lambda: QuantizedKVCache(scheme, host=host), chunk)
    return _Candidate(f"{name}, KV cache {scheme.bits}", folder, network, scheme, cached)


def _caches(candidates: Sequence[_Candidate]) -> dict[str, str]:
    """Return a line for each scheme of KV caches: what it is, and what it takes."""
    from qframe.memory import readable_bytes

    lines = {}
    for each in candidates:
        if each.scheme is not None and each.cached is not None and each.cached.memory is not None:
            memory = each.cached.memory
            lines[each.scheme.describe()] = (
                f"{each.scheme.describe()}; {memory.tokens} tokens take "
                f"{readable_bytes(memory.promised)} of {readable_bytes(memory.nbytes_16bit)} in a "
                f"network of 16 bits"
            )
    return {"KV cache": "\n".join(lines.values())} if lines else {}


def _rows(
    scores: Mapping[str, Score],
    candidates: Sequence[_Candidate],
    reference: Path,
    full: Network,
) -> list[ScoreRow]:
    """Return the rows of the table, full precision first; bits per weight are of linear layers."""
    from qframe.manifest import MANIFEST, read_manifest
    from qframe.memory import folder_bytes, stored_bits_per_weight
    from qframe.report.table import ScoreRow
    from qframe.weights import ModelFolder

    rows, by_name = [], {each.name: each for each in candidates}
    for name, score in scores.items():
        folder = ModelFolder(by_name[name].folder if name else reference)
        cached = by_name[name].cached if name else None
        memory = None if cached is None else cached.memory
        if (folder.path / MANIFEST).is_file():
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
                kv_cache=None if memory is None else memory.ratio,
            )
        )
    return rows
