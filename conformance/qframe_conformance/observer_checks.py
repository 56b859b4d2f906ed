"""Checks of observers: what a statistic has seen, and that nothing else shows in it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qframe.claims import Counts, LeastError, Mergeable, Reach, Reproducible, SignBlind, has_claim
from qframe.claims.observers import StatisticClaim
from qframe.errors import QframeError
from qframe.merging import restore, taken_down
from qframe_conformance.checks import SKIPPED, Outcome, check, require, same_bits
from qframe_conformance.observer_cases import ObserverCase, certify, show, tensors
from qframe_conformance.observer_draws import scenarios
from qframe_conformance.randomness import changed, random_states, seed_everything
from qframe_conformance.values import copied, finite, leaves, same_value

__all__ = ["scenarios"]

KIND = "observer"
COPIES = (0b1011 << 30) + 1  # beyond 32 bits, and what is left of it there has its upper bit set
KEPT_BYTES = 1 << 16  # by how much a statistic may grow that does not keep all tokens


def _only(*subjects: str, claim: type | None = None) -> Callable[[Any, Any], str | None]:
    """Return an objection for other scenarios, and for observers without a claim."""

    def objection(observer: Any, subject: str) -> str | None:
        if claim is not None and not has_claim(observer, claim):
            return f"{claim.__name__} is not claimed"
        if subject not in subjects:
            return f"it is about activations that are {' or '.join(subjects)}"
        return None

    return objection


def _comparable(observer: Any, subject: str) -> str | None:
    """Object where no claim says when two values are the same."""
    if not has_claim(observer, Mergeable) and not has_claim(observer, StatisticClaim):
        return "neither Mergeable nor what the value is, is claimed"
    return _FINITE(observer, subject)


_FINITE = _only("finite")


def _finds_reach(observer: Any, subject: str) -> str | None:
    """Object to observers whose value need not be a reach."""
    if not getattr(observer, "finds_reach", False):
        return "it does not say that it finds a reach"
    return _only("finite", "nothing", "planted")(observer, subject)


def _counting(observer: Any, subject: str) -> str | None:
    """Object where values may depend on how often the same tokens were seen."""
    if not any(has_claim(observer, claim) for claim in (Counts, Reach, LeastError)):
        return "neither Counts, Reach nor LeastError is claimed"
    return _FINITE(observer, subject)


# Structure ------------------------------------------------------------------------------------


@check(KIND, "structure", unless=_only("finite", "nothing"))
def update_leaves_activations(case: ObserverCase) -> Outcome:
    """`update` does not change the activations, nor what lies beside them in memory."""
    statistic, given = case.observer.start(case.group), tensors(case.batches)
    for x in given:
        statistic.update(x)
    if len(case.tokens):
        statistic.value()
    for x, batch in zip(given, case.batches, strict=True):
        same_bits(batch, x, "the activations after update")
    return None


@check(KIND, "structure", unless=_only("nothing"))
def value_of_nothing(case: ObserverCase) -> Outcome:
    """A statistic that has seen no token has a finite value, or raises a typed error."""
    try:
        value = case.observed(*case.batches).value()
    except QframeError:
        return None
    require(finite(value), "the value of no tokens is not finite")
    return None


@check(KIND, "structure", unless=_finds_reach)
def reach_fits(case: ObserverCase) -> Outcome:
    """The value of an observer that `finds_reach` is a tensor [1] float32, finite and not below 0.

    It is 0 where nothing was seen, unless that raises a typed error.
    """
    try:
        value = case.observed(*case.batches).value()
    except QframeError:
        if len(case.tokens):
            raise
        return None
    kind = type(value).__name__
    require(isinstance(value, torch.Tensor), f"the value is a {kind}, expected a tensor")
    form = value.dtype, tuple(value.shape)
    require(form == (torch.float32, (1,)), f"the value is {form[0]} {list(form[1])}")
    reach = float(value)
    require(0 <= reach < np.inf, f"the value is {reach}")
    require(len(case.tokens) or reach == 0, f"the value of nothing is {reach}")
    return None


@check(KIND, "structure", unless=_FINITE)
def value_repeats(case: ObserverCase) -> Outcome:
    """`value` can be asked for twice, and says the same."""
    statistic = case.observed(*case.batches)
    first = copied(statistic.value())
    same_value(first, statistic.value(), "the second value")
    return None


@check(KIND, "structure", unless=_FINITE)
def value_is_no_alias(case: ObserverCase) -> Outcome:
    """A value is the caller's own: later updates do not change it, nor does it change them."""
    statistic = case.observed(*case.batches)
    value = statistic.value()
    before = copied(value)
    for array in leaves(value).values():
        if array.flags.writeable and array.size:
            array[...] = 77
    same_value(before, statistic.value(), "the value, after an earlier one was written to")
    value = statistic.value()
    before = copied(value)
    show(statistic, np.full((3, case.width), 5, np.float32))
    same_value(before, value, "an earlier value, after another update")
    return None


