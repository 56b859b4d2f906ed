"""How much a network loses when one layer is rounded: measured for all layers in one pass.

To second order, replacing the weight W of a layer by W + D makes the network differ from itself by
a Kullback-Leibler divergence of

    KL = 1/2 E (sum of G o D)^2,

where G is the gradient with respect to W of -log p, summed over the tokens of a window, and p is
the probability that the network gives to a token drawn *from its own distribution*, a draw for each
place. The expectation of G G^T is then the Fisher information, the second derivative of KL; with
the tokens of the text it would not be (Kunstner, Hennig, Balles, arXiv:1905.12558).

Each number under that expectation takes a pass backward, and few are affordable: their mean is a
rough one, while a sum over many weights is not. So D is split, row by row, into a W + R with R
orthogonal to W. Rounding makes weights smaller, above all with few bits, and the first part is
counted as it is; errors in R are taken as independent of one another, so that only their squares
count:

    KL = 1/2 mean of (sum over rows i of a_i r_i)^2 + 1/2 sum of R o R o (mean of G o G),

r_i the sum of row i of G o W. How near that comes to KL as it is measured, layer by layer, is in
docs/mixed_precision.md. The second part is what SqueezeLLM (arXiv:2306.07629) weights its errors
with, there with the tokens of the text.

A few windows are needed, each forward and backward. G is made in a hook of the layer, added up, and
forgotten; schemes are looked at once, at the end. A network without logits has no p: there the loss
of a layer is the energy of its output error over that of its output.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from qframe import parallel
from qframe.calibration import CalibrationData, layer_input
from qframe.contracts import Event
from qframe.errors import MemoryLimitError, ModelError, NonFiniteError
from qframe.fisher import Lane, Rounded, Schemes
from qframe.host import Host
from qframe.memory import readable_bytes
from qframe.model import Network, get_weight
from qframe.peak import MEASURED_TOKENS, MEASURING_LANES, measuring_memory
from qframe.walk import accepted
from qframe.weights import check_finite

WINDOWS = 8  # from all over the calibration text, each with a draw of its own
DRAWN_AT_ONCE = 64  # tokens whose distributions are in memory a second time

DIVERGENCE, OUTPUT_ERROR = "KL divergence", "output error"

Inputs = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What was measured.

    measure     what losses are: `DIVERGENCE`, nats for a token, or `OUTPUT_ERROR`
    losses      layer -> predicted loss with each of its schemes
    relative    layer -> energy of the weight's error over that of the weight, with each
    unreached   layers that no token reached; their losses are 0
    tokens      that the network was run on
    events      what a user should know
    """

    measure: str
    losses: Mapping[str, tuple[float, ...]]
    relative: Mapping[str, tuple[float, ...]]
    unreached: tuple[str, ...]
    tokens: int
    events: tuple[Event, ...] = ()


def measure(
    network: Network,
    schemes: Schemes,
    data: CalibrationData,
    host: Host,
    *,
    seed: int,
    threads: int,
) -> Sensitivities:
    """Measure the layers of a network, each with each of its schemes.

    network   its weights must be in memory; they are not changed
    seed      of the tokens that are drawn; global generators are not touched
    threads   how many; the result does not depend on it, as windows are dealt to a fixed number of
              lanes, whose sums are added in their order

    Raises ModelError when the forward or the backward pass fails, NonFiniteError when logits,
    gradients or losses are not finite.
    """
    module = network.module
    kwargs = accepted(module, {"use_cache": False} if network.folder is not None else {})
    weights = {
        name: get_weight(module.get_submodule(name)).to(torch.float32).contiguous()
        for name in schemes
    }
    rounded = Rounded(weights, schemes, host)
    probe = _Probe(module, rounded)
    windows = list(enumerate(windows_of(data.inputs)))

    def lane(number: int) -> Lane:
        made = Lane()
        for place, inputs in windows[number::MEASURING_LANES]:
            with torch.enable_grad():
                probe.watch(made, inputs, kwargs, _seed(seed, place))
        return made

    with parallel.one_torch_thread(), probe:
        lanes = parallel.spread(lane, range(MEASURING_LANES), threads)
        total = Lane.added(lanes)
        names = list(schemes)
        found = parallel.spread(lambda name: total.losses(name, rounded), names, threads)
    losses = {name: layer.predicted for name, layer in zip(names, found, strict=True)}
    for name, values in losses.items():
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(f"layer {name!r}: its predicted losses are {list(values)}")
    unreached = tuple(name for name in schemes if name not in total.reached)
    return Sensitivities(
        measure=OUTPUT_ERROR if total.why else DIVERGENCE,
        losses=losses,
        relative={name: layer.relative for name, layer in zip(names, found, strict=True)},
        unreached=unreached,
        tokens=total.tokens,
        events=(*_events(total.why), *_unreached_events(unreached)),
    )


