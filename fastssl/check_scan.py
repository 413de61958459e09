"""Has every image of a listing looked at by worker processes, and survives what kills a worker."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastssl import worker_pool
from fastssl.check_image import BAD, RECORD, SAME, Looked, Piece, key_of, look_at_all
from fastssl.check_progress import Progress
from fastssl.work_progress import WorkProgress

_PIECE = 128  # files a task of a worker


@dataclass
class Split:
    """A listing, and what was found of its files."""

    name: str  # "train", "val"; "" where there is but one
    samples: Any  # of the folder reader
    records: np.ndarray = field(init=False)  # RECORD [rows]: 64 bytes a row
    bad: dict[int, str] = field(init=False)  # rows, with the reason

    def __post_init__(self) -> None:
        """Nothing was looked at but what the reader did."""
        self.bad = dict(self.samples.bad)
        self.records = np.zeros(len(self.samples), RECORD)
        self.records["state"][list(self.bad)] = BAD

    def shown_name(self, row: int) -> bytes:
        """From the folder that was given, which may hold two splits."""
        return self.prefix + self.samples.names[row]

    @property
    def prefix(self) -> bytes:
        return f"{self.name}/".encode() if self.name else b""

    @property
    def good(self) -> np.ndarray:
        """Rows that nothing is wrong with: bool [rows]."""
        return (self.records["state"] != BAD) & (self.records["state"] != 0)


def scan(
    splits: list[Split],
    wanted: list[np.ndarray],
    progress: Progress,
    what: WorkProgress,
    *,
    decode: bool,
    digest: bool,
    most_pixels: int,
    workers: int,
    work: Callable[[Piece], Looked] = look_at_all,
) -> int:
    """Fills `records` and `bad` of the splits.

    Args:
        splits: the listings.
        wanted: the rows of each to look at, int64.
        progress: what is known of before, and where what is found is added.
        what: is told of each piece that is done.
        decode: whole images, in place of their headers.
        digest: the whole content.
        most_pixels: an image of more is bad.
        workers: processes.
        work: what they do; a function that they can import.

    Returns:
        how many files were looked at, and not taken from `progress`.

    Raises:
        OSError: what was found cannot be kept.
    """
    looked_at = 0
    pieces = _pieces(splits, wanted, progress, decode, digest, most_pixels)
    with closing(_results(pieces, work, workers)) as results:
        for split, rows, piece, looked in results:
            found = looked.records
            same = found["state"] == SAME
            looked_at += len(rows) - int(np.count_nonzero(same))
            progress.add(found[~same])
            found[same] = piece.known[same]
            split.records[rows] = found
            for place, reason in looked.bad.items():
                split.bad[int(rows[place])] = reason
            bad = sum(len(each.bad) for each in splits)
            what.advance(len(rows), f"{bad:,} bad" if bad else "")
    return looked_at


_Task = tuple[Split, np.ndarray, Piece]


def _pieces(
    splits: list[Split],
    wanted: list[np.ndarray],
    progress: Progress,
    decode: bool,
    digest: bool,
    most_pixels: int,
) -> Iterator[_Task]:
    for split, rows in zip(splits, wanted, strict=True):
        folder = split.samples.root.encode(errors="surrogateescape")
        for begin in range(0, len(rows), _PIECE):
            some = rows[begin : begin + _PIECE]
            names = tuple(split.samples.names[row] for row in some.tolist())
            known = split.records[some]
            if len(progress) and not known["state"].any():
                keys = np.array([key_of(split.prefix + name) for name in names], np.uint64)
                known = progress.find(keys)
            yield (
                split,
                some,
                Piece(folder, split.prefix, names, known, decode, digest, most_pixels),
            )


def _results(
    tasks: Iterable[_Task], work: Callable[[Piece], Looked], workers: int
) -> Generator[tuple[Split, np.ndarray, Piece, Looked], None, None]:
    """Each task with its result, in order."""
    tasks = iter(tasks)
    under_way: deque[_Task] = deque()

    def pieces() -> Iterator[Piece]:
        for task in tasks:
            under_way.append(task)
            yield task[2]

    while True:
        try:
            with closing(worker_pool.in_order(work, pieces(), workers)) as results:
                for looked in results:
                    yield *under_way.popleft(), looked
            return
        except (
            ValueError
        ):  # a worker was killed: by a file that it could not bear, or by the system
            while under_way:
                split, rows, piece = under_way.popleft()
                yield split, rows, piece, _one_by_one(piece, work)


def _one_by_one(piece: Piece, work: Callable[[Piece], Looked]) -> Looked:
    """What a single worker finds, which may be killed: the file that it is looking at is bad."""
    try:
        with closing(worker_pool.in_order(work, [piece], 1)) as results:
            return next(results)
    except ValueError:
        if len(piece.names) == 1:
            records = np.zeros(1, RECORD)
            records["state"] = BAD
            return Looked(records, {0: "ended the process that decoded it: a crash, or memory"})
    middle = len(piece.names) // 2
    parts = [
        _one_by_one(replace(piece, names=piece.names[part], known=piece.known[part]), work)
        for part in (slice(None, middle), slice(middle, None))
    ]
    bad = parts[0].bad | {middle + place: reason for place, reason in parts[1].bad.items()}
    return Looked(np.concatenate([part.records for part in parts]), bad)
