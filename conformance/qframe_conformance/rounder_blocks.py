"""Rounders that learn a block's layers together: what they owe, on small blocks.

The block is x + W2 relu(W1 x), with a third layer that no token reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
import torch
from hypothesis import strategies as st

from qframe import Grid, QuantizedWeight, RoundingProblem, Scheme, claims, rounding
from qframe.blocks import BlockProblem, Weights
from qframe.certificates import Evidence, LayerClaim
from qframe.claims import claims_of
from qframe.errors import QframeError
from qframe_conformance import kinds
from qframe_conformance.checks import Outcome, Violation, certified, check, require, same_bits
from qframe_conformance.engine import Refused, Scenario, is_out_of_memory
from qframe_conformance.report import Counterexample
from qframe_conformance.rounder_cases import copied, fields_of, global_states, pack
from qframe_conformance.rounder_subjects import Objection, claimed, either, unless_deterministic
from qframe_conformance.strategies import installed_grid

BLOCK: Final = "block"
WIDTH, INNER = 10, 13
BLOCKS: Final = 6  # of which the codes of at least one have to depend on outputs
TOKENS: Final = (7, 1, 12, 9)  # of each input; the last is held out
UP, DOWN, SPARE = "block.up", "block.down", "block.spare"
_SEEDS = st.integers(0, 2**32 - 1)


def scenarios(rounder: Any, declared: list[Scheme]) -> list[Scenario]:
    """Return a scenario for a few kinds of schemes, where the rounder learns blocks."""
    if not hasattr(rounder, "learn"):
        return []
    found = []
    for kind in declared:
        if kind.type == "int" and kind.num_bits in (2, 4):
            sides = "symmetric" if kind.symmetric else "asymmetric"
            name = f"{BLOCK}-{kind.format_name}-{sides}-{kind.strategy}"
            made = _SEEDS.map(partial(block_case, rounder, kind))
            found.append(Scenario(name, made, BLOCK))
    return found


def block_case(rounder: Any, scheme: Scheme, seed: int) -> BlockCase:
    """Return a block whose inputs have moved, and an outlier or zeros among its weights."""
    rng = np.random.default_rng(seed)
    shapes = {UP: (INNER, WIDTH), DOWN: (WIDTH, INNER), SPARE: (3, WIDTH)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights[UP][seed % INNER] = 0
    weights[DOWN][seed % WIDTH, seed % INNER] *= 2.0 ** (seed % 7)
    sources = [kinds.INPUTS[seed % len(kinds.INPUTS)](rng, WIDTH) for _ in TOKENS]
    inputs = [
        np.float32(np.resize(x, (tokens, WIDTH))) for x, tokens in zip(sources, TOKENS, strict=True)
    ]
    grid = installed_grid(scheme)
    return BlockCase(rounder, scheme, grid, weights, inputs, seed)


@dataclass(eq=False)
class BlockCase:
    """A block, and what the rounder made of it.

    weights   layer name -> [rows, columns] float32
    inputs    in the quantized network, [tokens, WIDTH] float32 each; the last is held out
    """

    rounder: Any
    scheme: Scheme
    grid: Grid
    weights: Mapping[str, Any]
    inputs: list[Any]
    seed: int

    @cached_property
    def problem(self) -> BlockProblem:
        """What the rounder is given; a new copy of everything each time the property is made."""
        layers = {
            name: RoundingProblem(
                name=name,
                weight=torch.from_numpy(weight.copy()),
                scheme=self.scheme,
                grid=self.grid,
            )
            for name, weight in self.weights.items()
        }
        inputs = [torch.from_numpy(x) for x in self.inputs]
        own = {name: layer.weight.clone() for name, layer in layers.items()}
        originals = [torch.from_numpy(np.float32(kinds.original_inputs(x))) for x in self.inputs]
        return BlockProblem(
            name="block",
            layers=layers,
            run=lambda number, weights: block(inputs[number], {**own, **weights}),
            targets=[block(x, own) for x in originals],
            moved=[
                (x.double() - y.double()).square().sum(-1)
                for x, y in zip(inputs, originals, strict=True)
            ],
            held_out=1,
        )

    def ask(self, problem: BlockProblem) -> Mapping[str, QuantizedWeight]:
        """Learn a block. Raises Violation where that is no mapping of codes for its layers."""
        try:
            made = self.rounder.learn(problem, np.random.default_rng(self.seed))
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise Violation(f"raised {type(error).__name__}: {error}") from None
        names = sorted(made) if isinstance(made, Mapping) else type(made).__name__
        require(names == sorted(problem.layers), f"returned {names}, expected one for each layer")
        for name, layer in problem.layers.items():
            try:
                pack(made[name], layer)
            except QframeError as error:
                raise Violation(f"{name}: {error}") from None
        found: Mapping[str, QuantizedWeight] = made
        return found

    @cached_property
    def made(self) -> Mapping[str, QuantizedWeight]:
        """What the rounder returned. Raises Refused where it is wrong: `block_answers` says so."""
        try:
            return self.ask(self.copy())
        except Violation as error:
            raise Refused(str(error)) from error

    def copy(self, **changes: Any) -> BlockProblem:
        """Return the problem with weights of its own, and changes."""
        layers = {name: copied(layer) for name, layer in self.problem.layers.items()}
        return replace(self.problem, layers=layers, **changes)

    def counterexample(self, check: str) -> Counterexample:
        """Return it as plain Python; `plugin` is defined before it."""
        changed = self.scheme.model_dump(exclude_defaults=True)
        fields = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        text = f"""\
