"""What quantizing takes in memory, held against what a dry run predicts; and how fast it streams.

    python benchmarks/memory.py                        # everything, into docs/memory.md
    python benchmarks/memory.py --only layers limit    # some of it, printed alone

Each run is a process of its own; its peak is VmHWM, which is everything that it had resident at
the same time, pages of mapped files included. Networks are synthetic: Llama-shaped, with random
weights, written file by file and deleted afterwards (up to 35 GB in --work). A limit is a memory
cgroup within this process's where one can be made, which counts the page cache too, else
RLIMIT_DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
W4 = {"num_bits": 4, "group_size": 128}
WINDOW = 256
HEAD = 64  # columns of an attention head
ROUNDS = 3  # of interleaved copies and runs
SMALL, MIDDLE, LARGE = (512, 1408, 4), (1024, 2816, 4), (4096, 11008, 4)
SLIM = (768, 1024)  # small next to the program, so that a limit need not be large
STREAMED = (("bfloat16", 8), ("float32", 4), ("bfloat16", 32))  # layers; the last ones make 13 GB


def recipe(method: str, scheme: Any = W4, samples: int = 0) -> dict[str, Any]:
    """Return a recipe; it calibrates on so many windows, 0 for none."""
    fields: dict[str, Any] = {"method": method, "scheme": scheme}
    if samples:
        fields["calibration"] = {"num_calibration_samples": samples, "max_seq_length": WINDOW}
    return fields


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "RTN": (MIDDLE, recipe("rtn")),
    "RTN, wide": (LARGE, recipe("rtn")),
    "GPTQ": (SMALL, recipe("gptq", samples=32)),
    "GPTQ, more text": (SMALL, recipe("gptq", samples=256)),
    "GPTQ, wider": (MIDDLE, recipe("gptq", samples=32)),
    "AWQ": (SMALL, recipe("awq", samples=64)),
    "AWQ and GPTQ": (SMALL, recipe("awq+gptq", samples=64)),
    "activations, one scale": (SMALL, recipe("rtn", "W8A8_STATIC", 64)),
    "LLM.int8": (SMALL, recipe("llm_int8", "W8A8", 64)),
    "SmolLM2-135M, RTN": (None, recipe("rtn")),
    "SmolLM2-135M, GPTQ": (None, recipe("gptq", {"num_bits": 4, "group_size": 64}, 32)),
}
"""Name -> hidden size, intermediate size and layers, or None for SmolLM2-135M; and the recipe."""


# Networks ---------------------------------------------------------------------------------------


def write_model(
    folder: Path, hidden: int, inner: int, layers: int, dtype: str = "bfloat16"
) -> Path:
    """Write a Llama of random weights, a file for each layer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": len(letters),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    generator, whole = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(whole)

    ones, places = torch.ones(hidden, dtype=whole), {}
    for number in range(layers + 1):
        prefix = f"model.layers.{number}"
        if number == layers:
            tensors = {f"{n}.weight": random(len(letters), hidden) for n in ("lm_head", EMBEDDING)}
            tensors["model.norm.weight"] = ones
        else:
            shapes = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
            shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
            shapes["mlp.down_proj"] = (hidden, inner)
            tensors = {f"{prefix}.{n}.weight": random(*shape) for n, shape in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{prefix}.{norm}.weight": ones.clone() for norm in norms}
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


EMBEDDING = "model.embed_tokens"


@contextlib.contextmanager
def model(work: Path, *size: int, dtype: str = "bfloat16") -> Iterator[Path]:
    """Have a network for a while, and a folder beside it for what is made of it."""
    folder = Path(tempfile.mkdtemp(prefix="qframe-memory-", dir=work))
    try:
        yield write_model(folder / "model", *size, dtype=dtype)
    finally:
        shutil.rmtree(folder)


def weights_of(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# Runs -------------------------------------------------------------------------------------------


def measured(
    folder: Path,
    fields: dict[str, Any],
    out: Path,
    *,
    limit: int | None = None,
    first: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize in a process of its own; return its peak in bytes, and seconds.

    limit     bytes that the system lets it have
    first     a network that is quantized before, with the same recipe: what is loaded once is there
    options   of `qframe.quantize`
    """
    shutil.rmtree(out, ignore_errors=True)
    asked = json.dumps(
        {
            "model": str(folder),
            "recipe": fields,
            "out": str(out),
            "first": None if first is None else str(first),
            "more": options,
        }
    )
    with limited(limit) as begin:
        done = subprocess.run(
            [sys.executable, __file__, "--run", asked],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=begin,
        )
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{fields} of {folder} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(asked: dict[str, Any]) -> None:
    """Quantize, and print what it took."""
    import qframe

    if asked["first"]:
        with tempfile.TemporaryDirectory() as place:
            qframe.quantize(asked["first"], asked["recipe"], out=Path(place) / "out")
    started = time.perf_counter()
    qframe.quantize(asked["model"], asked["recipe"], out=asked["out"], **asked["more"])
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak, "seconds": seconds}))


def predicted(folder: Path, fields: dict[str, Any], threads: int, limit: int | None = None) -> int:
    """Return what a dry run says that a run takes."""
    from qframe.budget import activation_budget
    from qframe.peak import peak_memory
    from qframe.pipeline import plan_job

    job = plan_job(folder, fields)
    budget = None if limit is None else activation_budget(job, None, limit, threads)
    return sum(peak_memory(job, threads, budget).values())


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[Callable[[], None] | None]:
    """Return what a child has to do first, so that the system gives it no more than this."""
    if limit is None:
        yield None
        return
    group = own_group()
    if group is None:
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
        most = int((group / "memory.max_usage_in_bytes").read_text())
        print(f"    cgroup: limit {limit / 1e6:.0f} MB, at most {most / 1e6:.0f} MB used")
    finally:
        group.rmdir()


def own_group() -> Path | None:
    """Return a name for a memory cgroup (version 1) within this process's; None for no such."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if "memory" in kinds.split(","):
            parent = Path("/sys/fs/cgroup/memory") / place.lstrip("/")
            if os.access(parent, os.W_OK):
                return parent / f"qframe-memory-{os.getpid()}"
    return None


# What is measured -------------------------------------------------------------------------------


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def prediction(work: Path) -> Iterator[str]:
    """Yield rows: a dry run's peak beside the real one's.

    Before each there is a run that is not counted: the first one of a machine also compiles.
    """
    yield "| run | network | threads | --max-memory | predicted, MB | measured, MB | off by |"
    yield "|---|---|---|---|---|---|---|"
    for name, (size, fields) in CASES.items():
        with contextlib.ExitStack() as stack:
            if size is None:
                from qframe.embedded import model_folder

                folder, shape = model_folder(), "SmolLM2-135M"
            else:
                folder = stack.enter_context(model(work, *size))
                shape = f"{size[2]} layers of {size[0]}, {size[1]}"
            out = stack.enter_context(tempfile.TemporaryDirectory(dir=work))
            limits: list[int | None] = [None]
            if name == "GPTQ, more text":
                limits.append(round(0.85 * predicted(folder, fields, 2)))
            measured(folder, fields, Path(out) / "out", threads=2)
            for threads, limit in [(t, each) for t in (1, 2) for each in limits]:
                said = predicted(folder, fields, threads, limit)
                options = {"threads": threads, "max_memory": limit}
                took = measured(folder, fields, Path(out) / "out", **options)["peak"]
                asked = "" if limit is None else megabytes(limit)
                yield (
                    f"| {name} | {shape} | {threads} | {asked} | {megabytes(said)} | "
                    f"{megabytes(took)} | {100 * (said / took - 1):+.0f} % |"
                )


def layers(work: Path) -> Iterator[str]:
    """Yield rows: the peak with 4 times as many layers."""
    yield "| run | layers | peak, MB | with 4 times the layers, MB | ratio |"
    yield "|---|---|---|---|---|"
    for name, size, fields in (
        ("RTN", MIDDLE, recipe("rtn")),
        ("GPTQ", SMALL, recipe("gptq", samples=32)),
    ):
        peaks = []
        for count in (2, 8):
            with model(work, *size[:2], count) as folder:
                took = measured(folder, fields, folder.with_name("out"))
                peaks.append(took["peak"])
        less, more = peaks
        yield f"| {name} | 2 | {megabytes(less)} | {megabytes(more)} | {more / less:.3f} |"


def limit(work: Path) -> Iterator[str]:
    """Yield rows: networks of 4 times the memory that the system gives."""
    yield "| run | weights, MB | --max-memory, and the system's limit, MB | peak, MB |"
    yield "|---|---|---|---|"
    for name, fields in (("RTN", recipe("rtn")), ("GPTQ", recipe("gptq", samples=64))):
        with model(work, *SLIM, 1) as little:
            most = round(1.03 * predicted(little, fields, 1, None))
        each = 4 * (4 * SLIM[0] ** 2 + 3 * SLIM[0] * SLIM[1])
        with model(work, *SLIM, -(-4 * most // each), dtype="float32") as folder:
            took = measured(
                folder,
                fields,
                folder.with_name("out"),
                limit=most,
                threads=1,
                max_memory=most,
            )
            yield (
                f"| {name} | {megabytes(weights_of(folder))} | {megabytes(most)} | "
                f"{megabytes(took['peak'])} |"
            )


def throughput(work: Path) -> Iterator[str]:
    """Yield rows: the rates at which RTN and SHA-256 go through weights, over that of copying them.

    RTN has all threads, in a process that has quantized something before; the hash has one. All
    begin with files that the system has in memory, or with files that are on the disk alone. Nobody
    reads what was copied once more; RTN does, but for the runs that are told not to. The rates of
    copying are beside: disks take what they have room for at once, and then less.
    """
    yield (
        "| weights | MB | files are | RTN over copying | of each round | without `verify` | "
        "of each round | hashing over copying | copied, GB/s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for dtype, layers in STREAMED:
        with model(work, *LARGE[:2], layers, dtype=dtype) as folder, model(work, *SMALL) as first:
            size, out = weights_of(folder), folder.with_name("out")
            for place, begin in (("in memory", hashed), ("on the disk", forgotten)):
                if place == "in memory" and size > psutil.virtual_memory().total / 3:
                    continue  # beside their copy they would not stay there
                ratios: dict[bool, list[float]] = {True: [], False: []}  # by whether they verify
                hashes, rates = [], []
                for _ in range(ROUNDS):
                    begin(folder)
                    copying = copied(folder, out)
                    for verify, found in ratios.items():
                        begin(folder)
                        ran = measured(folder, recipe("rtn"), out, first=first, verify=verify)
                        found.append(copying / ran["seconds"])
                    begin(folder)
                    hashes.append(copying / hashed(folder))
                    rates.append(size / copying / 1e9)
                cells = [
                    cell
                    for found in ratios.values()
                    for cell in (f"{statistics.median(found):.3f}", listed(found, 3))
                ]
                cells += [f"{statistics.median(hashes):.2f}", listed(rates, 2)]
                yield f"| {dtype} | {megabytes(size)} | {place} | {' | '.join(cells)} |"


def listed(numbers: list[float], digits: int) -> str:
    """Return numbers in words, each with so many digits."""
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


def forgotten(folder: Path) -> None:
    """Have the system let go what it has of a folder's files in memory."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def hashed(folder: Path) -> float:
    """Return the seconds that SHA-256 takes for all weights of a folder."""
    started = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")
    return time.perf_counter() - started


def copied(folder: Path, out: Path) -> float:
    """Return the seconds in which the folder is copied, and is on the disk."""
    started = time.perf_counter()
    shutil.copytree(folder, out)
    for file in out.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


PARTS = {
    "prediction": prediction,
    "layers": layers,
    "limit": limit,
    "throughput": throughput,
}


def main() -> None:
    """Measure, print, and put the tables into docs/memory.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", action="store_true", help="also with --only")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(json.loads(given.run))
        return
    for name in given.only:
        rows = []
        for row in PARTS[name](given.work):
            print(row, flush=True)
            rows.append(row)
        if given.write or given.only == list(PARTS):
            put(PAGE, name, "\n".join(rows))


def put(page: Path, name: str, table: str) -> None:
    """Put a table between its marks on a page."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    page.write_text(f"{before}{begin}{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
