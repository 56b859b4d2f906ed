"""Draws cases with Hypothesis, runs the checks on them, and makes counterexamples small.

A *scenario* is what a plugin is tried on, such as all layers with int4, symmetric, per group. A
*case* is one drawn input together with what the plugin made of it: the plugin runs once, and all
checks look at the same result. So a passing run costs little; only when a check fails is the case
searched again for that check alone, and shrunk.

Everything is drawn from a seed: the same seed gives the same cases. No database is kept, no
profile of the caller is changed, and global random states and warning filters are left as they
were.
"""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import StopTest
from hypothesis.internal.conjecture import providers

from qframe.errors import QframeError
from qframe.host import Host
from qframe_conformance.checks import SKIPPED, Check, Violation, _Skipped
from qframe_conformance.report import Counterexample
from qframe_conformance.strategies import looking_in

QUIET = tuple(HealthCheck)
SHRINK_EXAMPLES = 500  # cases that are tried to make a counterexample smaller


class Refused(Exception):  # noqa: N818 - a signal from a case to the engine
    """The plugin raised a typed error instead of answering; whether it may is for a check.

    foreseen   the plugin has said before that it does not take such a call
    """

    def __init__(self, said: str, *, foreseen: bool = False) -> None:
        super().__init__(said)
        self.foreseen = foreseen


class OutOfMemory(BaseException):
    """The plugin wants more memory than there is; there is no sense in trying it again."""


