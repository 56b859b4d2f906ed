"""`qframe warmup`: compile the kernels of a network before anybody waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qframe.cli.command import Debug, Threads
from qframe.cli.generate import cache_of, network_of
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_plain
from qframe.dispatch import AUTO

PROMPT_TOKENS, NEW_TOKENS = 64, 2  # many tokens at once, and one by one: either has its kernels
WITH_CACHE = 320  # tokens of which some are codes, in a cache whose groups and window are usual


def warmup(
    folder: Annotated[Path, typer.Argument(help="A folder that qframe quantize wrote.")],
    *,
    kernels: Annotated[
        str, typer.Option("--kernels", metavar="BACKEND", help="Which kernels, or auto.")
    ] = AUTO,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compile what a quantized network runs on, so that its first answer comes at once.

    Example: qframe warmup OUT
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.speed import measure

        progress.step(f"loading {folder}")
        network = network_of(folder, kernels)
        cached = cache_of(folder, None) is not None
        prompt = WITH_CACHE if cached else PROMPT_TOKENS
        progress.step(f"reading {prompt} tokens and writing {NEW_TOKENS}")
        measure(
            {"": network},
            prompt_tokens=prompt,
            new_tokens=NEW_TOKENS,
            rounds=1,
            caches={"": lambda: cache_of(folder, None)} if cached else None,
        )
    print_plain(f"{folder} is ready: its kernels are compiled and kept")
