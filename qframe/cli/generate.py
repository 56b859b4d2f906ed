"""`qframe generate`: text from a quantized folder, on kernels."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.progress import progress_shown
from qframe.cli.screen import note, print_json, warn
from qframe.dispatch import AUTO
from qframe.errors import RecipeError
from qframe.kv_scheme import KV_PRESETS, KVCacheScheme

if TYPE_CHECKING:
    from torch import nn

NO_KERNELS = "none"  # of --kernels
NO_CACHE = "none"  # of --kv-scheme


def generate(
    folder: Annotated[
        Path, typer.Argument(help="A folder that qframe quantize wrote, or a Hugging Face folder.")
    ],
    prompt: Annotated[str, typer.Argument(help="What to go on from; - reads it from stdin.")],
    *,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many.")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0, help="0 takes the likeliest token each time."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of tokens that are drawn.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the chat template.")
    ] = False,
    kernels: Annotated[
        str,
        typer.Option(
            "--kernels",
            metavar="BACKEND",
            help=f"Which kernels multiply: a backend, auto, or {NO_KERNELS}: weights are "
            "dequantized once.",
        ),
    ] = "auto",
    kv_scheme: Annotated[
        str | None,
        typer.Option(
            "--kv-scheme",
            metavar="NAME",
            help=f"Quantize the KV cache: {', '.join(KV_PRESETS)}, or {NO_CACHE}. "
            "Default: what the recipe of the folder says.",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a quantized network.

    Example: qframe generate OUT "The three primary colours are"

    The text goes to stdout as it comes; how fast it came is said on stderr.
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        import torch

        from qframe.generation import generate as go_on
        from qframe.kv_attention import attend_to_codes

        if threads is not None:
            torch.set_num_threads(threads)
        progress.step(f"loading {folder}")
        network = network_of(folder, kernels)
        cache = cache_of(folder, kv_scheme)
        if cache is not None and kernels != NO_KERNELS:
            attend_to_codes(network)
    text = sys.stdin.read() if prompt == "-" else prompt
    made = go_on(
        network,
        folder,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        cache=cache,
        show=None if as_json else _show,
    )
    if as_json:
        print_json(dataclasses.asdict(made))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    note(
        f"{made.prompt_tokens} tokens read at {made.prefill_speed:.3g} a second, "
        f"{len(made.tokens)} written at {made.decode_speed:.3g} a second"
    )


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def network_of(folder: Path, kernels: str) -> nn.Module:
    """Return the network of a folder, quantized or not; warn of layers that no kernel serves.

    Raises what `qframe.load` raises, and RecipeError for a backend where nothing is quantized.
    """
    from qframe.checkpoint import load
    from qframe.manifest import MANIFEST
    from qframe.model import Network
    from qframe.weights import ModelFolder

    if (folder / MANIFEST).is_file():
        if kernels == NO_KERNELS:
            return load(folder, dequantize=True)
        network = load(folder, kernels=kernels)
        _warn(network)
        return network
    if kernels not in (AUTO, NO_KERNELS):
        raise RecipeError(
            f"{folder} is not quantized, so no kernels of {kernels!r} can multiply with its codes; "
            f"leave out --kernels"
        )
    full = Network.from_folder(ModelFolder(folder))
    full.load(full.module, recurse=True)
    return full.module.eval()


def _warn(network: nn.Module) -> None:
    """Say which layers are dequantized in every call, and why."""
    from qframe.kernel_layer import without_kernels
    from qframe.report.table import some

    left = without_kernels(network)
    for reason in sorted(set(left.values())):
        names = [name for name, why in left.items() if why == reason]
        warn(
            f"{len(names)} layers have no kernel and are dequantized in every call, which is slow "
            f"(--kernels {NO_KERNELS} does it once): {some(names)}: {reason}"
        )


def cache_of(folder: Path, asked: str | None) -> Any:
    """Return an empty cache, as asked or as the folder's recipe says; None: not quantized."""
    from qframe.kv_cache import QuantizedKVCache
    from qframe.manifest import MANIFEST, parse_manifest
    from qframe.weights import ModelFolder

    if asked == NO_CACHE:
        return None
    if asked is not None:
        return QuantizedKVCache(KVCacheScheme.preset(asked))
    if not (folder / MANIFEST).is_file():
        return None
    if parse_manifest(ModelFolder(folder)).recipe.kv_cache_scheme is None:
        return None
    return QuantizedKVCache.of_folder(folder)
