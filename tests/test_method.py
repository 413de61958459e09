"""What is compared takes turns, pays for its own work only, and the page cache is what is said."""

import errno
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from benchmarks import method
from benchmarks.method import Contender, Measured, alternate
from fastssl import machine


def silent(line: str) -> None:
    """Takes a line and keeps it to itself."""


def recorder(calls: list[str], name: str, images: int = 4, **more) -> Contender:
    """A contender that notes each of its batches."""

    def run() -> int:
        calls.append(name)
        time.sleep(0.001)
        return images

    return Contender(name, run, **more)


def test_the_order_is_turned_from_repeat_to_repeat():
    calls, lines = [], []
    names = ["a", "b", "c"]
    alternate([recorder(calls, n) for n in names], repeats=3, seconds=0.01, say=lines.append)
    turns = [calls[0]] + [after for before, after in pairwise(calls) if before != after]

    # warmed up as a b c; then a b c, c b a, a b c, of which equal neighbours run together
    assert "".join(turns) == "abc" + "abc" + "ba" + "bc"
    assert [line for line in lines if line.startswith("repeat 3 of 3, images/s: a ")]


def test_each_repeat_gives_a_rate_a_cpu_time_and_the_time_of_its_batches():
    measured = alternate([recorder([], "a", queue=40)], repeats=3, seconds=0.02, say=silent)["a"]

    assert len(measured.rates) == len(measured.cpu_ms) == 3
    assert all(0 < rate < 4 / 0.001 for rate in measured.rates)
    assert list(measured.step_ms) == ["p50", "p95", "p99"]
    assert 1 <= measured.step_ms["p50"] <= measured.step_ms["p95"] <= measured.step_ms["p99"]
    assert measured.batches >= 3 * 41  # more than the queue of 40, in each repeat


@pytest.mark.parametrize(
    ("queue", "told"), [(0, ["p50"]), (20, ["p50", "p95"]), (100, ["p50", "p95", "p99"])]
)
def test_a_percentile_is_told_of_batches_enough_to_hold_it(queue, told):
    measured = alternate([recorder([], "a", queue=queue)], repeats=1, seconds=1e-6, say=silent)

    assert measured["a"].batches == queue + 1
    assert list(measured["a"].step_ms) == told


def test_a_slow_contender_s_rate_is_told_in_three_digits():
    def run() -> int:
        time.sleep(0.06)
        return 1

    lines: list[str] = []
    measured = alternate(
        [Contender("slow", run, queue=0)], repeats=1, seconds=0.01, say=lines.append
    )

    assert lines[-1].endswith(f": slow {measured['slow'].rates[0]:.3g}")
    assert 1 < measured["slow"].rates[0] < 16.7


@pytest.mark.parametrize("queue", [0, 1, 6])
def test_batches_that_were_made_ahead_are_not_counted(queue):
    calls: list[str] = []
    contenders = [recorder(calls, "a", queue=queue), recorder(calls, "b")]
    measured = alternate(contenders, repeats=2, seconds=0.01, say=silent)
    of_a = calls[calls.index("b") :].count("a")  # behind the warm-up

    assert of_a == measured["a"].batches + 2 * (queue + 1)


def test_a_slow_contender_gives_more_batches_than_it_had_in_its_queue():
    measured = alternate([recorder([], "a", queue=9)], repeats=1, seconds=1e-6, say=silent)

    assert measured["a"].batches == 10


BURN = """
import sys, time
for line in sys.stdin:
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    print(flush=True)
"""


def test_a_worker_s_cpu_time_is_its_contender_s():
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        ask, answers = worker.stdin, worker.stdout

        def run() -> int:
            print(file=ask, flush=True)
            answers.readline()
            return 1

        both = [Contender("worker", run, close=ask.close, queue=0), recorder([], "idle")]
        measured = alternate(both, repeats=1, seconds=0.3, say=silent)

    assert measured["worker"].cpu_ms[0] > 40  # 50, but for the kernel's ticks of 10 ms
    assert measured["idle"].cpu_ms[0] < 40


def test_a_child_s_cpu_time_does_not_vanish_when_it_ends():
    burn = "import time\nwhile time.process_time() < 0.2: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as child:
        child.communicate(b"\n")
        before = method.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as child:
        child.communicate(b"\n")

    assert method.cpu_seconds() - before >= 0.18


def test_contenders_are_closed_whatever_happens():
    closed: list[str] = []

    def fail() -> int:
        raise RuntimeError("no more")

    contenders = [
        recorder([], "a", close=lambda: closed.append("a")),
        Contender("b", fail, close=lambda: closed.append("b")),
    ]
    with pytest.raises(RuntimeError, match="no more"):
        alternate(contenders, repeats=1, seconds=0.01, say=silent)

    assert closed == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "repeats", "seconds", "message"),
    [
        (["a", "a"], 3, 1.0, r"different names; found \['a', 'a'\]"),
        ([], 3, 1.0, "one or more"),
        (["a"], 0, 1.0, r"repeats \(0\)"),
        (["a"], 3, 0.0, r"seconds \(0.0\)"),
    ],
)
def test_what_can_t_be_measured_is_refused(names, repeats, seconds, message):
    with pytest.raises(ValueError, match=message):
        alternate([recorder([], n) for n in names], repeats=repeats, seconds=seconds)


def test_a_ratio_is_taken_within_a_repeat():
    a = Measured(rates=[200.0, 100.0, 400.0], cpu_ms=[], step_ms={}, batches=3)
    b = Measured(rates=[50.0, 50.0, 200.0], cpu_ms=[], step_ms={}, batches=3)

    assert method.ratio(a, b) == (2.0, 2.0, 4.0)


def test_a_read_file_is_in_the_page_cache_and_a_dropped_one_is_not(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, size in zip(paths, (1, 3_000_000, 0), strict=True):
        path.write_bytes(os.urandom(size))

    assert method.read_into_cache(paths) == 3_000_001
    assert method.share_in_cache(paths) == 1
    dropped = method.drop_from_cache(paths)
    assert method.share_in_cache(paths) == (0 if dropped else 1)
    disks = {"ext4": True, "xfs": True, "tmpfs": False, "ramfs": False}  # others: either
    assert dropped == disks.get(machine.file_system(tmp_path)["type"], dropped)
    assert method.read_into_cache(paths) == 3_000_001
    assert method.share_in_cache(paths) == 1
    assert method.share_in_cache([]) == 0


def test_files_that_nobody_may_write_are_dropped_too(tmp_path, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")  # as of squashfs, iso9660

    (tmp_path / "a").write_bytes(bytes(10_000))
    os.sync()
    monkeypatch.setattr(os, "fsync", refuse)

    assert method.drop_from_cache([tmp_path / "a"]) in (True, False)
