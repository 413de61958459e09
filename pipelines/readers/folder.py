"""Images in a folder, nested at will: the listing, the check of every header, the DALI source.

A row is a file, and its place in the sorted listing is the index that the rest of the library
knows it by. Files that cannot be decoded keep their rows and are left out of `Samples.usable`.
"""

import hashlib
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from nvidia.dali.data_node import DataNode

from pipelines.images import Decoding, Image
from pipelines.readers import SECOND, contents, headers, listing, quarantine, scan, subset
from pipelines.readers.listing import Listing
from pipelines.readers.names import Names, few, shown
from pipelines.readers.walk import cannot_read

_CHUNK = 1 << 22  # numbers hashed at a time


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
    quarantine: str | None = None  # file of `fastssl.data check`: the images in it are left out
    # What the next start asks for: the status of every folder and file, or, to trust that a file
    # in an unchanged folder is unchanged, of folders alone. Trust misses files written to in place.
    listing: Literal["check", "trust"] = "check"

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name a folder with images")
        if self.bad not in ("skip", "error"):
            raise ValueError(f"bad ({self.bad!r}) must be 'skip' or 'error'")
        if self.listing not in ("check", "trust"):
            raise ValueError(f"listing ({self.listing!r}) must be 'check' or 'trust'")
        if self.quarantine is not None and not self.quarantine:
            raise ValueError("quarantine must name a file of fastssl.data check, or be null")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels ({self.max_pixels}) must be at least 1")
        subset.check(
            fraction=self.fraction,
            per_class=self.per_class,
            subset_seed=self.subset_seed,
            limit=self.limit,
        )


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
    chunks: np.ndarray | None = None  # files lie each on its own
    window: int = 1

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[row]))


def list_samples(options: Options, *, cache: Path | None, say: Callable[[str], None]) -> Samples:
    """List and check the images under `options.root`.

    Args:
        options: of this reader.
        cache: folder that keeps the listing, so that the next start asks only what has changed and
            reads the headers of new and changed files alone; it may be missing or damaged, and is
            then made anew. What is kept there is mapped, and shared by processes.
        say: is called with single lines for the user, such as progress.

    Raises:
        ValueError: there is no such folder, it cannot be read, it holds no usable image, or those
            of train/ and val/ in place of classes, or, with `bad: error`, any file in it is bad; or
            a subset can't be taken, or there is no such quarantine file.
    """
    root = os.path.abspath(os.path.expanduser(options.root))
    _check_root(root)
    left_out = (
        {} if options.quarantine is None else quarantine.read(options.quarantine, options.root)
    )
    real = np.frombuffer(os.fsencode(os.path.realpath(root)), np.uint8)
    path = None if cache is None else cache / "listings" / f"{_hash(real)}.db"
    files = listing.read(root, path, check=options.listing == "check", say=say)
    names, height, width = files.names, files.height, files.width
    new = np.flatnonzero(height == 0)
    try:
        bad = _read_headers(os.fsencode(root), names, new, height, width, say)
    except BaseException:  # an interrupted scan goes on from here
        if path:
            listing.keep(path, files, None, None, (), say)
        raise
    is_new = len(bad) < len(new) or not files.stamp
    pixels = np.multiply(height, width, dtype=np.int64)
    for row in np.flatnonzero(pixels > options.max_pixels).tolist():
        bad[row] = (
            f"{width[row]:,} x {height[row]:,} pixels, over data.max_pixels={options.max_pixels:,}"
        )
    del pixels
    unasked = quarantine.rows(left_out, len(files), names.__getitem__, say, in_order=True)
    both = dict(sorted({**bad, **unasked}.items()))
    bad = {row: reason for row, reason in sorted(bad.items()) if row not in unasked}
    usable, labels, classes = _uses(files, both)
    if path:
        if is_new:
            files = listing.keep(path, files, usable, labels, classes, say)
            usable, labels, classes = _uses(files, both)
        listing.tell_checked(path, files)
    _refuse_splits(root, classes)
    _report(root, options, files, bad, len(unasked), say)
    return _samples(root, options, files, both, usable, labels, classes)


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
    return contents.files(lambda row: root + samples.names[row], rows, decoding)