class Case(Protocol):
    """One drawn input, and what the plugin makes of it."""

    def counterexample(self, check: str) -> Counterexample:
        """Return the input as plain Python."""
        ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a plugin is tried on.

    id        e.g. "int4-symmetric-group"
    cases     draws cases
    subject   what `Check.objection` is asked about, e.g. the scheme without its free choices
    """

    id: str
    cases: st.SearchStrategy[Any]
    subject: Any = None


@dataclass(slots=True)
class Observed:
    """What one check saw in one scenario."""

    examples: int = 0
    ratio: float | None = None
    failure: Violation | None = None
    case: Any = None

    def took(self, outcome: float | None) -> None:
        """Count a case on which the promise held."""
        self.examples += 1
        if outcome is not None:
            self.ratio = outcome if self.ratio is None else max(self.ratio, outcome)


def _silent() -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Search:
    """How cases are looked for.

    examples   cases that are drawn in a scenario
    host       where formats and observers are looked up; None: among all that is installed
    tick       called before each case, so that somebody may watch the time
    """

    examples: int
    seed: int
    host: Host | None = None
    tick: Callable[[], None] = _silent

    def seed_of(self, scenario: Scenario) -> int:
        """Return the seed for one scenario: others draw other cases."""
        return self.seed << 32 | zlib.crc32(scenario.id.encode())

    def settings(self, *phases: Phase) -> hypothesis.settings:
        """Return settings of our own, whatever profile the caller has loaded."""
        return hypothesis.settings(
            max_examples=self.examples,
            phases=phases,
            database=None,
            deadline=None,
            derandomize=False,
            backend="hypothesis",
            suppress_health_check=QUIET,
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )


def explore(scenario: Scenario, checks: Sequence[Check], search: Search) -> dict[str, Observed]:
    """Draw cases and run every check on each; return what each saw, by name."""
    seen = {each.name: Observed() for each in checks}

    @hypothesis.seed(search.seed_of(scenario))
    @search.settings(Phase.generate)
    @hypothesis.given(scenario.cases)
    def visit(case: Any) -> None:
        search.tick()
        for each in checks:
            observed = seen[each.name]
            if observed.failure is not None:
                continue
            outcome = run(each, case)
            if isinstance(outcome, Violation):
                observed.examples += 1
                observed.failure, observed.case = outcome, case
            elif not isinstance(outcome, _Skipped):
                observed.took(outcome)

    with undisturbed(search.host):
        visit()
    return seen


def run(each: Check, case: Any) -> float | _Skipped | Violation | None:
    """Run one check on one case. What the plugin raises against its contract is a violation.

    Raises OutOfMemory when memory is not enough for the plugin.
    """
    try:
        outcome = each.function(case)
    except Violation as violation:
        return violation
    except Refused as refusal:
        skipped = refusal.foreseen or not _must_answer(case)
        return SKIPPED if skipped else Violation(str(refusal))
    except QframeError as error:
        return Violation(f"refused: {type(error).__name__}: {error}")
    except (KeyboardInterrupt, StopTest, OutOfMemory):
        raise
    except BaseException as error:  # SystemExit too: a plugin must not end the suite
        if is_out_of_memory(error):
            raise OutOfMemory(f"{type(error).__name__}: {error}") from error
        return Violation(f"raised {type(error).__name__}: {error}")
    if isinstance(outcome, float) and not outcome <= 1:
        return Violation(f"error / allowed = {outcome:.6g}", ratio=outcome)
    return outcome


def _must_answer(case: Any) -> bool:
    """Return whether a call that is like this one, but for what a check changed, has an answer."""
    try:
        return bool(getattr(case, "must_answer", False))
    except Exception:  # which another check tells
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left; torch has no class for that."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def smallest(scenario: Scenario, each: Check, observed: Observed, search: Search) -> Observed:
    """Return the failure of a check with a case that Hypothesis cannot make smaller."""
    best, tried = observed, 0

    def breaks(case: Any) -> bool:
        nonlocal best, tried
        search.tick()
        tried += 1
        if tried > SHRINK_EXAMPLES:
            raise _Enough
        outcome = run(each, case)
        if not isinstance(outcome, Violation):
            return False
        best = Observed(observed.examples, observed.ratio, outcome, case)
        return True

    @hypothesis.seed(search.seed_of(scenario))
    @search.settings(Phase.generate, Phase.shrink)
    @hypothesis.given(scenario.cases)
    def visit(case: Any) -> None:
        if breaks(case):
            raise _FoundError

    with undisturbed(search.host):
        try:
            visit()
        except (_FoundError, _Enough):
            pass
        except Exception:  # e.g. Flaky, of a plugin that is not deterministic: keep what we have
            return best
    return best


class _FoundError(Exception):
    """Tells Hypothesis that a case breaks a promise."""


class _Enough(BaseException):
    """Ends the search for a smaller case."""


@contextmanager
def undisturbed(host: Host | None = None) -> Iterator[None]:
    """Keep the caller's surroundings out of the draws, and the draws out of the surroundings.

    host   where formats and observers are looked up

    A caller may turn warnings into errors, as pytest can; then a plugin that warns would seem to
    fail. And for layers as small as these, threads of torch cost more than they do.
    """
    from qframe.parallel import one_torch_thread

    with (
        untouched_randomness(),
        no_foreign_constants(),
        one_torch_thread(),
        looking_in(host),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def no_foreign_constants() -> Iterator[None]:
    """Let Hypothesis draw no numbers out of the source files of modules that happen to be loaded.

    It likes to, and then the same seed gives other cases in another program. There is no setting
    for it; where a version of Hypothesis has it otherwise, this does nothing.
    """
    names = ("_get_local_constants", "CONSTANTS_CACHE", "Constants")
    if not all(hasattr(providers, name) for name in names):
        yield
        return
    module: Any = providers
    kept = module._get_local_constants, module.CONSTANTS_CACHE
    none = module.Constants()
    # The cache holds both kinds of constants together, so ours is another one.
    module._get_local_constants, module.CONSTANTS_CACHE = lambda: none, _CONSTANTS
    try:
        yield
    finally:
        module._get_local_constants, module.CONSTANTS_CACHE = kept


_CONSTANTS: dict[Any, Any] = {}


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave the global random states of Python, NumPy and torch as they were."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
