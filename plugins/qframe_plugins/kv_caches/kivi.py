"""KIVI: keys and values in few bits, in groups of tokens or channels, but for the newest tokens.

Source: Liu et al., KIVI, ICML 2024, arXiv:2402.02750. Keys have channels that are large in all
tokens, so a group is tokens of one channel (axis "channel"); values have not, so a group is
channels of one token (axis "token"): section 3.1. Asymmetric, with the offset stored beside the
scale (eq. 1). The last R tokens stay as they came (section 3.2, the residual); so do the first S,
the attention sinks (Xiao et al., ICLR 2024, arXiv:2309.17453). Either axis serves either kind, with
2 to 8 bits, symmetric or not.
Error:  |x - (s c + m)| <= s / 2, and what follows for attention (docs/bounds.md, B7).

Where the paper leaves a choice: a scale is rounded up and an offset down when they are stored, so
that nothing is clipped; a group is quantized as soon as R newer tokens are there, where the paper's
keys wait until R tokens are kept and go all at once (`flush="residual"`). Codes are a bit stream,
`num_bits` each, a row of them padded to 32 bits.

The rotation is QuaRot's (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456, section 4): Hadamard's
matrix spreads an outlier over the channels of its token before codes are chosen, and is undone when
they are read. Codes are then the nearest to rotated numbers (B7.h).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qframe import Capabilities, KVBlock, KVScheme, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

Flush = Literal["group", "residual"]
LARGEST = {"float32": 2.0**100, "float16": 65504.0, "bfloat16": 2.0**100}
"""scale_dtype -> the largest number that is taken: no scale, offset or sum with it can overflow."""

LONG = 1024  # tokens of a run that others join only when they are as many


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are codes.

    words    [batch, heads, tokens, words] int32, or [batch, heads, groups, head_dim, words] where
             tokens of a channel are a group
    scale    as in `KVBlock`, in the scale dtype
    offset   like scale; None for symmetric schemes, whose offsets are 0
    """

    start: int
    tokens: int
    words: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    @property
    def stop(self) -> int:
        """The token after the last one."""
        return self.start + self.tokens

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        offset = 0 if self.offset is None else self.offset.nbytes
        return self.words.nbytes + self.scale.nbytes + offset

    def span(self, start: int, stop: int, step: int) -> Run:
        """Return some of the tokens, from the first of their group on; nothing is copied."""
        first = (start - self.start) // step
        last = -(-(stop - self.start) // step)
        begin = self.start + first * step
        run = self.mapped(lambda t: t[:, :, first:last], stop - begin)
        return dataclasses.replace(run, start=begin)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> Run:
        """Return the run with every tensor changed, and so many tokens."""
        offset = None if self.offset is None else change(self.offset)
        return Run(self.start, tokens, change(self.words), change(self.scale), offset)

    def joined(self, other: Run) -> Run:
        """Return this run with the tokens of the next one behind its own."""
        import torch

        offset = None
        if self.offset is not None and other.offset is not None:
            offset = torch.cat((self.offset, other.offset), dim=2)
        return Run(
            self.start,
            self.tokens + other.tokens,
            torch.cat((self.words, other.words), dim=2),
            torch.cat((self.scale, other.scale), dim=2),
            offset,
        )


class Store:
    """The keys, or the values, of one layer: sinks, runs of codes, and the newest tokens.

    New codes go into a short run, which joins the one before when it is long: so few are copied
    when some come. After a crop into a group what remains of it cannot grow, since its other tokens
    counted into its scales.
    """

    def __init__(self, scheme: KVScheme, flush: Flush, *, rotate: bool) -> None:
        self.scheme, self._rotate = scheme, rotate
        self._window = claims.ExactWindow(flush=flush)
        self._sinks: torch.Tensor | None = None
        self._recent: torch.Tensor | None = None
        self._runs: list[Run] = []

    # What is in it

    @property
    def length(self) -> int:
        """The tokens in it."""
        return 0 if self._recent is None else self._coded + self._recent.shape[2]

    @property
    def nbytes(self) -> int:
        """The bytes of all memory that it holds."""
        kept = sum(each.nbytes for each in (self._sinks, self._recent) if each is not None)
        return kept + sum(run.nbytes for run in self._runs)

    @property
    def _coded(self) -> int:
        """Where the codes end."""
        sinks = 0 if self._sinks is None else self._sinks.shape[2]
        return sinks + sum(run.tokens for run in self._runs)

    @property
    def runs(self) -> Sequence[Run]:
        """What is stored as codes, from left to right."""
        return self._runs

    def read(self) -> torch.Tensor:
        """Return all tokens [batch, heads, length, head_dim], in the dtype that was appended."""
        self._filled()
        return self.span(0, self.length)

    def span(self, start: int, stop: int) -> torch.Tensor:
        """Return some of them."""
        import torch

        sinks, recent = self._filled()
        after = self._coded
        found = [sinks[:, :, start:stop]]
        for run in self._runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                part = run.span(first, last, self.scheme.step)
                found.append(self._decode(part)[:, :, first - part.start :])
        found.append(recent[:, :, max(start - after, 0) : max(stop - after, 0)])
        return torch.cat(found, dim=2)

    def blocks(self) -> list[KVBlock]:
        """Return what is stored as codes, from left to right."""
        found = []
        for run in self._runs:
            scale, offset = self._scales(run)
            codes = self._codes(run)
            found.append(KVBlock(start=run.start, codes=codes, scale=scale, offset=offset))
        return found

    def _filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sinks is None or self._recent is None:
            raise ValueError("nothing was appended yet, so there is no shape to read")
        return self._sinks, self._recent

    # What caches do

    def append(self, x: torch.Tensor) -> None:
        """Take in x [batch, heads, tokens, head_dim]. Raises NonFiniteError or ValueError."""
        import torch

        self._refuse(x)
        nothing = x[:, :, :0].clone()
        sinks = nothing if self._sinks is None else self._sinks
        recent = nothing if self._recent is None else self._recent
        missing = max(self.scheme.sink_tokens - self.length, 0)
        if missing:
            sinks = torch.cat((sinks, x[:, :, :missing]), dim=2)
        recent = torch.cat((recent, x[:, :, missing:]), dim=2)
        chunk = self._window.chunk(self.scheme)
        ready = max(recent.shape[2] - self._window.kept(self.scheme), 0) // chunk * chunk
        if ready:
            start = sinks.shape[2] + sum(run.tokens for run in self._runs)
            self._add(self._encode(recent[:, :, :ready], start))
            recent = recent[:, :, ready:].clone()
        self._sinks, self._recent = sinks, recent

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises ValueError beyond [0, self.length]."""
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} of {self.length} tokens")
        if length == self.length:
            return
        sinks, recent = self._filled()
        kept, whole = max(length - self._coded, 0), self._runs
        self._recent = recent[:, :, :kept].clone()
        self._runs = [self._cropped(run, length - run.start) for run in whole if run.start < length]
        self._sinks = sinks[:, :, :length].clone()

    def select(self, indices: torch.Tensor) -> None:
        """Make the batch that of `indices` [new batch] int64. Raises ValueError beyond it."""
        batch = 0 if self._sinks is None else self._sinks.shape[0]
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < batch:
            raise ValueError(f"select {indices.tolist()} of a batch of {batch}")
        if self._sinks is None or self._recent is None:
            return
        self._sinks, self._recent = self._sinks[indices], self._recent[indices]
        self._runs = [run.mapped(lambda t: t[indices], run.tokens) for run in self._runs]

    def _refuse(self, x: torch.Tensor) -> None:
        """Raise NonFiniteError or ValueError for what cannot be appended."""
        import torch

        given = f"{x.dtype} {list(x.shape)}"
        if x.dim() != 4 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"append: expected [batch, heads, tokens, head_dim] of float32, float16 or "
                f"bfloat16, got {given}"
            )
        before = self._recent
        if before is not None:
            same = x.shape[:2] == before.shape[:2] and x.shape[3] == before.shape[3]
            if not same or x.dtype != before.dtype:
                raise ValueError(f"append: {before.dtype} {list(before.shape)} before, now {given}")
        if not x.numel():
            return
        dtype, largest = self.scheme.scale_dtype, float(x.abs().max())
        if not math.isfinite(largest):
            raise NonFiniteError("append: a key or value is not finite; look at what computed it")
        if largest > LARGEST[dtype]:
            raise NonFiniteError(
                f"append: |x| = {largest:g} is more than {LARGEST[dtype]:g}, beyond which "
                f"scale_dtype={dtype!r} may have no scale; use 'bfloat16' or 'float32'"
            )

    def _add(self, run: Run) -> None:
        """Put a run behind the others, and join it with those before that may grow."""
        self._runs.append(run)
        while len(self._runs) > 1:
            before, last = self._runs[-2:]
            settled = before.tokens >= LONG > last.tokens
            if settled or before.tokens % self.scheme.step:
                break
            self._runs[-2:] = [before.joined(last)]

    def _cropped(self, run: Run, tokens: int) -> Run:
        if tokens >= run.tokens:
            return run
        units = -(-tokens // self.scheme.step)
        return run.mapped(lambda t: t[:, :, :units].clone(), tokens)

    # Codes

    def _encode(self, tokens: torch.Tensor, start: int) -> Run:
        """Return tokens as codes."""
        import torch

        from qframe import packing
        from qframe.transforms import block_of

        x = tokens.float()
        if self._rotate:
            x = turned(x) / block_of(x.shape[3])  # exact, and no larger than before
        scale, offset = self._fit(x)
        grid, shape = self.scheme.grid, tuple(x.shape)
        steps = (x - self._spread(offset, shape)) / self._spread(scale, shape)
        codes = steps.round().clamp(grid.qmin, grid.qmax).to(torch.int16) - grid.qmin
        rows = codes
        if self.scheme.axis == "channel":
            rows = codes.unflatten(2, (-1, self.scheme.step)).transpose(3, 4)
        words = packing.pack_codes(rows.reshape(-1, rows.shape[-1]), self.scheme.num_bits)
        dtype: torch.dtype = getattr(torch, self.scheme.scale_dtype)
        return Run(
            start,
            x.shape[2],
            words.reshape(*rows.shape[:-1], words.shape[1]),
            scale.to(dtype),
            None if self.scheme.symmetric else offset.to(dtype),
        )

    def _fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of each group, float32 numbers of the scale dtype (B7.f)."""
        import torch

        from qframe import rounding

        lo, hi = self._ranges(x)
        grid, dtype = self.scheme.grid, self.scheme.scale_dtype
        levels = grid.qmax - grid.qmin
        if self.scheme.symmetric:
            extent, offset = torch.maximum(lo.abs(), hi.abs()), torch.zeros_like(lo)
            scale = extent / (levels / 2)
        else:
            offset = rounding.round_down(lo, dtype)
            extent = hi - offset  # from the offset that is stored, so that hi is not clipped
            scale = extent / levels
        scale = rounding.round_up(scale, dtype)
        smallest = rounding.smallest_positive(dtype)
        scale = torch.where((scale == 0) & (extent > 0), smallest, scale)
        return torch.where(extent == 0, 1.0, scale), offset

    def _ranges(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and largest number of each group, `KVScheme.scale_shape`."""
        import torch

        if self.scheme.axis == "channel":
            groups = x.unflatten(2, (-1, self.scheme.step))
            lo, hi = groups.amin(3), groups.amax(3)
        else:  # the last group of a token may be shorter
            parts = x.split(self.scheme.group_size or max(x.shape[3], 1), dim=3)
            lo = torch.stack([part.amin(3) for part in parts], dim=3)
            hi = torch.stack([part.amax(3) for part in parts], dim=3)
        return lo + 0.0, hi + 0.0  # of 0 and -0 either may be found first: now both are 0

    def _spread(self, per_group: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return per-group numbers for numbers [batch, heads, tokens, head_dim], or broadcast."""
        if self.scheme.axis == "channel":
            return per_group.repeat_interleave(self.scheme.step, dim=2)[:, :, : shape[2]]
        if self.scheme.group_size is None:
            return per_group
        return per_group.repeat_interleave(self.scheme.group_size, dim=3)[..., : shape[3]]

    def _codes(self, run: Run) -> torch.Tensor:
        """Return the codes of a run, [batch, heads, tokens, head_dim] int16."""
        import torch

        from qframe import packing

        _, recent = self._filled()
        channel, head_dim = self.scheme.axis == "channel", recent.shape[3]
        width = self.scheme.step if channel else head_dim
        words = run.words.reshape(-1, run.words.shape[-1])
        rows = packing.unpack_codes(words, self.scheme.num_bits, width)
        codes = rows.reshape(*run.words.shape[:-1], width)
        if channel:  # of a group that was cropped, the words hold more than there is
            codes = codes.transpose(3, 4).flatten(2, 3)[:, :, : run.tokens]
        return codes.to(torch.int16) + self.scheme.grid.qmin

    def rows(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], KVScheme]:
        """Return tokens of one run, of which the first begins a group, as `attention_kv` has them.

        Words are not copied.
        """
        run = next(each for each in self._runs if each.start <= start < each.stop)
        step = self.scheme.step
        first, last = (start - run.start) // step, -(-(stop - run.start) // step)
        scale, offset = self._scales(run)
        words = run.words[:, :, first:last]
        if self.scheme.axis == "channel":
            words = words.flatten(2, 3)
        scale, offset = scale[:, :, first:last], offset[:, :, first:last]
        return words.numpy(), scale.numpy(), offset.numpy(), self.scheme

    def _scales(self, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of a run in float32, for the caller to keep."""
        import torch

        scale = run.scale.to(torch.float32, copy=True)
        if run.offset is None:
            return scale, torch.zeros_like(scale)
        return scale, run.offset.to(torch.float32, copy=True)

    def _decode(self, run: Run) -> torch.Tensor:
        """Return what the codes of a run stand for."""
        import torch

        _, recent = self._filled()
        codes = self._codes(run)
        scale, offset = (self._spread(each, tuple(codes.shape)) for each in self._scales(run))
        x = codes.to(torch.float32) * scale + offset
        if self._rotate:
            x = turned(x)
        if recent.dtype != torch.float32:  # a scale that was rounded up may reach beyond its end
            largest = torch.finfo(recent.dtype).max
            x = x.clamp(-largest, largest)
        return x.to(recent.dtype)


def shared_codes(keys: Store, values: Store) -> Iterator[tuple[int, int]]:
    """Yield (first token, the one after the last) of what is codes in a run of either store."""
    steps = keys.scheme.step, values.scheme.step
    for key in keys.runs:
        for value in values.runs:
            start, stop = max(key.start, value.start), min(key.stop, value.stop)
            while start < stop and any(  # a group is taken from its first token on
                (start - run.start) % step for run, step in zip((key, value), steps, strict=True)
            ):
                start += 1
            if start < stop:
                yield start, stop


def _on_codes(
    query: torch.Tensor, keys: Store, values: Store, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of some tokens [batch, query heads, head_dim], and log sum exp."""
    import torch

    from qframe_plugins.kernels.numba_cpu import attention

    k, v = (store.rows(start, stop) for store in (keys, values))
    out, lse = attention.attend(query.numpy(), k, v, stop - start)
    return torch.from_numpy(out), torch.from_numpy(lse)


def _on_numbers(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for numbers [batch, heads, tokens, head_dim] float32."""
    batch, heads, width = query.shape
    q = query.reshape(batch, keys.shape[1], -1, width) / math.sqrt(width)
    logits = q @ keys.transpose(2, 3)
    out = logits.softmax(-1) @ values
    return out.reshape(batch, heads, width), logits.logsumexp(-1).reshape(batch, heads)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Return x H over blocks of channels, as large as their number can be cut into."""
    from qframe.transforms import block_of, butterflies

    return butterflies(x.unflatten(-1, (-1, block_of(x.shape[-1])))).flatten(-2)


@dataclass(frozen=True)
class KIVI:
    """Groups of tokens or channels round to nearest; the newest tokens and the sinks are kept.

    flush    when kept tokens become codes. group: a group does as soon as `residual_length` newer
             tokens are there. residual: all do, as soon as there are `residual_length` of them, as
             the paper has it for keys
    rotate   whether codes are chosen for x H / n and not for x; n is the largest power of two that
             divides head_dim
    """

    flush: Flush = "group"
    rotate: bool = False

    name: str = field(init=False, default="kivi")
    capabilities: Capabilities = field(
        init=False,
        default=Capabilities(
            num_bits=frozenset(range(2, 9)), strategies=frozenset({"token", "channel"})
        ),
    )

    @property
    def claims(self) -> tuple[object, ...]:
        """Which tokens are codes, how they are packed, and their error."""
        window = claims.ExactWindow(flush=self.flush)
        found = (window, claims.Streaming(), claims.PackedCodes())
        if self.rotate:
            return (claims.KVRotatedHalfStep(), *found)
        attends = claims.FusedAttention(online=True)
        return (claims.KVHalfStep(), claims.KVScale(), attends, *found)

    def start(self, kind: str, scheme: KVScheme, rng: np.random.Generator) -> Store:
        """Return an empty store; keys and values differ only in their scheme."""
        return Store(scheme, self.flush, rotate=self.rotate)

    def attend(self, query: torch.Tensor, keys: Store, values: Store) -> torch.Tensor:
        """Return softmax(q K^T / sqrt(head_dim)) V, [batch, query heads, head_dim] float32.

        Where keys and values both are codes the kernel attends to them; the others, and all that
        were rotated, are read. What comes of each part is put together by its denominator.
        """
        import torch

        found, rest, at = [], [], 0
        for start, stop in () if self.rotate else shared_codes(keys, values):
            found.append(_on_codes(query, keys, values, start, stop))
            rest.append((at, start))
            at = stop
        rest.append((at, keys.length))
        loose = [(start, stop) for start, stop in rest if start < stop]
        if loose:
            k, v = (
                torch.cat([store.span(*each) for each in loose], dim=2).float()
                for store in (keys, values)
            )
            found.append(_on_numbers(query, k, v))
        if len(found) == 1:
            return found[0][0]
        share = torch.stack([lse for _, lse in found]).softmax(0)[..., None]
        return (share * torch.stack([out for out, _ in found])).sum(0)

    def nbytes(self, scheme: KVScheme, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Return the bytes of a store of so many tokens (docs/bounds.md, B7.g)."""
        tokens = shape[2]
        stop = claims.ExactWindow(flush=self.flush).stop(scheme, tokens)
        return scheme.nbytes(shape, itemsize, stop - min(scheme.sink_tokens, tokens))


@hookimpl
def qframe_kv_caches() -> Iterable[KIVI]:
    """Register kivi."""
    return [KIVI()]
