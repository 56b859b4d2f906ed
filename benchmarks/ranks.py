"""Several processes that do one run: what they save, and what becomes of it when one of them goes.

    python benchmarks/ranks.py MODEL [--rounds 5] [--moments 20]

Speed: one process with one thread, one with two, and two with a thread each, by turns; medians of
ratios of whole runs, start and reading included. Ends: one of two is killed, or stopped so that it
neither goes on nor ends; after how long the other has ended, and what it said. Moments: one of two
is killed at random moments of a run of a small Llama, which one process goes on with: every file
must be that of a run that was left alone. MODEL is a folder; fewer layers make it quick.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

TEXT = ["--num-calibration-samples", "32", "--max-seq-length", "512"]
FLAGS = ["-m", "gptq", "--group-size", "64", *TEXT]
SMALL = ["-m", "gptq", "--group-size", "32", "--num-calibration-samples", "70"]
SMALL += ["--max-seq-length", "128"]
LONGEST = 30  # seconds in which all ranks have to end when one is gone


def start(size: int, arguments: list[str], threads: int | None = None) -> list[subprocess.Popen]:
    """Start so many processes that share a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(size):
        own = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        own |= {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        limit = {} if threads is None else {"QFRAME_THREADS": str(threads)}
        found.append(
            subprocess.Popen(
                [sys.executable, "-m", "qframe", "quantize", *arguments],
                env={**os.environ, **(own if size > 1 else {}), **limit},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def finished(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for processes that have to succeed; return what they said."""
    said = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(said))
    return said


def contents(folder: Path) -> dict[str, bytes]:
    """Return file name -> bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def speed(model: str, work: Path, rounds: int) -> None:
    """Print ratios of seconds, by turns."""
    ways = {"1 x 1 thread": (1, 1), "1 x 2 threads": (1, 2), "2 x 1 thread": (2, 1)}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        seconds, files = {}, []
        for name, (size, threads) in ways.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            begun = time.perf_counter()
            finished(start(size, [model, *FLAGS, "-o", str(out)], threads))
            seconds[name] = time.perf_counter() - begun
            files.append(contents(out))
        if any(each != files[0] for each in files):
            raise SystemExit("files differ")
        if number:  # the first round compiles kernels and reads the disk
            for name in ways:
                ratios[name].append(seconds["1 x 1 thread"] / seconds[name])
    for name, (size, threads) in ways.items():
        found = statistics.median(ratios[name])
        cores = size * threads
        print(f"{name}: {found:.2f} times as fast as one thread, efficiency {found / cores:.2f}")


def ends(model: str, work: Path) -> None:
    """Print after how long the other one has ended, and what it said."""
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        for gone in (0, 1):
            out = work / f"{name} {gone}"
            processes = start(2, [model, *FLAGS, "-o", str(out)])
            while not any(out.parent.glob(f".{out.name}.qframe-unfinished/blocks/*.safetensors")):
                time.sleep(0.1)
            processes[gone].send_signal(number)
            begun = time.perf_counter()
            try:
                said = processes[1 - gone].communicate(timeout=2 * LONGEST)[1]
            except subprocess.TimeoutExpired:
                processes[1 - gone].kill()
                said = processes[1 - gone].communicate()[1]
            seconds = time.perf_counter() - begun
            processes[gone].kill()
            processes[gone].communicate()
            last = [line for line in said.splitlines() if line][-3:]
            verdict = "in time" if seconds <= LONGEST else "TOO LATE"
            print(f"rank {gone} {name}: {verdict}, exit code {processes[1 - gone].returncode}")
            print("    " + "\n    ".join(last))


def await_together(processes: list[subprocess.Popen], out: Path) -> None:
    """Wait until all ranks have come: those that are there would wait for others, by themselves."""
    while not out.with_name(f".{out.name}.qframe-unfinished").exists():
        if any(process.poll() is not None for process in processes):
            raise SystemExit("\n".join(process.communicate()[1] for process in processes))
        time.sleep(0.01)


def moments(work: Path, count: int, seed: int) -> None:
    """Kill one of two ranks at random moments, go on with one process, and compare."""
    from qframe.unfinished import kept_blocks
    from tests import tiny

    model = tiny.write_llama(work / "model", layers=24)
    arguments = [str(model), *SMALL]
    for _ in range(2):  # the first one compiles kernels
        running = start(2, [*arguments, "-o", str(work / "whole"), "--overwrite"])
        await_together(running, work / "whole")
        begun = time.perf_counter()
        finished(running)
        whole = time.perf_counter() - begun
    wanted = contents(work / "whole")
    rng, same = random.Random(seed), 0
    for number in range(count):
        out = work / f"moment {number}"
        processes = start(2, [*arguments, "-o", str(out)])
        await_together(processes, out)
        time.sleep(rng.uniform(0, whole))
        gone = processes[rng.randrange(2)]
        gone.kill()
        for process in processes:
            process.communicate()
        kept, ended = kept_blocks(out), out.exists()
        if not ended:
            finished(start(1, [*arguments, "-o", str(out), "--resume"]))
        equal = contents(out) == wanted
        same += equal
        state = "nothing kept" if kept is None else f"{kept[0]} of {kept[1]} blocks kept"
        state = "ended" if ended else state
        print(f"moment {number}: {state}, {'same' if equal else 'DIFFERENT'} bytes", flush=True)
        shutil.rmtree(out)
    print(f"{same} of {count} ended in the same bytes")


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.rounds:
            speed(options.model, work, options.rounds)
            ends(options.model, work)
        if options.moments:
            moments(work, options.moments, options.seed)


if __name__ == "__main__":
    main()
