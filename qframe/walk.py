"""The walk through the network: blocks are loaded, quantized, written and freed in turn.

With calibration data the walk is the network's own forward pass in lockstep
(`qframe.calibration`): before a layer runs, it is quantized on the inputs that wait for it, and
the pass goes on through the quantized layer. Without, the layers are taken one by one.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, Self

import torch
from torch import nn

from qframe.behind import Behind
from qframe.calibration import Arrival, CalibrationData, Lockstep, Stop, layer_input
from qframe.checkpoint import CheckpointWriter
from qframe.contracts import Event, InputGroup, LayerOutline
from qframe.errors import ModelError
from qframe.feeders import Feeder
from qframe.fold_search import UNSEEN, Source
from qframe.folds import Divider, Division, Folded
from qframe.freed import hand_back, keep_more
from qframe.grouping import Groups
from qframe.inputs import GroupInputs, Split, Waiting
from qframe.kept_blocks import DoneBlock, DoneGroup, Ledger
from qframe.model import Network, replace_module, set_weight
from qframe.original import OriginalPass, check_pairs
from qframe.pages import kept_pages
from qframe.parts import PARTS
from qframe.ranks import shares
from qframe.recipe import Plan
from qframe.report.layers import Folding, LayerReport
from qframe.sharing import Part, whole_groups
from qframe.solve import Solved, Solver
from qframe.spilling import Spill
from qframe.stored import QuantizedLinear, StoredLayer


@dataclass(frozen=True, slots=True)
class Progress:
    """Told to the caller when a block is done."""

    block: str
    done: int
    blocks: int
    layers: Sequence[LayerReport]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Left:
    """A block whose layers are quantized, and not yet written."""

    block: str
    done: DoneBlock
    layers: Mapping[str, Solved]
    divided: Mapping[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Written:
    """What there is to tell of a block once it is written."""

    block: str
    layers: Sequence[str]
    seconds: float


class Walk:
    """Takes every layer of the plan through the solver, and hands the results to the writer.

    Use as a context manager: what is being written has to end before the folder goes.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        outlines: Mapping[str, LayerOutline],
        solver: Solver,
        writer: CheckpointWriter | None,
        progress: Callable[[Progress], None] | None,
        ledger: Ledger | None = None,
    ) -> None:
        self._network, self._plan, self._solver = network, plan, solver
        self._ranks = solver.ranks
        self._outlines = outlines
        self._ledger = ledger or Ledger(None, outlines)
        self._done = DoneBlock("")
        self._writer, self._progress = writer, progress
        self.reports: dict[str, LayerReport] = {}
        self._pending: dict[str, Solved] = {}
        self._divided: dict[str, torch.Tensor] = {}  # parameters of what divides in the block
        self._written: set[str] = set()
        self._blocks_left: set[str] = set()
        self._blocks_written: set[str] = set()
        self._block: str | None = None
        self._left: _Left | None = None
        self._behind = Behind(solver.threads)
        self._being_written: _Written | None = None
        self._dtype = torch.float32
        self._spills: tuple[Spill | None, Spill | None] = (None, None)
        self._shown = False  # whether the network runs
        self._original: OriginalPass | None = None
        self._clock = time.perf_counter()
        self._groups = Groups(network, plan.schemes, folds=solver.folds, ranks=self._ranks)
        self._solved_groups = 0
        self._folding = Folding(folded={}, left={})
        self.divisions: dict[str, Division] = {}  # of layers whose rows are divided
        self._divided_at_last: dict[str, torch.Tensor] = {}
        self._at_last: dict[str, StoredLayer] = {}  # layers of a module that lose their scales
        self._expected: dict[str, dict[int, torch.Tensor]] = {}
        self._before: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._behind.__exit__(*error)

    def without_data(self) -> None:
        """Quantize every layer on its weights alone: ranks do one each at a time.

        Of those that are quantized panel by panel a rank does its share of a block at a time.
        """

        def place(layer: str) -> tuple[str, bool]:
            return self._network.block_of(layer), self._solver.apart(self._plan.schemes[layer])

        with kept_pages(), keep_more():
            for (block, apart), layers in groupby(self._plan.schemes, place):
                while batch := list(islice(layers, None if apart else self._ranks.size)):
                    self._quantize_alone(block, batch)
        self._finish()

    def with_data(
        self,
        data: CalibrationData,
        *,
        threads: int,
        dtype: torch.dtype,
        spills: tuple[Spill | None, Spill | None] = (None, None),
    ) -> None:
        """Quantize every layer on the inputs that it gets in the quantized network.

        Where the method asks for them, also on those that it has in the original one.

        spills   of the activations of both, the quantized network first
        """
        module, blocks = self._network.module, self._network.blocks
        self._dtype, self._shown, self._spills = dtype, True, spills
        split = Split(len(data.inputs), len(data.held_out), self._ranks)
        make = partial(Lockstep, module, threads=threads, dtype=dtype, agree=self._agree)
        own, others = spills
        steps = make(spill=own)
        ahead = make(spill=others) if self._solver.pairs else None
        self._before = steps.before
        by_block: dict[str, list[str]] = {name: [] for name in blocks}
        for layer in self._plan.schemes:
            by_block.setdefault(self._network.block_of(layer), []).append(layer)
        for each in (steps, ahead) if ahead is not None else (steps,):
            for name, layers in by_block.items():
                if name in blocks:
                    each.watch(Stop("block", name), blocks[name])
                for layer in layers:
                    each.watch(Stop("layer", layer), module.get_submodule(layer))

        def on_stop(stop: Stop, arrivals: Mapping[int, Arrival]) -> bool:
            if stop.kind == "block":
                self._enter(stop.name)
                self._groups.find(stop.name, steps, arrivals)
                if self._original is not None:
                    originals = self._original.arrivals(stop, arrivals)
                    self._learn(stop.name, arrivals, originals, fitted=len(data.inputs))
                    self._original.advance()
            elif stop.name in self.reports:
                self._check_shared(stop.name, arrivals)
            else:
                self._quantize_waiting(stop.name, arrivals, split)
            return len(self.reports) < len(self._plan.schemes)

        # A cache would grow whenever a block is looked at, and the next run would read from it.
        options = accepted(module, {"use_cache": False}, by_name=self._network.folder is None)
        every = [*data.inputs, *data.held_out]
        inputs = {number: every[number] for number in split.own}
        loaders = load_on_demand(self._network)
        try:
            if ahead is not None:
                self._original = OriginalPass(ahead, inputs, options)
            steps.run(inputs, options, on_stop, self._passes)
        finally:
            if self._original is not None:
                self._original.close()
            for handle in loaders:
                handle.remove()
        for layer in self._plan.schemes:
            if layer not in self.reports:  # no token reached it
                self._quantize_alone(self._network.block_of(layer), [layer])
        self._finish()

    def folding(self) -> Folding | None:
        """Return what became of input scales; None where there are none, or they are to stay."""
        found = self._folding
        return found if self._solver.folds and (found.folded or found.left) else None

    def _learn(
        self,
        name: str,
        arrivals: Mapping[int, Arrival],
        originals: Mapping[int, Arrival],
        *,
        fitted: int,
    ) -> None:
        """Show a block to a rounder that learns its layers together, when its turn comes."""
        if self._solver.learner is None:
            return
        prefix, block = f"{name}." if name else "", self._network.blocks[name]
        layers = {
            layer: (self._network.module.get_submodule(layer), self._network.weight(layer), scheme)
            for layer, scheme in self._plan.schemes.items()
            if layer.startswith(prefix) and layer not in self.reports
        }
        known = self._ledger.learned(next(iter(layers), ""))
        if known is not None:
            self._solver.events.extend(known)
            return
        before = len(self._solver.events)
        self._solver.where.at(name, "learning its layers together")
        pairs = {number: (arrivals[number], originals[number]) for number in arrivals}
        self._solver.learner.learn(name, block, layers, pairs, fitted=fitted, dtype=self._dtype)
        self._done.learned = self._solver.events[before:]

    # Layers ------------------------------------------------------------------------------------

    def _quantize_alone(self, block: str, layers: Sequence[str]) -> None:
        """Quantize layers of a block on their weights, each on a rank."""
        self._enter(block)
        groups = [InputGroup(layers=(self._network.layers[layer],)) for layer in layers]
        owners = {layer: place % self._ranks.size for place, layer in enumerate(layers)}
        self._solve(groups, GroupInputs, owners)

    def _quantize_waiting(self, layer: str, arrivals: Mapping[int, Arrival], split: Split) -> None:
        """Quantize the group of a layer before which all chunks wait."""
        block = self._network.block_of(layer)
        if block not in self._network.blocks:
            self._enter(block)
            self._groups.outside(layer)
        group = self._groups.of(layer)
        inputs = {i: layer_input(a.args, a.kwargs) for i, a in arrivals.items()}
        self._expected = {m.name: dict(inputs) for m in group.layers if m.name != layer}
        originals: dict[int, torch.Tensor] | None = None
        if self._original is not None:
            there = self._original.arrivals(Stop("layer", layer), arrivals)
            originals = {i: layer_input(a.args, a.kwargs) for i, a in there.items()}
            check_pairs(layer, inputs, originals)
        # Ranks that waited for this group's last layer begin with the next one's first.
        costs = [member.rows * member.columns**2 for member in group.layers]
        ranks = shares(costs, self._ranks.size, self._solved_groups % self._ranks.size)
        owners = {m.name: rank for m, rank in zip(group.layers, ranks, strict=True)}
        own, others = self._spills
        collect = partial(
            GroupInputs.collect,
            group,
            Waiting(inputs, None if own is None else own.read),
            split,
            self._dtype,
            self._solver.threads,
            None
            if originals is None
            else Waiting(originals, None if others is None else others.read),
        )
        self._solve([group], collect, owners)
        del originals
        if self._original is not None and len(self.reports) < len(self._plan.schemes):
            self._original.advance(member.name for member in group.layers)
        for member in group.layers:
            module = self._network.module.get_submodule(member.name)
            running = self._pending[member.name].running
            set_weight(module, running.weight_in_network())
            if running.inputs is not None:
                self._before[member.name] = running.inputs_of

    def _solve(
        self,
        groups: Sequence[InputGroup],
        inputs: Callable[[], GroupInputs],
        owners: Mapping[str, int],
    ) -> None:
        """Quantize groups, or take what an earlier run made of them.

        inputs   of all of them: of several groups there are none
        owners   layer -> the rank that quantizes it
        """
        if self._behind.idle:
            self._await_written()
        known = [self._ledger.group(group) for group in groups]
        anew = [group for group, found in zip(groups, known, strict=True) if found is None]
        made: Iterator[DoneGroup] = iter(())
        if anew:
            self._keep_left()
            made = iter(self._solve_anew(anew, inputs(), owners))
        for group, found in zip(groups, known, strict=True):
            if found is None:
                done = next(made)
                for name, result in done.layers.items():
                    self._solver.wait_for(result.report, owners[name])
                self._solver.events.extend(done.events)
            else:
                done, judged = found
                reports = [result.report for result in done.layers.values()]
                self._solver.take_over(reports, done.events, judged)
            self._solver.where.at(self._block or group.name, "running the network")
            self._solved_groups += 1
            self._book(group.name, done)

    def _book(self, group: str, done: DoneGroup) -> None:
        """Take down what came of a group."""
        self._done.groups[group] = done
        self._pending.update(done.layers)
        if done.folded is not None:
            self._fold(group, done.folded)
        elif done.left is not None:
            self._folding.left[group] = done.left
        self.reports.update({name: result.report for name, result in done.layers.items()})
        if self._writer is not None:
            self._writer.add_statistics(done.statistics)

    def _solve_anew(
        self, groups: Sequence[InputGroup], inputs: GroupInputs, owners: Mapping[str, int]
    ) -> list[DoneGroup]:
        """Quantize groups, whose events are yet to be told.

        Without inputs a rank is concerned with its own layers alone; else all take part.
        """
        others = {layer for layer, rank in owners.items() if rank != self._ranks.rank}
        shared = bool(inputs.fitted.lengths or inputs.held_out.lengths)
        concerned = [
            group
            for group in groups
            if shared or any(member.name not in others for member in group.layers)
        ]
        own = {} if shared else self._by_rows(concerned)
        for group in concerned:
            if group.name not in own:
                own[group.name] = self._part(group, inputs, others)
        if self._ranks.size > 1:
            return whole_groups(self._ranks, groups, owners, own, self._outlines)
        return [own[group.name].whole() for group in groups]

    def _by_rows(self, groups: Sequence[InputGroup]) -> dict[str, Part]:
        """Quantize layers that are alone in their groups panel by panel: those that can be."""
        rows, origins = {}, {}
        for name in (group.name for group in groups):
            if self._solver.apart(self._plan.schemes[name]):
                read = self._network.rows_of(name)
                if read is not None:
                    rows[name], origins[name] = read, self._network.origin(name)
        if not rows:
            return {}
        layers = [self._network.layers[name] for name in rows]
        solved = self._solver.solve_by_rows(layers, rows, origins, self._plan.schemes)
        return {
            name: Part(
                DoneGroup(
                    layers={name: each},
                    statistics={},
                    folded=None,
                    left=None,
                    events=self._untied(name),
                ),
                {name: ()},
                {},
            )
            for name, each in solved.items()
        }

    def _untied(self, layer: str) -> list[Event]:
        """Return what there is to tell of a layer before it is quantized."""
        if not self._network.is_tied(layer):
            return []
        message = "its weight was shared with another module, which keeps it"
        return [Event(kind="untied", layer=layer, message=message)]

    def _part(self, group: InputGroup, inputs: GroupInputs, others: Container[str]) -> Part:
        """Quantize those layers of a group that are not other ranks'."""
        events = self._solver.events
        before = len(events)
        weights, origins = {}, {}
        self._solver.make_room(inputs)
        for layer in group.layers:
            events.extend(self._untied(layer.name))
            weights[layer.name] = self._network.weight(layer.name)
            origins[layer.name] = self._network.origin(layer.name)
        divider = self._divider(group.name)
        given = None if isinstance(divider, str) else divider
        solved = self._solver.solve(
            group, weights, origins, self._plan.schemes, inputs, given, others
        )
        done = DoneGroup(
            layers=solved.layers,
            statistics=solved.statistics,
            folded=solved.folded,
            left=str(divider) if solved.scaled and solved.folded is None else None,
            events=events[before:],
        )
        del events[before:]
        return Part(done, solved.events, solved.orders)

    def _agree(self, own: int | None) -> int | None:
        """Return the first stop at which chunks of any rank wait."""
        every = self._ranks.exchange("the next stop", {}, own)
        return min((place for _, place in every if place is not None), default=None)

    def _divider(self, group: str) -> Divider | str:
        """Return what can divide by a scale of a group's input, or why nothing can."""
        fold = self._groups.candidate(group)
        if not isinstance(fold, Source):
            return fold
        solved = self._pending.get(fold.name)
        if solved is None or fold.rows is None:
            return UNSEEN
        bias = self._network.module.get_submodule(fold.name)._parameters.get("bias")
        own = None if bias is None else self._network.own(f"{fold.name}.bias")
        feeder = Feeder(fold.name, fold.rows, solved.stored, own)
        return feeder.objection() or feeder

    def _fold(self, group: str, folded: Folded) -> None:
        """Take down what divides; nothing divides yet, as chunks may be anywhere in the block."""
        self._divided.update(folded.tensors)
        self._folding.folded[group] = folded.name
        if folded.stored is not None and folded.division is not None:
            before = self._pending[folded.name]
            self._pending[folded.name] = dataclasses.replace(before, stored=folded.stored)
            self.divisions[folded.name] = folded.division

    def _passes(self, stop: Stop, number: int, arrival: Arrival) -> bool:
        """Return whether a chunk may run a layer: it was quantized with its group, on this input.

        Each input counts once; what runs again, or reads another input, has to stop.
        """
        inputs = self._expected.get(stop.name)
        if inputs is None or layer_input(arrival.args, arrival.kwargs) is not inputs.get(number):
            return False
        del inputs[number]
        return True

    def _check_shared(self, layer: str, arrivals: Mapping[int, Arrival]) -> None:
        """Say what is wrong with chunks that stop before a layer that is quantized already.

        Those that come for the first time read another input; the others come again.
        """
        if arrivals.keys() & self._expected.get(layer, {}).keys():
            raise ModelError(
                f"layer {layer!r} shares its input with the layer before it in the first "
                f"block of its make, but not in this one; please report this network"
            )
        event = Event(
            kind="runs again",
            layer=layer,
            message="it runs more than once; it was calibrated on its first inputs",
        )
        if event not in self._solver.events:
            self._solver.events.append(event)

    # Blocks ------------------------------------------------------------------------------------

    def _enter(self, block: str) -> None:
        """Finish the block before, and load this one; "" stands for what is in no block."""
        if block == self._block:
            return
        self._leave()
        if block and block in self._blocks_left and self._network.folder is not None:
            raise ModelError(
                f"block {block!r} runs more than once in a forward pass, which streaming from a "
                f"folder cannot do; load the model and give qframe.quantize the module"
            )
        self._block, self._clock = block, time.perf_counter()
        self._done = DoneBlock(block)
        self._solver.where.at(block, "running the network")
        if block and self._shown:
            # The embeddings, say: modules that run again are loaded again.
            self._network.release_others(keep=self._plan.schemes)
            hand_back()
            self._network.load(self._network.blocks[block], recurse=True)

    def _leave(self) -> None:
        """Free the block, and write the one before it, whose reports are complete by now."""
        if self._block is None:
            return
        seconds = time.perf_counter() - self._clock
        left = _Left(self._block, self._done, self._pending, self._divided, seconds)
        if self._block:
            self._network.release(self._network.blocks[self._block])
        self._blocks_left.add(self._block)
        self._pending, self._divided, self._expected = {}, {}, {}
        self._write_left(still_waiting=len(left.layers))
        self._left = left
        if self._shown:
            self._keep_left()
        else:  # its codes need not wait
            self._write_left()
            hand_back()

    def _write_left(self, still_waiting: int = 0) -> None:
        """Write the layers of the block that was left last; those of later ones are waiting."""
        judged = self._solver.settle(still_waiting)
        left, self._left = self._left, None
        if left is None:
            return
        work: list[Callable[[], None]] = [partial(self._ledger.keep, left.done, judged)]
        for name, solved in left.layers.items():
            work += self._write_layer(name, solved)
        work += self._write_divided(left.divided)
        self._await_written()
        self._behind.do(partial(_one_by_one, work))
        self._being_written = _Written(left.block, list(left.layers), left.seconds)

    def _await_written(self) -> None:
        """Wait for the block that is being written, and tell that it is done."""
        self._behind.wait()
        left, self._being_written = self._being_written, None
        if left is None:
            return
        self._blocks_written.add(left.block)
        if self._progress is not None and left.layers:
            self._progress(
                Progress(
                    left.block or "outside all blocks",
                    len(self._blocks_written),
                    len({self._network.block_of(name) for name in self._plan.schemes}),
                    [self.reports[name] for name in left.layers],
                    left.seconds,
                )
            )

    def _keep_left(self) -> None:
        """Keep the block that was left last as soon as its reports are complete."""
        if self._left is not None:
            judged = self._solver.judged(len(self._left.layers))
            if judged is not None:
                self._await_written()
                self._behind.do(partial(self._ledger.keep, self._left.done, judged))

    def _write_layer(self, name: str, solved: Solved) -> list[Callable[[], None]]:
        """Let go of a layer; return what is to be done to write it."""
        self._before.pop(name, None)  # or the layer would be held until the end
        prefix = f"{name}." if name else ""
        work: list[Callable[[], None]] = []
        if self._writer is not None:
            work.append(partial(self._writer.add_layer, self._outlines[name], solved.stored))
        if not self._network.is_tied(name):  # else the other user still needs it
            self._written.add(self._network.stored_name(f"{prefix}weight"))
        if self._network.folder is None:
            old = self._network.module.get_submodule(name)
            bias = old._parameters.get("bias")
            new = QuantizedLinear(solved.running, None if bias is None else bias.data)
            self._network.module = replace_module(self._network.module, name, new)
            if solved.stored is not solved.running:
                self._at_last[name] = solved.stored
        return work

    def _write_divided(self, tensors: Mapping[str, torch.Tensor]) -> list[Callable[[], None]]:
        """Return the same for parameters of what divides; a module in memory gets them last."""
        if self._network.folder is None:
            self._divided_at_last.update(tensors)
        elif self._writer is not None:
            stored = {self._network.stored_name(name): tensor for name, tensor in tensors.items()}
            self._written.update(stored)
            return [partial(self._writer.add, stored)] if stored else []
        return []

    def _fold_module(self) -> None:
        """Let what was found divide, instead of the layers that read it.

        Not before the pass is over: a block may run again, and its chunks may be anywhere in it.
        """
        module = self._network.module
        for name, stored in self._at_last.items():
            bias = module.get_submodule(name)._buffers["bias"]
            if bias is not None:
                bias = self._divided_at_last.pop(f"{name}.bias".lstrip("."), bias).to(bias.dtype)
            module = replace_module(module, name, QuantizedLinear(stored, bias))
        for name, values in self._divided_at_last.items():
            owner, _, key = name.rpartition(".")
            old = module.get_submodule(owner)._parameters[key]
            norm = values if old is None else values.to(old.dtype)  # it is cast when it is stored
            module.get_submodule(owner)._parameters[key] = nn.Parameter(norm, requires_grad=False)

    def _finish(self) -> None:
        """Leave the last block, and carry over every tensor no quantized layer stands for."""
        self._leave()
        self._write_left()
        self._await_written()
        self._fold_module()
        if self._writer is None:
            return
        if self._network.folder is not None:
            for name in self._network.folder.tensors:
                if name not in self._written:
                    dtype, pieces = self._network.carry(name)
                    shape = self._network.folder.tensors[name].shape
                    self._writer.add_pieces(name, dtype, shape, pieces)
            return
        packed = {
            f"{name}.{key}".lstrip(".")
            for name, child in self._network.module.named_modules()
            if isinstance(child, QuantizedLinear)
            for key in PARTS
        }
        for name, tensor in self._network.module.state_dict().items():
            if name not in packed:
                self._writer.add({name: self._network.carried(name, tensor).clone()})


def _one_by_one(work: Sequence[Callable[[], None]]) -> None:
    for each in work:
        each()


def load_on_demand(network: Network) -> list[Any]:
    """Load the parameters of modules outside all blocks when they are about to run."""
    if network.folder is None:
        return []
    inside = {child for block in network.blocks.values() for child in block.modules()}
    return [
        child.register_forward_pre_hook(lambda module, _: network.load(module, recurse=False))
        for child in network.module.modules()
        if child not in inside and any(True for _ in child.parameters(recurse=False))
    ]


def accepted(
    module: nn.Module, options: Mapping[str, Any], *, by_name: bool = False
) -> dict[str, Any]:
    """Return those keyword arguments that the module's forward takes.

    by_name   only those that it names; else `**kwargs` take them all
    """
    parameters = inspect.signature(module.forward).parameters
    anything = not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: value for key, value in options.items() if anything or key in parameters}
