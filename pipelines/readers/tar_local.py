"""A tar store's shards on a disk: their sizes checked, mapped into memory, read ahead of need."""

import hashlib
import json
import mmap
import os
import resource
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.readers import tar_store
from pipelines.readers.tar_store import Manifest

PROGRESS_SECONDS = 5  # between lines, while checksums are compared
OTHER_FILES = 512  # that a run may have open besides shards: libraries, DALI, sockets, journals


class Mapped(Protocol):
    """What is read here of `pipelines.readers.tar.Samples`."""

    @property
    def maps(self) -> tuple[mmap.mmap, ...]: ...
    @property
    def shard(self) -> np.ndarray: ...
    @property
    def offset(self) -> np.ndarray: ...
    @property
    def size(self) -> np.ndarray: ...
    @property
    def usable(self) -> np.ndarray: ...
    @property
    def chunks(self) -> np.ndarray | None: ...
    @property
    def window(self) -> int: ...


def open_shards(root: str, manifest: Manifest) -> tuple[mmap.mmap, ...]:
    """Every shard, mapped; none is read.

    Raises:
        ValueError: one is missing, or has another size than the manifest says.
    """
    paths = [os.path.join(root, shard.name) for shard in manifest.shards]
    # Before anything is mapped: to read behind the end of a mapped file kills the process (SIGBUS).
    for path, shard in zip(paths, manifest.shards, strict=True):
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise ValueError(
                f"data.root: cannot read {path}: {error.strerror}: {tar_store.AGAIN}"
            ) from None
        if found != shard.bytes:
            raise ValueError(
                f"data.root: {path} has {found:,} bytes, and {tar_store.MANIFEST} says"
                f" {shard.bytes:,}: {tar_store.AGAIN}"
            )
    _allow_open_files(root, len(paths))
    return tuple(map(_map, paths))


def announce(samples: Mapped, rows: np.ndarray) -> None:
    """Have the kernel read what is not in memory, all at once, before DALI's threads ask for it.

    1 (JPEG) to 2 us of CPU per image; from a cold disk, raw images come 1.4 times as fast.
    """
    begin, size = samples.offset[rows], samples.size[rows]
    for shard, start, length in zip(
        samples.shard[rows].tolist(), begin.tolist(), size.tolist(), strict=True
    ):
        _will_need(samples.maps[shard], start, start + length)


def reading_ahead(samples: Mapped, rows: Callable[[int], np.ndarray]) -> Callable[[int, int], None]:
    """Where chunks are read: a function of (step, batch), to be called at each step.

    It has the kernel read the chunks of the window after the one that the step lies in, whole, a
    few at each step. Chunks of which less than half is wanted then, as in the order of a probe, are
    left to `announce`.
    """
    chunks = samples.chunks
    assert chunks is not None
    sizes = np.diff(chunks, prepend=0)
    images = samples.window * int(chunks[-1]) / len(chunks)  # of a window

    @lru_cache(maxsize=1)
    def wanted(begin: int, end: int) -> list[int]:
        found = [np.empty(0, np.int64)]
        with suppress(StopIteration):
            for step in range(begin, end):
                found.append(rows(step))
        positions = np.searchsorted(samples.usable, np.concatenate(found))
        chunk, count = np.unique(
            np.searchsorted(chunks, positions, side="right"), return_counts=True
        )
        return chunk[2 * count >= sizes[chunk]].tolist()

    def read(step: int, batch: int) -> None:
        steps = max(1, round(images / batch))  # of a window
        window, place = divmod(step, steps)
        listed = wanted((window + 1) * steps, (window + 2) * steps)
        for chunk in listed[place * len(listed) // steps : (place + 1) * len(listed) // steps]:
            first = samples.usable[chunks[chunk - 1] if chunk else 0]
            last = samples.usable[chunks[chunk] - 1]
            end = int(samples.offset[last] + samples.size[last])
            _will_need(samples.maps[int(samples.shard[first])], int(samples.offset[first]), end)

    return read


def damaged(
    root: str,
    manifest: Manifest,
    shards: tuple[np.ndarray, ...],
    columns: dict[str, np.ndarray],
    cache: Path | None,
    say: Callable[[str], None],
) -> dict[int, str]:
    """The store's rows whose bytes are not those that were packed, with the reason.

    Remembered in `cache` for as long as the store's files keep their times.
    """
    files = [
        os.path.join(root, name)
        for name in (tar_store.MANIFEST, *(shard.name for shard in manifest.shards))
    ]
    seen = [(os.path.realpath(path), os.stat(path).st_mtime_ns) for path in files]
    seal = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]
    note = None if cache is None else cache / "verified" / f"{seal}.json"
    reason = "its bytes are not those that were packed (CRC-32)"
    if note is not None and note.exists():
        return dict.fromkeys(json.loads(note.read_text(encoding="utf-8")), reason)
    found = dict.fromkeys(_compared(shards, columns, say), reason)
    if note is not None:
        part = note.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError):  # then the next process reads all again
            note.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(list(found)), encoding="utf-8")
            part.replace(note)
    return found


def _compared(
    shards: tuple[np.ndarray, ...], columns: dict[str, np.ndarray], say: Callable[[str], None]
) -> list[int]:
    """The rows whose checksums differ."""
    count = len(columns["offset"])

    def compare(begin: int) -> list[int]:
        rows = slice(begin, begin + 256)
        keys = ("shard", "offset", "size", "checksum")
        found = zip(*(columns[key][rows].tolist() for key in keys), strict=True)
        return [
            begin + place
            for place, (shard, offset, size, checksum) in enumerate(found)
            if zlib.crc32(shards[shard][offset : offset + size]) != checksum
        ]

    differ: list[int] = []
    last = time.monotonic()
    executor = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for done, rows in enumerate(executor.map(compare, range(0, count, 256)), 1):
            differ += rows
            if time.monotonic() - last > PROGRESS_SECONDS:
                last = time.monotonic()
                say(f"data: compared {min(done * 256, count):,} of {count:,} checksums")
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: not all the rest first
    return differ


def _allow_open_files(root: str, count: int) -> None:
    """Python keeps a mapped file open: 1.4 TB in tars of 512 MB pass the usual limit of 1,024.

    Raises:
        ValueError: that many can't be allowed.
    """
    wanted = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(
                f"data.root: {root} has {count:,} tars, and a process may have {hard:,} files open:"
                f" raise that (ulimit -Hn {wanted}), or pack larger tars (--shard-mb)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # a file of no bytes is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"data.root: cannot map {path}: {reason}") from None


def _will_need(mapped: mmap.mmap, begin: int, end: int) -> None:
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_WILLNEED, first, end - first)
