"""Packed stores: images made ready once by `python -m fastssl.data pack`, in a few large files.

A store is a folder:
    manifest.json     what it is: keys in `Manifest`; whoever writes more keys need not ask
    shard-00000.bin   a heading of 64 bytes, then the images one behind the other, each from
                      a multiple of 64 bytes on: whole JPEG files, or RGB uint8 HWC pixels (raw)
    index/*.npy       one array a column, one entry an image, in the order of rows: `COLUMNS`
A row is the place in the index; bad files of the source have none. Shards are mapped into memory
and handed to DALI as they lie there: no copy, no Python per byte, and processes share the pages.
"""

import hashlib
import json
import mmap
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import BatchInfo, DALIDataType

from pipelines.images import Decoding, Encoded, Image, Pixels
from pipelines.readers import subset

FORMAT = "fastssl packed store"
VERSION = 1  # of the layout: readers refuse every other
MANIFEST = "manifest.json"
INDEX = "index"
ALIGNMENT = 64  # bytes: a line of the processor's cache, and its widest vectors
HEADING = FORMAT.encode().ljust(ALIGNMENT, b"\0")  # else a shard of JPEGs would pass for a JPEG
COLUMNS = {
    "shard": np.dtype("<i4"),  # number of the file
    "offset": np.dtype("<i8"),  # of the first byte in it
    "size": np.dtype("<i8"),  # bytes
    "height": np.dtype("<i4"),  # pixels as stored, upright
    "width": np.dtype("<i4"),
    "label": np.dtype("<i4"),  # -1 where there are no classes
    "checksum": np.dtype("<u4"),  # CRC-32 of the bytes
    "name_end": np.dtype("<i8"),  # in `name`, of the image's name in the source
    "name": np.dtype("u1"),  # all names one behind the other, as the file system spells them
}
PROGRESS_SECONDS = 5  # between lines, while checksums are compared


@dataclass(frozen=True, kw_only=True)
class Options:
    root: str  # the store's folder
    bad: Literal["skip", "error"] = "skip"  # what to do about images that `verify` finds damaged
    # Use only so many images, evenly spaced over the usable ones: rows are then counted among them.
    limit: int | None = None
    # Few labels: this part of the usable images of every class (at least one of each), or so many
    # of every class. Rows are then counted among them, as with `limit`.
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0  # which of them: those that the folder's reader takes of the source
    # Read everything once before training and compare checksums; else only sizes and the index.
    verify: bool = False

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name the folder of a packed store")
        if self.bad not in ("skip", "error"):
            raise ValueError(f"bad ({self.bad!r}) must be 'skip' or 'error'")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit ({self.limit}) must be at least 1, or null for all")
        subset.check(
            fraction=self.fraction,
            per_class=self.per_class,
            subset_seed=self.subset_seed,
            limit=self.limit,
        )


@dataclass(frozen=True)
class Manifest:
    """The keys of manifest.json that readers need."""

    form: Literal["jpeg", "raw"]
    images: int
    classes: tuple[str, ...]
    shards: tuple[tuple[str, int], ...]  # file names and their bytes
    index: dict[str, str]  # column: SHA-256 of its file
    digest: str  # of the whole manifest, and so of the index


