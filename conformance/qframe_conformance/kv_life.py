"""Lives a store's life beside a model of it: every token as it came, in full precision.

After each operation the store must have the tokens of the model; those that stay must read as they
did before; none within the window may have become codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe.claims import claims_of
from qframe.claims.kv import ExactWindow, Streaming
from qframe.kv_evidence import KVEvidence
from qframe_conformance.checks import Violation, require, same_bits
from qframe_conformance.kv_cases import KVCase, bits, well_formed, well_read
from qframe_conformance.kv_lanes import lanes


@dataclass(eq=False)
class Life:
    """A store, and what it should hold.

    x      the tokens that are in it, as they came
    read   how they read after the last operation
    codes  [tokens]: which of them were codes then
    cropped   whether it ever was: then groups may wait for the places where they always begin
    """

    case: KVCase
    store: Any
    rng: np.random.Generator
    x: torch.Tensor
    read: torch.Tensor
    codes: torch.Tensor
    cropped: bool = False

    @classmethod
    def of(cls, case: KVCase) -> Life:
        """Begin with the tokens of a case."""
        evidence = case.evidence
        rng = np.random.default_rng(case.seed + 1)
        return cls(case, case.fill(case.x), rng, case.x, evidence.read, _codes(evidence))

    def live(self) -> KVEvidence:
        """Do all operations of the case; return what is there in the end. Raises Violation."""
        for number, (name, parameter) in enumerate(self.case.life):
            try:
                getattr(self, f"_{name}")(parameter)
            except Violation as violation:
                raise Violation(f"after {self._done(number)}: {violation}") from None
            except Exception as error:
                raised = f"{type(error).__name__}: {error}"
                raise Violation(f"{self._done(number)} raised {raised}") from error
        return self._look()

    def _done(self, number: int) -> str:
        return ", ".join(f"{name} {n}" for name, n in self.case.life[: number + 1])

    def _crop(self, number: int) -> None:
        tokens = self.x.shape[2]
        length = max(tokens + number, 0) if number < 0 else number % (tokens + 1)
        self.store.crop(length)
        self.x, self.codes, self.cropped = self.x[:, :, :length], self.codes[:length], True
        self._stays(self.read[:, :, :length], "crop")

    def _select(self, number: int) -> None:
        draw = np.random.default_rng(number).integers(0, self.x.shape[0], 1 + number % 3)
        indices = torch.from_numpy(draw.astype(np.int64))
        self.store.select(indices)
        self.x = self.x[indices]
        self._stays(self.read[indices], "select")

    def _stays(self, kept: torch.Tensor, what: str) -> None:
        """Raise Violation unless the tokens that stay read as they did."""
        self._has_length()
        self.read = self.store.read()
        same_bits(bits(kept), bits(self.read), f"tokens that stay after {what}")

    def _has_length(self) -> None:
        there, expected = self.store.length, self.x.shape[2]
        require(there == expected, f"length is {there}, expected {expected}")

    def _append(self, tokens: int) -> None:
        batch, heads, before, head_dim = self.x.shape
        dtype = str(self.x.dtype).removeprefix("torch.")
        more = lanes(self.rng, (batch, heads, tokens, head_dim), dtype, int(self.rng.integers(99)))
        self.store.append(more.clone())
        self.x = torch.cat((self.x, more), dim=2)
        evidence, codes = self._look(), self.codes
        claims, read = claims_of(self.case.quantizer), evidence.read
        if any(isinstance(claim, Streaming) for claim in claims):
            again, kept = read[:, :, :before][:, :, codes], self.read[:, :, codes]
            same_bits(bits(kept), bits(again), "tokens that were codes before")
        self.read, self.codes = read, _codes(evidence)
        for claim in claims:
            if isinstance(claim, ExactWindow):
                self._window(claim, codes, self.codes)

    def _look(self) -> KVEvidence:
        """Return what is there. Raises Violation for tokens that are neither codes nor as given."""
        self._has_length()
        evidence = KVEvidence.of(self.case.scheme, self.x, self.store)
        well_read(evidence)
        well_formed(evidence)
        exact = ~_codes(evidence)
        given, read = self.x[:, :, exact], evidence.read[:, :, exact]
        same_bits(bits(given), bits(read), "tokens that are no codes")
        return evidence

    def _window(self, claim: ExactWindow, codes: torch.Tensor, now: torch.Tensor) -> None:
        """Raise Violation where a token that must be kept became codes, or too many wait."""
        scheme, length = self.case.scheme, len(now)
        new = now.clone()
        new[: len(codes)] &= ~codes
        new_codes = new.nonzero().flatten().tolist()
        if new_codes:
            require(new_codes[0] >= scheme.sink_tokens, f"sink {new_codes[0]} became codes")
            last = length - claim.kept(scheme)
            require(new_codes[-1] < last, f"token {new_codes[-1]} of {length} became codes")
        waiting = int((~now[scheme.sink_tokens :]).sum())
        most = claim.kept(scheme) + claim.chunk(scheme) * (2 if self.cropped else 1) - 1
        require(waiting <= most, f"{waiting} tokens are kept behind the sinks, at most {most} may")


def lived(case: KVCase) -> tuple[Life, KVEvidence]:
    """Return the life of a case and what is there in its end. Raises Violation; lives once."""
    if "life" not in case.shared:
        life = Life.of(case)
        try:
            case.shared["life"] = life, life.live()
        except Violation as violation:
            case.shared["life"] = violation
    if isinstance(case.shared["life"], Violation):
        raise case.shared["life"]
    found: tuple[Life, KVEvidence] = case.shared["life"]
    return found


def _codes(evidence: KVEvidence) -> torch.Tensor:
    """Return which tokens are codes, [tokens] bool."""
    found = torch.zeros(evidence.read.shape[2], dtype=torch.bool)
    for block in evidence.blocks:
        found[block.start : block.stop] = True
    return found
