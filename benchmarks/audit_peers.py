"""Checkpoints of other tools, made here and audited: a nightly run, and the table of docs/audit.md.

    python benchmarks/audit_peers.py make PLACE --tool bitsandbytes
    python benchmarks/audit_peers.py audit PLACE
    python benchmarks/audit_peers.py table PLACE --out docs/audit.md

`make` writes checkpoints of SmolLM2, or of its first blocks, with what is installed; tools want
different versions of much, so it is run once in an environment of each:

    bitsandbytes       bitsandbytes accelerate
    llama.cpp          xllamacpp gguf, and qframe: its wheel has ggml's quantizers, not the program
    llm-compressor     llmcompressor
    gptqmodel          gptqmodel (with GPTQMODEL_CPU_WORKERS=2 on two cores)
    auto-round         auto-round

each with torch==2.13.0 for CPUs, and qframe where the list says so. `audit` needs qframe alone, and
keeps a JSON record beside each checkpoint. `table` ends with an error where a record has an error.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MODEL = Path.home() / ".cache/qframe/smollm2-135m-instruct-float32"
BLOCKS = 4  # of the network; all of it takes these tools too long on two cores
SAMPLES, LENGTH = 8, 128
MADE = "made.json"  # who wrote a checkpoint
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FALLBACK["IQ4_XS"] = "IQ4_NL"
"""What llama.cpp takes instead, where columns are no multiple of 256; SmolLM2 has 576."""
GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", *FALLBACK)
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}


def first_blocks(place: Path, blocks: int) -> Path:
    """Write the network with its first blocks alone; return the folder."""
    from safetensors.torch import load_file, save_file

    folder = place / f"first{blocks}"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, folder)
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    tensors = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] != "layers" or int(parts[2]) < blocks:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def samples(folder: Path) -> list[list[int]]:
    """Return windows of tokens of Python's own documentation."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)("\n".join(topics.values()))["input_ids"]
    return [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(SAMPLES)]


# The tools: each yields what it has written -----------------------------------------------------


def bitsandbytes(folder: Path, place: Path) -> Iterator[tuple[Path, str]]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for name, settings in {
        "int8": {"load_in_8bit": True},
        "nf4": four,
        "nf4-nested": {**four, "bnb_4bit_use_double_quant": True},
        "fp4": {**four, "bnb_4bit_quant_type": "fp4"},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**settings),
            dtype=torch.float32,
            device_map="cpu",
        )
        model.save_pretrained(place / f"bitsandbytes-{name}")
        yield place / f"bitsandbytes-{name}", f"transformers, {name}"


