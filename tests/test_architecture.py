"""The rules of the house, read from the source: who imports whom, and what no file may hold."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qframe
from qframe.host import Host

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "qframe": ROOT / "qframe",
    "qframe_plugins": ROOT / "plugins" / "qframe_plugins",
    "qframe_conformance": ROOT / "conformance" / "qframe_conformance",
}
FORBIDDEN = {
    "qframe": {"qframe_plugins", "qframe_conformance"},
    "qframe_plugins": {"qframe_conformance"},
    "qframe_conformance": {"qframe_plugins"},
}
"""Package -> what it must not import."""

LIBRARY = [file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))]
TESTS = [
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "docs" / "example_plugin").rglob("*.py")),
    ROOT / "conftest.py",
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(file):
    return str(file.relative_to(ROOT))


def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def places(file, nodes):
    """Say where nodes stand, for messages."""
    return [f"{name_of(file)}:{node.lineno}" for node in nodes]


def strings_of(tree):
    """Return the string constants of a module, docstrings aside."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node) is not None
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def imports_of(tree):
    """Return every import statement with the top-level packages that it names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.append((node, {alias.name.split(".")[0] for alias in node.names}))
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node, {node.module.split(".")[0]}))
    return found


# Who imports whom -----------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_the_packages_point_to_the_host(package):
    wrong = []
    for file in sorted(PACKAGES[package].rglob("*.py")):
        tree = tree_of(file)
        wrong += places(file, [n for n, named in imports_of(tree) if named & FORBIDDEN[package]])
        # importlib.import_module("qframe_plugins...") is an import too.
        wrong += places(
            file,
            [s for s in strings_of(tree) if s.value.split(".")[0] in FORBIDDEN[package]],
        )
    assert wrong == []


def test_nothing_is_imported_relatively():
    """An absolute import says which package is meant, wherever a file is moved."""
    wrong = []
    for file in LIBRARY:
        relative = [
            node
            for node in ast.walk(tree_of(file))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        wrong += places(file, relative)
    assert wrong == []


@pytest.mark.parametrize(
    "file", ["host.py", "observing.py", "solve.py", "verdicts.py", "walk.py", "pipeline.py"]
)
def test_the_host_names_no_algorithm(file):
    """What is special about an algorithm stands in its plugin, or in its declared capabilities."""
    host = Host.discover()
    algorithms = {*host.names("rounder"), *host.names("outlier handler"), "gptq", "awq"}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(algorithms)))})\b", re.IGNORECASE)
    path = PACKAGES["qframe"] / file
    named = [node for node in strings_of(tree_of(path)) if pattern.search(node.value)]
    assert places(path, named) == []


@pytest.mark.parametrize("package", ["qframe", "qframe.host", "qframe.cli"])
def test_importing_is_light(package):
    """So that a look at the version or the plugins takes no seconds."""
    code = f"import sys, {package}; print(sorted(sys.modules.keys() & {{'torch', 'numba'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What no file may hold ------------------------------------------------------------------------


def test_every_module_says_what_it_is():
    assert [name_of(f) for f in LIBRARY if not ast.get_docstring(tree_of(f))] == []


def test_library_code_has_no_assert():
    """`python -O` drops them, and pytest rewrites them, which numba cannot compile."""
    wrong = []
    for file in LIBRARY:
        wrong += places(file, [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.Assert)])
    assert wrong == []


def test_library_code_does_not_print():
    wrong = []
    for file in LIBRARY:
        calls = [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.Call)]
        wrong += places(
            file, [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        )
    assert wrong == []


def test_library_code_raises_errors_that_say_what_they_are():
    wrong = []
    for file in LIBRARY:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(raised, ast.Name) and raised.id in ("Exception", "BaseException"):
                    wrong += places(file, [node])
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong += places(file, [node])
    assert wrong == []


TOLERANCES = {"atol", "rtol", "abs_tol", "rel_tol", "abs", "rel", "delta", "decimal", "significant"}
COMPARERS = {"allclose", "isclose", "assert_allclose", "assert_close", "approx"}


def is_literal(value):
    """Whether an expression is made of numbers alone; 0 is no tolerance and passes."""
    parts = list(ast.walk(value))
    names = any(isinstance(part, (ast.Name, ast.Attribute, ast.Call)) for part in parts)
    numbers = [part.value for part in parts if isinstance(part, ast.Constant)]
    return not names and any(numbers)


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_tolerances_are_derived(file):
    """A literal tolerance says what happened to pass. Derive it: `qframe.bounds`."""
    wrong = []
    for call in ast.walk(tree_of(file)):
        if not isinstance(call, ast.Call):
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        called = call.func.id if isinstance(call.func, ast.Name) else called
        given = [k for k in call.keywords if k.arg in TOLERANCES]
        by_default = called in COMPARERS and not given  # which is a literal as well
        if by_default or any(is_literal(k.value) for k in given):
            wrong += places(file, [call])
    assert wrong == []


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        ("1e-3", True),
        ("-1e-3", True),
        ("2 * 1e-6", True),
        ("0", False),
        ("0.0", False),
        ("bound", False),
        ("2 * eps", False),
        ("np.finfo(np.float32).eps", False),
    ],
)
def test_the_rule_knows_a_literal_when_it_sees_one(value, literal):
    assert is_literal(ast.parse(value, mode="eval").body) is literal


# Public names, versions, the tested set ---------------------------------------------------------


def test_every_public_name_is_there():
    assert sorted(qframe.__all__) == sorted(set(qframe.__all__))
    for name in qframe.__all__:
        assert getattr(qframe, name) is not None
    modules = {file.stem for file in PACKAGES["qframe"].glob("*.py")}
    same = {name for name in qframe.__all__ if name in modules}
    assert {name for name in same if not inspect.ismodule(getattr(qframe, name))} == set(), (
        "once imported, the module would hide the public name"
    )
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qframe.quantise  # noqa: B018


def test_there_is_one_version():
    assert qframe.__version__ == PYPROJECT["project"]["version"]
    assert qframe.__version__ == importlib.metadata.version("qframe")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {qframe.__version__}" in changelog


def pins():
    """Return the tested set: name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        name, _, version = line.partition("==")
        assert version, f"constraints.txt: {line!r} is no pin"
        found[canonicalize_name(name)] = version
    return found


BY_THE_PLATFORM = re.compile(r"nvidia-|cuda-|triton|colorama|qframe$")
"""What torch, or the system, brings in a version of its own."""


def test_the_tested_set_holds_everything_that_qframe_asks_for():
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    asked += [*project["optional-dependencies"]["dev"], *project["optional-dependencies"]["cuda"]]
    pinned = pins()
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None and BY_THE_PLATFORM.match(requirement.name):
            continue
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), str(requirement)


def test_the_tested_set_holds_what_those_ask_for_in_turn():
    """Everything that is installed because of qframe[dev]; what a platform adds is its own."""
    pinned, waiting, seen = pins(), ["qframe[dev]"], set()
    while waiting:
        requirement = Requirement(waiting.pop())
        extras = tuple(sorted(requirement.extras))
        key = (canonicalize_name(requirement.name), extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needs:
            need = Requirement(text)
            wanted = [{"extra": extra} for extra in ("", *extras)]
            if need.marker is None or any(map(need.marker.evaluate, wanted)):
                waiting.append(text)
    missing = {name for name, _ in seen if name not in pinned and not BY_THE_PLATFORM.match(name)}
    assert missing == set()
