"""What a mutant is: a plugin with one mistake, and the check of the suite that must find it.

The modules of this folder hold mutants of one kind of plugin each. Every one exposes

    MUTANTS               tuple of `Mutant`: plugins that are wrong
    TWINS                 tuple of `Twin`: plugins that are right and do it otherwise
    outputs(plugin)       what an ordinary unit test looks at: arrays, on ordinary random problems

so that the suite can be judged itself: it must fail every mutant and no twin. With `outputs` one
can ask what a test with the usual tolerances would have said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A plugin with one mistake.

    name        e.g. "round_floor"
    kind        the kind of plugin, as in `qframe.host.KINDS`
    bug         one sentence: the mistake, and where it is seen in the field
    make        makes the wrong plugin
    correct     makes the right one, which is what `outputs` compares with
    killed_by   the name of the check that must fail
    """

    name: str
    kind: str
    bug: str
    make: Callable[[], Any]
    correct: Callable[[], Any]
    killed_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A plugin that is right, but does it otherwise: no check may fail.

    name   e.g. "half_away"
    kind   the kind of plugin, as in `qframe.host.KINDS`
    why    one sentence: what is different, and why that is no mistake
    make   makes the plugin
    """

    name: str
    kind: str
    why: str
    make: Callable[[], Any]


def wrong_statistics(
    observer: Callable[[Any], Any], correct: Callable[[], Any], prefix: str = ""
) -> Callable[[str, Any, str, str], Mutant]:
    """Return what makes a mutant of (name, class of statistics, the check, the bug).

    observer   makes an observer of such a class; `correct`, the right one
    """

    def wrong(name: str, statistic: Any, killed_by: str, bug: str) -> Mutant:
        return Mutant(
            name=f"{prefix}{name}",
            kind="observer",
            bug=bug,
            make=lambda: observer(statistic),
            correct=correct,
            killed_by=killed_by,
        )

    return wrong
