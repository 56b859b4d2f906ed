"""Input groups that outlier handlers are tried on, and what a handler made of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch

from qframe import (
    Grid,
    InputGroup,
    LayerInfo,
    Rewrite,
    RewriteProblem,
    Rotation,
    RoundingProblem,
    Scheme,
)
from qframe.claims.handlers import Rewriting
from qframe.claims.observers import Float32
from qframe.transforms import InputTransform
from qframe_conformance.checks import Violation
from qframe_conformance.engine import Refused
from qframe_conformance.kinds import Float64
from qframe_conformance.randomness import changed, random_states, seed_everything
from qframe_conformance.report import Counterexample
from qframe_conformance.strategies import (
    installed_grid,
    installed_input_grid,
    installed_observer,
)
from qframe_conformance.values import leaves

# Cases ----------------------------------------------------------------------------------------


class Statistics(dict[str, Any]):
    """Values by the name of their observer; to ask for one that `needs` does not name is wrong."""

    def __missing__(self, name: str) -> NoReturn:
        raise Violation(
            f"the handler reads the statistic {name!r}, which its `needs` does not name"
        )


@dataclass(frozen=True, eq=False)
class Second:
    """A second run on the same group, under another global random state.

    weights, statistics   what the handler was given, which it may have changed
    made                  what it returned
    touched               whose global random state is not what it was
    """

    weights: dict[str, torch.Tensor]
    statistics: dict[str, Any]
    made: Any
    touched: tuple[str, ...]


@dataclass(eq=False)
class HandlerCase:
    """An input group, and what the handler made of it.

    weights        layer name -> [rows, columns] float32
    inputs         [tokens, columns] float32
    loud, quiet    columns of a planted layer, as in `Rewriting`
    poison         where a statistic gets a number that is not finite, and which; None: nowhere
    """

    handler: Any
    weights: dict[str, torch.Tensor]
    inputs: Float32
    scheme: Scheme
    seed: int = 0
    loud: tuple[int, ...] = ()
    quiet: tuple[int, ...] = ()
    poison: tuple[float, float] | None = None

    @property
    def columns(self) -> int:
        """The width of the input."""
        return len(self.inputs.T)

    @property
    def group(self) -> InputGroup:
        """The layers of the group."""
        return group_of(self.weights)

    @cached_property
    def grid(self) -> Grid:
        """The grid of the scheme."""
        return installed_grid(self.scheme)

    @cached_property
    def input_grid(self) -> Grid | None:
        """The codes of activations, where the scheme quantizes them."""
        return installed_input_grid(self.scheme)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """The values of the installed observers that the handler names."""
        found = {}
        for name in sorted(self.handler.needs):
            statistic = installed_observer(name).start(self.group)
            statistic.update(torch.from_numpy(self.inputs.copy()))
            found[name] = statistic.value()
        return found

    @cached_property
    def answer(self) -> Any:
        """What the handler returned."""
        return self.ask(self.weights)

    @cached_property
    def second(self) -> Second:
        """The same once more."""
        _ = self.answer
        seed_everything(self.seed + 1)
        before = random_states()
        weights = {name: weight.clone() for name, weight in self.weights.items()}
        statistics = Statistics(copy.deepcopy(self.statistics))
        rng = np.random.default_rng(self.seed)
        made = self.handler.rewrite(self.problem(weights, statistics), rng)
        return Second(weights, statistics, made, changed(before))

    @cached_property
    def rewrite(self) -> Rewrite:
        """What the handler returned. Raises Refused where that is not what `Rewrite` promises.

        Whether it is, is for the check `rewrite_fits` alone.
        """
        wrong = fault(self.answer, self.weights)
        if wrong:
            raise Refused(wrong)
        made: Rewrite = self.answer
        return made

    @cached_property
    def input_scale(self) -> Float64:
        """What the input is divided by, float64."""
        return self.rewrite.input_scale.numpy().astype(np.float64)

    @property
    def transform(self) -> InputTransform:
        """What becomes of the input."""
        return InputTransform.of(self.rewrite)

    def whole(self, name: str) -> tuple[Float64, Float64]:
        """Return (W, W' with the columns put in that are kept), float64, of one layer."""
        weight, made = self.weights[name].double(), self.rewrite.weights[name].double()
        kept = self.transform.kept
        if kept is not None:
            made = made.index_add(1, kept, self.transform.whole(weight)[:, kept])
        return weight.numpy(), made.numpy()

    @cached_property
    def rewriting(self) -> Rewriting:
        """What claims are certified on."""
        x = self.inputs.astype(np.float64)
        given = self.statistics.get("hessian")
        hessian = (2 / len(x)) * (x.T @ x) if given is None else given.numpy()
        return Rewriting(
            weights=self.weights,
            rewrite=self.rewrite,
            scheme=self.scheme,
            grid=self.grid,
            hessian=hessian,
            magnitude=np.maximum((2 / len(x)) * (np.abs(x).T @ np.abs(x)), np.abs(hessian)),
            absmax=np.abs(x).max(0, initial=0.0),
            inputs=self.inputs,
            input_grid=self.input_grid,
            loud=self.loud,
            quiet=self.quiet,
        )

    def ask(
        self, weights: Mapping[str, torch.Tensor], statistics: Mapping[str, Any] | None = None
    ) -> Any:
        """Rewrite weights, given as copies, with the generator of this case."""
        given = self.statistics if statistics is None else statistics
        copies = {name: weight.clone() for name, weight in weights.items()}
        problem = self.problem(copies, Statistics(copy.deepcopy(dict(given))))
        return self.handler.rewrite(problem, np.random.default_rng(self.seed))

    def problem(
        self, weights: Mapping[str, torch.Tensor], statistics: Mapping[str, Any]
    ) -> RewriteProblem:
        """Return what a handler is given."""
        return RewriteProblem(
            layers={
                name: RoundingProblem(
                    name=name,
                    weight=weight,
                    scheme=self.scheme,
                    grid=self.grid,
                    input_grid=self.input_grid,
                    statistics=statistics,
                    tokens=len(self.inputs),
                )
                for name, weight in weights.items()
            }
        )

    def again(self, weights: Mapping[str, torch.Tensor]) -> Rewrite:
        """Rewrite other weights. Raises Refused as `rewrite` does."""
        _ = self.rewrite
        made = self.ask(weights)
        wrong = fault(made, weights)
        if wrong:
            raise Violation(f"for changed weights: {wrong}")
        rewrite: Rewrite = made
        return rewrite

    def poisoned(self) -> dict[str, Any]:
        """Return statistics in each of which one number is not finite."""
        where, number = self.poison or (0.0, np.nan)
        statistics = copy.deepcopy(self.statistics)
        for value in statistics.values():
            for array in _arrays(value):
                flat = array.reshape(-1)
                flat[int(where * len(flat))] = number
        return statistics

    def counterexample(self, check: str) -> Counterexample:
        """Return the group as plain Python; `plugin` and `arrays` are defined before it."""
        arrays: dict[str, Any] = {name: weight.numpy() for name, weight in self.weights.items()}
        arrays["inputs"] = self.inputs
        changed = self.scheme.model_dump(exclude_defaults=True)
        fields = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        weights = ", ".join(f"{n!r}: torch.from_numpy(arrays[{n!r}])" for n in self.weights)
        number = None if self.poison is None else f"({self.poison[0]}, float('{self.poison[1]}'))"
        text = f"""\
import torch

from qframe import Scheme
from qframe_conformance import replay
from qframe_conformance.outlier_cases import HandlerCase

case = HandlerCase(
    plugin,
    weights={{{weights}}},
    inputs=arrays["inputs"],
    scheme=Scheme({fields}),
    seed={self.seed},
    loud={self.loud},
    quiet={self.quiet},
    poison={number},
)
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text, arrays=arrays)


def group_of(weights: Mapping[str, torch.Tensor]) -> InputGroup:
    """Return the group of these layers."""
    return InputGroup(
        layers=tuple(
            LayerInfo(name=name, rows=weight.shape[0], columns=weight.shape[1])
            for name, weight in weights.items()
        )
    )


def fault(made: Any, weights: Mapping[str, torch.Tensor]) -> str:
    """Return how a result breaks the promise of `Rewrite`, "" if it does not."""
    if not isinstance(made, Rewrite):
        return f"returned {type(made).__name__}, expected qframe.Rewrite"
    if set(made.weights) != set(weights):
        return f"rewrote the layers {sorted(made.weights)}, the group has {sorted(weights)}"
    for name, weight in weights.items():
        wrong = _tensor_fault(made.weights[name], tuple(weight.shape))
        if wrong:
            return f"the weight of {name!r} {wrong}"
    columns = next(iter(weights.values())).shape[1]
    wrong = _tensor_fault(made.input_scale, (columns,))
    if wrong:
        return f"input_scale {wrong}"
    if not bool((made.input_scale > 0).all()):
        return f"input_scale is {float(made.input_scale.min()):.9g} at its smallest, expected > 0"
    if made.rotation is not None and not isinstance(made.rotation, Rotation):
        return f"rotation is {type(made.rotation).__name__}, expected qframe.Rotation"
    if made.kept is not None and not isinstance(made.kept, torch.Tensor):
        return f"kept is {type(made.kept).__name__}, expected a tensor or None"
    if made.threshold is not None and not isinstance(made.threshold, (int, float)):
        return f"threshold is {type(made.threshold).__name__}, expected a number or None"
    wrong = InputTransform.of(made).fault(columns)
    if wrong or made.kept is None:
        return wrong
    for name, weight in made.weights.items():
        if bool(weight[:, made.kept].any()):
            return f"the weight of {name!r} is not 0 in the columns that are kept"
    return ""


def _tensor_fault(tensor: Any, shape: tuple[int, ...]) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        return f"is {tensor.dtype} {list(tensor.shape)}, expected torch.float32 {list(shape)}"
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return "is not contiguous on the CPU"
    if not bool(torch.isfinite(tensor).all()):
        return "has a number that is not finite"
    return ""


def _arrays(value: Any) -> list[Any]:
    """Return the arrays of floating-point numbers in a value; writing to them changes it."""
    found = leaves(value).values()
    return [a for a in found if a.size and a.ndim and np.issubdtype(a.dtype, np.floating)]
