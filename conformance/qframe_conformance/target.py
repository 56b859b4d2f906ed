"""Which plugin is to be checked, in words that another process understands: names, not objects."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qframe.errors import PluginError, UnknownNameError
from qframe.host import Host
from qframe.strict import suggestion
from qframe_conformance.suite import MODULES


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A plugin by name.

    name      as users type it; of a kernel "OP/BACKEND", or the backend where it has but one
    kind      as in `qframe.host.KINDS`; None where the name tells
    files     Python files to load as plugins first
    disable   plugins to leave out
    options   option -> value
    machine   of a kernel with `targets`, the name of one of them; "": the kernel itself
    """

    name: str
    kind: str | None = None
    files: Sequence[str] = ()
    disable: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    machine: str = ""

    def load(self) -> tuple[str, Any, Host]:
        """Return (kind, plugin, host): its options are set, and the host knows the files.

        Raises UnknownNameError for a name that no plugin has, or a machine that a kernel has not,
        PluginError for a name that several plugins have or whose plugin failed to load,
        RecipeError for an option.
        """
        if self.kind is not None and self.kind not in MODULES:
            near = suggestion(self.kind, MODULES)
            raise PluginError(f"the suite has no checks of the kind {self.kind!r}{near}")
        host = discover(self.files, self.disable)
        kind, name = (self.kind, self.name) if self.kind is not None else self._found(host)
        plugin = host.configured(kind, name, self.options, "--set")
        if self.machine:
            machines = getattr(plugin, "targets", {})
            if self.machine not in machines:
                near = suggestion(self.machine, machines)
                raise UnknownNameError(f"kernel {name!r} has no target {self.machine!r}{near}")
            plugin = machines[self.machine]
        return kind, plugin, host

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def _found(self, host: Host) -> tuple[str, str]:
        """Return the one (kind, name) that the name alone stands for."""
        contested = [kind for kind, name in host.contested() if name == self.name]
        kinds = contested + [kind for kind in MODULES if self.name in host.names(kind)]
        if len(kinds) > 1:
            raise PluginError(
                f"{self.name!r} is the name of several plugins ({', '.join(kinds)}); say which "
                f'with --kind "{kinds[0]}"'
            )
        if kinds:
            return kinds[0], self.name
        kernels = [name for name in host.names("kernel") if name.split("/")[1] == self.name]
        if len(kernels) > 1:
            raise PluginError(
                f"{self.name!r} is a backend with several kernels; say which: {', '.join(kernels)}"
            )
        if kernels:
            return "kernel", kernels[0]
        for kind in ("exporter", "reader"):
            if self.name in host.names(kind):
                raise PluginError(f"the suite has no checks of {kind}s, such as {self.name!r}, yet")
        for record in host.records:
            if record.name == self.name and record.error is not None:
                raise PluginError(
                    f"plugin {record.label} failed to load: {record.error}"
                ) from record.error
        known = [name for kind in MODULES for name in host.names(kind)]
        raise UnknownNameError(f"no plugin is called {self.name!r}{suggestion(self.name, known)}")


def discover(files: Sequence[str], disable: Sequence[str]) -> Host:
    """Load all plugins; what failed is in the host's records, and not warned of here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Host.discover(files, disable)


def all_targets(
    files: Sequence[str] = (), disable: Sequence[str] = ()
) -> tuple[list[Target], list[str], list[str]]:
    """Return every plugin that the suite has checks for, and in words what it leaves out.

    The second list is of plugins that cannot be used. The third is of kernels that this machine
    cannot run, and of those that are only taken by name, as they simulate another machine.
    """
    host = discover(files, disable)
    problems = [
        f"plugin {record.label} failed to load: {record.error}"
        for record in host.records
        if record.error is not None
    ]
    for (kind, name), rivals in host.contested().items():
        owners = " and ".join(record.label for record in rivals)
        problems.append(f"{kind} {name!r} is claimed by {owners}, so neither is used")
    targets: list[Target] = []
    elsewhere: dict[str, list[str]] = {}
    for kind in MODULES:
        for name in host.names(kind):
            why = left_out(host.get(kind, name)) if kind == "kernel" else None
            if why is None:
                targets.append(
                    Target(name=name, kind=kind, files=tuple(files), disable=tuple(disable))
                )
            else:
                elsewhere.setdefault(why, []).append(name)
    notes = [f"not checked: {', '.join(names)}: {why}" for why, names in elsewhere.items()]
    return targets, problems, notes


def left_out(kernel: Any) -> str | None:
    """Return why a kernel is not among all that are checked, or None."""
    absent = kernel.absent() if hasattr(kernel, "absent") else None
    if absent is not None:
        return str(absent.reason)
    if getattr(kernel, "by_name_only", False):
        return "it simulates another machine; ask for it by name"
    return None
