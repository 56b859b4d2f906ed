"""Step 2, calibration: text to tokens, and the forward pass that shows each layer its inputs.

The network's own forward pass is run once, on all calibration chunks in lockstep: each chunk
has a thread, which stops before every linear layer (and at every block) until all chunks have
arrived. While they wait, the layer's inputs are all there: its statistics are taken, it is
quantized, its weight is replaced, and the chunks go on, through the quantized layer. So every
layer is calibrated on the inputs that the quantized network really produces, in one pass, for
any architecture, with one block's weights in memory.

The split into chunks does not depend on the machine, and a chunk runs single-threaded, so the
numbers do not depend on the thread count.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from qframe.errors import CalibrationError, MissingExtraError, ModelError, OutputError
from qframe.positions import CALIBRATION_WINDOW, window_length
from qframe.recipe import CalibrationSettings
from qframe.spilling import Spill

CHUNK_TOKENS = 2048  # tokens of one chunk: large enough for full speed, small enough to spread


# Text and tokens ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Calibration inputs, and held-out inputs of the same kind on which nothing is fitted.

    inputs      each a tuple of positional arguments for the network's forward
    held_out    the same, disjoint
    source      what the report says of them: name, hash, counts
    """

    inputs: Sequence[tuple[Any, ...]]
    held_out: Sequence[tuple[Any, ...]] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_tensors(
        cls, inputs: Iterable[torch.Tensor], held_out: Iterable[torch.Tensor] = ()
    ) -> CalibrationData:
        """Wrap batches for a module that takes one tensor."""
        return cls(
            inputs=[(x,) for x in inputs],
            held_out=[(x,) for x in held_out],
            source={"name": "tensors"},
        )

    @classmethod
    def from_tokens(
        cls, windows: torch.Tensor, held_out: torch.Tensor, source: Mapping[str, Any]
    ) -> CalibrationData:
        """Cut token windows [windows, length] int64 into chunks of about CHUNK_TOKENS tokens."""
        each = max(1, CHUNK_TOKENS // windows.shape[1])
        return cls(
            inputs=[(chunk,) for chunk in windows.split(each)],
            held_out=[(chunk,) for chunk in held_out.split(each)] if len(held_out) else (),
            source=source,
        )


def read_text(
    dataset: str, part: Literal["calibration", "evaluation"] = "calibration"
) -> list[str]:
    """Return the documents of a data set.

    dataset   "topics" (Python's own documentation, on every machine), a .txt, .jsonl (field
              "text") or .parquet file, a folder of such files, or hf:NAME
    part      which of the two disjoint halves of "topics"; other data sets are taken whole

    Raises CalibrationError, or MissingExtraError for .parquet and hf: without the extra "data".
    """
    if dataset == "topics":
        from qframe.embedded import topics_text

        return [topics_text()[part == "evaluation"]]
    if dataset.startswith("hf:"):
        return _from_hub(dataset.removeprefix("hf:"))
    path = Path(dataset)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in {".txt", ".jsonl", ".parquet"})
        return [document for file in files for document in read_text(str(file), part)]
    if not path.is_file():
        raise CalibrationError(
            f"calibration dataset {dataset!r}: no such file or folder; give a .txt, .jsonl or "
            f".parquet file, a folder of them, hf:NAME, or 'topics'"
        )
    try:
        if path.suffix == ".jsonl":
            return _from_jsonl(path)
        if path.suffix == ".parquet":
            return _from_parquet(path)
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text: {error}") from None


def prepare(folder: Path, settings: CalibrationSettings) -> CalibrationData:
    """Turn the text of `settings.dataset` into windows of tokens, some of them held out.

    Windows are cut from the documents one after another, and spread evenly over all of the
    text; of several data sets each gives its share. Unless a length was asked for, they are no
    longer than the network was made for.

    Raises CalibrationError when a text is shorter than two windows, or the windows that were
    asked for are longer than the network was made for.
    """
    length = window_length(folder, settings.max_seq_length, CALIBRATION_WINDOW, "max_seq_length")
    wanted, datasets = settings.num_calibration_samples, settings.datasets
    if wanted < len(datasets):
        raise CalibrationError(
            f"num_calibration_samples={wanted} is less than a window for each of "
            f"{len(datasets)} data sets"
        )
    fitted, held_out, sources = [], [], []
    for number, dataset in enumerate(datasets):
        share = wanted // len(datasets) + (number < wanted % len(datasets))
        kept, aside, source = _windows(folder, dataset, length, share, settings.held_out_fraction)
        fitted.append(kept)
        held_out.append(aside)
        sources.append(source)
    windows, aside = torch.cat(fitted), torch.cat(held_out)
    return CalibrationData.from_tokens(windows, aside, _summary(sources, windows, aside))


