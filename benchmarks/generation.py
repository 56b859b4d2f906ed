"""How fast quantized networks read and write, beside what a user would run instead.

    python benchmarks/generation.py --rounds 7

SmolLM2-135M-Instruct under transformers in float32 and bfloat16, with torch.ao's dynamic INT8, and
as qframe loads it; and llama.cpp where it is installed: pip install xllamacpp. All take turns in
every round, and read and write as many tokens; times are those of the clock, on one thread and on
all. Layers that predict tokens have eight bits in all that is quantized, as llama.cpp has it.
Writes docs/generation_speed.md, where what was found on other processors stays.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from kernels import machine
from torch import nn
from transformers import AutoModelForCausalLM

import qframe
from qframe import embedded
from qframe.growing_cache import growing_cache
from qframe.speed import once
from qframe.stored import QuantizedLinear
from qframe.timing import speedup

DOCUMENT = Path(__file__).parent.parent / "docs" / "generation_speed.md"
PROMPT, NEW, VOCABULARY = 128, 64, 49152
BASES = ("float32", "bfloat16", "torch.ao INT8")
HEAD = {"lm_head": {"num_bits": 8}}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "qframe W8A8": {"scheme": "W8A8", "ignore": []},
    "qframe W4A8": {"scheme": {"preset": "W4A8", "group_size": 64}, "ignore": []},
    "qframe W4A16": {"scheme": {"preset": "W4A16", "group_size": 64}, "ignore": []},
}

Once = Callable[[torch.Tensor], tuple[float, float]]


@dataclass(frozen=True)
class Contender:
    """What takes part.

    once    reads and writes tokens once; returns the seconds of both
    inside  the share of a new token's time that linear layers take; None: not known
    """

    once: Once
    inside: Callable[[torch.Tensor], float] | None = None


def contenders(folder: Path, threads: int) -> Iterator[tuple[str, Contender]]:
    """Yield name -> contender; files are written into `folder`."""
    model = embedded.model_folder(progress=_say)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    yield "float32", of_network(plain)
    yield "bfloat16", of_network(copy.deepcopy(plain).to(torch.bfloat16))
    dynamic = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8
    )
    yield "torch.ao INT8", of_network(dynamic)
    for name, recipe in RECIPES.items():
        overrides = {} if recipe["scheme"] == "W8A8" else HEAD
        out = folder / name.replace(" ", "-")
        if not out.exists():
            qframe.quantize(model, {"method": "rtn", **recipe, "overrides": overrides}, out=out)
        network = qframe.load(out, kernels="auto").eval()
        yield name, of_network(network, lambda network=network: growing_cache(network))  # type: ignore[misc]
    if find_spec("xllamacpp") is not None:
        source = embedded.gguf_file(folder, progress=_say)
        for kind in ("Q8_0", "Q4_0"):
            yield f"llama.cpp {kind}", of_file(requantized(source, kind), threads)


def of_network(network: nn.Module, cache: Callable[[], Any] = lambda: None) -> Contender:
    """Return a network of transformers as a contender; cache: returns an empty one."""
    return Contender(
        lambda tokens: once(network, tokens, PROMPT, cache()),
        lambda tokens: inside(network, tokens, cache()),
    )


def inside(network: nn.Module, tokens: torch.Tensor, cache: Any) -> float:
    """Return the share of the time of writing tokens that passes in linear layers."""
    kinds = (nn.Linear, QuantizedLinear, torch.ao.nn.quantized.dynamic.Linear)
    spent, began = [0.0], [0.0]

    def before(module: nn.Module, given: Any) -> None:
        began[0] = time.perf_counter()

    def after(module: nn.Module, given: Any, made: Any) -> None:
        spent[0] += time.perf_counter() - began[0]

    hooks = []
    for module in network.modules():
        if isinstance(module, kinds):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    made = network(tokens[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache = made.past_key_values
    spent[0], start = 0.0, time.perf_counter()
    for place in range(PROMPT, tokens.shape[1]):
        network(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return spent[0] / whole


# llama.cpp ------------------------------------------------------------------------------------


def requantized(source: Path, kind: str) -> Path:
    """Write a GGUF file with its layers in another format; embeddings are Q8_0. Return its path."""
    import gguf

    target = source.with_name(f"{kind}.gguf")
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        chosen = gguf.GGMLQuantizationType[kind if "embd" not in tensor.name else "Q8_0"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def of_file(file: Path, threads: int) -> Contender:
    """Return a GGUF file under llama.cpp as a contender; the times are its own."""
    library = import_module("xllamacpp")
    parameters = library.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = PROMPT + NEW + 8, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0
    server = library.Server(parameters)

    def run(tokens: torch.Tensor) -> tuple[float, float]:
        made = server.handle_completions(
            {
                "prompt": tokens[0, :PROMPT].tolist(),
                "n_predict": NEW,
                "cache_prompt": False,
                "ignore_eos": True,
                "temperature": 0,
            }
        )
        made = made if isinstance(made, dict) else json.loads(made)
        found = made["timings"]
        if found["prompt_n"] != PROMPT or found["predicted_n"] != NEW:
            raise RuntimeError(f"llama.cpp read and wrote other numbers of tokens: {found}")
        return found["prompt_ms"] / 1000, found["predicted_ms"] / 1000

    return Contender(run)


# Measuring ------------------------------------------------------------------------------------


def run(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return what was found on so many threads: name -> seconds of each round, and shares."""
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    known = dict(contenders(folder, threads))
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(1000, VOCABULARY, (1, PROMPT + NEW)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, each in known.items():
                took = each.once(tokens)
                if number:  # in the first round kernels are compiled and pages are fetched
                    times[name].append(took)
            _say(f"{threads} threads, round {number} of {rounds}")
        shares = {
            name: each.inside(tokens) for name, each in known.items() if each.inside is not None
        }
    return {"times": times, "inside": shares}


# The document ---------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> list[str]:
    """Return a row for each contender: how many times as fast as each base it is."""
    times = found["times"]
    bases = [name for name in BASES if name in times]
    words = [f"x {base}" for base in bases]
    lines = [
        f"| | reading: {' | '.join(words)} | writing: {' | '.join(words)} | in linear layers |",
        "|---|" + "--:|" * (2 * len(bases) + 1),
    ]
    for name, own in times.items():
        cells = []
        for part in (0, 1):
            for base in bases:
                pair = [[each[part] for each in which] for which in (own, times[base])]
                cells.append(f"{speedup(*pair):.2f}")
        share = found["inside"].get(name)
        cells.append("" if share is None else f"{share:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


INTRODUCTION = f"""\
# How fast a quantized network is

<!-- Written by benchmarks/generation.py. Do not edit. -->

SmolLM2-135M-Instruct, {PROMPT} tokens read at once and {NEW} written one by one. Medians of the
ratios of rounds in which all take turns: 2.00 is twice as fast. The last column is the share of a
new token's time that passes in linear layers; the rest are PyTorch's small operations between
them, the same in every row but llama.cpp's. `lm_head` has eight bits in all that is quantized
(`ignore: []` in a recipe). Weights of four bits are in groups of 64, those of llama.cpp in blocks
of 32.
"""


def document(found: Mapping[int, Mapping[str, Any]], rounds: int, before: str = "") -> str:
    """Return docs/generation_speed.md: what was found on this processor, and before on others.

    before   the document as it was
    """
    names = ("torch", "transformers", "numba", "xllamacpp")
    versions = ", ".join(f"{each} {metadata.version(each)}" for each in names if find_spec(each))
    today = datetime.date.today().isoformat()
    lines = [f"Measured {today}, {rounds} rounds; {versions}."]
    for threads, each in found.items():
        lines += ["", f"### {threads} thread{'s' if threads != 1 else ''}", "", *table(each)]
    sections = {machine(): "\n".join(lines)}
    for section in before.split("\n## ")[1:]:
        name, _, text = section.partition("\n")
        sections.setdefault(name, text.strip("\n"))
    return INTRODUCTION + "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--folder", type=Path, help="where networks are kept; default: nowhere")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(run(given.folder, given.part, given.rounds)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for threads in dict.fromkeys(given.threads):  # a process each: pools keep their size
            command = [sys.executable, __file__, "--part", str(threads)]
            command += ["--rounds", str(given.rounds), "--folder", str(folder)]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[threads] = json.loads(made.stdout.splitlines()[-1])
    before = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
    given.out.write_text(document(found, given.rounds, before), encoding="utf-8")


if __name__ == "__main__":
    main()
