"""A tensor that comes in parts has the fingerprint that it has as a whole, however they come."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from qframe import fingerprints
from qframe.fingerprints import InParts, fingerprint


@st.composite
def parts(draw):
    """A tensor, and parts of it as (first row, rows) in some order, some of them more than once."""
    rows = draw(st.integers(1, 12))
    tensor = torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else set())
    each = [(a, tensor[a:b]) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    again = draw(st.lists(st.sampled_from(each), max_size=3))
    return tensor, draw(st.permutations([*each, *again]))


def known_with_the_last(module, drawn):
    """It is known once all have come, and not before; nothing is held then."""
    tensor, each = drawn
    whole, found, missing = module.InParts(len(tensor)), [], {first for first, _ in each}
    for first, part in each:
        found.append(whole.add(first, part))
        missing.discard(first)
        if found[-1] != (None if missing else fingerprint(tensor)):
            return False
    return not whole._early


def goes_on_to_what_came_meanwhile(module, drawn):
    """While one thread is at the hash, others bring parts and do not wait."""
    tensor, each = drawn
    whole, rest, found = module.InParts(len(tensor)), list(each), []
    plain = whole._hash

    def update(data):
        if rest:
            found.append(whole.add(*rest.pop()))
        plain.update(data)

    whole._hash = SimpleNamespace(update=update, hexdigest=plain.hexdigest)
    while rest:
        found.append(whole.add(*rest.pop()))
    return set(found) - {None} == {fingerprint(tensor)}


HOLDS = (known_with_the_last, goes_on_to_what_came_meanwhile)


@pytest.mark.parametrize("holds", HOLDS, ids=lambda each: each.__name__)
@given(parts())
def test_parts_in_any_order(holds, drawn):
    assert holds(fingerprints, drawn)


def test_parts_of_several_threads():
    tensor = torch.randint(-100, 100, (4000, 64), dtype=torch.int16)
    for size in (1, 7, 400):
        each = [(top, tensor[top : top + size]) for top in range(0, len(tensor), size)]
        whole = InParts(len(tensor))
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda part, whole=whole: whole.add(*part), each))
        assert found - {None} == {fingerprint(tensor)}


MISTAKES = [
    ("if first >= self._next:", "if True:", known_with_the_last),
    ("self._early.pop(self._next, None)", "self._early.pop(first, None)", known_with_the_last),
    ("if self._next == self._rows else None", "", known_with_the_last),
    ("self._next = after[0]", "self._next += 1", known_with_the_last),
    ("self._hash.update(bytes_of(after[1]))", "self._hash.update(bytes_of(part))", HOLDS[0]),
    ("if self._taken:", "if False:", goes_on_to_what_came_meanwhile),
    ("self._taken = False\n                    return", "return", known_with_the_last),
]


@pytest.mark.parametrize(("old", "new", "holds"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_found_out(old, new, holds):
    find(
        parts(),
        lambda drawn: not holds(mistaken(old, new), drawn),
        settings=settings(max_examples=300, phases=[Phase.generate], deadline=None, database=None),
        random=Random(0),
    )


def test_without_a_mistake_nothing_is_found_out():
    for holds in HOLDS:
        with pytest.raises(NoSuchExample):
            test_a_mistake_is_found_out("blake3()", "blake3()", holds)


def mistaken(old, new):
    source = inspect.getsource(fingerprints)
    assert old in source
    module = SimpleNamespace(__name__=__name__)
    exec(compile(source.replace(old, new), "mistaken", "exec"), module.__dict__)
    return module