from qframe import Scheme
from qframe_conformance import replay
from qframe_conformance.rounder_blocks import block_case

print(replay({check!r}, block_case(plugin, Scheme({fields}), {self.seed})))
"""
        return Counterexample(snippet=text)


def block(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Return x + W2 relu(W1 x)."""
    return x + torch.relu(x @ weights[UP].T) @ weights[DOWN].T


def values(made: Mapping[str, QuantizedWeight]) -> Weights:
    """Return what the codes of all layers stand for."""
    return {name: rounding.dequantize(each) for name, each in made.items()}


def _blocks(*also: Objection) -> Objection:
    def objection(rounder: Any, subject: Any) -> str | None:
        return None if subject == BLOCK else "it is about blocks"

    return either(objection, *also)


def _same(case: BlockCase, problem: BlockProblem, what: str) -> None:
    """Raise Violation unless a problem gives the same bits as the case's own."""
    expected, again = case.made, case.ask(problem)
    for name, first in expected.items():
        second = dict(fields_of(again[name]))
        for key, tensor in fields_of(first):
            same_bits(tensor, second.get(key), f"{key} of {name} {what}")


# Checks -----------------------------------------------------------------------------------------


@check("rounder", "structure", unless=_blocks())
def block_answers(case: BlockCase) -> Outcome:
    """A block gets codes for each of its layers, one that no token reaches included."""
    case.ask(case.copy())
    return None


@check("rounder", "determinism", unless=_blocks())
def block_purity(case: BlockCase) -> Outcome:
    """The weights of a block are left as they were, and global generators too."""
    given, before = case.copy(), global_states()
    case.ask(given)
    after = global_states()
    touched = [name for name, state in before.items() if state != after[name]]
    require(not touched, f"the global generator of {' and of '.join(touched)} was used or seeded")
    for name, layer in given.layers.items():
        same_bits(case.problem.layers[name].weight, layer.weight, f"{name} after learning")
    return None


@check("rounder", "determinism", unless=_blocks(unless_deterministic))
def block_determinism(case: BlockCase) -> Outcome:
    """The same block and seed give the same bits, on any number of threads."""
    _same(case, case.copy(threads=2), "the second time, with two threads")
    return None


@check("rounder", "determinism", unless=_blocks(unless_deterministic))
def block_held_out(case: BlockCase) -> Outcome:
    """Nothing is fitted on inputs that are held out."""
    *fitted, aside = case.problem.targets
    _same(case, case.copy(targets=[*fitted, -aside]), "when what is held out changes")
    return None


@check("rounder", "algebra", unless=_blocks())
def block_targets(case: BlockCase) -> Outcome:
    """Codes depend on the outputs that the block should have.

    One block may be best rounded to nearest for either of two outputs, a few are not.
    """
    for more in range(BLOCKS):
        own = block_case(case.rounder, case.scheme, case.seed + more)
        again = own.ask(own.copy(targets=[-each for each in own.problem.targets]))
        for name, first in own.made.items():
            second = dict(fields_of(again[name]))
            if any(not torch.equal(tensor, second[key]) for key, tensor in fields_of(first)):
                return None
    raise Violation(f"the same codes for the outputs of {BLOCKS} blocks and for their negatives")


@check("rounder", "bound", unless=_blocks())
def block_layers(case: BlockCase) -> Outcome:
    """What is claimed of layers holds for each layer of a block."""
    ratios = [0.0]
    for name, made in case.made.items():
        evidence = Evidence(problem=case.problem.layers[name], quantized=made)
        for claim in claims_of(case.rounder):
            if isinstance(claim, LayerClaim) and claim.objection(case.scheme) is None:
                ratios.append(certified(claim.certify(evidence), name))
    return max(ratios)


@check("rounder", "objective", "B10.f", unless=_blocks(claimed(claims.NoWorseBlock)))
def block_no_worse(case: BlockCase) -> Outcome:
    """The outputs of a block lose no more than with its layers rounded to nearest."""
    problem = case.problem
    nearest = {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}
    found, allowed = (problem.error(values(made)) for made in (case.made, nearest))
    if found <= allowed:
        return found / allowed if allowed else 0.0
    raise Violation(
        f"the mean squared error of outputs is {found:.9g}, rounded to nearest {allowed:.9g}",
        ratio=found / allowed if allowed else np.inf,
        theorem="B10.f",
    )
