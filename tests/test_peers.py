"""The peers' matrix: adapters load without their libraries, and the page is what was measured."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
ADAPTERS = sorted(PEERS.glob("peer_*.py"))
LIBRARIES = {"hqq", "torchao", "bitsandbytes", "optimum", "compressed_tensors", "llmcompressor"}
OWN = {"rtn", "gptq"}
RESULTS = json.loads((PEERS / "results.json").read_text(encoding="utf-8"))


def document():
    """Return the module that writes docs/peers.md."""
    spec = importlib.util.spec_from_file_location("peers_document", PEERS / "document.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def violated(part):
    """Yield (library, check) of the cells that did not hold."""
    for library, checks in RESULTS[part].items():
        yield from ((library, check) for check, cell in checks.items() if cell["violated"])


# Adapters -------------------------------------------------------------------------------------


def test_adapters_import_no_library_until_they_are_called():
    """So that `qframe plugins --plugin FILE` works where the library is missing, and is quick."""
    code = (
        "import sys\nfrom qframe import Host\n"
        f"host = Host.discover(files={[str(file) for file in ADAPTERS]!r})\n"
        f"print(sorted(sys.modules.keys() & {LIBRARIES!r}))\n"
        "print(' '.join(host.names('rounder')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, names = done.stdout.splitlines()
    assert imported == "[]"
    assert RESULTS["ordinary"].keys() <= set(names.split())


def test_at_least_five_libraries_were_tried():
    measured = {package for package in RESULTS["versions"] if package not in {"qframe", "torch"}}
    assert len(measured) >= 5
    assert RESULTS["ordinary"].keys() - OWN


def test_every_library_is_held_to_something():
    for library, checks in RESULTS["ordinary"].items():
        assert {"answers", "packs", "purity", "determinism", "scheme_scale"} <= checks.keys(), (
            library
        )


# The page -------------------------------------------------------------------------------------


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert page == document().render(RESULTS)


def test_the_rounders_of_qframe_keep_all_that_peers_are_asked():
    assert [cell for cell in violated("ordinary") if cell[0] in OWN] == []


@pytest.mark.parametrize("part", ["ordinary", "extreme"])
def test_everything_that_did_not_hold_is_explained_once(part):
    notes = document().NOTES
    for library, check in violated(part):
        found = [
            note
            for note in notes
            if check in note.checks
            and library in note.libraries
            and note.extreme == (part == "extreme")
        ]
        assert len(found) == 1, (part, library, check)


def test_notes_name_experiments_that_were_run():
    names = {each["name"] for each in RESULTS["experiments"]}
    for note in document().NOTES:
        for name in re.findall(r"experiments? `(\w+)`", note.text):
            assert name in names