@dataclass(frozen=True)
class Samples:
    """The images of a store; as `pipelines.readers.folder.Samples`, and where their bytes are."""

    root: str  # absolute
    form: Literal["jpeg", "raw"]
    shards: tuple[np.ndarray, ...]  # uint8 [bytes], mapped: alive as long as a pipeline may read
    maps: tuple[mmap.mmap, ...]  # the same, to tell the kernel what will be read
    stored: np.ndarray | None  # int64 [rows], the store's row of each; None: the same row
    shard: np.ndarray  # int32 [rows]
    offset: np.ndarray  # int64 [rows]
    size: np.ndarray  # int64 [rows], bytes
    checksum: np.ndarray  # uint32 [rows]
    name: np.ndarray  # uint8 [bytes], of the whole store
    name_end: np.ndarray  # int64 [rows of the whole store]
    classes: tuple[str, ...]
    labels: np.ndarray | None  # int64 [rows]
    height: np.ndarray  # int32 [rows], pixels as stored
    width: np.ndarray  # int32 [rows]
    usable: np.ndarray  # int64, the rows that are not damaged, as far as was looked
    bad: dict[int, str]  # the other rows, with the reason
    fingerprint: str  # of the index and of the subset: the same rows mean the same images
    written: str  # empty: the index has checksums

    def __len__(self) -> int:
        return len(self.offset)

    def path(self, row: int) -> str:
        """For messages: the store, and the image's name in the source."""
        stored = row if self.stored is None else int(self.stored[row])
        return os.path.join(self.root, _name(self.name, self.name_end, stored))

    def content(self, rows: np.ndarray) -> list[np.ndarray]:
        """What is stored of some rows, without a copy: uint8 [bytes], or uint8 [H, W, 3] if raw."""
        shards, offsets = self.shard[rows].tolist(), self.offset[rows].tolist()
        sizes = self.size[rows].tolist()
        found = [
            self.shards[shard][offset : offset + size]
            for shard, offset, size in zip(shards, offsets, sizes, strict=True)
        ]
        if self.form == "jpeg":
            return found
        shapes = zip(self.height[rows].tolist(), self.width[rows].tolist(), strict=True)
        return [flat.reshape(*shape, 3) for flat, shape in zip(found, shapes, strict=True)]


def list_samples(options: Options, *, cache: Path | None, say: Callable[[str], None]) -> Samples:
    """Open a store: check its version, the checksum of its index and the size of every shard.

    Args:
        options: of this reader.
        cache: folder that remembers what `verify` found, so that processes and starts after the
            first need not read the store again; it may be missing.
        say: is called with single lines for the user.

    Raises:
        ValueError: this is no store, or one of another version, or a file of it is missing, cut off
            or damaged; names the file and the remedy. Or there is no such subset.
    """
    root = os.path.abspath(os.path.expanduser(options.root))
    manifest = read_manifest(root)
    columns = _columns(root, manifest)
    # Before anything is mapped: to read behind the end of a mapped file kills the process (SIGBUS).
    _check_shards(root, manifest)
    maps = tuple(_map(os.path.join(root, name)) for name, _ in manifest.shards)
    shards = tuple(np.frombuffer(each, np.uint8) for each in maps)
    bad = _verified(root, manifest, shards, columns, cache, say) if options.verify else {}
    _report(root, columns, bad, options, say)
    is_usable = np.ones(manifest.images, bool)
    is_usable[list(bad)] = False
    usable = np.flatnonzero(is_usable)
    fields = {key: columns[key] for key in COLUMNS if key not in ("name", "name_end", "label")}
    label = columns["label"]
    stored = subset.choose(
        usable,
        label if manifest.classes else None,
        manifest.classes,
        lambda row: os.fsencode(_name(columns["name"], columns["name_end"], row)),
        fraction=options.fraction,
        per_class=options.per_class,
        seed=options.subset_seed,
        root=root,
    )
    if options.limit is not None and options.limit < len(usable):
        stored = usable[np.linspace(0, len(usable) - 1, options.limit).astype(np.int64)]
    if stored is not None:
        fields = {key: column[stored] for key, column in fields.items()}
        label = label[stored]
        usable, bad = np.arange(len(stored)), {}
    kept = b"" if stored is None else stored.tobytes()
    return Samples(
        root=root,
        form=manifest.form,
        shards=shards,
        maps=maps,
        stored=stored,
        **fields,
        name=columns["name"],
        name_end=columns["name_end"],
        classes=manifest.classes,
        labels=label.astype(np.int64) if manifest.classes else None,
        usable=usable,
        bad=bad,
        fingerprint=hashlib.blake2b(manifest.digest.encode() + kept, digest_size=16).hexdigest(),
        written="",
    )


