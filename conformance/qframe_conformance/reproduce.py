"""Counterexamples as scripts: each makes the plugin, has the arrays, and prints the violation."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qframe.host import option_names
from qframe_conformance.report import Counterexample, Record, Report

INLINE = 64  # numbers that may stand in the text; more go into a file
_FILE_PLUGIN = "qframe_plugin_"  # how the host names the module of a single-file plugin


# The plugin -----------------------------------------------------------------------------------


def plugin_code(plugin: Any, kind: str, name: str) -> str:
    """Return Python that makes `plugin`; a line to fill in where that cannot be known.

    A plugin from a file is loaded by qframe, any other one is imported and called with its
    options, which are the fields of its dataclass. A plugin that is made otherwise says how in an
    attribute `made_by`.
    """
    if isinstance(made_by := getattr(plugin, "made_by", None), str):
        return made_by
    cls = type(plugin)
    module, options = cls.__module__, _options(plugin)
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    if module.startswith(_FILE_PLUGIN):
        file = str(Path(sys.modules[module].__file__ or "").resolve())
        return (
            "from qframe import Host\n"
            "from qframe_conformance.strategies import look_in\n\n"
            f"host = Host.discover(files=[{file!r}])\n"
            "look_in(host)\n"
            f"plugin = host.configured({kind!r}, {name!r}, {options!r}, 'script')\n"
        )
    if module == "__main__" or "." in cls.__qualname__:
        return f"plugin = ...  # put your {cls.__name__}({given}) here\n"
    return f"from {module} import {cls.__name__}\n\nplugin = {cls.__name__}({given})\n"


def _options(plugin: Any) -> dict[str, Any]:
    """Return the options that are not at their defaults."""
    found = {}
    defaults = {
        f.name: f.default
        for f in (dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ())
    }
    for name in option_names(plugin):
        value = getattr(plugin, name)
        if value != defaults.get(name):
            found[name] = value
    return found


# The script -----------------------------------------------------------------------------------


def script(record: Record, code: str, *, file: str | None = None) -> str:
    """Return a script that shows why a record failed.

    code   makes the plugin (`plugin_code`)
    file   of the arrays, beside the script; None: they stand in the text, where they are few
    """
    example = record.counterexample or Counterexample(snippet="")
    theorem = f" ({record.theorem})" if record.theorem else ""
    head = [f"{record.id}{theorem}", record.promise, *record.message.splitlines()]
    comment = "\n".join(f"# {line}".rstrip() for line in head)
    return f"{comment}\n\n{_tidy([code, _arrays(example.arrays, file), example.snippet])}"


def body(text: str) -> str:
    """Return a script without the comment at its head."""
    return text.partition("\n\n")[2]


def _tidy(parts: Sequence[str]) -> str:
    """Join pieces of Python: their imports come first, merged and sorted, whoever needs them."""
    modules: set[str] = set()
    names: defaultdict[str, set[str]] = defaultdict(set)
    lines = []
    for line in "\n".join(parts).splitlines():
        if match := re.match(r"import ([^(]+)$", line):
            modules.add(match[1])
        elif match := re.match(r"from (\S+) import ([^(]+)$", line):
            names[match[1]].update(name.strip() for name in match[2].split(","))
        else:
            lines.append(line)
    imports = [(name, f"import {name}") for name in modules]
    imports += [(name, f"from {name} import {', '.join(sorted(names[name]))}") for name in names]
    groups: dict[int, list[str]] = {}
    for name, line in sorted(imports, key=lambda item: (item[1].startswith("from"), item)):
        groups.setdefault(_import_group(name), []).append(line)
    text = "\n\n".join("\n".join(groups[group]) for group in sorted(groups))
    rest = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"{text}\n\n{rest}\n"


def _import_group(module: str) -> int:
    """Return 0 for Python's own, 1 for others', 2 for those of qframe and the plugin."""
    top = module.split()[0].split(".")[0]
    if top in sys.stdlib_module_names:
        return 0
    return 1 if top in ("numpy", "torch") else 2


def _arrays(arrays: Mapping[str, Any], file: str | None) -> str:
    """Return Python that defines `arrays`."""
    if not arrays:
        return ""
    if file is not None:
        return (
            "import numpy as np\n"
            "from pathlib import Path\n"
            f"arrays = np.load(Path(__file__).with_name({file!r}))"
        )
    known = {name: np.asarray(array) for name, array in arrays.items()}
    if sum(array.size for array in known.values()) > INLINE:
        return 'import numpy as np\narrays = np.load("ARRAYS.npz")  # too many to show: save them'
    items = "".join(f'    "{name}": {_literal(array)},\n' for name, array in known.items())
    return f"import numpy as np\narrays = {{\n{items}}}"


def _literal(array: npt.NDArray[Any]) -> str:
    """Return an array as an expression that gives back the same bits."""
    text = re.sub(r"\b(inf|nan)\b", r"np.\1", repr(array.tolist()))
    shape = f".reshape({array.shape})" if array.size == 0 else ""
    return f"np.array({text}, dtype={array.dtype.name!r}){shape}"


# Files ----------------------------------------------------------------------------------------


def save(report: Report, folder: Path) -> list[Path]:
    """Write the scripts, their arrays, report.json and report.md; return the scripts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    scripts = []
    for record in report.failures:
        if record.counterexample is None:
            continue
        stem = re.sub(r"[^\w.-]+", "_", f"{record.plugin}-{record.check}-{record.scenario}")
        arrays: dict[str, Any] = dict(record.counterexample.arrays)
        if arrays:
            np.savez(folder / f"{stem}.npz", **arrays)
        path = folder / f"{stem}.py"
        path.write_text(script(record, report.code, file=f"{stem}.npz"), encoding="utf-8")
        scripts.append(path)
    return scripts
