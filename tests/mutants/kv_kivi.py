"""KIVI with one mistake each: in packing, windows, sinks, crops and rotation.

`kv_wrong` has the mistakes of encoding, of attention and of a store's manners.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from qframe.packing import pack_codes
from qframe_plugins.kv_caches.kivi import KIVI, Run, Store, turned
from tests.mutants.kv_caches import outputs
from tests.mutants.mutant import Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "outputs"]

KIND = "kv cache"


@dataclass(frozen=True)
class Of(KIVI):
    """KIVI with another store."""

    store: Any = Store

    def start(self, kind, scheme, rng):
        return self.store(scheme, self.flush, rotate=self.rotate)


# Packing --------------------------------------------------------------------------------------


class SignedBytes(Store):
    """Codes pass through int8, which holds 0 .. 255 of eight bits only up to 127."""

    def _codes(self, run):
        qmin = self.scheme.grid.qmin
        return (super()._codes(run) - qmin).to(torch.int8).to(torch.int16) + qmin


class SignForgotten(Store):
    """Stored codes count from 0, and nothing takes that back for the signed ones."""

    def _codes(self, run):
        codes = super()._codes(run)
        return (codes - self.scheme.grid.qmin).clamp(max=self.scheme.grid.qmax)


class TokensPackedAsChannels(Store):
    """Rows are packed in the order of memory, and unpacked by groups."""

    def _encode(self, tokens, start):
        run = super()._encode(tokens, start)
        if self.scheme.axis == "token":
            return run
        codes = super()._codes(run) - self.scheme.grid.qmin
        rows = codes.unflatten(2, (-1, self.scheme.step)).reshape(-1, self.scheme.step)
        words = pack_codes(rows, self.scheme.num_bits)
        return replace(run, words=words.reshape(run.words.shape))


class AWordAGroup(Store):
    """Every group of a token begins at a new word, and the promise does not know it."""

    def _encode(self, tokens, start):
        run = super()._encode(tokens, start)
        if self.scheme.axis == "token":
            spare = run.words.new_zeros(*run.words.shape[:-1], run.scale.shape[3])
            return replace(run, words=torch.cat((run.words, spare), dim=-1))
        return run

    def _codes(self, run):
        if self.scheme.axis == "token":
            run = replace(run, words=run.words[..., : -run.scale.shape[3]])
        return super()._codes(run)


class ScalesInFloat32(Store):
    def _encode(self, tokens, start):
        run = super()._encode(tokens, start)
        return replace(run, scale=run.scale.float())


# Windows and sinks ----------------------------------------------------------------------------


class SinksOfTheFirstPiece(Store):
    """Sinks are taken from the prompt alone, however short."""

    def append(self, x):
        asked = self.scheme
        if self.length:
            sinks = 0 if self._sinks is None else self._sinks.shape[2]
            self.scheme = asked.model_copy(update={"sink_tokens": min(asked.sink_tokens, sinks)})
        super().append(x)
        self.scheme = asked


class SinksCountIntoTheWindow(Store):
    """The window is measured from the first token, sinks included."""

    def append(self, x):
        asked = self.scheme
        fewer = max(asked.residual_length - asked.sink_tokens, 0)
        self.scheme = asked.model_copy(update={"residual_length": fewer})
        super().append(x)
        self.scheme = asked


class AGroupAnAppend(Store):
    """One flush an append, as for single tokens: a prompt stays as it came."""

    def append(self, x):
        kept, step = self.scheme.residual_length, self.scheme.step
        waiting = 0 if self._recent is None else self._recent.shape[2]
        sinks = max(self.scheme.sink_tokens - self.length, 0)
        ready = max(waiting + max(x.shape[2] - sinks, 0) - kept, 0) // step * step
        if ready <= step:
            super().append(x)
            return
        asked = self.scheme
        self.scheme = asked.model_copy(update={"residual_length": kept + ready - step})
        super().append(x)
        self.scheme = asked


class WindowIsAView(Store):
    """What stays of the window holds on to all that was in it."""

    def append(self, x):
        before = self._coded
        super().append(x)
        if self._coded > before and self._recent is not None:
            gone = self._recent.new_zeros(*self._recent.shape[:2], 1, self._recent.shape[3])
            self._recent = torch.cat((gone, self._recent), dim=2)[:, :, 1:]


class SinksReadLast(Store):
    def read(self):
        read = super().read()
        return read if self._sinks is None else read.roll(-self._sinks.shape[2], dims=2)


# Crops ----------------------------------------------------------------------------------------


class CroppedGroupGrows(Store):
    """New groups are put behind a cropped one as if it were whole."""

    def _add(self, run):
        if self._runs:
            last = self._runs.pop()
            run = last.joined(run)
        self._runs.append(run)


class CropDropsTheGroup(Store):
    """A crop into a group drops its words, not only its tokens."""

    def _cropped(self, run, tokens):
        units = max(tokens // self.scheme.step, 0)
        if tokens >= run.tokens or units * self.scheme.step == tokens:
            return super()._cropped(run, tokens)
        short = run.mapped(lambda t: t[:, :, :units].clone(), units * self.scheme.step)
        pad = tokens - short.tokens
        return self._padded(short, run, pad)

    def _padded(self, short, run, pad):
        first = run.mapped(lambda t: t[:, :, :1].clone(), pad)
        return replace(short.joined(first), tokens=short.tokens + pad)


class CropForgetsSinks(Store):
    """A crop into the sinks leaves them all."""

    def crop(self, length):
        sinks = self._sinks
        super().crop(length)
        if sinks is not None and length < sinks.shape[2]:
            self._sinks = sinks


class StartsAreNotMoved(Store):
    """After a crop, a run begins where the last one ended before."""

    def crop(self, length):
        self.gone = max(self._coded - length, 0)
        super().crop(length)

    def _encode(self, tokens, start):
        return super()._encode(tokens, start + getattr(self, "gone", 0))


# Rotation -------------------------------------------------------------------------------------


class NotTurnedBack(Store):
    def _decode(self, run: Run):
        read = super()._decode(run)
        return turned(read.float()).to(read.dtype)  # H H = n


class TurnedOverTokens(Store):
    """The butterflies run over the tokens of a channel."""

    def _encode(self, tokens, start):
        across = turned(tokens.float().transpose(2, 3)).transpose(2, 3)
        width = tokens.shape[2] & -tokens.shape[2]
        return super()._encode((across / max(width, 1)).to(tokens.dtype), start)


# The tables -----------------------------------------------------------------------------------


def mutant(store, killed_by, bug, **options):
    name = re.sub(r"(?<=.)([A-Z][a-z])", r"_\1", store.__name__).lower()
    return Mutant(
        name=f"kivi_{name}",
        kind=KIND,
        bug=bug,
        make=partial(Of, store=store, **options),
        correct=partial(KIVI, **options),
        killed_by=killed_by,
    )


MUTANTS = (
    mutant(SignedBytes, "shows_its_codes", "Eight-bit codes pass through signed bytes."),
    mutant(SignForgotten, "codes_are_the_nearest", "Symmetric codes are read as if from zero."),
    mutant(TokensPackedAsChannels, "codes_are_the_nearest", "Rows of words hold other codes."),
    mutant(AWordAGroup, "codes_are_packed", "Every group begins at a word of its own."),
    mutant(ScalesInFloat32, "bytes_are_as_promised", "Scales take 32 bits, whatever is asked."),
    mutant(SinksOfTheFirstPiece, "pieces_do_not_matter", "Sinks come from the first append."),
    mutant(SinksCountIntoTheWindow, "window_is_exact", "Sinks take places of the window."),
    mutant(AGroupAnAppend, "window_is_exact", "A prompt flushes one group, like one token."),
    mutant(WindowIsAView, "bytes_are_as_promised", "The window is a view of what it was."),
    mutant(SinksReadLast, "keeps_other_tokens", "Sinks are read behind the window."),
    mutant(CroppedGroupGrows, "lives_as_its_model", "A cropped group goes on as if it were whole."),
    mutant(CropDropsTheGroup, "lives_as_its_model", "The rest of a cropped group is another's."),
    mutant(CropForgetsSinks, "lives_as_its_model", "A crop into the sinks leaves them all."),
    mutant(StartsAreNotMoved, "lives_as_its_model", "Blocks after a crop are said to begin later."),
    mutant(NotTurnedBack, "values_are_those_of_codes", "A rotation is not undone.", rotate=True),
    mutant(TurnedOverTokens, "codes_are_the_nearest", "Tokens are mixed up.", rotate=True),
)

TWINS = (
    Twin(name="kivi", kind=KIND, why="The plugin itself.", make=KIVI),
    Twin(
        name="kivi_residual",
        kind=KIND,
        why="All kept tokens become codes at once.",
        make=partial(KIVI, flush="residual"),
    ),
    Twin(
        name="kivi_rotated",
        kind=KIND,
        why="Codes are those of rotated tokens.",
        make=partial(KIVI, rotate=True),
    ),
)
