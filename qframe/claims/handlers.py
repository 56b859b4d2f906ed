"""What an outlier handler promises of its rewrites, besides keeping the layer's function.

A claim about a rewrite has `name`, `theorem`, `objection(rewriting)` and `certify(rewriting)`, so a
plugin may bring an objective of its own. The flags `FunctionPreserving`, `RowOrderFree`,
`ScaleEquivariant` and `SignSymmetric` are about handlers, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import Certificate
from qframe.contracts import Grid, Rewrite, RoundingProblem
from qframe.scheme import Scheme
from qframe.transforms import InputTransform, block_of

if TYPE_CHECKING:
    import torch

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """An input group before and after a rewrite.

    weights     layer name -> W, [rows, columns] float32
    rewrite     what the handler returned
    scheme, grid   to which the rewritten weights are rounded
    hessian     H, [columns, columns] float64: the statistic that the handler was given, if any
    magnitude   (2/n) |X|^T |X|, [columns, columns] float64; at least |H|
    absmax      the largest |x| of each column, [columns] float64
    inputs      x, [tokens, columns] float32
    input_grid  the codes of activations, where the scheme quantizes them
    loud        columns planted with far larger inputs than the others
    quiet       columns planted with far smaller ones
    """

    weights: Mapping[str, torch.Tensor]
    rewrite: Rewrite
    scheme: Scheme
    grid: Grid
    hessian: Float64
    magnitude: Float64
    absmax: Float64
    inputs: npt.NDArray[np.float32]
    input_grid: Grid | None = None
    loud: tuple[int, ...] = ()
    quiet: tuple[int, ...] = ()

    def unscaled(self) -> Rewriting:
        """Return the rewrite that changes nothing."""
        import torch

        ones = torch.ones(len(self.hessian))
        return replace(self, rewrite=Rewrite(weights=self.weights, input_scale=ones))

    def original(self) -> Float64:
        """Return the weights of all layers, one below the other, float64."""
        return np.concatenate([w.numpy().astype(np.float64) for w in self.weights.values()])

    def effective(self) -> Float64:
        """Return what the layers compute after rounding to nearest, of plain inputs."""
        import torch

        from qframe import rounding

        parts: list[Float64] = []
        transform = self.transform()
        for name in self.weights:
            problem = RoundingProblem(
                name=name, weight=self.rewrite.weights[name], scheme=self.scheme, grid=self.grid
            )
            values = rounding.dequantize(rounding.to_nearest(problem)).to(torch.float64)
            if transform.kept is not None:
                whole = transform.whole(self.weights[name].to(torch.float64))
                values = values.index_copy(1, transform.kept, whole[:, transform.kept])
            parts.append(transform.undo(values).numpy())
        return np.concatenate(parts)

    def transform(self) -> InputTransform:
        """Return what becomes of the input."""
        return InputTransform.of(self.rewrite)

    def steps(self) -> Float64:
        """Return the most that the scheme's scales of the original weights can be, per weight."""
        from qframe import rounding

        parts = []
        for name, weight in self.weights.items():
            scale, _ = rounding.fit_scales(weight, self.scheme, self.grid, name=name)
            _, highest = bounds.scale_rule(scale.numpy(), self.scheme.scale_dtype)
            index = rounding.group_index(weight.shape[1], self.scheme).numpy()
            parts.append(np.broadcast_to(highest[:, index], weight.shape))
        return np.concatenate(parts)


@runtime_checkable
class RewriteClaim(Protocol):
    """A claim about a rewrite, which can be certified."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def theorem(self) -> str:
        """Its number in docs/bounds.md."""
        ...

    def objection(self, rewriting: Rewriting) -> str | None:
        """Return why the claim says nothing about this group, or None."""
        ...

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the rewritten group with what is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class NoWorseThanUnscaled:
    """B4.c: rounded to nearest, the rewritten group loses no more than the group as it was.

    It holds for every search that has scale 1 among its candidates and keeps the best of them by
    the output error of the whole group, the sum over layers and rows of (W - Q) H (W - Q)^T.

    sums   the arithmetic in which the search compares
    """

    sums: Literal["float32", "float64"] = "float32"
    name = "no worse than unscaled"
    theorem = "B4.c"

    def objection(self, rewriting: Rewriting) -> str | None:
        """It says something about every group."""
        return None

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the roots of both output errors, in float64."""
        found, sigma = root_of_loss(rewriting, self.sums)
        before, sigma_before = root_of_loss(rewriting.unscaled(), self.sums)
        ratio = bounds.ratio(found, before + sigma + sigma_before)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio)


