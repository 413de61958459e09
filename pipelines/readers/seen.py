"""What is known of a list's files: kept between starts, and brought up to date at each.

Size, time and dimensions of every file are kept with the list as it was read. A list that was
written again is read again, and what is known of its entries stays known, by their names.
"""

import hashlib
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
    reason: np.ndarray  # int32 [entries], why it is bad: place in the note's reasons, from 1
    note: dict[str, Any]  # about the list
    is_kept: bool  # the cache has just this
    clock: Clock


LAYOUT = 2  # of what is kept: every other is made anew
_REASONS = 10_000  # that are kept: most bad files share one
_SEEN = {
    **{"height": np.int32, "width": np.int32},
    **{"sizes": np.int64, "times": np.int64, "reason": np.int32},
}


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
    if old is not None and old[1].get("layout") != LAYOUT:
        old = None
    made_by = reasons_made_by()
    if old is not None and old[1]["reasons_made_by"] != made_by:
        old[0]["reason"][:] = 0
        old[1].update(reasons=[], reasons_made_by=made_by)
    if old is not None and old[1]["seal"] == seal:
        for line in old[1]["said"]:
            say(line)
        return _from_kept(*old, clock)
    found = entries.read(root, path_column=path_column, label_column=label_column, clock=clock)
    again = entries.repeated(found, root)
    said = [*found.said, *([again] if again else [])]
    for line in said:
        say(line)
    columns = {key: np.zeros(len(found), kind) for key, kind in _SEEN.items()}
    if old is not None:
        here, there = _in_both(found.digests, old[0]["digests"])
        for key, column in columns.items():
            column[here] = old[0][key][there]
    note = {
        **{"layout": LAYOUT, "seal": seal, "said": said},
        **{"classes": found.classes, "unlabelled": found.unlabelled},
        **{"reasons": [] if old is None else old[1]["reasons"], "reasons_made_by": made_by},
    }
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
    bad = dict.fromkeys(elsewhere.tolist(), "only paths, without file://, and s3:// urls are read")
    is_no_object = known.entries.kinds == entries.URL_NO_OBJECT
    if b"://" in base:
        is_no_object |= known.entries.kinds == entries.RELATIVE_NO_KEY
    why = "names no object: s3://bucket/key is wanted, without empty parts, '.' or '..' in the key"
    bad |= dict.fromkeys(np.flatnonzero(is_no_object).tolist(), why)
    to_see = ~is_url & ~is_remote & ~is_no_object
    if trust:
        to_see &= known.height == 0
    rows = np.flatnonzero(to_see)
    folder = b"/" if b"://" in base else base
    new = _changed(known, folder, rows)
    known.height[new] = known.width[new] = known.reason[new] = 0
    still = np.flatnonzero(known.reason)
    bad |= {
        row: known.note["reasons"][number - 1]
        for row, number in zip(still.tolist(), known.reason[still].tolist(), strict=True)
    }
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
        wrong = in_blocks(new, read, known.clock, "scanned {} of {} headers")
        bad |= wrong
        # A file that is there and can't be read: who allows it changes neither size nor time.
        lasting = {
            row: text
            for row, text in wrong.items()
            if not text.startswith("cannot be read") or known.times[row] == 0
        }
        number_reasons(lasting, known.reason, known.note["reasons"])
    finally:  # an interrupted scan goes on from here
        is_news = not known.is_kept or known.height[new].any() or known.reason[new].any()
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
        is_same &= (known.height[block] > 0) | (known.reason[block] > 0)
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
        "reason": known.reason,
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


def reasons_made_by() -> str:
    """What tells reasons of these headers' reader from those of another version of it."""
    return hashlib.blake2b(Path(headers.__file__).read_bytes(), digest_size=8).hexdigest()


def number_reasons(wrong: dict[int, str], reason: np.ndarray, table: list[str]) -> None:
    """Writes down why rows are bad: in `reason` the place in `table`, counted from 1.

    Not all: some depend on more than the file, and beyond so many there is no end.
    """
    number_of = {text: number for number, text in enumerate(table, 1)}
    for row, text in wrong.items():
        if text not in number_of and len(table) < _REASONS:
            table.append(text)
            number_of[text] = len(table)
        reason[row] = number_of.get(text, 0)
