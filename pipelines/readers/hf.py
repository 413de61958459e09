"""A dataset of Hugging Face's `datasets` on disk, as `save_to_disk` writes it: its image column.

A row is a row of the dataset, through its indices mapping where it has one. Its Arrow files are
mapped into memory, which processes share, and the images handed to DALI as they lie there. Images
of which the dataset has only the path are read from their files. Needs pyarrow, not `datasets`.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nvidia.dali.data_node import DataNode

from pipelines.images import Decoding, Image
from pipelines.readers import (
    arrow_files,
    contents,
    headers,
    kept,
    object_store,
    quarantine,
    seen,
    subset,
)
from pipelines.readers.arrow_files import Dataset
from pipelines.readers.names import few
from pipelines.readers.scan import Clock, in_blocks, refuse_other_kinds


@dataclass(frozen=True, kw_only=True)
class Options:
    root: str  # folder of one split: it holds state.json
    image_column: str | None = None  # null: the one of type Image
    label_column: str | None = None  # null: the one of type ClassLabel, or the one called label
    bad: Literal["skip", "error"] = "skip"  # what to do about images that cannot be decoded
    max_pixels: int = 178_956_970  # an image of more is bad: see pipelines.readers.folder
    # Use only so many images, evenly spaced over the usable ones: rows are then counted among them.
    limit: int | None = None
    # Few labels: this part of the usable images of every class (at least one of each), or so many
    # of every class. Rows are then counted among them, as with `limit`.
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0  # which of them: the same seed gives the same rows on every machine
    quarantine: str | None = None  # file of rows to leave out: {"name": "17", "reason": "..."}, the
    # name a row's number; they keep their places

    def __post_init__(self):
        if not self.root:
            raise ValueError("root must name the folder of a dataset")
        object_store.refuse_others("root", self.root)
        if object_store.is_url(self.root):
            raise ValueError(f"root ({self.root}): copy the dataset to this machine")
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


@dataclass(frozen=True)
class Samples:
    """The images of a dataset; as `pipelines.readers.folder.Samples`, and where their bytes are."""

    root: str  # absolute
    dataset: Dataset  # mapped: alive as long as a pipeline may read
    stored: np.ndarray | None  # int64 [rows], the dataset's row of each; None: the same row
    classes: tuple[str, ...]
    labels: np.ndarray | None  # int64 [rows]
    height: np.ndarray  # int32 [rows], pixels, upright; 0 where bad
    width: np.ndarray  # int32 [rows]
    usable: np.ndarray  # int64, the rows that can be decoded as far as their headers tell
    bad: dict[int, str]  # the other rows, with the reason
    chunks: None  # images are read each on its own
    window: int
    fingerprint: str  # of all images' sizes, paths and labels
    written: str  # of the times at which the Arrow files were written

    def __len__(self) -> int:
        return len(self.height)

    def path(self, row: int) -> str:
        """For messages: the dataset, and the row's number in it."""
        return os.path.join(self.root, str(self._stored(row)))

    def content(self, rows: np.ndarray) -> list[np.ndarray | bytes]:
        """Of some rows: their bytes, uint8, not copied; or the path of a file."""
        stored = rows if self.stored is None else self.stored[rows]
        return self.dataset.content(stored)

    def _stored(self, row: int) -> int:
        return row if self.stored is None else int(self.stored[row])


def list_samples(options: Options, *, cache: Path | None, say: Callable[[str], None]) -> Samples:
    """Opens a dataset and checks the images in it.

    Args:
        options: of this reader.
        cache: folder that keeps the dimensions of images, so that their headers are read once, for
            as long as the Arrow files keep their sizes and times; it may be missing or damaged.
        say: is called with single lines for the user, such as progress.

    Raises:
        ValueError: there is no such dataset, it can't be read, has no such column, none of its
            images can be used, or, with `bad: error`, any can't; or a subset can't be taken.
    """
    listed = (
        None if options.quarantine is None else quarantine.read(options.quarantine, options.root)
    )
    root = os.path.abspath(os.path.expanduser(options.root))
    dataset = arrow_files.opened(root, options.image_column, options.label_column, say)
    height, width, bad = _checked(root, dataset, options, cache, say)
    _report(root, dataset, options, bad, say)
    if listed is not None:
        bad = quarantine.rows(listed, len(dataset), lambda row: b"%d" % row, say) | bad
        if len(bad) == len(dataset):
            raise ValueError(
                f"data.root: no image of {root} is left: those that can be decoded are quarantined"
            )
    bad = dict(sorted(bad.items()))
    good = np.ones(len(dataset), bool)
    good[np.fromiter(bad, np.int64, len(bad))] = False
    usable, labels = np.flatnonzero(good), dataset.labels
    stored = subset.choose(
        usable,
        labels,
        dataset.classes,
        lambda row: b"%d" % row,
        fraction=options.fraction,
        per_class=options.per_class,
        limit=options.limit,
        seed=options.subset_seed,
        root=root,
    )
    if stored is not None:
        height, width = height[stored], width[stored]
        labels = None if labels is None else labels[stored]
        usable, bad = np.arange(len(stored)), {}
    state = hashlib.blake2b(dataset.fingerprint(), digest_size=16)
    if stored is not None:
        state.update(stored.data)
    return Samples(
        root=root,
        dataset=dataset,
        stored=stored,
        classes=dataset.classes,
        labels=labels,
        height=height,
        width=width,
        usable=usable,
        bad=bad,
        chunks=None,
        window=1,
        fingerprint=state.hexdigest(),
        written=hashlib.blake2b(repr(dataset.seal).encode(), digest_size=16).hexdigest(),
    )


