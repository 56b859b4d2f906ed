"""Step 2 for one input group: the statistics of its inputs, and what is made of them.

Each statistic is collected once, however many ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qframe.activations import InputQuantizer
from qframe.contracts import InputGroup, Observer, Statistic
from qframe.errors import UncalibratedLayerError
from qframe.grids import input_grid_of, reach_observer
from qframe.hessian import MISMATCH, SECOND_MOMENTS
from qframe.host import Host
from qframe.inputs import GroupInputs
from qframe.report.measure import Drift, OutputErrors
from qframe.scheme import ActivationScheme, Scheme
from qframe.weights import check_finite

Known = dict[str, Statistic]
"""Observer name -> what it has seen."""


class Watch:
    """Observes the inputs of groups with the observers of a host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def look(
        self, group: InputGroup, inputs: GroupInputs, beside: GroupInputs
    ) -> tuple[Known, Known]:
        """Observe what output errors are measured with, in the fitted and in the held-out inputs.

        beside   `inputs.pairs()`

        That is nothing where there are no such inputs, or no such observer.
        """
        found: tuple[Known, Known] = ({}, {})
        names = self._host.names("observer")
        both = (inputs.fitted, beside.fitted), (inputs.held_out, beside.held_out)
        for known, (chunks, pairs) in zip(found, both, strict=True):
            if chunks and SECOND_MOMENTS in names:
                known[SECOND_MOMENTS] = self._observe(SECOND_MOMENTS, group, chunks)
                if pairs and MISMATCH in names:
                    known[MISMATCH] = self._observe(MISMATCH, group, pairs)
        return found

    def output_errors(
        self, group: InputGroup, beside: GroupInputs, seen: tuple[Known, Known]
    ) -> OutputErrors:
        """Return what measures output errors: on the fitted inputs, and on those held out."""
        moments, drifts = [], []
        for known, chunks in zip(seen, (beside.fitted, beside.held_out), strict=True):
            if SECOND_MOMENTS in known:
                moments.append(known[SECOND_MOMENTS].value().to(torch.float32))
            if MISMATCH in known:
                gaps = (y - x for x, y in (pair.split(group.columns, 1) for pair in chunks))
                moved = self._observe(SECOND_MOMENTS, group, gaps).value()
                cross = known[MISMATCH].value()
                drifts.append(Drift(cross.to(torch.float32), moved.to(torch.float32)))
        return OutputErrors(moments, drifts)

    def statistics(
        self,
        needs: Iterable[str],
        group: InputGroup,
        chunks: Sequence[torch.Tensor],
        pairs: Sequence[torch.Tensor],
        known: Known,
    ) -> dict[str, Any]:
        """Return the values of the statistics that are needed, each observed once.

        pairs   the same chunks, with the original network's inputs beside
        known   those of these chunks that have been observed already
        """
        found = {}
        for name in sorted(needs):
            if name not in known:
                seen = pairs if self._host.wants_pairs(name) else chunks
                found[name] = self._observe(name, group, seen).value()
            else:
                found[name] = known[name].value()
        return found

    def quantizers(
        self, group: InputGroup, schemes: Mapping[str, Scheme], inputs: GroupInputs
    ) -> dict[ActivationScheme, InputQuantizer]:
        """Return a quantizer for each way in which layers of the group quantize their inputs.

        Raises UncalibratedLayerError where a stored scale has no inputs to come from.
        """
        found: dict[ActivationScheme, InputQuantizer] = {}
        for layer in group.layers:
            scheme = schemes[layer.name].input_activations
            grid = input_grid_of(self._host, schemes[layer.name])
            if scheme is None or grid is None or scheme in found:
                continue
            reach: torch.Tensor | None = None
            if scheme.static_observer is not None:
                if not inputs.tokens:
                    raise UncalibratedLayerError(
                        f"layer {layer.name!r}: no calibration token reached it, and its "
                        f"activations have a scale that is stored (dynamic: false); quantize them "
                        f"with dynamic: true, or ignore the layer"
                    )
                observer = reach_observer(self._host, scheme, grid)
                reach = _observe(observer, group, inputs.fitted).value()
                check_finite(reach, f"observer {observer.name!r}: the inputs of {group.name!r}")
            found[scheme] = InputQuantizer.calibrated(scheme, grid, reach)
        return found

    def _observe(self, name: str, group: InputGroup, chunks: Iterable[torch.Tensor]) -> Statistic:
        return _observe(self._host.get("observer", name), group, chunks)


def _observe(observer: Observer, group: InputGroup, chunks: Iterable[torch.Tensor]) -> Statistic:
    statistic = observer.start(group)
    for x in chunks:
        statistic.update(x)
    return statistic
