"""How things are measured side by side: warm-up, alternating repeats, CPU time, page cache.

A repeat measures every contender once, and the order is turned from repeat to repeat, so that what
the machine does meanwhile hits all alike. Ratios are taken within a repeat. Nobody is charged for
what was made ahead before his turn, or for what another still makes ahead after his.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.result import Row, number
from fastssl.loader import threads_per_process

REPEATS = 3  # the fewest that show a spread
SECONDS = 8.0
STEADY = 0.05  # two windows of the warm-up agree when they differ by no more
WARM_UP = 3.0  # turns that a warm-up may take for that; of slow contenders, two windows
QUIET = 0.15  # cores busy, below which nothing is being made ahead
PATIENCE = 5.0  # seconds that a contender is waited for to stop
# By how many batches each is told from on: of fewer, the greatest value would stand in its place.
PERCENTILES = {"p50": 1, "p95": 20, "p99": 100}


@dataclass(frozen=True)
class Contender:
    """One of the things compared."""

    name: str
    run: Callable[[], int]  # does one batch; how many images it was
    close: Callable[[], None] | None = None  # called by `alternate` when it ends, however it ends
    queue: int = (
        2  # batches made ahead: prefetch of DALI; workers x prefetch_factor of a DataLoader
    )


@dataclass(frozen=True)
class Measured:
    """What came out for a contender."""

    rates: list[float]  # images/s, one a repeat
    # user and system time of this process and its descendants, milliseconds an image, one a repeat
    cpu_ms: list[float]
    # p50 of one run() over all repeats, milliseconds; p95 and p99 where PERCENTILES allows
    step_ms: dict[str, float]
    batches: int  # over all repeats; the warm-up does not count


def add_common(parser: argparse.ArgumentParser, *, seconds: float = SECONDS) -> None:
    """The options that every measuring command has; `benchmarks.__main__` applies --quick."""
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help=f"at least {REPEATS} (default %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="S",
        help="of each repeat and contender (default %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=threads_per_process(1),
        metavar="N",
        help="of each contender (default: the cores allowed here, %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of 0.2 s: shows that it runs, no more"
    )
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the result goes; a part of `add_common`."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here")
    parser.add_argument("--note", metavar="TEXT", help="kept in the result's settings")


def alternate(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    seconds: float,
    say: Callable[[str], None] = print,
) -> dict[str, Measured]:
    """Measures the contenders by turns: a b c, c b a, a b c, ...

    Args:
        contenders: with names that differ; they are closed at the end.
        repeats: turns of each.
        seconds: of a turn, at least; no turn ends before more batches than were made ahead.
        say: is told a line for each repeat.

    Raises:
        ValueError: two contenders have one name, or there is nothing to measure.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contenders must be one or more, with different names; found {names}")
    if repeats < 1 or seconds <= 0:
        raise ValueError(f"repeats ({repeats}) and seconds ({seconds}) must be above 0")
    turns: dict[str, list[_Turn]] = {name: [] for name in names}
    try:
        for contender in contenders:
            if not _warm_up(contender, seconds):
                say(f"{contender.name}: images/s still differ by more than {STEADY:.0%} when warm")
            _let_it_stop()
        for repeat in range(repeats):
            for contender in contenders if repeat % 2 == 0 else contenders[::-1]:
                turns[contender.name].append(_turn(contender, seconds))
                _let_it_stop()
            rates = ", ".join(f"{name} {number(turns[name][-1].rate)}" for name in names)
            say(f"repeat {repeat + 1} of {repeats}, images/s: {rates}")
    finally:
        for contender in contenders:
            if contender.close is not None:
                contender.close()
    return {name: _measured(done) for name, done in turns.items()}


def row(
    name: str, group: str, measured: Measured, extra: dict[str, float | int | str | bool | None]
) -> Row:
    """What was measured as a row of a result."""
    return Row(
        name=name,
        group=group,
        unit="images/s",
        values=measured.rates,
        cpu_ms=measured.cpu_ms,
        step_ms=measured.step_ms,
        extra=extra,
    )


