"""Measurements that a long script has made, so that it goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import qframe_plugins
from qframe.comparison.identity import environment, package_source
from qframe.comparison.store import key_of


def kept(
    store: Path | None, name: str, identity: Mapping[str, Any], measure: Callable[[], Any]
) -> Any:
    """Return what `measure` returns, as plain values; from the store, if it has been measured.

    store      a folder; None: nothing is kept
    name       for people
    identity   plain values: everything that the measurement depends on, but the libraries and the
               source of qframe and its plugins, which are added
    """
    plugins = package_source(Path(qframe_plugins.__file__).parent)
    whole = {**identity, "environment": environment(), "plugins": plugins}
    if store is None:
        return json.loads(json.dumps(measure()))
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    file = store / f"{words}-{key_of(whole)}.json"
    if file.exists():
        print(f"{name}: kept from before", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(measure()))
    store.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    scratch.rename(file)
    return found
