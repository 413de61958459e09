"""Images that were looked at and found bad: the list that `fastssl.data check` writes, read here.

A JSON Lines file: {"name": "...", "reason": "..."} an image. A name is the listing's own, relative
to the root, as os.fsdecode gives it and JSON escapes it, so that any bytes survive. The images keep
their rows, so that the index of all others stays what it was; they are told as bad, and not read.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

REASON = "quarantined: {}"  # what stands in Samples.bad


def read(path: str | Path, root: str = "") -> dict[str, str]:
    """The names in a quarantine file, each with its reason; the first line of a name counts.

    Args:
        path: the file, or the folder that `fastssl.data check` wrote it in.
        root: of the images; its name, train or val, tells which file in a folder it is.

    Raises:
        ValueError: there is no such file, or a line of it is none of a quarantine file's.
    """
    listed: dict[str, str] = {}
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        path = _file_in(path, root)
    try:
        with open(path, "rb") as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    name, reason = _entry(content, f"data.quarantine: {path}, line {number:,}")
                    listed.setdefault(name, reason)
    except OSError as error:
        raise ValueError(f"data.quarantine: cannot read {path}: {error.strerror}") from None
    return listed


def rows(
    listed: dict[str, str],
    count: int,
    name: Callable[[int], bytes],
    say: Callable[[str], None],
    *,
    in_order: bool = False,
) -> dict[int, str]:
    """The rows that are quarantined, ascending, each with its reason as `Samples.bad` gives it.

    Args:
        listed: what `read` gave.
        count: rows of the listing.
        name: of a row, relative to the root.
        say: is told, in a line, how many of `listed` are no names of the listing.
        in_order: rows are in the order of their names' bytes: each of `listed` is looked up in
            place of every row, which saves seconds a million rows.
    """
    wanted = {os.fsencode(each): reason for each, reason in listed.items()}
    found: dict[int, str] = {}
    names_found: set[bytes] = set()
    if in_order:
        for each, reason in wanted.items():
            row = bisect_left(range(count), each, key=name)
            while row < count and name(row) == each:
                found[row] = REASON.format(reason)
                names_found.add(each)
                row += 1
    elif wanted:
        for row in range(count):
            each = name(row)
            if each in wanted:
                found[row] = REASON.format(wanted[each])
                names_found.add(each)
    missing = [each for each in wanted if each not in names_found]
    if missing:
        shown = os.fsdecode(missing[0])
        say(
            f"data: {len(missing):,} of {len(wanted):,} names in data.quarantine are not in the"
            f" listing, such as {shown if shown.isprintable() else ascii(shown)}"
        )
    return dict(sorted(found.items()))


def line(name: bytes, reason: str) -> str:
    """An image's line in a quarantine file, with its newline."""
    return json.dumps({"name": os.fsdecode(name), "reason": reason}) + "\n"


def _file_in(folder: str, root: str) -> str:
    split = os.path.basename(os.path.abspath(root)).partition(".")[0]  # train, of train.csv too
    names = (f"quarantine-{split}.jsonl", "quarantine.jsonl")
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise ValueError(
        f"data.quarantine: {folder} holds neither {names[0]} nor {names[1]}: give the DIR of"
        " python -m fastssl.data check, or a file"
    )


def _entry(content: bytes, where: str) -> tuple[str, str]:
    """The name and the reason in a line.

    Raises:
        ValueError: it is no such line; says why.
    """
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError):  # no JSON, not UTF-8, nested too deep
        entry = None
    match entry:
        case {"name": str(name), "reason": str(reason)} if name and _can_be_a_name(name):
            return name, " ".join(reason.split())
    raise ValueError(
        f'{where}: {str(content.strip()[:60])[1:]} is no {{"name": "a/b.jpg", "reason": "..."}}, as'
        " python -m fastssl.data check writes one a line"
    )


def _can_be_a_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair of UTF-16
        return False
    return True
