"""The suite is judged: it fails every plugin with a mistake, and none that is right.

Every other module of this folder that has MUTANTS and TWINS is taken, so a new file is tested
without a line here. `tests/mutants/mutant.py` says what they are.
"""

import importlib
from pathlib import Path

import pytest

from qframe_conformance import check_plugin
from qframe_conformance.report import BAD
from qframe_conformance.suite import prepare

HERE = Path(__file__).parent
MODULES = [
    importlib.import_module(f"tests.mutants.{file.stem}")
    for file in sorted(HERE.glob("*.py"))
    if not file.stem.startswith("test_")
]
HOLDING = [module for module in MODULES if hasattr(module, "MUTANTS")]
MUTANTS = [
    pytest.param(mutant, id=f"{mutant.kind.replace(' ', '-')}-{mutant.name}")
    for module in HOLDING
    for mutant in module.MUTANTS
]
RIGHT = {
    (mutant.correct, mutant.killed_by): mutant for module in HOLDING for mutant in module.MUTANTS
}
TWINS = [
    pytest.param(twin, id=f"{twin.kind.replace(' ', '-')}-{twin.name}")
    for module in HOLDING
    for twin in module.TWINS
]


def fails(plugin, kind, check):
    """Whether a check fails at the default profile; the rest of it is not run then."""
    prepared = prepare(plugin, kind=kind, only=[check], shrink=False)
    return any(
        record.status in BAD
        for scenario in prepared.scenarios()
        for record in prepared.records(scenario)
    )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_named_check_finds_the_mistake(mutant):
    assert fails(mutant.make(), mutant.kind, mutant.killed_by)


@pytest.mark.parametrize("twin", TWINS)
def test_what_is_right_passes_everything(twin):
    report = check_plugin(twin.make(), kind=twin.kind)
    assert report.ok, [(record.id, record.message) for record in report.failures]


@pytest.mark.parametrize("mutant", RIGHT.values(), ids=lambda mutant: mutant.name)
def test_the_right_plugin_beside_a_mutant_keeps_the_promise(mutant):
    """Or else the check would find something else than the mistake."""
    assert not fails(mutant.correct(), mutant.kind, mutant.killed_by)


@pytest.mark.parametrize("module", HOLDING, ids=lambda module: module.__name__.rpartition(".")[2])
def test_names_are_unique_and_bugs_are_sentences(module):
    names = [each.name for each in (*module.MUTANTS, *module.TWINS)]
    assert len(names) == len(set(names))
    for mutant in module.MUTANTS:
        assert mutant.bug.strip().endswith("."), mutant.name
