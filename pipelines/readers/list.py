"""Images that a list names: paths or s3:// urls, with labels, in text, CSV, TSV or Parquet.

A row is an entry of the list, in its order: the index that the rest of the library knows it by. A
path is absolute, or relative to the list's own folder or to `data.base`. Headers of files on this
machine are checked as the folder reader checks them; those of what lies in an object store when it
is fetched. `pipelines.readers.entries` says how a list is written.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nvidia.dali.data_node import DataNode

from pipelines.images import Decoding, Image
from pipelines.readers import contents, entries, object_store, quarantine, seen, subset
from pipelines.readers.entries import Entries
from pipelines.readers.names import Names, few, shown

_SCHEME = object_store.SCHEME.encode()


@dataclass(frozen=True, kw_only=True)
class Options:
    root: str  # the list: its name ends in .txt, .csv, .tsv or .parquet
    base: str | None = None  # folder, or s3://bucket/prefix, that entries are relative to; null:
    # the list's own folder
    path_column: str | None = None  # of a CSV, TSV or Parquet; null: path, file, filename, ...
    label_column: str | None = None  # null: label, class, ..., if there is one
    # check: the size and time of every file is looked at, and the headers of new and changed files
    # are read. trust: files that were once found good are not looked at.
    listing: Literal["check", "trust"] = "check"
    bad: Literal["skip", "error"] = "skip"  # what to do about files that cannot be decoded
    max_pixels: int = 178_956_970  # an image of more is bad: see pipelines.readers.folder
    # Use only so many images, evenly spaced over the usable ones: rows are then counted among them.
    limit: int | None = None
    # Few labels: this part of the usable images of every class (at least one of each), or so many
    # of every class. Rows are then counted among them, as with `limit`.
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0  # which of them: the same seed gives the same entries on every machine
    quarantine: str | None = None  # file of entries to leave out, as `python -m fastssl.data check`
    # writes it; they keep their rows
    retries: int = 10  # of a request to an object store, with growing pauses: 65 s in all
    timeout_s: float = 30.0  # without a byte from it, until a connection is given up
    requests: int = 32  # to it, at a time

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name a list of images")
        object_store.refuse_others("root", self.root)
        object_store.refuse_others("base", self.base or "")
        if self.base == "":
            raise ValueError("base ('') must name a folder, or be null for the list's own")
        if self.listing not in ("check", "trust"):
            raise ValueError(f"listing ({self.listing!r}) must be 'check' or 'trust'")
        if self.bad not in ("skip", "error"):
            raise ValueError(f"bad ({self.bad!r}) must be 'skip' or 'error'")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels ({self.max_pixels}) must be at least 1")
        subset.check(
            fraction=self.fraction,
            per_class=self.per_class,
            subset_seed=self.subset_seed,
            limit=self.limit,
        )
        self.access()

    def access(self) -> object_store.Access:
        """How an object store is asked.

        Raises:
            ValueError: says what of it can't be.
        """
        return object_store.Access(
            retries=self.retries, timeout_s=self.timeout_s, requests=self.requests
        )


@dataclass(frozen=True)
class Samples:
    """The entries of a list; as `pipelines.readers.folder.Samples`, and where they are found."""

    root: str  # absolute, the list
    base: bytes  # that entries are relative to, with a slash behind it
    names: Names  # the entries, as the list has them; mapped where there is a cache
    is_remote: np.ndarray | None  # bool [rows], which are in an object store; None: not one
    access: object_store.Access
    max_pixels: int  # of an image in an object store, which is looked at when it comes
    told: dict[int, str]  # rows whose object is missing or bad, as they were met
    classes: tuple[str, ...]
    labels: np.ndarray | None  # int64 [rows]
    height: np.ndarray  # int32 [rows], pixels; 0 where unknown: bad, or in an object store
    width: np.ndarray  # int32 [rows]
    usable: np.ndarray  # int64, the rows that can be decoded as far as was looked
    bad: dict[int, str]  # the other rows, with the reason
    chunks: None  # images lie each on its own
    window: int
    fingerprint: str  # of all entries, labels and sizes of files
    written: str  # of the times at which the files were written

    def __len__(self) -> int:
        return len(self.names)

    def place(self, row: int) -> bytes:
        """Its absolute path, or its url."""
        name = self.names[row]
        if name.startswith(b"/") or entries.URL_START.match(name):
            return name
        if self.base.startswith(_SCHEME):  # to an object store "./x" is another name than "x"
            name = entries.HERE.sub(b"", name)
        return self.base + name

    def path(self, row: int) -> str:
        return os.fsdecode(self.place(row))


def list_samples(options: Options, *, cache: Path | None, say: Callable[[str], None]) -> Samples:
    """Reads a list and checks the images that it names.

    Args:
        options: of this reader.
        cache: folder that keeps the list as read, and the headers seen: the next start reads those
            of new and changed files alone. Processes share the memory of what is kept there. It may
            be missing or damaged.
        say: is called with single lines for the user, such as progress.

    Raises:
        ValueError: there is no such list, it can't be read, none of its images can be used, or,
            with `bad: error`, any can't; or a subset can't be taken.
    """
    listed = (
        None if options.quarantine is None else quarantine.read(options.quarantine, options.root)
    )
    is_url = object_store.is_url(options.root)
    root = options.root if is_url else os.path.abspath(os.path.expanduser(options.root))
    _check_root(root)
    base = _base(root, options.base)
    what = (os.path.realpath(root), base, options.path_column, options.label_column)
    key = hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()
    path = None if cache is None else cache / "lists" / f"{key}.arrays"
    known = seen.known(root, options.path_column, options.label_column, path, say)
    is_remote = _is_remote(known.entries, base)
    known, bad = seen.checked(known, base, is_remote, path, trust=options.listing == "trust")
    for row in _too_large(known.height, known.width, options.max_pixels):
        bad[row] = (
            f"{known.width[row]:,} x {known.height[row]:,} pixels, over"
            f" data.max_pixels={options.max_pixels:,}"
        )
    bad = dict(sorted(bad.items()))
    _report(root, base, options, known.entries, bad, say)
    if listed is not None:
        names = known.entries.names
        bad = quarantine.rows(listed, len(names), names.__getitem__, say) | bad
        if len(bad) == len(names):
            raise ValueError(
                f"data.root: no image of {root} is left: those that can be decoded are quarantined"
            )
    return _samples(root, base, options, known, is_remote, dict(sorted(bad.items())))


def source(
    samples: Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Inside a DALI pipeline definition: the encoded images and their rows.

    Args:
        samples: the list.
        rows: gives the rows, int64 [batch], of a step; steps are counted from 0, and a pipeline
            that is restored from a checkpoint goes on counting. It raises StopIteration at the end.
        decoding: how the graph is to decode them.

    Returns:
        image: its bytes: of a list of files read by DALI's threads; where urls are among them, by
            `pipelines.readers.object_store`, ahead of need.
        index: int64 [1].
    """
    if samples.is_remote is None:
        return contents.files(samples.place, rows, decoding)
    return contents.objects(
        samples.place,
        samples.is_remote,
        samples.access,
        samples.max_pixels,
        samples.told,
        rows,
        decoding,
    )


