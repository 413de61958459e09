"""The headers of many files, read in parallel, with a line of progress now and then."""

import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PROGRESS_SECONDS = 5  # between lines
_BLOCK = 256  # rows that a thread takes at a time


class Clock:
    """Says when the next line of progress is due."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.last = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self.last < PROGRESS_SECONDS:
            return False
        self.last = now
        return True


def in_blocks(
    rows: np.ndarray, work: Callable[[list[int]], dict[int, str]], clock: Clock, what: str
) -> dict[int, str]:
    """What `work` finds in the rows, a block of them at a time, in parallel; ascending.

    Args:
        rows: int64, ascending.
        work: on some of them; what it gives for each block is joined.
        clock: tells when progress is due.
        what: is done to how many of what: "scanned {} of {} headers".
    """
    found: dict[int, str] = {}
    # More than cores, as the standard library does for I/O: on a network disk most of them wait.
    executor = ThreadPoolExecutor(min(32, 4 + len(os.sched_getaffinity(0))))
    starts = range(0, len(rows), _BLOCK)
    window = 64 * _BLOCK  # rows that are handed out at once: each block is an object
    try:
        for begin in range(0, len(rows), window):
            blocks = [rows[k : k + _BLOCK].tolist() for k in starts[begin // _BLOCK :][:64]]
            for some in executor.map(work, blocks):
                found.update(some)
            if clock.is_due():
                clock.say(
                    f"data: {what.format(f'{min(begin + window, len(rows)):,}', f'{len(rows):,}')}"
                )
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: not all the rest first
    return found


def refuse_other_kinds(path: bytes) -> None:
    """Refuses what is no regular file: to open a pipe would wait for who writes to it.

    Raises:
        ValueError: says what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError("a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ValueError("no regular file")
