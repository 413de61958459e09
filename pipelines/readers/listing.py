"""The files below a folder with sizes, times and dimensions, kept between starts in one file.

The next start lists again only the folders whose status says that something in them changed, asks
for size and time of every other file, and reads the headers of those that are new or differ. So it
finds files that were added, removed, renamed or replaced, and such as were written to in place
unless both size and time of last modification were kept. Without `check` it takes for granted that
a file in an unchanged folder is unchanged too: it finds none that was written to in place.

What is kept is mapped into memory: processes share it, and what nobody asks for takes none.
"""

import json
import os
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.readers import file_status, kept
from pipelines.readers.names import Names
from pipelines.readers.scan import Clock
from pipelines.readers.walk import FOLDER_COLUMNS, Folders, walk

LAYOUT = 2  # of what is kept: every other is made anew
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SELF = Path("/proc/self/stat")


@dataclass(frozen=True)
class Listing:
    """Files, sorted by the bytes of their names; one that leads nowhere has size and time 0."""

    names: Names
    sizes: np.ndarray  # int64 [rows], bytes
    times: np.ndarray  # int64 [rows], of the last modification, ns
    height: np.ndarray  # int32 [rows], pixels; 0 where unknown
    width: np.ndarray  # int32 [rows]
    folders: Folders
    loops: tuple[bytes, ...] = ()  # links to a folder that they lie in
    # As they were kept with it: which rows can be used, and their classes.
    usable: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    # Of what is kept, another one each time; empty: this is not kept, or differs from what is.
    stamp: str = ""
    began: int = 0  # when all files were asked for their status, ns since the system's start

    def __len__(self) -> int:
        return len(self.names)


def read(root: str, path: Path | None, *, check: bool, say: Callable[[str], None]) -> Listing:
    """The files below `root`, with the dimensions of those that are known.

    Args:
        root: absolute path of the folder.
        path: of what `keep` wrote; it may be missing or damaged. None: nothing is kept.
        check: ask for size and time of every file, and not only of those in changed folders.
        say: is called with single lines for the user, such as progress.

    Raises:
        ValueError: a folder can't be read.
    """
    clock = Clock(say)
    began = _since_boot()
    folder = os.fsencode(root)
    old = None if path is None else _recalled(path, say)
    check = check and not (path and old and _was_checked(path, old))
    again: frozenset[bytes] = frozenset()
    differs = False
    while True:
        seen = None if old is None else (old.names, old.folders)
        found = walk(folder, clock, seen, again)
        listed = None  # rows in folders that were listed now; None: none
        if found.former is not None:
            listed = found.former < 0
        if old is None or (listed is not None and not _same_names(found.names, old.names)):
            now = _carried_over(found.names, found.former, old)
            differs = True
        else:
            now = old.sizes, old.times, old.height, old.width
        some, lost = _ask(folder, found.names, listed, now, check=check)
        differs |= some
        if not lost or again:
            break
        again = lost  # a link of theirs leads elsewhere: to a folder, or nowhere
    differs |= old is None or not _same_folders(found.folders, old.folders)
    if old is None or differs:
        old = Listing(found.names, *now, found.folders)
    return Listing(
        old.names,
        *now,
        found.folders,
        found.loops,
        *(old.usable, old.labels, old.classes, old.stamp),
        began if check else 0,
    )


def keep(
    path: Path,
    listing: Listing,
    usable: np.ndarray | None,
    labels: np.ndarray | None,
    classes: tuple[str, ...],
    say: Callable[[str], None],
) -> Listing:
    """Writes a listing, with what it is used for; gives it as the next start will, mapped.

    Where it can't be written, which is said, the listing stays as it is.
    """
    folders, stamp = listing.folders, os.urandom(8).hex()
    arrays = {
        **{"text": listing.names.text, "ends": listing.names.ends},
        **{"sizes": listing.sizes, "times": listing.times},
        # 0 for bad files: they are read again at each start, being few
        **{"height": listing.height, "width": listing.width},
        **{"folder_text": folders.names.text, "folder_ends": folders.names.ends},
        **{f"folder_{name}": column for name, column in folders.columns().items()},
    }
    if usable is not None:
        arrays["usable"] = usable
    if labels is not None:
        arrays["labels"] = labels
    note = {"layout": LAYOUT, "stamp": stamp, "classes": classes}
    # An empty array has no bytes to map.
    kept.save(path, {name: each for name, each in arrays.items() if len(each)}, note, say)
    with suppress(OSError):
        path.with_suffix(".npz").unlink(missing_ok=True)  # layout 1
    again = _recalled(path, lambda _: None)
    if again is None or again.stamp != stamp:
        return listing
    return Listing(
        *(again.names, again.sizes, again.times, again.height, again.width, again.folders),
        listing.loops,
        *(again.usable, again.labels, again.classes, stamp, listing.began),
    )