def check_memory(network: Network, schemes: Schemes) -> None:
    """Raise MemoryLimitError when the machine has less memory left than measuring takes."""
    needed = measuring_memory(network, schemes)
    total, free = sum(needed.values()), psutil.virtual_memory().available
    if total <= free:
        return
    parts = ", ".join(f"{readable_bytes(count)} {what}" for what, count in needed.items())
    raise MemoryLimitError(
        f"target_bits: sensitivities are measured on the whole network in float32, which takes "
        f"about {readable_bytes(total)} ({parts}), and {readable_bytes(free)} are free; use a "
        f"machine with more memory, or num_bits without target_bits"
    )


def windows_of(chunks: Sequence[Inputs], count: int = WINDOWS) -> list[Inputs]:
    """Return inputs from all over the text, so many of them where there are.

    Windows of tokens, [windows, length] integers, are taken apart and cut to `MEASURED_TOKENS`; any
    other inputs are taken as they come.
    """
    apart: list[Inputs] = []
    for chunk in chunks:
        if _is_tokens(chunk):
            apart += [(window[:, :MEASURED_TOKENS],) for window in chunk[0].split(1)]
        else:
            apart.append(chunk)
    wanted = min(len(apart), count)
    places = np.linspace(0, len(apart) - 1, wanted).round().astype(int)
    return [apart[int(place)] for place in places]


def _is_tokens(chunk: Inputs) -> bool:
    first = chunk[0] if len(chunk) == 1 else None
    return isinstance(first, torch.Tensor) and first.ndim == 2 and not first.is_floating_point()


def own_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient of the sum of -log p(token) by the logits, tokens drawn from p.

    logits   [..., vocabulary]; every position is drawn for

    It is p less 1 at the token. Raises NonFiniteError for logits that are not finite.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    check_finite(flat, "the network's logits, while its sensitivity is measured")
    gradient = torch.softmax(flat.to(torch.float32), -1)
    for part in gradient.split(DRAWN_AT_ONCE):  # views
        token = torch.multinomial(part, 1, generator=generator)
        part.scatter_add_(1, token, -torch.ones_like(token, dtype=part.dtype))
    return gradient.to(logits.dtype).reshape(logits.shape)


