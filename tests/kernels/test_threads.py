"""Tasks of one call shared by threads: each is done once, and what goes wrong is told."""

import os
import signal
import threading
import time

import numba
import numpy as np
import pytest

from qframe_plugins.kernels.numba_cpu import threads
from qframe_plugins.kernels.numba_cpu.simd import run_of

pytestmark = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="with one core nothing is shared"
)


@pytest.fixture(autouse=True)
def helpers(monkeypatch):
    """Give every test helpers of its own: one, beside the caller."""
    made, before = threads._Helpers(), numba.get_num_threads()
    monkeypatch.setattr(threads, "_helpers", made)
    numba.set_num_threads(2)
    yield made
    numba.set_num_threads(before)


class Tasks:
    """A kernel in Python: it takes numbers until there are none."""

    def __init__(self, count, each=lambda task: None):
        self.left, self.each = iter(range(count)), each
        self.lock = threading.Lock()
        self.done, self.workers = [], set()

    def __call__(self, counter):
        assert counter.tolist() in ([0, 1], [0, 2])
        self.workers.add(threading.current_thread().name)
        while True:
            with self.lock:
                task = next(self.left, None)
            if task is None:
                return
            self.each(task)
            self.done.append(task)


def meeting():
    """Return what waits in the first two tasks until both are being done."""
    barrier = threading.Barrier(2, timeout=20)
    return lambda task: barrier.wait() if task < 2 else None


def test_tasks_are_shared_and_each_is_done_once(helpers):
    for _ in range(3):
        tasks = Tasks(40, meeting())
        threads.share(tasks, 40)
        assert sorted(tasks.done) == list(range(40))
        assert len(tasks.workers) > 1
        assert helpers._made == len(helpers._free) == 1


def test_one_task_wakes_nobody(helpers):
    tasks = Tasks(1)
    threads.share(tasks, 1)
    assert tasks.workers == {threading.current_thread().name}
    assert helpers._made == 0


def test_threads_that_numba_may_not_use_are_left_alone(helpers):
    numba.set_num_threads(1)
    threads.share(Tasks(9), 9)
    assert helpers._made == 0


def test_what_a_helper_raises_is_raised_and_it_goes_on_to_help(helpers):
    meet, own = meeting(), threading.current_thread()

    def fail(task):
        meet(task)
        if threading.current_thread() is not own:
            raise ValueError("a task went wrong")

    with pytest.raises(ValueError, match="a task went wrong"):
        threads.share(Tasks(2, fail), 2)
    tasks = Tasks(2, meeting())
    threads.share(tasks, 2)
    assert len(tasks.workers) == 2
    assert helpers._made == len(helpers._free)


def test_what_the_caller_raises_waits_for_the_helpers(helpers):
    meet, own, ended = meeting(), threading.current_thread(), []

    def fail(task):
        meet(task)
        if threading.current_thread() is own:
            raise ValueError("the caller's task")
        time.sleep(0.05)
        ended.append(task)

    with pytest.raises(ValueError, match="the caller's task"):
        threads.share(Tasks(2, fail), 2)
    assert len(ended) == 1
    assert helpers._made == len(helpers._free)


def test_who_finds_no_helper_free_works_alone(helpers):
    """Several threads may share at once, and no more threads work than numba may use, and they."""
    all_tasks = [Tasks(50) for _ in range(8)]
    callers = [threading.Thread(target=threads.share, args=(each, 50)) for each in all_tasks]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(sorted(each.done) == list(range(50)) for each in all_tasks)
    assert helpers._made == len(helpers._free) <= 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer")
def test_an_interrupted_call_leaves_its_helper_and_the_next_one_has_another(helpers):
    meet, own = meeting(), threading.current_thread()
    go_on = threading.Event()

    def linger(task):
        meet(task)
        if threading.current_thread() is not own:
            go_on.wait(20)

    class StoppedError(Exception):
        pass

    def interrupt(*_):
        raise StoppedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(StoppedError):
            threads.share(Tasks(2, linger), 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        go_on.set()
    assert helpers._made == len(helpers._free)
    tasks = Tasks(2, meeting())
    threads.share(tasks, 2)
    assert len(tasks.workers) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_of_fork_has_helpers_of_its_own(monkeypatch):
    monkeypatch.undo()  # those that are told of a fork
    threads.share(Tasks(2, meeting()), 2)
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that waits for a thread which it has not
        tasks = Tasks(2, meeting())
        try:
            threads.share(tasks, 2)
        finally:
            os._exit(0 if len(tasks.workers) == 2 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("count", "tasks", "run"), [(1, 64, 8), (2, 64, 4), (2, 172, 10), (8, 3, 1)]
)
def test_who_claims_tasks_in_a_row_leaves_turns_to_the_others(count, tasks, run):
    assert run_of(np.array([0, count]), tasks) == run


def test_kernels_are_told_how_many_threads_there_are():
    told = []
    for tasks in (1, 9):
        threads.share(lambda counter: told.append(tuple(counter.tolist())), tasks)
    assert told == [(0, 1), (0, 2), (0, 2)]
