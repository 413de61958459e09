"""Tar stores under s3://: the index kept on this machine, images fetched ahead of need.

Where images are shuffled by chunks, a chunk comes by one request and each of its images is let go
once it was given; else an image comes by its own. All bytes are compared with the index's CRC-32.
A process holds at most the bytes of a window's images, `AHEAD` and a chunk.
"""

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import BatchInfo, DALIDataType

from pipelines.images import Decoding, Encoded, Image, Pixels
from pipelines.readers import object_store, tar_store
from pipelines.readers.names import few
from pipelines.readers.object_requests import Missing
from pipelines.readers.object_store import Access, Ahead, Part
from pipelines.readers.tar_store import Manifest

AHEAD = 256 << 20  # bytes, beyond a window's
GAP = 1 << 20  # bytes between two images of a chunk that nobody needs: they come by two requests
# Seconds for which shards that were all there count as there: of a start's processes, and for its
# probe, one asks.
LOOKED = 60.0


class Remote(Protocol):
    """What is read here of `pipelines.readers.tar.Samples`."""

    @property
    def root(self) -> str: ...
    @property
    def form(self) -> Literal["original", "jpeg", "raw"]: ...
    @property
    def files(self) -> tuple[tar_store.Shard, ...]: ...
    @property
    def shard(self) -> np.ndarray: ...
    @property
    def offset(self) -> np.ndarray: ...
    @property
    def size(self) -> np.ndarray: ...
    @property
    def checksum(self) -> np.ndarray: ...
    @property
    def height(self) -> np.ndarray: ...
    @property
    def width(self) -> np.ndarray: ...
    @property
    def usable(self) -> np.ndarray: ...
    @property
    def chunks(self) -> np.ndarray | None: ...
    @property
    def window(self) -> int: ...
    @property
    def access(self) -> Access: ...
    def path(self, row: int) -> str: ...


