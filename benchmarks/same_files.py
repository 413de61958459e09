"""The images that every stage of `python -m benchmarks stages` goes over, and what they are like.

Spread evenly over the recipe's, free of files that can't be decoded, read once so that they are in
the page cache; and the same rows for every stage, in the order that training would take them.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from benchmarks import decode_limit, method
from fastssl import order
from fastssl.config import Recipe
from fastssl.loader import Loader, Options
from pipelines.images import Encoded, Image

MOST = 1000  # images: 110 MB of ImageNet's
MEMORY = 2**29  # bytes of files that are held, at most
# Every stage goes over the same few images, which the reader fetched for the first and still holds.
REMOTE = (
    "read_cold is left out, and the object store itself was not measured: read and the loader took"
    " images that the reader still held in memory"
)
CHECK = 32  # images decoded at a time to find those that can't be

# In a DALI graph: what becomes of an image and its row in the listing.
Body = Callable[[Image, DataNode], list[DataNode]]


@dataclass(frozen=True)
class Files:
    """Some of a listing's images."""

    reader: ModuleType
    samples: Any  # the listing
    rows: np.ndarray  # int64, of the listing
    seed: int  # of the order
    # Of the files, in that order, the first `MEMORY` bytes; none where pixels are stored.
    contents: list[bytes]
    pixels_stored: bool
    facts: dict[str, Any]  # numbers and texts for the result
    together: bool = False  # in a store that is mapped into memory: the reader passes pointers
    remote: bool = False  # some or all in an object store: fetched, and held by the reader

    def order(self, batch: int) -> Callable[[int], np.ndarray]:
        """The order plan of batches of so many images, as train.py makes it."""
        return shuffled(self.rows, self.seed, batch)


def choose(
    recipe: Recipe, samples: Any, loading: Options, say: Callable[[str], None] = print
) -> Files:
    """At most `MOST` images of the listing that can be decoded, read once.

    Args:
        recipe: its reader, seed and evaluation graph, which decodes whole images.
        samples: the listing.
        loading: threads and the like.
        say: told about files that can't be decoded.

    Raises:
        DataError: none of those that lie side by side can.
    """
    reader, seed = recipe.data.module, recipe.train.seed
    rows = spread_evenly(samples.usable)
    check = Loader(
        reader,
        samples,
        recipe.evaluation.module,
        recipe.evaluation.options,
        lambda batch: np.resize(rows[CHECK * batch :], min(CHECK, len(rows))),
        batch=min(CHECK, len(rows)),
        seed=seed,
        device=torch.device("cpu"),
        loading=loading,
        say=say,
    )
    for _ in range(0, len(rows), CHECK):
        next(check)
    rows = np.setdiff1d(rows, np.fromiter(check.skipped, np.int64, len(check.skipped)))
    contents, pixels_stored = _contents(reader, samples, shuffled(rows, seed, len(rows))(0))
    height, width = (each[rows].astype(float) for each in (samples.height, samples.width))
    known = bool((height > 0).all())  # a list's readers do not open what lies in an object store
    facts: dict[str, Any] = {
        "images": len(rows),
        "of": len(samples.usable),
        "width": float(width.mean()) if known else None,
        "height": float(height.mean()) if known else None,
        "megapixels": float((width * height).mean() / 1e6) if known else None,
        "bytes": float((3 * width * height).mean()),
    }
    if not pixels_stored:
        facts["bytes"] = float(np.mean([len(content) for content in contents]))
        jpegs = [jpeg for jpeg in map(decode_limit.jpeg, contents) if jpeg is not None]
        facts["jpeg"] = len(jpegs) / len(contents)
        if jpegs:
            facts["progressive"] = sum(jpeg.progressive for jpeg in jpegs) / len(jpegs)
            kinds = Counter(jpeg.subsampling for jpeg in jpegs)
            facts["subsampling"] = {kind: count / len(jpegs) for kind, count in kinds.items()}
    paths = [samples.path(int(row)) for row in rows]
    remote = any(path.startswith("s3://") for path in paths)
    together = not remote and not all(os.path.isfile(path) for path in paths)
    return Files(reader, samples, rows, seed, contents, pixels_stored, facts, together, remote)


def spread_evenly(usable: np.ndarray) -> np.ndarray:
    """At most `MOST` of the rows, from the first to the last."""
    return usable[np.linspace(0, len(usable) - 1, min(len(usable), MOST)).astype(np.int64)]


