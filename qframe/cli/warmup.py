"""`qframe warmup`: compile the kernels of a network before anybody waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qframe.cli.command import Debug, Threads
from qframe.cli.generate import network_of
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_plain
from qframe.dispatch import AUTO

PROMPT_TOKENS, NEW_TOKENS = 64, 2  # many tokens at once, and one by one: either has its kernels


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
        progress.step(f"reading {PROMPT_TOKENS} tokens and writing {NEW_TOKENS}")
        measure({"": network}, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, rounds=1)
    print_plain(f"{folder} is ready: its kernels are compiled and kept")
