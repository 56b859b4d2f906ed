"""`qframe check`: what it prints, what it writes, how it exits; and commands of other packages."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

PLUGIN = '''
from dataclasses import dataclass, field, replace
import torch
from qframe import Capabilities, claims, hookimpl, rounding

@dataclass(frozen=True)
class Nearest:
    """Rounds to nearest, or `lean` of a step beside it."""

    lean: float = 0.0
    name: str = field(init=False, default="nearest")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Capabilities(
            num_bits=frozenset({4}), symmetric=frozenset({True}), strategies=frozenset({"channel"})
        ),
    )
    claims = (claims.HalfStep(),)

    def round(self, problem, rng):
        made = rounding.to_nearest(problem)
        step = rounding.expand(made.scale, made.group_index, len(problem.weight))
        codes = torch.round(problem.weight / step + self.lean)
        codes = codes.clamp(problem.grid.qmin, problem.grid.qmax).to(torch.int16)
        return replace(made, codes=codes)

@hookimpl
def qframe_rounders():
    return [Nearest()]
'''
LEANING = ("--set", "lean=0.25", "--in-process")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def check(run, file):
    """Check the rounder `nearest` of the file."""

    def call(*arguments):
        return run("check", "nearest", "--plugin", file, *arguments)

    return call


def test_a_plugin_that_keeps_its_promises_exits_with_0(check):
    shown = check()
    assert shown.code == 0, shown.said
    row = next(line for line in shown.out.splitlines() if line.startswith("half_step"))
    assert row.split()[1:4] == ["B1.b", "1", "5"]
    assert row.split()[-1] == "held"
    assert "the largest error/allowed of each theorem" in shown.out
    last = shown.out.splitlines()[-1]
    assert last.startswith("rounder 'nearest': ")
    assert " 0 failed, " in last
    assert last.endswith("(suite 1.0, profile default, seed 0)")
    assert max(map(len, shown.out.splitlines()[:-1])) <= 100


def test_one_that_does_not_exits_with_4_and_shows_how(check, tmp_path):
    shown = check(*LEANING, "--save", tmp_path / "found")
    assert shown.code == 4
    assert "FAILED half_step (B1.b)" in shown.out
    assert "host = Host.discover(files=" in shown.out
    assert "'lean': 0.25" in shown.out
    assert "print(replay('half_step'" in shown.out
    [script] = (tmp_path / "found").glob("*half_step*.py")
    assert script.with_suffix(".npz").is_file()
    done = subprocess.run([sys.executable, str(script)], cwd="/", capture_output=True, text=True)
    assert done.stdout.startswith("half_step is violated: "), done.stderr


OBSERVER = '''
class Energy:
    """The sum of squares of each column."""

    def __init__(self, columns):
        self.total = torch.zeros(columns, dtype=torch.float64)

    def update(self, x):
        self.total += x.double().square().sum(0)

    def merge(self, other):
        self.total += other.total

    def value(self):
        return self.total.clone()

class ObservesEnergy:
    name = "energy"

    def start(self, group):
        return Energy(group.columns)

@hookimpl
def qframe_observers():
    return [ObservesEnergy()]
'''


def test_a_rounder_may_need_an_observer_of_its_own_file(check, file, tmp_path):
    """Which finds that the rounder looks at no energy; the script finds the observer too."""
    file.write_text(
        PLUGIN.replace("default=frozenset()", 'default=frozenset({"energy"})') + OBSERVER
    )
    shown = check("--profile", "fast", "--save", tmp_path / "found")
    assert "declarations" in shown.out
    assert "FAILED declarations" not in shown.out
    assert "energy is needed, but the same codes come out whatever it is" in shown.out
    [script] = (tmp_path / "found").glob("*.py")
    done = subprocess.run([sys.executable, str(script)], cwd="/", capture_output=True, text=True)
    assert done.stdout.startswith("calibration is violated: energy is needed"), done.stderr
    assert check("--profile", "fast", "--in-process").code == shown.code == 4


def test_json_is_the_report_and_nothing_else(check):
    shown = check(*LEANING, "--json", "--only", "half_step", "--seed", "5")
    assert shown.code == 4
    found = json.loads(shown.out)
    assert found["ok"] is False
    [report] = found["reports"]
    assert (report["plugin"], report["kind"], report["seed"]) == ("nearest", "rounder", 5)
    assert {record["check"] for record in report["records"]} == {"half_step"}
    assert report["worst"]["B1.b"] > 1


def test_a_known_failure_is_none_and_must_not_pass(check):
    known = ("--only", "half_step", "--expect-failure", "half_step=it leans, see #12")
    shown = check(*LEANING, *known)
    assert shown.code == 0, shown.out
    assert "expected failure: it leans, see #12" in " ".join(shown.out.split())
    assert "1 expected failure" in shown.out
    surprised = check(*known, "--in-process")
    assert surprised.code == 4
    assert "expected to fail (it leans, see #12), but it holds" in surprised.out


def test_zero_checks_are_a_failure(check):
    shown = check("--only", "gptq_residual", "--in-process")
    assert shown.code == 4
    assert "Babai is not claimed" in shown.out
    assert "nothing was tested, which is no pass" in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nearset"], "no plugin is called 'nearset'; did you mean 'nearest'?"),
        (["nearest", "--kind", "observer"], "unknown observer 'nearest'"),
        (["nearest", "--kind", "roundr"], "did you mean 'rounder'?"),
        (["nearest", "--profile", "quick"], "unknown profile 'quick'"),
        (["nearest", "--only", "halfstep"], "did you mean 'half_step'?"),
        (["nearest", "--set", "lien=1"], "has no option 'lien'; did you mean 'lean'?"),
        (["nearest", "--expect-failure", "half_step"], "expected CHECK=REASON"),
        (["nearest", "--suite", "9.9"], "there is no version '9.9' of the suite"),
        ([], "give the NAME of a plugin, or --all"),
        (["nearest", "--all"], "give the NAME of a plugin, or --all"),
        (["--all", "--only", "half_step"], "--only is about one plugin"),
    ],
)
def test_a_mistake_is_an_error_with_the_way_out(run, file, arguments, words):
    failed = run("check", *arguments, "--plugin", file, "--in-process")
    assert failed.code == 2
    assert words in failed.said


def test_a_name_of_two_kinds_asks_for_the_kind(run, file):
    observer = """
