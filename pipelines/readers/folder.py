"""Images in a folder, nested at will: the listing, the check of every header, the DALI source.

A row is a file, and its place in the sorted listing is the index that the rest of the library
knows it by. Files that cannot be decoded keep their rows and are left out of `Samples.usable`.
"""

import hashlib
import io
import os
import stat
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.fn.io import file
from nvidia.dali.types import BatchInfo, DALIDataType

from pipelines.images import Decoding, Encoded, Image
from pipelines.readers import headers, subset

PROGRESS_SECONDS = 5  # between lines, while a listing or a scan is going on
_DIGEST = 32  # bytes

# Files that lie beside images and are none. All others are judged by their content.
SIDECARS = (
    *(b".txt", b".csv", b".tsv", b".json", b".jsonl", b".xml", b".yaml", b".yml", b".md"),
    *(b".npy", b".npz", b".pt", b".pth", b".pkl", b".mat", b".h5", b".parquet", b".htm", b".html"),
    *(b".py", b".sh", b".log", b".ini", b".db", b".md5", b".sha256"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    root: str  # folder; a first level of folders, if there is one, holds the classes
    bad: Literal["skip", "error"] = "skip"  # what to do about files that cannot be decoded
    # An image of more pixels is bad: it would take gigabytes to decode. The default is twice
    # Pillow's MAX_IMAGE_PIXELS, where Pillow too refuses: 512 MiB as RGB.
    max_pixels: int = 178_956_970
    # Use only so many images, evenly spaced over the usable ones: rows are then counted among them.
    limit: int | None = None
    # Few labels: this part of the usable images of every class (at least one of each), or so many
    # of every class. Rows are then counted among them, as with `limit`.
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0  # which of them: the same seed gives the same files on every machine

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name a folder with images")
        if self.bad not in ("skip", "error"):
            raise ValueError(f"bad ({self.bad!r}) must be 'skip' or 'error'")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels ({self.max_pixels}) must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit ({self.limit}) must be at least 1, or null for all")
        subset.check(
            fraction=self.fraction,
            per_class=self.per_class,
            subset_seed=self.subset_seed,
            limit=self.limit,
        )


@dataclass(frozen=True)
class Names:
    """File names, relative to the root, in one buffer: 1.3 million Python strings take 130 MB."""

    text: bytes
    ends: np.ndarray  # int64 [rows + 1], from 0: name k is text[ends[k]:ends[k + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.text[self.ends[row] : self.ends[row + 1]]

    def only(self, rows: np.ndarray) -> "Names":
        """Some of them, in the order of `rows`."""
        names = [self[row] for row in rows]
        return Names(b"".join(names), np.cumsum([0, *map(len, names)], dtype=np.int64))


@dataclass(frozen=True)
class Samples:
    """The images of a folder; a row is the index of an image, sorted by the bytes of its name."""

    root: str  # absolute
    names: Names
    # A class is a first-level folder that holds a usable image; there are none when a usable image
    # lies directly in the root.
    classes: tuple[str, ...]
    labels: np.ndarray | None  # int64 [rows]; -1 for bad files outside the classes' folders
    height: np.ndarray  # int32 [rows], pixels, after turning the image upright; 0 where unknown
    width: np.ndarray  # int32 [rows]
    usable: np.ndarray  # int64, the rows that can be decoded as far as their headers tell
    bad: dict[int, str]  # the other rows, with the reason
    fingerprint: str  # of all names and sizes: the same rows mean the same images
    written: str = ""  # of the times at which the files were written; empty: the fingerprint is of
    # their contents

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[row]))


