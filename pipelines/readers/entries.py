"""A list of images, read: text, CSV, TSV or Parquet, as one buffer of entries and their labels.

    .txt       an entry a line; a label, if any, stands behind a tab
    .csv .tsv  the first line names the columns
    .parquet   read by row groups; columns `height` and `width`, in pixels, are taken where it has
               them
An entry is a path or a URL. Blank lines are none; every other one keeps its place, twice the same
included. Labels are numbers or text.
"""

import csv
import hashlib
import importlib
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipelines.readers.names import Names, few, shown
from pipelines.readers.scan import Clock

SUFFIXES = (".txt", ".csv", ".tsv", ".parquet")
# Column names that are looked for, in this order, where the recipe names none.
PATHS = ("path", "file", "filename", "file_name", "image", "url", "key")
LABELS = ("label", "class", "category", "target")
# Kinds of entries. A path of a file can be such as no object's key can, and a url name no object.
RELATIVE, ABSOLUTE, URL, RELATIVE_NO_KEY, URL_NO_OBJECT = range(5)
URL_START = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://")
HERE = re.compile(rb"^(?:\./+)+")
_PART = rb"(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f]+"
_KEY = re.compile(rb"(?:\./+)*%s(?:/%s)*" % (_PART, _PART), re.ASCII)
_OBJECT = re.compile(rb"s3://[^/\x00-\x20\x7f]+(?:/%s)+" % _PART)
_NUMBER = re.compile(rb"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Entries:
    """The lines of a list, in its order."""

    names: Names  # the entries, as the list has them
    kinds: np.ndarray  # uint8 [entries]: RELATIVE, ABSOLUTE, URL, ...
    digests: np.ndarray  # uint64 [entries], of each entry: equal ones have equal digests
    labels: np.ndarray | None  # int64 [entries], in `classes`; None: not every entry has one
    classes: tuple[str, ...]  # sorted, by value where all of them are numbers
    height: np.ndarray | None  # int32 [entries], as the list has it; 0 where it doesn't
    width: np.ndarray | None
    unlabelled: int  # entries without a label
    said: tuple[str, ...] = ()  # what the user should know of it

    def __len__(self) -> int:
        return len(self.kinds)


def read(path: str, *, path_column: str | None, label_column: str | None, clock: Clock) -> Entries:
    """Reads a list.

    Args:
        path: of the file; its suffix, one of SUFFIXES, tells what it is.
        path_column: of a CSV, TSV or Parquet; None: the first there is of PATHS.
        label_column: likewise, and of LABELS; None: there need be none.
        clock: says how far it is.

    Raises:
        ValueError: it can't be read, has no such column, or a line of it is none; says which.
    """
    suffix = Path(path).suffix.lower()
    found = _Found(clock)
    try:
        if suffix == ".txt":
            _refuse_columns(path, path_column, label_column)
            _read_text(path, found)
        elif suffix in (".csv", ".tsv"):
            _read_csv(path, "," if suffix == ".csv" else "\t", path_column, label_column, found)
        elif suffix == ".parquet":
            _read_parquet(path, path_column, label_column, found)
        else:
            raise ValueError(
                f"data.root: {path} is no list that is read: its name must end in"
                f" {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            )
    except OSError as error:
        raise ValueError(f"data.root: cannot read {path}: {error.strerror or error}") from None
    if not found.kinds:
        raise ValueError(f"data.root: {path} lists no images: it has no line that is not blank")
    return found.entries(path)


class _Found:
    """What was read so far."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.text, self.ends, self.kinds = bytearray(), array("q", [0]), bytearray()
        self.digests = bytearray()
        self.numbers = array("q")  # of labels, as they came; -1: none
        self.number_of: dict[bytes, int] = {}
        self.height: list[np.ndarray] = []
        self.width: list[np.ndarray] = []
        self.said: list[str] = []

    def add(self, name: bytes, label: bytes | None) -> None:
        self.text += name
        self.ends.append(len(self.text))
        self.kinds.append(_kind(name))
        self.digests += hashlib.blake2b(name, digest_size=8).digest()
        label = label.strip() if label else None
        if label:
            self.numbers.append(self.number_of.setdefault(label, len(self.number_of)))
        else:
            self.numbers.append(-1)
        if len(self.numbers) % 65_536 == 0 and self.clock.is_due():
            self.clock.say(f"data: read {len(self.numbers):,} lines of the list")

    def entries(self, path: str) -> Entries:
        names = Names(np.frombuffer(self.text, np.uint8), np.array(self.ends, np.int64))
        as_came = np.array(self.numbers, np.int64)
        unlabelled = int((as_came < 0).sum())
        labels, classes = None, []
        if not unlabelled:
            classes, place = self._classes()
            labels = place[as_came]
        elif unlabelled < len(as_came):
            first = shown(names[int(np.argmax(as_came < 0))])
            self.said.append(
                f"data: {unlabelled:,} of {len(as_came):,} lines of {path} have no label: the"
                f" labels of the others are not used (the first without one: {first})"
            )
        return Entries(
            names=names,
            kinds=np.frombuffer(self.kinds, np.uint8),
            digests=np.frombuffer(self.digests, np.uint64),
            labels=labels,
            classes=tuple(os.fsdecode(each) for each in classes),
            height=np.concatenate(self.height) if self.height else None,
            width=np.concatenate(self.width) if self.width else None,
            unlabelled=unlabelled,
            said=tuple(self.said),
        )

    def _classes(self) -> tuple[list[bytes], np.ndarray]:
        """Sorted, and the place of each label as it came.

        Where all are numbers, those of one value are one class, by its shortest label.
        """
        place = np.empty(len(self.number_of), np.int64)
        if not all(_NUMBER.fullmatch(each) for each in self.number_of):
            classes = sorted(self.number_of)
            for number, each in enumerate(classes):
                place[self.number_of[each]] = number
            return classes, place
        of_value: dict[int, bytes] = {}
        for each in sorted(self.number_of, key=lambda each: (len(each), each)):
            same = of_value.setdefault(int(each), each)
            if same != each:
                self.said.append(
                    f"data: the labels {os.fsdecode(same)} and {os.fsdecode(each)} are the same"
                    " number, and one class"
                )
        number_of = {value: number for number, value in enumerate(sorted(of_value))}
        for each, came in self.number_of.items():
            place[came] = number_of[int(each)]
        return [of_value[value] for value in number_of], place


def _kind(name: bytes) -> int:
    if name.startswith(b"/"):
        return ABSOLUTE
    if URL_START.match(name):
        is_object = not name.startswith(b"s3://") or (_OBJECT.fullmatch(name) and _is_text(name))
        return URL if is_object else URL_NO_OBJECT
    return RELATIVE if _KEY.fullmatch(name) and _is_text(name) else RELATIVE_NO_KEY


def _is_text(name: bytes) -> bool:
    if name.isascii():
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_text(path: str, found: _Found) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors' mark of UTF-8
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            name, _, label = line.partition(b"\t")
            if b"\t" in label:
                raise ValueError(
                    f"data.root: {path}, line {number:,}: {line.count(9) + 1} fields, and a line is"
                    " a path, or a path, a tab and a label"
                )
            found.add(_checked(name, path, f"line {number:,}"), label)


def _read_csv(
    path: str, delimiter: str, path_column: str | None, label_column: str | None, found: _Found
) -> None:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            heading = next(lines, [])
            at, label_at = _columns(path, heading, path_column, label_column)
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(heading):
                    raise ValueError(
                        f"data.root: {path}, line {lines.line_num:,}: {len(fields)} fields, and the"
                        f" first line names {len(heading)} columns"
                    )
                name = _checked(os.fsencode(fields[at]), path, f"line {lines.line_num:,}")
                found.add(name, None if label_at is None else os.fsencode(fields[label_at]))
        except csv.Error as error:
            raise ValueError(f"data.root: {path}, line {lines.line_num:,}: {error}") from None


def _read_parquet(
    path: str, path_column: str | None, label_column: str | None, found: _Found
) -> None:
    arrow, parquet = pyarrow(path), pyarrow(path, ".parquet")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            at, label_at = _columns(path, schema.names, path_column, label_column)
            if not _are_types(path, arrow, schema, at, label_at, label_column, found):
                label_at = None
            sizes = [
                name
                for name in ("height", "width")
                if schema.names.count(name) == 1 and arrow.types.is_integer(schema.field(name).type)
            ]
            named = [schema.names[k] for k in (at, label_at) if k is not None]
            read = list(dict.fromkeys(named + (sizes if len(sizes) == 2 else [])))
            row = 0
            for batch in file.iter_batches(columns=read):
                _add_batch(path, arrow, batch, named, row, found)
                if len(sizes) == 2:
                    found.height.append(_pixels(batch.column("height")))
                    found.width.append(_pixels(batch.column("width")))
                row += batch.num_rows
    except arrow.ArrowException as error:
        said = " ".join(str(error).split())
        raise ValueError(f"data.root: cannot read {path} as Parquet: {said}") from None


def _checked(name: bytes, path: str, where: str) -> bytes:
    if not name:
        raise ValueError(f"data.root: {path}, {where}: there is no path")
    if b"\0" in name:
        raise ValueError(
            f"data.root: {path}, {where}: a path can't hold a zero byte: is this text?"
        )
    return name


def pyarrow(root: str, part: str = "") -> ModuleType:
    """The package, or a module of it, to read `root`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow{part}")
    except ImportError:
        raise ValueError(
            f"data.root: {root} is read by pyarrow, which is not installed: pip install -e '.[hf]'"
        ) from None


def _are_types(
    path: str,
    arrow: ModuleType,
    schema: Any,
    at: int,
    label_at: int | None,
    asked: str | None,
    found: _Found,
) -> bool:
    """Whether the column of labels can be one; raises where it was asked for, or that of paths."""

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        kinds = (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary())
        return kind in kinds

    field = schema.field(at)
    if not is_text(field.type):
        raise ValueError(
            f"data.root: {path}: column {field.name} is of {field.type}, and paths are text: give"
            f" data.path_column (it has: {', '.join(schema.names)})"
        )
    if label_at is not None:
        field = schema.field(label_at)
        kind = arrow.types
        if is_text(field.type) or kind.is_integer(field.type) or kind.is_boolean(field.type):
            return True
        what = f"column {field.name} is of {field.type}, and labels are text or whole numbers"
        if asked is not None:
            raise ValueError(f"data.root: {path}: {what}: give another data.label_column")
        found.said.append(
            f"data: {path}: {what}: it is not used, and data.label_column names another"
        )
        return False
    return True


def _add_batch(
    path: str, arrow: ModuleType, batch: Any, named: list[str], row: int, found: _Found
) -> None:
    names = batch.column(named[0])
    labels: Iterator[bytes | None]
    if len(named) == 1:
        labels = iter([None] * len(names))
    else:
        kind = batch.column(named[1])
        if arrow.types.is_boolean(kind.type):
            kind = kind.cast(arrow.int8())
        text = kind.cast(arrow.string()) if arrow.types.is_integer(kind.type) else kind
        labels = iter(text.cast(arrow.large_binary()).to_pylist())
    # A batch at a time as Python's bytes: 64 Ki of them.
    for number, name in enumerate(names.cast(arrow.large_binary()).to_pylist(), row + 1):
        found.add(_checked(name or b"", path, f"row {number:,}"), next(labels))


def _pixels(column: Any) -> np.ndarray:
    """Positive numbers of pixels; 0 for all else."""
    values = column.cast("int64", safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return np.where((values > 0) & (values < 2**31), values, 0).astype(np.int32)


def _columns(
    path: str, names: list[str], path_column: str | None, label_column: str | None
) -> tuple[int, int | None]:
    """The places of the paths and of the labels, if there are any."""
    at = _place(names, path_column, PATHS)
    if at is None:
        asked = repr(path_column) if path_column else f"of paths ({', '.join(PATHS)})"
        raise ValueError(
            f"data.root: {path} has no column {asked} (its first line, or schema, names:"
            f" {', '.join(names[:20]) or 'nothing'}): give data.path_column, or the line that names"
            " the columns, such as path,label"
        )
    label_at = _place(names, label_column, LABELS)
    if label_at is None and label_column is not None:
        raise ValueError(
            f"data.root: {path} has no column {label_column!r} (it has: {', '.join(names[:20])}):"
            " give data.label_column"
        )
    for place in (at, label_at):
        if place is not None and names.count(names[place]) > 1:
            raise ValueError(
                f"data.root: {path} has several columns called {names[place]!r}: rename all but one"
            )
    return at, label_at


def _place(names: list[str], asked: str | None, usual: tuple[str, ...]) -> int | None:
    if asked is not None:
        return names.index(asked) if asked in names else None
    lower = [name.strip().lower() for name in names]
    return next((lower.index(name) for name in usual if name in lower), None)


def _refuse_columns(path: str, path_column: str | None, label_column: str | None) -> None:
    for key, column in (("path_column", path_column), ("label_column", label_column)):
        if column is not None:
            raise ValueError(
                f"data.{key} ({column!r}) is for CSV, TSV and Parquet: {path} has a path a line,"
                " and a label behind a tab, if any"
            )


def repeated(entries: Entries, path: str) -> str | None:
    """A line about entries that stand in the list more than once, if there are any."""
    order = np.argsort(entries.digests, kind="stable")
    inner = entries.digests[order]
    again = np.sort(order[1:][inner[1:] == inner[:-1]])
    if not len(again):
        return None
    named = few([shown(entries.names[row]) for row in again[:5].tolist()], len(again))
    return (
        f"data: {len(again):,} of {len(entries):,} lines of {path} repeat an earlier one, and count"
        f" as images of their own: {named}"
    )
