"""GPTQ: round column by column, and let the columns still to come make up for each error.

Source: Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023, arXiv:2210.17323, algorithm 1.
With the damped Hessian factorized as H = U U^T, U upper triangular, and columns taken in order,
column i is rounded to the code nearest to

    t_i = w_i + sum_{j<i} (w_j - q_j) U_ji / U_ii

which is the paper's compensated weight (there written with the Cholesky factor of H^-1; this
form needs no inverse), QuIP's LDLQ feedback (arXiv:2307.13304, eq. (3)), and Babai's nearest
plane on the lattice of the codes. The rows of W are independent of one another.

Error:  (w - q) H (w - q)^T = sum_j U_jj^2 (q_j - t_j)^2 for every row, hence at most
        sum_j U_jj^2 scale^2 / 4 where no code is clipped (docs/bounds.md, B3).

Where the paper is silent:
  * a dead column (no token ever excited it, H_jj = 0) is rounded to nearest: its diagonal is set
    to the mean of the others, which keeps the damping independent of the scale of H;
  * when the factorization fails, damping is raised tenfold at a time up to `dampening_cap`, and
    the final value is reported;
  * how much damping a layer needs depends on how far its text is from that to come. "auto" tries
    several and keeps the one with the least output error on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qframe import Capabilities, Event, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import HessianError, UncalibratedLayerError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from qframe_plugins.kernels.numba_cpu.cholesky import Feedback


DAMPINGS = (0.01, 0.1, 1.0)  # what "auto" tries


@dataclass(frozen=True)
class GPTQ:
    """Round column by column with error compensation.

    dampening_frac   share of the mean of diag(H) that is added to the diagonal; "auto": for each
                     layer that of DAMPINGS which does best on tokens that were held out
    dampening_cap    the highest share that is tried when the factorization fails
    actorder         order of the columns. None: left to right. "static": by falling diag(H),
                     groups and scales as they were. "group": by falling diag(H), groups follow
                     that order, which stores a group index per column
    block_size       columns whose updates are applied together, in the papers' code; known to
                     recipes of other tools. Lazy updates are exact, so the codes do not depend
                     on it but for rounding errors: the solver takes blocks that suit the caches
    static_groups    take scales from the original weights (True) or from the weights as
                     compensated so far when a group begins (False); None: True for "static",
                     which allows nothing else, else False
    """

    dampening_frac: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 0.01
    dampening_cap: Annotated[float, Field(gt=0)] = 1.0
    actorder: Literal["static", "group"] | None = "static"
    block_size: Annotated[int, Field(ge=1)] = 128
    static_groups: bool | None = None

    name: str = field(init=False, default="gptq")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian"}))

    def __post_init__(self) -> None:
        if self.actorder == "static" and self.static_groups is False:
            raise UnsupportedError(
                "gptq: actorder='static' takes columns of all groups in turn, so scales must be "
                "known beforehand: static_groups=False is not possible; use actorder='group' or "
                "None, or leave static_groups out"
            )

    @property
    def capabilities(self) -> Capabilities:
        """All integer schemes; an automatic damping is one for all rows of a layer."""
        return Capabilities(row_independent=self.dampening_frac != "auto")

    @property
    def claims(self) -> tuple[object, ...]:
        """Codes are nearest to the compensated weights; scales are the scheme's, when they began.

        Not scale equivariance: a group of zeros has scale 1, whatever errors it makes up for.
        """
        babai = claims.Babai(
            dampening_frac=DAMPINGS if self.dampening_frac == "auto" else self.dampening_frac,
            dampening_cap=self.dampening_cap,
            order="natural" if self.actorder is None else "falling",
        )
        if self.actorder == "static" or self.static_groups:
            return babai, claims.SchemeScale(), claims.Covers(), claims.SignSymmetric()
        whole = frozenset({"tensor", "channel"})
        return (
            babai,
            claims.CompensatedScale(babai),
            claims.SchemeScale(whole),
            claims.Covers(whole),
            claims.SignSymmetric(),
        )

    @property
    def orders_groups(self) -> bool:
        """Whether groups are columns that follow one another in the order, not in the layer."""
        return self.actorder == "group"

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the compensated codes. Needs statistics["hessian"], [columns, columns].

        Raises UncalibratedLayerError without tokens, NonFiniteError for a weight that is not
        finite, HessianError when no damping up to the cap makes the Hessian positive definite, and
        UnsupportedError for dampening_frac="auto" when no tokens are held out.
        """
        if self.dampening_frac == "auto":
            return self._round_best(problem, rng)
        import torch

        from qframe import rounding
        from qframe_plugins.kernels.numba_cpu import gptq as solver

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        factor = Factor.of(
            problem, self.name, self.dampening_frac, self.dampening_cap, self.actorder is not None
        )
        order, columns = factor.order, weight.shape[1]
        permuted = weight[:, order].contiguous().numpy()
        # A column's group goes by its place in the processing order, or by where it is stored.
        index = rounding.group_index(columns, scheme)
        if self.actorder == "group":
            index = torch.empty_like(index).scatter_(0, order, index)

        if scheme.strategy == "group" and not (self.actorder == "static" or self.static_groups):
            codes, scales, zeros = solver.solve_dynamic(
                permuted,
                factor.feedback,
                scheme.group_width(columns),
                grid.qmin,
                grid.qmax,
                symmetric=scheme.symmetric,
                scale_dtype=scheme.scale_dtype,
                observer=scheme.observer,
            )
            scale, zero_point = torch.from_numpy(scales), torch.from_numpy(zeros)
            rounding.check_scales(scale, scheme, problem.name)
        else:
            grouped = weight
            if self.actorder == "group":  # groups of columns that follow one another in the order
                grouped = weight[:, order]
            scale, zero_point = rounding.fit_scales(grouped, scheme, grid, name=problem.name)
            codes = solver.solve_static(
                permuted,
                factor.feedback,
                scale.numpy(),
                zero_point.numpy(),
                index[order].numpy(),
                grid.qmin,
                grid.qmax,
            )
        return factor.quantized(codes, scale, zero_point, index)

    def _round_best(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the codes of the damping with the least output error on held-out tokens."""
        from qframe import parallel, rounding
        from qframe.hessian import energy, unit

        if "hessian" not in problem.held_out:
            raise UnsupportedError(
                f"layer {problem.name!r}: dampening_frac='auto' is chosen on held-out tokens, and "
                f"there are none; give held_out_fraction more than 0, or dampening_frac a number"
            )
        moment = unit(problem.held_out["hessian"])
        tried = [replace(self, dampening_frac=d).round(problem, rng) for d in DAMPINGS]
        with parallel.one_torch_thread():
            losses = [energy(rounding.dequantize(q) - problem.weight, moment) for q in tried]
        return tried[losses.index(min(losses))]  # the first of equals


@dataclass(frozen=True, eq=False)
class Factor:
    """The damped Hessian of a layer, factorized in processing order.

    name       of the layer
    hessian    [columns, columns] float64, dead diagonals replaced, not damped
    dead       [columns] bool: no token ever excited the column
    order      [columns] int64: the order in which columns are rounded
    feedback   what errors are fed back with
    wanted     the damping that was asked for, and `damp`, the one that worked
    """

    name: str
    hessian: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor
    feedback: Feedback
    wanted: float
    damp: float

    @classmethod
    def of(
        cls, problem: RoundingProblem, method: str, damp: float, cap: float, falling: bool
    ) -> Factor:
        """Factorize the Hessian of a problem, after a look at what it is given with.

        method    for messages
        damp      is tried first, as a share of the mean of the diagonal, then tenfold at a time up
                  to cap
        falling   order columns by falling diagonal; else left to right

        Raises UncalibratedLayerError without tokens, NonFiniteError for a weight that is not
        finite, and HessianError when no damping makes the Hessian positive definite.
        """
        import torch

        from qframe.weights import check_finite
        from qframe_plugins.kernels.numba_cpu import cholesky

        if problem.tokens == 0:
            raise UncalibratedLayerError(
                f"layer {problem.name!r} saw no calibration tokens, which {method} needs; give it "
                f"another method with an override, or text that reaches it"
            )
        check_finite(problem.weight, f"layer {problem.name!r}: its weight")
        hessian, dead = revive(problem.statistics["hessian"])
        order = torch.arange(len(hessian))
        if falling:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        mean, wanted = float(hessian.diagonal().mean()), damp
        tried: list[str] = []
        while True:
            try:
                feedback = cholesky.feedback(hessian.numpy(), damp=damp * mean, order=order.numpy())
                return cls(problem.name, hessian, dead, order, feedback, wanted, damp)
            except cholesky.NotPositiveDefiniteError:
                tried.append(f"{damp:g}")
            if damp >= cap:
                raise HessianError(
                    f"layer {problem.name!r}: the Hessian of {problem.tokens} tokens and "
                    f"{len(hessian)} columns is not positive definite with any dampening_frac "
                    f"of {', '.join(tried)}; use more calibration text or a higher "
                    f"dampening_cap"
                )
            damp = min(damp * 10, cap)

    def quantized(
        self,
        codes: npt.NDArray[np.int16],
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        index: torch.Tensor,
        **info: float,
    ) -> QuantizedWeight:
        """Return the layer with codes [rows, columns] in processing order, as they are stored.

        index   [columns], the group of each column
        info    more to tell than the damping and how many columns are dead
        """
        import torch

        stored = torch.empty(codes.shape, dtype=torch.int16)
        stored[:, self.order] = torch.from_numpy(codes)
        return QuantizedWeight(
            codes=stored,
            scale=scale,
            zero_point=zero_point,
            group_index=index,
            order=self.order.to(torch.int32),
            info={"damp": self.damp, "dead_columns": int(self.dead.sum()), **info},
            events=self.events,
        )

    @property
    def events(self) -> tuple[Event, ...]:
        """What is to be told of the damping: that another one was needed."""
        if self.damp <= self.wanted:
            return ()
        message = f"dampening_frac {self.wanted:g} failed, {self.damp:g} was used"
        return (Event(kind="damping raised", layer=self.name, message=message),)


def revive(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the Hessian with dead diagonals set to the mean of the live ones, and who is dead.

    A dead column stays uncoupled, so it is rounded to nearest whatever its diagonal is.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if not bool(dead.any()):
        return hessian, dead
    live = diagonal[~dead]
    fixed = hessian.clone()
    fixed.diagonal()[dead] = live.mean() if len(live) else 1.0
    return fixed, dead


@hookimpl
def qframe_rounders() -> Iterable[GPTQ]:
    """Register gptq."""
    return [GPTQ()]
