"""qframe's CPU kernels beside what else multiplies, and beside the machine's limits.

    python benchmarks/kernels.py --rounds 9

On one thread the time is that of the processor, on all threads that of the clock. Candidates take
turns in every round, each with cold weights: before each call as much memory is read as no cache
holds, and then the candidate runs once on another weight, so that its code is warm, as it is in a
network after the layer before. What is reported are medians of ratios, and shares of what the same
run reads from memory, or multiplies in registers. Writes kernels.json, in the place of what was
found on such a processor before, and docs/performance.md from it.

Others take part where they are installed:

    pip install -c constraints.txt onnxruntime onnx bitsandbytes torchao
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from kernel_peers import layers
from torch.nn import functional

from qframe import KVScheme
from qframe.host import Host
from qframe.timing import in_turn, speedup
from qframe_plugins.kernels.numba_cpu import limits

FOUND = Path(__file__).parent / "kernels.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
SHAPES = ((4096, 4096), (11008, 4096))  # (rows, columns)
TOKENS = (1, 4, 16, 128, 512)
CONTEXTS = (4096, 16384)
GROUP = 128
CACHE = 1 << 28  # bytes that are read before each call

Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What a candidate does.

    call       runs it once
    nbytes     of weights, or of a cache, with scales: what it must read
    products   of codes, for those that multiply bytes; 0 for the others
    """

    call: Call
    nbytes: int
    products: int = 0


# Candidates -----------------------------------------------------------------------------------


def kernel(op: str) -> Any:
    """Return numba's kernel."""
    return Host.discover().get("kernel", f"{op}/numba")


