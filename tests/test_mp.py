"""Promises and worker pools: no failure is lost, no process is left behind."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pdiffcopy.exceptions import DiskFullError, WorkerError
from pdiffcopy.mp import Promise, RemoteTraceback, WorkerPool, generator_adapter, worker_adapter
from tests.support import children_of, is_alive, wait_for, write_pattern

HANG = 40
"""After how many seconds a test is believed to hang."""

EXIT_TIMEOUT = 6
"""Two seconds are promised for the end of an interrupted program, the rest is for a busy machine."""

LOCK = threading.Lock()


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever fails (the timer isn't inherited by children)."""

    def give_up(*_):
        raise AssertionError(f"The test hangs since {HANG} seconds")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def no_garbage():
    """
    What the pools of earlier tests left behind isn't collected in the middle of a test.

    The resource tracker of CPython 3.12 warns when it's called while it's being called.
    """
    gc.collect()


@pytest.fixture(autouse=True)
def no_process_left():
    """No test leaves a process behind."""
    before = own_children()
    yield
    assert own_children() - before == set()


def own_children():
    """The children of this process (but for the helper that multiprocessing keeps once something was spawned)."""
    return {pid for pid in children_of(os.getpid()) if not is_resource_tracker(pid)}


def is_resource_tracker(pid):
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def make_pool(generator_fn, worker_fn, concurrency=2, **options):
    # Whoever polls instead of being woken up fails by being much too late.
    return WorkerPool(
        concurrency=concurrency, generator_fn=generator_fn, worker_fn=worker_fn, **{"polling_interval": 600, **options}
    )


# What runs in the children (on the level of the module, because spawned ones have to find it) {{{1


def square(number):
    return number * number


