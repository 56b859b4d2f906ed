"""`qframe doctor`: every state it must tell apart, each with a next step where one is needed."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from qframe.cli import doctor as doctor_module
from qframe.cli.doctor import (
    examine,
    gpu_state,
    is_writable,
    model_cache_state,
    numba_cache_state,
    package_state,
    plugin_state,
)
from qframe.host import Host, PluginRecord


def not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def installed(name: str) -> str:
    return "1.2.3"


def broken() -> str:
    raise RuntimeError("libcuda.so: cannot open shared object file")


def test_no_gpu_is_no_problem():
    state = gpu_state({}, version=not_installed, files=())
    assert state.value.startswith("none")
    assert not state.next_step


def test_the_simulator_is_not_called_a_gpu():
    state = gpu_state({"NUMBA_ENABLE_CUDASIM": "1"}, version=installed, files=())
    assert state.value.startswith("simulator")
    assert not state.next_step


def test_a_real_gpu_is_seen_without_touching_its_driver(tmp_path):
    driver = tmp_path / "nvidiactl"
    driver.touch()
    state = gpu_state({}, version=installed, files=(str(driver),))
    assert state.value.startswith("real: numba-cuda 1.2.3")
    assert not state.next_step


def test_a_real_gpu_is_named_when_the_driver_may_be_asked():
    state = gpu_state({}, version=installed, files=(), probe=lambda: "H200")
    assert state.value == "real: H200, numba-cuda 1.2.3"


def test_a_driver_without_numba_cuda_gets_the_command_to_install_it(tmp_path):
    driver = tmp_path / "nvidiactl"
    driver.touch()
    state = gpu_state({}, version=not_installed, files=(str(driver),))
    assert 'pip install "qframe[cuda]"' in state.next_step


def test_a_broken_toolkit_never_fails_and_gets_a_next_step():
    state = gpu_state({}, version=installed, files=(), probe=broken)
    assert "libcuda.so" in state.value
    assert "nvidia-smi" in state.next_step


def test_a_missing_package_gets_a_next_step():
    assert "pip install" in package_state("numpy", version=not_installed).next_step


def test_a_package_that_cannot_be_imported_gets_a_next_step():
    def load(name: str) -> None:
        raise ImportError("undefined symbol")

    state = package_state("torch", version=installed, load=load)
    assert "undefined symbol" in state.value
    assert "torch==1.2.3" in state.next_step


def test_a_kernel_cache_that_cannot_be_written_gets_a_next_step(monkeypatch):
    monkeypatch.setattr(doctor_module, "is_writable", lambda folder: False)
    assert "NUMBA_CACHE_DIR" in numba_cache_state({}).next_step


def test_the_kernel_cache_is_where_numba_is_told_to_put_it(tmp_path):
    state = numba_cache_state({"NUMBA_CACHE_DIR": str(tmp_path / "kernels")})
    assert str(tmp_path / "kernels") in state.value
    assert not state.next_step


def test_a_model_cache_that_cannot_be_written_gets_a_next_step(tmp_path):
    file = tmp_path / "a_file_not_a_folder"
    file.touch()
    assert not is_writable(file)
    assert "QFRAME_CACHE" in model_cache_state(file).next_step


def test_a_failed_plugin_gets_a_next_step():
    def discover() -> Host:
        host = Host.discover()
        record = PluginRecord("bad", "bad-dist", "1.0", status="failed", error=ImportError("no x"))
        host.records.append(record)
        return host

    found = {finding.what: finding for finding in plugin_state(discover)}
    assert "ImportError: no x" in found["plugin bad"].value
    assert "QFRAME_DISABLE_PLUGINS=bad" in found["plugin bad"].next_step


def test_no_plugins_at_all_is_a_problem():
    assert plugin_state(Host)[0].next_step


def test_this_machine_has_no_problem_and_every_finding_has_a_value():
    findings = examine()
    assert all(finding.value for finding in findings)
    assert {"numpy", "numba", "torch", "threads", "gpu", "kernel cache"} <= {
        finding.what for finding in findings
    }


@pytest.mark.parametrize("problem", [False, True])
def test_the_exit_code_tells_of_problems(run, monkeypatch, problem):
    finding = doctor_module.Finding(what="x", value="y", next_step="do z" if problem else "")
    monkeypatch.setattr(doctor_module, "examine", lambda probe=None: [finding])
    shown = run("doctor", "--json")
    assert shown.code == (1 if problem else 0)
    assert json.loads(shown.out)["problems"] == int(problem)
    assert ("do z" in run("doctor").out) is problem
