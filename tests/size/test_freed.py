"""Garbage is looked for where it may be worth the time, and what is freed goes back."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from qframe import freed, model
from qframe.model import build
from qframe.weights import ModelFolder


@pytest.fixture
def looked(monkeypatch):
    """How often garbage was looked for, since nobody has so far."""
    times = []
    monkeypatch.setattr(freed, "_tidied", -freed.WORTH)
    monkeypatch.setattr(gc, "collect", lambda: times.append(1))
    return times


def test_garbage_is_looked_for_once_and_then_where_a_process_has_grown(looked):
    freed.tidy_up()
    assert len(looked) == 1
    freed.tidy_up()
    assert len(looked) == 1
    grown = np.ones(3 * freed.WORTH, np.uint8)
    freed.tidy_up()
    assert len(looked) == 2
    del grown
    freed.tidy_up()
    assert len(looked) == 2


FREE = """
import numpy as np
import psutil
from qframe import freed

for told in (False, True):
    if told:
        freed.hand_back_large()
    for _ in range(3):
        piece = np.ones(16 << 20, np.uint8)
        before = psutil.Process().memory_info().rss
        del piece
        went = before - psutil.Process().memory_info().rss
    print(went)  # with the last one
"""


@pytest.mark.skipif(freed._library() is None, reason="the C library is not glibc")
def test_what_was_freed_in_large_pieces_is_the_systems_again():
    """After pieces of 16 MiB were freed, glibc keeps the next one, unless told otherwise.

    In a process of its own: where there are holes from before, they are used, and stay.
    """
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True)
    kept, handed_back = map(int, done.stdout.split())
    assert kept < 8 << 20 < handed_back


BUILD = """
import sys
from pathlib import Path
from qframe.freed import hand_back_large
from qframe.model import build
from qframe.weights import ModelFolder

def private():
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024

hand_back_large()
build(ModelFolder(sys.argv[1]))
before = private()
network = build(ModelFolder(sys.argv[2]))
print(private() - before)
"""


def test_small_pieces_are_handed_back_while_a_network_is_built_and_no_longer(
    tiny_llama, monkeypatch
):
    told = []

    class Library:
        def mallopt(self, what, value):
            told.append(value)

    make = model._meta  # of each parameter

    def seen(parameter):
        if told[-1:] != ["built"]:
            told.append("built")
        return make(parameter)

    monkeypatch.setattr(freed, "_library", Library)
    monkeypatch.setattr(model, "_meta", seen)
    monkeypatch.setattr(freed, "_handing_back", False)
    build(ModelFolder(tiny_llama))
    freed.hand_back_large()
    build(ModelFolder(tiny_llama))
    assert told == ["built", freed.LARGE, freed.LARGE, freed.SMALL, "built", freed.LARGE]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory on Linux")
def test_a_network_is_built_without_room_for_its_weights(tmp_path, wide, tiny_llama):
    """Its parameters come and go, one by one; memory that is not used counts for a limit, too.

    Where holes are left, that was seen in every other process.
    """
    folder, weights = wide(tmp_path / "wide")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tiny_llama), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < weights // 16
