"""What `check` has looked at, kept in a file: a check that was stopped, or is repeated, goes on.

The file says of which images it is, and holds records of fastssl/check_image.py one behind the
other, appended as they come. Of two records of a name the later one counts. A record that was cut
off or damaged is as good as none. Bad files are kept too, with how strictly they were looked at, so
that a less strict check does not take them for good.
"""

import fcntl
import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from fastssl.check_image import BAD, RECORD, SAME, STRICTLY, UNSEEN

_VERSION = b"fastssl check 2\n"
_SEED = 0x9E3779B97F4A7C15  # so that zeros are no valid record


class Progress:
    """The file, locked for this process from `with` on."""

    def __init__(self, path: Path, of: str) -> None:
        """Opens it, and makes it where there is none.

        Args:
            path: the file.
            of: of which images: ASCII, on a line. Names and times tell a file from itself at
                another time, but not two copies of a data set.

        Raises:
            ValueError: another check is writing it, or it is of other images, or of something else.
            OSError: it cannot be written.
        """
        self._path = path
        self._of = of
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._keys, self._order, self._records = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._records = np.zeros(0, RECORD)  # unmaps the file
        os.close(self._file)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """What is known of names: RECORD [n] for their keys, uint64 [n]; UNSEEN where nothing."""
        found = np.zeros(len(keys), RECORD)
        places = np.searchsorted(self._keys, keys, "right") - 1  # the latest of equal ones
        known = (places >= 0) & (self._keys[places] == keys) if len(self._keys) else places >= 0
        found[known] = self._records[self._order[places[known]]]
        return found

    def __len__(self) -> int:
        """Records at the start, of which some may be of the same name."""
        return len(self._keys)

    def add(self, records: np.ndarray) -> None:
        """Appends those of files that were looked at; the process may die then.

        Not those of files that could not be opened: there is nothing to know them by again.

        Raises:
            OSError: the disk is full.
        """
        state = records["state"]
        good = (state > UNSEEN) & (state <= STRICTLY)
        kept = records[good | ((state == BAD) & (records["modified"] != 0))]
        kept["check"] = _checks(kept)
        rest = memoryview(kept.tobytes())
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._path} is being written by another check: wait for it, or give --out"
            ) from None

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The valid records' keys in order, uint64 [n], where they lie, and all records, mapped."""
        head = _VERSION + self._of.encode("ascii") + b"\n"
        head = head.ljust(-(-len(head) // RECORD.itemsize) * RECORD.itemsize, b"\0")
        found = os.pread(self._file, len(head), 0)
        if found != head[: len(found)]:
            self._refuse()
        size = os.fstat(self._file).st_size
        if size < len(head):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, head, 0)
            size = len(head)
        whole = size - size % RECORD.itemsize
        os.ftruncate(self._file, whole)  # what was cut off in the middle
        os.lseek(self._file, whole, os.SEEK_SET)
        if whole == len(head):
            return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, RECORD)
        records = np.memmap(self._path, RECORD, "r", offset=len(head))
        assert len(records) == (whole - len(head)) // RECORD.itemsize
        order = np.flatnonzero((_checks(records) == records["check"]) & (records["state"] < SAME))
        keys = records["key"][order]
        sorting = np.argsort(keys, kind="stable")
        return keys[sorting], order[sorting], records

    def _refuse(self) -> NoReturn:
        found = os.pread(self._file, 1 << 16, 0)
        if not found.startswith(_VERSION):
            raise ValueError(f"{self._path} was not written by this version's check: remove it")
        other = found[len(_VERSION) :].partition(b"\n")[0].decode("ascii", "replace")
        raise ValueError(
            f"{self._path.parent} holds what a check of {other} found, and this is {self._of}:"
            " give another folder with --out, or remove that one"
        )


def _checks(records: np.ndarray) -> np.ndarray:
    """A check of each record, uint64 [n]: tells what was torn apart or zeroed by a crash."""
    checks = np.empty(len(records), np.uint64)
    block = 1 << 16  # a mapped file is not brought into memory as a whole
    for begin in range(0, len(records), block):
        part = np.ascontiguousarray(records[begin : begin + block])
        words = part.view(np.uint8).reshape(len(part), RECORD.itemsize).view("<u8")[:, :-1]
        odd = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        checks[begin : begin + block] = (words * odd).sum(1, dtype=np.uint64) ^ np.uint64(_SEED)
    return checks
