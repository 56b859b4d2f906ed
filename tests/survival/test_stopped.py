"""How a run ends that cannot go on: interrupts, a full disk, no memory, another run, bad files."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import qframe
from qframe import checkpoint, pipeline, shards, solve, unfinished
from qframe.cli.interrupts import interruptible
from qframe.errors import LockedError, MemoryLimitError, OutputError, VerifyError
from qframe.out_of_memory import Where, bytes_asked, memory_named
from qframe.unfinished import kept_blocks, unfinished_folder
from qframe.verdicts import verdict
from qframe.walk import Walk
from tests.survival.conftest import FLAGS

HANGS = 60  # seconds after which a test fails

SCRIPT = Path(__file__).parent.parent / "comparison" / "killed.py"

# Interrupts -------------------------------------------------------------------------------------

LONG = [*FLAGS[:-4], "--num-calibration-samples", "128", "--max-seq-length", "128"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def begun(model, out, until):
    """Begin a run, and come back when it has said `until`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qframe", "quantize", str(model), "-o", str(out), *LONG],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell's background job ignores interrupts, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    said = ""
    while until not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(
    model, recipe, contents, undisturbed, run, tmp_path, number
):
    out = tmp_path / "my out"
    process = begun(model, out, "[1/5]")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if "to go on:" in line)
    assert re.search(r"[1-4] of 5 blocks (is|are) kept", line)
    program, *words = shlex.split(line.partition("to go on: ")[2])
    assert program == "qframe"
    assert words[-1] == "--resume"
    assert run(*words).code == 0
    calibration = {"num_calibration_samples": 128, "max_seq_length": 128}
    assert contents(out) == undisturbed(recipe("gptq", calibration=calibration))


def test_the_second_interrupt_ends_the_process_at_once(run, model, tmp_path, monkeypatch):
    """Whatever the first one waits for."""
    code = f"""
import os, signal, sys, threading
from qframe.cli import main
from qframe.solve import Solver

def solve(self, group, *arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
Solver.solve = solve
main({["quantize", str(model), "-o", str(tmp_path / "out"), *FLAGS]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=50)
    assert done.returncode == -signal.SIGINT


def test_handlers_of_the_caller_are_put_back(run, model, tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run("quantize", model, "-o", tmp_path / "out", "--group-size", "32").code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_any_other_error_says_how_to_go_on_too(run, model, tmp_path, monkeypatch):
    rounded = solve.Solver._round

    def fail(self, problem):
        if problem.name.startswith("model.layers.3."):
            raise ZeroDivisionError("of a plugin")
        return rounded(self, problem)

    monkeypatch.setattr(solve.Solver, "_round", fail)
    failed = run("quantize", model, "-o", tmp_path / "out", *FLAGS, "--restart", "--threads", "1")
    assert failed.code == 1
    assert "3 of 5 blocks are kept; to go on: qframe quantize" in failed.said
    assert failed.said.endswith("--threads 1 --resume")
    refused = run("quantize", model, "-o", tmp_path / "out", *FLAGS)
    assert refused.code == 2
    assert "--restart" in refused.said
    assert "to go on" not in refused.said


def test_numbers_that_are_not_right_would_be_the_same_again(run, tiny, tmp_path):
    model = tiny.write_llama(tmp_path / "model", layers=5)
    weights = tiny.llama_weights(tied=True, vocab_size=256, layers=5)
    weights["model.layers.3.input_layernorm.weight"] *= torch.finfo(torch.float32).max
    tiny.save_weights(model, weights)
    failed = run("quantize", model, "-o", tmp_path / "out", *FLAGS, "--threads", "1")
    assert failed.code == 3
    assert "to go on" not in failed.said
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_resume_and_restart_are_one_too_many(run, model, tmp_path):
    failed = run("quantize", model, "-o", tmp_path / "out", "--resume", "--restart")
    assert failed.code == 2
    assert "choose one" in failed.said


def test_resume_says_where_it_begins(run, model, tmp_path):
    done = run("quantize", model, "-o", tmp_path / "out", "--group-size", "32", "--resume")
    assert done.code == 0
    assert "nothing to resume" in done.said


# The disk ---------------------------------------------------------------------------------------


def full(*arguments, **options):
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    ("module", "function"), [(shards, "put_before"), (unfinished, "write_tensors")]
)
def test_a_full_disk_says_what_is_needed_and_keeps_what_is_done(
    model, recipe, contents, undisturbed, tmp_path, monkeypatch, module, function
):
    save, calls = getattr(module, function), []

    def save_some(*arguments, **options):
        calls.append(arguments)
        if module is shards or len(calls) > 2:
            full()
        return save(*arguments, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, function, save_some)
        with pytest.raises(
            OutputError, match=r"cannot write .*out.*: No space left.*takes [\d.]+ kB.* are free"
        ):
            qframe.quantize(model, recipe("gptq"), out=out)
    done, _ = kept_blocks(out)
    assert done == (5 if module is shards else 2)
    assert not (unfinished_folder(out) / "folder").exists()
    qframe.quantize(model, recipe("gptq"), out=out, state="resume")
    assert contents(out) == undisturbed(recipe("gptq"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are a process's own")
@pytest.mark.parametrize("limit", [1 << 14, 1 << 16])
def test_a_file_that_the_system_will_not_let_grow(model, tmp_path, limit):
    """A real limit, at different files of the run."""
    flags = ["--group-size", "32"]
    code = f"""
