"""`qframe verify`: is a quantized folder still what was written, and do its bounds hold?

From the files alone: the sha256 of every file, the fingerprint of every tensor, the structure of
every packed weight, manifest, tensors and config.json held against one another, and the
certificates as they were recorded. With the reference model, the certificates are computed once
more (`qframe.recompute`): hashes tell of accidents, only this tells of someone who hashes anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from qframe import parallel
from qframe.certificates import Certificate
from qframe.errors import CertificateError, QframeError, VerifyError
from qframe.fingerprints import sha256
from qframe.host import Host
from qframe.manifest import (
    MANIFEST,
    STATISTICS,
    LayerRecord,
    Manifest,
    TensorRecord,
    parse_manifest,
)
from qframe.pages import kept_pages
from qframe.report.layers import words_for_infinities
from qframe.stored import StoredLayer
from qframe.stored_model import StoredModel
from qframe.weights import ModelFolder, read_json

Kind = Literal["file", "tensor", "layer", "config", "reference", "certificate"]

T = TypeVar("T")

SHOWN = 10  # problems in the message of an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as it should be.

    kind      what it is about; "certificate" is a bound that does not hold, all others are files
    name      of the file, tensor or layer
    message   what is wrong
    """

    kind: Kind
    name: str
    message: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.kind} {self.name}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchecked:
    """A certificate that was read, but not computed once more.

    why   what is missing
    """

    layer: str
    claim: str
    theorem: str
    why: str


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify` found.

    reference    the model that certificates were recomputed from, or None
    files, tensors, statistics   how many were hashed; statistics are tensors that were kept
    layers       how many packed weights were examined
    recorded     layer name -> its certificates as the manifest has them
    recomputed   layer name -> those that were computed once more
    unchecked    certificates that could not be
    carried      tensors that were compared with the reference's, bit for bit
    problems     everything that is wrong
    notes        what else should be known
    """

    folder: Path
    reference: str | None = None
    files: int = 0
    tensors: int = 0
    statistics: int = 0
    layers: int = 0
    recorded: dict[str, tuple[Certificate, ...]] = field(default_factory=dict)
    recomputed: dict[str, tuple[Certificate, ...]] = field(default_factory=dict)
    unchecked: list[Unchecked] = field(default_factory=list)
    carried: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: nothing wrong. 4: not the files that were written. 3: a bound does not hold."""
        if not self.problems:
            return 0
        only_bounds = all(problem.kind == "certificate" for problem in self.problems)
        return CertificateError.exit_code if only_bounds else VerifyError.exit_code

    def check(self) -> None:
        """Raise VerifyError or CertificateError when there is a problem."""
        if not self.problems:
            return
        rest = len(self.problems) - SHOWN
        lines = [f"{self.folder}: {len(self.problems)} problems"]
        lines += [str(problem) for problem in self.problems[:SHOWN]]
        lines += [f"and {rest} more"] if rest > 0 else []
        error = CertificateError if self.exit_code == CertificateError.exit_code else VerifyError
        raise error("\n".join(lines))

    def add(self, kind: Kind, name: str, message: str) -> None:
        """Take down a problem."""
        self.problems.append(Problem(kind=kind, name=name, message=message))

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""

        def plain(found: Mapping[str, Sequence[Certificate]]) -> dict[str, Any]:
            return {name: [c.record() for c in some] for name, some in found.items()}

        content = {
            "folder": str(self.folder),
            "reference": self.reference,
            "ok": not self.problems,
            "exit_code": self.exit_code,
            "files": self.files,
            "tensors": self.tensors,
            "statistics": self.statistics,
            "layers": self.layers,
            "carried": self.carried,
            "problems": [
                {"kind": p.kind, "name": p.name, "message": p.message} for p in self.problems
            ],
            "notes": self.notes,
            "recorded": plain(self.recorded),
            "recomputed": plain(self.recomputed),
            "unchecked": [
                {"layer": u.layer, "claim": u.claim, "theorem": u.theorem, "why": u.why}
                for u in self.unchecked
            ],
        }
        finite: dict[str, Any] = words_for_infinities(content)
        return finite


def verify(
    folder: str | Path,
    reference: str | Path | nn.Module | None = None,
    *,
    host: Host | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Verify a quantized folder.

    reference   the full-precision folder or module that it was made of: certificates are
                recomputed from it, as far as the folder holds what they need
    host        where plugins are looked up: the layout's and the method's; default: the installed
                ones
    threads     how many; default: all cores
    say         told what begins

    Returns what was found; `check` on it raises when something is wrong. Raises VerifyError when
    there is no manifest that can be read.
    """
    from qframe.recompute import recompute

    threads = threads or parallel.default_threads()
    say = say or (lambda line: None)
    source = ModelFolder(folder)
    manifest = parse_manifest(source)
    report = VerifyReport(folder=source.path)
    say("hashing files")
    _check_files(report, source.path, manifest)
    say("hashing tensors")
    report.tensors = _check_tensors(report, source, manifest.tensors, threads)
    kept = ModelFolder(source.path, STATISTICS)
    if manifest.statistics:
        report.statistics = _check_tensors(report, kept, manifest.statistics, threads)
    say("unpacking layers")
    model = StoredModel.open(source, host)
    layers = _sound_layers(report, model, manifest, threads, lambda layer: layer)
    _check_config(report, model, manifest, {n: each.stored.extras for n, each in layers.items()})
    _read_certificates(report, manifest)
    if reference is None:
        report.unchecked = [
            Unchecked(layer=name, claim=c.claim, theorem=c.theorem, why="no --reference was given")
            for name, certificates in report.recorded.items()
            for c in certificates
        ]
        return report
    say("computing certificates once more")
    with parallel.one_torch_thread():
        host = host or Host.discover()
        recompute(report, manifest, layers, source, kept, reference, host, threads)
    return report


def check_written(folder: Path, host: Host, threads: int) -> None:
    """Read a folder that was just written; raise VerifyError where it is not what it should be.

    That is what `verify` does without a reference, but for hashing files: their hashes are new. It
    is read from the disk, once.
    """
    source = ModelFolder(folder, from_disk=True)
    manifest = parse_manifest(source)
    report, of_layers = VerifyReport(folder=source.path), VerifyReport(folder=source.path)
    with kept_pages():
        model = StoredModel.open(source, host)  # layers first: they are not read again then
        extras = _sound_layers(
            of_layers, model, manifest, threads, lambda layer: layer.stored.extras
        )
        _check_tensors(report, source, manifest.tensors, threads)
        if manifest.statistics:
            kept = ModelFolder(folder, STATISTICS, from_disk=True)
            _check_tensors(report, kept, manifest.statistics, threads)
    report.problems += of_layers.problems
    _check_config(report, model, manifest, extras)
    report.check()


# Files and tensors ------------------------------------------------------------------------------


def _check_files(report: VerifyReport, folder: Path, manifest: Manifest) -> None:
    """Compare the sha256 of every file, and look for files that are too many."""
    for name, expected in manifest.files.items():
        if Path(name).name != name or name in {"", ".", ".."}:
            report.add("file", name, "leads out of the folder")
        elif not (folder / name).is_file():
            report.add("file", name, "is missing")
        else:
            report.files += 1
            if sha256(folder / name) != expected:
                report.add("file", name, "is not what was written: sha256 differs")
    known = {*manifest.files, MANIFEST}
    others = sorted(file.name for file in folder.iterdir() if file.name not in known)
    for name in [other for other in others if ".safetensors" in other]:
        report.add("file", name, "is not in the manifest, and may change what is loaded")
        others.remove(name)
    if others:
        report.notes.append(f"not in the manifest, and not looked at: {', '.join(others)}")


def _check_tensors(
    report: VerifyReport,
    source: ModelFolder,
    expected: Mapping[str, TensorRecord],
    threads: int,
) -> int:
    """Compare name, dtype, shape and fingerprint of every tensor; return how many were hashed."""
    try:
        stored = source.tensors
    except QframeError as error:
        report.add("file", source.path.name, str(error))
        return 0
    for name in sorted(stored.keys() - expected.keys()):
        report.add("tensor", name, "is not in the manifest")
    for name in sorted(expected.keys() - stored.keys()):
        report.add("tensor", name, "is missing")
    names = [name for name in expected if name in stored]

    def objection(name: str) -> str:
        there, record = stored[name], expected[name]
        if (there.dtype, there.shape) != (record.dtype, record.shape):
            return (
                f"is {there.dtype} {list(there.shape)}, but {record.dtype} {list(record.shape)} "
                f"was written"
            )
        try:
            found = source.fingerprint(name)
        except QframeError as error:
            return str(error)
        return "" if found == record.blake3 else "is not what was written: its hash differs"

    for name, message in zip(names, parallel.spread(objection, names, threads), strict=True):
        if message:
            report.add("tensor", name, message)
    return len(names)


# Layers and configuration -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """A quantized layer of the folder, and what the manifest says of it."""

    record: LayerRecord
    stored: StoredLayer


def _sound_layers(
    report: VerifyReport,
    model: StoredModel,
    manifest: Manifest,
    threads: int,
    of: Callable[[FoundLayer], T],
) -> dict[str, T]:
    """Return layer -> what is wanted of it, of those that can be unpacked and are as they should.

    That is as the manifest says they are.
    """
    try:
        stored = model.source.tensors
    except QframeError:  # has been reported
        return {}
    codes = set(model.layout.parts) - {"weight"}  # "weight" may be that of any layer
    for name in stored:
        owner, _, part = name.rpartition(".")
        if part in codes and owner not in manifest.layers:
            report.add("tensor", name, "belongs to no layer of the manifest")
    untied = {event.layer for event in manifest.events if event.kind == "untied"}
    folds = _fold_objections(manifest)

    def look(name: str) -> tuple[T | None, str]:
        try:
            parts = model.parts(name)
            layer = FoundLayer(
                manifest.layers[name], model.layout.unpack(parts, model.outlines[name])
            )
        except QframeError as error:
            return None, str(error)
        wrong = _layer_objection(layer) or folds.get(name, "")
        coded = "weight_packed" in parts or "weight" not in model.layout.parts
        if coded and f"{name}.weight" in stored and name not in untied:
            wrong = "is stored both as codes and as a plain weight"
        return (None, wrong) if wrong else (of(layer), "")

    names = list(manifest.layers)
    report.layers += len(names)
    found = {}
    for name, (wanted, wrong) in zip(names, parallel.spread(look, names, threads), strict=True):
        if wrong:
            report.add("layer", name, wrong)
        elif wanted is not None:
            found[name] = wanted
    return found


def _layer_objection(layer: FoundLayer) -> str:
    """Return what is wrong with a layer that could be unpacked, "" for nothing."""
    record = layer.record
    columns, scheme = record.columns, record.scheme
    if record.grid.grid().levels > 1 << scheme.num_bits:
        return f"its grid has more codes than {scheme.num_bits} bits can tell apart"
    moved = layer.stored.transform is not None or record.folded is not None
    if moved != (record.rewritten is not None):
        return "its tensors and the manifest disagree on whether it was rewritten"
    transform = layer.stored.transform
    if record.folded is not None and transform is not None and transform.scale is not None:
        return f"{record.folded!r} divides by the scale of its input, and so does it"
    index = layer.stored.packed.group_index
    if index is not None and scheme.strategy == "group" and columns:
        width = scheme.group_width(columns)
        counts = torch.bincount(index.long(), minlength=scheme.groups(columns))
        if int(counts.max()) > width:
            return f"weight_g_idx gives a group {int(counts.max())} columns, group_size is {width}"
    return ""


def _fold_objections(manifest: Manifest) -> dict[str, str]:
    """Return layer -> what is wrong with what divides by the scale of its input, or its own."""
    said: dict[str, set[str | None]] = {}  # input group -> norms and layers that its layers name
    served: dict[str, set[str]] = {}  # those -> input groups
    for record in manifest.layers.values():
        said.setdefault(record.input_group, set()).add(record.folded)
        served.setdefault(record.folded or "", set()).add(record.input_group)
    found = {}
    for name, record in manifest.layers.items():
        if len(said[record.input_group]) > 1:
            found[name] = "layers that read its input disagree on what divides by its scale"
        elif record.folded is None:
            continue
        elif len(served[record.folded]) > 1:
            found[name] = f"{record.folded!r} is said to divide for several inputs"
        elif wrong := _divider_objection(manifest, record.folded, record.columns):
            found[name] = wrong
    for name in manifest.divisions:
        if name not in served and name in manifest.layers:
            found[name] = "its rows are said to be divided, and no layer reads them"
    return found


def _divider_objection(manifest: Manifest, name: str, columns: int) -> str:
    """Return what is wrong with a norm or a layer that divides, "" for nothing."""
    record = manifest.divisions.get(name)
    if record is None:
        weight = manifest.tensors.get(f"{name}.weight")
        fits = weight is not None and weight.shape == (columns,)
        return "" if fits else f"the norm {name!r} has no weight [{columns}]"
    layer, division = manifest.layers.get(name), record.division()
    exponents, rows = division.exponents, division.rows
    fits = layer is not None and len(exponents) == layer.rows and len(rows) == columns
    if not fits or not bool(((rows >= 0) & (rows < len(exponents))).all()):
        return f"{name!r} has no rows that its {columns} channels could be"
    return ""


def _check_config(
    report: VerifyReport,
    model: StoredModel,
    manifest: Manifest,
    extras: Mapping[str, frozenset[str]],
) -> None:
    """Compare config.json, where there is one, with the layers.

    extras   layer name -> what it has besides codes, of those that could be unpacked
    """
    if "config.json" not in manifest.files:  # the network was given in memory
        return
    try:
        section = read_json(model.source.path / "config.json").get("quantization_config")
    except QframeError as error:
        report.add("config", "config.json", str(error))
        return
    if extras.keys() != model.outlines.keys():
        report.notes.append("config.json was not compared with layers that could not be unpacked")
        return
    found = [
        dataclasses.replace(outline, extras=extras[name])
        for name, outline in model.outlines.items()
    ]
    expected = model.layout.config(found, [])
    own = {"kv_cache_scheme", "version"}  # what the manifest says already
    ignored = own | getattr(model.layout, "names_left", frozenset())  # needs the network
    if not isinstance(section, Mapping) or section.get("quant_method") != expected["quant_method"]:
        report.add(
            "config",
            "config.json",
            f"its quantization_config does not name {expected['quant_method']}",
        )
        return
    for key in sorted((expected.keys() | section.keys()) - ignored):
        if section.get(key) != expected.get(key):
            report.add("config", "config.json", f"its {key} are not those of the layers")


def _read_certificates(report: VerifyReport, manifest: Manifest) -> None:
    """Take over the certificates that were recorded, and find those that do not hold."""
    for name, record in manifest.layers.items():
        certificates = tuple(found.certificate() for found in record.certificates)
        report.recorded[name] = certificates
        for certificate in certificates:
            if not certificate.holds:
                report.add("certificate", name, f"recorded: {certificate}")
