"""Tar stores: WebDataset tars with an index, made by `python -m fastssl.data pack` (or index).

The layout is described and defined in pipelines/readers/tar_store.py. A local store's tars are
mapped into memory and handed to DALI as they lie there: no copy, no Python per byte, and processes
share the pages. Of a store in an object store (s3://...), pipelines/readers/tar_remote.py fetches
what is needed next.
"""

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import BatchInfo, DALIDataType

from pipelines.images import Decoding, Encoded, Image, Pixels
from pipelines.readers import (
    object_store,
    quarantine,
    subset,
    tar_local,
    tar_remote,
    tar_store,
)
from pipelines.readers.tar_store import Manifest

MIXED = 4096  # images that are shuffled among each other, about, where chunks are read


@dataclass(frozen=True, kw_only=True)
class Options:
    root: str  # the store's folder, or s3://bucket/prefix
    bad: Literal["skip", "error"] = "skip"  # what to do about images that `verify` finds damaged
    # Use only so many images, evenly spaced over the usable ones: rows are then counted among them.
    limit: int | None = None
    # Few labels: this part of the usable images of every class (at least one of each), or so many
    # of every class. Rows are then counted among them, as with `limit`.
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0  # which of them: those that the folder's reader takes of the source
    quarantine: str | None = None  # file of images to leave out, as `python -m fastssl.data check`
    # writes it; they keep their rows
    # Read everything once before training and compare checksums; else only sizes and the index.
    verify: bool = False
    # images: any image may follow any other. chunks: images that lie together are read together,
    # in another order each epoch: for object stores, and small images on a disk that is read cold
    # (11 kB: 1.3 to 3.5 times as fast from an SSD).
    shuffle: Literal["auto", "images", "chunks"] = "auto"  # auto: chunks from s3://, else images
    chunk_mb: int = 8  # megabytes (1e6 bytes) of images that lie together
    window: int | None = None  # chunks whose images are shuffled among each other; null: so many
    # that about 4,096 images are
    # Of s3://: how often a request is made again that failed, with pauses of 0.1 s, 0.2 s, ... 20 s
    # (10: 65 s in all), seconds without a byte until it has failed, and requests at a time.
    retries: int = 10
    timeout_s: float = 30.0
    requests: int = 32

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name the folder of a tar store, or s3://bucket/prefix")
        object_store.refuse_others("root", self.root)
        if self.bad not in ("skip", "error"):
            raise ValueError(f"bad ({self.bad!r}) must be 'skip' or 'error'")
        if self.shuffle not in ("auto", "images", "chunks"):
            raise ValueError(f"shuffle ({self.shuffle!r}) must be auto, images or chunks")
        if self.chunk_mb < 1:
            raise ValueError(f"chunk_mb ({self.chunk_mb}) must be at least 1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, or null for a good one")
        if self.window is not None and self.shuffle == "images":
            raise ValueError(f"window ({self.window}) is not read with shuffle=images")
        if self.verify and object_store.is_url(self.root):
            raise ValueError("verify: what s3:// gives is compared whenever it is read: leave it")
        self.access()
        subset.check(
            fraction=self.fraction,
            per_class=self.per_class,
            subset_seed=self.subset_seed,
            limit=self.limit,
        )

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
    """The images of a store; as `pipelines.readers.folder.Samples`, and where their bytes are."""

    root: str  # absolute, or the url without a slash at its end
    form: Literal["original", "jpeg", "raw"]
    files: tuple[tar_store.Shard, ...]  # in the store's folder
    shards: tuple[np.ndarray, ...]  # uint8 [bytes], mapped: alive as long as a pipeline may read;
    # none of a remote store
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
    height: np.ndarray  # int32 [rows], pixels as decoded
    width: np.ndarray  # int32 [rows]
    usable: np.ndarray  # int64, the rows that are not damaged, as far as was looked
    bad: dict[int, str]  # the other rows, with the reason
    chunks: np.ndarray | None  # int64, ends of runs of positions in `usable` that lie together in a
    # shard, the last one len(usable); None: images are read one by one
    window: int  # chunks whose images are shuffled among each other
    fingerprint: str  # of the index and of the subset: the same rows mean the same images
    written: str  # empty: the index has checksums
    access: object_store.Access  # how an object store is asked

    def __len__(self) -> int:
        return len(self.offset)

    def path(self, row: int) -> str:
        """For messages: the store, and the image's name in the source."""
        stored = row if self.stored is None else int(self.stored[row])
        columns = {"name": self.name, "name_end": self.name_end}
        return os.path.join(self.root, os.fsdecode(tar_store.image_name(columns, stored)))

    def content(self, rows: np.ndarray) -> list[np.ndarray]:
        """What a local store holds of some rows, not copied: uint8 [bytes]; if raw [H, W, 3]."""
        shards, offsets = self.shard[rows].tolist(), self.offset[rows].tolist()
        sizes = self.size[rows].tolist()
        found = [
            self.shards[shard][offset : offset + size]
            for shard, offset, size in zip(shards, offsets, sizes, strict=True)
        ]
        if self.form != "raw":
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
    listed = (
        None if options.quarantine is None else quarantine.read(options.quarantine, options.root)
    )
    if object_store.is_url(options.root):
        root = options.root.rstrip("/")
        manifest, columns = tar_remote.open_store(root, cache, options.access())
        maps = ()
    else:
        root = os.path.abspath(os.path.expanduser(options.root))
        below = os.path.join(root, "train")
        if not os.path.exists(os.path.join(root, tar_store.MANIFEST)) and os.path.exists(
            os.path.join(below, tar_store.MANIFEST)
        ):
            raise ValueError(f"data.root: {root} holds stores: give one, data.root={below}")
        manifest = tar_store.read_manifest(root)
        columns = tar_store.read_columns(os.path.join(root, tar_store.INDEX), manifest)
        maps = tar_local.open_shards(root, manifest)
    shards = tuple(np.frombuffer(each, np.uint8) for each in maps)
    bad: dict[int, str] = {}
    if options.verify:
        bad = tar_local.damaged(root, manifest, shards, columns, cache, say)
    _report(root, columns, bad, options, say)
    if listed is not None:
        named = quarantine.rows(
            listed, manifest.images, lambda row: tar_store.image_name(columns, row), say
        )
        bad = dict(sorted((named | bad).items()))
        if len(bad) == manifest.images:
            raise ValueError(f"data.root: no image of {root} is left: all are quarantined")
    return _samples(root, manifest, columns, maps, shards, bad, options, say)