def weight(bits: int, rows: int, columns: int, rng: np.random.Generator) -> list[torch.Tensor]:
    """Return codes, scale, zero point and group index of a symmetric weight in groups."""
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (rows, columns)).astype(np.int16)
    groups = columns // GROUP
    scale = (rng.random((rows, groups)) + 1).astype(np.float32) / 1000
    index = (np.arange(columns) // GROUP).astype(np.int32)
    zero = np.zeros((rows, groups), np.int16)
    return [torch.from_numpy(each) for each in (codes, scale, zero, index)]


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Return tokens in which one column in a thousand is far beyond LLM.int8()'s threshold."""
    loud, columns = x.clone(), x.shape[1]
    count = max(columns // 1000, 1)
    loud[:, :: columns // count][:, :count] = 30
    return loud


class Ours:
    """qframe's kernels on weights of one shape, laid out once."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.size = rows * columns
        self.rows = rows
        codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        scale = (rng.random(rows) + 1).astype(np.float32) / 1000
        plain = [torch.from_numpy(each) for each in (codes, scale)]
        self.int8, self.groups = kernel("linear_int8"), kernel("linear_int8_groups")
        self.mixed, self.floats = kernel("linear_int8_outliers"), kernel("linear_weight_only")
        self.panels = self.int8.prepare(*plain)
        values = plain[0].float() * plain[1][:, None]
        self.both = self.mixed.prepare(*plain, values)
        self.packed = {
            bits: self.groups.prepare(*weight(bits, rows, columns, rng)) for bits in (2, 3, 4)
        }

    def works(self, x: torch.Tensor) -> Iterator[tuple[str, Work]]:
        """Yield name -> work for tokens x."""
        products = len(x) * self.size
        scales = 4 * self.size // GROUP
        whole = self.size + 4 * self.rows
        outliers = with_outliers(x)
        yield "W8A8", Work(lambda: self.int8.from_activations(x, self.panels), whole, products)
        yield (
            "LLM.int8(), 0.1 % outliers",
            Work(lambda: self.mixed(outliers, 6.0, self.both), whole, products),
        )
        for bits, packed in self.packed.items():
            nbytes = self.size * bits // 8 + scales
            yield (
                f"W{bits}A8",
                Work(
                    lambda packed=packed: self.groups.from_activations(x, packed),  # type: ignore[misc]
                    nbytes,
                    products,
                ),
            )
            yield (
                f"W{bits}A32",
                Work(lambda packed=packed: self.floats(x, packed), nbytes),  # type: ignore[misc]
            )


class Peers:
    """What a user would run instead."""

    def __init__(self, rows: int, columns: int, threads: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        self.half = self.weight.bfloat16()
        self.codes = torch.randint(-127, 128, (columns, rows), generator=generator).to(torch.int8)
        engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "onednn"
        scales = self.weight.abs().amax(1).double() / 127
        zeros = torch.zeros(rows, dtype=torch.int64)
        quantized = torch.quantize_per_channel(self.weight, scales, zeros, 0, torch.qint8)
        self.onednn = torch.ops.quantized.linear_prepack(quantized, None)
        torch.backends.quantized.engine = engine
        four = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.int32)
        self.four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four, 1)
        self.four_scales = torch.rand(columns // GROUP, rows, 2, generator=generator).bfloat16()
        self.sessions = onnx_sessions(rows, columns, threads, seed)
        self.layers = dict(layers(self.weight, GROUP))

    def works(self, x: torch.Tensor) -> Iterator[tuple[str, Work]]:
        """Yield name -> work for tokens x."""
        half, codes = x.bfloat16(), (x * 20).clamp(-127, 127).to(torch.int8)
        numbers = x.numpy()
        yield "torch float32", Work(lambda: functional.linear(x, self.weight), self.weight.nbytes)
        yield "torch bfloat16", Work(lambda: functional.linear(half, self.half), self.half.nbytes)
        size = self.codes.nbytes
        if len(x) > 16:  # fewer tokens are not taken
            yield (
                "torch _int_mm, product only",
                Work(lambda: torch._int_mm(codes, self.codes), size),
            )
        yield (
            "oneDNN W8A8",
            Work(lambda: torch.ops.quantized.linear_dynamic(x, self.onednn), size),
        )
        yield (
            "torch int4",
            Work(
                lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
                    half, self.four, GROUP, self.four_scales
                ),
                size // 2,
            ),
        )
        loud = with_outliers(x)
        for name, layer in self.layers.items():
            given = loud if "LLM.int8()" in name else x
            yield name, Work(lambda layer=layer, given=given: layer(given), size)  # type: ignore[misc]
        for name, (session, share) in self.sessions.items():
            yield (
                name,
                Work(
                    lambda session=session: session.run(None, {"x": numbers}),  # type: ignore[misc]
                    int(size * share),
                ),
            )


def onnx_sessions(rows: int, columns: int, threads: int, seed: int) -> dict[str, tuple[Any, float]]:
    """Return name -> (session, bytes that a weight takes); nothing where it is missing."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return {}
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    rng = np.random.default_rng(seed)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def session(node: Any, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Any:
        ends = [
            helper.make_tensor_value_info("x", kinds.FLOAT, [None, columns]),
            helper.make_tensor_value_info("y", kinds.FLOAT, [None, rows]),
        ]
        held = [onnx.numpy_helper.from_array(each, name) for name, each in tensors.items()]
        graph = helper.make_graph([node], "one", ends[:1], ends[1:], held)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return runtime.InferenceSession(model.SerializeToString(), options)

    found: dict[str, tuple[Any, float]] = {}
    eight = {
        "w": rng.integers(-127, 128, (columns, rows)).astype(np.int8),
        "s": np.full(rows, 0.01, np.float32),
    }
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    found["ONNX Runtime W8A8"] = session(node, eight), 1.0
    blocks = columns // GROUP
    four = {
        "w": rng.integers(0, 256, (rows, blocks, GROUP // 2)).astype(np.uint8),
        "s": np.full(rows * blocks, 0.01, np.float32),
    }
    for level, what in ((1, "float32"), (4, "int8")):
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=4,
            block_size=GROUP,
            accuracy_level=level,
        )
        found[f"ONNX Runtime W4, {what}"] = session(node, four), 0.5
    return found


HEADS, WIDTH = 32, 128


def cache_works(context: int, seed: int) -> Iterator[tuple[str, Work]]:
    """Yield what attends to a cache of so many tokens, 32 heads of 128 channels."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, HEADS, WIDTH, generator=generator)
    attend = kernel("attention_kv")
    for bits, size in ((8, 128), (4, 128), (2, 32)):
        sides = [
            _side(KVScheme(num_bits=bits, axis=axis, group_size=size), context, generator)
            for axis in ("channel", "token")
        ]
        nbytes = sum(t.nbytes for side in sides for t in side[:3])
        yield (
            f"KV cache of {bits} bits",
            Work(lambda sides=sides: attend(q, *sides[0], *sides[1], context), nbytes),  # type: ignore[misc]
        )
    one = q[:, :, None]
    keys, values = (torch.randn(1, HEADS, context, WIDTH, generator=generator) for _ in "kv")
    whole = functional.scaled_dot_product_attention
    yield "torch SDPA float32", Work(lambda: whole(one, keys, values), 2 * keys.nbytes)
    halves = [each.bfloat16() for each in (one, keys, values)]
    yield "torch SDPA bfloat16", Work(lambda: whole(*halves), keys.nbytes)


def _side(scheme: KVScheme, context: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Return words, scale, offset and scheme of keys or values."""
    shape = (1, HEADS, context, WIDTH)
    words = WIDTH * context * scheme.num_bits // 32
    rows = context if scheme.axis == "token" else context // scheme.step * WIDTH
    packed = torch.randint(-(2**31), 2**31, (1, HEADS, rows, words // rows), generator=generator)
    scale = torch.rand(scheme.scale_shape(shape), generator=generator) / 100 + 0.01
    return packed.to(torch.int32), scale, -scale * (1 << scheme.num_bits) / 2, scheme


# Measuring ------------------------------------------------------------------------------------


def measured(
    works: Mapping[str, Work], twins: Mapping[str, Work], rounds: int, threads: int
) -> dict[str, Any]:
    """Return name -> times, bytes and products of all candidates, and of the limits.

    twins   the same with other weights: each runs just before what is timed
    """
    data = limits.memory(CACHE)
    tasks = 16 * threads
    reached = limits.products(tasks)
    calls = {name: work.call for name, work in works.items()}
    calls["read"] = lambda: limits.read(data)
    if reached:
        calls["multiply"] = lambda: limits.products(tasks)
    clock = time.process_time if threads == 1 else time.perf_counter
    others = {name: work.call for name, work in twins.items()}
    with torch.inference_mode():
        for call in others.values():
            call()
        times = in_turn(calls, rounds, clock=clock, between=lambda: limits.read(data), twins=others)
    sizes = {name: (work.nbytes, work.products) for name, work in works.items()}
    sizes |= {"read": (data.nbytes, 0), "multiply": (0, reached)}
    return {name: {"times": times[name], "size": sizes[name]} for name in times}


def linear(threads: int, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was found for each shape and number of tokens."""
    for rows, columns in SHAPES:
        both = [(Ours(rows, columns, seed), Peers(rows, columns, threads, seed)) for seed in (0, 1)]
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
            works, twins = (dict([*ours.works(x), *peers.works(x)]) for ours, peers in both)
            yield f"{rows} x {columns}, {tokens}", measured(works, twins, rounds, threads)


def attention(threads: int, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was found for each length of the cache."""
    for context in CONTEXTS:
        works, twins = (dict(cache_works(context, seed)) for seed in (0, 1))
        yield f"{context} tokens", measured(works, twins, rounds, threads)


def run(threads: int, rounds: int) -> dict[str, Any]:
    """Return all that is measured on so many threads."""
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    found: dict[str, Any] = {"linear": {}, "attention": {}}
    for part, each in (("linear", linear), ("attention", attention)):
        for name, result in each(threads, rounds):
            found[part][name] = result
            print(f"{threads} threads, {name}", file=sys.stderr, flush=True)
    return found


# The document ---------------------------------------------------------------------------------

W8A8 = ("torch float32", "torch bfloat16", "oneDNN W8A8", "torchao W8A8", "ONNX Runtime W8A8")
_W4 = ("torch float32", "torch bfloat16", "torch int4", "ONNX Runtime W4, float32")
W4 = (*_W4, "torchao W4")
W4A8 = (*_W4, "ONNX Runtime W4, int8", "torchao W4A8")
COLUMNS: Mapping[str, Sequence[str]] = {
    "W8A8": W8A8,
    "LLM.int8(), 0.1 % outliers": (
        "W8A8",
        "torch float32",
        "torch bfloat16",
        "bitsandbytes LLM.int8()",
    ),
    "W4A8": W4A8,
    "W4A32": W4,
    "W3A8": ("W4A8", "torch float32", "torch bfloat16"),
    "W3A32": ("W4A32", "torch float32", "torch bfloat16"),
    "W2A8": ("W4A8", "torch float32", "torch bfloat16"),
    "W2A32": ("W4A32", "torch float32", "torch bfloat16"),
}
CACHED = ("torch SDPA float32", "torch SDPA bfloat16")


def share_of_limit(found: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    """Return the shares of what is read from memory, and multiplied in registers."""
    nbytes, products = found[name]["size"]

    def share(limit: str, amount: float, at: int) -> float | None:
        if not amount or limit not in found:
            return None
        speeds = zip(found[name]["times"], found[limit]["times"], strict=True)
        whole = found[limit]["size"][at]
        return statistics.median((amount / t) / (whole / base) for t, base in speeds)

    return share("read", nbytes, 0), share("multiply", products, 1)


def table(results: Mapping[str, Any], name: str, peers: Sequence[str]) -> list[str]:
    """Return the rows of a kernel: ratios to peers, shares of the limits."""
    known = [peer for peer in peers if any(peer in found for found in results.values())]
    lines = [
        f"| | {' | '.join(f'x {peer}' for peer in known)} | of reading | of multiplying |",
        "|---|" + "--:|" * (len(known) + 2),
    ]
    for what, found in results.items():
        cells = [
            f"{speedup(found[name]['times'], found[peer]['times']):.2f}" if peer in found else ""
            for peer in known
        ]
        shares = ["" if share is None else f"{share:.2f}" for share in share_of_limit(found, name)]
        lines.append(f"| {what} | {' | '.join([*cells, *shares])} |")
    return lines


def document(records: Sequence[Mapping[str, Any]]) -> str:
    """Return docs/performance.md: what was found on each processor."""
    lines = [
        "# How fast the CPU kernels are",
        "",
        "<!-- Written by benchmarks/kernels.py. Do not edit. -->",
        "",
        "Ratios are medians of rounds in which all candidates take turns, weights being cold and",
        "code warm: 2.00 is twice as fast as the peer. Shares are of what the same run reads from "
        "memory, or",
        "multiplies in registers, with nothing else to do. Codes of activations are made inside "
        "the time of",
        "W8A8 and W4A8, and of the peers that make them. Labels are the weight's rows x columns, "
        "and tokens;",
        f"weights of less than eight bits are in groups of {GROUP}.",
    ]
    for record in records:
        lines += ["", f"## {record['machine']}", ""]
        lines += [f"Measured {record['when']}, {record['rounds']} rounds; {record['versions']}."]
        for threads, found in record["found"].items():
            clock = "processor time" if threads == "1" else "time of the clock"
            lines += ["", f"### {threads} thread{'s' if threads != '1' else ''}, {clock}"]
            for name, peers in COLUMNS.items():
                lines += ["", f"#### {name}", "", *table(found["linear"], name, peers)]
            for name in next(iter(found["attention"].values())):
                if name.startswith("KV cache"):
                    title = f"{name}, {HEADS} heads of {WIDTH}"
                    lines += ["", f"#### {title}", "", *table(found["attention"], name, CACHED)]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return the processor's name, and how many threads it has here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return (
        f"{names[0] if names else platform.processor()}, {numba.config.NUMBA_NUM_THREADS} threads"
    )


def versions() -> str:
    """Return the versions of what was compared."""
    names = ("numba", "torch", "onnxruntime", "bitsandbytes", "torchao")
    return ", ".join(f"{each} {metadata.version(each)}" for each in names if find_spec(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, default=FOUND, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    if given.threads:
        given.found.write_text(json.dumps(run(given.threads, given.rounds)), encoding="utf-8")
        return
    found = {}
    for threads in dict.fromkeys((1, numba.config.NUMBA_NUM_THREADS)):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "found.json"
            command = [sys.executable, __file__, "--threads", str(threads)]
            command += ["--rounds", str(given.rounds), "--found", str(out)]
            subprocess.run(command, check=True)
            found[str(threads)] = json.loads(out.read_text(encoding="utf-8"))
    record = {
        "machine": machine(),
        "when": datetime.date.today().isoformat(),
        "versions": versions(),
        "rounds": given.rounds,
        "found": found,
    }
    others = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else []
    records = [record, *(each for each in others if each["machine"] != record["machine"])]
    FOUND.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    given.out.write_text(document(records), encoding="utf-8")


if __name__ == "__main__":
    main()
