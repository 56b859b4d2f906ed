"""Changed files, for minutes, for everything that reads what somebody else may have written.

    python benchmarks/fuzz.py --minutes 10

Each loader of tests/hostile/loaders.py gets so many minutes of files with changed bytes or changed
JSON. It may read them, or raise a QframeError with a message; anything else is a finding, which is
printed with its seed: other errors, more than 20 seconds, 4 GB of memory, a file written elsewhere.
Ends with an error when there is one. Seeds go on where the last run ended, with --first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hostile.loaders import LOADERS, one_case


def main() -> None:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    found = []
    for name in arguments.only or LOADERS:
        loader, seed = LOADERS[name], arguments.first
        with tempfile.TemporaryDirectory() as place:
            seed_folder = Path(place) / "sound" / "folder"
            seed_folder.parent.mkdir()
            loader.seed(seed_folder)
            (Path(place) / "scratch").mkdir()
            loader.load(seed_folder)  # compiles kernels, which may take longer than a case should
            end = time.monotonic() + 60 * arguments.minutes
            while time.monotonic() < end:
                wrong = one_case(loader, seed_folder, Path(place) / "scratch", seed)
                if wrong:
                    found.append(f"{name}, seed {seed}: {wrong}")
                    print(found[-1], flush=True)
                seed += 1
        print(f"{name}: {seed - arguments.first} cases", flush=True)
    if found:
        raise SystemExit(f"{len(found)} findings")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each loader")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", action="append", choices=list(LOADERS), help="repeat")
    return parser.parse_args()


if __name__ == "__main__":
    main()
