"""A rounder that needs an observer, and does nothing with what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qframe import Capabilities, Host, hookimpl


@dataclass(frozen=True)
class Needy:
    """Rounds to nearest."""

    needs: frozenset[str]
    name: str = "needy"
    capabilities: Capabilities = field(default=Capabilities())

    def round(self, problem, rng):
        return Host.discover().get("rounder", "rtn").round(problem, rng)


def host_needing(observer: str, *observers: Any) -> Host:
    """Return a host with the rounder "needy", and some observers besides the installed ones.

    observer   the name of what it needs
    """

    class Plugin:
        @hookimpl
        def qframe_observers(self):
            return list(observers)

        @hookimpl
        def qframe_rounders(self):
            return [Needy(frozenset({observer}))]

    host = Host.discover()
    host.add(Plugin(), "needy")
    return host