def open_store(
    root: str, cache: Path | None, access: Access
) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest and index of a store; the index is kept in `cache`, shared by processes.

    Of every shard the size is asked for, or it would be missed only hours later.

    Args:
        root: its url.
        cache: folder; None: the index is fetched each time, into a file without a name.
        access: how the object store is asked.

    Raises:
        ValueError: there is no store, or it can't be reached or read, a shard is missing or has
            another size than the manifest says, or `cache` can't be written. If the store may be
            well again later, a ConnectionError is its cause.
    """
    url = object_store.join(root, tar_store.MANIFEST)
    try:
        content = object_store.read(url, access)
    except Missing as error:
        raise ValueError(
            f"data.root: {root} is no tar store (it has no {tar_store.MANIFEST}): pack one"
            " (python -m fastssl.data pack SOURCE STORE) and copy it there"
            f" (aws s3 cp --recursive STORE {root}); {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"data.root: {error}") from error
    manifest = tar_store.parse_manifest(content, url)
    if cache is not None:
        kept = cache / "stores" / manifest.digest[:32]
        columns = _columns(root, kept, manifest, access)
        mark = kept / f"{hashlib.sha256(root.encode()).hexdigest()[:16]}.whole"
        if not _is_fresh(mark):
            _check_shards(root, manifest, access)
            with suppress(OSError):  # then the next one asks again
                mark.touch()
        return manifest, columns
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:  # mapped files outlive it
        columns = _columns(root, Path(folder), manifest, access)
        _check_shards(root, manifest, access)
        return manifest, columns


def source(
    samples: Remote, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """As `pipelines.readers.tar.source`.

    What can't be fetched ends the run by `object_store.Unreachable`, out of the pipeline's run: no
    image is at fault for a network.
    """
    ahead = fetched(samples, rows)
    raw = samples.form == "raw"

    def batch(info: BatchInfo) -> tuple[list[np.ndarray], np.ndarray]:
        chosen = rows(info.iteration)
        contents = ahead.step(info.iteration)
        if raw:
            sides = zip(
                samples.height[chosen].tolist(), samples.width[chosen].tolist(), strict=True
            )
            contents = [
                content.reshape(*side, 3) for content, side in zip(contents, sides, strict=True)
            ]
        return contents, chosen.reshape(-1, 1)

    # Copied, because DALI keeps nothing alive: 0.02 ms of CPU per image of 110 kB.
    stored, row = fn.external_source(
        batch,
        num_outputs=2,
        batch=True,
        batch_info=True,
        dtype=[DALIDataType.UINT8, DALIDataType.INT64],
        ndim=[3 if raw else 1, 1],
        layout=["HWC", ""] if raw else None,
    )
    return Pixels(stored) if raw else Encoded(stored, decoding), row


def fetched(samples: Remote, rows: Callable[[int], np.ndarray]) -> Ahead:
    """The bytes of images, in the order of `rows`, checked."""
    chunks, usable = samples.chunks, samples.usable
    urls = [object_store.join(samples.root, shard.name) for shard in samples.files]

    def group(wanted: np.ndarray) -> np.ndarray:
        assert chunks is not None
        return np.searchsorted(chunks, np.searchsorted(usable, wanted), side="right")

    def parts(wanted: list[int]) -> list[Part]:
        shard = urls[int(samples.shard[wanted[0]])]
        starts, sizes = samples.offset[wanted], samples.size[wanted]
        gaps = starts[1:] - (starts + sizes)[:-1] > GAP
        return [
            Part(shard, tuple(its), tuple(at.tolist()), tuple(long.tolist()))
            for its, at, long in zip(
                (each.tolist() for each in np.split(np.array(wanted), np.flatnonzero(gaps) + 1)),
                np.split(starts, np.flatnonzero(gaps) + 1),
                np.split(sizes, np.flatnonzero(gaps) + 1),
                strict=True,
            )
        ]

    def check(row: int, content: np.ndarray) -> str | None:
        if zlib.crc32(content.data) == int(samples.checksum[row]):
            return None
        url = urls[int(samples.shard[row])]
        return (
            f"{url}: what came for {samples.path(row)} is not what was packed (CRC-32): is it still"
            f" the shard that the index is of? {tar_store.AGAIN}"
        )

    window, look = 0, 0
    if chunks is not None:
        window = samples.window * int(samples.size[usable].sum()) // len(chunks)
        look = samples.window * int(np.diff(chunks, prepend=0).max())
    return Ahead(
        rows,
        parts,
        group=None if chunks is None else group,
        check=check,
        limit=window + AHEAD,
        look=look,
        access=samples.access,
    )


def _columns(root: str, folder: Path, manifest: Manifest, access: Access) -> dict[str, np.ndarray]:
    index = object_store.join(root, tar_store.INDEX)

    def keep(name: str) -> None:
        url = object_store.join(index, f"{name}.npy")
        object_store.cached(url, folder, None, manifest.index[name], access)

    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
            for _ in executor.map(keep, tar_store.COLUMNS):
                pass
    except ValueError as error:
        raise ValueError(f"data.root: {error}") from error
    return tar_store.read_columns(str(folder), manifest)


def _check_shards(root: str, manifest: Manifest, access: Access) -> None:
    try:
        urls = [object_store.join(root, shard.name) for shard in manifest.shards]
        sizes = object_store.sizes(urls, access)
    except ValueError as error:
        raise ValueError(f"data.root: {error}") from error
    wrong = [
        f"{shard.name} ({'missing' if size is None else f'{size:,} bytes, not {shard.bytes:,}'})"
        for shard, size in zip(manifest.shards, sizes, strict=True)
        if size != shard.bytes
    ]
    if wrong:
        raise ValueError(
            f"data.root: {len(wrong):,} of {len(sizes):,} shards of {root} are not as"
            f" {tar_store.MANIFEST} says: {few(wrong)}: upload them again"
            f" (aws s3 sync STORE {root})"
        )


def _is_fresh(mark: Path) -> bool:
    try:
        return 0 <= time.time() - mark.stat().st_mtime < LOOKED
    except OSError:
        return False
