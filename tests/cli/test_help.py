"""What a user sees first: help, version, and what happens after a typing mistake."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = (
    "quantize",
    "compare",
    "eval",
    "verify",
    "demo",
    "inspect",
    "plugins",
    "doctor",
    "check",
    "new-plugin",
)
HEAVY = ("torch", "numba", "transformers", "safetensors", "hypothesis")


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    shown = run(command, "--help")
    assert shown.code == 0
    assert "Usage: qframe" in shown.out
    assert "--debug" in shown.out


def test_help_lists_the_commands(run):
    shown = run("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in COMMANDS)


def test_version(run):
    assert run("--version").out.startswith("qframe 0.")


LISTINGS = (["--help"], ["plugins"], ["plugins", "--json"], ["quantize", "-h"], ["compare", "-h"])


@pytest.mark.parametrize("arguments", LISTINGS)
def test_listing_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from qframe.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: print('exit', stop.code or 0, file=sys.stderr)\n"
        f"print('loaded', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    ran = python(code)
    assert "exit 0" in ran.stderr
    assert "loaded []" in ran.stderr


def test_inspect_of_a_number_of_parameters_needs_no_torch():
    code = (
        "import sys\n"
        "from qframe.cli import main\n"
        "try: main(['inspect', '--params', '7e9'])\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    assert python(code).stderr.strip() == "False"


def test_it_runs_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "qframe", "--version"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    assert ran.stdout.startswith("qframe 0.")


def test_a_misspelt_command_gets_a_suggestion(run):
    failed = run("quantise", "model")
    assert failed.code == 2
    assert "Did you mean 'quantize'" in failed.err


def test_a_misspelt_option_gets_a_suggestion(run):
    failed = run("quantize", "model", "--group-sise", "64")
    assert failed.code == 2
    assert "--group-size" in failed.err


def test_numba_is_told_the_number_of_threads_before_it_is_imported():
    code = (
        "from qframe.cli.command import limit_threads\n"
        "limit_threads(1)\n"
        "import numba\n"
        "print(numba.config.NUMBA_NUM_THREADS, numba.get_num_threads())\n"
    )
    assert python(code).stdout.split() == ["1", "1"]
