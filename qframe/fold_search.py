"""Which norms and layers can take up the scale of a group's input: found, then tried.

A norm is found by structure: a module that returned the very tensor which the layers of the group
read, and has nothing but a weight for each channel, and perhaps a bias. A layer is found by what it
does (`qframe.feeder_search`): multiply its rows, and channels of the input are multiplied.

Tried: weights are multiplied by powers of two and the columns of the group's layers by their
inverses, which rounds nothing, so a block in which nothing else reads what was multiplied returns
the same bits. A router that reads the same tensor, a residual, a layer that is not quantized, and a
norm that multiplies by 1 + w all show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qframe.calibration import Arrival, Lockstep
from qframe.contracts import InputGroup
from qframe.fingerprints import fingerprint
from qframe.folds import Fold
from qframe.model import Network, get_weight, set_weight

# Exponents of the powers of two, channel after channel. Every channel is moved, none like its
# neighbours, and three goes into no power of two: heads and groups of channels do not repeat.
EXPONENTS = (1, -1, 2)

NOTHING = "comes from neither a norm nor a quantized layer that could divide"
UNSEEN = "was not seen when norms were looked for"
OUTSIDE = "is that of a layer outside all blocks"
TIED = "comes from something that shares its weight"
AGAIN = "comes from something that runs more than once"
IDLE = "is that of a block of which not everything ran"
ZERO = "is zero in a channel wherever it was looked at"
STATE = "is that of a block that may keep or change what it is given"
OTHERS = "is read by something else, or its norm does not simply multiply by its weight"
"""Why a scale stays at run time: each goes on a sentence about the input that it is of."""

Place = tuple[str, int]  # a module, and how many times it ran before


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where the input of a group may come from.

    name   of a module, within the block or in full; "" for none that is known
    rows   [columns] int64, which row of a layer each channel is; None for a norm
    """

    name: str = ""
    rows: torch.Tensor | None = None


@dataclass(slots=True)
class Run:
    """What was seen while a block ran once. Names are those within the block.

    inputs     (layer, its input) in order of use; layers by their full names
    norms      module that may be a norm -> what it returned, each time
    returned   what leaves returned, and "" the block: which norm returned the very same tensor,
               "" for none, and a digest, None where there is something that has none
    ran        every module that ran
    """

    inputs: list[tuple[str, Any]] = field(default_factory=list)
    norms: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    returned: dict[Place, tuple[str, str | None]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def source(self, tensor: torch.Tensor) -> str:
        """Return the first norm that returned this very tensor, "" for none."""
        found = (n for n, some in self.norms.items() if any(each is tensor for each in some))
        return next(found, "")

    def input_of(self, layer: str) -> torch.Tensor | None:
        """Return what a layer, given by its full name, read when it first ran; None if never."""
        return next((x for name, x in self.inputs if name == layer), None)

    def between(self, first: str, last: str) -> list[str]:
        """Return the leaves that returned from the one to the other, without the last, in order."""
        places = [name for name, _ in self.returned]
        return places[places.index(first) : places.index(last)]

    def same(self, other: Run, but: Container[str]) -> bool:
        """Return whether everything has the same bits as in another run.

        but   norms whose tensor may differ, whoever returned it, and leaves
        """
        if self.returned.keys() != other.returned.keys():
            return False
        return all(
            place[0] in but
            or (source and source in but)
            or (digest is not None and digest == other.returned[place][1])
            for place, (source, digest) in self.returned.items()
        )


def look(steps: Lockstep, block: nn.Module, arrival: Arrival, *, digests: bool = True) -> Run:
    """Run a block once, and look on.

    digests   whether runs are to be compared: it takes a hash of everything that leaves return
    """
    run = Run()

    def watch(name: str, module: nn.Module) -> Any:
        leaf, norm = not any(module.children()), may_be_norm(module)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            run.ran.add(name)
            if norm and isinstance(output, torch.Tensor):
                run.norms.setdefault(name, []).append(output)
            if digests and leaf and name:
                times = sum(place[0] == name for place in run.returned)
                run.returned[name, times] = (run.source(output), digest(output))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in block.named_modules()]
    try:
        run.inputs, result = steps.record(block, arrival)
    finally:
        for handle in handles:
            handle.remove()
    run.returned["", 0] = ("", digest(result) if digests else None)
    return run


