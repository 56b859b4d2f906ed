"""Interrupts of a run that keeps what it has done: the first ends it in order, the next at once."""

from __future__ import annotations

import _thread
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qframe.errors import LockedError, UnfinishedError
from qframe.launcher import launched

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LATER = 0.05  # seconds in which a finalizer may have ended


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first SIGINT or SIGTERM; the next one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    def lost(what: Any) -> None:
        """Interrupt once more, where the first one came while an object was finalized."""
        if what.exc_type is not None and issubclass(what.exc_type, KeyboardInterrupt):
            signal.signal(signal.SIGINT, stop)
            # Not now: what it raises would be dropped here as well.
            threading.Timer(_LATER, _interrupt).start()
        else:
            unraisable(what)

    # Who starts a program may have it ignore interrupts, as shells do with jobs in the background.
    unraisable = sys.unraisablehook
    before = {n: signal.getsignal(n) for n in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        sys.unraisablehook = lost
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            if handler is not None:  # one that Python does not know
                signal.signal(number, handler)


def _interrupt() -> None:
    """Send an interrupt to the main thread, which wakes it where it waits, if the system can."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextmanager
def resumable(out: Path, command: Sequence[str]) -> Iterator[None]:
    """Let errors and interrupts say how to go on, where blocks that are done are kept.

    command   the words that began the run
    """
    try:
        yield
    except (LockedError, UnfinishedError):  # say what to do on their own
        raise
    except BaseException as error:
        # Else nothing has begun, or it is the first process that keeps it.
        if "qframe.pipeline" in sys.modules and launched()[0] == 0:
            from qframe.unfinished import kept_blocks

            kept = kept_blocks(out)
            if kept is not None:
                error.add_note(f"{said(kept)} kept; to go on: {resuming(command)}")
        raise


def said(kept: tuple[int, int]) -> str:
    """Return in words how much is kept: how many blocks of how many."""
    done, total = kept
    if not done:
        return "the measured sensitivities are"
    return f"{done} of {total} blocks {'is' if done == 1 else 'are'}"


def resuming(command: Sequence[str]) -> str:
    """Return the command that goes on with a run, as a shell takes it.

    >>> resuming(["qframe", "quantize", "my model", "-o", "OUT", "--restart"])
    "qframe quantize 'my model' -o OUT --resume"
    """
    words = [word for word in command if word not in ("--resume", "--restart")]
    return shlex.join([*words, "--resume"])
