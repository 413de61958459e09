"""Has every image of a listing looked at by worker processes, and survives what kills a worker."""

import io
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastssl import worker_pool
from fastssl.check_image import (
    BAD,
    RECORD,
    SAME,
    Looked,
    Piece,
    ended_its_worker,
    is_passing,
    key_of,
    look_at_all,
)
from fastssl.check_progress import Progress
from fastssl.work_progress import WorkProgress
from fastssl.worker_pool import WorkerLost

_PIECE = 128  # files a task of a worker
_MOST_LOST = 16  # workers lost to one file after the other; more is no chance of the files


@dataclass
class Split:
    """A listing, and what was found of its files."""

    name: str  # "train", "val", ...; "" where there is but one
    samples: Any  # of the folder reader
    records: np.ndarray = field(init=False)  # RECORD [rows]: 64 bytes a row
    bad: dict[int, str] = field(init=False)  # rows, with the reason
    unread: dict[int, str] = field(init=False)  # neither good nor bad: could not be read this time

    def __post_init__(self) -> None:
        """Nothing was looked at but what the reader did."""
        found = self.samples.bad
        self.unread = {row: reason for row, reason in found.items() if is_passing(reason)}
        self.bad = {row: reason for row, reason in found.items() if row not in self.unread}
        self.records = np.zeros(len(self.samples), RECORD)
        self.records["state"][list(self.bad)] = BAD

    def shown_name(self, row: int) -> bytes:
        """From the folder that was given, which may hold several splits."""
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
        ValueError: workers die of sound images too, or cannot import a decoder.
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
            for place, reason in looked.unread.items():
                split.unread[int(rows[place])] = reason
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
    losses = _Losses(work)

    def pieces() -> Iterator[Piece]:
        for task in tasks:
            under_way.append(task)
            yield task[2]

    while True:
        try:
            with closing(worker_pool.in_order(work, pieces(), workers)) as results:
                for looked in results:
                    losses.in_a_row = 0
                    yield *under_way.popleft(), looked
            return
        except WorkerLost:  # to a file that it could not bear, or to the system
            while under_way:
                split, rows, piece = under_way.popleft()
                yield split, rows, piece, _one_by_one(piece, losses)
        except ImportError as error:
            raise ValueError(f"a decoder cannot be used: {error}") from None


@dataclass
class _Losses:
    """Tells files that end a worker from what ends workers whatever they look at."""

    work: Callable[[Piece], Looked]
    in_a_row: int = 0  # files

    def look(self, piece: Piece) -> Looked:
        """What a single worker finds.

        Raises:
            WorkerLost: it was killed.
        """
        with closing(worker_pool.in_order(self.work, [piece], 1)) as results:
            return next(results)

    def blame(self, piece: Piece) -> Looked:
        """What is to be said of a single file that a worker was lost to.

        Raises:
            ValueError: it is not the file's fault.
        """
        self.in_a_row += 1
        if self.in_a_row > _MOST_LOST:
            raise ValueError(
                f"{self.in_a_row} files one after the other ended the process that looked at them,"
                f" the last is {ascii(piece.names[-1])[1:]}: rather memory is short, or a decoder"
                " is broken; the same command goes on from here"
            )
        with tempfile.TemporaryDirectory() as folder:
            names = ("sound.jpg", "sound.png")  # by one decoder, and by the others
            for name in names:
                (Path(folder) / name).write_bytes(_sound(name.rpartition(".")[2]))
            sound = replace(
                piece,
                folder=folder.encode(),
                names=tuple(map(str.encode, names)),
                known=np.zeros(len(names), RECORD),
                decode=piece.decode or bool((piece.known["state"] == BAD).any()),
                most_pixels=10**6,
            )
            try:
                self.look(sound)
            except WorkerLost:
                raise ValueError(
                    "the processes that look at images end at sound ones too: memory is short, or a"
                    " decoder (simplejpeg, Pillow, DALI) is broken; nothing is said of your images"
                ) from None
        return ended_its_worker(piece)


def _sound(suffix: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), "gray").save(file, "JPEG" if suffix == "jpg" else "PNG")
    return file.getvalue()


def _one_by_one(piece: Piece, losses: _Losses) -> Looked:
    """What single workers find, which may be killed: the file that one is looking at is bad.

    Raises:
        ValueError: it is not the files' fault.
    """
    try:
        looked = losses.look(piece)
        losses.in_a_row = 0
        return looked
    except WorkerLost:
        if len(piece.names) == 1:
            return losses.blame(piece)
    middle = len(piece.names) // 2
    parts = [
        _one_by_one(replace(piece, names=piece.names[part], known=piece.known[part]), losses)
        for part in (slice(None, middle), slice(middle, None))
    ]
    bad = parts[0].bad | {middle + place: reason for place, reason in parts[1].bad.items()}
    unread = parts[0].unread | {middle + place: why for place, why in parts[1].unread.items()}
    return Looked(np.concatenate([part.records for part in parts]), bad, unread)