def source(
    samples: Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Inside a DALI pipeline definition: the images and their rows.

    Args:
        samples: the opened store; must outlive the pipeline, which reads its memory.
        rows: gives the rows, int64 [batch], of a step; steps are counted from 0, and a pipeline
            that is restored from a checkpoint goes on counting. It raises StopIteration at the end.
        decoding: how JPEGs are decoded; raw pixels need none.

    Returns:
        image: JPEGs still to be decoded, or pixels.
        index: int64 [1].
    """
    chosen = lru_cache(maxsize=1)(rows)  # asked for twice a step, below

    def content(info: BatchInfo) -> list[np.ndarray]:
        found = chosen(info.iteration)
        _announce(samples, found)
        return samples.content(found)

    def index(info: BatchInfo) -> np.ndarray:
        return chosen(info.iteration).reshape(-1, 1)

    raw = samples.form == "raw"
    # Two sources, because DALI does not keep alive what it does not copy: the index would be gone.
    # The maps are kept by `samples`, and read by DALI's threads: 0.02 ms of CPU per image of 260
    # kB, where a copy takes 0.07.
    stored = fn.external_source(
        content,
        batch=True,
        batch_info=True,
        dtype=DALIDataType.UINT8,
        ndim=3 if raw else 1,
        layout="HWC" if raw else None,
        no_copy=True,
    )
    row = fn.external_source(index, batch=True, batch_info=True, dtype=DALIDataType.INT64, ndim=1)
    assert isinstance(stored, DataNode)
    assert isinstance(row, DataNode)  # one output each
    return Pixels(stored) if raw else Encoded(stored, decoding), row


def read_manifest(root: str) -> Manifest:
    """What manifest.json says, once it is one that this version reads.

    Raises:
        ValueError: as `list_samples`.
    """
    path = os.path.join(root, MANIFEST)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(_not_a_store(root)) from None
    except NotADirectoryError:
        raise ValueError(
            f"data.root: {root} is a file: give the folder of a packed store"
        ) from None
    except OSError as error:
        raise ValueError(f"data.root: cannot read {path}: {error.strerror}") from None
    try:
        said: Any = json.loads(content)
    except ValueError:
        said = None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(
            f"data.root: {path} is not the manifest of a packed store, or is damaged: {_AGAIN}"
        )
    if said.get("version") != VERSION:
        raise ValueError(
            f"data.root: {root} is a packed store of version {said.get('version')}, and this"
            f" fastssl reads version {VERSION}: {_AGAIN}, or install the fastssl that wrote it"
            f" ({said.get('fastssl', 'not said')})"
        )
    try:
        manifest = Manifest(
            form=said["form"],
            images=said["images"],
            classes=tuple(said["classes"]),
            shards=tuple((each["name"], each["bytes"]) for each in said["shards"]),
            index={name: said["index"][name] for name in COLUMNS},
            digest=hashlib.sha256(content).hexdigest(),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"data.root: {path} is damaged (at {error}): {_AGAIN}") from None
    outside = [name for name, _ in manifest.shards if os.path.basename(name) != name or not name]
    if manifest.form not in ("jpeg", "raw") or outside:
        found = f"form {manifest.form!r}" if not outside else f"shard {outside[0]!r}"
        raise ValueError(f"data.root: {path} is damaged ({found}): {_AGAIN}")
    return manifest


_AGAIN = "copy or pack it again (python -m fastssl.data pack SOURCE STORE)"


def _not_a_store(root: str) -> str:
    if not os.path.isdir(root):
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        return f"data.root: there is no folder {root}, only {parent}"
    return (
        f"data.root: {root} is no packed store (it has no {MANIFEST}): read a folder of images with"
        f" data.use=pipelines.readers.folder, or pack it (python -m fastssl.data pack {root} STORE)"
    )


def _columns(root: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The index, mapped into memory so that processes share it."""
    columns: dict[str, np.ndarray] = {}
    paths = {name: os.path.join(root, INDEX, f"{name}.npy") for name in COLUMNS}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:  # a gigabyte for 1e7 images
        digests = {name: executor.submit(sha256_of, path) for name, path in paths.items()}
    for name, dtype in COLUMNS.items():
        path = paths[name]
        try:
            digest = digests[name].result()
            if digest != manifest.index[name]:
                raise ValueError(
                    f"data.root: {path} is not what {MANIFEST} says (SHA-256 {digest[:12]}..., not"
                    f" {manifest.index[name][:12]}...): {_AGAIN}"
                )
            # as a plain array: np.memmap takes a microsecond for every indexing
            column = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except OSError as error:
            raise ValueError(f"data.root: cannot read {path}: {error.strerror}: {_AGAIN}") from None
        if column.dtype != dtype or (name != "name" and column.shape != (manifest.images,)):
            raise ValueError(
                f"data.root: {path} holds {column.dtype} {list(column.shape)}, not {dtype}"
                f" [{manifest.images}]: {_AGAIN}"
            )
        columns[name] = column
    return columns


def _check_shards(root: str, manifest: Manifest) -> None:
    for name, size in manifest.shards:
        path = os.path.join(root, name)
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise ValueError(f"data.root: cannot read {path}: {error.strerror}: {_AGAIN}") from None
        if found != size:
            raise ValueError(
                f"data.root: {path} has {found:,} bytes, and {MANIFEST} says {size:,}: {_AGAIN}"
            )


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"data.root: cannot map {path}: {error.strerror}") from None


