"""Which files of a data set are the same, byte for byte."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from fastssl.check_scan import Split


@dataclass
class Counts:
    """What was found of duplicates."""

    groups: int = 0
    superfluous: int = 0  # images: all of a group but one
    bytes: int = 0  # of these
    across: int = 0  # groups with images of several splits: a test on what was learnt
    classes: int = 0  # groups whose images are in different classes


def candidates(splits: list[Split]) -> list[np.ndarray]:
    """The rows of each split, int64, whose size and ends another file has too.

    Only these need be read as a whole.
    """
    rows, numbers = _good_rows(splits)
    ends = np.concatenate([split.records["ends"] for split in splits])[rows]
    order = np.argsort(ends, kind="stable")
    same = ends[order][1:] == ends[order][:-1]
    shared = np.zeros(len(rows), bool)
    shared[order[1:][same]] = shared[order[:-1][same]] = True
    return _apart(splits, rows[shared], numbers)


def write(splits: list[Split], file: TextIO) -> Counts:
    """Writes a line of JSON for each group of equal files, in the order of their first ones.

    Names are relative to the folder that was checked; each has its class beside it, if there is
    any.
    """
    counts = Counts()
    for group in _groups(splits):
        first, row = group[0]
        size = int(first.records["size"][row])
        digest = first.records["digest"][row].tobytes().hex()
        labels = [_class(split, row) for split, row in group]
        names = [os.fsdecode(split.shown_name(row)) for split, row in group]
        entry = {"digest": digest, "bytes": size, "names": names}
        if any(label is not None for label in labels):
            entry["classes"] = labels
        file.write(json.dumps(entry) + "\n")
        counts.groups += 1
        counts.superfluous += len(group) - 1
        counts.bytes += size * (len(group) - 1)
        counts.across += len({split.name for split, _ in group}) > 1
        counts.classes += len({*labels} - {None}) > 1  # a test split may have none
    return counts


def _groups(splits: list[Split]) -> Iterator[list[tuple[Split, int]]]:
    rows, begins = _good_rows(splits)
    digests = np.concatenate([split.records["digest"] for split in splits])[rows]
    whole = digests.any(1)
    rows, digests = rows[whole], digests[whole]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: rows ascend within a group
    same = (digests[order][1:] == digests[order][:-1]).all(1)
    # A group is a run of equal neighbours.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2] + 1
    for group in np.argsort(rows[order[starts]], kind="stable").tolist():
        members = rows[order[starts[group] : ends[group]]]
        numbers = np.searchsorted(begins, members, "right") - 1
        yield [
            (splits[number], int(row - begins[number]))
            for number, row in zip(numbers.tolist(), members.tolist(), strict=True)
        ]


def _good_rows(splits: list[Split]) -> tuple[np.ndarray, np.ndarray]:
    """The good rows of all splits, one behind the other; and where each split begins."""
    begins = np.cumsum([0, *(len(split.records) for split in splits[:-1])])
    return np.flatnonzero(np.concatenate([split.good for split in splits])), begins


def _apart(splits: list[Split], rows: np.ndarray, begins: np.ndarray) -> list[np.ndarray]:
    numbers = np.searchsorted(begins, rows, "right") - 1
    return [rows[numbers == number] - begins[number] for number in range(len(splits))]


def _class(split: Split, row: int) -> str | None:
    labels = split.samples.labels
    return None if labels is None else split.samples.classes[int(labels[row])]