def source(
    samples: Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    """Inside a DALI pipeline definition: the encoded images and their rows.

    Args:
        samples: the opened dataset; must outlive the pipeline, which reads its memory.
        rows: gives the rows, int64 [batch], of a step; steps are counted from 0, and a pipeline
            that is restored from a checkpoint goes on counting. It raises StopIteration at the end.
        decoding: how the graph is to decode them.

    Returns:
        image: its bytes.
        index: int64 [1].
    """
    if not samples.dataset.has_paths:

        def mapped(_: int, chosen: np.ndarray) -> list[np.ndarray]:
            return [each for each in samples.content(chosen) if isinstance(each, np.ndarray)]

        return contents.given(mapped, rows, decoding, copy=False)
    pool = ThreadPoolExecutor(contents.THREADS)  # its threads end when it is forgotten

    def read(_: int, chosen: np.ndarray) -> list[np.ndarray]:
        return list(pool.map(_bytes, samples.content(chosen)))

    return contents.given(read, rows, decoding, copy=True)


def _bytes(content: np.ndarray | bytes) -> np.ndarray:
    return contents.read_file(content) if isinstance(content, bytes) else content


def _checked(
    root: str,
    dataset: Dataset,
    options: Options,
    cache: Path | None,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Height and width of all rows, and which are bad, with the reason, ascending."""
    key = hashlib.blake2b(f"{os.path.realpath(root)} {dataset.column}".encode(), digest_size=16)
    path = None if cache is None else cache / "hf" / f"{key.hexdigest()}.arrays"
    old = None if path is None else kept.load(path, say)
    note = {"seal": dataset.seal, "reasons": [], "made_by": seen.reasons_made_by()}
    if old is not None and isinstance(old[1], dict) and old[1] | {"reasons": []} == note:
        height, width, reason = (old[0][key] for key in ("height", "width", "reason"))
        note = old[1]
    else:
        height, width, reason = (np.zeros(len(dataset), np.int32) for _ in range(3))
    bad = {row: note["reasons"][reason[row] - 1] for row in np.flatnonzero(reason).tolist()}
    new = np.flatnonzero((height == 0) & (reason == 0))

    def read(block: list[int]) -> dict[int, str]:
        wrong: dict[int, str] = {}
        for row, content in zip(block, dataset.content(np.array(block)), strict=True):
            try:
                if isinstance(content, bytes):
                    refuse_other_kinds(content)
                    height[row], width[row] = headers.dimensions(content)
                elif len(content):
                    height[row], width[row] = headers.dimensions_of(content.data)
                else:
                    wrong[row] = "no image"
            except ValueError as error:
                wrong[row] = str(error)
        return wrong

    try:
        wrong = in_blocks(new, read, Clock(say), "scanned {} of {} headers")
        bad |= wrong
        seen.number_reasons(wrong, reason, note["reasons"])
    finally:  # an interrupted scan goes on from here
        in_files = dataset.only_paths(new)  # which may change while the dataset does not
        is_news = height[new].any() or reason[new].any()
        if path is not None and len(new) > len(in_files) and is_news:
            found = {"height": height.copy(), "width": width.copy(), "reason": reason.copy()}
            for each in found.values():
                each[in_files] = 0
            kept.save(path, found, note, say)
    for begin in range(0, len(dataset), 1 << 20):  # as int64 at once they would take memory
        part = slice(begin, begin + (1 << 20))
        many = height[part].astype(np.int64) * width[part] > options.max_pixels
        for row in (np.flatnonzero(many) + begin).tolist():
            bad[row] = (
                f"{width[row]:,} x {height[row]:,} pixels, over"
                f" data.max_pixels={options.max_pixels:,}"
            )
    return height, width, dict(sorted(bad.items()))


def _report(
    root: str,
    dataset: Dataset,
    options: Options,
    bad: dict[int, str],
    say: Callable[[str], None],
) -> None:
    """Say what is left out, or raise where that is an error."""
    if not bad:
        return
    named = few([f"row {row} ({bad[row]})" for row in list(bad)[:5]], len(bad))
    if len(bad) == len(dataset):
        raise ValueError(
            f"data.root: none of the {len(dataset):,} images in {root} (column {dataset.column})"
            f" can be used: {named}"
        )
    what = f"{len(bad):,} of {len(dataset):,} images"
    if options.bad == "error":
        raise ValueError(
            f"data.root: {what} in {root} cannot be used: {named}; leave them out with"
            " data.bad=skip"
        )
    say(f"data: skipping {what}: {named} (data.bad=error refuses them)")
