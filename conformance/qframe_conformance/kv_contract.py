"""What every KV cache owes: it takes what it declares, shows its codes, and refuses the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from qframe import Capabilities
from qframe.claims import claims_of
from qframe.errors import NonFiniteError, QframeError
from qframe.kv_evidence import KVEvidence
from qframe_conformance.checks import SKIPPED, Outcome, Violation, check, require, same_bits
from qframe_conformance.engine import Refused
from qframe_conformance.kv_cases import KVCase, bits, well_formed, well_read
from qframe_conformance.kv_subjects import KIND


@check(KIND, "structure")
def declarations(case: KVCase) -> Outcome:
    """Name, capabilities and claims say something that others can use."""
    quantizer = case.quantizer
    require(
        isinstance(quantizer.name, str) and re.fullmatch(r"[^\s+]+", quantizer.name),
        f"name {quantizer.name!r} cannot be typed: give a word without '+'",
    )
    capabilities = quantizer.capabilities
    require(
        isinstance(capabilities, Capabilities),
        f"capabilities is a {type(capabilities).__name__}, expected Capabilities",
    )
    strange = capabilities.strategies - {"token", "channel"}
    require(not strange, f"capabilities.strategies holds {strange}, which are no axes")
    for claim in claims_of(quantizer):
        texts = (getattr(claim, "name", None), getattr(claim, "theorem", None))
        require(
            all(isinstance(text, str) and text for text in texts),
            f"claim {claim!r} has no name or no theorem",
        )
    return None


@check(KIND, "structure")
def accepts(case: KVCase) -> Outcome:
    """Every scheme that is declared works, for every head_dim, number of tokens and dtype."""
    try:
        _ = case.store
    except Refused as refused:
        raise Violation(f"refused: {refused}") from refused
    return None


@check(KIND, "structure")
def reads_all_tokens(case: KVCase) -> Outcome:
    """All tokens that were appended are read, in the dtype in which they came."""
    store = case.store
    require(store.length == case.x.shape[2], f"length {store.length}, not {case.x.shape[2]}")
    well_read(KVEvidence(scheme=case.scheme, x=case.x, blocks=(), read=store.read()))
    return None


@check(KIND, "structure")
def shows_its_codes(case: KVCase) -> Outcome:
    """Codes, scales and offsets have the form that `KVBlock` promises."""
    well_formed(KVEvidence.of(case.scheme, case.x, case.store))
    return None


@check(KIND, "structure", "B7.a")
def keeps_other_tokens(case: KVCase) -> Outcome:
    """A token that is in no block comes back with the bits with which it came."""
    exact = torch.ones(case.x.shape[2], dtype=torch.bool)
    for block in case.evidence.blocks:
        exact[block.start : block.stop] = False
    same_bits(bits(case.x[:, :, exact]), bits(case.evidence.read[:, :, exact]), "kept tokens")
    return None


@check(KIND, "structure")
def stands_alone(case: KVCase) -> Outcome:
    """A store changes nothing it is given, and what is done outside does not change the store."""
    expected, store, at = case.evidence, case.start(), 0
    for tokens in case.pieces:
        piece = case.x[:, :, at : at + tokens].clone()
        store.append(piece)
        same_bits(bits(case.x[:, :, at : at + tokens]), bits(piece), "what was appended")
        piece.fill_(3)
        at += tokens
    for change in (0, 1):
        read, blocks = store.read(), store.blocks()
        same_bits(bits(expected.read), bits(read), "what is read after changes outside")
        require(len(blocks) == len(expected.blocks), "blocks after changes outside")
        if not change:
            read.fill_(5)
            for block in blocks:
                for part in (block.codes, block.scale, block.offset):
                    part.fill_(1)
    return None


@check(KIND, "structure")
def refuses_what_is_not_finite(case: KVCase) -> Outcome:
    """A NaN or an infinity raises NonFiniteError, and changes nothing."""
    if case.x.numel() == 0:
        return SKIPPED
    store, place = case.whole(), case.seed % case.x.numel()
    before = store.read().clone()
    for value in (np.nan, np.inf, -np.inf):
        bad = case.x.clone()
        bad.view(-1)[place] = value
        _refuses(partial(store.append, bad), NonFiniteError, f"append with {value}")
    _unchanged(case, before, store)
    return None


@check(KIND, "structure")
def refuses_misuse(case: KVCase) -> Outcome:
    """Other shapes or dtypes, and places that do not exist, raise ValueError and change nothing."""
    store, x = case.whole(), case.x
    wide = torch.cat((x, x[..., :1]), dim=3)
    other = torch.float32 if x.dtype == torch.float16 else torch.float16
    misuse: dict[str, Callable[[], Any]] = {
        "append of one more channel": lambda: store.append(wide),
        "append of one more head": lambda: store.append(torch.cat((x, x[:, :1]), dim=1)),
        "append of one more sequence": lambda: store.append(torch.cat((x, x[:1]))),
        f"append of {other}": lambda: store.append(torch.zeros_like(x, dtype=other)),
        "append of three axes": lambda: store.append(x[0]),
        "crop(-1)": lambda: store.crop(-1),
        "crop beyond the end": lambda: store.crop(x.shape[2] + 1),
        "select beyond the batch": lambda: store.select(torch.tensor([x.shape[0]])),
        "select(-1)": lambda: store.select(torch.tensor([-1])),
    }
    before = store.read().clone()
    for name, call in misuse.items():
        _refuses(call, ValueError, name)
    _unchanged(case, before, store)
    return None


def _refuses(call: Callable[[], Any], kind: type[Exception], what: str) -> None:
    """Raise Violation unless the call raises this error, or a typed one."""
    try:
        call()
    except (kind, QframeError):
        return
    except Exception as error:
        raised = type(error).__name__
        raise Violation(f"{what} raised {raised}, expected {kind.__name__}") from error
    raise Violation(f"{what} was taken, expected {kind.__name__}")


def _unchanged(case: KVCase, before: torch.Tensor, store: Any) -> None:
    require(store.length == case.x.shape[2], "length changed by what was refused")
    same_bits(bits(before), bits(store.read()), "what is read after a refusal")
