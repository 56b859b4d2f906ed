"""Progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qframe.cli import progress as progress_module
from qframe.cli.progress import progress_shown
from qframe.report.layers import LayerReport
from qframe.walk import Progress


def block(number, of=4, **changes):
    layer = LayerReport(
        name="a", method="rtn", scheme="int4", rows=1, columns=1, bits_per_weight=4, **changes
    )
    return Progress(f"layers.{number - 1}", number, of, [layer], 1.5)


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress_module, "stderr", lambda: console)
    return stream


def test_a_terminal_gets_a_bar_that_starts_anew_with_each_step(terminal):
    with progress_shown() as progress:
        progress.step("first")
        progress.block(block(1))
        progress.step("second")
        progress.block(block(2))
    shown = terminal.getvalue()
    assert "layers.1" in shown
    assert "2 of 4 blocks" in shown


def test_elsewhere_there_are_lines(capsys):
    with progress_shown() as progress:
        progress.step("quantizing")
        progress.block(block(1, held_out_error=0.05))
        progress.block(block(2, of=2))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "quantizing"
    assert second.startswith("[1/4] layers.0: 1 layer, 1.5 s, held-out error up to 5.00 %;")
    assert third == "[2/2] layers.1: 1 layer, 1.5 s; 0 s left"


def test_lines_can_be_fewer(capsys):
    with progress_shown(every=2) as progress:
        for number in range(1, 5):
            progress.block(block(number))
    assert len(capsys.readouterr().err.splitlines()) == 2
