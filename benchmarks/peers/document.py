"""Writes docs/peers.md from results.json: the table, and a note on everything that did not hold.

Numbers come from the results; what they mean was read in the libraries' sources and stands here.
This module imports nothing but the standard library, so that a test can compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = {
    "rtn": "qframe rtn",
    "gptq": "qframe gptq",
    "compressed-tensors": "compressed-tensors RTN",
    "llmcompressor-gptq": "llm-compressor GPTQ",
    "torchao": "torchao intx",
    "quanto": "quanto qint8",
    "quanto-zeropoint": "quanto qint2/4, zeropoint=True",
    "bitsandbytes": "bitsandbytes int8",
    "hqq-start": "HQQ's first grid",
}
"""Rounder -> what its column is called."""


@dataclass(frozen=True)
class Note:
    """What was found out about cells of the matrix.

    checks, libraries   which cells
    extreme             of the layers with subnormal weights
    """

    checks: tuple[str, ...]
    libraries: tuple[str, ...]
    text: str
    extreme: bool = False


PEERS = tuple(name for name in COLUMNS if name not in ("rtn", "gptq"))

NOTES = (
    Note(
        ("non_finite",),
        PEERS,
        "A NaN or an infinity in the weight raises no error: codes come back. No library promises "
        "otherwise. A NaN is not lost: the scale of its group, row or block becomes NaN, and all "
        "values decoded with it (experiments `*_nan`). Who looks at decoded weights sees it; who "
        "looks at codes does not. qframe's contract asks for an error.",
    ),
    Note(
        ("answers",),
        ("torchao",),
        "Groups of a single column, PerGroup(1), end in a RuntimeError about shapes: no dimension "
        "is left to reduce, and `torch.amin` over no dimension reduces all of them (experiment "
        "`torchao_groups_of_one`). All other groups that divide the row are served. The adapter "
        "turns the error into UnsupportedError, which the check does not accept for a scheme that "
        "is declared.",
    ),
    Note(
        ("coverage", "half_step", "scheme_scale", "scale_equivariance", "fixed_point"),
        ("quanto-zeropoint",),
        "Groups whose weights have one sign. MaxOptimizer takes max - min without extending the "
        "range to 0. With the float shift that is the default this is right: every code is the "
        "nearest one (experiment `quanto_nearest`). With zeropoint=True the shift is rounded and "
        "clamped to the codes, so the group is cut off (experiment `quanto_one_sign`); the scale "
        "of a constant group is 0, and the group decodes to 0. The option's documentation says "
        "that it may reduce a model's performance. Where groups hold weights of both signs, as "
        "they mostly do, nothing of this happens.",
    ),
    Note(
        ("scheme_scale", "scale_equivariance"),
        ("hqq-start",),
        "On purpose, as comments in the source say: no scale is below 1 / 20000, and where max - "
        "min is at most 1e-4 the scale is 1, which makes the group a constant. Layers of weights "
        "about 2^-10 lose accuracy with 8 bits, layers about 2^-14 with 4 (experiment "
        "`hqq_small_weights`); weights of ordinary size are not touched.",
    ),
    Note(
        ("scheme_scale",),
        ("compressed-tensors", "llmcompressor-gptq"),
        "A group of weights so small that its scale underflows to 0 gets 2^-23, which is meant "
        "for groups of zeros, and decodes to zeros.",
        extreme=True,
    ),
    Note(
        ("gptq_residual",),
        ("llmcompressor-gptq",),
        "No fault: with subnormal weights the quotient (w - q) / d underflows, an intermediate "
        "result for which theorem B3.g, which counts the underflows of sums, has no term. With "
        "its arithmetic set to float64 the same solver keeps the bound.",
        extreme=True,
    ),
    Note(
        ("packs", "sign_symmetry"),
        ("quanto",),
        "The scale of a subnormal row, absmax / 127, is rounded so coarsely that w / s passes 127; "
        "quanto then uses code -128, which the restricted rule does not have.",
        extreme=True,
    ),
    Note(
        ("half_step",),
        ("bitsandbytes",),
        "127 / absmax overflows where absmax is below 2^-121; on this processor the row becomes "
        "zeros.",
        extreme=True,
    ),
)


def note_of(check: str, library: str, *, extreme: bool = False) -> int | None:
    """Return the number of the note on a cell, None where nobody has written one."""
    for number, note in enumerate(NOTES, 1):
        if check in note.checks and library in note.libraries and note.extreme == extreme:
            return number
    return None


# The document ---------------------------------------------------------------------------------


def render(results: Mapping[str, Any]) -> str:
    """Return docs/peers.md."""
    used = used_notes(results)
    renumbered = {old: new for new, old in enumerate(used, 1)}
    parts = [
        HEAD.format(seeds=results["seeds"], suite=results["suite"], versions=versions(results)),
        matrix(results, renumbered),
        READING,
        "## What did not hold\n",
        *(
            note_text(number, results, renumbered)
            for number in used
            if not NOTES[number - 1].extreme
        ),
        EXTREME,
        *(note_text(number, results, renumbered) for number in used if NOTES[number - 1].extreme),
        EXPERIMENTS,
        *(experiment_text(each) for each in results["experiments"]),
        "## The checks\n",
        promises(results),
        LIMITS,
    ]
    return "\n".join(parts).rstrip() + "\n"


def used_notes(results: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the notes whose cells did not hold, in the order of NOTES."""
    found = set()
    for extreme, part in ((False, results["ordinary"]), (True, results["extreme"])):
        for library, checks in part.items():
            for check, cell in checks.items():
                if cell["violated"]:
                    found.add(note_of(check, library, extreme=extreme))
    return sorted(number for number in found if number is not None)


def versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def matrix(results: Mapping[str, Any], renumbered: Mapping[int, int]) -> str:
    """Return the table: a row for each check, a column for each rounder."""
    lines = [row(["check", *COLUMNS.values()]), row(["---"] * (len(COLUMNS) + 1))]
    for check in results["promises"]:
        tested = [cell(results, library, check, renumbered) for library in COLUMNS]
        lines.append(row([f"`{check}`", *tested]))
    return "\n".join(lines) + "\n"


def row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def cell(
    results: Mapping[str, Any], library: str, check: str, renumbered: Mapping[int, int]
) -> str:
    """Return what the table says of one library and one check."""
    found = results["ordinary"][library].get(check)
    if found is None:
        return "n/a"
    if not found["violated"]:
        return "held" if found["ratio"] is None else f"held {found['ratio']:.2f}"
    text = f"**violated** in {found['violated']} of {found['scenarios']}"
    note = note_of(check, library)
    if note is None:
        return text
    return f"{text} [[{renumbered[note]}]](#note-{renumbered[note]})"


def note_text(number: int, results: Mapping[str, Any], renumbered: Mapping[int, int]) -> str:
    """Return a note, its figures, and the command that shows each cell."""
    note, new = NOTES[number - 1], renumbered[number]
    part = results["extreme" if note.extreme else "ordinary"]
    lines = [f"### Note {new}\n\n{note.text}\n"]
    for library in note.libraries:
        for check in note.checks:
            found = part[library].get(check)
            if found is None or not found["violated"]:
                continue
            flag = " --extreme" if note.extreme else ""
            command = f"python benchmarks/peer_matrix.py --library {library} --check {check}{flag}"
            lines.append(f"- {COLUMNS[library]}, `{check}`: {figures(found)}  \n  `{command}`")
    return "\n".join(lines) + "\n"


def figures(found: Mapping[str, Any]) -> str:
    """Return how much was violated."""
    text = f"violated in {found['violated']} of {found['scenarios']} scenarios"
    ratio = found["ratio"]
    if ratio is not None and ratio > 1:
        shown = f"{ratio:.7f}" if ratio < 1.001 else f"{ratio:.3g}"
        return f"{text}, largest error / allowed {shown}"
    message = found["message"].replace("\n", " ")
    return f"{text}, e.g. {message}"


