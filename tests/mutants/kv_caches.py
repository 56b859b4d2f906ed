"""The wrong KV-cache quantizers and their killers, and the right ones that do it otherwise."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch

from qframe import KVScheme
from qframe.claims.kv import ExactWindow, FusedAttention, KVHalfStep, KVScale
from tests.mutants import kv_otherwise as otherwise
from tests.mutants import kv_wrong as wrong
from tests.mutants.kv_reference import CLAIMS, Quantizer, Store
from tests.mutants.mutant import Mutant, Twin

KIND = "kv cache"


def claims(**changed):
    """Return the reference's claims, with some exchanged or (None) left out, by class name."""
    kept = {type(claim).__name__: claim for claim in CLAIMS} | changed
    return tuple(claim for claim in kept.values() if claim is not None)


def snake(cls):
    """Return the name of a class as the other mutants have theirs."""
    return re.sub(r"(?<=.)([A-Z][a-z])", r"_\1", cls.__name__).lower()


def mutant(store, killed_by, bug, quantizer=Quantizer):
    return Mutant(
        name=snake(store if quantizer is Quantizer else quantizer),
        kind=KIND,
        bug=bug,
        make=partial(quantizer, store=store),
        correct=Quantizer,
        killed_by=killed_by,
    )


MUTANTS = (
    mutant(wrong.WindowIgnored, "window_is_exact", "Everything is quantized at once."),
    mutant(wrong.WindowOffByOne, "window_is_exact", "One token less than promised is kept."),
    mutant(
        wrong.WaitsForOneMore, "window_is_exact", "A group waits for one more token than it must."
    ),
    mutant(wrong.WindowKeepsOldest, "keeps_other_tokens", "The window is in the wrong order."),
    mutant(
        wrong.SinksQuantized, "window_is_exact", "The first tokens are quantized like all others."
    ),
    mutant(
        wrong.FlushThroughBfloat16, "codes_are_the_nearest", "Tokens are rounded before they are."
    ),
    mutant(wrong.ResidualDropped, "keeps_other_tokens", "What is not yet codes is not read."),
    mutant(
        wrong.SinglesUseTheLastScale, "pieces_do_not_matter", "One token takes the scale before it."
    ),
    mutant(
        wrong.QuantizedAgainOnFlush, "pieces_do_not_matter", "Codes are decoded and encoded again."
    ),
    mutant(wrong.Truncates, "codes_are_the_nearest", "Rounds towards zero."),
    mutant(wrong.Floors, "codes_are_the_nearest", "Rounds down."),
    mutant(wrong.OneLevelMore, "scales_span_their_groups", "2^b steps instead of 2^b - 1."),
    mutant(wrong.OneLevelLess, "scales_span_their_groups", "2^b - 2 steps instead of 2^b - 1."),
    mutant(wrong.PerTokenNotChannel, "shows_its_codes", "Keys are quantized per token."),
    mutant(wrong.OneScaleForAllChannels, "scales_span_their_groups", "Channels share a scale."),
    mutant(wrong.RangeOverTheBatch, "lanes_do_not_mix", "Other sequences count into the range."),
    mutant(wrong.RangeOverHeads, "lanes_do_not_mix", "Other heads count into the range."),
    mutant(wrong.PaddedHeadDim, "scales_span_their_groups", "Zeros of the padding count."),
    mutant(
        wrong.OffsetToNearest, "scales_span_their_groups", "An offset above the smallest number."
    ),
    mutant(wrong.ScaleToNearest, "scales_span_their_groups", "Storage makes a scale smaller."),
    mutant(wrong.ScaleTooLarge, "scales_span_their_groups", "Half of the codes are never used."),
    mutant(wrong.SmallScalesAreOne, "scales_span_their_groups", "An epsilon decides what is zero."),
    mutant(wrong.ConstantsAreNotNumbers, "shows_its_codes", "A group without a range has scale 0."),
    mutant(wrong.RestrictedGrid, "codes_are_the_nearest", "The lowest code is never used."),
    mutant(wrong.OffsetForgotten, "values_are_those_of_codes", "The smallest number is not added."),
    mutant(
        wrong.OffsetBeforeScale, "values_are_those_of_codes", "Zero point and minimum mixed up."
    ),
    mutant(wrong.ScaleIndexShifted, "values_are_those_of_codes", "Scales of the neighbour."),
    mutant(
        wrong.ValuesInFloat16, "values_are_those_of_codes", "float32 tokens go through float16."
    ),
    mutant(wrong.HeadsSwapped, "values_are_those_of_codes", "The heads of codes in another order."),
    mutant(wrong.ReadsFloat32, "reads_all_tokens", "Reads another dtype than it was given."),
    mutant(wrong.CropKeepsCodes, "lives_as_its_model", "A crop forgets the window only."),
    mutant(wrong.CropOffByOne, "lives_as_its_model", "A crop moves the window by a token."),
    mutant(wrong.GrowsCroppedGroup, "lives_as_its_model", "A cropped group goes on as if whole."),
    mutant(wrong.OverwritesAfterCrop, "lives_as_its_model", "An append after a crop is misplaced."),
    mutant(
        wrong.ReorderForgetsScales, "lives_as_its_model", "Beam search moves codes, not scales."
    ),
    mutant(wrong.ReorderForgetsOffsets, "lives_as_its_model", "Beam search moves all but offsets."),
    mutant(wrong.ReorderForgetsCodes, "lives_as_its_model", "Beam search moves the window only."),
    mutant(wrong.ReorderForgetsWindow, "lives_as_its_model", "Beam search moves codes only."),
    mutant(wrong.SelectDropsRepeats, "lives_as_its_model", "A sequence cannot be repeated."),
    mutant(wrong.OffsetsAreFree, "bytes_are_as_promised", "Offsets do not count as memory."),
    mutant(wrong.CropKeepsBuffers, "bytes_are_as_promised", "A crop is a view of all there was."),
    mutant(
        wrong.KeepsWhatWasRead, "bytes_are_as_promised", "Decoded tokens are kept beside the codes."
    ),
    mutant(
        Store, "bytes_are_as_promised", "Kept tokens count 2 bytes a number.", wrong.PromisesLess
    ),
    mutant(wrong.CodesAreNotPacked, "codes_are_packed", "A code takes 32 bits.", wrong.Unpacked),
    mutant(wrong.KeepsWhatItWasGiven, "stands_alone", "The window is the caller's tensor."),
    mutant(wrong.ShowsItsInside, "stands_alone", "What is shown are the scales themselves."),
    mutant(wrong.ChangesWhatItIsGiven, "stands_alone", "The caller's tensor is changed."),
    mutant(wrong.TakesNaN, "refuses_what_is_not_finite", "A NaN is taken for a number."),
    mutant(
        wrong.RefusesTooLate, "refuses_what_is_not_finite", "What is refused is there all the same."
    ),
    mutant(wrong.CropBeyondIsTaken, "refuses_misuse", "A crop beyond the end is taken in silence."),
    mutant(wrong.Dithers, "repeats", "Randomness that no seed governs."),
    mutant(Store, "attends_to_what_is_read", "Logits are not divided.", wrong.NoRootOfHeadDim),
    mutant(Store, "attends_to_what_is_read", "A query head reads another head.", wrong.NextHead),
    mutant(
        Store,
        "attends_to_what_is_read",
        "Attention forgets the window.",
        wrong.AttendsWithoutWindow,
    ),
    mutant(
        Store,
        "attends_to_what_is_read",
        "Attention takes old tokens for 0.",
        wrong.OldTokensAreZero,
    ),
    mutant(Store, "attends_to_what_is_read", "The exp of large logits is inf.", wrong.ExpOverflows),
    mutant(Store, "attends_to_what_is_read", "Weights are rounded to float16.", wrong.Half),
)