@dataclass(frozen=True, slots=True)
class ProtectsSalient:
    """B4.d: a search that keeps the best candidate protects a channel of far larger inputs.

    What `NoWorseThanUnscaled` cannot see is a search that never finds anything. This is about
    layers in which some channels are loud and some quiet, the others all alike.

    gain   some candidate makes loud channels at least this much larger against the others, and
           quiet ones smaller by at most as much; and no larger than the range has room for
    sums   the arithmetic in which the search compares
    """

    gain: float
    sums: Literal["float32", "float64"] = "float32"
    name = "protects salient channels"
    theorem = "B4.d"

    def objection(self, rewriting: Rewriting) -> str | None:
        """It is about planted layers."""
        return None if rewriting.loud else "no channel is known to be far louder than the others"

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the root of the output error with what that candidate cannot exceed."""
        found, sigma = root_of_loss(rewriting, self.sums)
        against = np.ones(len(rewriting.hessian))
        against[list(rewriting.loud)] = self.gain
        against[list(rewriting.quiet)] = 1 / self.gain
        weight = np.abs(rewriting.original())
        reach = rewriting.steps() / (2 * against) + bounds.gamma(8) * weight
        root = np.sqrt(rewriting.hessian.diagonal())
        candidate = float(np.linalg.norm(reach @ root))
        sigma += _slack(rewriting, 2 * weight + reach, reach, self.sums)
        ratio = bounds.ratio(found, candidate + sigma)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio)


@dataclass(frozen=True, slots=True)
class NoWorseOnSample:
    """B4.h: with inputs and weights rounded, the rewritten group loses no more than as it was.

    What it loses is the squared error of the outputs of the tokens that it was given, in float64.
    """

    name = "no worse on its sample"
    theorem = "B4.h"

    def objection(self, rewriting: Rewriting) -> str | None:
        """It says something about every group."""
        return None

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the roots of both losses."""
        lost, slack = self._root(rewriting)
        before, slack_before = self._root(rewriting.unscaled())
        ratio = bounds.ratio(lost, before + slack + slack_before)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio)

    def _root(self, rewriting: Rewriting) -> tuple[float, float]:
        """Return the root of the loss, and how far another order of summation may move it."""
        import torch

        from qframe.activations import output_change

        scale, x = rewriting.rewrite.input_scale, torch.from_numpy(rewriting.inputs)
        loss, size = 0.0, 0.0
        for name, weight in rewriting.weights.items():
            problem = RoundingProblem(
                name=name,
                weight=weight,
                scheme=rewriting.scheme,
                grid=rewriting.grid,
                input_grid=rewriting.input_grid,
            )
            loss += float(output_change(problem, x, scale).square().sum())
            size += float((x.abs().double() @ weight.abs().double().T).square().sum())
        outputs = len(x) * sum(len(weight) for weight in rewriting.weights.values())
        return np.sqrt(loss), bounds.sample_slack(np.sqrt(size), len(scale), outputs)


@dataclass(frozen=True, slots=True)
class KeepsOutliers:
    """B4.g: those columns are kept in which any |x| reaches the threshold, and no others.

    threshold     compared in float32; 0: none is kept
    at_run_time   what `Rewrite.threshold` says, in float32; 0: it says nothing
    """

    threshold: float
    at_run_time: float = 0.0
    name = "keeps outliers"
    theorem = "B4.g"

    def objection(self, rewriting: Rewriting) -> str | None:
        """It says something about every group."""
        return None

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the columns that are kept with those that hold outliers."""
        kept, later = rewriting.rewrite.kept, rewriting.rewrite.threshold
        if np.float32(later or 0.0) != np.float32(self.at_run_time):
            note = f"the threshold at run time is {later}, expected {self.at_run_time or None}"
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        edge = np.float32(self.threshold)
        loud = rewriting.absmax >= edge if edge > 0 else np.zeros(len(rewriting.absmax), bool)
        wanted = np.flatnonzero(loud).tolist()
        found = [] if kept is None else kept.tolist()
        if found == wanted:
            return Certificate(claim=self.name, theorem=self.theorem, ratio=0.0)
        missed, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        note = f"columns {missed} hold outliers and are not kept, columns {extra} are and do not"
        return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)


@dataclass(frozen=True, slots=True)
class Incoherent:
    """B8.c: random signs come before the transform, in blocks as large as the columns allow.

    So no weight stands out in its block, whatever the weights were, but with probability 2^-60.
    """

    name = "incoherence"
    theorem = "B8.c"

    def objection(self, rewriting: Rewriting) -> str | None:
        """Small blocks have too little room to spread anything."""
        block = block_of(len(rewriting.hessian))
        if bounds.incoherence(1.0, block, _count(rewriting), _UNLIKELY) < 1:
            return None
        return f"in blocks of {block} columns any weight may stand out"

    def certify(self, rewriting: Rewriting) -> Certificate:
        """Compare the largest weight of each block with the block's length."""
        rotation, largest = rewriting.rewrite.rotation, block_of(len(rewriting.hessian))
        block = 1 if rotation is None else rotation.block
        if block < largest:
            note = f"blocks of {block} columns, where {largest} are possible"
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        scale = rewriting.rewrite.input_scale.numpy().astype(np.float64)
        before = (rewriting.original() * scale).reshape(-1, block)
        made = np.concatenate([w.double().numpy() for w in rewriting.rewrite.weights.values()])
        norms = np.linalg.norm(before, axis=1)
        allowed = bounds.incoherence(norms, block, made.size, _UNLIKELY)
        allowed = allowed + bounds.rotated_block(norms, block)
        ratio = bounds.ratio(np.abs(made.reshape(-1, block)).max(1, initial=0.0), allowed)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio)


_UNLIKELY = 2.0**-60  # how probable a false alarm may be


def _count(rewriting: Rewriting) -> int:
    return sum(weight.numel() for weight in rewriting.weights.values())


def root_of_loss(rewriting: Rewriting, sums: str) -> tuple[float, float]:
    """Return (sqrt L, sigma): the root of the output error, and B4.c's allowance for it."""
    weight, values = rewriting.original(), rewriting.effective()
    error = weight - values
    loss = max(float(((error @ rewriting.hessian) * error).sum()), 0.0)
    size = np.abs(weight) + np.abs(values)
    return float(np.sqrt(loss)), _slack(rewriting, size, np.abs(error), sums)


def _slack(rewriting: Rewriting, size: Float64, error: Float64, sums: str) -> float:
    """Return B4.c's sigma for |W| + |Q| and |W - Q|, both [rows, columns]."""
    weighed, missed = (((a @ rewriting.magnitude) * a).sum() for a in (size, error))
    largest = float(rewriting.hessian.diagonal().max(initial=0))
    lengths, columns = error.sum(1), size.shape[1]
    return float(bounds.search_slack(weighed, missed, lengths, columns, largest, sums))