class Seen:
    name = "nearest"
    def start(self, group):
        raise NotImplementedError

@hookimpl
def qframe_observers():
    return [Seen()]
"""
    file.write_text(PLUGIN + observer)
    failed = run("check", "nearest", "--plugin", file, "--in-process")
    assert failed.code == 2
    assert "'nearest' is the name of several plugins (observer, rounder)" in failed.said
    assert "--kind" in failed.said


def test_the_backend_is_name_enough_for_its_only_kernel(run, file):
    kernel = """
from qframe.contracts import Unsupported

class Slow:
    op, backend = "dequantize", "slow"

    def supports(self, call):
        return None if call.op == self.op and call.device == "cpu" else Unsupported("no")

    def __call__(self, codes, scale, zero_point, group_index):
        group = group_index.long()
        return (codes.float() - zero_point[:, group].float()) * scale[:, group]

@hookimpl
def qframe_kernels():
    return [Slow()]
"""
    file.write_text(PLUGIN + kernel)
    arguments = ("--plugin", file, "--in-process", "--profile", "fast")
    shown = run("check", "slow", *arguments)
    assert shown.code == 0, shown.said
    assert shown.out.splitlines()[-1].startswith("kernel 'dequantize/slow': ")
    assert "it says nothing about" not in shown.out
    file.write_text(
        PLUGIN
        + kernel.replace("[Slow()]", "[Slow(), Other()]").replace(
            "@hookimpl", "class Other(Slow):\n    op = 'linear_weight_only'\n\n@hookimpl"
        )
    )
    failed = run("check", "slow", *arguments)
    assert failed.code == 2
    assert "say which: dequantize/slow, linear_weight_only/slow" in failed.said


def test_a_hang_is_reported_with_its_place(check, file):
    file.write_text(PLUGIN.replace("made = ", "while True: pass\n        made = "))
    shown = check("--only", "half_step", "--time-limit", "1")
    assert shown.code == 4
    said = " ".join(shown.out.split())
    assert "CRASHED comes_back" in said
    assert "did not come back within 1 s, in case 1, in round at" in said


def test_all_checks_every_plugin_that_is_there(run, monkeypatch, tmp_path):
    from qframe_conformance import target

    def some(files, disable):
        found, _, _ = everything(files, disable)
        return [each for each in found if each.name == "absmax"], ["plugin x failed"], ["not y"]

    everything = target.all_targets
    found, problems, elsewhere = everything()
    assert {each.name for each in found}.isdisjoint({"hadamard/cuda", "hadamard/ptx_host"})
    assert all(f"hadamard/{backend}" in " ".join(elsewhere) for backend in ("cuda", "ptx_host"))
    assert {("rounder", "rtn"), ("observer", "hessian")} <= {(t.kind, t.name) for t in found}
    assert problems == []
    monkeypatch.setattr(target, "all_targets", some)
    shown = run("check", "--all", "--in-process", "--profile", "fast", "--save", tmp_path / "all")
    assert shown.code == 4  # a plugin that failed to load is not all right
    assert "plugin x failed" in shown.said
    assert "not y" in shown.said
    lines = [line for line in shown.out.splitlines() if " ran, " in line]
    assert any(line.startswith("observer 'absmax': ") for line in lines)
    assert (tmp_path / "all" / "observer-absmax" / "report.md").is_file()


def test_a_kernel_that_this_machine_cannot_run_is_no_pass_and_says_why(run, monkeypatch):
    from qframe import Unsupported
    from qframe_plugins.kernels import cuda_ops

    monkeypatch.setattr(cuda_ops, "_absent", lambda backend: Unsupported("no such device"))
    shown = run("check", "hadamard/cuda", "--in-process")
    assert shown.code == 2
    assert "'hadamard/cuda' cannot run on this machine: no such device" in shown.said


# Commands of other packages ---------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """Pretend that packages with these entry points are installed."""
    real = importlib.metadata.entry_points

    def pretend(**points):
        made = [
            importlib.metadata.EntryPoint(name.replace("_", "-"), value, "qframe.commands")
            for name, values in points.items()
            for value in values
        ]

        def entry_points(**wanted):
            if wanted.get("group") == "qframe.commands":
                return [*real(**wanted), *made]
            return real(**wanted)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return pretend


def test_a_command_of_another_package_is_listed_and_run(run, commands, monkeypatch):
    import types

    def greet(name: str, loud: bool = False) -> None:
        """Say hello."""
        import typer

        typer.echo(f"hello {name}{'!' if loud else ''}")

    module = types.ModuleType("qframe_test_greeting")
    module.greet = greet
    monkeypatch.setitem(sys.modules, module.__name__, module)
    commands(greet_me=["qframe_test_greeting:greet"])
    assert "Say hello." in run("--help").out
    assert run("greet-me", "you", "--loud").out == "hello you!\n"
    assert "Did you mean 'greet-me'" in run("greet-mi", "you").err


def test_a_group_of_commands_of_another_package(run, commands, monkeypatch):
    import types

    import typer

    from qframe.cli.command import Command
    from qframe.errors import RecipeError

    group = typer.Typer(help="Greetings.", no_args_is_help=True)

    @group.callback()
    def _greetings() -> None:
        """Greetings."""

    @group.command("hello", cls=Command)
    def hello(name: str) -> None:
        """Say hello."""
        if name == "nobody":
            raise RecipeError("there is nobody to greet")
        typer.echo(f"hello {name}")

    module = types.ModuleType("qframe_test_greetings")
    module.group = group
    monkeypatch.setitem(sys.modules, module.__name__, module)
    commands(greetings=["qframe_test_greetings:group"])
    assert "Greetings." in run("--help").out
    assert "Say hello." in run("greetings", "--help").out
    assert run("greetings", "hello", "you").out == "hello you\n"
    refused = run("greetings", "hello", "nobody")
    assert refused.code == 2
    assert "there is nobody to greet" in refused.said


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (["no_such_module_here:check"], "cannot be loaded: ModuleNotFoundError"),
        (["qframe.cli.flags:discover", "qframe.cli.flags:failed"], "is claimed by"),
        (["qframe.cli.screen:WIDTH"], "is no function for typer"),
    ],
)
def test_a_command_that_does_not_work_says_so_and_the_others_work(run, commands, points, words):
    commands(odd=points)
    assert run("--help").code == 0
    failed = run("odd", "--anything", "else")
    assert failed.code == 2
    assert words in failed.said
    assert run("plugins", "--help").code == 0


def test_a_command_of_qframe_cannot_be_taken_over(run, commands):
    commands(plugins=["no_such_module_here:plugins"])
    assert run("plugins", "--json").code == 0
