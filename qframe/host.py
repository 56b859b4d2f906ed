"""The host: finds plugins, checks that they keep their contracts, and looks objects up by name.

Plugins are entry points of the group "qframe", the default ones too. They are loaded one at a
time: one that fails is rolled back, kept as a record with its error, and re-raised only when
its name is asked for, so that a broken plugin never stops the others.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pluggy
import pydantic
from typing_extensions import get_protocol_members

from qframe import contracts, hookspecs
from qframe.errors import PluginError, RecipeError, UnknownNameError
from qframe.strict import mistakes, suggestion

KINDS: Mapping[str, tuple[str, type]] = {
    "observer": ("qframe_observers", contracts.Observer),
    "outlier handler": ("qframe_outlier_handlers", contracts.OutlierHandler),
    "rounder": ("qframe_rounders", contracts.Rounder),
    "kernel": ("qframe_kernels", contracts.Kernel),
    "number format": ("qframe_number_formats", contracts.NumberFormat),
    "kv cache": ("qframe_kv_caches", contracts.KVCacheQuantizer),
    "layout": ("qframe_layouts", contracts.Layout),
    "exporter": ("qframe_exporters", contracts.Exporter),
    "reader": ("qframe_readers", contracts.Reader),
}
"""Kind of object -> (the hook that registers it, the contract it keeps)."""


@dataclass
class PluginRecord:
    """One plugin: where it comes from, what it provides, and why it failed if it did."""

    name: str
    source: str
    version: str
    status: str = "loaded"  # loaded, failed, disabled
    error: Exception | None = None
    provides: dict[str, list[str]] = field(default_factory=dict)  # kind -> names

    @property
    def label(self) -> str:
        """Name and source in one, for messages."""
        return f"{self.name} ({self.source})"


class Host:
    """All plugins of this process, and their objects by kind and name."""

    def __init__(self) -> None:
        self.records: list[PluginRecord] = []
        self._objects: dict[tuple[str, str], tuple[Any, PluginRecord]] = {}
        self._contested: dict[tuple[str, str], list[PluginRecord]] = {}
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def discover(cls, files: Iterable[str | Path] = (), disable: Iterable[str] = ()) -> Host:
        """Load all installed plugins and the given single-file plugins.

        files     paths of Python files that implement hooks (`--plugin my_method.py`)
        disable   entry-point names to skip; also the comma list in QFRAME_DISABLE_PLUGINS

        A failing entry point gives a warning and a record; with QFRAME_STRICT_PLUGINS=1, and
        for files asked for by name, it is an error.
        """
        host = cls()
        skip = {*disable, *filter(None, os.environ.get("QFRAME_DISABLE_PLUGINS", "").split(","))}
        points = sorted(
            importlib.metadata.entry_points(group=hookspecs.PROJECT),
            key=lambda p: (p.name, p.value),
        )
        found = _without_repeats(points)
        names = [point.name for point, _ in found]
        for point, origin in found:
            record = PluginRecord(point.name, *origin)
            if point.name in skip:
                record.status = "disabled"
                host.records.append(record)
            elif names.count(point.name) > 1:
                rivals = [f"{p.value} of {dist}" for p, (dist, _) in found if p.name == point.name]
                host._fail(
                    record,
                    PluginError(
                        f"plugin name {point.name!r} is claimed by {' and '.join(rivals)}; none "
                        f"of them is loaded. Uninstall one, or rename its entry point"
                    ),
                )
            else:
                host._load(record, point.load)
        unknown = skip - set(names)
        if unknown:
            raise UnknownNameError(
                f"cannot disable plugin {sorted(unknown)[0]!r}: no such entry point"
                f"{suggestion(sorted(unknown)[0], names)}"
            )
        for record in host.records:
            if record.error is not None:
                message = f"qframe plugin {record.label} failed to load: {_short(record.error)}"
                if os.environ.get("QFRAME_STRICT_PLUGINS") == "1":
                    raise PluginError(message) from record.error
                warnings.warn(message, stacklevel=2)
        for file in files:
            host.add_file(Path(file))
        return host

    def add_file(self, path: Path) -> None:
        """Load one Python file as a plugin. Raises PluginError when it fails."""
        if not path.is_file():
            raise PluginError(f"--plugin {path}: no such file")
        record = PluginRecord(path.stem, str(path), "file")
        self._load(record, lambda: _import_file(path))
        if record.error is not None:
            raise PluginError(f"plugin {path} failed to load: {_short(record.error)}") from (
                record.error
            )
        self._refuse_contested(record)

    def add(self, plugin: object, name: str) -> None:
        """Register a module or object that implements hooks. Raises PluginError."""
        record = PluginRecord(name, type(plugin).__name__, "object")
        self._load(record, lambda: plugin)
        if record.error is not None:
            raise record.error
        self._refuse_contested(record)

    def get(self, kind: str, name: str) -> Any:
        """Return the object of this kind and name.

        Raises UnknownNameError with the nearest known name, the original error of a plugin
        that failed to load, or PluginError for a name that two plugins claim.
        """
        if (kind, name) in self._contested:
            owners = " and ".join(record.label for record in self._contested[kind, name])
            raise PluginError(
                f"{kind} {name!r} is provided by {owners}, so neither is used; disable one "
                f"with --no-plugin"
            )
        if (kind, name) in self._objects:
            return self._objects[kind, name][0]
        for record in self.records:
            if record.name == name and record.error is not None:
                raise PluginError(
                    f"{kind} {name!r}: its plugin {record.label} failed to load: "
                    f"{_short(record.error)}"
                ) from record.error
        raise UnknownNameError(f"unknown {kind} {name!r}{suggestion(name, self.names(kind))}")

    def names(self, kind: str) -> list[str]:
        """Return the names of all objects of a kind, sorted."""
        return sorted(name for this, name in self._objects if this == kind)

    def wants_pairs(self, observer: str) -> bool:
        """Return whether an observer looks at inputs in the original network as well (`pairs`)."""
        return bool(getattr(self.get("observer", observer), "pairs", False))

    def origin(self, kind: str, name: str) -> PluginRecord:
        """Return the record of the plugin that provides an object."""
        self.get(kind, name)
        return self._objects[kind, name][1]

    def configured(self, kind: str, name: str, options: Mapping[str, Any], where: str) -> Any:
        """Return the object with its options set: its own dataclass fields are its options.

        where   what to name in messages, e.g. "recipe.yaml"

        Raises RecipeError for an unknown option, with the nearest known one, or a wrong value.
        """
        target = self.get(kind, name)
        if not options:
            return target
        known = option_names(target)
        for key in options:
            if key not in known:
                raise RecipeError(
                    f"{where}: {kind} {name!r} has no option {key!r}{option_hint(key, known)}"
                )
        try:
            values = {n: getattr(target, n) for n in known}
            checked = pydantic.TypeAdapter(type(target)).validate_python({**values, **options})
        except pydantic.ValidationError as error:
            loc, said, given = next(mistakes(error, lambda loc: 1))
            path = ".".join(str(part) for part in loc)
            raise RecipeError(
                f"{where}: {kind} {name!r}: option {path!r}: {said} (got {given!r})"
            ) from None
        except pydantic.errors.PydanticUserError as error:
            raise PluginError(
                f"{kind} {name!r}: the types of its options cannot be checked: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return checked

    def _load(self, record: PluginRecord, load: Any) -> None:
        """Load, register and check one plugin; on any failure roll back and keep the error."""
        plugin = None
        try:
            plugin = load()
            self._manager.register(plugin, name=f"{record.source}:{record.name}")
            self._manager.check_pending()
            found = self._collect(plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a plugin must not end the program
            if plugin is not None and self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            self._fail(record, _helpful(error))
            return
        for kind, objects in found.items():
            for item in objects:
                self._claim(kind, object_name(kind, item), item, record)
                record.provides.setdefault(kind, []).append(object_name(kind, item))
        self.records.append(record)

    def _collect(self, plugin: object) -> dict[str, list[Any]]:
        """Call the plugin's hooks and check every object that they return."""
        found: dict[str, list[Any]] = {}
        for kind, (hook, contract) in KINDS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                objects = implementation.function()
                if isinstance(objects, (str, bytes)) or not isinstance(objects, Iterable):
                    raise PluginError(
                        f"hook {hook}: expected an iterable of {kind}s, "
                        f"got {type(objects).__name__}"
                    )
                items = list(objects)
                for item in items:
                    problem = objection(item, contract)
                    if problem:
                        raise PluginError(f"hook {hook}: {problem}")
                found[kind] = items
        if not found:
            raise PluginError(
                f"it implements no hook of qframe; hooks: "
                f"{', '.join(hook for hook, _ in KINDS.values())} (is @hookimpl missing?)"
            )
        return found

    def _claim(self, kind: str, name: str, item: Any, record: PluginRecord) -> None:
        key = (kind, name)
        if key in self._contested:
            self._contested[key].append(record)
        elif key in self._objects:
            self._contested[key] = [self._objects.pop(key)[1], record]
        else:
            self._objects[key] = (item, record)

    def _refuse_contested(self, record: PluginRecord) -> None:
        """Say at once when a plugin that the user named cannot be used for its name."""
        for kind, names in record.provides.items():
            for name in names:
                if (kind, name) in self._contested:
                    self.get(kind, name)

    def _fail(self, record: PluginRecord, error: Exception) -> None:
        record.status, record.error = "failed", error
        self.records.append(record)

    def contested(self) -> dict[tuple[str, str], list[PluginRecord]]:
        """Return names that several plugins claim: (kind, name) -> their records."""
        return dict(self._contested)


