"""Certificates: a layer before and after rounding, held against what is allowed.

What every claim (`qframe.claims`) works with: the layer in pieces, and its group ranges. All of it
is float64, computed from what was stored and never from what a plugin says of itself; the work is
cut into pieces that do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.errors import CertificateError
from qframe.hessian import Feedback, Float64, damped, processing_order, second_moments
from qframe.pieces import Piece, highest_ratios_float32
from qframe.scheme import Scheme
from qframe.transforms import InputTransform

if TYPE_CHECKING:
    import torch

Place = tuple[int, ...]

ROWS = 192  # rows at a time in products with a matrix of all columns
_PIECE = 500_000  # weights at a time: enough to be worth a call, few enough for the cache
_PASS = 1 << 21  # the same of a pass that takes each weight once
_CLOSELY = 1 << 16  # the same where many numbers of 64 bits are made of each
_NEAR = 1 - 2.0**-16  # of the largest upper limit: strips that are looked at right away

__all__ = [
    "ROWS",
    "Certificate",
    "Closest",
    "Evidence",
    "Feedback",
    "Float64",
    "LayerClaim",
    "Piece",
    "Place",
    "applicable",
    "check_certificates",
    "damped",
    "function_preserved",
    "group_ranges",
    "processing_order",
    "second_moments",
    "squared",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What became of one claim on one layer.

    claim     the claim's name, e.g. "half step"
    theorem   its number in docs/bounds.md, e.g. "B1.b"
    ratio     the largest error over what is allowed; it holds if and only if this is at most 1
    place     where that is: [row, column], [row, group], [row], or () where there is nothing
    error     the error there, in units of the weights, or of the objective that is compared
    allowed   what is allowed there; None for a claim that says no more than the ratio
    note      what else should be known, e.g. why it does not hold
    """

    claim: str
    theorem: str
    ratio: float
    place: Place = ()
    error: float | None = None
    allowed: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the claim holds; NaN never does."""
        return self.ratio <= 1

    def record(self) -> dict[str, Any]:
        """Return plain values for a file: six figures, and never another verdict."""
        ratio = _figures(self.ratio)
        return {
            "claim": self.claim,
            "theorem": self.theorem,
            "ratio": ratio if (ratio <= 1) == self.holds else self.ratio,
            "place": list(self.place),
            "error": None if self.error is None else _figures(self.error),
            "allowed": None if self.allowed is None else _figures(self.allowed),
            "note": self.note,
        }

    @property
    def figures(self) -> str:
        """How near it comes, and where, in words."""
        place = f" at {list(self.place)}" if self.place else ""
        note = f": {self.note}" if self.note else ""
        return f"error/allowed = {self.ratio:.4g}{place}{note}"

    def __str__(self) -> str:
        """Say it in a line."""
        state = "holds" if self.holds else "is violated"
        return f"{self.claim} ({self.theorem}) {state}: {self.figures}"


def _figures(value: float) -> float:
    """Return a number with six figures: its last bits differ between machines."""
    return float(f"{value:.6g}")


@dataclass(frozen=True, slots=True)
class Closest:
    """Where errors come closest to what is allowed, or exceed it most."""

    ratio: float = 0.0
    place: Place = ()
    error: float | None = None
    allowed: float | None = None

    @classmethod
    def of(cls, error: Float64, allowed: Float64, first: int = 0) -> Closest:
        """Look at all errors of some rows.

        error, allowed   broadcast to [rows] or [rows, columns]; more axes count as columns
        first            the number of the first row
        """
        errors, limits = np.broadcast_arrays(error, allowed)
        ratio, flat = bounds.worst(errors, limits)
        if not errors.size:
            return cls()
        width = errors.size // len(errors)
        place = (first + flat,) if errors.ndim == 1 else (first + flat // width, flat % width)
        return cls(ratio, place, float(errors.flat[flat]), float(limits.flat[flat]))

    @classmethod
    def screened(
        cls,
        most: Float64,
        judge: Callable[[npt.NDArray[np.intp]], Closest],
        width: int,
        first: int = 0,
        at_once: int | None = None,
    ) -> Closest:
        """Return the same as `of`, looking only at those strips of weights that may come closest.

        most      [rows] or [rows, strips]: no ratio in a strip is larger
        judge     looks at some strips, numbered row by row; its place is [strip, weight], of those
        width     of a strip
        first     the number of the first row
        at_once   strips that are judged together; as many as the cache has numbers of 64 bits for
        """
        per_row = most.size // max(len(most), 1)
        at_once = at_once or max(1, _CLOSELY // max(width, 1))

        def look(chosen: npt.NDArray[np.bool_]) -> Closest:
            places = np.flatnonzero(chosen)
            starts = range(0, len(places), at_once)
            return cls.among(look_at(places[start : start + at_once]) for start in starts)

        def look_at(places: npt.NDArray[np.intp]) -> Closest:
            found = judge(places)
            if not found.place:
                return found
            number, inside = found.place
            row, strip = divmod(int(places[number]), per_row)
            return replace(found, place=(first + row, strip * width + inside))

        if not most.size:
            return cls()
        chosen = ~(most <= 1)
        chosen |= most >= _NEAR * np.where(chosen, -1, most).max()
        found = look(chosen)
        rivals = ~chosen & ~(most / bounds.CHECKER < found.ratio)
        if not rivals.any():
            return found
        return cls.among(sorted((found, look(rivals)), key=lambda closest: closest.place))

    @classmethod
    def among(cls, parts: Iterable[Closest]) -> Closest:
        """Return the first of the largest ratios."""
        return max(parts, key=lambda part: part.ratio, default=cls())

    def certificate(self, claim: LayerClaim, note: str = "") -> Certificate:
        """Return this as what became of a claim."""
        return Certificate(
            claim=claim.name,
            theorem=claim.theorem,
            ratio=self.ratio,
            place=self.place,
            error=self.error,
            allowed=self.allowed,
            note=note,
        )


@runtime_checkable
class LayerClaim(Protocol):
    """A claim about the codes of a layer, which can be certified.

    One that holds for a layer where it does for all parts of its rows, and comes as close as the
    part that comes closest, has an attribute `by_rows`, which is True; its places begin with a row.
    """

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def theorem(self) -> str:
        """Its number in docs/bounds.md."""
        ...

    def objection(self, scheme: Scheme) -> str | None:
        """Return why the claim says nothing about layers of this scheme, or None."""
        ...

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare what was stored with what is allowed."""
        ...