def experiment_text(each: Mapping[str, Any]) -> str:
    """Return one experiment as an item."""
    answer = {True: "Yes", False: "**No**", None: "Shown"}[each["held"]]
    return (
        f"- {each['library']}. {each['question']} {answer}: {each['measured']}.  \n"
        f"  `python benchmarks/peer_matrix.py --experiment {each['name']}`"
    )


def promises(results: Mapping[str, Any]) -> str:
    """Return what each check asks for."""
    lines = [row(["check", "promise", "theorem"]), row(["---"] * 3)]
    for name, each in results["promises"].items():
        theorem = f"[{each['theorem']}](bounds.md)" if each["theorem"] else "exact"
        lines.append(row([f"`{name}`", each["promise"], theorem]))
    return "\n".join(lines) + "\n"


HEAD = """\
# The peers' matrix

Weight quantizers of other libraries, in the conformance suite that qframe's own plugins go
through. An adapter calls the library's real quantizer and says its result in qframe's words;
nothing of a library is rebuilt. This page is generated by `benchmarks/peer_matrix.py --write` from
`benchmarks/peers/results.json`; [benchmarks/peers/README.md](../benchmarks/peers/README.md) says
how to set it up.

Versions: {versions}. CPU, one thread, float32 weights. Suite {suite}, profile
"default", {seeds} seeds.

## The table

"held 0.91": the largest error seen is 0.91 of what the theorem allows; 1.00 means that the bound
was met exactly, as ties do. "n/a": the check has nothing to say, e.g. about a method that does not
claim to be GPTQ.
"""

READING = """\
**In short.** Codes, scales and decoders of all libraries agree with one another to the bound of
float32, on every layer that was drawn, and the same codes come out twice, from views, and with
more threads. llm-compressor's GPTQ is GPTQ: every code is the nearest to its compensated weight.
What was found besides: a NaN is taken without an error by all of them; a range that does not hold
0 in quanto's zeropoint mode; absolute limits in HQQ's scales; groups of HQQ that straddle rows; a
constant with a digit lost in bitsandbytes' int8 product. With finite weights of ordinary size and
both signs, groups that divide the row, and float16 outputs, none of these shows.

**How to read it.** Most libraries do not promise in their documents what is checked here. Rounders
to nearest are asked what round to nearest means: the nearest code, the scale of the rule, a range
that covers the weights, the same codes for weights times a power of two. A violation is a fact
about a version and a check, not a judgement of a library; the notes say whether it matters. What
the two columns of qframe show is that all of it can be kept at once. Ratios of `scheme_scale`
count roundings of float32, so 1e7 is a factor of about 2.

**Layers.** Of 2 to 24 columns and mostly 14 rows, each of another kind: normal, zeros, constant,
one sign, half zeros, exact ties and their neighbours, one outlier, heavy tails, weights of 2^-20,
and so on. Weights below 2^-64 are set to 0 here; see below for those. Groups divide the row,
because three of the libraries refuse others. For HQQ's grid every group holds a zero.
"""

EXTREME = """\
## With subnormal weights

The suite also draws weights down to 2^-149, which no trained layer holds. What held above, but not
for these:
"""

EXPERIMENTS = """\
## Experiments: what the contract has no words for

Float zero points, codebooks, a matrix product: each question is put to the library directly.
"Yes" and "No" answer the question; whether anybody promises it is another matter.
"""

LIMITS = """\
## What was not tested

Kernels on a GPU, and what differs there. Weights in float16 or bfloat16, which several libraries
are mostly used with. HQQ's search in the suite itself, for want of float zero points in the
contract. Files that the libraries write. Their other methods: AWQ, SmoothQuant, AutoRound,
float8, MX formats.
"""
