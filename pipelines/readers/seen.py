"""What is known of a list's files: kept between starts, and brought up to date at each.

Size, time and dimensions of every file are kept with the list as it was read. A list that was
written again is read again, and what is known of its entries stays known, by their names.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.readers import entries, file_status, headers, kept
from pipelines.readers.entries import Entries
from pipelines.readers.names import Names
from pipelines.readers.scan import Clock, in_blocks, refuse_other_kinds


@dataclass(frozen=True)
class Known:
    """A list, and what was seen of its files; 0: nothing yet, or in an object store."""

    entries: Entries
    height: np.ndarray  # int32 [entries], pixels, upright; as the list has it of what isn't here
    width: np.ndarray
    sizes: np.ndarray  # int64 [entries], bytes
    times: np.ndarray  # int64 [entries], of the last modification, ns
    note: dict[str, Any]  # about the list
    is_kept: bool  # the cache has just this
    clock: Clock


_SEEN = {"height": np.int32, "width": np.int32, "sizes": np.int64, "times": np.int64}


def known(
    root: str,
    path_column: str | None,
    label_column: str | None,
    path: Path | None,
    say: Callable[[str], None],
) -> Known:
    """The list at `root`, from the file `path` of the cache where it is still the same.

    Raises:
        ValueError: as `entries.read`.
    """
    clock = Clock(say)
    status = os.stat(root)
    seal = [status.st_size, status.st_mtime_ns, status.st_ino]
    old = None if path is None else kept.load(path, say)
    if old is not None and old[1]["seal"] == seal:
        for line in old[1]["said"]:
            say(line)
        return _from_kept(*old, clock)
    found = entries.read(root, path_column=path_column, label_column=label_column, clock=clock)
    said = [line for line in (_unlabelled(found, root), entries.repeated(found, root)) if line]
    for line in said:
        say(line)
    columns = {key: np.zeros(len(found), kind) for key, kind in _SEEN.items()}
    if old is not None:
        here, there = _in_both(found.digests, old[0]["digests"])
        for key, column in columns.items():
            column[here] = old[0][key][there]
    note = {"seal": seal, "said": said, "classes": found.classes, "unlabelled": found.unlabelled}
    return Known(found, **columns, note=note, is_kept=False, clock=clock)


def checked(
    known: Known, base: bytes, is_remote: np.ndarray, path: Path | None, *, trust: bool
) -> tuple[Known, dict[int, str]]:
    """Looks at the files, reads the headers of those that are new or changed, and keeps it all.

    Args:
        known: the list; its arrays are written to.
        base: folder, or url, that entries are relative to, with a slash behind it.
        is_remote: bool [entries], which are in an object store: they are not looked at.
        path: of the cache.
        trust: files of which the dimensions are known are not looked at.

    Returns:
        The same, up to date, and the rows that can't be used, with the reason.
    """
    height, width = known.entries.height, known.entries.width
    if height is not None and width is not None:  # the list's word is all there is
        known.height[is_remote], known.width[is_remote] = height[is_remote], width[is_remote]
    is_url = known.entries.kinds == entries.URL
    elsewhere = np.flatnonzero(is_url & ~is_remote)
    bad = dict.fromkeys(elsewhere.tolist(), "only files and s3:// urls are read")
    to_see = ~is_url & ~is_remote
    if trust:
        to_see &= known.height == 0
    rows = np.flatnonzero(to_see)
    folder = b"/" if b"://" in base else base
    new = _changed(known, folder, rows)
    known.height[new] = known.width[new] = 0
    names = known.entries.names

    def read(block: list[int]) -> dict[int, str]:
        wrong: dict[int, str] = {}
        for row in block:
            path = os.path.join(folder, names[row])
            try:
                refuse_other_kinds(path)
                known.height[row], known.width[row] = headers.dimensions(path)
            except ValueError as error:
                wrong[row] = str(error)
        return wrong

    try:
        bad |= in_blocks(new, read, known.clock, "scanned {} of {} headers")
    finally:  # an interrupted scan goes on from here
        is_news = not known.is_kept or known.height[new].any()
        if path is not None and is_news:
            kept.save(path, _to_keep(known), known.note, known.clock.say)
    if path is not None and is_news:
        back = kept.load(path, known.clock.say)
        if back is not None:  # mapped, and shared with the processes that come next
            known = _from_kept(*back, known.clock)
    return known, bad


def _changed(known: Known, folder: bytes, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose files are not as they were, or not known; writes down how they are."""
    changed: list[np.ndarray] = []
    done = 0
    for block, sizes, times, _ in file_status.each_block(folder, known.entries.names, rows):
        is_same = (known.sizes[block] == sizes) & (known.times[block] == times)
        is_same &= known.height[block] > 0
        others = block[~is_same]
        # Only what is new: a page that is written to is this process's own from then on.
        known.sizes[others], known.times[others] = sizes[~is_same], times[~is_same]
        changed.append(others)
        done += len(block)
        if known.clock.is_due():
            known.clock.say(f"data: looked at {done:,} of {len(rows):,} files")
    return np.concatenate(changed) if changed else rows


def _to_keep(known: Known) -> dict[str, np.ndarray]:
    found = known.entries
    arrays = {
        "text": found.names.text,
        "ends": found.names.ends,
        "kinds": found.kinds,
        "digests": found.digests,
        "height": known.height,
        "width": known.width,
        "sizes": known.sizes,
        "times": known.times,
    }
    return arrays if found.labels is None else arrays | {"labels": found.labels}


def _from_kept(arrays: dict[str, np.ndarray], note: dict[str, Any], clock: Clock) -> Known:
    found = Entries(
        names=Names(arrays["text"], arrays["ends"]),
        kinds=arrays["kinds"],
        digests=arrays["digests"],
        labels=arrays.get("labels"),
        classes=tuple(note["classes"]),
        height=None,
        width=None,
        unlabelled=note["unlabelled"],
    )
    seen = {key: arrays[key] for key in _SEEN}
    return Known(found, **seen, note=note, is_kept=True, clock=clock)


def _in_both(digests: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of entries that are in both lists, here and there."""
    order = np.argsort(others, kind="stable")
    place = np.searchsorted(others, digests, sorter=order)
    there = order[np.minimum(place, len(others) - 1)]
    here = np.flatnonzero(others[there] == digests)
    return here, there[here]


def _unlabelled(found: Entries, root: str) -> str | None:
    if not 0 < found.unlabelled < len(found):
        return None
    return (
        f"data: {found.unlabelled:,} of {len(found):,} lines of {root} have no label: the labels"
        " of the others are not used"
    )
