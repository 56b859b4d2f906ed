"""One call of a kernel: operands drawn from a seed, what came of them, and how it is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qframe import KVScheme
from qframe.contracts import OpCall
from qframe.errors import QframeError
from qframe.host import Host
from qframe.kernel_comparisons import Judged
from qframe.kernel_judges import judge
from qframe.kernels import Op, arithmetic_of, op_of, run
from qframe_conformance.checks import Violation, within
from qframe_conformance.engine import Refused
from qframe_conformance.kernel_frames import LAYOUTS, Frame, frame
from qframe_conformance.report import Counterexample

Array = np.ndarray[Any, Any]

NOT_OF_NUMBERS = ("B8.a", "B8.b")
"""Theorems about lengths and angles, whose errors are not those of single numbers."""


@dataclass(eq=False)
class KernelCase:
    """A kernel and the operands of one call.

    operands   name -> NumPy array or number; activations as float32, whatever dtype they have
    seed       chooses how operands lie in memory
    call       what `supports` was asked; None for a call that was not asked about
    optional   the kernel may refuse with UnsupportedError: operands are of a kind that no `OpCall`
               tells, such as groups that are not neighbouring columns
    dtype      of activations, which the operands hold exactly
    """

    kernel: Any
    operands: dict[str, Any]
    seed: int = 0
    optional: bool = False
    call: OpCall | None = None
    dtype: str = "float32"

    @property
    def op(self) -> Op:
        """What the kernel computes."""
        return op_of(self.kernel.op)

    @cached_property
    def frames(self) -> dict[str, Frame]:
        """The tensors that the kernel is given, each in its frame."""
        rng = np.random.default_rng(self.seed)
        device = getattr(self.kernel, "device", "cpu")
        found = {}
        for operand in self.op.operands:
            layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
            if operand.is_tensor:
                layout = "packed" if operand.in_place else layout
                dtype = self.dtype if operand.activation else None
                found[operand.name] = frame(self.operands[operand.name], layout, device, dtype)
        return found

    @cached_property
    def answer(self) -> tuple[Array, ...]:
        """What came out, as arrays of the promised shapes and dtypes.

        Raises Refused for a typed error and for anything that is no answer to this call.
        """
        return self._call(self.frames)

    @property
    def must_answer(self) -> bool:
        """Whether this call is answered, and no one may refuse one that is like it.

        Raises Refused where it is not answered, which is for the check `answers`.
        """
        return not self.optional and bool(self.answer)

    def again(self) -> tuple[Array, ...]:
        """Call once more with the same tensors in the same places."""
        frames = dict(self.frames)
        for name in self.op.in_place:
            frames[name] = frame(self.operands[name], "packed", str(frames[name].tensor.device))
        return self._call(frames)

    def of_activations(self, x: Array) -> Array:
        """Return what comes of activations [tokens, columns] in the place of codes and scales.

        They have the dtype of the case, and so has what comes. Raises Refused like `answer`.
        """
        frames = self.frames
        constants = tuple(frames[o.name].tensor for o in self.op.operands if o.constant)
        device = getattr(self.kernel, "device", "cpu")
        layout = LAYOUTS[self.seed % len(LAYOUTS)]
        try:
            if hasattr(self.kernel, "prepare"):
                constants = (self.kernel.prepare(*constants),)
            given = frame(x, layout, device, self.dtype).tensor
            made = self.kernel.from_activations(given, *constants)
        except QframeError as error:
            raise self._refused(error) from error
        self._check((made,), self.dtype)
        return _array(made)

    def _call(self, frames: dict[str, Frame]) -> tuple[Array, ...]:
        given = [
            frames[o.name].tensor if o.is_tensor else self.operands[o.name]
            for o in self.op.operands
        ]
        try:
            made = run(self.kernel, given)
        except QframeError as error:
            raise self._refused(error) from error
        if self.op.in_place:
            return tuple(_array(frames[name].tensor) for name in self.op.in_place)
        parts = made if isinstance(made, tuple) else (made,)
        self._check(parts)
        return tuple(_array(part) for part in parts)

    def _refused(self, error: QframeError) -> Refused:
        foreseen = self.call is not None and self.kernel.supports(self.call) is not None
        return Refused(f"refused: {type(error).__name__}: {error}", foreseen=foreseen)

    def _check(self, parts: tuple[Any, ...], dtype: str | None = None) -> None:
        """Raise Refused unless the parts are what the op promises; dtype: another for all."""
        if len(parts) != len(self.op.answer):
            raise Refused(f"returned {len(parts)} things, expected {len(self.op.answer)}")
        sizes = self.sizes()
        for part, promised in zip(parts, self.op.answer, strict=True):
            if not isinstance(part, torch.Tensor):
                raise Refused(f"{promised.name} is a {type(part).__name__}, expected a tensor")
            got = f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            kind = dtype or (self.dtype if promised.activation else promised.dtype)
            expected = f"{kind} {[sizes[word] for word in promised.shape]}"
            if got != expected:
                raise Refused(f"{promised.name} is {got}, expected {expected}")

    def sizes(self) -> dict[str, int]:
        """Return word -> size of every dimension that the op names."""
        found: dict[str, int] = {}
        for operand in self.op.operands:
            if operand.is_tensor:
                found.update(zip(operand.shape, self.operands[operand.name].shape, strict=True))
        return found

    @cached_property
    def judged(self) -> Judged:
        """Theorem -> comparison."""
        return judge(
            self.kernel.op,
            self.operands,
            self.answer,
            arithmetic_of(self.kernel, self.operands, self.dtype),
            dense=getattr(self.kernel, "dense", False),
        )

    def cut(self, count: int) -> KernelCase:
        """Return the same call with only the first tokens, rows or sequences."""
        along = self.op.along
        operands = dict(self.operands)
        for operand in self.op.operands:
            for axis, word in enumerate(operand.shape):
                array = operands[operand.name]
                single = word.endswith(" or 1") and array.shape[axis] == 1
                if word.removesuffix(" or 1") == along and not single:
                    operands[operand.name] = array.take(range(count), axis)
        call = self.call
        if call is not None:
            words = zip(self.op.call, call.shape, strict=True)
            call = replace(call, shape=tuple(count if w == along else n for w, n in words))
        return replace(self, operands=operands, call=call)

    def by(self, kernel: Any) -> KernelCase:
        """Return the same call of another kernel, with tensors that lie as they do here."""
        return replace(self, kernel=kernel)

    def with_operands(self, **changes: Any) -> KernelCase:
        """Return the same call with other operands."""
        return replace(self, operands={**self.operands, **changes})

    def counterexample(self, check: str) -> Counterexample:
        """Return the call as plain Python; `plugin` and `arrays` are defined before it."""
        lines, arrays, schemes = [], {}, ""
        short = "" if self.dtype == "float32" else f", dtype={self.dtype!r}"
        for name, value in self.operands.items():
            if isinstance(value, np.ndarray):
                arrays[name] = value
                lines.append(f"    {name!r}: arrays[{name!r}],")
            else:
                lines.append(f"    {name!r}: {value!r},")
                schemes = (
                    "from qframe import KVScheme\n" if isinstance(value, KVScheme) else schemes
                )
        text = f"""\
{schemes}from qframe_conformance import replay
from qframe_conformance.kernel_case import KernelCase