def source(
    samples: Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Inside a DALI pipeline definition: the images and their rows.

    Args:
        samples: the opened store; must outlive the pipeline, which reads its memory.
        rows: gives the rows, int64 [batch], of a step; steps are counted from 0, and a pipeline
            that is restored from a checkpoint goes on counting. It raises StopIteration at the end.
        decoding: how images are decoded; raw pixels need none.

    Returns:
        image: files still to be decoded, or pixels.
        index: int64 [1].
    """
    if object_store.is_url(samples.root):
        return tar_remote.source(samples, rows, decoding)
    chosen = lru_cache(maxsize=1)(rows)  # asked for twice a step, below
    read_ahead = None if samples.chunks is None else tar_local.reading_ahead(samples, rows)

    def content(info: BatchInfo) -> list[np.ndarray]:
        found = chosen(info.iteration)
        if read_ahead is not None:
            read_ahead(info.iteration, len(found))
        tar_local.announce(samples, found)
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


def _samples(
    root: str,
    manifest: Manifest,
    columns: dict[str, np.ndarray],
    maps: tuple[mmap.mmap, ...],
    shards: tuple[np.ndarray, ...],
    bad: dict[int, str],
    options: Options,
    say: Callable[[str], None],
) -> Samples:
    """The rows that the options ask for, of a store whose files are there and whole."""
    is_usable = np.ones(manifest.images, bool)
    is_usable[np.fromiter(bad, np.int64, len(bad))] = False
    usable = np.flatnonzero(is_usable)
    label = columns["label"]
    unlabelled = int(np.count_nonzero(label[usable] < 0)) if manifest.classes else 0
    classes = () if unlabelled else manifest.classes
    if unlabelled:
        say(f"data: {unlabelled:,} of {len(usable):,} images in {root} have no label: none is used")
    stored = subset.choose(
        usable,
        label if classes else None,
        classes,
        lambda row: tar_store.image_name(columns, row),
        fraction=options.fraction,
        per_class=options.per_class,
        limit=options.limit,
        seed=options.subset_seed,
        root=root,
    )
    kept = ("shard", "offset", "size", "checksum", "height", "width")
    fields = {key: columns[key] for key in kept}
    if stored is not None:
        fields = {key: column[stored] for key, column in fields.items()}
        label = label[stored]
        usable, bad = np.arange(len(stored)), {}
    chunks = None
    by_chunks = options.shuffle == "chunks" or (
        options.shuffle == "auto" and object_store.is_url(root)
    )
    if by_chunks:
        chunks = _chunks(fields["shard"], fields["offset"], usable, options.chunk_mb * 1_000_000)
    seed = b"" if stored is None else stored.tobytes()
    return Samples(
        root=root,
        form=manifest.form,
        files=manifest.shards,
        shards=shards,
        maps=maps,
        stored=stored,
        **fields,
        name=columns["name"],
        name_end=columns["name_end"],
        classes=classes,
        labels=label.astype(np.int64) if classes else None,
        usable=usable,
        bad=bad,
        chunks=chunks,
        window=_window(chunks, options),
        fingerprint=hashlib.blake2b(manifest.digest.encode() + seed, digest_size=16).hexdigest(),
        written="",
        access=options.access(),
    )


def _chunks(shard: np.ndarray, offset: np.ndarray, usable: np.ndarray, most: int) -> np.ndarray:
    """Where runs of `usable` end that begin in the same `most` bytes of the same shard."""
    place = offset // most
    place += shard.astype(np.int64) << 32
    place = place[usable]
    return np.append(np.flatnonzero(place[1:] != place[:-1]) + 1, len(usable)).astype(np.int64)


def _window(chunks: np.ndarray | None, options: Options) -> int:
    if chunks is None:
        return 1
    return options.window or max(1, round(MIXED * len(chunks) / max(1, int(chunks[-1]))))


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
    few = [
        f"{_shown(os.path.join(root, os.fsdecode(tar_store.image_name(columns, row))))}"
        f" ({bad[row]})"
        for row in list(bad)[:5]
    ]
    named = ", ".join(few)
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    if options.bad == "error" or len(bad) == count:
        raise ValueError(
            f"data.root: {len(bad):,} of {count:,} images in {root} are damaged: {named}{more};"
            f" {tar_store.AGAIN}"
            + (", or leave them out with data.bad=skip" if len(bad) < count else "")
        )
    say(f"data: skipping {len(bad):,} of {count:,} images: {named}{more}; {tar_store.AGAIN}")


def _shown(name: str) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)