def object_name(kind: str, item: Any) -> str:
    """Return the name under which an object is looked up."""
    return f"{item.op}/{item.backend}" if kind == "kernel" else str(item.name)


def option_names(item: Any) -> list[str]:
    """Return the options of an object: the init fields of its dataclass."""
    if not dataclasses.is_dataclass(item):
        return []
    return [f.name for f in dataclasses.fields(item) if f.init]


def option_hint(wrong: str, known: Sequence[str]) -> str:
    """Return what to say after an unknown option: the nearest one, and all that there are."""
    if not known:
        return "; it has no options"
    near = suggestion(wrong, known)
    return near if "known:" in near or len(known) == 1 else f"{near} known: {', '.join(known)}"


def objection(item: Any, contract: type) -> str | None:
    """Return why `item` does not keep `contract`, or None: missing members, wrong signatures."""
    label = repr(getattr(item, "name", item))
    if inspect.isclass(item):
        return f"expected an object, got the class {item.__name__}; return {item.__name__}()"
    for member in sorted(get_protocol_members(contract)):
        if not hasattr(item, member):
            return f"{contract.__name__} {label} has no {member!r}"
        wanted = inspect.getattr_static(contract, member, None)
        value = getattr(item, member)
        if inspect.isfunction(wanted):
            if not callable(value):
                return f"{contract.__name__} {label}: {member!r} must be a method"
            problem = _signature_objection(value, wanted)
            if problem:
                return f"{contract.__name__} {label}: {member}{problem}"
    if not isinstance(getattr(item, "name", ""), str):
        return f"{contract.__name__} {label}: name must be a string"
    if "needs" in get_protocol_members(contract) and not isinstance(item.needs, frozenset):
        return f"{contract.__name__} {label}: needs must be a frozenset of observer names"
    capabilities = getattr(item, "capabilities", None)
    if "capabilities" in get_protocol_members(contract) and not isinstance(
        capabilities, contracts.Capabilities
    ):
        return (
            f"{contract.__name__} {label}: capabilities must be qframe.Capabilities, "
            f"got {type(capabilities).__name__}"
        )
    return None