def twin(store, why, quantizer=Quantizer, **options):
    made = partial(quantizer, **({"store": store} if store else {}), **options)
    name = options.get("name") or snake(quantizer if store in (None, Store) else store)
    return Twin(name=name, kind=KIND, why=why, make=made)


TWINS = (
    twin(Store, "The reference itself."),
    twin(
        otherwise.Kivi,
        "Quantizes the whole window once it is full, as KIVI does with keys.",
        claims=claims(ExactWindow=ExactWindow(flush="residual")),
    ),
    twin(Store, "Values only: per token.", axes=("token",), name="per_token"),
    twin(Store, "Keys only: per channel.", axes=("channel",), name="per_channel"),
    twin(Store, "Symmetric only.", symmetric=frozenset({True}), name="symmetric"),
    twin(otherwise.Doubles, "Computes in float64."),
    twin(
        otherwise.Reciprocal,
        "Multiplies by 1 / scale: one rounding more, and it says so.",
        claims=claims(KVHalfStep=KVHalfStep(roundings=2)),
    ),
    twin(
        otherwise.WholeZeroPoint,
        "Offsets are whole steps, as with an integer zero point.",
        otherwise.WholeZeroPoints,
        claims=claims(KVScale=KVScale(holds_zero=True), PackedCodes=None),
        symmetric=frozenset({False}),
    ),
    twin(otherwise.HalfUp, "Ties go up instead of to even."),
    twin(otherwise.EveryFlushItsOwn, "Every flush is a block of its own."),
    twin(otherwise.DecodesInDoubles, "Rounds once when it decodes."),
    twin(otherwise.Aligned, "After a crop, groups wait for their old places.", claims=claims()),
    twin(
        Store,
        "Attention token by token, with weights that are scaled down.",
        otherwise.Online,
        claims=claims(FusedAttention=FusedAttention(online=True)),
    ),
    twin(None, "Quantizes nothing, and claims nothing.", otherwise.Uncompressed),
    twin(None, "Quantizes something else than it reads.", otherwise.Rotated),
)


def outputs(plugin):
    """Return what is read of ordinary keys and values, and attention on them."""
    rng, found = np.random.default_rng(7), []
    for axis in sorted(plugin.capabilities.strategies & {"token", "channel"}):
        scheme = KVScheme(num_bits=4, axis=axis, group_size=16, residual_length=16, sink_tokens=2)
        x = [torch.from_numpy(rng.normal(size=(2, 2, 70, 32)).astype(np.float32)) for _ in "kv"]
        query = torch.from_numpy(rng.normal(size=(2, 4, 32)).astype(np.float32))
        stores = []
        for kind, numbers in zip(("key", "value"), x, strict=True):
            store = plugin.start(kind, scheme, np.random.default_rng(0))
            store.append(numbers.clone())
            found.append(store.read().numpy())
            stores.append(store)
        if hasattr(plugin, "attend"):
            found.append(plugin.attend(query, *stores).numpy())
    return found