def tell_checked(path: Path, listing: Listing) -> None:
    """Lets the processes that were started with this one do without asking for every file again."""
    if not listing.began or not listing.stamp or len(listing) < file_status.FEW:
        return
    told = {
        **{"boot": _boot(), "stamp": listing.stamp},
        **{"began": listing.began, "process": os.getpid()},
    }
    part = path.with_suffix(f".checked.{os.getpid()}.part")
    with suppress(OSError):
        part.write_text(json.dumps(told))
        part.replace(path.with_suffix(".checked.json"))


_Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # sizes, times, height, width


def _recalled(path: Path, say: Callable[[str], None]) -> Listing | None:
    found = kept.load(path, say)
    if found is None or found[1]["layout"] != LAYOUT:
        return None
    arrays, note = found

    def column(name: str, dtype: type = np.int64) -> np.ndarray:
        return arrays.get(name, np.empty(0, dtype))

    folders = Folders(
        Names(column("folder_text", np.uint8), column("folder_ends")),
        *(column(f"folder_{name}") for name in FOLDER_COLUMNS),
    )
    return Listing(
        Names(column("text", np.uint8), column("ends")),
        *(column("sizes"), column("times"), column("height", np.int32), column("width", np.int32)),
        folders,
        (),
        *(arrays.get("usable"), arrays.get("labels"), tuple(note["classes"]), note["stamp"]),
    )


def _was_checked(path: Path, old: Listing) -> bool:
    """Whether another process has asked for every file since this one was started.

    One of several that are started together asks, and the others wait for it: it sees what they
    would have seen. Another start's checks are too old to count.
    """
    try:
        told = json.loads(path.with_suffix(".checked.json").read_text())
        return (
            (told["boot"], told["stamp"]) == (_boot(), old.stamp)
            and told["process"] != os.getpid()
            and told["began"] > _process_started()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _boot() -> str:
    return _BOOT.read_text().strip()


def _since_boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _process_started() -> int:
    """When this process was started, ns since the system's start; proc(5), field 22 of stat."""
    fields = _SELF.read_text().rpartition(")")[2].split()
    return int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def _ask(
    root: bytes, names: Names, listed: np.ndarray | None, now: _Columns, *, check: bool
) -> tuple[bool, frozenset[bytes]]:
    """Brings sizes and times up to date; where they differ, dimensions become unknown.

    Args:
        root: the folder.
        names: of its files.
        listed: bool [rows], the files in folders that were listed now; None: there are none.
        now: written to.
        check: all files, and not only those that were listed now.

    Returns:
        Whether any file differs, and the folders, as in Folders, that must be listed again.
    """
    sizes, times, height, width = now
    rows = None if check else np.flatnonzero(np.zeros(0) if listed is None else listed)
    differs, lost = False, set()
    for block, its_sizes, its_times, regular in file_status.each_block(root, names, rows):
        other = (its_sizes != sizes[block]) | (its_times != times[block])
        if not other.any():
            continue
        gone = other & ~regular
        if listed is not None:
            gone &= ~listed[block]
        for row in block[gone].tolist():
            above, slash, _ = names[row].rpartition(b"/")
            lost.add(above + slash)
        other &= ~gone
        where = block[other]
        sizes[where], times[where] = its_sizes[other], its_times[other]
        height[where] = width[where] = 0
        differs |= bool(len(where))
    return differs, frozenset(lost)


def _carried_over(names: Names, former: np.ndarray | None, old: Listing | None) -> _Columns:
    """What was known of the files, by name; 0 for new ones."""
    rows = len(names)
    now = tuple(np.zeros(rows, dtype) for dtype in (np.int64, np.int64, np.int32, np.int32))
    if old is not None and former is not None:
        before = old.sizes, old.times, old.height, old.width
        same = np.flatnonzero(former >= 0)
        is_gone = np.ones(len(old), bool)
        is_gone[former[same]] = False
        here, there = _shared(
            *(names, np.flatnonzero(former < 0), old.names, np.flatnonzero(is_gone))
        )
        for column, its in zip(now, before, strict=True):
            column[same] = its[former[same]]
            column[here] = its[there]
    sizes, times, height, width = now
    return sizes, times, height, width


def _shared(
    names: Names, rows: np.ndarray, others: Names, their_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose names are in both, here and there; both are in the names' order."""
    here, there = array("q"), array("q")
    theirs = iter(their_rows)
    other = next(theirs, None)
    their = b"" if other is None else others[other]
    for row in rows:
        name = names[row]
        while other is not None and their < name:
            other = next(theirs, None)
            their = b"" if other is None else others[other]
        if other is None:
            break
        if their == name:
            here.append(row)
            there.append(other)
    return np.frombuffer(here, np.int64), np.frombuffer(there, np.int64)


def _same_names(names: Names, others: Names) -> bool:
    return np.array_equal(names.ends, others.ends) and np.array_equal(names.text, others.text)


def _same_folders(folders: Folders, others: Folders) -> bool:
    theirs = others.columns()
    return _same_names(folders.names, others.names) and all(
        np.array_equal(column, theirs[name]) for name, column in folders.columns().items()
    )