def _signature_objection(method: Any, wanted: Any) -> str | None:
    """Compare parameter names; `self` is already bound in `method`."""
    [_, *asked] = inspect.signature(wanted).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in asked):
        return None  # what a kernel takes is said by its operation
    expected = [p.name for p in asked]
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return None  # a C function tells nothing
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    got = [p.name for p in parameters if p.default is p.empty]
    if got != expected:
        return f"({', '.join(got)}) should be {method.__name__}({', '.join(expected)})"
    return None


def _without_repeats(
    points: Sequence[importlib.metadata.EntryPoint],
) -> list[tuple[importlib.metadata.EntryPoint, tuple[str, str]]]:
    """Drop an entry point seen twice from one distribution (installed and on the path).

    Returns each with its distribution's name and version.
    """
    read: dict[int, tuple[str, str]] = {}  # a distribution reads its file at each question
    seen: dict[tuple[str, str, str], tuple[importlib.metadata.EntryPoint, tuple[str, str]]] = {}
    for point in points:
        if point.dist is None:
            origin = point.value, "?"
        else:
            if id(point.dist) not in read:
                read[id(point.dist)] = point.dist.name, point.dist.version
            origin = read[id(point.dist)]
        seen.setdefault((point.name, point.value, origin[0]), (point, origin))
    return list(seen.values())


def _import_file(path: Path) -> object:
    name = f"qframe_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _helpful(error: BaseException) -> Exception:
    """Return the error to keep; pluggy's message for a misspelt hook gets a suggestion."""
    if isinstance(error, pluggy.PluginValidationError) and "unknown hook" in str(error):
        wrong = str(error).split("unknown hook ")[1].split("'")[1]
        hooks = [hook for hook, _ in KINDS.values()]
        return PluginError(f"it implements an unknown hook {wrong!r}{suggestion(wrong, hooks)}")
    if isinstance(error, Exception):
        return error
    return PluginError(f"{type(error).__name__} while loading: {error}")


def _short(error: Exception) -> str:
    """Return the error as one line, with its type unless it is ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"