@check(KIND, "structure", unless=_FINITE)
def merge_leaves_other(case: ObserverCase) -> Outcome:
    """`merge` does not change the other statistic, nor are the two tied together."""
    more = np.full((2, case.width), 3, np.float32)
    for this in (case.observed(more), case.observer.start(case.group)):
        other = case.observed(*case.batches)
        before = copied(other.value())
        this.merge(other)
        same_value(before, other.value(), "the other's value after a merge")
        merged = copied(this.value())
        show(other, more)
        same_value(merged, this.value(), "the value after the other, once merged, has seen more")
        after = copied(other.value())
        show(this, more)
        same_value(after, other.value(), "the other's value after this one has seen more")
    return None


@check(KIND, "structure", unless=_FINITE)
def statistics_are_independent(case: ObserverCase) -> Outcome:
    """Two statistics of one observer know nothing of each other."""
    this, another = case.observer.start(case.group), case.observer.start(case.group)
    for batch in case.batches:
        show(this, batch)
        show(another, np.full((2, case.width), 9, np.float32))
    same_value(case.wanted, this.value(), "the value, with another statistic beside it")
    return None


@check(KIND, "structure", unless=_only("not finite"))
def non_finite_shows(case: ObserverCase) -> Outcome:
    """A NaN or an infinity raises a typed error, or the value is not finite: it never vanishes."""
    half = len(case.batches) // 2
    for merge in (False, True):
        try:
            if merge:
                statistic = case.observed(*case.batches[:half])
                statistic.merge(case.observed(*case.batches[half:]))
            else:
                statistic = case.observed(*case.batches)
            value = statistic.value()
        except QframeError:
            continue
        how = " in what was merged" if merge else ""
        require(not finite(value), f"a number that is not finite{how} leaves no trace")
    return None


# Determinism ----------------------------------------------------------------------------------


@check(KIND, "determinism", unless=_FINITE)
def observing_repeats(case: ObserverCase) -> Outcome:
    """The same batches give the same bits, whatever the global random states."""
    wanted = case.wanted
    for seed in (1, 2):
        seed_everything(seed)
        again = case.observed(*case.batches).value()
        same_value(wanted, again, "the value of the same batches")
    return None


@check(KIND, "determinism", "B12.b", unless=_comparable)
def layout_of_activations(case: ObserverCase) -> Outcome:
    """Activations that are a strided view in Fortran order are worth the same."""
    statistic = case.observer.start(case.group)
    for batch in case.batches:
        stored = torch.full((2 * case.width, len(batch) + 1), torch.nan)
        view = stored[::2, : len(batch)].t()
        view.copy_(torch.from_numpy(batch))
        statistic.update(view)
    return case.agrees(statistic.value(), case.batches, "the value of strided activations")


@check(KIND, "determinism", unless=_FINITE)
def observing_leaves_global_rng(case: ObserverCase) -> Outcome:
    """Observing neither uses nor seeds the global random states of Python, NumPy and torch."""
    seed_everything(3)
    before = random_states()
    statistic = case.observed(*case.batches)
    statistic.merge(case.observed(*case.batches))
    statistic.value()
    touched = changed(before)
    require(not touched, f"the global random state of {', '.join(touched)} is not what it was")
    return None


@check(KIND, "determinism", "B12.c", unless=_only("finite", claim=Reproducible))
def threads_do_not_show(case: ObserverCase) -> Outcome:
    """The bits do not depend on how many threads torch uses."""
    wanted, threads = case.wanted, torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        found = case.observed(*case.batches).value()
    finally:
        torch.set_num_threads(threads)
    same_value(wanted, found, "the value with another number of threads")
    return None


# Serialization --------------------------------------------------------------------------------


@check(KIND, "serialization", unless=_FINITE)
def statistic_travels(case: ObserverCase) -> Outcome:
    """A statistic can be sent to another rank, and goes on there as if nothing had happened."""
    half = len(case.batches) // 2
    here = case.observed(*case.batches[:half])
    tensors: dict[str, torch.Tensor] = {}
    record = taken_down(here, case.observed(), tensors, "half", case.observer.name)
    sent = {name: tensor.clone() for name, tensor in tensors.items()}
    show(here, *case.batches[half:])
    same_value(case.wanted, here.value(), "the value after it was sent")
    there = case.observed()
    restore(there, json.loads(json.dumps(record)), sent)
    show(there, *case.batches[half:])
    same_value(case.wanted, there.value(), "the value of what was sent half-way")
    return None


