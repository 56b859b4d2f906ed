"""The process in which a plugin is contained: `contain` starts it, gives it a job, and listens.

Jobs are lines of JSON on the stdin that the process was started with, one after another until it
is closed. What is found goes to the stdout that it was started with, a line of JSON for each
message, as it is found: what is known is known, whatever happens next. The plugin's own stdin is
empty, and its stdout is led to stderr.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from qframe.errors import QframeError

if TYPE_CHECKING:
    from qframe_conformance.engine import Scenario
    from qframe_conformance.running import Run


class Channel:
    """Where messages go. A copy of the process, made by a fork of the plugin's, has no say."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        """Send a message; end here when this is a copy of the process."""
        if os.getpid() != self._owner:
            os._exit(0)
        self._file.write(json.dumps(message, allow_nan=False) + "\n")
        self._file.flush()

    def tick(self) -> None:
        """Say that a case begins."""
        self.send(tick=True)


def jobs() -> Iterator[dict[str, Any]]:
    """Yield the jobs as they come, and leave the plugin an empty stdin."""
    own = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as empty:
        os.dup2(empty.fileno(), 0)
    for line in own:
        yield json.loads(line)


def limit_memory(allowed: int | None) -> None:
    """Allow the process so many bytes of address space more than it has now, where it can be done.

    What is there already, such as the libraries of torch, does not count. None: as many as it may.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return
    import psutil

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = hard if allowed is None else psutil.Process().memory_info().vms + allowed
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (OSError, ValueError):  # not on every system
        return


def work(job: dict[str, Any], channel: Channel) -> None:
    """Check the plugin that the job names, and send what is found."""
    import torch  # noqa: F401 - whoever needs it first: it is not the plugin's memory

    from qframe_conformance.suite import prepare
    from qframe_conformance.target import Target

    limit_memory(None)
    kind, plugin, host = Target(**job["target"]).load()
    run = prepare(plugin, **{**job["options"], "kind": kind}, host=host, tick=channel.tick)
    scenarios = run.scenarios(job["scenarios"])
    channel.send(
        kind=kind,
        name=run.name,
        code=run.code(),
        scenarios=[scenario.id for scenario in scenarios],
    )
    limit_memory(job["memory"])
    if job["beside"]:
        from qframe_conformance.kernel_case import beside, peers_of

        with beside(peers_of(host)):
            explore(run, scenarios, channel)
    else:
        explore(run, scenarios, channel)
    channel.send(done=True)


def explore(run: Run, scenarios: Sequence[Scenario], channel: Channel) -> None:
    """Send what is found in each scenario."""
    from qframe_conformance import wire

    for scenario in scenarios:
        channel.send(begins=scenario.id)
        try:
            for record in run.records(scenario):
                channel.send(record=wire.plain(record))
        except Exception as error:  # not in a check, so nobody has turned it into a record
            message = f"{type(error).__name__}: {error}"
            channel.send(record=wire.plain(run.crash(scenario.id, message)))
        channel.send(ends=scenario.id)


def main() -> None:
    """Do the jobs on stdin."""
    channel = Channel()
    for job in jobs():
        try:
            work(job, channel)
        except QframeError as error:
            channel.send(error=type(error).__name__, message=str(error))


if __name__ == "__main__":
    main()
