"""kill -9 at random moments of a run, and going on: every file must be the same, bit for bit.

    python benchmarks/killed_quantize.py --moments 20

Of each method one run is left alone and timed. Then, for each moment, a run is killed there and
gone on with; half of the runs that go on are killed, too, until one reaches the end. The network is
a small Llama with random weights, or --model. Every run is a fork, with the libraries loaded once.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

METHODS = ("gptq", "awq+gptq", "qronos")
FLAGS = ("--group-size", "32")


def run(arguments: list[str], log: Path, seconds: float | None = None) -> tuple[int, float]:
    """Run the command line in a fork; return how it ended, and after how many seconds.

    seconds   after which it is killed
    """
    begun = time.perf_counter()
    child = os.fork()
    if not child:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from qframe.cli import main

        code = 70
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - begun


def contents(folder: Path) -> dict[str, bytes]:
    """Return file name -> bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def killed(
    arguments: list[str], out: Path, log: Path, moment: float, again: random.Random | None
) -> str:
    """Kill a run and go on until one reaches the end; return what was kept each time.

    again   says when runs that go on are killed; None for not at all
    """
    from qframe.unfinished import kept_blocks, unfinished_folder

    code, _ = run([*arguments, "-o", str(out)], log, moment)
    told = []
    while code != 0:
        if code != -signal.SIGKILL:
            raise SystemExit(f"exit code {code}:\n{log.read_text()}")
        kept = kept_blocks(out)
        if kept is None and out.is_dir():  # it was done, and at clearing up or at its report
            shutil.rmtree(unfinished_folder(out), ignore_errors=True)
            return " ".join([*told, "all"])
        told.append("-" if kept is None else str(kept[0]))
        seconds = None if again is None or len(told) > 4 else again.uniform(0, moment + 1)
        code, _ = run([*arguments, "-o", str(out), "--resume"], log, seconds)
    return " ".join(told) or "was done before"


def main() -> None:
    """Compare every run that was killed with one that was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--blocks", type=int, default=8, help="of the small network")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401 - before any fork

    import qframe.cli.quantize
    import qframe.pipeline
    import qframe.run_identity  # noqa: F401
    from tests import tiny

    work = Path(tempfile.mkdtemp(prefix="killed-"))
    model = given.model or tiny.write_llama(work / "model", layers=given.blocks)
    different = 0
    for method in given.methods:
        arguments = ["quantize", str(model), "-m", method, *FLAGS]
        arguments += ["--num-calibration-samples", given.samples, "--max-seq-length", "128"]
        log = work / "log"
        for name in ("warm", "whole"):
            code, seconds = run([*arguments, "-o", str(work / name)], log)
            if code:
                raise SystemExit(log.read_text())
        whole = contents(work / "whole")
        print(f"{method}: {seconds:.1f} s when nothing stops it", flush=True)
        choice = random.Random(given.seed)
        for number in range(given.moments):
            moment = choice.uniform(0, seconds)
            out = work / f"{number}"
            told = killed(arguments, out, log, moment, choice if number % 2 else None)
            same = contents(out) == whole and not list(work.glob(f".{number}.*"))
            different += not same
            verdict = "the same bytes" if same else "DIFFERENT"
            print(f"  killed after {moment:.2f} s; blocks kept: {told}; {verdict}", flush=True)
            shutil.rmtree(out)
        for name in ("warm", "whole"):
            shutil.rmtree(work / name)
    shutil.rmtree(work)
    print(f"{different} of {given.moments * len(given.methods)} runs wrote something else")
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