def list_samples(options: Options, *, cache: Path | None, say: Callable[[str], None]) -> Samples:
    """List and check the images under `options.root`.

    Args:
        options: of this reader.
        cache: folder that keeps the headers seen, so that the next start reads those of new and
            changed files alone; it may be missing or damaged, and is then made anew.
        say: is called with single lines for the user, such as progress.

    Raises:
        ValueError: there is no such folder, it cannot be read, it holds no usable image, or, with
            `bad: error`, any file in it is bad; or a subset can't be taken.
    """
    root = os.path.abspath(os.path.expanduser(options.root))
    _check_root(root)
    clock = _Clock(say)
    files = _walk(os.fsencode(root), clock)
    remembered = cache and cache / "listings" / f"{_hash(os.fsencode(os.path.realpath(root)))}.npz"
    height, width = _recall(remembered, files, say)
    new = np.flatnonzero(height == 0)
    try:
        bad = _read_headers(os.fsencode(root), files.names, new, height, width, clock)
    finally:  # an interrupted scan goes on from here
        if remembered and len(new):
            _remember(remembered, files, height, width, say)
    for row in np.flatnonzero(height.astype(np.int64) * width > options.max_pixels).tolist():
        bad[row] = (
            f"{width[row]:,} x {height[row]:,} pixels, over data.max_pixels={options.max_pixels:,}"
        )
    bad = dict(sorted(bad.items()))
    _report(root, options, files, bad, say)
    good = np.ones(len(files.names), bool)
    good[np.fromiter(bad, np.int64, len(bad))] = False
    usable = np.flatnonzero(good)
    names, sizes, times = files.names, files.sizes, files.times
    classes, labels = _classes(names, usable)
    kept = subset.choose(
        usable,
        labels,
        classes,
        names.__getitem__,
        fraction=options.fraction,
        per_class=options.per_class,
        seed=options.subset_seed,
        root=root,
    )
    if options.limit is not None and options.limit < len(usable):
        kept = usable[np.linspace(0, len(usable) - 1, options.limit).astype(np.int64)]
    if kept is not None:
        names, sizes, height, width = names.only(kept), sizes[kept], height[kept], width[kept]
        times = times[kept]
        usable, bad = np.arange(len(kept)), {}
        classes, labels = _classes(names, usable)
    return Samples(
        root=root,
        names=names,
        classes=classes,
        labels=labels,
        height=height,
        width=width,
        usable=usable,
        bad=bad,
        fingerprint=_hash(names.text, names.ends.tobytes(), sizes.tobytes()),
        written=_hash(times.tobytes()),
    )