def llama_cpp(folder: Path, place: Path) -> Iterator[tuple[Path, str]]:
    for kind in GGUF:
        out = place / f"llama.cpp-{kind}"
        out.mkdir(exist_ok=True)
        write_gguf(folder, out / "model.gguf", kind)
        yield out, f"GGUF, {kind}"


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Write all matrices as ggml quantizes them, the embedding in eight bits."""
    import gguf

    from qframe.layouts import OwnLayout
    from qframe.stored_model import StoredModel
    from qframe.weights import ModelFolder
    from qframe_plugins.exporters import gguf as exporter

    model = StoredModel(ModelFolder(folder), OwnLayout(), {})
    known, interleaved = exporter.ARCHITECTURES[model.config["model_type"]]
    architecture = gguf.MODEL_ARCH[known]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    exporter._write_metadata(writer, model, gguf.LlamaFileType.ALL_F32)
    quantize = ggml()
    for tensor in exporter._tensors(model, architecture, interleaved):
        data = tensor.make()
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        own = "Q8_0" if tensor.name == "token_embd.weight" else kind
        if data.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[own]][0]:
            own = FALLBACK[own]
        stored = gguf.GGMLQuantizationType[own]
        writer.add_tensor(tensor.name, quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ggml() -> Callable[[Any, Any], Any]:
    """Return ggml's own quantizer, of the library that the wheel xllamacpp carries."""
    from importlib import util

    import gguf
    import numpy as np

    [library] = Path(util.find_spec("xllamacpp").origin).parent.glob("xllamacpp*.so")
    run = ctypes.CDLL(str(library)).ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    number, place = ctypes.c_int64, ctypes.c_void_p
    run.argtypes = [ctypes.c_int32, place, place, number, number, number, place]

    def quantize(data: Any, kind: Any) -> Any:
        data = np.ascontiguousarray(data, np.float32)
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty((len(data), data.shape[1] // weights * size), np.uint8)
        if run(int(kind), data.ctypes.data, out.ctypes.data, 0, *data.shape, None) != out.nbytes:
            raise SystemExit(f"ggml did not quantize {list(data.shape)} to {kind.name}")
        return out

    return quantize


def llm_compressor(folder: Path, place: Path) -> Iterator[tuple[Path, str]]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    data = Dataset.from_list(
        [{"input_ids": line, "attention_mask": [1] * LENGTH} for line in samples(folder)]
    )
    same = {"targets": "Linear", "ignore": ["lm_head"]}

    def four(symmetric: bool) -> dict[str, Any]:
        return {"g": {"targets": ["Linear"], "weights": {**W4, "symmetric": symmetric}}}

    for name, modifier in {
        "FP8_DYNAMIC": QuantizationModifier(scheme="FP8_DYNAMIC", **same),
        "GPTQ W8A8": GPTQModifier(scheme="W8A8", **same),
        "GPTQ W4A16": GPTQModifier(config_groups=four(True), **same),
        "GPTQ W4A16 with zero points": GPTQModifier(config_groups=four(False), **same),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        given = {"dataset": data, "max_seq_length": LENGTH, "num_calibration_samples": SAMPLES}
        oneshot(model=model, recipe=[modifier], **(given if "GPTQ" in name else {}))
        out = place / f"llm-compressor-{name.replace(' ', '-')}"
        model.save_pretrained(out, save_compressed=True)
        yield out, f"compressed-tensors, {name}"


def gptqmodel(folder: Path, place: Path) -> Iterator[tuple[Path, str]]:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    data = [{"input_ids": line, "attention_mask": [1] * LENGTH} for line in samples(folder)]
    for version, symmetric in (("gptq", True), ("gptq_v2", False)):
        settings = QuantizeConfig(bits=4, group_size=64, sym=symmetric, format=version)
        model = GPTQModel.load(str(folder), settings, dtype=torch.float32, device="cpu")
        model.quantize(data, batch_size=1)
        model.save(str(place / f"gptqmodel-{version}"))
        yield place / f"gptqmodel-{version}", f"{version}, sym={symmetric}"


def auto_round(folder: Path, place: Path) -> Iterator[tuple[Path, str]]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = [torch.tensor([line[:64]]) for line in samples(folder)]
    for name, symmetric, steps in (
        ("auto_gptq", True, 0),
        ("auto_gptq", True, 20),
        ("auto_gptq", False, 20),
        ("auto_awq", False, 20),
    ):
        run = AutoRound(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
            bits=4,
            group_size=64,
            sym=symmetric,
            iters=steps,
            nsamples=SAMPLES,
            seqlen=64,
            batch_size=4,
            dataset=data,
            enable_torch_compile=False,
            device_map="cpu",
        )
        out = place / f"auto-round-{name}-{symmetric}-{steps}"
        run.quantize_and_save(str(out), format=name)
        [inside] = out.iterdir()  # a folder named after the network
        yield inside, f"{name}, sym={symmetric}, {steps} steps"


TOOLS: Mapping[str, tuple[str, Callable[[Path, Path], Iterator[tuple[Path, str]]]]] = {
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "llama.cpp": ("xllamacpp", llama_cpp),
    "llm-compressor": ("llmcompressor", llm_compressor),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "auto-round": ("auto-round", auto_round),
}
"""Tool -> its package, and what writes checkpoints with it."""


# The audit --------------------------------------------------------------------------------------


def make(place: Path, tools: list[str], blocks: int) -> None:
    folder = first_blocks(place, blocks)
    for tool in tools:
        package, write = TOOLS[tool]
        version = importlib.metadata.version(package)
        for out, form in write(folder, place):
            made = {"tool": tool, "version": version, "format": form, "reference": folder.name}
            (out / MADE).write_text(json.dumps(made))
            print(tool, form, flush=True)


def audit_all(place: Path) -> None:
    from qframe.audit import audit

    for file in sorted(place.rglob(MADE)):
        made = json.loads(file.read_text())
        checkpoint = file.with_name("model.gguf")
        checkpoint = checkpoint if checkpoint.exists() else file.parent
        report = audit(checkpoint, place / made["reference"])
        record = {**made, **report.record()}
        file.with_name("audit.json").write_text(json.dumps(record))
        print(made["tool"], made["format"], len(report.findings), "findings", flush=True)


def table(place: Path, out: Path | None) -> None:
    records = [json.loads(file.read_text()) for file in sorted(place.rglob("audit.json"))]
    text = document(records)
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if wrong := [r["format"] for r in records if r["exit_code"]]:
        raise SystemExit(f"not sound: {wrong}")


def document(records: list[dict[str, Any]]) -> str:
    """Return docs/audit.md."""
    versions = sorted({f"{r['tool']} {r['version']}" for r in records})
    lines = []
    for record in sorted(records, key=lambda r: (r["tool"], r["format"])):
        every = record["layers"].values()
        found = Counter(f["check"] for f in record["findings"])
        said = ", ".join(f"{check}: {count}" for check, count in sorted(found.items())) or "none"
        figures = (
            _worst(every, key) for key in ("half_steps", "error", "above_nearest", "above_least")
        )
        cells = [record["tool"], record["format"], str(len(every)), said, *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return DOCUMENT.format(
        blocks=BLOCKS, versions="\n".join(f"- {each}" for each in versions), rows="\n".join(lines)
    )


DOCUMENT = """# Measured: the auditor on checkpoints of others

Made by `benchmarks/audit_peers.py`: SmolLM2-135M-Instruct in float32, or its first {blocks} blocks,
quantized by other tools, and audited by `qframe verify CHECKPOINT --reference MODEL`
([what it asks](formats.md#folders-that-others-wrote)). On a CPU, with:

{versions}

Of each checkpoint the worst layer is shown. *Half steps*: how far the farthest weight is, in what
B1.b, B2.d and B1.h allow; up to 1, and all codes are the nearest ones. *Error*: ||W - Q|| / ||W||.
*x nearest*: ||W - Q|| over that of rounding to nearest on scales that span the range. *x least*:
||W - Q||^2 over the least that any scales allow, the gap to the best that there is; "-" where it is
not known: above 4 bits, for codebooks, and for offsets that are no multiples of a scale.

| tool | format | layers | findings | half steps | error | x nearest | x least |
|---|---|---|---|---|---|---|---|
{rows}

What the runs have shown:

- The float32 network here was itself decoded from a file with blocks of Q4_1 and Q8_0, and the
  auditor finds that out: llama.cpp's Q4_1 gives every weight back, and its Q8_0 the embedding.
  Errors of other formats are those of such weights.
- Blocks of 256 weights fit the 1536 columns of down_proj alone; other layers of those files have
  what llama.cpp takes instead, Q4_0, Q5_0, Q5_1, Q8_0 or IQ4_NL, and the worst may be one of them.
  The embedding is Q8_0 in all files.
- Tools that round to nearest keep the bound: llama.cpp, in all its blocks, bitsandbytes, and
  llm-compressor's FP8. llama.cpp stores scales in float16 after it has chosen codes, bitsandbytes
  absmax in 8 bits; B1.h is about that, and without it codes would be taken for flipped ones.
- GPTQ and auto-round move codes away from the nearest ones on purpose, so half steps are a figure
  there and no bound. Whether GPTQ's own certificate (B3.b) holds cannot be asked: it needs the
  Hessian of the calibration, which no checkpoint has.
- auto-round rounds weights and scales to bfloat16 first. Without steps it rounds to nearest on
  those, so that a few codes are off by a hair: the auditor took them for flipped bits until this
  was run, and asks now whether 16 bits explain them.
- auto-round writes symmetric layers with scales of either sign, as llama.cpp does. qframe refused
  them as corrupt until this was run, and reads them now.
- bitsandbytes 0.50.2 decodes layers whose columns are no multiple of the block wrongly on a CPU:
  its `dequantize_4bit` of a [64, 96] weight in blocks of 64 is off by 0.25 of its norm, where the
  numbers that are stored are off by 0.09, and its own formula in PyTorch gives those. SmolLM2 has
  no such layers. The auditor reads what is stored.

Not run: the program llama-quantize (the wheel xllamacpp has ggml's quantizers, which were given
all matrices, but not the program, which mixes types), importance matrices, AutoAWQ, GPTQModel's AWQ
(which wants a GPU), HQQ, and networks of other architectures than Llama.
"""


def _worst(layers: Any, key: str) -> str:
    found = [layer[key] for layer in layers if layer[key] is not None]
    return f"{max(map(float, found)):.4g}" if found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("make", "audit", "table"))
    parser.add_argument("place", type=Path)
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="repeat")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path, help="write the document here")
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.place, arguments.tool or list(TOOLS), arguments.blocks)
    elif arguments.step == "audit":
        audit_all(arguments.place)
    else:
        table(arguments.place, arguments.out)


if __name__ == "__main__":
    main()