def write_half_and_die(_):
    """Return a result of which half is written."""

    def send(self, data, write=os.write):
        write(self._handle, data[: len(data) // 2])
        kill_oneself()

    Connection._send = send
    return bytes(100_000)


def return_as_is(value):
    return value


def fail_deeply(*_):
    raise ValueError("this went wrong")


def fail_at_length(*_):
    raise ValueError("x" * 1024 * 1024)


def fail_with_data(*_):
    raise DiskFullError("Can't write to {filename}", filename="/a file", offset=7)


class FussyError(Exception):
    """Can be pickled but not restored."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail_fussily(*_):
    raise FussyError("this", "that")


def return_lambda(*_):
    return lambda: None


def return_megabytes():
    return b"x" * 8 * 1024 * 1024


def kill_oneself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def exit_silently(*_):
    os._exit(7)


def hang(*_):
    while True:
        time.sleep(60)


def ignore_termination_and_hang(folder, number):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / str(number)).touch()
    hang()


ENDINGS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def describe_signals():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)], mask


def get_log_level(_):
    return logging.getLogger().level


def try_lock(_):
    acquired = LOCK.acquire(timeout=5)
    if acquired:
        LOCK.release()
    return acquired


def yield_then(items, ending):
    yield from items
    ending()


def yield_and_count(folder):
    for number in count():
        (folder / "produced").write_text(str(number + 1))
        yield number


def yield_lambda():
    yield 1
    yield lambda: None


# Promise {{{1


def test_promise_returns_a_value():
    """The return value arrives, also when it doesn't fit into a pipe, and as often as it's asked for."""
    promise = Promise(target=return_megabytes)
    assert promise.join() == return_megabytes()
    assert promise.join() == return_megabytes()
    assert not promise.is_alive()


def test_promise_passes_arguments():
    """The options are those of a process."""
    promise = Promise(target=divmod, args=(7, 2), name="somebody")
    assert promise.name == "somebody"
    assert promise.join() == (3, 1)


def test_promise_join_has_a_timeout():
    """Without a result in time there's none, and joining again may bring it."""
    gate, opener = multiprocessing.Pipe(duplex=False)
    with gate, opener:
        promise = Promise(target=gate.recv)
        assert promise.join(timeout=0.01) is None
        assert promise.is_alive()
        opener.send("value")
        assert promise.join(timeout=HANG) == "value"


def test_promise_raises_what_the_child_raised():
    """The exception of the child has the traceback of the child as its cause, each time."""
    promise = Promise(target=fail_deeply)
    for _ in range(2):
        with pytest.raises(ValueError, match="this went wrong") as info:
            promise.join()
        assert isinstance(info.value.__cause__, RemoteTraceback)
        assert "in fail_deeply" in str(info.value.__cause__)


def test_promise_keeps_the_data_of_an_error():
    """An error of this program arrives with its class, its message and its attributes."""
    with pytest.raises(DiskFullError, match="^Can't write to /a file$") as info:
        Promise(target=fail_with_data).join()
    assert (info.value.filename, info.value.offset) == ("/a file", 7)


@pytest.mark.parametrize(
    "function, reason", [(kill_oneself, "killed by signal 9"), (exit_silently, "7")], ids=["killed", "exited"]
)
def test_promise_reports_death(function, reason):
    """A child that dies without a word is an error which names the child and how it died."""
    promise = Promise(target=function, name="victim")
    for _ in range(2):
        with pytest.raises(WorkerError, match="victim") as info:
            promise.join()
        assert reason in str(info.value)


def test_promise_reports_death_in_the_middle_of_a_result():
    """A result that was cut off is none."""
    promise = Promise(target=return_megabytes)
    wait_for(promise.receiver.poll, what="the beginning of the result")
    promise.kill()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        promise.join()


def test_promise_reports_an_unpicklable_result():
    """A result that can't be passed on is an error and not a hang."""
    with pytest.raises(WorkerError, match="can't pass on a result"):
        Promise(target=return_lambda).join()


def test_promise_reports_an_exception_that_cant_be_restored():
    """An exception that can't be passed on is replaced by one with its name, its message and its traceback."""
    with pytest.raises(WorkerError, match="FussyError: this and that") as info:
        Promise(target=fail_fussily).join()
    assert "in fail_fussily" in str(info.value.__cause__)


@pytest.mark.parametrize("blocked", [set(), {*ENDINGS, signal.SIGUSR1}], ids=["open", "blocked"])
def test_promise_knows_its_signals(blocked):
    """A child ignores Control-C and SIGHUP and dies of SIGTERM; the parent's mask is what it was before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        promise = Promise(target=describe_signals)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | blocked
        dispositions, mask = promise.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert dispositions == [signal.SIG_IGN, signal.SIG_IGN, signal.SIG_DFL]
    assert not mask & ENDINGS


def test_promise_of_a_threaded_process_is_not_forked():
    """Where another thread may hold a lock, a child starts from scratch, and it keeps all other promises as well."""
    with busy_thread():
        assert Promise(target=try_lock, args=(0,)).join() is True
        with pytest.raises(ValueError, match="this went wrong") as info:
            Promise(target=fail_deeply).join()
        assert "in fail_deeply" in str(info.value.__cause__)
        assert Promise(target=describe_signals).join()[0] == [signal.SIG_IGN, signal.SIG_IGN, signal.SIG_DFL]


class busy_thread:
    """A thread that holds a lock all the time."""

    def __enter__(self):
        self.done, ready = threading.Event(), threading.Event()

        def hold():
            with LOCK:
                ready.set()
                self.done.wait()

        self.thread = threading.Thread(target=hold)
        self.thread.start()
        ready.wait()

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


# WorkerPool: results {{{1


@pytest.mark.parametrize("concurrency", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 300])
def test_pool_yields_all_results(concurrency, size):
    """Each item is worked on once, and nothing waits for the polling interval."""
    with make_pool(partial(range, size), square, concurrency) as pool:
        assert sorted(pool) == [n * n for n in range(size)]


def test_pool_works_without_a_with_block():
    """Iterating starts the processes and ends them."""
    pool = make_pool(partial(range, 10), square)
    assert sorted(pool) == [n * n for n in range(10)]
    assert not any(process.is_alive() for process in pool.all_processes)


def test_pool_passes_on_all_values():
    """Values that are false or None are results like others."""
    values = [None, False, 0, "", (), []]
    results = list(make_pool(partial(iter, values), return_as_is, concurrency=1))
    assert results == values


def test_pool_of_a_threaded_process_is_not_forked():
    """A multi-threaded parent can use a pool."""
    with busy_thread(), make_pool(partial(range, 4), try_lock) as pool:
        assert list(pool) == [True] * 4


def test_pool_has_the_documented_properties():
    """What is documented can be read, and the queues are bounded."""
    with make_pool(partial(range, 3), square, concurrency=3) as pool:
        assert pool.all_processes == [pool.generator_process, *pool.worker_processes]
        assert len(pool.worker_processes) == 3
        assert all(isinstance(process, multiprocessing.Process) for process in pool.all_processes)
        assert sorted(pool) == [0, 1, 4]
        assert pool.input_queue is not pool.output_queue
        assert 0 < pool.input_queue._maxsize < 100 and 0 < pool.output_queue._maxsize < 100
    assert WorkerPool(concurrency=1, generator_fn=list, worker_fn=square).polling_interval == 0.1


def test_pool_requires_its_properties():
    """Without functions there's nothing to run."""
    with pytest.raises(TypeError, match="worker_fn"):
        WorkerPool(concurrency=1, generator_fn=list)


@pytest.mark.parametrize("threaded", [False, True], ids=["forked", "spawned"])
def test_pool_sets_the_log_level(threaded):
    """The children log what the parent logs, or what the pool was told."""
    root = logging.getLogger()
    before = root.level
    with busy_thread() if threaded else nullcontext():
        try:
            root.setLevel(17)
            assert list(make_pool(partial(range, 1), get_log_level)) == [17]
            assert list(make_pool(partial(range, 1), get_log_level, log_level=23)) == [23]
            assert root.level == 17
        finally:
            root.setLevel(before)


def watch_queue(is_empty, gate):
    yield is_empty()
    yield "waits in the queue"
    wait_for(lambda: not is_empty(), what="the queue to fill up")
    gate.touch()
    wait_for(is_empty, what="the queue to be emptied")
    yield "taken"


def wait_at_gate(gate, value):
    wait_for(gate.exists, what="the generator")
    return value


@pytest.mark.parametrize("threaded", [False, True], ids=["forked", "spawned"])
def test_generator_can_tell_whether_all_was_taken(tmp_path, threaded):
    """The queue says so in the process of the generator, too."""
    with busy_thread() if threaded else nullcontext():
        gate = tmp_path / "gate"
        pool = make_pool(list, partial(wait_at_gate, gate), 1)
        pool.generator_fn = partial(watch_queue, pool.input_queue.empty, gate)
        assert list(pool) == [True, "waits in the queue", "taken"]


@pytest.mark.parametrize("delay", [0, 0.3], ids=["at once", "when all processes have ended"])
def test_pool_knows_whether_there_are_more_results(delay):
    """Behind the last one there are none, whoever takes how long to take it."""
    with make_pool(partial(range, 4), square) as pool:
        seen = []
        for _ in pool:
            time.sleep(delay)
            seen.append(pool.is_ready(0.5))
    assert len(seen) == 4 and seen[-1] is False and (not delay or seen[0])


def test_generator_waits_for_the_reader(tmp_path):
    """The generator of an endless stream doesn't run ahead farther than the queues reach."""
    concurrency = 2
    # Both queues, what was taken out of the second one, an item in each worker's hand, and one in the generator's.
    ahead = (2 + 8 + 1 + 1) * concurrency + 1

    def produced():
        try:
            return int((tmp_path / "produced").read_text() or 0)
        except FileNotFoundError:
            return 0

    with make_pool(partial(yield_and_count, tmp_path), square, concurrency) as pool:
        results = iter(pool)
        for received in range(1, 40):
            next(results)
            if received % 13 == 0:
                wait_for(lambda: produced() >= received + 8 * concurrency, what="the generator to run ahead")  # noqa: B023
            assert produced() <= received + ahead


# WorkerPool: failures {{{1


@pytest.mark.parametrize("items", [range(0), range(5)], ids=["at once", "later"])
def test_generator_error_reaches_the_caller(items):
    """What the generator raises is raised in the parent, with the traceback of the child."""
    with make_pool(partial(yield_then, items, fail_deeply), square) as pool:
        with pytest.raises(ValueError, match="this went wrong") as info:
            list(pool)
    assert "in fail_deeply" in str(info.value.__cause__)


@pytest.mark.parametrize("function", [fail_deeply, fail_at_length], ids=["small", "larger than a pipe"])
@pytest.mark.parametrize("threaded", [False, True], ids=["forked", "spawned"])
def test_worker_error_reaches_the_caller(function, threaded):
    """The first failure of a worker ends the iteration, although the stream of items never ends."""
    with busy_thread() if threaded else nullcontext():
        with make_pool(count, function) as pool, pytest.raises(ValueError) as info:
            list(pool)
        assert f"in {function.__name__}" in str(info.value.__cause__)


def test_generator_error_does_not_wait_for_workers():
    """A failure is reported although the workers are in the middle of something that takes long."""
    with make_pool(partial(yield_then, range(2), fail_deeply), hang) as pool:
        with pytest.raises(ValueError, match="this went wrong"):
            list(pool)


@pytest.mark.parametrize("function", [kill_oneself, exit_silently], ids=["killed", "exited"])
def test_death_of_a_busy_worker_reaches_the_caller(function):
    """A worker that dies over its work is an error."""
    with make_pool(count, function) as pool, pytest.raises(WorkerError, match="worker"):
        list(pool)


def test_death_in_the_middle_of_a_result_reaches_the_caller():
    """Nobody waits for the other half: processes that go on could still write it."""
    with make_pool(partial(yield_then, range(1), hang), write_half_and_die) as pool:
        with pytest.raises(WorkerError, match="worker.*killed by signal 9"):
            list(pool)
    assert threading.active_count() == 1


def test_death_of_an_idle_worker_reaches_the_caller():
    """A worker that dies while it waits for work (and holds the lock of the queue) is an error."""
    with make_pool(partial(yield_then, range(8), hang), square) as pool:
        results = iter(pool)
        assert sorted(next(results) for _ in range(8)) == [n * n for n in range(8)]
        os.kill(pool.worker_processes[1].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="worker 2.*killed by signal 9"):
            next(results)


def test_death_of_the_generator_reaches_the_caller():
    """A generator that dies is an error, whether it has yielded something or not."""
    with make_pool(partial(yield_then, range(3), kill_oneself), square) as pool:
        with pytest.raises(WorkerError, match="generator.*killed by signal 9"):
            list(pool)


def test_unpicklable_result_reaches_the_caller():
    """A result that can't be passed on isn't lost in silence."""
    with make_pool(partial(range, 3), return_lambda) as pool, pytest.raises(Exception, match="lambda"):
        list(pool)


class DemandingError(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, number, reason):
        super().__init__(f"{number}: {reason}")


def return_demanding(value):
    return DemandingError(value, "no")


@pytest.mark.usefixtures("no_hang")
def test_result_that_cant_be_restored_reaches_the_caller():
    """Nobody waits for it."""
    with make_pool(partial(range, 3), return_demanding) as pool, pytest.raises(TypeError, match="reason"):
        list(pool)


def test_unpicklable_item_reaches_the_caller():
    """An item that can't be passed on isn't lost in silence."""
    with make_pool(yield_lambda, square) as pool, pytest.raises(Exception, match="lambda"):
        list(pool)


# WorkerPool: nothing is left {{{1


def test_leaving_early_ends_the_processes():
    """A caller that has seen enough leaves no process, though the stream never ends."""
    with make_pool(count, square, concurrency=3) as pool:
        pids = [process.pid for process in pool.all_processes]
        assert len(pids) == 4 and all(map(is_alive, pids))
        for _ in pool:
            break
    assert not any(map(is_alive, pids))


def test_leaving_before_iterating_ends_the_processes():
    """Processes that were started but never used end, also those that only just start."""
    for _ in range(10):
        with make_pool(count, square) as pool:
            pids = [process.pid for process in pool.all_processes]
        assert not any(map(is_alive, pids))


def test_exception_in_the_body_ends_the_processes():
    """What goes wrong in the with block is raised, and the pool is gone."""
    with pytest.raises(KeyError, match="mine"):
        with make_pool(count, square) as pool:
            for _ in pool:
                raise KeyError("mine")
    assert not any(process.is_alive() for process in pool.all_processes)


def test_process_that_cant_be_started_leaves_nothing():
    """When the second half of a pool can't start, the first half ends."""
    with busy_thread():
        pool = make_pool(partial(yield_then, [1], hang), lambda value: value)
        with pytest.raises(Exception, match="lambda|pickle"), pool:
            pass
        assert not pool.generator_process.is_alive()


def test_stubborn_processes_are_killed(tmp_path):
    """Processes that ignore SIGTERM share one second, and are killed then."""
    concurrency = 6
    with make_pool(count, partial(ignore_termination_and_hang, tmp_path), concurrency) as pool:
        wait_for(lambda: len(list(tmp_path.iterdir())) == concurrency, what="the workers")
        started = time.monotonic()
    assert not any(process.is_alive() for process in pool.all_processes)
    assert time.monotonic() - started < concurrency  # a second for each of them would take longer


PROGRAMS = {
    "endless": "for _ in make_pool(count, square): pass",
    "idle": "list(make_pool(hang, square))",
    "busy": "list(make_pool(count, hang))",
    "in the body": "with make_pool(count, square) as pool:\n    for _ in pool: hang()",
    "promise": "Promise(target=hang).join()",
    "forgotten promise": "Promise(target=hang)\nhang()",
}


@pytest.fixture(params=PROGRAMS.values(), ids=PROGRAMS)
def program(request):
    """A process (the leader of a process group) that runs a pool, with all of its children."""
    process = start_program(request.param)
    expected = 1 if "Promise" in request.param else 3
    children = wait_for(lambda: len(found := children_of(process.pid)) == expected and found, what="the children")
    process.descendants = children
    yield process
    process.kill()
    process.communicate()


def start_program(code, stderr=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "-c", f"from tests.test_mp import *\n{code}"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        text=True,
    )


def test_interrupt_ends_everything(program):
    """Control-C, which the terminal sends to all processes, ends the program and all of its children."""
    os.killpg(program.pid, signal.SIGINT)
    program.wait(EXIT_TIMEOUT)
    assert not any(map(is_alive, program.descendants))
    assert program.returncode == -signal.SIGINT
    # One traceback: the children make no noise.
    errors = program.stderr.read()
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_death_of_the_parent_ends_the_children(program, number):
    """A parent that is killed takes its children with it."""
    os.kill(program.pid, number)
    assert program.wait(EXIT_TIMEOUT) == -number
    wait_for(lambda: not any(map(is_alive, program.descendants)), what="the end of the children")


def test_death_of_a_threaded_parent_ends_the_children():
    """Spawned children die with their parent like forked ones do."""
    process = start_program("busy_thread().__enter__(); list(make_pool(count, hang))")
    try:
        children = wait_for(lambda: len(found := children_of(process.pid)) == 4 and found, what="the children")
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: not any(map(is_alive, children)), what="the end of the children")


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_interrupt_while_processes_start_leaves_none(moment):
    """Control-C just after a fork doesn't make the pool forget that process, even if the program goes on."""
    code = f"""
forks = count(1)
os.register_at_fork(after_in_parent=lambda: next(forks) == {moment} and os.kill(os.getpid(), signal.SIGINT))
try:
    with make_pool(count, square) as pool:
        pass
except KeyboardInterrupt:
    print("interrupted", children_of(os.getpid()))
"""
    output, _ = start_program(code, stderr=None).communicate(timeout=HANG)
    assert output == "interrupted []\n"


def test_no_descriptor_is_left_open():
    """Neither success nor failure leaks descriptors (but for the one pipe that tells all children of our death)."""

    def use_everything():
        assert Promise(target=square, args=(3,)).join() == 9
        assert len(list(make_pool(partial(range, 10), square))) == 10
        with pytest.raises(ValueError), make_pool(count, fail_deeply) as pool:
            list(pool)
        with make_pool(count, square):
            pass
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    assert use_everything() == use_everything()


# The adapters {{{1


@pytest.fixture
def queues(monkeypatch):
    """Two queues, and a log level that is restored."""
    root = logging.getLogger()
    level = root.level
    queues = multiprocessing.Queue(), multiprocessing.Queue()
    yield queues
    root.setLevel(level)
    for queue in queues:
        queue.close()
        queue.join_thread()


def test_generator_adapter_ends_each_worker(queues):
    """The input queue gets all items, and after them one end for each worker."""
    generator_adapter(2, partial(range, 3), queues[0], logging.ERROR)
    assert [queues[0].get(timeout=HANG) for _ in range(5)] == [(0,), (1,), (2,), (), ()]
    assert logging.getLogger().level == logging.ERROR


def test_worker_adapter_works_until_the_end(queues):
    """The output queue gets the result of each item before the first end."""
    source, target = queues
    for message in [(3,), (0,), (), (5,)]:
        source.put(message)
    worker_adapter(source, logging.ERROR, target, square)
    assert [target.get(timeout=HANG) for _ in range(2)] == [9, 0]
    assert target.empty()
    assert source.get(timeout=HANG) == (5,)
    assert logging.getLogger().level == logging.ERROR


# Wherever it is used {{{1

COPY = """
import sys
from pdiffcopy.client import Client

def copy(target):
    # So many blocks are too many for one batch, which would take no other process.
    return Client(source=sys.argv[1], target=target, block_size=512).run().result.bytes_moved
"""
POOL = (
    COPY
    + """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("METHOD").Pool(1) as pool:
        print(*pool.map(copy, sys.argv[2:]))
"""
)
PROGRAMS = {
    "a forked worker of a pool": POOL.replace("METHOD", "fork"),
    "a spawned worker of a pool": POOL.replace("METHOD", "spawn"),
    "a thread of a program without a guard": COPY + """
import threading
thread = threading.Thread(target=lambda: print(copy(sys.argv[2])))
thread.start()
thread.join()
""",
    "a thread where there is no main module": COPY + """
import threading
del sys.modules["__main__"]
thread = threading.Thread(target=lambda: print(copy(sys.argv[2])))
thread.start()
thread.join()
""",
}  # fmt: skip


@pytest.mark.parametrize("from_stdin", [False, True], ids=["file", "stdin"])
@pytest.mark.parametrize("place", PROGRAMS)
def test_client_works_anywhere(tmp_path, place, from_stdin):
    """In daemonic processes, in threads, and without a main module that could be imported once more."""
    from_stdin &= place != "a spawned worker of a pool"  # which multiprocessing itself can't import from there
    write_pattern(tmp_path / "source", 100_000)
    program = PROGRAMS[place]
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-" if from_stdin else "program.py", "source", "target"]
    result = subprocess.run(command, input=program, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (0, "100000\n"), result.stderr
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_children_of_a_killed_daemonic_process_die_with_it(tmp_path):
    """That's why it may have some."""
    program = """
import multiprocessing, os, sys, time
from pdiffcopy.mp import Promise
def work():
    child = Promise(target=time.sleep, args=(100,))
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)
process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    wait_for(lambda: not is_alive(int(result.stdout)), what="the end of the child")
