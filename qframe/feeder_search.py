"""Which layer feeds which: read off from powers of two.

Channel j of an input is row r(j) of a layer's output times something that does not depend on it
where multiplying the rows by powers of two multiplies the channels by just those, exactly. So the
exponents of a few runs spell the number of the row that each channel is: down_proj reads rows of
up_proj in their order, o_proj those of v_proj, each for several heads where queries share them; and
a layer before act() or softmax shows that it is none. No names and no list of architectures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qframe.calibration import Arrival, Lockstep
from qframe.fold_search import Run, Source, look, multiply_rows
from qframe.model import get_weight

BASE = 4  # digits of a row's number: exponents 1 to 4, so that a channel that stays is none
POWERS = torch.tensor([2.0 ** (1 + digit) for digit in range(BASE)])
NEAREST = 8  # layers before the group that are tried


def feeder(
    steps: Lockstep,
    block: nn.Module,
    arrival: Arrival,
    run: Run,
    members: Sequence[str],
    layers: Sequence[str],
    prefix: str,
) -> Source:
    """Return the layer, by its name in the block, whose rows are the channels of a group's input.

    run       of the block on this arrival
    members   of the group, full names
    layers    quantized layers of the block, full names
    prefix    of the block in full names

    The block is as it was before when this returns.
    """
    x = run.input_of(members[0])
    order = [name for name, _ in run.inputs]
    if x is None or not x.is_floating_point():
        return Source()
    before = [name for name in dict.fromkeys(order[: order.index(members[0])]) if name in layers]
    for name in reversed(before[-NEAREST:]):
        short = name.removeprefix(prefix)
        module = block.get_submodule(short)
        if order.count(name) == 1:
            rows = _rows(steps, block, arrival, module, members[0], x)
            if rows is not None:
                return Source(short, rows)
    return Source()


def _rows(
    steps: Lockstep,
    block: nn.Module,
    arrival: Arrival,
    module: nn.Module,
    reader: str,
    x: torch.Tensor,
) -> torch.Tensor | None:
    """Return for each channel of x, the input of the reader, the row of a layer that it is."""
    count = len(get_weight(module))
    found, place = torch.zeros(x.shape[-1], dtype=torch.int64), 1
    while place < max(count, 2):
        digits = torch.arange(count) // place % BASE
        parameters = dict(module._parameters)
        try:
            multiply_rows(module, POWERS[digits])
            y = look(steps, block, arrival, digests=False).input_of(reader)
        finally:
            module._parameters.update(parameters)
        read = exponents_between(x, y)
        if read is None or not bool(((read >= 1) & (read <= BASE)).all()):
            return None
        found += (read - 1) * place
        place *= BASE
    return found if bool((found < count).all()) else None


def exponents_between(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor | None:
    """Return e, [columns] int64, where y is x 2^e bit for bit; None where it is not.

    x, y   [..., columns]; a column of zeros says nothing, so there is no e
    """
    if y is None or y.shape != x.shape or not bool(torch.isfinite(y).all()):
        return None
    one, other = (z.float().reshape(-1, z.shape[-1]).frexp() for z in (x, y))
    there = one.mantissa != 0
    if not torch.equal(one.mantissa, other.mantissa) or not bool(there.any(0).all()):
        return None
    apart = (other.exponent - one.exponent).long()
    least = torch.where(there, apart, torch.iinfo(torch.int64).max).amin(0)
    most = torch.where(there, apart, torch.iinfo(torch.int64).min).amax(0)
    return least if torch.equal(least, most) else None
