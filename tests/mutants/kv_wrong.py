"""KV-cache quantizers with one mistake each; `kv_caches` says which check must find it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from qframe.claims.kv import ExactWindow
from qframe.errors import NonFiniteError
from tests.mutants.kv_reference import Quantizer, Run, Store

# The window -----------------------------------------------------------------------------------


class WindowIgnored(Store):
    def kept(self):
        return 0


class WindowOffByOne(Store):
    def kept(self):
        return max(self.scheme.residual_length - 1, 0)


class WaitsForOneMore(Store):
    def kept(self):
        return self.scheme.residual_length + 1


class WindowKeepsOldest(Store):
    def append(self, x):
        super().append(x)
        if self.runs and self.recent.shape[2]:
            oldest = self.recent.flip(2)
            self.recent = oldest.contiguous()


class SinksQuantized(Store):
    def sink_tokens(self):
        return 0


class FlushThroughBfloat16(Store):
    def quantized(self, part, start):
        return super().quantized(part.bfloat16().to(part.dtype), start)


class ResidualDropped(Store):
    def read(self):
        read = super().read()
        if self.runs:
            read[:, :, self.coded :] = 0
        return read


class SinglesUseTheLastScale(Store):
    """A decode path of its own, which saves the search for the range."""

    def quantized(self, part, start):
        run = super().quantized(part, start)
        if self.runs and part.shape[2] == self.step and self.runs[-1].tokens >= self.step:
            last = self.runs[-1]
            run.scale = last.scale[:, :, -1:].clone()
            if run.offset is not None:
                run.offset = last.offset[:, :, -1:].clone()
            x = part.float().numpy()
            scale, offset = (self.spread(e, x.shape) for e in self.scale_and_offset(run))
            run.words = self.pack(self.encode(x, scale, offset))
        return run


class QuantizedAgainOnFlush(Store):
    """Decodes what is codes and encodes it with what is new (transformers' QuantizedLayer)."""

    def add(self, part):
        if self.runs and self.continues(self.runs[-1]):
            last = self.runs.pop()
            part = torch.cat((self.decode(last), part), dim=2)
        super().add(part)


# Encoding -------------------------------------------------------------------------------------


class Truncates(Store):
    def round(self, steps):
        return np.trunc(steps)


class Floors(Store):
    def round(self, steps):
        return np.floor(steps)


class OneLevelMore(Store):
    def levels(self):
        return super().levels() + 1


class OneLevelLess(Store):
    def levels(self):
        return super().levels() - 1


class PerTokenNotChannel(Store):
    def __init__(self, scheme):
        axis = {"axis": "token", "group_size": None} if scheme.axis == "channel" else {}
        super().__init__(scheme.model_copy(update=axis))


class OneScaleForAllChannels(Store):
    def ranges(self, x):
        lo, hi = super().ranges(x)
        if self.scheme.axis == "channel":
            lo[:], hi[:] = lo.min(3, keepdims=True), hi.max(3, keepdims=True)
        return lo, hi


class RangeOverTheBatch(Store):
    """Padded sequences count into everybody's range."""

    def ranges(self, x):
        lo, hi = super().ranges(x)
        lo[:], hi[:] = lo.min(0, keepdims=True), hi.max(0, keepdims=True)
        return lo, hi


class RangeOverHeads(Store):
    def ranges(self, x):
        lo, hi = super().ranges(x)
        lo[:], hi[:] = lo.min(1, keepdims=True), hi.max(1, keepdims=True)
        return lo, hi


class PaddedHeadDim(Store):
    """A kernel pads head_dim to a power of two, and the zeros count (lmdeploy#4849)."""

    def ranges(self, x):
        lo, hi = super().ranges(x)
        if x.shape[3] & (x.shape[3] - 1) and self.scheme.axis == "token":
            lo[..., -1], hi[..., -1] = np.minimum(lo[..., -1], 0), np.maximum(hi[..., -1], 0)
        return lo, hi


class OffsetToNearest(Store):
    def lowest(self, lo):
        stored = torch.from_numpy(lo).to(getattr(torch, self.scheme.scale_dtype))
        return stored.float().numpy()


class ScaleToNearest(Store):
    def stored_scale(self, scale, dtype):
        return torch.from_numpy(scale).to(getattr(torch, dtype)).float().numpy()


class ScaleTooLarge(Store):
    def stored_scale(self, scale, dtype):
        return super().stored_scale(scale * np.float32(2), dtype)


class SmallScalesAreOne(Store):
    def stored_scale(self, scale, dtype):
        return super().stored_scale(np.where(scale < np.float32(1e-6), np.float32(1), scale), dtype)


class ConstantsAreNotNumbers(Store):
    """No range, scale 0, and 0 / 0 is a code."""

    def fit(self, lo, hi):
        scale, offset = super().fit(lo, hi)
        return np.where(hi == lo, np.float32(0), scale), offset


class RestrictedGrid(Store):
    def encode(self, x, scale, offset):
        return np.maximum(super().encode(x, scale, offset), self.grid.qmin + 1).astype(np.int16)


# Decoding -------------------------------------------------------------------------------------


class OffsetForgotten(Store):
    def value(self, codes, scale, offset):
        return np.float32(codes) * scale


class OffsetBeforeScale(Store):
    def value(self, codes, scale, offset):
        return (np.float32(codes) + offset) * scale


class ScaleIndexShifted(Store):
    def decode(self, run):
        axis = 3 if self.scheme.axis == "channel" else 2
        rolled = Run(run.start, run.tokens, run.words, run.scale.roll(1, axis), run.offset)
        return super().decode(rolled)


class ValuesInFloat16(Store):
    def value(self, codes, scale, offset):
        value = super().value(codes, scale, offset)
        return np.clip(value, -65504, 65504).astype(np.float16).astype(np.float32)


class HeadsSwapped(Store):
    def decode(self, run):
        return super().decode(run).flip(1)


class ReadsFloat32(Store):
    def read(self):
        return super().read().float()


# What caches do -------------------------------------------------------------------------------


class CropKeepsCodes(Store):
    def cropped(self, run, tokens):
        return run


class CropOffByOne(Store):
    def crop(self, length):
        super().crop(length)
        if self.recent is not None and self.recent.shape[2] > 1 and self.runs:
            self.recent = torch.cat((self.recent[:, :, 1:], self.recent[:, :, -1:]), dim=2)


class GrowsCroppedGroup(Store):
    """After a crop, appended tokens go on in the middle of a group that is only partly there."""

    def continues(self, last):
        return True


class OverwritesAfterCrop(Store):
    """Appends to the place of the last append, which a crop has moved."""

    def crop(self, length):
        super().crop(length)
        self.moved = True

    def add(self, part):
        if getattr(self, "moved", False) and self.runs:
            part = part.roll(1, dims=2)
        super().add(part)


class ReorderForgetsScales(Store):
    def selected(self, run, indices):
        moved = super().selected(run, indices)
        if len(indices) == run.scale.shape[0]:
            moved.scale = run.scale
        return moved


class ReorderForgetsOffsets(Store):
    def selected(self, run, indices):
        moved = super().selected(run, indices)
        if run.offset is not None and len(indices) == run.offset.shape[0]:
            moved.offset = run.offset
        return moved


class ReorderForgetsCodes(Store):
    def selected(self, run, indices):
        return run if len(indices) == run.words.shape[0] else super().selected(run, indices)


class ReorderForgetsWindow(Store):
    def select(self, indices):
        recent = self.recent
        super().select(indices)
        if recent.shape[0] == self.recent.shape[0]:
            self.recent = recent


class SelectDropsRepeats(Store):
    def select(self, indices):
        super().select(torch.unique(indices))


# Memory ---------------------------------------------------------------------------------------


class OffsetsAreFree(Store):
    @property
    def nbytes(self):
        offsets = (run.offset for run in self.runs if run.offset is not None)
        return super().nbytes - sum(offset.nbytes for offset in offsets)


class CropKeepsBuffers(Store):
    def cropped(self, run, tokens):
        if tokens >= run.tokens:
            return run
        return run.mapped(lambda t: t[:, :, : math.ceil(tokens / self.step)], tokens)


class KeepsWhatWasRead(Store):
    def read(self):
        self.last = super().read()
        return self.last.clone()


class CodesAreNotPacked(Store):
    def pack(self, codes):
        if self.scheme.axis == "channel":
            batch, heads, _, head_dim = codes.shape
            codes = codes.reshape(batch, heads, -1, self.step, head_dim).swapaxes(3, 4)
        else:
            codes = codes[:, :, :, None]
        return torch.from_numpy(np.ascontiguousarray(codes).astype(np.int32))

    def codes(self, run):
        codes = run.words.numpy().astype(np.int16)
        if self.scheme.axis == "channel":
            codes = codes.swapaxes(3, 4)
        return codes.reshape(*codes.shape[:2], -1, self.head_dim)[:, :, : run.tokens].copy()


class Unpacked(Quantizer):
    def nbytes(self, scheme, shape, itemsize):
        packed = super().nbytes(scheme, shape, itemsize)
        coded = ExactWindow().stop(scheme, shape[2]) - min(scheme.sink_tokens, shape[2])
        row = shape[3] if scheme.axis == "token" else scheme.step
        rows = shape[0] * shape[1] * coded * shape[3] // row
        return packed + rows * 4 * (row - math.ceil(row * scheme.num_bits / 32))


class PromisesLess(Quantizer):
    def nbytes(self, scheme, shape, itemsize):
        return super().nbytes(scheme, shape, 2)


class KeepsWhatItWasGiven(Store):
    def append(self, x):
        super().append(x)
        if x.shape[2] and self.recent.shape == x.shape:
            self.recent = x


class ShowsItsInside(Store):
    def blocks(self):
        blocks = super().blocks()
        return [replace(b, scale=r.scale.float()) for b, r in zip(blocks, self.runs, strict=True)]


class ChangesWhatItIsGiven(Store):
    def append(self, x):
        super().append(x)
        if x.numel():
            x -= x.mean()


class TakesNaN(Store):
    def refuse(self, x):
        super().refuse(torch.nan_to_num(x) if x.is_floating_point() else x)


class RefusesTooLate(Store):
    def refuse(self, x):
        try:
            super().refuse(x)
        except NonFiniteError:
            if self.sinks is not None:
                self.recent = torch.cat((self.recent, x.nan_to_num(0, 0, 0)), dim=2)
            raise


class CropBeyondIsTaken(Store):
    def crop(self, length):
        super().crop(min(max(length, 0), self.length))


class Dithers(Store):
    """Rounds up or down by chance, with the global generator."""

    def round(self, steps):
        return np.floor(steps + np.random.random(steps.shape))


# Attention ------------------------------------------------------------------------------------


class NoRootOfHeadDim(Quantizer):
    def scaled(self, products, head_dim):
        return products


class NextHead(Quantizer):
    def heads(self, query_heads, heads):
        return torch.arange(query_heads) % heads


class AttendsWithoutWindow(Quantizer):
    def seen(self, store):
        read = store.read().float()
        return read[:, :, : store.coded] if store.coded > store.sinks.shape[2] else read


class OldTokensAreZero(Quantizer):
    def seen(self, store):
        read = store.read().float()
        read[:, :, store.sinks.shape[2] : store.coded // 4] = 0
        return read


class ExpOverflows(Quantizer):
    def softmax(self, logits):
        powers = torch.exp(logits)
        return powers / powers.sum(-1, keepdim=True)


class Half(Quantizer):
    def softmax(self, logits):
        return super().softmax(logits).half().float()