def _check_root(root: str) -> None:
    if object_store.is_url(root):
        raise ValueError(f"data.root: copy the list {root} to this machine; what it names may stay")
    try:
        status = os.stat(root)
    except FileNotFoundError:
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        raise ValueError(f"data.root: there is no list {root}, only {parent}") from None
    except OSError as error:
        raise ValueError(f"data.root: cannot read {root}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"data.root: {root} is no file, but data.use=pipelines.readers.list wants the file that"
            " lists the images; a folder of images is read with data.use=pipelines.readers.folder"
        )


def _base(root: str, base: str | None) -> bytes:
    """What entries are relative to, with a slash behind it."""
    if base is None:
        return os.path.join(os.path.dirname(os.fsencode(root)), b"")
    if object_store.is_url(base):
        return os.fsencode(object_store.join(base, ""))
    folder = os.path.abspath(os.path.expanduser(base))
    if not os.path.isdir(folder):
        raise ValueError(f"data.base: there is no folder {folder}")
    return os.path.join(os.fsencode(folder), b"")


def _is_remote(found: Entries, base: bytes) -> np.ndarray:
    """Which entries are in an object store: bool [entries]."""
    names = found.names
    is_remote = found.kinds == entries.URL
    last = max(0, len(names.text) - 1)
    for place, byte in enumerate(_SCHEME):
        is_remote &= names.text[np.minimum(names.ends[:-1] + place, last)] == byte
    if base.startswith(_SCHEME):
        is_remote |= found.kinds == entries.RELATIVE
    return is_remote