def source(
    samples: Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Inside a DALI pipeline definition: the encoded images and their rows.

    Args:
        samples: the listing.
        rows: gives the rows, int64 [batch], of a step; steps are counted from 0, and a pipeline
            that is restored from a checkpoint goes on counting. It raises StopIteration at the end.
        decoding: how the graph is to decode them.

    Returns:
        image: its bytes, read from disk by DALI's threads, not by Python.
        index: int64 [1].
    """
    root = os.path.join(os.fsencode(samples.root), b"")

    def batch(info: BatchInfo) -> tuple[list[np.ndarray], np.ndarray]:
        chosen = rows(info.iteration)
        paths = [np.frombuffer(root + samples.names[row], np.uint8) for row in chosen]
        return paths, chosen.reshape(-1, 1)

    path, index = fn.external_source(
        batch,
        num_outputs=2,
        batch=True,
        batch_info=True,
        dtype=[DALIDataType.UINT8, DALIDataType.INT64],
        ndim=[1, 1],
    )
    # Not mapped into memory: a mapped file that is cut off meanwhile kills the process (SIGBUS).
    return Encoded(file.read(path, dont_use_mmap=True), decoding), index


@dataclass(frozen=True)
class _Files:
    names: Names
    sizes: np.ndarray  # int64 [rows], bytes
    times: np.ndarray  # int64 [rows], of the last modification, ns
    left_out: int  # hidden files and sidecars
    loops: tuple[bytes, ...]  # links to a folder that they lie in


class _Clock:
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


def _check_root(root: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise ValueError(f"data.root: {root} is a file: give the folder that holds the images")
        if all(os.path.exists(os.path.join(root, name)) for name in ("manifest.json", "index")):
            raise ValueError(
                f"data.root: {root} is a packed store: read it with "
                "data.use=pipelines.readers.packed"
            )
    except FileNotFoundError:
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        raise ValueError(f"data.root: there is no folder {root}, only {parent}") from None
    except OSError as error:
        raise ValueError(_cannot_read(root, error)) from None


def _walk(root: bytes, clock: _Clock) -> _Files:
    """All files under `root`, links followed, in the order of their names' bytes."""
    text, ends, sizes, times = bytearray(), array("q", [0]), array("q"), array("q")
    loops: list[bytes] = []
    status = os.stat(root)
    above = [(status.st_dev, status.st_ino)]  # the folders from the root to where the walk is
    entries, left_out = _entries(root, b"")
    pending = [entries]  # what is still to be visited in each of them
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            above.pop()
            continue
        name, size, modified = entry  # for a folder: name, device and inode
        if not name.endswith(b"/"):
            text += name
            ends.append(len(text))
            sizes.append(size)
            times.append(modified)
            if len(sizes) % 1000 == 0 and clock.is_due():
                clock.say(f"data: listed {len(sizes):,} files")
        elif entry[1:] in above:
            loops.append(name[:-1])
        else:
            entries, hidden = _entries(root, name)
            left_out += hidden
            pending.append(entries)
            above.append(entry[1:])
    return _Files(
        Names(bytes(text), np.array(ends, np.int64)),
        np.array(sizes, np.int64),
        np.array(times, np.int64),
        left_out,
        tuple(loops),
    )


def _entries(root: bytes, folder: bytes) -> tuple[Iterator[tuple[bytes, int, int]], int]:
    """What lies in a folder, sorted, by name from the root; and how many entries were left out.

    A file comes with its size and time, a folder with its device and inode and a slash behind its
    name. The slash makes this the order of whole names as well: "a.b" comes before "a/b".
    """
    found: list[tuple[bytes, int, int]] = []
    left_out = 0
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = folder + entry.name
                try:
                    status = entry.stat()
                except OSError:  # a link that leads nowhere is bad: opening it will say why
                    status = None
                is_folder = status is not None and stat.S_ISDIR(status.st_mode)
                if entry.name.startswith(b".") or (
                    not is_folder and entry.name.lower().endswith(SIDECARS)
                ):
                    left_out += 1
                elif status is None:
                    found.append((name, 0, 0))
                elif is_folder:
                    found.append((name + b"/", status.st_dev, status.st_ino))
                elif stat.S_ISREG(status.st_mode):
                    found.append((name, status.st_size, status.st_mtime_ns))
                else:  # a socket, a pipe
                    left_out += 1
    except OSError as error:
        where = _shown(os.path.join(root, folder))
        raise ValueError(_cannot_read(where, error)) from None
    found.sort()
    return iter(found), left_out


def _read_headers(
    root: bytes,
    names: Names,
    rows: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    clock: _Clock,
) -> dict[int, str]:
    """Fill in `height` and `width` of `rows`; returns the bad ones among them, with the reason."""

    def read(block: np.ndarray) -> dict[int, str]:
        bad: dict[int, str] = {}
        for row in block.tolist():
            try:
                height[row], width[row] = headers.dimensions(os.path.join(root, names[row]))
            except ValueError as error:
                bad[row] = str(error)
        return bad

    bad: dict[int, str] = {}
    # More than cores, as the standard library does for I/O: on a network disk most of them wait.
    executor = ThreadPoolExecutor(min(32, 4 + len(os.sched_getaffinity(0))))
    try:
        blocks = [rows[begin : begin + 256] for begin in range(0, len(rows), 256)]
        for done, found in enumerate(executor.map(read, blocks), 1):
            bad.update(found)
            if clock.is_due():
                read_so_far = min(done * 256, len(rows))
                clock.say(f"data: scanned {read_so_far:,} of {len(rows):,} headers")
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: not all the rest first
    return bad


def _recall(
    path: Path | None, files: _Files, say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the files that the cache knows, as they are now; 0 for all others."""
    rows = len(files.names)
    height, width = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    if path is None or not os.path.exists(path):
        return height, width
    try:
        content = path.read_bytes()
    except OSError as error:
        say(f"data: cannot read {path}: {error.strerror}; reading all headers again")
        return height, width
    if content[:_DIGEST] != _digest(content[_DIGEST:]):
        say(f"data: {path} is damaged or of another version; reading all headers again")
        return height, width
    with np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False) as old:
        names = Names(old["text"].tobytes(), old["ends"])
        if names.text == files.names.text and np.array_equal(names.ends, files.names.ends):
            here = there = np.arange(rows)
        else:
            here, there = _shared(files.names, names)
        same = (files.sizes[here] == old["sizes"][there]) & (
            files.times[here] == old["times"][there]
        )
        here, there = here[same], there[same]
        height[here], width[here] = old["height"][there], old["width"][there]
    return height, width


def _remember(
    path: Path,
    files: _Files,
    height: np.ndarray,
    width: np.ndarray,
    say: Callable[[str], None],
) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        text=np.frombuffer(files.names.text, np.uint8),
        ends=files.names.ends,
        sizes=files.sizes,
        times=files.times,
        height=height,  # 0 for bad files: they are read again at each start, being few
        width=width,
    )
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_digest(content.getbuffer()) + content.getbuffer())
        part.replace(path)  # at once: another process reads the old file or the new one
    except OSError as error:
        say(f"data: cannot write {path}: {error.strerror}; the next start reads all headers again")
        with suppress(OSError):
            part.unlink()


def _shared(names: Names, others: Names) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the names that are in both, here and there; both are sorted."""
    here, there = array("q"), array("q")
    other = 0
    for row in range(len(names)):
        name = names[row]
        while other < len(others) and others[other] < name:
            other += 1
        if other < len(others) and others[other] == name:
            here.append(row)
            there.append(other)
    return np.array(here, np.int64), np.array(there, np.int64)


def _report(
    root: str, options: Options, files: _Files, bad: dict[int, str], say: Callable[[str], None]
) -> None:
    """Say what is left out, or raise where that is an error."""
    rows = len(files.names)
    left_out = (
        f" (+ {files.left_out:,} left out: hidden, or named as no image is, such as *.txt)"
        if files.left_out
        else ""
    )
    if rows == 0:
        raise ValueError(f"data.root: no images in {root}: found 0 files{left_out}")
    named = _few([f"{_shown(files.names[row])} ({reason})" for row, reason in bad.items()])
    if len(bad) == rows:
        raise ValueError(
            f"data.root: no images in {root}: none of {rows:,} files{left_out} is one: {named}"
        )
    loops = _few([_shown(link) for link in files.loops])
    if options.bad == "error" and bad:
        raise ValueError(
            f"data.root: {len(bad):,} of {rows:,} files in {root} cannot be used: {named}; "
            "remove them, or leave them out with data.bad=skip"
        )
    if options.bad == "error" and loops:
        raise ValueError(
            f"data.root: links in {root} lead back to a folder that they lie in: {loops}; "
            "remove them, or leave them out with data.bad=skip"
        )
    if bad:
        say(f"data: skipping {len(bad):,} of {rows:,} files: {named} (data.bad=error refuses them)")
    if loops:
        say(f"data: not following links that lead back to a folder that they lie in: {loops}")


def _cannot_read(where: str, error: OSError) -> str:
    return f"data.root: cannot read the folder {where} as user {os.geteuid()}: {error.strerror}"


def _few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5:,} more" if len(items) > 5 else "")


def _shown(name: bytes) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    text = os.fsdecode(name)
    return text if text.isprintable() else ascii(text)


def _classes(names: Names, usable: np.ndarray) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The first-level folders of `usable` rows, and which of them each row, int64 [rows], is in."""
    labels = np.full(len(names), -1, np.int64)
    classes: list[str] = []
    row = 0
    while row < len(usable):
        folder, slash, _ = names[usable[row]].partition(b"/")
        if not slash:
            return (), None
        begin = bisect_left(names, folder + b"/")
        end = bisect_left(names, folder + b"0")  # the character after the slash
        labels[begin:end] = len(classes)
        classes.append(os.fsdecode(folder))
        row = int(np.searchsorted(usable, end))
    return tuple(classes), labels


def _hash(*parts: bytes) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _digest(content: bytes | memoryview) -> bytes:
    """What a file of the cache begins with: of its content, and of the version of its layout."""
    return hashlib.blake2b(content, digest_size=_DIGEST, person=b"listing 1").digest()