def applicable(claims: Sequence[Any], scheme: Scheme) -> list[LayerClaim]:
    """Return the claims about layers that say something about this scheme."""
    return [c for c in claims if _about_layers(c) and c.objection(scheme) is None]


def _about_layers(claim: Any) -> TypeGuard[LayerClaim]:
    return all(hasattr(claim, name) for name in ("objection", "certify"))


def check_certificates(layer: str, certificates: Sequence[Certificate]) -> None:
    """Raise CertificateError when one does not hold."""
    violated = [str(certificate) for certificate in certificates if not certificate.holds]
    if violated:
        raise CertificateError(
            f"layer {layer!r}: {violated[0]}"
            + "".join(f"\nlayer {layer!r}: {other}" for other in violated[1:])
            + "\neither the method or what it claims is wrong; with on_violated_certificate=warn "
            "(--on-violated-certificate warn) the run goes on and reports it"
        )


@dataclass(frozen=True, slots=True)
class Differences:
    """What a layer's codes stand for minus its weights, in float32, summed up.

    signal    the sum of the squares of the weights
    noise     that of the differences; infinite or NaN where any of them is not finite
    highest   [rows] or [rows, groups], what no error of the strip over half a step exceeds, as
              `highest_ratios_float32` has it; infinite where it says nothing
    """

    signal: float
    noise: float
    highest: Float64


def squared(numbers: torch.Tensor) -> float:
    """Return the sum of the squares of float32 numbers, in float64."""
    import torch

    wide = numbers.reshape(-1).double()
    return float(torch.dot(wide, wide))


