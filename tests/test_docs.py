"""The documents say what the code does: signatures, keys, presets, aliases, exit codes, commands.

Blocks of Python and of shell are run by the root conftest.py; here is what they cannot show.
"""

import ast
import doctest
import importlib
import inspect
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

from qframe import blocks as blocks_of_layers
from qframe import contracts, errors, hookspecs
from qframe.cli.app import app
from qframe.host import KINDS, Host, option_names
from qframe.recipe import OPTION_ALIASES, CalibrationSettings, Recipe
from qframe.scheme import PRESETS, Scheme

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "example_plugin").glob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOOKS = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(text, language):
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections(text):
    """Return heading -> what stands below it, up to the next heading."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def plain(text):
    """Return a text without line breaks."""
    return " ".join(text.split())


def rows(text):
    """Return the cells of all table rows, without backticks."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.replace("`", "").strip() for cell in line.strip("|").split(" | ")] for line in lines
    ]


# docs/hooks.md --------------------------------------------------------------------------------


def definitions(source):
    """Return the functions and classes of a source text by name, without docstrings and bodies."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {line for part in node.body if (line := signature(part)) is not None}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
    return found


def signature(node):
    """Return a method or an attribute as one line; None for what is no part of a contract."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node)
    if isinstance(node, ast.FunctionDef):
        decorated = [ast.unparse(d) for d in node.decorator_list if ast.unparse(d) != "hookspec"]
        if decorated:  # a property: said in words
            return None
        return f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    return None


def shown():
    """Return the definitions that docs/hooks.md shows."""
    found = {}
    for block in blocks(HOOKS, "python"):
        found.update(definitions(block) if "@hookimpl" not in block else {})
    return found


def hooks():
    return [hook for hook, _ in KINDS.values()]


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_has_its_section_signature_and_meaning(hook):
    assert shown()[hook] == definitions(inspect.getsource(hookspecs))[hook]
    meaning = plain(inspect.getdoc(getattr(hookspecs, hook)))
    assert meaning in plain(sections(HOOKS)[hook])


def test_no_hook_is_missing_and_none_is_made_up():
    specified = {name for name in vars(hookspecs) if name.startswith("qframe_")}
    assert set(hooks()) == specified
    assert {heading for heading in sections(HOOKS) if heading.startswith("qframe_")} == specified


def contract_names():
    used = {
        "LayerOutline",
        "Statistic",
        "Rewrite",
        "RewriteProblem",
        "RoundingProblem",
        "QuantizedWeight",
        "Grid",
        "OpCall",
    }
    used |= {"Unsupported", "LayerInfo", "InputGroup", "Capabilities", "Event"}
    used |= {"KVStore", "KVBlock", "KVAttention", "Checkpoint", "CodedLayer", "CodedWeight"}
    return sorted(used | {contract.__name__ for _, contract in KINDS.values()})


@pytest.mark.parametrize("name", ["BlockProblem", "BlockRounder"])
def test_what_learns_blocks_is_shown_as_it_is(name):
    lines = definitions(inspect.getsource(blocks_of_layers))[name]
    if name == "BlockProblem":
        lines = {line for line in lines if not line.startswith("def ")}
    assert shown()[name] == lines


@pytest.mark.parametrize("name", contract_names())
def test_every_contract_is_shown_as_it_is(name):
    lines = {
        line
        for line in definitions(inspect.getsource(contracts))[name]
        if not line.startswith("def ") or inspect.isclass(getattr(contracts, name))
    }
    methods = {line for line in lines if line.startswith("def ")}
    if not getattr(getattr(contracts, name), "_is_protocol", False):
        lines -= methods  # methods of a dataclass are conveniences, not duties
    assert shown()[name] == lines


def test_every_class_of_the_contracts_is_in_the_document():
    defined = {
        name
        for name, value in vars(contracts).items()
        if inspect.isclass(value) and value.__module__ == contracts.__name__
    }
    assert defined == set(contract_names())


# docs/recipes.md ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "model"),
    [("Keys", Recipe), ("Scheme", Scheme), ("Calibration", CalibrationSettings)],
)
def test_every_key_of_a_recipe_is_explained(section, model):
    assert {row[0] for row in rows(sections(RECIPES)[section])[1:]} >= set(model.model_fields)


@pytest.mark.parametrize(
    ("section", "model"), [("Keys", Recipe()), ("Calibration", CalibrationSettings())]
)
def test_the_defaults_of_keys_are_as_explained(section, model):
    for key, default, *_ in rows(sections(RECIPES)[section])[1:]:
        value = getattr(model, key)
        if isinstance(value, (str, int, float)):
            assert str(value) == default, key


@pytest.mark.parametrize(
    ("name", "section", "derived"),
    [
        ("gptq", "Options of GPTQ", "by actorder"),
        ("hqq", "Options of HQQ", ""),
        ("autoround", "Options of AutoRound", "1 / iterations"),
        ("autoround_block", "Options of AutoRound for blocks", "1 / iterations"),
    ],
)
def test_the_defaults_of_rounders_are_as_explained(name, section, derived):
    rounder = Host.discover().get("rounder", name)
    explained = {key: default for key, default, _ in rows(sections(RECIPES)[section])[1:]}
    assert set(explained) == set(option_names(rounder))
    for key, default in explained.items():
        assert default in (str(getattr(rounder, key)), derived)


def test_every_preset_is_listed():
    listed = {row[0] for row in rows(sections(RECIPES)["Scheme"]) if row[0].isupper()}
    assert listed == set(PRESETS)


def test_every_alias_is_listed():
    aliases = {**Recipe.aliases, **Scheme.aliases, **CalibrationSettings.aliases, **OPTION_ALIASES}
    listed = {}
    for here, there in rows(sections(RECIPES)["Aliases"])[1:]:
        names = re.findall(r"\w+", there)
        listed.update({name: here for name in names if aliases.get(name) == here})
    assert listed == aliases


def test_every_error_is_listed_with_its_exit_code():
    listed = {}
    for code, _, names in rows(sections(RECIPES)["Exit codes"])[1:]:
        listed.update(dict.fromkeys(re.findall(r"\w+Error", names), int(code)))
    defined = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.QframeError)
    }
    defined.pop("QframeError")
    defined.pop("UncalibratedLayerError", None)  # becomes a fallback, or is a CalibrationError
    assert {**defined, **listed} == {**listed, **defined}
    assert set(defined) <= set(listed)


def test_the_table_of_keys_names_options_that_exist():
    quantize = typer.main.get_command(app).get_command(None, "quantize")
    known = {name for option in quantize.params for name in (*option.opts, *option.secondary_opts)}
    used = set(re.findall(r"(?<![\w-])--?[a-z][a-z_-]*", " ".join(map(str, rows(RECIPES)))))
    assert {option.replace("_", "-") for option in used} <= known


# README.md, .ci/run, Makefile -----------------------------------------------------------------


def setup_command(name):
    """Return the README's command below the comment <!-- setup: NAME -->."""
    [command] = re.findall(rf"^<!-- setup: {name} -->\n```bash\n(.*)\n```$", README, re.MULTILINE)
    return command


def test_two_commands_do_everything():
    install = setup_command("install and demo")
    assert install.endswith("&& .venv/bin/qframe demo")
    assert "-c constraints.txt" in install
    assert setup_command("test") == ".venv/bin/pytest -n auto --dist loadfile"


def test_ci_takes_its_commands_from_the_readme():
    """It reads the same comments, so both cannot differ."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("install and demo", "test"):
        assert f'readme_command "{name}"' in script


def test_make_lint_is_what_ci_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    assert recipes["check"].strip() == ".ci/run"
    for command in recipes["lint"].split("\n"):
        assert command.strip() in script
    assert recipes["test"].strip() == setup_command("test")


def test_the_plugin_of_the_readme_has_25_lines():
    [plugin] = [block for block in blocks(README, "python") if "def qframe_rounders" in block]
    assert len([line for line in plugin.splitlines() if line.strip()]) <= 25


def test_the_demo_table_has_its_place():
    start, end = README.index("<!-- demo-table:start -->"), README.index("<!-- demo-table:end -->")
    assert start < end


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), target
        if anchor:
            headings = sections(there.read_text(encoding="utf-8"))
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_commands_of_qframe_are_spelt_as_they_are(document):
    """Also those that the documents' session does not run."""
    commands = typer.main.get_command(app)
    for block in blocks(document.read_text(encoding="utf-8"), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "qframe":
                command = commands.get_command(None, words[1])
                assert command is not None, line
                if not line.endswith("# exit code 2"):
                    command.make_context(words[1], words[2:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_modules_and_functions_that_are_named_are_there(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`(qframe(?:_plugins|_conformance)?(?:\.\w+)+)`", text):
        module, _, last = name.rpartition(".")
        if last not in ("json", "yaml"):  # a file
            assert hasattr(importlib.import_module(module), last) or find_spec(name), name


# Docstrings -----------------------------------------------------------------------------------


def modules_with_examples():
    roots = {"qframe": ROOT, "qframe_plugins": ROOT / "plugins"}
    roots["qframe_conformance"] = ROOT / "conformance"
    return [
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for package, root in roots.items()
        for file in sorted((root / package).rglob("*.py"))
        if ">>> " in file.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_are_right(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
