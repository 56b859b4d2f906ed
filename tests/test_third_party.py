"""Plugins of others, really installed: a good one works while three bad ones are named.

The good one is docs/example_plugin. The bad ones lie in tests/third_party: one that cannot be
imported, one that claims a name that is taken, one whose hook is misspelt. A fifth is what
`qframe new-plugin` writes. pip installs all of them into a folder of their own, without an index
and without build isolation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qframe.cli.new_plugin import write

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "docs" / "example_plugin"
BAD = {kind: HERE / "third_party" / kind for kind in ("broken", "duplicate", "misspelt")}

SHORT = ["--num-calibration-samples", "8", "--max-seq-length", "64", "--group-size", "16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a package that `qframe new-plugin` wrote."""
    folder = tmp_path_factory.mktemp("written") / "my-rounder"
    write("my-rounder", "rounder", folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory, written):
    """A folder with all packages installed."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder)]
    done = subprocess.run(
        [*command, str(EXAMPLE), str(written), *map(str, BAD.values())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def qframe_with(site, tmp_path):
    """Run a qframe command beside these plugins, from a folder that is not the repository."""

    def run(*arguments, **variables):
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200", **variables}
        environment.pop("QFRAME_STRICT_PLUGINS", None)
        environment.pop("QFRAME_DISABLE_PLUGINS", None)
        return subprocess.run(
            [sys.executable, "-m", "qframe", *arguments],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )

    return run


def test_the_good_one_quantizes_while_the_bad_ones_are_named(qframe_with, tiny_llama, tmp_path):
    out = tmp_path / "out"
    done = qframe_with(
        "quantize", str(tiny_llama), "-m", "descent", "--set", "sweeps=1", "-o", str(out), *SHORT,
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    layers = json.loads(done.stdout)["report"]["layers"]
    assert {layer["method"] for layer in layers} == {"descent"}
    assert all(0 < layer["info"]["rows_improved"] <= layer["rows"] for layer in layers)
    manifest = json.loads((out / "qframe.json").read_text())
    assert manifest["recipe"]["method"] == "descent"
    assert {
        "kind": "rounder",
        "name": "descent",
        "plugin": "descent",
        "source": "qframe-example-descent",
        "version": "0.1.0",
    } in manifest["plugins"]

    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    for words in (
        ["unwell", "qframe-test-broken", "qframe_test_a_package_that_nobody_has"],
        ["gptq", "qframe_test_duplicate of qframe-test-duplicate", "of qframe"],
        ["mistyped", "qframe-test-misspelt", "'qframe_rounder'", "mean 'qframe_rounders'"],
    ):
        assert any(all(word in line for word in words) for line in warnings), (words, done.stderr)


def test_the_good_one_is_on_the_screen_beside_rounding_to_nearest(
    qframe_with, tiny_llama, tmp_path
):
    done = qframe_with("quantize", str(tiny_llama), "-m", "descent", "-o", "out", *SHORT)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "self_attn.q_proj" in line]
    rows = [words for words in lines if words[0].endswith("self_attn.q_proj")]
    header = next(line for line in done.stdout.splitlines() if line.startswith("layer"))
    assert "RTN" in header
    assert "held out" in header
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("unwell", ["qframe-test-broken", "qframe_test_a_package_that_nobody_has"]),
        ("gptq", ["qframe-test-duplicate", "qframe_plugins.rounders.gptq of qframe"]),
        ("mistyped", ["qframe-test-misspelt", "did you mean 'qframe_rounders'?"]),
    ],
)
def test_asking_for_a_bad_one_says_what_is_wrong_with_it(qframe_with, tiny_llama, method, words):
    done = qframe_with("quantize", str(tiny_llama), "-m", method, "-o", "out", *SHORT)
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    for word in words:
        assert word in error
    assert not (tiny_llama.parent / "out").exists()


def test_the_list_of_plugins_shows_all_of_them(qframe_with):
    done = qframe_with("plugins", "--json")
    assert done.returncode == 0, done.stderr
    plugins = json.loads(done.stdout)["plugins"]
    status = {(plugin["source"], plugin["name"]): plugin["status"] for plugin in plugins}
    assert status["qframe-example-descent", "descent"] == "loaded"
    assert status["qframe-test-broken", "unwell"] == "failed"
    assert status["qframe-test-misspelt", "mistyped"] == "failed"
    assert status["qframe-test-duplicate", "gptq"] == status["qframe", "gptq"] == "failed"
    assert status["qframe", "rtn"] == status["qframe", "hessian"] == "loaded"


def test_without_the_impostor_gptq_is_back(qframe_with, tiny_llama, site, tmp_path):
    """Uninstalling the rival is the way out that the message names."""
    rivals = tmp_path / "elsewhere"
    rivals.mkdir()
    for file in site.iterdir():
        if "duplicate" not in file.name:
            (rivals / file.name).symlink_to(file)
    done = qframe_with(
        "quantize", str(tiny_llama), "-m", "gptq", "--dry-run", *SHORT, PYTHONPATH=str(rivals)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["example", "written"])
def test_its_own_tests_run_the_suite_on_it(site, tmp_path, package, written):
    folder = EXAMPLE if package == "example" else written
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
            "--rootdir", str(folder), "--import-mode=importlib", str(folder),
            "--qframe-profile", "fast",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "QFRAME_DISABLE_PLUGINS": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_suite_finds_it_by_its_name_beside_plugins_that_are_broken(qframe_with):
    done = qframe_with("check", "my-rounder", "--profile", "fast", "--only", "half_step")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "rounder 'my-rounder': 42 ran, 42 held, 0 failed"
    )


def test_a_plugin_that_failed_to_load_says_so_to_the_suite(qframe_with):
    done = qframe_with("check", "unwell")
    assert done.returncode == 2
    assert "unwell (qframe-test-broken) failed to load" in done.stderr
