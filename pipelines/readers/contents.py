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
from pipelines.readers import headers
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
    max_pixels: int,
    told: dict[int, str],
    rows: Callable[[int], np.ndarray],
    decoding: Decoding,
) -> tuple[Image, DataNode]:
    """Whole objects of an object store, fetched ahead of need, with files among them.

    What can't be read, is not there, is no image or one of too many pixels is given as no bytes,
    which no decoder takes: it is left out. Who then looks for the reason asks for it alone, and
    gets it as an error: a decoder would not know it. An object that can't be had ends the run
    (`object_store.Unreachable`): its image may be sound.

    Args:
        place: the url or path of a row.
        is_remote: bool [rows], which are urls.
        access: how the object store is asked.
        max_pixels: of an image.
        told: of all pipelines of a process, rows that were given as no bytes, with the reason.
        rows: as for `files`.
        decoding: likewise.
    """

    def remote(step: int) -> np.ndarray:
        chosen = rows(step)
        return chosen[is_remote[chosen]]

    def whole(group: list[int]) -> list[Part]:
        return [Part(os.fsdecode(place(row)), (row,)) for row in group]

    wrong: dict[int, str] = {}

    def accept(row: int, found: np.ndarray | None) -> np.ndarray:
        """What is given of a row; None: it is not there."""
        reason = "there is no such object" if found is None else _reason(found, max_pixels)
        if found is not None and reason is None:
            return found
        wrong[row] = reason or ""
        return np.empty(0, np.uint8)

    def read(row: int) -> np.ndarray:
        return accept(row, read_file(place(row)))

    ahead = Ahead(remote, whole, accept=accept, access=access)
    pool = ThreadPoolExecutor(THREADS)  # its threads end when it is forgotten

    def content(step: int, chosen: np.ndarray) -> list[np.ndarray]:
        flags = is_remote[chosen].tolist()
        near = pool.map(read, chosen[~is_remote[chosen]].tolist())
        far = iter(ahead.step(step))
        found = [next(far) if away else next(near) for away in flags]
        for row, each in zip(chosen.tolist(), found, strict=True):
            if not len(each):
                if len(found) == 1 and row in told:
                    raise RuntimeError(told[row])
                told[row] = wrong[row]
        return found

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


def _reason(content: np.ndarray, max_pixels: int) -> str | None:
    """Why a file is no image of so many pixels at most, as far as its header tells."""
    try:
        height, width = headers.dimensions_of(content.data)
    except ValueError as error:
        return str(error)
    if height * width <= max_pixels:
        return None
    return f"{width:,} x {height:,} pixels, over data.max_pixels={max_pixels:,}"


def read_file(path: bytes) -> np.ndarray:
    """Its bytes, uint8; none where it can't be read."""
    try:
        with open(path, "rb") as opened:
            return np.frombuffer(opened.read(), np.uint8)
    except OSError:
        return np.empty(0, np.uint8)