# Algebra --------------------------------------------------------------------------------------


@check(KIND, "algebra", "B12.b", unless=_comparable)
def update_after_value(case: ObserverCase) -> Outcome:
    """To ask for the value ends nothing: tokens that come later count."""
    statistic = case.observer.start(case.group)
    for batch in case.batches:
        if len(batch):
            show(statistic, batch)
            statistic.value()
    return case.agrees(statistic.value(), case.batches, "the value, when asked for in between")


@check(KIND, "algebra", "B12.b", unless=_comparable)
def merge_with_empty(case: ObserverCase) -> Outcome:
    """To merge with a statistic that has seen nothing changes nothing, either way round."""
    statistic, empty = case.observed(*case.batches), case.observer.start(case.group)
    statistic.merge(empty)
    case.agrees(statistic.value(), case.batches, "after a merge with an empty one", merges=1)
    empty.merge(case.observed(*case.batches))
    return case.agrees(empty.value(), case.batches, "an empty one after a merge", merges=1)


@check(KIND, "algebra", "B12.b", unless=_comparable)
def merge_sees_both(case: ObserverCase) -> Outcome:
    """Parts that are merged are worth as much as all tokens in one place."""
    tokens, columns = case.tokens, case.width
    third = -(-len(tokens) // 3)
    parts = [tokens[:third], tokens[third : third + 1], tokens[third + 1 :]]
    left, middle, right = (case.observed(part) for part in parts)
    left.merge(middle)
    left.merge(right)
    case.agrees(left.value(), parts, "(a + b) + c", merges=2)
    left, middle, right = (case.observed(part) for part in parts)
    right.merge(middle)
    left.merge(right)
    show(left, np.zeros((0, columns), np.float32))
    return case.agrees(left.value(), [*parts, tokens[:0]], "a + (c + b)", merges=2)


@check(KIND, "algebra", "B12.b", unless=_only("finite", claim=Mergeable))
def order_of_tokens(case: ObserverCase) -> Outcome:
    """Neither the order of tokens counts, nor how they are cut into batches."""
    tokens = case.tokens
    shuffled = tokens[np.random.default_rng(len(tokens)).permutation(len(tokens))]
    case.agrees(case.observed(shuffled).value(), [shuffled], "all tokens at once, in any order")
    backward = [batch[::-1] for batch in reversed(case.batches)]
    case.agrees(case.observed(*backward).value(), backward, "batches and tokens backwards")
    single = [shuffled[i : i + 1] for i in range(min(len(tokens), 9))]
    single.append(shuffled[9:])
    return case.agrees(case.observed(*single).value(), single, "tokens one at a time")


@check(KIND, "algebra", "B12.e", unless=_counting)
def many_tokens(case: ObserverCase) -> Outcome:
    """What was seen 11 * 2^30 + 1 times counts as often: no counter overflows or stands still.

    The statistic is merged with itself again and again. One that keeps all tokens cannot be asked.
    """
    statistic, more = case.observed(*case.batches), f"{COPIES:b}"[1:]
    most = len(pickle.dumps(statistic)) + KEPT_BYTES
    for bit in more:
        stored = pickle.dumps(statistic)
        if len(stored) > most:
            return SKIPPED
        statistic.merge(pickle.loads(stored))
        if bit == "1":
            show(statistic, *case.batches)
    value, what = statistic.value(), f"the value of all tokens {COPIES} times"
    return certify(case, value, case.batches, what, merges=len(more), copies=COPIES)


@check(KIND, "algebra", "B12.c", unless=_only("finite", claim=SignBlind))
def token_signs(case: ObserverCase) -> Outcome:
    """A token and its negative count the same, bit for bit."""
    flipped = []
    for batch in case.batches:
        signs = np.where(np.arange(len(batch)) % 3 == 1, 1, -1).astype(np.float32)
        flipped.append(batch * signs[:, None])
    same_value(case.wanted, case.observed(*flipped).value(), "the value of tokens with other signs")
    return None


# Bounds ---------------------------------------------------------------------------------------


@check(KIND, "bound", "B12.a", unless=_only("finite", "nothing", "planted", claim=StatisticClaim))
def statistic_value(case: ObserverCase) -> Outcome:
    """The value is what the observer claims that it is, of all tokens and of nothing."""
    if not sum(map(len, case.batches)) and not _answers_nothing(case):
        return SKIPPED
    return certify(case, case.value, case.batches, "the value")


def _answers_nothing(case: ObserverCase) -> bool:
    try:
        case.observed(*case.batches).value()
    except QframeError:
        return False
    return True