def _too_large(height: np.ndarray, width: np.ndarray, most: int) -> list[int]:
    """Rows of images of more than `most` pixels."""
    found: list[int] = []
    for begin in range(0, len(height), 1 << 20):  # as int64 at once they would take memory
        part = slice(begin, begin + (1 << 20))
        many = height[part].astype(np.int64) * width[part] > most
        found += (np.flatnonzero(many) + begin).tolist()
    return found


def _report(
    root: str,
    base: bytes,
    options: Options,
    found: Entries,
    bad: dict[int, str],
    say: Callable[[str], None],
) -> None:
    """Say what is left out, or raise where that is an error."""
    if not bad:
        return
    first = [f"{shown(found.names[row])} ({bad[row]})" for row in list(bad)[:5]]
    named = few(first, len(bad))
    if len(bad) == len(found):
        tab = ", and a label stands behind a tab" if root.lower().endswith(".txt") else ""
        raise ValueError(
            f"data.root: none of the {len(found):,} images that {root} lists can be used: {named};"
            f" entries are relative to {shown(base)} (data.base says another place){tab}"
        )
    if options.bad == "error":
        raise ValueError(
            f"data.root: {len(bad):,} of {len(found):,} images that {root} lists cannot be used:"
            f" {named}; take them out, or leave them out with data.bad=skip"
        )
    say(
        f"data: skipping {len(bad):,} of {len(found):,} entries: {named}"
        " (data.bad=error refuses them)"
    )


def _samples(
    root: str,
    base: bytes,
    options: Options,
    known: seen.Known,
    is_remote: np.ndarray,
    bad: dict[int, str],
) -> Samples:
    """The rows that the options ask for."""
    good = np.ones(len(is_remote), bool)
    good[np.fromiter(bad, np.int64, len(bad))] = False
    usable = np.flatnonzero(good)
    names, labels, classes = known.entries.names, known.entries.labels, known.entries.classes
    height, width, sizes, times = known.height, known.width, known.sizes, known.times
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
        names, is_remote = names.only(kept), is_remote[kept]
        height, width, sizes, times = height[kept], width[kept], sizes[kept], times[kept]
        labels = None if labels is None else labels[kept]
        usable, bad = np.arange(len(kept)), {}
    return Samples(
        root=root,
        base=base,
        names=names,
        is_remote=is_remote if is_remote.any() else None,
        access=options.access(),
        max_pixels=options.max_pixels,
        told={},
        classes=classes,
        labels=labels,
        height=height,
        width=width,
        usable=usable,
        bad=bad,
        chunks=None,
        window=1,
        fingerprint=_hash(
            *(names.text, names.ends, sizes),
            *(() if labels is None else (labels, np.frombuffer(repr(classes).encode(), np.uint8))),
        ),
        written=_hash(times),
    )


def _hash(*parts: np.ndarray) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(np.ascontiguousarray(part).data)
    return state.hexdigest()
