"""File names of millions of images in two arrays, which can lie in a mapped file.

13 million Python strings would take more than a gigabyte, and no two processes would share them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_BLOCK = 65_536  # names that are put together at a time


@dataclass(frozen=True)
class Names:
    """Names, as bytes, one behind the other."""

    text: np.ndarray  # uint8 [bytes]
    ends: np.ndarray  # int64 [rows + 1], from 0: name k is text[ends[k]:ends[k + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.text[self.ends[row] : self.ends[row + 1]].tobytes()

    def only(self, rows: np.ndarray) -> "Names":
        """Some of them, in the order of `rows`."""
        ends = ends_of(self.ends[rows + 1] - self.ends[rows])
        text = np.empty(ends[-1], np.uint8)
        for begin in range(0, len(rows), _BLOCK):
            block = rows[begin : begin + _BLOCK]
            here = b"".join([self[row] for row in block.tolist()])
            text[ends[begin] : ends[begin + len(block)]] = np.frombuffer(here, np.uint8)
        return Names(text, ends)


def joined(names: Iterable[bytes]) -> Names:
    """The names of a list that is not too long for one."""
    names = list(names)
    text = np.frombuffer(b"".join(names), np.uint8)
    return Names(text, ends_of(np.fromiter(map(len, names), np.int64, len(names))))


def ends_of(lengths: np.ndarray) -> np.ndarray:
    """`Names.ends` of names of these lengths."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def few(items: list[str], count: int | None = None) -> str:
    """The first five of `items`, and how many more there are of `count` (None: of `items`)."""
    more = (len(items) if count is None else count) - 5
    return ", ".join(items[:5]) + (f" and {more:,} more" if more > 0 else "")


def shown(name: bytes) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    text = os.fsdecode(name)
    return text if text.isprintable() else ascii(text)
