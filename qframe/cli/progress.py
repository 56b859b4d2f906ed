"""Progress on stderr: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from qframe.cli.screen import note, stderr
from qframe.launcher import launched

if TYPE_CHECKING:
    from qframe.walk import Progress


class Display(Protocol):
    """Where a command says how far it is."""

    def step(self, line: str) -> None:
        """Say what begins now."""
        ...

    def block(self, done: Progress) -> None:
        """Say that a block is done."""
        ...


@contextmanager
def progress_shown(*, every: int = 1) -> Iterator[Display]:
    """Show progress until the end of the context.

    every   elsewhere than on a terminal, blocks for which there is one line

    Of several processes the first one shows it.
    """
    if launched()[0] > 0:
        yield Silence()
        return
    console = stderr()
    if not console.is_terminal:
        yield Lines(every)
        return
    from rich import progress

    with progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
    ) as bar:
        yield Bar(bar)


class _Clock:
    """Estimates how long the blocks to come will take."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def left(self, done: Progress) -> str:
        seconds = (time.perf_counter() - self._started) / done.done * (done.blocks - done.done)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s left" if minutes else f"{rest} s left"


class Bar:
    """A bar that starts anew with every step."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, state="")
        self._clock = _Clock()

    def step(self, line: str) -> None:
        """Print the line, and let the bar wait for the first block."""
        note(line)
        self._bar.reset(self._task, total=None, description="", state="")
        self._clock = _Clock()

    def block(self, done: Progress) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            total=done.blocks,
            completed=done.done,
            description=done.block,
            state=f"{done.done} of {done.blocks} blocks, {self._clock.left(done)}",
        )


class Silence:
    """Nothing."""

    def step(self, line: str) -> None:
        """Do nothing."""

    def block(self, done: Progress) -> None:
        """Do nothing."""


class Lines:
    """A line for every step and block."""

    def __init__(self, every: int = 1) -> None:
        self._every = every
        self._clock = _Clock()

    def step(self, line: str) -> None:
        """Print the line."""
        note(line)
        self._clock = _Clock()

    def block(self, done: Progress) -> None:
        """Print one line for a block."""
        from qframe.report.table import percent

        if done.done % self._every:
            return
        count = len(done.layers)
        line = f"[{done.done}/{done.blocks}] {done.block}: {count} layer{'s' if count > 1 else ''}"
        line += f", {done.seconds:.1f} s"
        errors = [m.held_out_error for m in done.layers if m.held_out_error is not None]
        if errors:
            line += f", held-out error up to {percent(max(errors))} %"
        fallen = sum("fallback" in layer.method for layer in done.layers)
        if fallen:
            line += f", {fallen} fell back to RTN"
        note(f"{line}; {self._clock.left(done)}")
