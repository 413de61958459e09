"""Writes a packed store: images converted by all cores, in order, whole or not at all.

The layout is described and defined in pipelines/readers/packed.py, which reads it. The same source
and the same form give the same bytes, however many workers there are. Everything is written under
`STORE.part`, forced to the disk, and becomes STORE by a rename at the end.
"""

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, features

import fastssl
from fastssl import pack_image
from fastssl.pack_image import Form, Packed

LAYOUT = "pipelines.readers.packed"
PROGRESS_SECONDS = 5
_CHUNK = 8  # images a task of a worker: raw ones of full size are megabytes each


@dataclass(frozen=True)
class Done:
    """What was written."""

    images: int
    left_out: dict[str, str]  # names in the source, with the reason
    bytes: int
    seconds: float


def pack(
    samples: Any,
    store: Path,
    form: Form,
    *,
    shard_mb: int,
    workers: int,
    refuse_bad: bool = False,
    say: Callable[[str], None] = print,
) -> Done:
    """Writes the images of a listing into a new store.

    Args:
        samples: what a reader's `list_samples` gave; each row a file.
        store: the folder to make.
        form: what images are made into.
        shard_mb: megabytes (1e6 bytes) that a shard file has at most, unless an image has more.
        workers: processes.
        refuse_bad: stop at the first file that cannot be decoded, in place of leaving it out.
        say: is called with single lines for the user.

    Raises:
        ValueError: the store is there already or being written, or no file can be decoded.
        OSError: the disk is full, or cannot be written.
    """
    began = time.monotonic()
    layout = importlib.import_module(LAYOUT)  # pipelines/ is beside us, not beneath
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(_part(store))
        left_out = {_name(samples, row): reason for row, reason in samples.bad.items()}
        shards = stack.enter_context(
            contextlib.closing(_Shards(part, layout, shard_mb * 1_000_000))
        )
        columns: dict[str, array[int]] = {
            key: array(dtype.char) for key, dtype in layout.COLUMNS.items() if key != "name"
        }
        names = bytearray()
        clock = _Clock(len(samples.usable), say)
        results = stack.enter_context(contextlib.closing(_results(samples, form, workers)))
        for row, result in results:
            name = _name(samples, row)
            if isinstance(result, str):
                if refuse_bad:
                    raise ValueError(
                        f"{_shown(samples.path(row))}: {result}; remove it, or leave it out with"
                        " data.bad=skip"
                    )
                left_out[name] = result
                say(f"pack: leaving out {_shown(name)}: {result}")
            else:
                shard, offset = shards.append(result.content)
                names += os.fsencode(name)
                label = -1 if samples.labels is None else int(samples.labels[row])
                entry = {"shard": shard, "offset": offset, "size": len(result.content)}
                entry |= {"height": result.height, "width": result.width, "label": label}
                entry |= {"checksum": result.checksum, "name_end": len(names)}
                for key, value in entry.items():
                    columns[key].append(value)
            clock.tick(shards.total)
        images = len(columns["offset"])
        if images == 0:
            few = ", ".join(
                f"{_shown(name)} ({reason})" for name, reason in list(left_out.items())[:5]
            )
            raise ValueError(
                f"{samples.root}: not one of its {len(left_out):,} images can be decoded: {few}"
            )
        shards.finish()
        content: dict[str, np.ndarray] = {
            key: np.array(column, layout.COLUMNS[key]) for key, column in columns.items()
        }
        content["name"] = np.frombuffer(bytes(names), layout.COLUMNS["name"])
        manifest = _manifest(samples, form, layout) | {
            "images": images,
            "left_out": left_out,
            "shards": [{"name": name, "bytes": size} for name, size in shards.written],
            "index": _write_index(part / layout.INDEX, content),
        }
        text = json.dumps(manifest, indent=1) + "\n"  # ASCII: names may be no text at all
        _write(part / layout.MANIFEST, text.encode())
        total = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    return Done(images, left_out, total, time.monotonic() - began)


def check_new(store: Path) -> None:
    """Whether a store can be made there.

    Raises:
        ValueError: it cannot; says why.
    """
    if os.path.lexists(store):
        raise ValueError(f"{store} is there already: remove it, or name another folder")
    if not store.parent.is_dir():
        raise ValueError(f"{store}: there is no folder {store.parent}: make it, or name another")


def _manifest(samples: Any, form: Form, layout: ModuleType) -> dict[str, Any]:
    """What is known of a store beforehand; no path and no time, so that it is always the same."""
    is_jpeg = form.form == "jpeg"
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "form": form.form,
        "short_side": None if form.square else form.short_side,
        "square": form.square,
        "quality": form.quality if is_jpeg else None,
        "subsampling": pack_image.SUBSAMPLING if is_jpeg else None,
        "filter": pack_image.FILTER.name.lower(),
        "classes": list(samples.classes),
        "source": {"fingerprint": samples.fingerprint, "listed": len(samples)},
        "fastssl": fastssl.__version__,
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }


@contextlib.contextmanager
def _part(store: Path) -> Iterator[Path]:
    """The folder to write in, which becomes `store` when the block ends and is removed if it fails.

    What a pack that was killed has left there is removed. A lock, which the kernel opens when its
    process ends, tells that from a pack that is at work.
    """
    part = store.with_name(f"{store.name}.part")
    check_new(store)
    part.mkdir(exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{part} is being written by another process: wait for it") from None
        if not part.is_dir() or not os.path.samestat(os.fstat(lock), part.stat()):
            raise ValueError(f"{store} was made by another process just now")
        try:
            for left in part.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield part
            for folder in (*(each for each in part.iterdir() if each.is_dir()), part):
                _sync(folder)
            part.rename(store)
            _sync(store.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # gives a full disk its space back
            raise
    finally:
        os.close(lock)


class _Shards:
    """The files that images are appended to; a new one when the next image would not fit."""

    def __init__(self, folder: Path, layout: ModuleType, most: int) -> None:
        self.written: list[tuple[str, int]] = []  # name and bytes of each file
        self.total = 0  # bytes
        self._folder, self._layout, self._most = folder, layout, most
        self._file: int | None = None

    def append(self, content: bytes) -> tuple[int, int]:
        """Returns the number of the file, and the offset in it."""
        if self._file is not None and self._start() + len(content) > self._most:
            self.finish()
        if self._file is None:
            name = f"shard-{len(self.written):05d}.bin"
            self._file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self.written.append((name, 0))
            self._write(self._layout.HEADING)
        start = self._start()
        self._write(bytes(start - self.written[-1][1]) + content)
        return len(self.written) - 1, start

    def finish(self) -> None:
        """Forces the last file to the disk."""
        if self._file is not None:
            os.fsync(self._file)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _start(self) -> int:
        """Where the next image begins."""
        return -(-self.written[-1][1] // self._layout.ALIGNMENT) * self._layout.ALIGNMENT

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        name, size = self.written[-1]
        self.written[-1] = name, size + len(content)
        self.total += len(content)


def _results(
    samples: Any, form: Form, workers: int
) -> Generator[tuple[int, Packed | str], None, None]:
    """The usable rows in order, each with what is to be stored or the reason why not.

    No more tasks are under way than keep the workers busy, so that memory does not grow.

    Raises:
        ValueError: a worker was killed, as by the kernel for want of memory.
    """
    # forkserver: the parent has threads of its own, which do not survive a fork. The workers import
    # the program again (`python -m fastssl.data`), so that nothing heavy is at its top.
    context = multiprocessing.get_context("forkserver")
    interrupt = _Interrupt()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    pending: deque[tuple[list[int], Future[list[Packed | str]]]] = deque()
    chunks = (
        samples.usable[begin : begin + _CHUNK].tolist()
        for begin in range(0, len(samples.usable), _CHUNK)
    )
    try:
        for chunk in chunks:
            paths = [samples.path(row) for row in chunk]
            pending.append((chunk, executor.submit(pack_image.pack_all, paths, form)))
            if len(pending) > 2 * workers:
                rows, future = pending.popleft()
                yield from zip(rows, interrupt.result(future), strict=True)
        while pending:
            rows, future = pending.popleft()
            yield from zip(rows, interrupt.result(future), strict=True)
    except BrokenProcessPool:
        raise ValueError(
            f"a worker process was killed, perhaps for want of memory: give fewer than"
            f" --workers {workers}"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
        interrupt.restore()


class _Interrupt:
    """Ctrl-C, told where it does no harm.

    Python raises KeyboardInterrupt between any two of its instructions: also between the taking of
    a lock of the executor's and the block that gives it back, and then shutdown waits for ever.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before = signal.getsignal(signal.SIGINT)
        # Another handler, or none in a script's background job, is the caller's wish.
        self._ours = (
            self._before is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if self._ours:
            signal.signal(signal.SIGINT, lambda *_: self._asked.set())

    def result(self, future: Future[list[Packed | str]]) -> list[Packed | str]:
        """What the future gives.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        while not self._asked.is_set():
            if wait([future], timeout=0.1).done:
                return future.result()
        raise KeyboardInterrupt

    def restore(self) -> None:
        """The handler that was there before."""
        if self._ours:
            signal.signal(signal.SIGINT, self._before)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, on metadata that nobody needs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, which would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Clock:
    """Says how far it is, every few seconds."""

    def __init__(self, images: int, say: Callable[[str], None]) -> None:
        self._images, self._say = images, say
        self._began = self._last = time.monotonic()
        self._done = 0

    def tick(self, size: int) -> None:
        """One image more; `size` is of all so far, in bytes."""
        self._done += 1
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = (self._images - self._done) / rate
        self._say(
            f"pack: {self._done:,} of {self._images:,} images, {size / 1e9:.2f} GB,"
            f" {rate:,.0f} images/s, {left / 60:,.0f} min left"
        )


def _name(samples: Any, row: int) -> str:
    return os.path.relpath(samples.path(row), samples.root)


def _shown(name: str) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


def _write_index(folder: Path, content: dict[str, np.ndarray]) -> dict[str, str]:
    """Writes the columns; returns the SHA-256 of each file."""
    folder.mkdir()
    digests: dict[str, str] = {}
    for name, column in content.items():
        file = io.BytesIO()
        np.save(file, column, allow_pickle=False)
        _write(folder / f"{name}.npy", file.getbuffer())
        digests[name] = hashlib.sha256(file.getbuffer()).hexdigest()
    return digests


def _write(path: Path, content: bytes | memoryview) -> None:
    """All of it, on the disk."""
    with path.open("xb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