def _windows(
    folder: Path, dataset: str, length: int, wanted: int, held_out_fraction: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return windows [windows, length] to fit on, those held out, and where they are from."""
    documents = read_text(dataset)
    tokens = tokenize(folder, documents)
    available = len(tokens) // length
    if available < 2:
        raise CalibrationError(
            f"calibration text {dataset!r} has {len(tokens)} tokens, fewer than two "
            f"windows of max_seq_length={length}; give more text or a smaller max_seq_length"
        )
    held = max(1, round(wanted * held_out_fraction)) if held_out_fraction else 0
    chosen = min(available, wanted + held)
    starts = np.linspace(0, available - 1, chosen).round().astype(np.int64)
    windows = torch.from_numpy(tokens[: available * length].reshape(available, length)[starts])
    held = max(1, min(held, chosen // 4)) if held else 0
    is_held = torch.zeros(chosen, dtype=torch.bool)
    if held:
        is_held[np.linspace(0, chosen - 1, held + 2).round().astype(np.int64)[1:-1]] = True
    source = {
        "name": dataset,
        "sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "tokens_in_text": len(tokens),
        "max_seq_length": length,
        "windows_wanted": wanted,
        "windows": int((~is_held).sum()),
        "windows_held_out": int(is_held.sum()),
    }
    return windows[~is_held], windows[is_held], source


def _summary(
    sources: list[dict[str, Any]], windows: torch.Tensor, held_out: torch.Tensor
) -> dict[str, Any]:
    """Return what the report says of all data sets; of several also what it says of each."""
    digest = hashlib.sha256(windows.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    if len(sources) == 1:
        return {**sources[0], "tokens_sha256": digest}
    counts = ("tokens_in_text", "windows_wanted", "windows", "windows_held_out")
    return {
        "name": " + ".join(source["name"] for source in sources),
        "max_seq_length": sources[0]["max_seq_length"],
        **{key: sum(source[key] for source in sources) for key in counts},
        "sources": sources,
        "tokens_sha256": digest,
    }


def tokenize(folder: Path, documents: Iterable[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens of all documents in a row, int64, without special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{folder}: its tokenizer cannot be loaded: {error}") from None
    parts = [tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] for d in documents]
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(p, np.int64) for p in parts)])


def _from_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise CalibrationError(
                f'{path}:{number}: expected a JSON object with a "text" field'
            ) from None
        documents.append(str(text))
    return documents


def _from_parquet(path: Path) -> list[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", f"reading {path}") from None
    table = parquet.read_table(path)
    if "text" not in table.column_names:
        raise CalibrationError(f'{path}: no column "text"; columns: {table.column_names}')
    return [str(text) for text in table.column("text").to_pylist()]


def _from_hub(name: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"the dataset hf:{name}") from None
    rows = datasets.load_dataset(name, split="train")
    if "text" not in rows.column_names:
        raise CalibrationError(f'hf:{name}: no column "text"; columns: {rows.column_names}')
    return [str(text) for text in rows["text"]]


# The forward pass in lockstep -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stop:
    """A place where chunks wait for one another: before a layer, or at the door of a block."""

    kind: str  # "block" or "layer"
    name: str


class _AbandonedError(Exception):
    """Ends the forward pass of a chunk that is no longer needed."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a chunk brings to a stop: the arguments of the module it is about to run."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Lockstep:
    """Runs a module on several inputs, which wait for one another at every stop.

    module    the network; `watch` names the modules at whose doors chunks stop
    threads   how many chunks run at the same time
    dtype     torch.bfloat16 lets matrix products run in bfloat16 (autocast), else float32
    agree     given the place of the stop where this process' chunks wait, in the order of `watch`,
              None where all have ended: returns the one whose turn it is
    spill     where chunks that wait put their activations, when there are too many; None: nowhere
    before    layer name -> what is done to its input before it runs; may change while chunks wait
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        threads: int,
        dtype: torch.dtype,
        agree: Callable[[int | None], int | None] = lambda own: own,
        spill: Spill | None = None,
    ) -> None:
        self._module = module
        self._dtype, self._agree, self._spill = dtype, agree, spill
        self._permits = threading.Semaphore(threads)
        self._changed = threading.Condition()
        self._here = threading.local()
        self._waiting: dict[int, tuple[Stop, Arrival, threading.Event]] = {}
        self._running = 0
        self._failure: BaseException | None = None
        self._abandoned = False
        self._recording: list[tuple[str, Any]] | None = None
        self._passes: Callable[[Stop, int, Arrival], bool] = _never
        self._handles: list[Any] = []
        self._rank: dict[Stop, int] = {}
        self.before: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def watch(self, stop: Stop, module: nn.Module) -> None:
        """Let chunks stop at a module's door."""
        self._rank[stop] = len(self._rank)

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self._recording is not None:
                if stop.kind == "layer":
                    self._recording.append((stop.name, layer_input(args, kwargs)))
            elif hasattr(self._here, "chunk"):
                arrival = Arrival(args, kwargs)
                if not self._passes(stop, self._here.chunk, arrival):
                    self._wait(stop, arrival)
                if stop.kind == "layer" and stop.name in self.before:
                    return (self.before[stop.name](layer_input(args, kwargs)),), {}
            return None

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def record(self, module: nn.Module, arrival: Arrival) -> tuple[list[tuple[str, Any]], Any]:
        """Run a module once without stopping, in float32 whatever the dtype.

        Returns its layers' inputs in order of use, and what it returned: bfloat16 would hide from
        comparisons what is small beside other numbers.
        """
        self._recording = []
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), self._watched(None):
                result = module(*arrival.args, **arrival.kwargs)
            return self._recording, result
        finally:
            self._recording = None

    def run(
        self,
        inputs: Mapping[int, tuple[Any, ...]],
        kwargs: Mapping[str, Any],
        on_stop: Callable[[Stop, Mapping[int, Arrival]], bool],
        passes: Callable[[Stop, int, Arrival], bool] | None = None,
    ) -> None:
        """Run all inputs, by number, to the end, or until `on_stop` returns False.

        on_stop   called with the stop and the arrivals by input number, while they wait
        passes    called with the stop, the input number and its arrival, on that input's thread:
                  whether it may go on without waiting for the others; none may unless told

        Errors of the network are raised as ModelError, those of `on_stop` as they are.
        """
        with closing(self.meetings(inputs, kwargs, passes)) as meetings:
            for stop, arrivals in meetings:
                if not on_stop(stop, arrivals):
                    break

    def meetings(
        self,
        inputs: Mapping[int, tuple[Any, ...]],
        kwargs: Mapping[str, Any],
        passes: Callable[[Stop, int, Arrival], bool] | None = None,
    ) -> Generator[tuple[Stop, dict[int, Arrival]], None, None]:
        """Yield every stop with the arrivals by input number; they wait until you ask for the next.

        passes   as for `run`

        Close it where it is left before its end. Raises ModelError for errors of the network.
        """
        self._running, self._passes = len(inputs), passes or _never
        threads = [
            threading.Thread(target=self._chunk, args=(i, x, kwargs), daemon=True)
            for i, x in inputs.items()
        ]
        begun: list[threading.Thread] = []
        try:
            for thread in threads:
                begun.append(thread)
                thread.start()
            while (meeting := self._gather()) is not None:
                stop, arrived = meeting
                if self._spill is not None and stop.kind == "block" and arrived:
                    self._spill.wake(min(arrived))  # of blocks the first chunk is looked at
                yield stop, {i: a for i, (_, a, _) in arrived.items()}
                with self._changed:
                    for i, (_, _, go) in arrived.items():
                        del self._waiting[i]
                        self._running += 1
                        go.set()
        finally:
            self._abandon()
            for thread in begun:
                _join(thread)
            for handle in self._handles:
                handle.remove()
        if isinstance(self._failure, OutputError):
            raise self._failure  # activations could not be put on the disk
        if self._failure is not None:
            raise ModelError(
                f"the forward pass of {type(self._module).__name__} failed: "
                f"{type(self._failure).__name__}: {self._failure}"
            ) from self._failure

    def _chunk(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._here.chunk = number
        self._permits.acquire()
        try:
            torch.set_num_threads(1)
            with self._context(), self._watched(number):
                self._module(*args, **kwargs)
        except _AbandonedError:
            pass
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
        finally:
            self._permits.release()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def _context(self) -> Iterator[None]:
        # Grad mode and autocast belong to a thread, so each chunk sets its own.
        enabled = self._dtype != torch.float32
        dtype = self._dtype if enabled else torch.bfloat16
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            yield

    def _watched(self, number: int | None) -> AbstractContextManager[None]:
        return nullcontext() if self._spill is None else self._spill.running(number)

    def _wait(self, stop: Stop, arrival: Arrival) -> None:
        go = threading.Event()
        if self._spill is not None:
            self._spill.park(self._here.chunk)
        self._permits.release()
        with self._changed:
            if self._abandoned:  # no one is left to say go
                go.set()
            else:
                self._waiting[self._here.chunk] = (stop, arrival, go)
                self._running -= 1
                self._changed.notify_all()
        go.wait()
        self._permits.acquire()
        if self._abandoned:
            raise _AbandonedError
        if self._spill is not None:
            self._spill.wake(self._here.chunk)

    def _gather(
        self,
    ) -> tuple[Stop, dict[int, tuple[Stop, Arrival, threading.Event]]] | None:
        """Wait until every chunk waits or has ended; return the first stop and who is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            if self._failure is not None:
                return None
            stops = list(self._rank)
            own = min((self._rank[stop] for stop, _, _ in self._waiting.values()), default=None)
            place = self._agree(own)
            if place is None:
                return None
            stop = stops[place]
            return stop, {i: w for i, w in sorted(self._waiting.items()) if w[0] == stop}

    def _abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            for _, _, go in self._waiting.values():
                self._running += 1
                go.set()
            self._waiting.clear()


def _never(stop: Stop, number: int, arrival: Arrival) -> bool:
    return False


def _join(thread: threading.Thread) -> None:
    """Wait for a thread to end, also when an interrupt came in the midst of its start.

    Such a thread may not know its number yet. Left alone it would still be running when the
    program ends, which aborts it inside torch.
    """
    for _ in range(200):
        if thread.ident is not None:
            thread.join()
            return
        time.sleep(0.005)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the input tensor of a linear layer from its call."""
    values = [*args, *kwargs.values()]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise ModelError(f"a linear layer was called with {len(values)} arguments, expected one")
    return values[0]
