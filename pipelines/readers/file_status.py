"""Size, time and kind of many files at once: 13 million in seconds, where os.stat takes minutes.

The system's own call is made from compiled code (Numba), without Python and without its lock, so
that threads help: on a network disk most of them wait. Few files are asked for by os.stat, for
which nothing need be compiled; both tell the same.
"""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types  # pyright: ignore[reportPrivateImportUsage]

from pipelines.readers.names import Names

FEW = 20_000  # files that os.stat does while the compiled code is loaded
_BLOCK = 16_384  # files that a thread takes at a time
_BLOCKS = 64  # that are handed out at a time
_PATH_MAX = 4096  # bytes, with the zero at the end
# Linux, include/uapi/linux/stat.h: what is asked for (type, size, time of last modification) ...
_MASK = 0x001 | 0x200 | 0x040
# ... and where it lies in struct statx, in units of 8 bytes. The type is in the upper half of
# the word that holds gid (u32), mode (u16).
_WORDS, _MODE, _SIZE, _SECONDS, _NANOSECONDS = 32, 3, 5, 14, 15

_Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def each_block(root: bytes, names: Names, rows: np.ndarray | None) -> Iterator[_Found]:
    """What the file system says of files, links followed, some thousand at a time, in order.

    Args:
        root: folder that the names are relative to.
        names: of the files.
        rows: int64, which of them; None: all.

    Yields:
        rows: int64 [n].
        sizes: int64 [n], bytes; 0 for what is no regular file.
        times: int64 [n], of the last modification, ns; 0 for what is no regular file.
        regular: bool [n]; False also for what is not there or can't be asked.
    """
    count = len(names) if rows is None else len(rows)
    begins = range(0, count, _BLOCK)

    def rows_from(begin: int) -> np.ndarray:
        end = min(begin + _BLOCK, count)
        return np.arange(begin, end) if rows is None else rows[begin:end]

    if count < FEW:
        for begin in begins:
            yield _ask_python(root, names, rows_from(begin))
        return
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    # More than cores, as for headers.
    executor = ThreadPoolExecutor(min(32, 4 + len(os.sched_getaffinity(0))))
    try:
        compiled = _compiled_call()
        text, ends = _read_only(names.text), _read_only(names.ends)

        def ask_compiled(begin: int) -> _Found:
            these = rows_from(begin)
            sizes, times = np.zeros(len(these), np.int64), np.zeros(len(these), np.int64)
            regular = np.zeros(len(these), np.bool_)
            compiled(folder, text, ends, these, sizes, times, regular)
            return these, sizes, times, regular

        for window in range(0, len(begins), _BLOCKS):  # or all results may wait at once
            yield from executor.map(ask_compiled, begins[window : window + _BLOCKS])
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: not all the rest first
        os.close(folder)


def _ask_python(root: bytes, names: Names, rows: np.ndarray) -> _Found:
    sizes, times = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    regular = np.zeros(len(rows), np.bool_)
    for place, row in enumerate(rows.tolist()):
        try:
            status = os.stat(os.path.join(root, names[row]))
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[place], times[place] = status.st_size, status.st_mtime_ns
            regular[place] = True
    return rows, sizes, times, regular


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view, always of one type: the call is compiled once for each."""
    view = array.view()
    view.flags.writeable = False
    return view


# In the C library of every system that DALI runs on (glibc 2.28 or newer).
_statx = types.ExternalFunction(
    "statx", types.int32(types.int32, types.uintp, types.int32, types.uint32, types.uintp)
)


def _ask(folder, text, ends, rows, sizes, times, regular):
    """Fills sizes, times and regular for the rows of names, relative to an open folder."""
    path = np.zeros(_PATH_MAX, np.uint8)
    found = np.zeros(_WORDS, np.int64)
    for place in range(rows.shape[0]):
        begin, end = ends[rows[place]], ends[rows[place] + 1]
        if end - begin >= _PATH_MAX:
            continue
        for k in range(end - begin):
            path[k] = text[begin + k]
        path[end - begin] = 0
        if _statx(folder, path.ctypes.data, 0, _MASK, found.ctypes.data) != 0:
            continue
        if (found[_MODE] >> 32) & 0xF000 == 0x8000:
            regular[place] = True
            sizes[place] = found[_SIZE]
            nanoseconds = found[_NANOSECONDS] & 0xFFFFFFFF
            times[place] = found[_SECONDS] * 1_000_000_000 + nanoseconds


@lru_cache(maxsize=1)
def _compiled_call() -> Any:
    """`_ask` as machine code; kept on disk where there is a place for it."""
    numbers, flags = types.Array(types.int64, 1, "C"), types.Array(types.boolean, 1, "C")
    fixed = types.Array(types.int64, 1, "C", readonly=True)
    text = types.Array(types.uint8, 1, "C", readonly=True)
    signature = types.void(types.int64, text, fixed, numbers, numbers, numbers, flags)
    try:
        return njit(signature, nogil=True, cache=True)(_ask)
    except Exception:  # no place, or a cached file was cut off or is somebody's, or a full disk
        return njit(signature, nogil=True)(_ask)
