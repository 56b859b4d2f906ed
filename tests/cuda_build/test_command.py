"""`qframe kernels build` on the kernels that come with qframe, and on anyone's PTX."""

import json
import re

import pytest
from typer.testing import CliRunner

import qframe.cli.app as program
from qframe.errors import MissingExtraError
from qframe_plugins.cuda_build import read_budgets, shipped, tools
from qframe_plugins.cuda_build.shipped import BUDGETS
from tests.cuda_build.test_tools import HEAD, kernel

try:
    tools.find("ptxas")
    NAMES = sorted(shipped.shipped())
except MissingExtraError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def run():
    def invoke(*words):
        done = CliRunner().invoke(program.app, ["kernels", "build", *map(str, words)])
        return done.exit_code, done.output

    return invoke


@pytest.fixture
def ptx(tmp_path):
    file = tmp_path / "mine.ptx"
    file.write_text(HEAD + kernel("dp4a"), encoding="utf-8")
    return file


def plain(output):
    return json.loads(output[output.index("{") :])


def test_every_kernel_has_a_budget_and_every_budget_a_kernel():
    assert sorted(read_budgets(BUDGETS).kernels) == NAMES


def test_all_budgets_are_kept(run):
    """No FP64, no 64-bit division, no local memory; dp4a, mma and wide loads are still there."""
    code, output = run("--json")
    found = plain(output)
    assert code == 0, [v for v in found["verdicts"] if not v["holds"]]
    built = {(each["kernel"], each["arch"]) for each in found["kernels"]}
    assert built == {(name, arch) for name in NAMES for arch in ("sm_80", "sm_90", "sm_100")}
    for word in ("fp64", "div64", "spills", "local", "dp4a", "mma", "load128"):
        assert any(verdict["what"] == word for verdict in found["verdicts"]), word


def test_a_broken_budget_names_kernel_architecture_expected_and_got(run, ptx, tmp_path):
    budgets = tmp_path / "budgets.toml"
    budgets.write_text("[kernels.mine.at_most]\ndp4a = 0\n", encoding="utf-8")
    code, output = run("--ptx", ptx, "--arch", "sm_90", "--budgets", budgets)
    assert code == 3
    said = "breaks its budget: mine, sm_90: dp4a: expected at most 0, got 1"
    assert said in re.sub(r"\s+", " ", output)


def test_what_is_accepted_is_kept_from_then_on(run, ptx, tmp_path):
    budgets = tmp_path / "budgets.toml"
    assert run("--ptx", ptx, "--write-budgets", budgets)[0] == 0
    assert run("--ptx", ptx, "--budgets", budgets)[0] == 0
    ptx.write_text(HEAD + kernel("fp64").replace("entry fp64", "entry dp4a"), encoding="utf-8")
    code, output = run("--ptx", ptx, "--budgets", budgets, "--json")
    assert code == 3
    broken = {v["what"] for v in plain(output)["verdicts"] if not v["holds"]}
    assert broken == {"fp64", "dp4a"}


def test_what_is_written(run, ptx, tmp_path):
    assert run("--ptx", ptx, "--arch", "sm_80", "-o", tmp_path / "out")[0] == 0
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    assert kept == {"mine.sm_80.ptx", "mine.sm_80.cubin", "mine.sm_80.sass"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no_such_kernel"], "there is no kernel 'no_such_kernel'"),
        (["--ptx", "none.ptx"], "expected a text of PTX"),
        (["--arch", "90", "--ptx", "{ptx}"], "expected something like sm_90"),
    ],
)
def test_what_cannot_be_built(run, ptx, words, said):
    code, output = run(*(word.format(ptx=ptx) for word in words))
    assert code == 2
    assert said in re.sub(r"\s+", " ", output)
