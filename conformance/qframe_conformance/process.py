"""One process in which a plugin is contained: started, listened to, and ended whatever it does.

A `Place` has one after another: the same for job after job, until one of them does not come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from qframe.errors import PluginError

LOADING = 300.0  # seconds for libraries and the plugin
_DYING = 3.0  # seconds in which a process may say where it hung
_GLANCE = 0.2  # seconds between looks at whether a process is alive
_KEPT = 1 << 16  # characters of stderr, from its end
_LIMITS = ("QFRAME_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)


class Contained:
    """One process, from its start to its end, which `end` brings about, of all that it started.

    seconds   how long it may be silent at a job
    threads   that it may compute on; None: as many as this process
    """

    def __init__(self, seconds: float, threads: int | None = None) -> None:
        self._seconds = seconds
        self._case = 0  # of the scenario that has begun
        self._process = subprocess.Popen(
            # -P: a file torch.py in the current folder is not torch.
            [sys.executable, "-P", "-X", "faulthandler", "-m", "qframe_conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env=None if threads is None else {**os.environ, **dict.fromkeys(_LIMITS, str(threads))},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._stderr = ""
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._read, self._drain)
        ]
        for thread in self._threads:
            thread.start()

    def do(self, job: Mapping[str, Any], hear: Callable[[Mapping[str, Any]], None]) -> str | None:
        """Give messages to `hear` until a job is done; return what went wrong, None for nothing."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code says more
            stdin = _pipe(self._process.stdin)
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        allowed, self._case = LOADING, 0
        while True:
            line = self._next(time.monotonic() + allowed)
            if line is None:
                return self._ended()
            if not line:
                return self._silent(allowed)
            try:
                message = json.loads(line)
            except ValueError:
                return f"wrote into the suite's own channel: {line[:80]!r}"
            if "done" in message:
                return None
            self._case = 0 if "begins" in message else self._case + ("tick" in message)
            hear(message)
            allowed = self._seconds

    def end(self) -> None:
        """End the process and all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except AttributeError:  # no process groups on Windows
            self._process.kill()
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of a job that it has not read
            _pipe(self._process.stdin).close()
        for thread in self._threads:
            thread.join(_DYING)

    def _next(self, until: float) -> str | None:
        """Return the next line; None when the process has ended, "" when it is silent."""
        while True:
            ended = self._process.poll() is not None
            try:
                return self._lines.get(timeout=_GLANCE)
            except queue.Empty:
                if ended:  # though a copy of it, left behind by a fork, may keep the pipe open
                    return None
                if time.monotonic() > until:
                    return ""

    def _silent(self, allowed: float) -> str:
        """Ask a process that does not come back where it is, and end it."""
        if hasattr(os, "killpg"):
            self._process.send_signal(signal.SIGABRT)  # faulthandler says where it is
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING)
        self.end()
        return f"did not come back within {allowed:g} s{self._where()}"

    def _ended(self) -> str:
        """Say how a process ended that should not have."""
        try:
            code = self._process.wait(_DYING)
        except subprocess.TimeoutExpired:
            self.end()
            return f"closed the suite's own channel{self._where()}"
        self.end()
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the system does so when memory is short)" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{hint}{self._where()}"
        raised = self._stderr.rpartition("Traceback (most recent call last):")[2].strip()
        last = f": {raised.splitlines()[-1]}" if raised and code == 1 else ""
        return f"the process ended with exit code {code}{last}{self._where()}"

    def _where(self) -> str:
        """Return in which case it was, and where in the plugin."""
        return (f", in case {self._case}" if self._case else "") + self._place()

    def _place(self) -> str:
        """Return where the plugin was, as faulthandler tells it."""
        for thread in self._stderr.split("(most recent call first):")[1:]:
            frames = _FRAME.findall(thread.partition("\n\n")[0])
            suite = [i for i, (file, _, _) in enumerate(frames) if "qframe_conformance" in file]
            if not suite:  # a thread of some library
                continue
            calls = frames[: suite[0]]
            for file, line, function in [f for f in calls if not _of_a_library(f[0])] or calls[-1:]:
                return f", in {function} at {file}:{line}"
        return ""

    def _read(self) -> None:
        """Queue the messages, and None when there are no more."""
        with _pipe(self._process.stdout) as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def _drain(self) -> None:
        """Keep the end of what is written to stderr."""
        with _pipe(self._process.stderr) as stream:
            while text := stream.read(1 << 12):
                self._stderr = (self._stderr + text)[-_KEPT:]


class Place:
    """Where jobs are done, one at a time: in one process, and in a new one after one that failed.

    Leaving it ends the process, whatever it does. The arguments are those of `Contained`.
    """

    def __init__(self, seconds: float, threads: int | None = None) -> None:
        self._seconds, self._threads = seconds, threads
        self._process: Contained | None = None
        self._left = False
        self._lock = threading.Lock()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._left = True
            if self._process is not None:
                self._process.end()

    def do(self, job: Mapping[str, Any], hear: Callable[[Mapping[str, Any]], None]) -> str | None:
        """Do a job as `Contained.do` does it. Raises PluginError once the place was left."""
        with self._lock:
            if self._left:
                raise PluginError("the processes of the suite were ended")
            if self._process is None:
                self._process = Contained(self._seconds, self._threads)
            process = self._process
        wrong = process.do(job, hear)
        if wrong is not None:
            process.end()
            self._process = None
        return wrong


def _of_a_library(file: str) -> bool:
    """Whether a file is Python's or an installed package's, and not the plugin's author's."""
    return "site-packages" in file or file.startswith(sysconfig.get_path("stdlib"))


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:  # it was asked for
        raise PluginError("the process has no pipe")
    return stream