import resource, signal
from qframe import checkpoint, cli

def limited(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return begin(self)

# Not before there is a folder: numba keeps kernels in files, too.
begin, checkpoint.CheckpointWriter.__enter__ = checkpoint.CheckpointWriter.__enter__, limited
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.main({["quantize", str(model), "-o", str(tmp_path / "out"), *flags]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(r"cannot write \S+: File too large; it takes", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_may_not_be_written_is_named_before_any_work(
    model, recipe, tmp_path, monkeypatch, code
):
    make = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name.startswith(".out"):
            raise OSError(code, os.strerror(code), str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("this is work"))
    with pytest.raises(OutputError, match=rf"{re.escape(os.strerror(code))}; choose a place"):
        qframe.quantize(model, recipe("gptq"), out=tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "qframe_report.json"])
def test_every_other_file_is_named_too(model, recipe, tmp_path, monkeypatch, name):
    write, copy = Path.write_text, checkpoint.shutil.copyfile

    def refuse(path):
        if Path(path).name == name and "unfinished" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", lambda p, *a, **k: refuse(p) or write(p, *a, **k))
    monkeypatch.setattr(checkpoint.shutil, "copyfile", lambda a, b: refuse(b) or copy(a, b))
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: No space left"):
        qframe.quantize(model, recipe(), out=tmp_path / "out")


# Memory -----------------------------------------------------------------------------------------

TORCH = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 34000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def at_layer(method, layer, error):
    """Return a method that fails for a layer of block 2."""

    def fail(self, first, *arguments, **options):
        name = getattr(first, "name", None) or first.report.name
        if name == f"model.layers.2.{layer}":
            raise error
        return method(self, first, *arguments, **options)

    return fail


@pytest.mark.parametrize("error", [MemoryError(), TORCH])
@pytest.mark.parametrize(
    ("owner", "method", "stage"),
    [
        (solve.Watch, "look", "taking statistics"),
        (solve.Solver, "_rewrite", "taking statistics"),
        (solve.Solver, "_round", "rounding it"),
    ],
)
def test_memory_that_runs_out_is_told_with_layer_and_stage(
    model, recipe, tmp_path, monkeypatch, error, owner, method, stage
):
    layer = "self_attn.q_proj"
    monkeypatch.setattr(owner, method, at_layer(getattr(owner, method), layer, error))
    with pytest.raises(MemoryLimitError) as found:
        qframe.quantize(model, recipe("gptq"), out=tmp_path / "out", threads=1)
    said = str(found.value)
    assert said.startswith(f"model.layers.2.{layer}: out of memory while {stage}")
    assert ("34.0 GB asked" in said) == (error is TORCH)
    assert "free" in said
    assert "--num-calibration-samples" in said
    assert "--max-seq-length" in said
    assert kept_blocks(tmp_path / "out") == (2, 5)


def test_memory_of_the_forward_pass_and_of_verdicts(model, recipe, tmp_path, monkeypatch):
    def fail(judged, *arguments):
        if judged.report.name.startswith("model.layers.1.mlp.up"):
            raise MemoryError
        return verdict(judged, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(solve, "verdict", fail)
        with pytest.raises(
            MemoryLimitError, match=r"^model\.layers\.1\.mlp\.up_proj: .* while measuring"
        ):
            qframe.quantize(model, recipe("gptq"), out=tmp_path / "out")

    def no_room(*arguments, **options):
        raise TORCH

    monkeypatch.setattr(torch.nn.functional, "silu", no_room)
    with pytest.raises(MemoryLimitError, match=r"^model\.layers\.0.* while running the network"):
        qframe.quantize(model, recipe("gptq"), out=tmp_path / "other")


def test_without_text_less_text_is_no_help(model, recipe, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(Walk, "without_data", fail)
    with pytest.raises(MemoryLimitError) as found:
        qframe.quantize(model, recipe(), out=tmp_path / "out")
    assert "--threads 1" in str(found.value)
    assert "--num-calibration-samples" not in str(found.value)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), OutputError("there"), ZeroDivisionError()):
        with pytest.raises(type(error)) as found, memory_named(Where()):
            raise error
        assert found.value is error


@pytest.mark.parametrize("text", ["", "Unable to allocate 3 parsecs for an array", "allocate"])
def test_bytes_that_are_not_told_are_not_known(text):
    assert bytes_asked(text) is None


def test_bytes_are_read_from_what_torch_and_numpy_really_say():
    import numpy as np

    for size in (1 << 45, 3 << 44):
        with pytest.raises(RuntimeError) as found:
            torch.empty(size, dtype=torch.uint8)
        assert bytes_asked(str(found.value)) == size
        with pytest.raises(MemoryError) as found:
            np.empty(1 << 46 | size, np.uint8)
        assert bytes_asked(str(found.value)) == 1 << 46 | size


# Two runs ---------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused_at_once(model, recipe, tmp_path, run):
    out, said, others = tmp_path / "out", [], []

    def second(progress):
        if not said:
            with pytest.raises(LockedError) as found:
                qframe.quantize(model, recipe("gptq"), out=out, state="restart")
            said.append(str(found.value))
            code = f"""
from qframe.cli import main
main({["quantize", str(model), "-o", str(out), *FLAGS, "--resume"]!r})
"""
            others.append(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=False
                )
            )

    qframe.quantize(model, recipe("gptq"), out=out, progress=second)
    assert f"process {os.getpid()} on " in said[0]
    assert others[0].returncode == 2
    assert f"process {os.getpid()} on " in " ".join(others[0].stderr.split())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_lock_ends_with_its_process(model, recipe, tmp_path):
    """Its file may stay: what counts is who has it open."""
    folder = unfinished_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "lock").write_text("1 elsewhere\n")
    qframe.quantize(model, recipe(), out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_of_two_runs_at_once_one_is_done_and_the_other_is_refused(model, tmp_path):
    arguments = ["-&-", "--", "quantize", str(model), "-o", "OUT", *FLAGS]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QFRAME_THREADS": "1"},
    )
    _, *ended = done.stdout.split()
    logs = [(tmp_path / f"-&-.{i}.log").read_text() for i in range(2)]
    assert sorted(ended) == ["0", "2"], logs
    assert "-&-.out" in logs[ended.index("2")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["-&-.0.log", "-&-.1.log", "-&-.out"]


# What was written -------------------------------------------------------------------------------


@pytest.fixture
def damaging(monkeypatch):
    """Change a bit of the weights after they were written, as a bad disk would."""
    finish = checkpoint.Shards.finish

    def wrong(self):
        finish(self)
        for file in self._folder.glob("model*.safetensors") if self._stem == "model" else ():
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

    monkeypatch.setattr(checkpoint.Shards, "finish", wrong)


def test_what_was_written_is_read_once_more(model, recipe, tmp_path, damaging, contents, run):
    out = tmp_path / "out"
    with pytest.raises(VerifyError, match=r"tensor .*: is not what was written: its hash differs"):
        qframe.quantize(model, recipe("gptq"), out=out)
    assert not out.exists()
    assert kept_blocks(out) == (5, 5)
    done = run("quantize", model, "-o", out, *FLAGS, "--resume", "--no-verify")
    assert done.code == 0
    assert (out / "model.safetensors").is_file()


def test_what_cannot_be_unpacked_is_found(model, recipe, tmp_path, monkeypatch):
    """Though its hash is right: a layout that packs what it cannot read."""
    add = checkpoint.CheckpointWriter.add

    def wrong(self, tensors):
        add(self, {n: -t if n.endswith("weight_scale") else t for n, t in tensors.items()})

    monkeypatch.setattr(checkpoint.CheckpointWriter, "add", wrong)
    with pytest.raises(VerifyError, match=r"layer .*scale"):
        qframe.quantize(model, recipe(), out=tmp_path / "out")


def test_an_interrupt_while_an_object_is_finalized_is_not_lost():
    """Python drops what is raised there, but for a word on stderr."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def run():
        with interruptible():
            Last()
            return threading.Event().wait(HANGS)

    hook = sys.unraisablehook
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.unraisablehook is hook
