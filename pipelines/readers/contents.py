"""How the bytes of images reach a DALI graph: read by DALI from files, or given by Python."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.fn.io import file
from nvidia.dali.types import BatchInfo, DALIDataType

from pipelines.images import Decoding, Encoded, Image
from pipelines.readers.object_store import Access, Ahead, Part

THREADS = 16  # that read files: on a network disk most of them wait


def files(
    place: Callable[[int], bytes], rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Files, read by DALI's threads, not by Python; and their rows, int64 [1].

    Args:
        place: the path of a row.
        rows: of a step, int64 [batch]; raises StopIteration at the end.
        decoding: how the graph is to decode them.
    """

    def batch(info: BatchInfo) -> tuple[list[np.ndarray], np.ndarray]:
        chosen = rows(info.iteration)
        return [np.frombuffer(place(row), np.uint8) for row in chosen], chosen.reshape(-1, 1)

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


def objects(
    place: Callable[[int], bytes],
    is_remote: np.ndarray,
    access: Access,
    rows: Callable[[int], np.ndarray],
    decoding: Decoding,
) -> tuple[Image, DataNode]:
    """Whole objects of an object store, fetched ahead of need, with files among them.

    A file that can't be read is given as no bytes, which no decoder takes: it is left out. An
    object that can't be had ends the run (`object_store.Unreachable`): its image may be sound.

    Args:
        place: the url or path of a row.
        is_remote: bool [rows], which are urls.
        access: how the object store is asked.
        rows: as for `files`.
        decoding: likewise.
    """

    def remote(step: int) -> np.ndarray:
        chosen = rows(step)
        return chosen[is_remote[chosen]]

    def whole(group: list[int]) -> list[Part]:
        return [Part(os.fsdecode(place(row)), (row,)) for row in group]

    ahead = Ahead(remote, whole, access=access)
    pool = ThreadPoolExecutor(THREADS)  # its threads end when it is forgotten

    def content(step: int, chosen: np.ndarray) -> list[np.ndarray]:
        flags = is_remote[chosen].tolist()
        paths = [place(row) for row, away in zip(chosen.tolist(), flags, strict=True) if not away]
        near = pool.map(read_file, paths)
        far = iter(ahead.step(step))
        return [next(far) if away else next(near) for away in flags]

    return given(content, rows, decoding, copy=True)


def given(
    content: Callable[[int, np.ndarray], list[np.ndarray]],
    rows: Callable[[int], np.ndarray],
    decoding: Decoding,
    *,
    copy: bool,
) -> tuple[Image, DataNode]:
    """Bytes that Python has; and their rows, int64 [1].

    Args:
        content: of a step and its rows: uint8 [bytes] each.
        rows: as for `files`.
        decoding: likewise.
        copy: whether DALI is to copy them; if not, they must stay where they are, and as they are,
            for as long as the pipeline lives.
    """
    chosen = lru_cache(maxsize=1)(rows)  # asked for twice a step, below

    def bytes_of(info: BatchInfo) -> list[np.ndarray]:
        return content(info.iteration, chosen(info.iteration))

    def index_of(info: BatchInfo) -> np.ndarray:
        return chosen(info.iteration).reshape(-1, 1)

    # Two sources, because DALI does not keep alive what it does not copy: the index would be gone.
    encoded = fn.external_source(
        bytes_of,
        batch=True,
        batch_info=True,
        dtype=DALIDataType.UINT8,
        ndim=1,
        no_copy=not copy,
    )
    index = fn.external_source(
        index_of, batch=True, batch_info=True, dtype=DALIDataType.INT64, ndim=1
    )
    assert isinstance(encoded, DataNode)
    assert isinstance(index, DataNode)  # one output each
    return Encoded(encoded, decoding), index


def read_file(path: bytes) -> np.ndarray:
    """Its bytes, uint8; none where it can't be read."""
    try:
        with open(path, "rb") as opened:
            return np.frombuffer(opened.read(), np.uint8)
    except OSError:
        return np.empty(0, np.uint8)