def _check_root(root: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise ValueError(f"data.root: {root} is a file: give the folder that holds the images")
        if all(os.path.exists(os.path.join(root, name)) for name in ("manifest.json", "index")):
            raise ValueError(
                f"data.root: {root} is a tar store: read it with data.use=pipelines.readers.tar"
            )
    except FileNotFoundError:
        if url := re.search(r"/(s3|gs|az|https?):/[^/]", root):
            raise ValueError(
                f"data.root: {url[1]}:// is no folder: an object store (s3://) is read with"
                " data.use=pipelines.readers.tar or pipelines.readers.list"
            ) from None
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        raise ValueError(f"data.root: there is no folder {root}, only {parent}") from None
    except OSError as error:
        raise ValueError(cannot_read(root, error)) from None


def _refuse_splits(root: str, classes: tuple[str, ...]) -> None:
    """Train/ beside val/ would be taken for two classes, and the test for what to learn from."""
    splits = [f"{name}/" for name in ("train", *SECOND) if name in classes]
    if "train" in classes and len(splits) == len(classes) > 1:
        raise ValueError(
            f"data.root: {root} holds {', '.join(splits[:-1])} and {splits[-1]}: give one of them,"
            f" such as {os.path.join(root, 'train')}"
        )


def _read_headers(
    root: bytes,
    names: Names,
    rows: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    say: Callable[[str], None],
) -> dict[int, str]:
    """Fill in `height` and `width` of `rows`; returns the bad ones among them, with the reason."""

    def read(block: list[int]) -> dict[int, str]:
        bad: dict[int, str] = {}
        for row in block:
            try:
                height[row], width[row] = headers.dimensions(os.path.join(root, names[row]))
            except ValueError as error:
                bad[row] = str(error)
        return bad

    return scan.in_blocks(rows, read, scan.Clock(say), "scanned {} of {} headers")


def _uses(
    files: Listing, bad: dict[int, str]
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """The usable rows, the labels and the classes: those that are kept, if they are the same."""
    rows = np.fromiter(bad, np.int64, len(bad))
    kept = files.usable
    if kept is not None and len(kept) + len(rows) == len(files):
        place = np.searchsorted(kept, rows)
        place[place == len(kept)] = 0
        if not len(kept) or not (kept[place] == rows).any():
            return kept, files.labels, files.classes
    good = np.ones(len(files), bool)
    good[rows] = False
    usable = np.flatnonzero(good)
    classes, labels = _classes(files.names, usable)
    return usable, labels, classes


def _samples(
    root: str,
    options: Options,
    files: Listing,
    bad: dict[int, str],
    usable: np.ndarray,
    labels: np.ndarray | None,
    classes: tuple[str, ...],
) -> Samples:
    """All of the listing, or the subset that is asked for."""
    names, sizes, times = files.names, files.sizes, files.times
    height, width = files.height, files.width
    kept = subset.choose(
        usable,
        labels,
        classes,
        names.__getitem__,
        fraction=options.fraction,
        per_class=options.per_class,
        limit=options.limit,
        seed=options.subset_seed,
        root=root,
    )
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
        fingerprint=_hash(names.text, names.ends, sizes),
        written=_hash(times),
    )


def _report(
    root: str,
    options: Options,
    files: Listing,
    bad: dict[int, str],
    unasked: int,
    say: Callable[[str], None],
) -> None:
    """Say what is left out, or raise where that is an error; `unasked`: quarantined files."""
    rows = len(files)
    left_out = int(files.folders.left_out.sum())
    others = (
        f" (+ {left_out:,} left out: hidden, or named as no image is, such as *.txt)"
        if left_out
        else ""
    )
    if rows == 0:
        raise ValueError(f"data.root: no images in {root}: found 0 files{others}")
    first = [f"{shown(files.names[row])} ({bad[row]})" for row in islice(bad, 5)]
    named = few(first, len(bad))
    if unasked == rows:
        raise ValueError(
            f"data.root: no images in {root}: data.quarantine={options.quarantine} names all of "
            f"{rows:,} files{others}"
        )
    if len(bad) + unasked == rows:
        others += f" (+ {unasked:,} quarantined)" if unasked else ""
        raise ValueError(
            f"data.root: no images in {root}: none of {rows - unasked:,} files{others} is one: "
            f"{named}"
        )
    loops = few([shown(link) for link in files.loops])
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
    if unasked:
        say(f"data: leaving out {unasked:,} of {rows:,} files, quarantined by {options.quarantine}")
    if bad:
        say(f"data: skipping {len(bad):,} of {rows:,} files: {named} (data.bad=error refuses them)")
    if loops:
        say(f"data: not following links that lead back to a folder that they lie in: {loops}")


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


def _hash(*parts: np.ndarray) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        for begin in range(0, len(part), _CHUNK):
            state.update(np.ascontiguousarray(part[begin : begin + _CHUNK]).data)
    return state.hexdigest()
