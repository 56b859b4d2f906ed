"""What has become of the mutants of PTX, as docs/ptx_mutants.md.

    python benchmarks/ptx_mutants_table.py

It reads the records of ptx_mutants.py, and ptx_equivalent.toml, which says of survivors that
compute the same why they do.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "ptx_mutants.md"
CONFIDENCE = 0.95
ANY = ((0, 10**9),)  # line
HEAD = """# One-instruction mutants of the GPU kernels

Each kernel's PTX, for sm_90, is changed in one instruction: a comparison takes the bound in, an
operation becomes its opposite, operands change places, a number is one off, a sign or a rounding is
another one, a store or a barrier is left out. The cross-check has to notice: by a theorem, by
integers, by a finding of the checker, by a loop without end, or because another order of threads or
another architecture gives other bits.

There are {total:,} such mutants of {kernels} kernels, and {tried:,} of them were tried: a sample
of each kernel, drawn by a seed, its kinds of changes in proportion and at least one of each. A
mutant that computes the same in every call is called equivalent, and only with a reason, which is
below. Of the others {score:.1%} were killed. Were the samples drawn at random, the share of kills
among all mutants of a kernel would be, with {confidence:.0%} confidence, at least what stands under
"at least" (Clopper and Pearson, one-sided); for all together that is {least:.1%}. "by bits alone"
are those that broke no theorem, as a rounding that goes another way does not; what noticed them was
the comparison with the kernel for another architecture, or in another order of threads. Without it
the score is {without:.1%}.

The suite's draws were made stronger by what these samples had left alive, so for mutants that were
not in them the score is likely to be lower; "At first sight", below, says by how much. Kernels of
16 bits round their outputs to as many, which hides other roundings in between: what survives there
as "rn -> rz" is the same instruction as in the kernel for float32, whose bits tell.

| kernel | mutants | tried | killed | by bits alone | equivalent | survive | score | at least |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def reasons(sort: str = "same") -> list[dict[str, Any]]:
    text = (HERE / "ptx_equivalent.toml").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = tomllib.loads(text)[sort]
    return found


def reason_of(kernel: str, survivor: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """Return why a survivor computes the same; "" if nothing says so.

    What is said of a kernel holds for its twins that read 16 bits, too.
    """
    names = {kernel, re.sub(r"_b?float16$", "", kernel)}
    for each in known:
        if (
            any(fnmatch.fnmatch(name, pattern) for pattern in each["kernels"] for name in names)
            and re.fullmatch(each.get("text", ".*"), survivor["text"])
            and re.fullmatch(each.get("change", ".*"), survivor["change"])
            and any(first <= survivor["line"] <= last for first, last in each.get("lines", ANY))
        ):
            return str(each["why"])
    return ""


def least(killed: int, of: int) -> float:
    """Return the share of kills below which so many of them have a chance of 1 - CONFIDENCE."""
    low, high = 0.0, killed / of
    for _ in range(40):
        share = (low + high) / 2
        ways = ((math.comb(of, k), k) for k in range(killed, of + 1))
        chance = sum(n * share**k * (1 - share) ** (of - k) for n, k in ways)
        low, high = (low, share) if chance > 1 - CONFIDENCE else (share, high)
    return low


def lines(records: dict[str, Any]) -> Iterator[str]:
    known, survivors, same = reasons(), [], Counter[str]()
    for each in known:
        if "lines" in each and [records[name]["ptx"] for name in each["kernels"]] != each["ptx"]:
            raise SystemExit(f"{each['kernels']}: lines {each['lines']} are those of another PTX")
    rows, sums = [], Counter[str]()
    for name, record in records.items():
        dead = {check: len(each) for check, each in record["killed"].items()}
        killed, bits = sum(dead.values()), dead.get("variants_agree", 0)
        alive = []
        for each in record["survivors"]:
            why = reason_of(name, each, known)
            same[why] += 1
            if not why:
                alive.append(each)
                survivors.append((name, each))
        of = killed + len(alive)
        equivalent = len(record["survivors"]) - len(alive)
        tried = of + equivalent
        rows.append(
            f"| `{name}` | {record['of']:,} | {tried} | {killed} | {bits} | {equivalent} | "
            f"{len(alive)} | {killed / of:.0%} | {least(killed, of):.0%} |"
        )
        sums.update(total=record["of"], tried=tried, killed=killed, of=of, bits=bits)
        sums.update(equivalent=equivalent, alive=len(alive))
    yield HEAD.format(
        total=sums["total"],
        kernels=len(rows),
        tried=sums["tried"],
        score=sums["killed"] / sums["of"],
        least=least(sums["killed"], sums["of"]),
        without=(sums["killed"] - sums["bits"]) / sums["of"],
        confidence=CONFIDENCE,
    ).rstrip("\n")
    yield from rows
    yield (
        f"| all | {sums['total']:,} | {sums['tried']:,} | {sums['killed']:,} | {sums['bits']} | "
        f"{sums['equivalent']} | {sums['alive']} | {sums['killed'] / sums['of']:.1%} | "
        f"{least(sums['killed'], sums['of']):.1%} |"
    )
    yield "\n## At first sight\n"
    yield "What a seed's mutants came to before anything was done about those left alive.\n"
    yield "| seed | tried | killed | equivalent | survive | score |\n|--:|--:|--:|--:|--:|--:|"
    for each in reasons("seed"):
        alive = each["tried"] - each["killed"] - each["equivalent"]
        score = each["killed"] / (each["tried"] - each["equivalent"])
        yield (
            f"| {each['number']} | {each['tried']:,} | {each['killed']} | {each['equivalent']} | "
            f"{alive} | {score:.1%} |"
        )
    yield "\n## Survivors\n"
    yield "| kernel | line | instruction | change | remark |\n|---|--:|---|---|---|"
    seen = reasons("seen")
    for name, each in survivors:
        remark = reason_of(name, each, seen)
        yield f"| `{name}` | {each['line']} | `{each['text']}` | {each['change']} | {remark} |"
    yield "\n## Why mutants are equivalent\n"
    yield "| mutants | why |\n|--:|---|"
    for why, count in same.most_common():
        if why:
            yield f"| {count} | {why} |"
    yield "\n## Again\n"
    yield "```text"
    yield "python benchmarks/ptx_mutants.py --sample 60 --seed 1 --minutes 60"
    yield "python benchmarks/ptx_mutants.py few_4_bits_1   # all of one kernel"
    yield "python benchmarks/ptx_mutants.py --again        # what has survived"
    yield "python benchmarks/ptx_mutants_table.py"
    yield "```\n"
    yield "Each seed adds to what has been tried; a kernel with another PTX begins anew."


def main() -> None:
    records = json.loads((HERE / "ptx_mutants.json").read_text(encoding="utf-8"))
    DOCUMENT.write_text("\n".join(lines(records)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
