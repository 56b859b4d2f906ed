"""`qframe bench`: how fast a quantized network is beside full precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.generate import NO_KERNELS, network_of
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result
from qframe.kv_scheme import KV_PRESETS, KVCacheScheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from qframe.speed import Speed

QUANTIZED = "quantized"


def bench(
    folder: Annotated[
        Path, typer.Argument(help="A folder that qframe quantize wrote, or a Hugging Face folder.")
    ],
    *,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Tokens that are read.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens that are written.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Each network is timed so often, in turn.")
    ] = 5,
    kernels: Annotated[
        str,
        typer.Option("--kernels", metavar="BACKEND", help="Which kernels multiply, or auto."),
    ] = "auto",
    kv_scheme: Annotated[
        str | None,
        typer.Option(
            "--kv-scheme",
            metavar="NAME",
            help=f"Also with a KV cache that is quantized: {', '.join(KV_PRESETS)}.",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a quantized network on kernels, beside the same network in float32 and bfloat16.

    Example: qframe bench OUT --threads 1

    All take turns in one run; ratios are medians over the rounds. A time alone means little.
    """
    scheme = None if kv_scheme is None else KVCacheScheme.preset(kv_scheme)
    with progress_shown() as progress:
        progress.step("loading libraries")
        import torch

        from qframe.speed import measure

        torch.set_num_threads(threads or torch.get_num_threads())
        progress.step(f"loading {folder} several times")
        networks = _networks(folder, kernels)
        caches = {name: _own(each) for name, each in networks.items() if name.startswith(QUANTIZED)}
        if scheme is not None:
            caches |= _with_cache(networks, f"{kv_scheme} cache", scheme)
        progress.step(f"timing {len(networks)} networks, {rounds} rounds")
        speeds = measure(
            networks,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            caches=caches,
        )
    if as_json:
        print_json({"threads": torch.get_num_threads(), "networks": _records(speeds)})
        return
    _print(speeds, torch.get_num_threads())


def _networks(folder: Path, kernels: str) -> dict[str, nn.Module]:
    """Return the network in float32 and bfloat16, and on kernels if it is quantized."""
    import torch

    from qframe.manifest import MANIFEST
    from qframe.speed import unquantized

    network = network_of(folder, kernels)  # first: it is the one that can be refused
    plain = {
        "float32": unquantized(network_of(folder, NO_KERNELS)),
        "bfloat16": unquantized(network_of(folder, NO_KERNELS)).to(torch.bfloat16),
    }
    if not (folder / MANIFEST).is_file():
        return plain
    return {**plain, _described(network, kernels): network}


def _own(network: nn.Module) -> Callable[[], Any]:
    """Return what starts the caches that `qframe generate` takes."""
    from qframe.growing_cache import growing_cache

    return lambda: growing_cache(network)


def _with_cache(
    networks: dict[str, nn.Module], what: str, scheme: KVCacheScheme
) -> dict[str, Callable[[], Any]]:
    """Add the fastest network once more, and return what starts its caches, by its name."""
    from qframe.kv_attention import attend_to_codes
    from qframe.kv_cache import QuantizedKVCache

    name = next((each for each in networks if each.startswith(QUANTIZED)), "float32")
    network = networks[name]
    attend_to_codes(network)
    name = f"{name}, {what}"
    networks[name] = network
    return {name: lambda: QuantizedKVCache(scheme)}


def _described(network: nn.Module, asked: str) -> str:
    """Return the backends that a network runs on."""
    from qframe.kernel_layer import KernelLinear

    layers = [each for each in network.modules() if isinstance(each, KernelLinear)]
    used = sorted({name.partition("/")[2] for layer in layers for name in layer.kernels})
    return f"{QUANTIZED}, {' and '.join(used) or f'no kernels ({asked})'}"


def _records(speeds: dict[str, Speed]) -> dict[str, Any]:
    base = speeds["float32"]
    return {
        name: {
            **dataclasses.asdict(speed),
            "prefill_speed": speed.prefill_speed,
            "decode_speed": speed.decode_speed,
            "over_float32": speed.over(base),
            "over_bfloat16": speed.over(speeds["bfloat16"]),
        }
        for name, speed in speeds.items()
    }


def _print(speeds: dict[str, Speed], threads: int) -> None:
    from rich.text import Text

    from qframe.memory import readable_bytes
    from qframe.report.table import FAINT, figures, stacked, table, times

    columns = ("read/s", "x fp32", "x bf16", "written/s", "x fp32", "x bf16", "memory")
    shown = table("network", *columns)
    for name, speed in speeds.items():
        over32, over16 = speed.over(speeds["float32"]), speed.over(speeds["bfloat16"])
        shown.add_row(
            name,
            figures(speed.prefill_speed),
            times(over32[0]),
            times(over16[0]),
            figures(speed.decode_speed),
            times(over32[1]),
            times(over16[1]),
            readable_bytes(speed.nbytes),
        )
    first = next(iter(speeds.values()))
    legend = (
        f"Tokens a second: {first.prompt_tokens} read at once, {first.new_tokens} written one by "
        f"one, {threads} threads. Ratios are medians of {len(first.prefill)} rounds in turn. "
        f"memory: of weights, with what kernels lay out beside them; without the KV cache."
    )
    print_result(stacked(shown, Text(legend, style=FAINT)))
