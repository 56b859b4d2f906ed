"""Runs a comparison again and again, and kills it each time: `killed.py POINT... -- ARGUMENTS`.

A point is a number of the file that is about to get its name (or just got it, for odd numbers), "t"
and seconds, or "-" for a run that is left alone. Each point has its own store: OUT in the arguments
stands for point.out beside this process; what it says goes to point.0.log. Points joined by "&" run
at the same time on one store.

The libraries are loaded once and every run is a fork, before torch has any threads.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Let this process be killed at a point."""
    if point.startswith("t"):
        timer = threading.Timer(float(point[1:]), kill)
        timer.daemon = True
        timer.start()
    elif point != "-":
        replace, last = os.replace, int(point)
        count = 0

        def counting(*args: object, **kwargs: object) -> None:
            nonlocal count
            if count >= last and last % 2 == 0:
                kill()
            replace(*args, **kwargs)  # type: ignore[arg-type]
            if count >= last - 1 and last % 2:
                kill()
            count += 2

        os.replace = counting  # type: ignore[assignment]


def start(point: str, store: str, log: str, arguments: list[str]) -> int:
    """Return the number of a process that runs the command."""
    child = os.fork()
    if child:
        return child
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arm(point)
    from qframe.cli import main

    code = 70
    try:
        main([store if argument == "OUT" else argument for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(points: list[str], arguments: list[str]) -> None:

    for joined in points:
        children = [
            start(point, f"{joined}.out", f"{joined}.{i}.log", arguments)
            for i, point in enumerate(joined.split("&"))
        ]
        states = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(joined, *states, flush=True)


if __name__ == "__main__":
    cut = sys.argv.index("--")
    run(sys.argv[1:cut], sys.argv[cut + 1 :])
