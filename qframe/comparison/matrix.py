"""Every method with every scheme: cells are made one by one, kept in a store, and made once.

What cells share is what is truly equal for them: calibration text and tokens, evaluation windows,
the logits of the full-precision network, and the distributions of its weights and inputs. The
statistics that methods read are not shared: a layer is quantized on the inputs that the network
quantized so far gives it, and those differ with every method and scheme from the second group of
layers on.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from torch import nn

from qframe import parallel
from qframe.calibration import CalibrationData, prepare
from qframe.checkpoint import load
from qframe.comparison.distributions import TOKENS, observe
from qframe.comparison.identity import (
    environment,
    evaluation_identity,
    machine,
    model_identity,
    plugin_identity,
)
from qframe.comparison.leaderboard import DONE, FAILED, Row, ranked, row_of
from qframe.comparison.reference import DISK_BYTES, KeptLogits
from qframe.comparison.store import Store, key_of
from qframe.contracts import Event
from qframe.errors import QframeError, RecipeError
from qframe.evaluation import Protocol, evaluate, windows_of
from qframe.host import Host, option_hint, option_names
from qframe.memory import folder_bytes, stored_bits_per_weight
from qframe.model import Network
from qframe.pipeline import Job, Progress, compute_dtype, plan_job, quantize
from qframe.recipe import DEFAULT_ROUNDER, OPTION_ALIASES, Recipe, parse_method
from qframe.scheme import Scheme
from qframe.weights import ModelFolder

EVALUATION_WINDOWS = 24
NUMBERS = 3  # the exit code of failures that would come again: they are kept
INTERNAL_ERROR = 1
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method with one scheme, as they were asked for, and the recipe that this means."""

    method: str
    scheme: str
    recipe: Recipe

    @property
    def label(self) -> str:
        """Method and scheme."""
        return f"{self.method} {self.scheme}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What networks are scored on; see `qframe.evaluation.windows_of`."""

    dataset: str = "topics"
    window: int | None = None
    limit: int | None = EVALUATION_WINDOWS


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison came to; nothing in it but `events` depends on which run made what.

    rows            in the order of the leaderboard
    contents        of the cells, in the order of rows, as the store holds them
    recipes         of the cells, in the order of rows, as plain values
    reference       the same of full precision: score, bits_per_weight, bytes
    model           name of the folder, and file name -> sha256
    protocol        of the evaluation
    calibration     which text, and how much of it
    environment     what the digits depend on besides
    distributions   of weights and inputs (`qframe.comparison.distributions`), None without
    missing         why there are none
    others          cells in the store that belong to other options
    events          what this run found damaged in the store
    """

    rows: Sequence[Row]
    contents: Sequence[Mapping[str, Any]]
    recipes: Sequence[Mapping[str, Any]]
    reference: Mapping[str, Any]
    model: str
    files: Mapping[str, str]
    protocol: Protocol
    calibration: Mapping[str, Any]
    environment: Mapping[str, str]
    distributions: Mapping[str, Any] | None
    missing: str
    others: int
    events: Sequence[Event]

    @property
    def exit_code(self) -> int:
        """0, or that of the gravest failure: internal error (1), numbers (3), refused (2)."""
        codes = {row.exit_code for row in self.rows}
        return next((code for code in (INTERNAL_ERROR, NUMBERS, 2) if code in codes), 0)

    def record(self) -> dict[str, Any]:
        """Return everything but the layers and the events as plain values."""
        return {
            "model": {"name": self.model, "files": dict(self.files)},
            "cells": [dataclasses.asdict(row) for row in self.rows],
            "reference": dict(self.reference),
            "protocol": dataclasses.asdict(self.protocol),
            "calibration": dict(self.calibration),
            "environment": dict(self.environment),
        }


def cells_of(
    methods: Mapping[str, tuple[str, Mapping[str, Any]]],
    schemes: Mapping[str, Scheme],
    base: Recipe,
    host: Host,
) -> list[Cell]:
    """Return the matrix, scheme by scheme.

    methods   label -> method, and options of its own
    schemes   label -> scheme
    base      everything else; of its options each method takes those that it has

    Raises RecipeError for an unknown method, or an option that no method has.
    """
    found: list[Cell] = []
    known: dict[str, list[str]] = {}
    for label, (method, own) in methods.items():
        parsed = parse_method(host, base.replace(method=method, options={}))
        parts = (*parsed.handlers, parsed.rounder)
        known[label] = [option for part in parts for option in option_names(part)]
        if own:
            parse_method(host, base.replace(method=method, options=dict(own)))
    for key in base.options:
        everywhere = sorted({option for options in known.values() for option in options})
        if OPTION_ALIASES.get(key, key) not in everywhere:
            raise RecipeError(f"no method has the option {key!r}{option_hint(key, everywhere)}")
    for name, scheme in schemes.items():
        for label, (method, own) in methods.items():
            shared = {
                key: value
                for key, value in base.options.items()
                if OPTION_ALIASES.get(key, key) in known[label]
            }
            recipe = base.replace(
                method=method, options={**shared, **own}, scheme=scheme.model_dump()
            )
            found.append(Cell(method=label, scheme=name, recipe=recipe))
    return found


def compare(
    model: str | Path,
    cells: Sequence[Cell],
    out: Path,
    *,
    host: Host | None = None,
    evaluation: Evaluation | None = None,
    distributions: bool = True,
    disk_bytes: int = DISK_BYTES,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Make every cell that the store does not have, and return all of them.

    model           a Hugging Face folder
    cells           see `cells_of`; all with the same calibration settings
    out             the folder of the store: new, or that of an earlier run
    distributions   also look at the distributions of weights and inputs, once
    disk_bytes      what the logits of full precision may take in the store
    say             called with one line for each step

    A cell that fails is a row with its message. Raises QframeError when nothing can be compared:
    the model cannot be read, a text is too short, full precision gives no numbers, or the store
    cannot be written.
    """
    if not cells:
        raise RecipeError("nothing to compare: give at least one method and one scheme")
    run = _Run(
        ModelFolder(model),
        cells,
        Store(out),
        host or Host.discover(),
        evaluation or Evaluation(),
        threads or parallel.default_threads(),
        disk_bytes,
        say,
        progress,
    )
    return run.all_of_it(distributions=distributions)