@dataclass(frozen=True, slots=True)
class Evidence:
    """A layer before and after rounding, and what can be shared with layers of the same input.

    shared    results that depend on the statistics alone, by what they are
    threads   how many; certificates do not depend on it
    """

    problem: RoundingProblem
    quantized: QuantizedWeight
    shared: dict[Any, Any] = field(default_factory=dict)
    threads: int = 1
    _found: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def certificates(self, claims: Sequence[Any]) -> tuple[Certificate, ...]:
        """Certify every claim about layers that says something about this scheme."""
        return tuple(c.certify(self) for c in applicable(claims, self.problem.scheme))

    def cut(self, height: int | None = None) -> list[slice]:
        """Return slices of all rows, of so many or of what the cache holds; at least one."""
        rows, columns = self.problem.weight.shape
        height = height or max(1, _PIECE // max(columns, 1))
        return [slice(first, first + height) for first in range(0, max(rows, 1), height)]

    def piece(
        self,
        rows: slice | npt.NDArray[np.intp],
        weight: npt.NDArray[np.float32] | None = None,
    ) -> Piece:
        """Return some rows of the layer.

        weight   what is to be compared with the codes; the problem's unless told

        Where groups are contiguous and as wide as one another, scales broadcast over the groups'
        columns instead of being copied for each.
        """
        w = (self.problem.weight.numpy() if weight is None else weight)[rows]
        codes = self.quantized.codes.numpy()[rows]
        own = slice(None) if len(self.quantized.scale) == 1 else rows
        scale = self.quantized.scale.numpy()[own].astype(np.float64)
        zero = self.quantized.zero_point.numpy()[own].astype(np.float64)
        index = self.quantized.group_index.numpy()
        (count, columns), groups = w.shape, scale.shape[1]
        if self._even:
            shape = (count, groups, columns // groups)
            w, codes = w.reshape(shape), codes.reshape(shape)
            return Piece(w, codes, scale[..., None], zero[..., None], self.problem.grid)
        return Piece(w, codes, scale[:, index], zero[:, index], self.problem.grid)

    def closest(self, judge: Callable[[Piece], tuple[Float64, Float64]]) -> Closest:
        """Return where the layer comes closest to a bound.

        judge   returns (error, allowed) of each weight of a piece
        """
        from qframe import parallel

        def work(rows: slice) -> Closest:
            return Closest.of(*judge(self.piece(rows)), first=rows.start)

        return Closest.among(parallel.spread(work, self.cut(), self.threads))

    def closest_group(
        self, judge: Callable[[slice], tuple[Float64, Float64]], rows: int
    ) -> Closest:
        """Return where groups come closest to a bound, looking at some rows of them at a time.

        judge   returns (error, allowed) of the groups of some rows, [rows, groups]
        rows    of groups in all
        """
        height = max(1, _CLOSELY // max(self.quantized.scale.shape[1], 1))
        cuts = (slice(top, min(top + height, rows)) for top in range(0, max(rows, 1), height))
        return Closest.among(Closest.of(*judge(cut), first=cut.start) for cut in cuts)

    def differences(self) -> Differences:
        """Return what the codes stand for minus the weights, summed up in one pass over both."""
        from qframe import parallel

        if "differences" not in self._found:
            height = max(1, _PASS // max(self.problem.weight.shape[1], 1))
            parts = parallel.spread(self._differences_of, self.cut(height), self.threads)
            highest = [part.highest for part in parts]
            self._found["differences"] = Differences(
                signal=sum(part.signal for part in parts),
                noise=sum(part.noise for part in parts),
                highest=np.concatenate(highest),
            )
        found: Differences = self._found["differences"]
        return found

    def _differences_of(self, rows: slice) -> Differences:
        """Return the same of some rows."""
        from qframe import passes

        quantized, grid = self.quantized, self.problem.grid
        arrays = (self.problem.weight, quantized.codes, quantized.scale, quantized.zero_point)
        weight, codes, scale, zero = (passes.part_of(each.numpy(), rows) for each in arrays)
        index = quantized.group_index.numpy()
        if not self._even:  # columns of a group become neighbours
            order = np.argsort(index, kind="stable")
            weight, codes, index = weight[:, order], codes[:, order], index[order]
        runs = passes.runs_of(index)
        table = np.array(grid.values or (), np.float32)
        most = np.empty((len(weight), len(runs)))
        signal, noise = passes.differences(
            weight, codes, scale, zero, runs, table, grid.qmin, grid.qmax, most
        )
        if not self._even:
            most = most.max(1, initial=0)
        if grid.values is not None or not math.isfinite(noise):
            most[...] = np.inf
        else:
            most = highest_ratios_float32(most, self.piece(rows), grid)
        return Differences(signal, noise, most)

    @property
    def _even(self) -> bool:
        """Whether groups are contiguous, and as wide as one another."""
        if "even" not in self._found:
            index, groups = self.quantized.group_index.numpy(), self.quantized.scale.shape[1]
            self._found["even"] = _alike(index, groups)
        found: bool = self._found["even"]
        return found

    def ranges(self) -> tuple[Float64, Float64]:
        """Return the smallest and largest weight of each group, [rows or 1, groups]."""
        if "ranges" not in self._found:
            self._found["ranges"] = group_ranges(self.problem, self.quantized.group_index)
        found: tuple[Float64, Float64] = self._found["ranges"]
        return found


def _alike(index: npt.NDArray[np.integer[Any]], groups: int) -> bool:
    """Whether groups are contiguous, and as wide as one another.

    index   [columns], the group of each column
    """
    columns = len(index)
    if not groups or columns % groups:
        return False
    return np.array_equal(index, np.arange(columns) // max(columns // groups, 1))


def group_ranges(problem: RoundingProblem, group_index: torch.Tensor) -> tuple[Float64, Float64]:
    """Return the smallest and largest weight of each group, [rows or 1, groups]."""
    import torch

    weight = problem.weight
    rows, columns = weight.shape
    groups = problem.scheme.groups(columns)
    if problem.scheme.strategy == "tensor":
        if weight.numel() == 0:
            return np.zeros((1, 1)), np.zeros((1, 1))
        ends = torch.aminmax(weight)
        return tuple(np.array([[float(end)]]) for end in ends)  # type: ignore[return-value]
    if rows and _alike(group_index.numpy(), groups):
        from qframe import rounding

        lowest, highest = rounding.ends(weight.reshape(rows, groups, -1))
        return lowest.double().numpy(), highest.double().numpy()
    if bool((group_index[1:] < group_index[:-1]).any()):
        order = torch.argsort(group_index, stable=True)
        weight, group_index = weight[:, order], group_index[order]
    counts = torch.bincount(group_index.long(), minlength=groups).tolist()
    low, high = np.zeros((rows, groups)), np.zeros((rows, groups))
    for g, part in enumerate(weight.split(counts, dim=1)):
        if part.numel():
            low[:, g], high[:, g] = part.amin(1).numpy(), part.amax(1).numpy()
    return low, high


# Rewrites -------------------------------------------------------------------------------------


def function_preserved(
    original: torch.Tensor,
    rewritten: torch.Tensor,
    transform: InputTransform,
    kept: torch.Tensor | None = None,
    *,
    handlers: int = 1,
) -> Certificate:
    """B4.a, B4.f, B4.g: the rewritten weight is the weight, scaled and rotated, up to roundings.

    Without a rotation it is compared element by element, else block by block of a row.

    original, rewritten   W and W', [rows, columns] float32
    kept                  [rows, k] float16, the weights that the transform keeps
    handlers              in a row; each may round twice: its product, and the scale so far
    """
    rotation, columns = transform.rotation, original.shape[1]
    scale = np.ones(columns)
    if transform.scale is not None:
        scale = transform.scale.numpy().astype(np.float64)
    height = max(1, _PIECE // max(columns, 1))
    found = []
    for first in range(0, len(original), height):
        weight = original[first : first + height].numpy().astype(np.float64)
        made = rewritten[first : first + height].double()
        stored = np.zeros(made.shape)  # what storing the kept weights may change
        if kept is not None and transform.kept is not None:
            own = kept[first : first + height].double()
            places = transform.kept.numpy()
            stored[:, places] = bounds.kept_weight(own.numpy())
            made = made.index_add(1, transform.kept, own)  # W' is zero there, or else it shows
        if rotation is None:
            error = np.abs(made.numpy() / scale - weight)
            tiny = 2 * handlers * bounds.ETA["float32"] / scale  # where W' underflowed
            allowed = bounds.gamma(2 * handlers) * np.abs(weight) + tiny + stored / scale
        else:
            blocks = (len(weight), *rotation.signs.shape)
            moved = rotation.undo(made).numpy() - weight * scale
            error = np.linalg.norm(moved.reshape(blocks), axis=2)
            norms = np.linalg.norm((weight * scale).reshape(blocks), axis=2)
            allowed = bounds.rotated_block(norms, rotation.block, 2 * handlers)
            allowed = allowed + np.linalg.norm(stored.reshape(blocks), axis=2)
        found.append(Closest.of(error, allowed, first))
    worst = Closest.among(found)
    return Certificate(
        claim="function preserved",
        theorem="B4.a" if rotation is None else "B4.f",
        ratio=worst.ratio,
        place=worst.place,
        error=worst.error,
        allowed=worst.allowed,
    )
