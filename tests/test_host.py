"""The host: a bad plugin is named and rolled back, and everything else goes on working."""

import dataclasses
import importlib
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from qframe.contracts import Capabilities
from qframe.errors import PluginError, RecipeError, UnknownNameError
from qframe.hookspecs import hookimpl
from qframe.host import KINDS, Host

DEFAULTS = ("rtn", "gptq")

ROUNDER = """
    from dataclasses import dataclass, field
    from typing import Literal

    from qframe import Capabilities, hookimpl

    @dataclass(frozen=True)
    class Mine:
        strength: float = 1.0
        steps: int = 3
        mode: Literal["soft", "hard"] = "soft"
        name: str = field(init=False, default="mine")
        needs: frozenset[str] = field(init=False, default=frozenset())
        capabilities: Capabilities = field(init=False, default=Capabilities())

        def round(self, problem, rng):
            return self.strength

    @hookimpl
    def qframe_rounders():
        return [Mine()]
"""


class Site:
    """A folder on sys.path with really installed distributions: dist-info folders and modules."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = []

    def install(self, distribution, points, /, version="1.2", **modules):
        """Write modules by name, and a dist-info folder with entry points {name: module}."""
        for name, source in modules.items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
            self.modules.append(name)
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {module}" for name, module in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[qframe]", *lines, ""]))
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("QFRAME_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("QFRAME_STRICT_PLUGINS", raising=False)
    made = Site(folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


def record_of(host, name):
    [record] = [record for record in host.records if record.name == name]
    return record


def everything_else_works(host):
    """The default plugins, that is: no bad neighbour may take them away."""
    names = {kind: host.names(kind) for kind in KINDS}
    assert set(DEFAULTS) <= set(names["rounder"])
    assert all(host.get("rounder", name).name == name for name in DEFAULTS)
    for kind, known in names.items():
        for name in known:
            host.get(kind, name)
    return True


# Entry points ---------------------------------------------------------------------------------


def test_the_default_plugins_come_through_entry_points_like_anyones():
    host = Host.discover()
    assert everything_else_works(host)
    assert {"absmax", "hessian"} <= set(host.names("observer"))
    assert {f"int{bits}" for bits in range(2, 9)} <= set(host.names("number format"))
    assert host.origin("rounder", "rtn").source == "qframe"


def test_an_installed_plugin_is_found_by_its_entry_point(site):
    site.install("my-method", {"mine": "mine_module"}, mine_module=ROUNDER)
    host = Host.discover()
    assert host.get("rounder", "mine").round(None, None) == 1
    record = host.origin("rounder", "mine")
    assert (record.name, record.source, record.version) == ("mine", "my-method", "1.2")
    assert (record.status, record.provides) == ("loaded", {"rounder": ["mine"]})
    assert everything_else_works(host)


def test_one_module_may_implement_several_hooks(site):
    source = (
        ROUNDER
        + """
    @dataclass(frozen=True)
    class Format:
        name: str = "int1"
        type: str = "int"
        num_bits: int = 1
        def grid(self, *, symmetric, scale_rule):
            return None

    @hookimpl
    def qframe_number_formats():
        return (f for f in [Format()])
    """
    )
    site.install("my-method", {"mine": "mine_module"}, mine_module=source)
    host = Host.discover()
    assert record_of(host, "mine").provides == {"rounder": ["mine"], "number format": ["int1"]}


def replaced(old, new, source=ROUNDER):
    """The good plugin with one thing changed."""
    assert textwrap.dedent(source).count(old) >= 1
    return textwrap.dedent(source).replace(old, new)


BROKEN = {
    "it imports what is not there": ("import not_there", "ModuleNotFoundError: No module named"),
    "it is not Python": ("def (:", "SyntaxError"),
    "it raises while imported": ("1 / 0", "ZeroDivisionError"),
    "it ends the program while imported": ("raise SystemExit(3)", "SystemExit while loading: 3"),
    "it implements nothing": ("x = 1", "implements no hook"),
    "its hook lacks the marker": (replaced("@hookimpl\n", ""), "is @hookimpl missing?"),
    "its hook is misspelt": (
        replaced("qframe_rounders", "qframe_rouders"),
        "unknown hook 'qframe_rouders'; did you mean 'qframe_rounders'?",
    ),
    "its hook takes arguments": (
        replaced("qframe_rounders()", "qframe_rounders(config)"),
        "config",
    ),
    "its hook raises": (replaced("return [Mine()]", "1 / 0"), "ZeroDivisionError"),
    "its hook ends the program": (replaced("return [Mine()]", "raise SystemExit"), "SystemExit"),
    "its hook raises half-way": (
        replaced("return [Mine()]", "yield Mine(); 1 / 0"),
        "ZeroDivisionError",
    ),
    "its hook returns a name": (
        replaced("return [Mine()]", "return 'mine'"),
        "hook qframe_rounders: expected an iterable of rounders, got str",
    ),
    "its hook returns one object": (
        replaced("return [Mine()]", "return Mine()"),
        "expected an iterable of rounders, got Mine",
    ),
    "its hook returns nothing": (
        replaced("return [Mine()]", "pass"),
        "expected an iterable of rounders, got NoneType",
    ),
    "its hook returns a class": (
        replaced("return [Mine()]", "return [Mine]"),
        "got the class Mine; return Mine()",
    ),
    "its object lacks a method": (
        replaced("def round", "def rounds"),
        "Rounder 'mine' has no 'round'",
    ),
    "its object's method is no method": (
        replaced("def round(self, problem, rng):\n        return self.strength", "round = 3"),
        "'round' must be a method",
    ),
    "its object's method lacks a parameter": (
        replaced("round(self, problem, rng)", "round(self, problem)"),
        "round(problem) should be round(problem, rng)",
    ),
    "its object's method has other parameters": (
        replaced("round(self, problem, rng)", "round(self, weight, hessian)"),
        "round(weight, hessian) should be round(problem, rng)",
    ),
    "its object has no name": (
        replaced('name: str = field(init=False, default="mine")', ""),
        "has no 'name'",
    ),
    "its object's name is a number": (
        replaced('default="mine"', "default=4"),
        "name must be a string",
    ),
    "its object's needs are a list": (
        replaced("default=frozenset()", "default_factory=list"),
        "needs must be a frozenset",
    ),
    "its object's capabilities are a dict": (
        replaced("default=Capabilities()", "default_factory=dict"),
        "capabilities must be qframe.Capabilities, got dict",
    ),
}


@pytest.mark.parametrize("flaw", BROKEN)
def test_a_broken_plugin_is_named_and_rolled_back(site, flaw):
    source, said = BROKEN[flaw]
    before = {kind: Host.discover().names(kind) for kind in KINDS}
    site.install("a-broken-one", {"flawed": "flawed_module"}, flawed_module=source)
    site.install("z-good-one", {"good": "good_module"}, good_module=ROUNDER)
    with pytest.warns(UserWarning, match="failed to load") as warned:
        host = Host.discover()
    [warning] = warned
    assert "flawed (a-broken-one)" in str(warning.message)
    assert said in str(warning.message)

    record = record_of(host, "flawed")
    assert (record.status, record.provides) == ("failed", {})
    with pytest.raises(PluginError, match=r"flawed \(a-broken-one\) failed to load") as error:
        host.get("rounder", "flawed")
    assert error.value.__cause__ is record.error

    assert everything_else_works(host)
    assert host.get("rounder", "mine").round(None, None) == 1
    before["rounder"] = sorted([*before["rounder"], "mine"])
    assert {kind: host.names(kind) for kind in KINDS} == before


def test_an_interrupt_is_the_users_and_not_the_plugins(site):
    site.install("slow", {"slow": "slow_module"}, slow_module="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Host.discover()


def test_a_broken_plugin_is_an_error_when_plugins_are_strict(site, monkeypatch):
    site.install("a-broken-one", {"flawed": "flawed_module"}, flawed_module="1 / 0")
    monkeypatch.setenv("QFRAME_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"flawed \(a-broken-one\).*ZeroDivisionError"):
        Host.discover()


# Names claimed twice --------------------------------------------------------------------------


def test_an_entry_point_that_two_distributions_claim_loads_from_neither(site):
    site.install("one", {"mine": "one_module"}, one_module=ROUNDER)
    site.install("other", {"mine": "other_module"}, other_module=ROUNDER)
    with pytest.warns(UserWarning, match="'mine' is claimed by"):
        host = Host.discover()
    assert "mine" not in host.names("rounder")
    with pytest.raises(PluginError, match=r"one_module of one and other_module of other"):
        host.get("rounder", "mine")
    assert everything_else_works(host)


def test_a_default_plugin_cannot_be_replaced_in_silence(site):
    site.install("impostor", {"rtn": "mine_module"}, mine_module=ROUNDER)
    with pytest.warns(UserWarning, match="'rtn' is claimed by"):
        host = Host.discover()
    with pytest.raises(PluginError, match=r"of impostor|impostor"):
        host.get("rounder", "rtn")
    assert host.get("rounder", "gptq").name == "gptq"


def test_an_object_that_two_plugins_provide_is_used_from_neither(site):
    site.install("one", {"first": "one_module"}, one_module=ROUNDER)
    site.install("other", {"second": "other_module"}, other_module=ROUNDER)
    host = Host.discover()
    assert "mine" not in host.names("rounder")
    with pytest.raises(PluginError, match=r"first \(one\) and second \(other\)"):
        host.get("rounder", "mine")
    [(key, owners)] = host.contested().items()
    assert (key, [owner.name for owner in owners]) == (("rounder", "mine"), ["first", "second"])
    assert everything_else_works(host)


def test_a_plugin_that_gives_one_name_to_two_objects_provides_neither(site):
    source = replaced("return [Mine()]", "return [Mine(1.0), Mine(2.0)]")
    site.install("my-method", {"mixed": "mine_module"}, mine_module=source)
    host = Host.discover()
    assert "mine" not in host.names("rounder")
    with pytest.raises(PluginError, match=r"'mine' is provided by mixed \(my-method\)"):
        host.get("rounder", "mine")


def test_a_distribution_seen_twice_on_the_path_is_loaded_once(site, tmp_path, monkeypatch):
    site.install("my-method", {"mine": "mine_module"}, mine_module=ROUNDER)
    again = Site(tmp_path / "again")
    again.folder.mkdir()
    again.install("my-method", {"mine": "mine_module"})
    monkeypatch.syspath_prepend(str(again.folder))
    host = Host.discover()
    assert host.get("rounder", "mine").name == "mine"
    assert len([record for record in host.records if record.name == "mine"]) == 1


def test_a_module_under_a_second_entry_point_does_not_harm_the_first(site):
    site.install("my-method", {"one": "mine_module", "two": "mine_module"}, mine_module=ROUNDER)
    with pytest.warns(UserWarning, match=r"two \(my-method\)"):
        host = Host.discover()
    assert host.origin("rounder", "mine").name == "one"


# Order ----------------------------------------------------------------------------------------


def rounder(name, **members):
    """A plugin object with one rounder."""

    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [
                SimpleNamespace(
                    **{
                        "name": name,
                        "needs": frozenset(),
                        "capabilities": Capabilities(),
                        "round": lambda problem, rng: name,
                        **members,
                    }
                )
            ]

    return Plugin()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_order_of_plugins_does_not_matter(order):
    host, added = Host(), []
    plugins = ["alpha", "beta", "twice", "twice"]
    for place in order:
        name = plugins[place]
        if name in added:
            with pytest.raises(PluginError, match="'twice' is provided by"):
                host.add(rounder(name), f"plugin{place}")
        else:
            host.add(rounder(name), f"plugin{place}")
        added.append(name)
    assert host.names("rounder") == ["alpha", "beta"]
    assert {owner.name for owner in host.contested()["rounder", "twice"]} == {"plugin2", "plugin3"}
    assert host.get("rounder", "alpha").round(None, None) == "alpha"


def test_a_plugin_object_is_refused_at_once_and_rolled_back():
    host = Host()
    host.add(rounder("good"), "good")
    with pytest.raises(PluginError, match="needs must be a frozenset"):
        host.add(rounder("bad", needs=["hessian"]), "bad")
    assert host.names("rounder") == ["good"]
    assert [record.status for record in host.records] == ["loaded", "failed"]
    host.add(rounder("bad"), "bad, mended")
    assert host.names("rounder") == ["bad", "good"]


# Disabling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_disabled_plugin_is_not_even_imported(site, monkeypatch, by_environment):
    site.install("my-method", {"mine": "mine_module"}, mine_module=ROUNDER)
    site.install("a-broken-one", {"flawed": "flawed_module"}, flawed_module="1 / 0")
    if by_environment:
        monkeypatch.setenv("QFRAME_DISABLE_PLUGINS", "mine,flawed")
    host = Host.discover(disable=() if by_environment else ("mine", "flawed"))
    assert {record_of(host, name).status for name in ("mine", "flawed")} == {"disabled"}
    assert "mine" not in host.names("rounder")
    assert "mine_module" not in sys.modules
    assert everything_else_works(host)


def test_disabling_one_of_two_rivals_frees_the_name(site):
    site.install("one", {"first": "one_module"}, one_module=ROUNDER)
    site.install("other", {"second": "other_module"}, other_module=ROUNDER)
    assert Host.discover(disable=["second"]).origin("rounder", "mine").source == "one"


def test_what_cannot_be_disabled_is_said_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"'gtpq'.*did you mean 'gptq'"):
        Host.discover(disable=["gtpq"])


# Single files ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    def write(source, name="my_method.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    yield write
    for name in [n for n in sys.modules if n.startswith("qframe_plugin_")]:
        del sys.modules[name]


def test_a_single_file_is_a_plugin(file):
    path = file(ROUNDER)
    host = Host.discover(files=[path])
    assert host.get("rounder", "mine").round(None, None) == 1
    assert host.origin("rounder", "mine").source == str(path)
    assert everything_else_works(host)


def test_the_objects_of_a_single_file_can_be_pickled(file):
    mine = Host.discover(files=[file(ROUNDER)]).get("rounder", "mine")
    assert pickle.loads(pickle.dumps(mine)) == mine


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(1)", "SystemExit"),
        ("x = 1", "implements no hook"),
        (replaced('default="mine"', 'default="rtn"'), "rounder 'rtn' is provided by"),
    ],
)
def test_a_single_file_that_cannot_be_used_is_an_error_at_once(file, source, said):
    path = file(source)
    with pytest.raises(PluginError, match=said) as error:
        Host.discover(files=[path])
    assert str(path) in str(error.value)


def test_a_file_that_failed_leaves_no_module_behind(file):
    path = file("1 / 0")
    for _ in range(2):
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            Host().add_file(path)
    assert not [name for name in sys.modules if name.startswith("qframe_plugin_")]
    file(ROUNDER)
    host = Host()
    host.add_file(path)
    assert host.names("rounder") == ["mine"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PluginError, match=r"nowhere\.py: no such file"):
        Host.discover(files=[tmp_path / "nowhere.py"])


# Names and options ----------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    host = Host.discover()
    with pytest.raises(UnknownNameError, match="unknown rounder 'gtpq'; did you mean 'gptq'"):
        host.get("rounder", "gtpq")
    with pytest.raises(UnknownNameError, match=r"known: .*gptq.*rtn"):
        host.get("rounder", "xyz")
    with pytest.raises(UnknownNameError, match="unknown observer 'rtn'"):
        host.get("observer", "rtn")


def test_options_are_the_fields_of_the_dataclass(file):
    host = Host.discover(files=[file(ROUNDER)])
    plain = host.get("rounder", "mine")
    assert host.configured("rounder", "mine", {}, "recipe") is plain
    changed = host.configured("rounder", "mine", {"strength": 2, "mode": "hard"}, "recipe")
    assert changed == dataclasses.replace(plain, strength=2.0, mode="hard")
    assert host.get("rounder", "mine") is plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"strenght": 2},
            "has no option 'strenght'; did you mean 'strength'? known: strength, steps, mode",
        ),
        ({"name": "other"}, "has no option 'name'"),
        ({"needs": []}, "has no option 'needs'"),
        ({"strength": "much"}, "option 'strength'"),
        ({"steps": 2.5}, "option 'steps'"),
        ({"mode": "medium"}, "option 'mode'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_place_and_the_value(file, options, said):
    host = Host.discover(files=[file(ROUNDER)])
    with pytest.raises(RecipeError) as error:
        host.configured("rounder", "mine", options, "recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: rounder 'mine'")
    assert said in str(error.value)
    [(key, value)] = options.items()
    assert key in str(error.value)
    assert key not in ("strength", "steps", "mode") or repr(value) in str(error.value)


def test_options_of_a_type_that_only_type_checkers_see_do_not_crash(file):
    source = replaced("from dataclasses", "from __future__ import annotations\nfrom dataclasses")
    source = source.replace("steps: int", "steps: NotDefinedAnywhere")
    host = Host.discover(files=[file(source)])
    with pytest.raises((RecipeError, PluginError), match="mine"):
        host.configured("rounder", "mine", {"strength": 2}, "recipe")


def test_an_object_without_options_says_so():
    with pytest.raises(RecipeError, match="'rtn' has no option 'speed'; it has no options"):
        Host.discover().configured("rounder", "rtn", {"speed": 3}, "recipe")


@pytest.mark.parametrize(
    "options",
    [{"dampening_frac": 0}, {"dampening_frac": -0.5}, {"actorder": "random"}, {"actordr": None}],
)
def test_the_options_of_gptq_are_checked(options):
    [key] = options
    with pytest.raises(RecipeError, match=key):
        Host.discover().configured("rounder", "gptq", options, "--set")


# Speed ----------------------------------------------------------------------------------------


def test_listing_plugins_imports_neither_torch_nor_numba():
    code = """
        import sys
        from qframe.host import Host
        assert "rtn" in Host.discover().names("rounder")
        print([name for name in ("torch", "numba", "transformers") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