def _announce(samples: Samples, rows: np.ndarray) -> None:
    """Have the kernel read what is not in memory, all at once, before DALI's threads ask for it.

    1 (JPEG) to 2 us of CPU per image; from a cold disk, raw images come 1.4 times as fast.
    """
    page = mmap.PAGESIZE
    begin = samples.offset[rows]
    first = begin // page * page
    lengths = (begin + samples.size[rows] - first).tolist()
    for shard, start, length in zip(
        samples.shard[rows].tolist(), first.tolist(), lengths, strict=True
    ):
        samples.maps[shard].madvise(mmap.MADV_WILLNEED, start, length)


def _verified(
    root: str,
    manifest: Manifest,
    shards: tuple[np.ndarray, ...],
    columns: dict[str, np.ndarray],
    cache: Path | None,
    say: Callable[[str], None],
) -> dict[int, str]:
    """As `_damaged`; remembered for as long as the store's files keep their times."""
    files = [
        os.path.join(root, name) for name in ("manifest.json", *(n for n, _ in manifest.shards))
    ]
    seen = [(os.path.realpath(path), os.stat(path).st_mtime_ns) for path in files]
    seal = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]
    note = None if cache is None else cache / "verified" / f"{seal}.json"
    reason = "its bytes are not those that were packed (CRC-32)"
    if note is not None and note.exists():
        return dict.fromkeys(json.loads(note.read_text(encoding="utf-8")), reason)
    damaged = dict.fromkeys(_damaged(shards, columns, say), reason)
    if note is not None:
        part = note.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError):  # then the next process reads all again
            note.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(list(damaged)), encoding="utf-8")
            part.replace(note)
    return damaged


def _damaged(
    shards: tuple[np.ndarray, ...], columns: dict[str, np.ndarray], say: Callable[[str], None]
) -> list[int]:
    """The rows whose bytes are not those that were written."""
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

    damaged: list[int] = []
    last = time.monotonic()
    executor = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for done, rows in enumerate(executor.map(compare, range(0, count, 256)), 1):
            damaged += rows
            if time.monotonic() - last > PROGRESS_SECONDS:
                last = time.monotonic()
                say(f"data: compared {min(done * 256, count):,} of {count:,} checksums")
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: not all the rest first
    return damaged


def _report(
    root: str,
    columns: dict[str, np.ndarray],
    bad: dict[int, str],
    options: Options,
    say: Callable[[str], None],
) -> None:
    """Say what is left out, or raise where that is an error."""
    count = len(columns["offset"])
    if not bad:
        return
    names = columns["name"], columns["name_end"]
    few = [(os.path.join(root, _name(*names, row)), bad[row]) for row in list(bad)[:5]]
    named = ", ".join(f"{_shown(name)} ({reason})" for name, reason in few)
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    if options.bad == "error" or len(bad) == count:
        raise ValueError(
            f"data.root: {len(bad):,} of {count:,} images in {root} are damaged: {named}{more};"
            f" {_AGAIN}" + (", or leave them out with data.bad=skip" if len(bad) < count else "")
        )
    say(f"data: skipping {len(bad):,} of {count:,} images: {named}{more}; {_AGAIN}")


def _name(text: np.ndarray, ends: np.ndarray, row: int) -> str:
    """Of the store's row, in the source."""
    begin = int(ends[row - 1]) if row else 0
    return os.fsdecode(text[begin : int(ends[row])].tobytes())


def _shown(name: str) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


def sha256_of(path: str) -> str:
    """Of a file, in hexadecimal."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