def find(
    network: Network,
    name: str,
    steps: Lockstep,
    arrival: Arrival,
    groups: Sequence[tuple[InputGroup, Source]],
    run: Run | None,
) -> dict[str, Fold | Source | str]:
    """Return for each group of a block, by its name, its norm or layer, or why it has none.

    name      of the block, whose weights are in memory and are there again afterwards
    arrival   what the block is tried on
    groups    and for each where its input seems to come from, by the name within the block
    run       of the block on this arrival, with digests, where there has been one
    """
    block = network.blocks[name]
    found: dict[str, Fold | Source | str] = {}
    trials: dict[str, _Trial] = {}
    for group, source in groups:
        found[group.name] = candidate = _candidate(network, name, source, group.columns)
        if not isinstance(candidate, str):
            layers = tuple(network.module.get_submodule(m.name) for m in group.layers)
            module = block.get_submodule(source.name)
            trials[group.name] = _Trial(group.name, source, module, layers)
    if not trials:
        return found
    given = digest((arrival.args, dict(arrival.kwargs)))
    before = run or look(steps, block, arrival)
    prefix = f"{name}." if name else ""
    for group_name, trial in list(trials.items()):
        wrong = STATE if given is None else _unfit(block, before, trial)
        if wrong:
            found[group_name] = wrong
            del trials[group_name]

    def changes(some: Sequence[_Trial]) -> bool:
        but = {leaf for trial in some for leaf in _differing(block, before, trial, prefix)}
        with _scaled(some):
            after = look(steps, block, arrival)
        return not after.same(before, but)

    if trials and changes(list(trials.values())):
        for group_name, trial in trials.items():
            if len(trials) == 1 or changes([trial]):
                found[group_name] = OTHERS
    if trials and digest((arrival.args, dict(arrival.kwargs))) != given:
        found |= dict.fromkeys(trials, STATE)  # one run cannot be compared with another
    return found


@dataclass(frozen=True, slots=True)
class _Trial:
    """A group by its name, where its input comes from, that module, and the group's layers."""

    group: str
    source: Source
    module: nn.Module
    layers: tuple[nn.Module, ...]


def _candidate(network: Network, block: str, source: Source, columns: int) -> Fold | Source | str:
    """Return a module of a block as something that might divide, or why it cannot."""
    full = f"{block}.{source.name}".lstrip(".")
    parameters = network.module.get_submodule(full)._parameters if source.name else {}
    names = [f"{full}.{key}" for key, value in parameters.items() if value is not None]
    weight = parameters.get("weight")
    fits = source.rows is not None or (weight is not None and tuple(weight.shape) == (columns,))
    if not (names and fits):
        return NOTHING
    if any(network.is_shared(parameter) for parameter in names):
        return TIED
    if source.rows is not None:
        return Source(full, source.rows)
    bias = network.own(f"{full}.bias") if f"{full}.bias" in names else None
    fold = Fold(full, network.own(f"{full}.weight"), bias)
    return fold.objection() or fold


def may_be_norm(module: nn.Module) -> bool:
    """Return whether a module has nothing but a weight [columns], and perhaps such a bias."""
    own = {key: value for key, value in module._parameters.items() if value is not None}
    weight = own.get("weight")
    if any(module.children()) or weight is None or not own.keys() <= {"weight", "bias"}:
        return False
    return weight.ndim == 1 and all(
        p.shape == weight.shape and p.is_floating_point() for p in own.values()
    )


