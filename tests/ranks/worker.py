"""A process of several: makes a folder for each recipe, or says what is wrong.

Not a test; what starts it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import qframe
from qframe import ranks
from qframe.errors import QframeError
from qframe.parallel import default_threads
from qframe.walk import Progress


class AnythingError(Exception):
    """Ends a run as anything might."""


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    for number, run in enumerate(plan["runs"]):
        try:
            quantize(plan, run, Path(plan["out"]) / str(number), rank)
        except (AnythingError, QframeError) as error:
            sys.stderr.write(f"run {number}: {type(error).__name__}: {error}\n")


def quantize(plan: dict[str, Any], run: dict[str, Any], out: Path, rank: int) -> None:
    def progress(done: Progress) -> None:
        if [rank, done.done] == run.get("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if [rank, done.done] == run.get("stopped"):
            late = f"sleep {run['until']}; kill -9 {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", late], stderr=subprocess.DEVNULL)
            os.kill(os.getpid(), signal.SIGSTOP)
        if [rank, done.done] == run.get("slow"):
            time.sleep(run["until"])
        if [rank, done.done] == run.get("failed"):
            raise AnythingError("which it was")

    ranks.GONE = run.get("gone", ranks.GONE)
    fields = dict(run["recipe"])
    if rank == 1:
        fields |= run.get("elsewhere", {})
    qframe.quantize(
        plan["model"],
        fields,
        out=out,
        progress=progress,
        threads=default_threads() + rank,
        **run.get("options", {}),
    )


if __name__ == "__main__":
    main()
