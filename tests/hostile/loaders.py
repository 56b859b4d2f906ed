"""Everything of qframe that reads a file which somebody else may have written.

Each loader is given a folder, made by `seed`, of which one file has been changed. It may succeed,
or raise a QframeError; whatever else it does is a finding.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import qframe
from qframe.audit import audit
from qframe.calibration import read_text
from qframe.conversion import convert
from qframe.errors import QframeError
from qframe.host import Host
from qframe.model import Network
from qframe.pipeline import plan_job
from qframe.recipe import Recipe
from qframe.stored_model import StoredModel
from qframe.weights import ModelFolder
from qframe_plugins.readers.gguf_blocks import KINDS
from tests import others, tiny
from tests.hostile.mutate import mutated_bytes, mutated_json

SECONDS = 20  # a case that takes longer hangs
ROOM = 4 << 30  # bytes that a case may ask for, beyond what the process has

HOST = Host.discover()


@dataclass(frozen=True)
class Loader:
    """A reader and the files that it reads.

    seed   writes a sound folder
    files  of which one is changed at a time
    load   reads the folder
    """

    seed: Callable[[Path], None]
    files: tuple[str, ...]
    load: Callable[[Path], object]


def plain(folder: Path) -> None:
    tiny.write_llama(folder, shards=2)


def quantized(folder: Path, **scheme: object) -> None:
    model = tiny.write_llama(folder.with_name(f"{folder.name}-model"))
    recipe = {"method": "rtn", "scheme": {"group_size": 32, "symmetric": False, **scheme}}
    qframe.quantize(model, recipe, out=folder)


def of_others(folder: Path) -> None:
    quantized(folder)
    (folder / "qframe.json").unlink()


def with_merges(folder: Path) -> None:
    """Write one that llama.cpp can have: without zero points, and with a merge of tokens."""
    quantized(folder, symmetric=True)
    (folder / "qframe.json").unlink()
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["he"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    content["model"]["merges"] = [["h", "e"]]
    file.write_text(json.dumps(content))


def recipes(folder: Path) -> None:
    folder.mkdir()
    recipe = {
        "method": "awq+gptq",
        "scheme": {"num_bits": 4, "group_size": 32, "input_activations": {"num_bits": 8}},
        "overrides": {"re:.*down_proj": {"num_bits": 8}},
        "ignore": ["lm_head"],
        "options": {"dampening_frac": 0.1},
        "calibration": {"num_calibration_samples": 4},
    }
    text = json.dumps(recipe)
    (folder / "recipe.json").write_text(text)
    (folder / "recipe.yaml").write_text(text)
    (folder / "recipe.toml").write_text('method = "gptq"\nscheme = { num_bits = 4 }\n')


def texts(folder: Path) -> None:
    folder.mkdir()
    lines = [json.dumps({"text": f"line {i}", "n": i}) for i in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("some words\n\nand more\n")


def gguf_file(folder: Path) -> None:
    folder.mkdir()
    model = others.tiny_model(folder.with_name(f"{folder.name}-model"))
    others.write_gguf(model, folder / "model.gguf")


def gguf_blocks(folder: Path) -> None:
    folder.mkdir()
    raw = {kind: others.random_blocks(kind, 1, 0) for kind in KINDS}
    others.write_blocks(folder / "model.gguf", raw)


def bitsandbytes(folder: Path) -> None:
    model = others.tiny_model(folder.with_name(f"{folder.name}-model"))
    others.write_bitsandbytes(model, folder, "nested")


def quant_state(folder: Path) -> None:
    """Write the same, and the quant_state of a layer beside it, which is put into it."""
    bitsandbytes(folder)
    state = load_file(folder / "model.safetensors")[STATE]
    (folder / "state.json").write_bytes(bytes(state.tolist()))


def eight_bits(folder: Path) -> None:
    model = others.tiny_model(folder.with_name(f"{folder.name}-model"))
    others.write_bitsandbytes(model, folder, "int8")


RTN = {"method": "rtn", "scheme": {"group_size": 32}}


class StoppedError(Exception):
    """Ends a run between two blocks."""


def unfinished(folder: Path) -> None:
    """Write what a run leaves that was stopped after its first block."""
    folder.mkdir()
    model = tiny.write_llama(folder.with_name(f"{folder.name}-model"))

    def stop(progress: object) -> None:
        raise StoppedError

    with suppress(StoppedError):
        qframe.quantize(model, RTN, out=folder / "out", progress=stop, threads=1)


def _resume(folder: Path) -> None:
    """Go on with a copy: what is done is gone from the folder afterwards."""
    model = folder.with_name(f"{folder.name}-model")
    with TemporaryDirectory(dir=folder.parent) as place:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        qframe.quantize(model, RTN, out=Path(place) / "out", state="resume", threads=1)


def _plan(folder: Path) -> None:
    job = plan_job(folder, {"method": "rtn", "scheme": {"group_size": 32}}, HOST)
    network = job.network
    for name in network.layers:
        network.weight(name)


def _open(folder: Path) -> None:
    model = StoredModel.open(folder, HOST)
    for _, layer in model.layers():
        layer.weight()
    model.carried()
    model.left()


def _audit(folder: Path) -> None:
    """Audit a file or a folder that a reader opens."""
    file, state = folder / "model.gguf", folder / "state.json"
    if state.exists() and state.stat().st_size:
        tensors = load_file(folder / "model.safetensors")
        tensors[STATE] = torch.frombuffer(bytearray(state.read_bytes()), dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors")
    model = folder.with_name(f"{folder.name}-model")
    reference = model if model.is_dir() else None
    audit(file if file.exists() else folder, reference, host=HOST, threads=1)


def _recipe(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(QframeError):
            recipe = Recipe.from_file(file)
            network = Network(torch.nn.Sequential(torch.nn.Linear(32, 32)))
            qframe.recipe.resolve(recipe, network.layers)


def _texts(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(QframeError):
            list(read_text(str(file)))


STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
KEPT = ".out.qframe-unfinished"
WEIGHTS = "model-00001-of-00002.safetensors"
LOADERS: Mapping[str, Loader] = {
    "a model": Loader(plain, ("config.json", "model.safetensors.index.json", WEIGHTS), _plan),
    "its files": Loader(
        plain, ("model.safetensors.index.json", WEIGHTS), lambda f: dict(ModelFolder(f).tensors)
    ),
    "a quantized folder": Loader(
        quantized, ("config.json", "qframe.json", "model.safetensors"), _open
    ),
    "what verify reads": Loader(
        quantized,
        ("config.json", "qframe.json", "model.safetensors"),
        lambda f: qframe.verify(f, f.with_name(f"{f.name}-model"), host=HOST, threads=1),
    ),
    "a folder of others": Loader(of_others, ("config.json", "model.safetensors"), _open),
    "what the audit reads": Loader(
        of_others,
        ("config.json", "model.safetensors"),
        lambda f: audit(f, f.with_name(f"{f.name}-model"), host=HOST, threads=1),
    ),
    "a GGUF file": Loader(gguf_file, ("model.gguf",), _audit),
    "blocks of GGUF": Loader(gguf_blocks, ("model.gguf",), _audit),
    "a folder of bitsandbytes": Loader(bitsandbytes, ("config.json", "model.safetensors"), _audit),
    "a quant_state of bitsandbytes": Loader(quant_state, ("state.json",), _audit),
    "int8 of bitsandbytes": Loader(eight_bits, ("config.json", "model.safetensors"), _audit),
    "what convert reads": Loader(
        with_merges,
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        lambda f: convert(f, "gguf", f / "out.gguf", host=HOST, overwrite=True),
    ),
    "an unfinished run": Loader(
        unfinished, (f"{KEPT}/state.json", f"{KEPT}/blocks/00000.safetensors"), _resume
    ),
    "a recipe": Loader(recipes, ("recipe.json", "recipe.yaml", "recipe.toml"), _recipe),
    "calibration text": Loader(texts, ("text.jsonl", "text.txt"), _texts),
}


def one_case(loader: Loader, seed_folder: Path, scratch: Path, seed: int) -> str:
    """Run a loader on a changed copy of its folder; return what is wrong, "" for nothing."""
    rng = random.Random(seed)
    folder = scratch / seed_folder.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed_folder, folder)
    model = seed_folder.with_name(f"{seed_folder.name}-model")
    if model.is_dir() and not (scratch / model.name).exists():
        shutil.copytree(model, scratch / model.name)
    name = rng.choice(loader.files)
    data = (folder / name).read_bytes()
    structured = name.endswith(".json") and rng.randrange(5) > 0
    changed = mutated_json(rng, data) if structured else mutated_bytes(rng, data)
    (folder / name).write_bytes(changed)
    before = {file for file in scratch.parent.rglob("*") if scratch not in file.parents}
    try:
        with _limits():
            loader.load(folder)
    except QframeError as error:
        return "" if str(error) else f"{name}: {type(error).__name__} without a message"
    except BaseException as error:  # what must not happen is what is looked for
        return f"{name}: {type(error).__name__}: {str(error)[:300]}"
    after = {file for file in scratch.parent.rglob("*") if scratch not in file.parents}
    return f"{name}: wrote {sorted(after - before)}" if after != before else ""


@contextmanager
def _limits() -> Iterator[None]:
    """Let a case hang no longer than SECONDS, and ask for no more memory than ROOM."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, late)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, room[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, room)
        signal.signal(signal.SIGALRM, old)