def _unfit(block: nn.Module, run: Run, trial: _Trial) -> str:
    """Return why a trial would tell nothing, "" where it does."""
    x = run.input_of(trial.group)
    times = sum(name == trial.source.name for name, _ in run.returned)
    if times != 1 or x is None:
        return AGAIN
    for name, module in block.named_modules():
        lists = isinstance(module, (nn.ParameterList, nn.ParameterDict))  # which never run
        own = any(True for _ in module.parameters(recurse=False))
        if own and not lists and name not in run.ran:
            return IDLE
    moved = x.reshape(-1, x.shape[-1]).ne(0).any(0)
    if trial.source.rows is None:
        weight = trial.module._parameters["weight"]
        moved = moved if weight is None else moved | (weight == 0)
    return "" if bool(moved.all()) else ZERO


def _differing(block: nn.Module, run: Run, trial: _Trial, prefix: str) -> list[str]:
    """Return what may return other bits while a trial is on, given by its name in the block.

    A norm, whoever hands its tensor on; or a layer and the activations between it and the group.
    """
    if trial.source.rows is None:
        return [trial.source.name]
    leaves = run.between(trial.source.name, trial.group.removeprefix(prefix))
    found = [leaf for leaf in leaves if not _has_parameters(block, leaf)]
    return [trial.source.name, *found]


def _has_parameters(block: nn.Module, name: str) -> bool:
    return any(True for _ in block.get_submodule(name).parameters())


@contextmanager
def _scaled(trials: Sequence[_Trial]) -> Iterator[None]:
    """Divide norms and rows of layers by powers of two, and multiply the groups' columns."""
    kept: list[tuple[nn.Module, Mapping[str, nn.Parameter | None]]] = []
    try:
        for trial in trials:
            kept += [(m, dict(m._parameters)) for m in (trial.module, *trial.layers)]
            rows = trial.source.rows
            if rows is None:
                for key, value in trial.module._parameters.items():
                    if value is not None:
                        scaled = value.detach() / _powers(len(value)).to(value.dtype)
                        trial.module._parameters[key] = nn.Parameter(scaled, requires_grad=False)
            else:
                multiply_rows(trial.module, 1 / _powers(len(get_weight(trial.module))))
            for layer in trial.layers:
                weight = get_weight(layer)
                powers = _powers(weight.shape[1] if rows is None else int(rows.max()) + 1)
                powers = powers if rows is None else powers[rows]
                set_weight(layer, weight * powers.to(weight.dtype))
        yield
    finally:
        for module, parameters in reversed(kept):  # one may be changed twice
            module._parameters.update(parameters)


def multiply_rows(layer: nn.Module, factors: torch.Tensor) -> None:
    """Multiply the rows of a linear layer, and its bias, [rows] powers of two."""
    weight, bias = get_weight(layer), layer._parameters.get("bias")
    set_weight(layer, weight * factors[:, None].to(weight.dtype))
    if bias is not None:
        scaled = bias.detach() * factors.to(bias.dtype)
        layer._parameters["bias"] = nn.Parameter(scaled, requires_grad=False)


def _powers(columns: int) -> torch.Tensor:
    """Return powers of two, [columns] float32."""
    return torch.tensor([2.0 ** EXPONENTS[j % len(EXPONENTS)] for j in range(columns)])


def digest(value: Any) -> str | None:
    """Return a hash of tensors in lists, mappings and the like; None where something has none."""
    parts: list[str | None] = []
    if isinstance(value, torch.Tensor):
        parts = [str(value.dtype), str(tuple(value.shape)), fingerprint(value)]
    elif value is None or isinstance(value, (bool, int, float, str)):
        parts = [repr(value)]
    elif isinstance(value, Mapping):
        parts = [digest(item) for pair in value.items() for item in pair]
    elif isinstance(value, (list, tuple)):
        parts = [digest(item) for item in value]
    else:
        return None
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    text = "\0".join([type(value).__name__, *known])
    return hashlib.sha256(text.encode()).hexdigest()
