"""What a run keeps of its work, so that another one can go on where it was stopped.

While OUT is being made there is a hidden folder beside it:

    .OUT.qframe-unfinished/lock         whose it is (`qframe.locks`)
                           state.json   what the run depends on, and the blocks that are done
                           blocks/      a file for each of those
                           folder/      what becomes OUT; of no use to another run

A block counts once state.json names its file and the hash of it. Both are written under another
name, handed to the disk and renamed, in this order: a run may be killed at any moment, and finds
all blocks but those that it was at. A file that is not whole ends the list.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from qframe.errors import NonFiniteError, QframeError, UnfinishedError
from qframe.fingerprints import fingerprint_of_file, sha256
from qframe.locks import locked_folder
from qframe.manifest import MANIFEST
from qframe.shards import write_tensors
from qframe.writing import put_in_place, written

State = Literal["new", "resume", "restart", "none"]
"""What to do with an unfinished run: nothing, and refuse to begin; go on with it; delete it and
begin anew. "none" is "new", and keeps nothing either."""

STATE_VERSION = 2
SHOWN = 5  # places in a message, after the first
_RECORD = "qframe"  # in the metadata of a block's file: what is said of its tensors
_MISSING = "nothing"  # a value of a fingerprint that is not there

log = logging.getLogger("qframe")


def unfinished_folder(out: Path) -> Path:
    """Return where a run into a folder works."""
    whole = Path(os.path.abspath(out)) if out.name in ("", "..") else out
    return whole.with_name(f".{whole.name}.qframe-unfinished")


def kept_blocks(out: Path) -> tuple[int, int] | None:
    """Return how many blocks of a run are done, and of how many; None where nothing is kept."""
    folder = unfinished_folder(out)
    try:
        state = _read_state(folder)
    except UnfinishedError:
        return None
    return (len(state["blocks"]), state["total"]) if _worth_keeping(state) else None


class Unfinished:
    """The hidden folder of a run, which has it for itself; `unfinished` makes it.

    work   the folder in which the output is made
    """

    def __init__(self, out: Path, state: State) -> None:
        self.folder = unfinished_folder(out)
        self.work = self.folder / "folder"
        self._out, self._asked = out, state
        self._keeps = False
        self._state: dict[str, Any] = {}
        self._known: Callable[[], Mapping[str, str]] = dict
        self._places: dict[str, int] = {}  # layer -> place of its block's file

    def begin(
        self,
        fingerprint: Mapping[str, Any] | None,
        total: int,
        known: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Say what the run depends on; with "resume" that must be what it depended on.

        fingerprint   plain values, in mappings as deep as need be; None where it is not known, so
                      that nothing can be kept
        total         blocks to be done
        known         returns what of fingerprint["model"] has become known while blocks were done;
                      before, it says the beginning of it, up to a space

        Raises UnfinishedError, naming what is another.
        """
        if self._state:
            before, now = self._state["fingerprint"], _plain(fingerprint)
            found = list(differences(before, _as_far_as_known(before, now)))
            if found:
                (place, old, new), others = found[0], [place for place, _, _ in found[1:]]
                also = f" (also another: {', '.join(others[:SHOWN])})" if others else ""
                raise UnfinishedError(
                    f"{self.folder} holds {self._said()} of a run that depended on something "
                    f"else: {place} was {old}, and is {new} now{also}; give what that run was "
                    f"given, or begin anew with --restart, which deletes it"
                )
            self._state["fingerprint"] = now
        else:
            self._state = {
                "state_version": STATE_VERSION,
                "fingerprint": _plain(fingerprint),
                "total": total,
                "decision": None,
                "blocks": [],
            }
        self._keeps = fingerprint is not None and self.wanted
        self._known = known
        self._index()

    @property
    def goes_on(self) -> bool:
        """Whether an earlier run has left something with which this one goes on."""
        return bool(self._state)

    @property
    def wanted(self) -> bool:
        """Whether anything is to be kept."""
        return self._asked != "none"

    @property
    def decision(self) -> dict[str, Any] | None:
        """What was decided before the first block, as plain values."""
        decision: dict[str, Any] | None = self._state["decision"]
        return decision

    def decide(self, decision: Mapping[str, Any]) -> None:
        """Keep what was decided before the first block. Raises OutputError."""
        if self._keeps:
            self._state["decision"] = _plain(decision)
            self._write()

    def has(self, layer: str) -> bool:
        """Return whether a layer is in a block that is done."""
        return layer in self._places

    def block(self, layer: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return tensors and record of the block that a layer is in; None where it is not done.

        A file that is not what was written ends the list: later ones are forgotten, too.
        """
        if layer not in self._places:
            return None
        place = self._places[layer]
        entry = self._state["blocks"][place]
        file = self._file(place)
        try:
            if fingerprint_of_file(file) != entry["blake3"]:
                raise UnfinishedError(f"{file}: not what was written: its hash differs")
            with safe_open(str(file), framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return tensors, json.loads(handle.metadata()[_RECORD])
        except (OSError, SafetensorError, UnfinishedError) as error:
            log.warning("%s; this block and later ones are done again", error)
            del self._state["blocks"][place:]
            self._index()
            return None

    def add(
        self, block: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
    ) -> None:
        """Keep a block that is done. Raises OutputError.

        record   plain values; under "layers" the names of its layers
        """
        if not self._keeps:
            return
        file = self._file(len(self._state["blocks"]))
        temporary = file.with_name("new.tmp")
        size = sum(tensor.nbytes for tensor in tensors.values())
        with written(file, size):
            file.parent.mkdir(mode=0o700, exist_ok=True)
            digest = write_tensors(temporary, tensors, {_RECORD: json.dumps(record)})
            entry = {"block": block, "layers": list(record["layers"]), "blake3": digest}
            put_in_place(temporary, file)
        self._state["blocks"].append(entry)
        if known := self._known():
            self._state["fingerprint"]["model"].update(known)
        self._write()
        self._index()

    def placing(self, manifest: str) -> None:
        """Say that the output is about to get its name. Raises OutputError.

        manifest   the sha256 of its manifest
        """
        if self._keeps:
            self._state["manifest"] = manifest
            self._write()

    @property
    def placed(self) -> bool:
        """Whether what has the output's name is what this run was about to put there."""
        file = self._out / MANIFEST
        expected = self._state.get("manifest")
        return expected is not None and file.is_file() and sha256(file) == expected

    # How it begins and ends --------------------------------------------------------------------

    def enter(self) -> None:
        """See what an earlier run left. Raises UnfinishedError where that is in the way."""
        if self._asked == "restart":
            self._clear()
        state = _read_state(self.folder)
        if not _worth_keeping(state):
            self._clear()
        elif self._asked == "resume":
            self._state = state
            shutil.rmtree(self.work, ignore_errors=True)
        else:
            self._state = state
            raise UnfinishedError(
                f"{self.folder} holds {self._said()} of a run into {self._out} that was stopped; "
                f"go on with it by --resume, or begin anew with --restart, which deletes it"
            )

    def leave(self, *, useless: bool) -> None:
        """Remove what no other run can use; that may be everything."""
        if useless or not _worth_keeping(_read_state(self.folder)):
            self._clear()
        else:
            shutil.rmtree(self.work, ignore_errors=True)

    def _said(self) -> str:
        done, total = len(self._state["blocks"]), self._state["total"]
        return f"{done} of {total} blocks" if done else "the measured sensitivities"

    def _file(self, place: int) -> Path:
        return self.folder / "blocks" / f"{place:05d}.safetensors"

    def _index(self) -> None:
        self._places = {
            layer: place
            for place, entry in enumerate(self._state["blocks"])
            for layer in entry["layers"]
        }

    def _write(self) -> None:
        file = self.folder / "state.json"
        temporary = file.with_suffix(".tmp")
        text = json.dumps(self._state, indent=1) + "\n"
        with written(file, len(text)):
            temporary.write_text(text, encoding="utf-8")
            put_in_place(temporary, file)

    def _clear(self) -> None:
        """Remove everything but the lock, the list of blocks first."""
        for name in ("state.json", "state.tmp"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def unfinished(out: Path, state: State) -> Iterator[Unfinished]:
    """Have the hidden folder of a run into `out`; what is in it stays if a block is done.

    Not where numbers were not right: they depend on what the run depends on, and would be the same.

    Raises LockedError where another run has it, UnfinishedError where one was stopped and `state`
    does not say what to do with it.
    """
    with locked_folder(unfinished_folder(out), f"output folder {out}"):
        kept = Unfinished(out, state)
        kept.enter()
        useless = False
        try:
            yield kept
            useless = True
        except QframeError as error:
            useless = error.exit_code == NonFiniteError.exit_code  # it would end so again
            raise
        finally:
            kept.leave(useless=useless)


def _as_far_as_known(before: Any, now: Any) -> Any:
    """Return what a run depends on, of the model no more than was known of it before."""
    if not all(isinstance(each, Mapping) and "model" in each for each in (before, now)):
        return now
    model, old = dict(now["model"]), before["model"]
    for name, said in old.items() if isinstance(old, Mapping) else ():
        if str(model.get(name, "")).startswith(f"{said} "):
            model[name] = said
    return {**now, "model": model}


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what state.json holds, {} where there is none. Raises UnfinishedError."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["state_version"] == STATE_VERSION:
            problem = _fault(state)
            if not problem:
                return dict(state)
        else:
            problem = f"written by another qframe: state_version {state['state_version']}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"cannot be read: {error}"
    raise UnfinishedError(f"{file}: {problem}; begin anew with --restart, which deletes {folder}")


def _fault(state: Mapping[str, Any]) -> str:
    """Return what is wrong with a list that no run can have written, "" for nothing."""
    kinds: Mapping[str, type | tuple[type, ...]] = {
        "fingerprint": (dict, NoneType),
        "total": int,
        "decision": (dict, NoneType),
        "blocks": list,
    }
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            return f"cannot be read: {key} is {_short(state.get(key, _MISSING))}"
    for entry in state["blocks"]:
        layers = entry.get("layers") if isinstance(entry, dict) else None
        named = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
        if not named or not isinstance(entry.get("blake3"), str):
            return f"cannot be read: a block is {_short(entry)}"
    return ""


def _worth_keeping(state: Mapping[str, Any]) -> bool:
    return bool(state) and bool(state["blocks"] or state["decision"])


def _plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield where two fingerprints differ, what was there, and what is, in their order."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            old, new = before.get(key, _MISSING), now.get(key, _MISSING)
            yield from differences(old, new, f"{place}.{key}".lstrip("."))
    elif before != now:
        yield place, _short(before), _short(now)


def _short(value: Any) -> str:
    text = value if value is _MISSING else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