def shuffled(rows: np.ndarray, seed: int, batch: int) -> Callable[[int], np.ndarray]:
    """The order plan of one process over `rows`, for readers' sources and the Loader."""
    per_epoch = order.steps_per_epoch(len(rows), 1, batch)

    def of_step(step: int) -> np.ndarray:
        epoch, step = divmod(step, per_epoch)
        return rows[order.shuffled(len(rows), seed, epoch, 0, 1, batch)[step]]

    return of_step


def pipeline(
    files: Files, body: Body, loading: Options, *, batch: int, device: torch.device
) -> Pipeline:
    """DALI without the Loader: the reader's source, and `body` behind it."""
    made = Pipeline(
        batch_size=batch,
        num_threads=loading.threads or 1,
        device_id=None if device.type == "cpu" else torch.cuda.current_device(),  # pyright: ignore[reportArgumentType]  None: no GPU
        seed=files.seed,
        prefetch_queue_depth=loading.prefetch,
    )
    with made:
        image, index = files.reader.source(files.samples, files.order(batch), loading)
        made.set_outputs(*body(image, index))
    made.build()
    return made


def read(image: Image, index: DataNode) -> list[DataNode]:
    """A `Body`: what is stored, as it is."""
    return [image.data, index]


def reading(files: Files) -> Body:
    """`read`, and every byte is touched: pointers into a mapped store are no bytes read."""
    return _copied if files.together else read


def decodes_region(recipe: Recipe, samples: Any, loading: Options) -> bool:
    """Whether the recipe's graph decodes no more of an image than its crop needs."""
    decoding = _Decoding(loading.region)
    made = Pipeline(batch_size=1, num_threads=1, device_id=None)  # pyright: ignore[reportArgumentType]  None: no GPU
    with made:
        image, index = recipe.data.module.source(
            samples, lambda step: np.zeros(1, np.int64), decoding
        )
        recipe.pipeline.module.graph(image, index, recipe.pipeline.options, "cpu")
    return decoding.asked and loading.region


def cold_rates(
    files: Files, loading: Options, *, batch: int, repeats: int, seconds: float
) -> list[float] | str:
    """Images/s of reading files that are not in the page cache; or why that can't be measured.

    One pass over the files a repeat, no longer than `seconds`.
    """
    paths = [files.samples.path(int(row)) for row in files.rows]
    if files.together:
        return "read_cold is left out: images lie together in a store that is mapped into memory"
    if files.remote:
        return REMOTE
    rates = []
    for _ in range(repeats):
        reading = pipeline(files, read, loading, batch=batch, device=torch.device("cpu"))
        if not method.drop_from_cache(paths):
            return (
                "read_cold is left out: the files can't be put out of the page cache here, or it"
                " can't be seen that they are (another user's files, a process that reads them too,"
                " a file system in memory)"
            )
        images, began = 0, time.perf_counter()
        while images < len(files.rows) and time.perf_counter() - began < seconds:
            reading.run()
            images += batch
        rates.append(min(images, len(files.rows)) / (time.perf_counter() - began))
    method.read_into_cache(paths)
    return rates


def _copied(image: Image, index: DataNode) -> list[DataNode]:
    copied = fn.copy(image.data)
    assert isinstance(copied, DataNode)  # one image in, one out
    return [copied, index]


class _Decoding:
    """Settings of decoding that remember whether a graph looked at `region`."""

    decoder: Literal["auto", "cpu"] = "cpu"
    hw_decoder_load = 0.0

    def __init__(self, region: bool) -> None:
        self._region, self.asked = region, False

    @property
    def region(self) -> bool:
        self.asked = True
        return self._region


def _contents(reader: ModuleType, samples: Any, rows: np.ndarray) -> tuple[list[bytes], bool]:
    """The bytes of the rows' files, up to `MEMORY`, and whether it is pixels that are stored.

    They come through the reader, so that it does not matter whether an image is a file of its own.
    """
    reading = Pipeline(batch_size=1, num_threads=1, device_id=None)  # pyright: ignore[reportArgumentType]  None: no GPU
    with reading:
        image, index = reader.source(samples, lambda batch: rows[batch : batch + 1], Options())
        reading.set_outputs(*read(image, index))
    reading.build()
    if not isinstance(image, Encoded):
        return [], True
    contents: list[bytes] = []
    held = 0
    for _ in range(len(rows)):
        content, _ = reading.run()
        contents.append(np.asarray(content.at(0)).tobytes())
        held += len(contents[-1])
        if held > MEMORY:
            break
    return contents, False
