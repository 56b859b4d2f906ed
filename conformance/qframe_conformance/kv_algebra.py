"""What must be the same: other lanes, other pieces, another run, and after crop and select."""

from __future__ import annotations

import numpy as np

from qframe.claims.kv import KVHalfStep, PackedCodes, Streaming
from qframe.held import held_bytes
from qframe.kv_evidence import KVEvidence
from qframe_conformance.checks import (
    SKIPPED,
    Outcome,
    Violation,
    certified,
    check,
    require,
    same_bits,
)
from qframe_conformance.engine import Refused
from qframe_conformance.kv_cases import KVCase, bits
from qframe_conformance.kv_life import lived
from qframe_conformance.kv_subjects import KIND, capable, claim_of, claiming
from qframe_conformance.randomness import seed_everything


@check(KIND, "determinism", unless=capable("deterministic"))
def repeats(case: KVCase) -> Outcome:
    """The same tokens and the same seed give the same codes and the same numbers."""
    first = case.evidence
    seed_everything(case.seed % 2**32)  # which nothing may depend on
    _same_store(first, KVEvidence.of(case.scheme, case.x, case.fill(case.x)), "again")
    return None


@check(KIND, "determinism")
def leaves_global_randomness(case: KVCase) -> Outcome:
    """Randomness comes from the generator that is passed in; the global ones stay as they are."""
    _ = case.store
    before, after = case.shared["randomness"]
    for whose, state in before.items():
        require(after[whose] == state, f"{whose}'s global random state is not what it was")
    return None


def _same_store(expected: KVEvidence, got: KVEvidence, what: str) -> None:
    """Raise Violation unless two stores hold the same, whatever blocks they show it in."""
    for name in ("codes", "scale", "offset"):
        mine, theirs = (
            {
                part.start + t: np.ascontiguousarray(getattr(part, name)[:, :, t])
                for part in each.parts
                for t in range(part.x.shape[2])
            }
            for each in (expected, got)
        )
        if mine.keys() != theirs.keys():
            differ = min(mine.keys() ^ theirs.keys())
            raise Violation(f"{what}, token {differ} is codes only once")
        if mine:
            same_bits(
                np.stack([mine[t] for t in mine]),
                np.stack([theirs[t] for t in mine]),
                f"{name}, {what} [token, batch, head, channel]",
            )
    same_bits(bits(expected.read), bits(got.read), f"what is read, {what}")


@check(KIND, "algebra", "B7.a", unless=capable("row_independent"))
def lanes_do_not_mix(case: KVCase) -> Outcome:
    """What is stored of a head of a sequence does not depend on the other heads and sequences."""
    batch, heads, tokens, _ = case.x.shape
    if tokens == 0:
        return SKIPPED
    b, h = case.seed % batch, case.seed // batch % heads
    other = case.x.roll(1, dims=2) * -2 + 1  # such as a padded sequence has
    other[b, h] = case.x[b, h]
    store = case.fill(other)
    same_bits(bits(case.evidence.read[b, h]), bits(store.read()[b, h]), f"sequence {b}, head {h}")
    for mine, theirs in zip(case.evidence.blocks, store.blocks(), strict=True):
        same_bits(mine.codes[b, h], theirs.codes[b, h], f"codes of sequence {b}, head {h}")
    return None


@check(KIND, "algebra", "B7.g", unless=claiming(Streaming))
def pieces_do_not_matter(case: KVCase) -> Outcome:
    """Prefill, token by token or in any pieces: the same codes, scales and offsets."""
    tokens = case.x.shape[2]
    others = (1,) * tokens if len(case.pieces) == 1 and tokens else (tokens,)
    got = KVEvidence.of(case.scheme, case.x, case.fill(case.x, others))
    _same_store(case.evidence, got, f"in pieces {list(others)[:3]}...")
    return None


# A life ---------------------------------------------------------------------------------------


@check(KIND, "algebra", "B7.g")
def lives_as_its_model(case: KVCase) -> Outcome:
    """Through appends, crops and selections a store has the tokens of a full-precision cache."""
    _, evidence = lived(case)
    claim = claim_of(case.quantizer, KVHalfStep)
    if claim is None:
        return None
    return max(certified(claim.certify(evidence)), certified(claim.certify_values(evidence)))


@check(KIND, "serialization")
def bytes_are_as_promised(case: KVCase) -> Outcome:
    """The memory that is held, what the store says and what the quantizer promised are the same."""
    store, x = case.store, case.x
    _ = case.evidence  # what was read must not be kept
    held, promised = (
        held_bytes(store),
        case.quantizer.nbytes(case.scheme, tuple(x.shape), x.element_size()),
    )
    require(held == store.nbytes, f"the store holds {held} bytes and says {store.nbytes}")
    require(held == promised, f"{held} bytes are held, {promised} were promised")
    try:
        life, _ = lived(case)
    except Violation as violation:
        raise Refused("what is stored is wrong") from violation
    held = held_bytes(life.store)
    require(
        held == life.store.nbytes,
        f"after {case.life} the store holds {held} bytes and says {life.store.nbytes}",
    )
    return None


@check(KIND, "serialization", unless=claiming(PackedCodes))
def codes_are_packed(case: KVCase) -> Outcome:
    """A store takes no more than packed codes, their scales and offsets, and the kept tokens do."""
    quantized = sum(block.stop - block.start for block in case.evidence.blocks)
    most = case.scheme.nbytes(case.shape, case.x.element_size(), quantized)
    held = held_bytes(case.store)
    require(held <= most, f"{held} bytes are held, {most} are enough")
    return None
