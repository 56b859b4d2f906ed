"""The suite is judged: it fails every plugin with a mistake, and none that is right.

Every module of this folder that has MUTANTS and TWINS is taken, so a new file is tested without a
line here. `tests/mutants/mutant.py` says what they are. The tests are these; the files test_*.py
share the modules among them, for a file is what processes that test at once have in turn.
"""

import importlib
import os
from pathlib import Path

from qframe_conformance import check_plugin
from qframe_conformance.report import BAD
from qframe_conformance.suite import prepare

HERE = Path(__file__).parent
GROUPS = {
    "compiled": ("kernels_numba", "kernels_torch", "kernels_cuda"),
    "kernels": ("kernels_",),
    "rounders": ("rounders_", "gptq_"),
    "others": ("",),
}
"""File of tests, after test_ -> how the names of its modules begin; the first that fits has it."""


def modules(group):
    """Return the modules with mutants that a file of tests has."""
    found = []
    for file in sorted(HERE.glob("*.py")):
        mine = next(g for g, starts in GROUPS.items() if file.stem.startswith(starts))
        if mine == group and not file.stem.startswith("test_"):
            found.append(importlib.import_module(f"tests.mutants.{file.stem}"))
    return [module for module in found if hasattr(module, "MUTANTS")]


def of(group, one_in=1):
    """Return the hook that gives the tests of a file its modules, mutants, twins and right ones.

    one_in   of so many mutants one is taken, unless QFRAME_TEST_PROFILE=nightly
    """
    taken = modules(group)
    one_in = 1 if os.environ.get("QFRAME_TEST_PROFILE") == "nightly" else one_in
    mutants = [mutant for module in taken for mutant in module.MUTANTS][::one_in]
    right = {(mutant.correct, mutant.killed_by): mutant for mutant in mutants}
    given = {
        "module": taken,
        "mutant": mutants,
        "twin": [twin for module in taken for twin in module.TWINS],
        "beside": list(right.values()),
    }

    def name(each):
        kind = getattr(each, "kind", None)
        own = each.__name__.rpartition(".")[2] if kind is None else each.name
        return own if kind is None else f"{kind.replace(' ', '-')}-{own}"

    def pytest_generate_tests(metafunc):
        for argument, values in given.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=name)

    return pytest_generate_tests


def fails(plugin, kind, check):
    """Whether a check fails at the default profile; the rest of it is not run then."""
    prepared = prepare(plugin, kind=kind, only=[check], shrink=False)
    return any(
        record.status in BAD
        for scenario in prepared.scenarios()
        for record in prepared.records(scenario)
    )


def test_the_named_check_finds_the_mistake(mutant):
    assert fails(mutant.make(), mutant.kind, mutant.killed_by)


def test_what_is_right_passes_everything(twin):
    report = check_plugin(twin.make(), kind=twin.kind)
    assert report.ok, [(record.id, record.message) for record in report.failures]


def test_the_right_plugin_beside_a_mutant_keeps_the_promise(beside):
    """Or else the check would find something else than the mistake."""
    assert not fails(beside.correct(), beside.kind, beside.killed_by)


def test_names_are_unique_and_bugs_are_sentences(module):
    names = [each.name for each in (*module.MUTANTS, *module.TWINS)]
    assert len(names) == len(set(names))
    for mutant in module.MUTANTS:
        assert mutant.bug.strip().endswith("."), mutant.name