class _Probe:
    """Watches the layers during a pass, and adds what they tell to a lane; a context manager."""

    def __init__(self, module: nn.Module, rounded: Rounded) -> None:
        self._module, self._rounded = module, rounded
        self._here = threading.local()  # a lane has a thread of its own
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for name in self._rounded.weights:
            layer = self._module.get_submodule(name)
            handle = layer.register_forward_hook(self._hook(name), with_kwargs=True)
            self._stack.callback(handle.remove)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def watch(self, lane: Lane, inputs: Inputs, kwargs: Mapping[str, Any], seed: int) -> None:
        """Run a window through the network, forward and backward."""
        self._here.uses = {}
        self._here.inputs = []
        self._here.lane = lane
        output = _forward(self._module, inputs, kwargs)
        logits = getattr(output, "logits", None)
        why = _objection(logits)
        if why or not isinstance(logits, torch.Tensor):
            lane.why = why
            lane.tokens += self._add_errors(lane)
            return
        self._here.inputs.clear()  # the hooks have theirs
        lane.tokens += math.prod(logits.shape[:-1])
        _backward(logits, own_gradient(logits.detach(), torch.Generator().manual_seed(seed)))
        for name, use in self._here.uses.items():
            if use.gradient is not None:  # not all that it gave was used
                lane.add_gradient(name, use.gradient, self._rounded.weights[name])

    def _hook(self, name: str) -> Callable[..., torch.Tensor]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            x = layer_input(args, kwargs).detach()
            if not x.numel():
                return output
            lane, version = self._here.lane, x._version
            use = self._here.uses.setdefault(name, _Use())
            use.runs += 1
            lane.reached.add(name)
            self._here.inputs.append((name, x, version))

            def take(gradient: torch.Tensor) -> None:
                _check_unchanged(name, x, version)
                self._add_gradient(name, lane, use, x, gradient)

            if not output.requires_grad:  # nothing before it does; what follows may be in place
                output = output.requires_grad_(True).clone()
            output.register_hook(take)
            return output

        return hook

    def _add_gradient(
        self, name: str, lane: Lane, use: _Use, x: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Add the gradient by the weight, once all runs of the layer in the window gave theirs."""
        g = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
        check_finite(g, f"the gradient at layer {name!r}, while its sensitivity is measured")
        made = g.T @ x.reshape(-1, x.shape[-1]).to(torch.float32)
        use.gradient = made if use.gradient is None else use.gradient.add_(made)
        use.runs -= 1
        if use.runs == 0:
            lane.add_gradient(name, use.gradient, self._rounded.weights[name])
            use.gradient = None

    @torch.no_grad()
    def _add_errors(self, lane: Lane) -> int:
        """Add the energies of outputs and of their errors; return the most tokens of a layer."""
        most = 0
        for name, x, version in self._here.inputs:
            _check_unchanged(name, x, version)
            flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
            most = max(most, len(flat))
            every = [self._rounded.weights[name], *self._rounded.changes(name)]
            lane.add_errors(name, [_energy(flat @ weight.T) for weight in every])
        self._here.inputs.clear()
        return most


@dataclass(slots=True)
class _Use:
    """A layer in a window: how often it ran and has not given its gradient, and their sum."""

    runs: int = 0
    gradient: torch.Tensor | None = None


def _energy(values: torch.Tensor) -> float:
    """Return the sum of squares."""
    return float(values.square().sum(dtype=torch.float64))


def _check_unchanged(name: str, x: torch.Tensor, version: int) -> None:
    if x._version != version:
        raise ModelError(
            f"layer {name!r}: the network changes its input in place after it was read, so its "
            f"sensitivity cannot be measured; recipes with target_bits cannot be used for it"
        )


def _forward(module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return module(*inputs, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the forward pass of {type(module).__name__} failed while sensitivities were "
            f"measured: {type(error).__name__}: {error}"
        ) from error


def _backward(logits: torch.Tensor, gradient: torch.Tensor) -> None:
    try:
        logits.backward(gradient)
    except RuntimeError as error:
        raise ModelError(
            f"sensitivities cannot be measured: the backward pass failed: {error}"
        ) from error


def _objection(logits: Any) -> str:
    """Return why there is no distribution of the network's own, "" where there is one."""
    if not isinstance(logits, torch.Tensor):
        return "the network has no output `logits`"
    if logits.shape[-1] < 2:
        return "the network's logits are of one class"
    if not logits.requires_grad:
        return "the network's logits depend on no layer that is quantized"
    return ""


def _events(why: str) -> Iterator[Event]:
    if why:
        message = (
            f"{why}, so layers were compared by the error of their own outputs, over the energy "
            f"of the outputs, in place of the KL divergence of the network"
        )
        yield Event(kind="sensitivity", layer="", message=message)


def _unreached_events(unreached: Sequence[str]) -> Iterator[Event]:
    for name in unreached:
        message = "no token reached it, so nothing was measured: it keeps the recipe's num_bits"
        yield Event(kind="sensitivity", layer=name, message=message)


def _seed(seed: int, number: int) -> int:
    """Return the seed of a chunk, from the recipe's."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