class _Run:
    """One run of a matrix."""

    def __init__(
        self,
        folder: ModelFolder,
        cells: Sequence[Cell],
        store: Store,
        host: Host,
        evaluation: Evaluation,
        threads: int,
        disk_bytes: int,
        say: Callable[[str], None],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._folder, self._cells, self._store, self._host = folder, cells, store, host
        self._threads, self._say, self._progress = threads, say, progress
        settings = cells[0].recipe.calibration
        if any(cell.recipe.calibration != settings for cell in cells):
            raise RecipeError("the cells of a comparison must have the same calibration settings")
        self._dtype = compute_dtype(settings.compute_dtype)
        say("reading the model and the texts")
        self._files = model_identity(folder)
        self._data: CalibrationData = prepare(folder.path, settings)
        self._windows, self._protocol = windows_of(
            folder.path, evaluation.dataset, length=evaluation.window, limit=evaluation.limit
        )
        self._environment = environment(settings.compute_dtype)
        self._shared = {
            "model": self._files,
            "evaluation": evaluation_identity(self._protocol, self._windows),
            "environment": self._environment,
        }
        self._logits = KeptLogits(store, self._shared, self._windows, self._full, disk_bytes)

    def all_of_it(self, *, distributions: bool) -> Comparison:
        reference = self._reference()
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for wait in (False, True):  # what another process is making comes last
            for number, cell in enumerate(self._cells):
                if number not in found and (made := self._cell(number, cell, wait=wait)):
                    found[number] = made
        self._logits.release()
        observed, missing = self._distributions() if distributions else (None, "not asked for")
        rows = [
            row_of(cell.method, cell.scheme, cell.recipe.scheme.describe(), *found[number])
            for number, cell in enumerate(self._cells)
        ]
        ordered = ranked(rows, DEFAULT_ROUNDER)
        numbers = {(row.method, row.scheme): number for number, row in enumerate(rows)}
        order = [numbers[row.method, row.scheme] for row in ordered]
        mine = {key for key, _ in found.values() if self._store.has("cells", key)}
        return Comparison(
            rows=ordered,
            contents=[found[number][1] for number in order],
            recipes=[self._cells[number].recipe.model_dump(mode="json") for number in order],
            reference=reference,
            model=self._folder.path.resolve().name,
            files=self._files,
            protocol=self._protocol,
            calibration=dict(self._data.source),
            environment=self._environment,
            distributions=observed,
            missing=missing,
            others=self._store.count("cells") - len(mine),
            events=self._store.events,
        )

    # Full precision ----------------------------------------------------------------------------

    def _full(self) -> nn.Module:
        network = Network.from_folder(self._folder)
        network.load(network.module, recurse=True)
        return network.module

    def _reference(self) -> dict[str, Any]:
        """Return score, bits and bytes of full precision."""
        kept = self._store.get("reference", self._shared)
        if kept is not None:
            return kept
        with self._store.claim(f"reference-{key_of(self._shared)}") as work:
            kept = self._store.get("reference", self._shared)
            if kept is not None or work is None:
                return kept or {}
            self._say(f"scoring full precision on {len(self._windows)} windows")
            self._logits.keep(self._threads)
            score = evaluate({}, self._logits, self._windows, threads=self._threads)[""]
            network = Network.from_folder(self._folder)
            stored = self._folder.tensors
            sizes = {n: i.size for n, i in network.layers.items() if f"{n}.weight" in stored}
            content = {
                "score": score.record(),
                "bits_per_weight": stored_bits_per_weight(self._folder, sizes) if sizes else None,
                "bytes": folder_bytes(self._folder.path),
            }
            return self._store.put("reference", self._shared, content, work)

    def _distributions(self) -> tuple[dict[str, Any] | None, str]:
        """Return the distributions, or None and why there are none."""
        layers = self._layers()
        if not layers:
            return None, "no cell could be planned"
        identity = {
            "model": self._files,
            "calibration": self._data.source,
            "environment": self._environment,
            "layers": layers,
            "tokens": TOKENS,
        }
        kept = self._store.get("distributions", identity)
        if kept is not None:
            return kept, ""
        with self._store.claim(f"distributions-{key_of(identity)}") as work:
            kept = self._store.get("distributions", identity)
            if kept is not None or work is None:
                return kept, ""
            self._say(f"looking at the weights and inputs of {len(layers)} layers")
            try:
                content = observe(
                    self._folder.path, layers, self._data, threads=self._threads, dtype=self._dtype
                )
            except QframeError as error:
                return None, str(error)
            return self._store.put("distributions", identity, content, work), ""

    def _layers(self) -> list[str]:
        """Return the layers that the first cell which can be planned quantizes."""
        for cell in self._cells:
            try:
                return list(plan_job(self._folder.path, cell.recipe, self._host).plan.schemes)
            except QframeError:
                continue
        return []

    # Cells -------------------------------------------------------------------------------------

    def _cell(self, number: int, cell: Cell, *, wait: bool) -> tuple[str, dict[str, Any]] | None:
        """Return (key, content) of a cell; None while another process makes it."""
        title = f"[{number + 1}/{len(self._cells)}] {cell.label}"
        try:
            job = plan_job(self._folder.path, cell.recipe, self._host)
            identity = {**self._shared, **self._identity_of(job)}
        except QframeError as error:
            self._say(f"{title}: refused: {_line(error)}")
            return "", _failure(error)
        key = key_of(identity)
        kept = self._store.get("cells", identity)
        if kept is None:
            with self._store.claim(f"cells-{key}", wait=wait) as work:
                if work is None:
                    self._say(f"{title}: another process is at it")
                    return None
                kept = self._store.get("cells", identity)
                if kept is None:
                    self._say(f"{title}: quantizing")
                    content = self._make(cell, job, work)
                    if content["status"] == FAILED:
                        self._say(f"{title}: failed: {content['error']['message']}")
                        if content["error"]["exit_code"] != NUMBERS:
                            return key, content  # it may go well the next time
                    return key, self._store.put("cells", identity, content, work)
        self._say(f"{title}: kept from before")
        return key, kept

    def _identity_of(self, job: Job) -> dict[str, Any]:
        return {
            "recipe": job.recipe.model_dump(mode="json"),
            "plugins": plugin_identity(job),
            "calibration": self._data.source,
        }

    def _make(self, cell: Cell, job: Job, work: Path) -> dict[str, Any]:
        """Quantize and score; return what the store is to hold."""
        out = work / "network"
        with _PeakMemory() as memory:
            started = time.perf_counter()
            try:
                result = quantize(
                    self._folder.path,
                    cell.recipe,
                    out=out,
                    calibration=self._data,
                    host=self._host,
                    state="none",  # a cell is finished, or made again
                    threads=self._threads,
                    progress=self._progress,
                )
                quantized = time.perf_counter()
                self._logits.keep(self._threads)
                network = {cell.label: load(out, dequantize=True)}
                scores = evaluate(network, self._logits, self._windows, threads=self._threads)
            except Exception as error:  # whatever a plugin raises must not end the others
                seconds = time.perf_counter() - started
                return _failure(error, out, seconds=seconds, peak_memory=memory.sample())
            scored = time.perf_counter()
        sizes = {name: job.network.layers[name].size for name in job.plan.schemes}
        return {
            "status": DONE,
            "score": scores[cell.label].record(),
            "bits_per_weight": stored_bits_per_weight(ModelFolder(out), sizes),
            "bytes": folder_bytes(out),
            "report": result.report.record(timings=False),
            "measured": {
                "seconds": quantized - started,
                "seconds_scoring": scored - quantized,
                "peak_memory": memory.peak,
                "threads": self._threads,
                "machine": machine(),
            },
        }


class _PeakMemory:
    """Watches the memory of this process: its largest resident size, looked at all the time."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> int:
        """Look once more, and return the peak."""
        self.peak = max(self.peak, self._process.memory_info().rss)
        return self.peak

    def _watch(self) -> None:
        self.sample()
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.sample()
        self.sample()


def _failure(error: Exception, out: Path | None = None, **measured: Any) -> dict[str, Any]:
    """Return what became of a cell that failed."""
    ours = isinstance(error, QframeError)
    text = str(error) if ours else f"internal error: {type(error).__name__}: {_line(error)}"
    if out is not None:
        text = text.replace(str(out), "OUT")
    code = error.exit_code if isinstance(error, QframeError) else INTERNAL_ERROR
    return {
        "status": FAILED,
        "error": {"type": type(error).__name__, "message": text, "exit_code": code},
        "measured": measured,
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = ["Cell", "Comparison", "Evaluation", "cells_of", "compare"]