def ratio(a: Measured, b: Measured) -> tuple[float, float, float]:
    """Median, least and greatest of a's images/s to b's within a repeat of one `alternate`."""
    each = [x / y for x, y in zip(a.rates, b.rates, strict=True)]
    return statistics.median(each), min(each), max(each)


def cpu_seconds() -> float:
    """User and system time so far of this process and of its descendants, those that ended too.

    The kernel counts another process's time in ticks, mostly of 10 ms.
    """
    descendants = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since: counted below
            times = child.cpu_times()
            descendants += times.user + times.system + times.children_user + times.children_system
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + descendants


def read_into_cache(paths: Iterable[str | Path]) -> int:
    """Reads the files once, which leaves them in the page cache if it has room; bytes read."""
    count = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 22):
                count += len(chunk)
    return count


def drop_from_cache(paths: Iterable[str | Path]) -> bool:
    """Puts the files out of the page cache; False where they stay in it, or nobody can tell.

    Clean pages that no process has mapped can be dropped without being root
    (POSIX_FADV_DONTNEED); `share_in_cache` checks that they went. A cache below this machine's
    own, such as a hypervisor's or a file server's, is not reached.
    """
    paths = list(paths)
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # EINVAL where nothing can be written
                os.fsync(file)  # pages not yet written can't be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return share_in_cache(paths) < 0.01


def share_in_cache(paths: Iterable[str | Path]) -> float:
    """The share of the files' pages that are in the page cache, by mincore(2).

    1 for a file that belongs to somebody else: Linux 5.2 and later then calls every page present.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found = pages = 0
    for path in paths:
        if os.path.getsize(path) == 0:
            continue
        content = np.memmap(path, np.uint8, "r")
        present = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
        if library.mincore(content.ctypes.data, content.size, present.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        found += int((present & 1).sum())
        pages += present.size
    return found / pages if pages else 0.0


@dataclass(frozen=True)
class _Turn:
    rate: float
    cpu_ms: float
    steps: list[float]  # seconds of each run()


def _turn(contender: Contender, seconds: float) -> _Turn:
    """One repeat of one contender, from an emptied queue on."""
    for _ in range(contender.queue + 1):  # and the batch whose making began with the turn
        contender.run()
    images, steps = 0, []
    cpu_began = cpu_seconds()
    began = before = time.perf_counter()
    while before - began < seconds or len(steps) <= contender.queue:
        images += contender.run()
        now = time.perf_counter()
        steps.append(now - before)
        before = now
    cpu = cpu_seconds() - cpu_began
    return _Turn(images / (before - began), 1000 * cpu / max(1, images), steps)


def _warm_up(contender: Contender, seconds: float) -> bool:
    """Runs until two windows in a row have one rate; False where that never came."""
    for _ in range(2 * contender.queue + 1):
        contender.run()
    window = min(1.0, seconds / 4)
    last, windows, warming = 0.0, 0, time.perf_counter()
    while windows < 2 or time.perf_counter() - warming < WARM_UP * seconds:
        images = runs = 0
        began = time.perf_counter()
        while time.perf_counter() - began < window or runs <= contender.queue:
            images += contender.run()
            runs += 1
        rate = images / (time.perf_counter() - began)
        if windows and abs(rate - last) <= STEADY * rate:
            return True
        last, windows = rate, windows + 1
    return False


def _let_it_stop() -> None:
    """Waits until nothing is being made ahead any more: it would take cores from the next."""
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        # what looking itself costs is this thread's time
        before, cpu = time.perf_counter(), cpu_seconds() - time.thread_time()
        time.sleep(0.1)
        if cpu_seconds() - time.thread_time() - cpu < QUIET * (time.perf_counter() - before):
            return


def _measured(turns: list[_Turn]) -> Measured:
    steps = np.concatenate([turn.steps for turn in turns]) * 1000
    return Measured(
        rates=[turn.rate for turn in turns],
        cpu_ms=[turn.cpu_ms for turn in turns],
        step_ms={
            name: float(np.percentile(steps, int(name[1:])))
            for name, least in PERCENTILES.items()
            if len(steps) >= least
        },
        batches=len(steps),
    )