operands = {{
{chr(10).join(lines)}
}}
case = KernelCase(plugin, operands, seed={self.seed}, optional={self.optional}{short})
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text, arrays=arrays)


_PEERS: ContextVar[tuple[Any, ...]] = ContextVar("peers", default=())


def peers_of(host: Host) -> list[Any]:
    """Return the kernels of a host, but for those that simulate another machine."""
    kernels = [host.get("kernel", name) for name in host.names("kernel")]
    return [each for each in kernels if not getattr(each, "by_name_only", False)]


@contextmanager
def beside(peers: Sequence[Any]) -> Iterator[None]:
    """Tell of these kernels' answers, too, where another one's is wrong."""
    token = _PEERS.set(tuple(peers))
    try:
        yield
    finally:
        _PEERS.reset(token)


def compared(case: KernelCase, theorem: str) -> float:
    """Return the largest error over what a theorem allows; a Violation says what others answer."""
    comparison = case.judged[theorem]
    try:
        return within(comparison.error, comparison.allowed, comparison.what, theorem)
    except Violation as violation:
        wrong = ~(np.abs(comparison.error) <= comparison.allowed)
        told = "" if theorem in NOT_OF_NUMBERS else _told(case, wrong)
        if not told:
            raise
        raise Violation(f"{violation}\n{told}", ratio=violation.ratio, theorem=theorem) from None


def _told(case: KernelCase, wrong: Array) -> str:
    """Return the sides of the first number that is wrong, where errors are those of numbers."""
    with np.errstate(all="ignore"):
        oracle = case.op.oracle(*(case.operands[o.name] for o in case.op.operands))
    expected = oracle if isinstance(oracle, tuple) else (oracle,)
    for number, (part, exact) in enumerate(zip(case.answer, expected, strict=True)):
        if part.shape == wrong.shape:
            return sides(case, number, np.asarray(exact), wrong)
    return ""


def sides(case: KernelCase, number: int, exact: Array, wrong: Array) -> str:
    """Return what the kernel, float64 and the other kernels say of the first wrong number.

    number   of the part of the answer in which something is wrong
    exact    what the oracle has in the place of that part
    wrong    which numbers are wrong, like that part
    """
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    truth, answer = float(exact[place]), case.answer[number][place]
    said = [f"{case.kernel.backend} {answer!s}"]
    distances = {case.kernel.backend: _distance(answer, truth)}
    for peer in _PEERS.get():
        if peer.op != case.op.name or peer.backend == case.kernel.backend:
            continue
        if case.call is not None and peer.supports(case.call) is not None:
            continue
        try:
            answer = case.by(peer).answer[number][place]
        except Refused as refusal:
            said.append(f"{peer.backend} {refusal}")
            continue
        said.append(f"{peer.backend} {answer!s}")
        distances[peer.backend] = _distance(answer, truth)
    count = int(wrong.sum())
    far = max(distances, key=distances.__getitem__)
    more = f"; furthest from float64: {far}" if len(distances) > 1 else ""
    return (
        f"first of {count} wrong numbers at {list(place)}: float64 {truth:.9g}, "
        f"{', '.join(said)}{more}"
    )


def _distance(answer: Any, truth: float) -> float:
    """Return how far an answer is from the truth; what is not finite is the furthest."""
    distance = abs(float(answer) - truth)
    return float("inf") if np.isnan(distance) else distance


def _array(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array; one of 16 bits as the float32 numbers that it holds."""
    held = tensor.detach().cpu()
    short = held.dtype in (torch.bfloat16, torch.float16)
    return (held.float() if short else held).numpy().copy()
