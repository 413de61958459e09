"""The Arrow files of a saved dataset, mapped: where the bytes of each image lie, and the labels.

    state.json          names the files, and those of an indices mapping if there is one
    dataset_info.json   the type of each column: Image, ClassLabel with its names, ...
    data-*.arrow        record batches, as a stream; an image is {bytes, path}, one of them empty
Nothing is copied but the labels: an image costs its place in the mapped files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from pipelines.readers.entries import pyarrow

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class Chunk:
    """A record batch: its images, as they lie in the mapped file."""

    data: np.ndarray  # uint8, bytes of its images one behind the other
    ends: np.ndarray  # int32 or int64 [rows + 1] in `data`, from the first one's start
    paths: Any  # Arrow array of text [rows], where an image has no bytes; None: all have


@dataclass(frozen=True)
class Dataset:
    """One split of a saved dataset."""

    root: str  # its folder, which paths of images are relative to
    column: str  # of the images
    chunks: tuple[Chunk, ...]
    chunk_ends: np.ndarray  # int64 [chunks], rows of the files behind each
    indices: np.ndarray | None  # int64 [rows], in the files; None: all, in order
    labels: np.ndarray | None  # int64 [rows]
    classes: tuple[str, ...]
    seal: list[list[Any]]  # of each file: its name, size, and time of writing
    has_paths: bool  # some images are in files of their own

    def __len__(self) -> int:
        if self.indices is not None:
            return len(self.indices)
        return int(self.chunk_ends[-1]) if len(self.chunk_ends) else 0

    def content(self, rows: np.ndarray) -> list[np.ndarray | bytes]:
        """The bytes of rows, uint8; none where there is no image; or the path of its file."""
        found: list[np.ndarray | bytes] = []
        for number, place in zip(*self._places(rows), strict=True):
            chunk = self.chunks[number]
            image = chunk.data[chunk.ends[place] : chunk.ends[place + 1]]
            path = None
            if not len(image) and chunk.paths is not None:
                path = chunk.paths[place].as_py()
            found.append(image if not path else os.fsencode(os.path.join(self.root, path)))
        return found

    def only_paths(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` whose images are in files of their own."""
        if not self.has_paths:
            return rows[:0]
        numbers, places = self._places(rows)
        chunks = [self.chunks[number] for number in numbers]
        empty = [each.ends[k] == each.ends[k + 1] for each, k in zip(chunks, places, strict=True)]
        return rows[np.array(empty, bool)]

    def fingerprint(self) -> bytes:
        """Of all images' sizes and paths, in order, and of the labels."""
        state = hashlib.blake2b(digest_size=32)
        for chunk in self.chunks:
            state.update(np.ascontiguousarray(np.diff(chunk.ends), np.int64).data)
            if chunk.paths is not None:
                state.update(repr(chunk.paths.to_pylist()).encode("utf-8", "surrogatepass"))
        for array in (self.indices, self.labels):
            if array is not None:
                state.update(array.data)
        state.update(repr(self.classes).encode())
        return state.digest()

    def _places(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Of some rows, the chunk and the place in it."""
        stored = rows if self.indices is None else self.indices[rows]
        number = np.searchsorted(self.chunk_ends, stored, side="right")
        begin = np.where(number > 0, self.chunk_ends[number - 1], 0)
        return number.tolist(), (stored - begin).tolist()


def opened(
    root: str, image_column: str | None, label_column: str | None, say: Callable[[str], None]
) -> Dataset:
    """Maps a dataset.

    Args:
        root: its folder, absolute.
        image_column: None: the one of type Image.
        label_column: None: the one of type ClassLabel, or the one called label, if any.
        say: told where labels are not used.

    Raises:
        ValueError: it is none, a file of it is missing or damaged, or it has no such column.
    """
    arrow = pyarrow(root)
    state, features = _said(root)
    names = _file_names(root, state, "_data_files")
    tables = [_table(arrow, os.path.join(root, name)) for name in names]
    if not tables or not sum(table.num_rows for table in tables):
        raise ValueError(f"data.root: {root} is a dataset without rows")
    schema = tables[0].schema
    if any(not table.schema.equals(schema) for table in tables):
        raise ValueError(f"data.root: the files of {root} do not have the same columns: {_AGAIN}")
    column = _image_column(root, arrow, schema, features, image_column)
    chunks = [
        _chunk(arrow, each) for table in tables for each in table.column(column).chunks if len(each)
    ]
    counts = [len(chunk.ends) - 1 for chunk in chunks]
    mapped = _file_names(root, state, "_indices_data_files")
    indices = _indices(root, arrow, mapped, sum(counts)) if mapped else None
    labels, classes = None, ()
    label_name = _label_column(root, schema, features, label_column, say)
    if label_name is not None and label_column is None:
        kind = schema.field(label_name).type
        if not _is_label(arrow, kind):
            say(
                f"data: column {label_name} of {root} holds {kind}, and labels are whole numbers or"
                " text: it is not used, and data.label_column names another"
            )
            label_name = None
    if label_name is not None:
        whole = arrow.chunked_array([c for t in tables for c in t.column(label_name).chunks])
        labels, classes = _labels(root, arrow, label_name, whole, features.get(label_name, {}))
        if indices is not None:
            labels = labels[indices]
        unlabelled = int((labels < 0).sum())
        if unlabelled:
            if unlabelled < len(labels):
                say(
                    f"data: {unlabelled:,} of {len(labels):,} images in {root} have no label"
                    f" ({label_name}): the labels of the others are not used (the first without"
                    f" one: row {int(np.argmax(labels < 0))})"
                )
            labels, classes = None, ()
    return Dataset(
        root=root,
        column=column,
        chunks=tuple(chunks),
        chunk_ends=np.cumsum(counts, dtype=np.int64),
        indices=indices,
        labels=labels,
        classes=classes,
        seal=[_seal(root, name) for name in (*names, *mapped)],
        has_paths=any(chunk.paths is not None for chunk in chunks),
    )


_AGAIN = "copy or save it again (datasets: save_to_disk)"


def _said(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What state.json says, and the features in dataset_info.json."""
    if os.path.isfile(os.path.join(root, SPLITS)):
        splits = _json(os.path.join(root, SPLITS)).get("splits")
        names = [str(each) for each in splits] if isinstance(splits, list) else []
        raise ValueError(
            f"data.root: {root} holds several splits ({', '.join(names)}): give one, such as"
            f" data.root={os.path.join(root, names[0] if names else 'train')}"
        )
    if not os.path.isdir(root):
        if os.path.exists(root):
            raise ValueError(f"data.root: {root} is a file: give the folder of a saved dataset")
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        raise ValueError(f"data.root: there is no folder {root}, only {parent}")
    if not os.path.isfile(os.path.join(root, STATE)):
        raise ValueError(
            f"data.root: {root} is no dataset that save_to_disk wrote (it has no {STATE}): write"
            " one by datasets.load_dataset(...).save_to_disk(FOLDER), or read a folder of images"
            " with data.use=pipelines.readers.folder"
        )
    state = _json(os.path.join(root, STATE))
    features = _json(os.path.join(root, INFO)).get("features")
    return state, features if isinstance(features, dict) else {}


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
    except OSError as error:
        raise ValueError(f"data.root: cannot read {path}: {error.strerror}: {_AGAIN}") from None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"data.root: {path} is damaged: {_AGAIN}")
    return said


def _file_names(root: str, state: dict[str, Any], key: str) -> list[str]:
    found: list[str] = []
    listed = state.get(key) or []
    for each in listed if isinstance(listed, list) else [None]:
        name = each.get("filename") if isinstance(each, dict) else None
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(
                f"data.root: {os.path.join(root, STATE)} is damaged ({key}: {each!r}): {_AGAIN}"
            )
        found.append(name)
    return found


def _table(arrow: ModuleType, path: str) -> Any:
    """A file's record batches, mapped; a stream that breaks off is found here, not when reading."""
    ipc = pyarrow(path, ".ipc")
    try:
        with arrow.memory_map(path) as file, ipc.open_stream(file) as stream:
            return stream.read_all()
    except OSError as error:  # ArrowIOError among them
        reason = error.strerror or " ".join(str(error).split())
        raise ValueError(f"data.root: cannot read {path}: {reason}: {_AGAIN}") from None
    except arrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data.root: {path} is damaged ({reason}): {_AGAIN}") from None


def _seal(root: str, name: str) -> list[Any]:
    status = os.stat(os.path.join(root, name))
    return [name, status.st_size, status.st_mtime_ns]


def _image_column(
    root: str, arrow: ModuleType, schema: Any, features: dict[str, Any], asked: str | None
) -> str:
    images = [name for name in schema.names if _type(features, name) == "Image"]
    if asked is None and len(images) != 1:
        found = f"several columns of images ({', '.join(images)})" if images else "no column of"
        also = "" if images else f" type Image (it has: {', '.join(schema.names)})"
        raise ValueError(f"data.root: {root} has {found}{also}: give data.image_column")
    name = images[0] if asked is None else asked
    if name not in schema.names:
        raise ValueError(
            f"data.image_column: {root} has no column {name!r} (it has: {', '.join(schema.names)})"
        )
    kind = schema.field(name).type
    if _is_text(arrow, kind) or _is_bytes(arrow, kind):
        return name
    if arrow.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        inner = {field.name: field.type for field in kind}
        if _is_bytes(arrow, inner["bytes"]) and _is_text(arrow, inner["path"]):
            return name
    raise ValueError(f"data.image_column: column {name} of {root} holds {kind}, and no images")


def _type(features: dict[str, Any], name: str) -> Any:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_text(arrow: ModuleType, kind: Any) -> bool:
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)


def _is_bytes(arrow: ModuleType, kind: Any) -> bool:
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _chunk(arrow: ModuleType, images: Any) -> Chunk:
    paths = None
    if arrow.types.is_struct(images.type):
        names = [field.name for field in images.type]
        parts = dict(zip(names, images.flatten(), strict=True))  # a missing image: both missing
        images, paths = parts["bytes"], parts["path"]
    elif _is_text(arrow, images.type):
        empty = np.zeros(len(images) + 1, np.int32)
        return Chunk(np.empty(0, np.uint8), empty, images)
    large = arrow.types.is_large_binary(images.type)
    _, ends, data = images.buffers()
    ends = np.frombuffer(ends, np.int64 if large else np.int32)
    ends = ends[images.offset : images.offset + len(images) + 1]
    data = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    # Not trusted: an end behind the data would read memory that is no image's.
    if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > len(data):
        raise ValueError(f"data.root: a record batch is damaged: {_AGAIN}")
    is_empty = ends[1:] == ends[:-1]
    return Chunk(data, ends, paths if paths is not None and is_empty.any() else None)


def _indices(root: str, arrow: ModuleType, names: list[str], count: int) -> np.ndarray:
    tables = [_table(arrow, os.path.join(root, name)) for name in names]
    found = [each.to_numpy() for table in tables for each in table.column(0).chunks]
    indices = np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)
    if not len(indices) or indices.min() < 0 or indices.max() >= count:
        raise ValueError(
            f"data.root: the indices of {root} are empty, or beyond its {count:,} rows: {_AGAIN}"
        )
    return indices


def _label_column(
    root: str,
    schema: Any,
    features: dict[str, Any],
    asked: str | None,
    say: Callable[[str], None],
) -> str | None:
    if asked is not None:
        if asked not in schema.names:
            known = ", ".join(schema.names)
            raise ValueError(f"data.label_column: {root} has no column {asked!r} (it has: {known})")
        return asked
    found = [name for name in schema.names if _type(features, name) == "ClassLabel"]
    if len(found) == 1:
        return found[0]
    if "label" in schema.names:
        return "label"
    if found:
        say(
            f"data: {root} has several columns of labels ({', '.join(found)}), and none is used:"
            " data.label_column names one"
        )
    return None


def _is_label(arrow: ModuleType, kind: Any) -> bool:
    types = arrow.types
    return types.is_integer(kind) or types.is_boolean(kind) or _is_text(arrow, kind)


def _labels(
    root: str, arrow: ModuleType, name: str, column: Any, feature: Any
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels, int64 [rows of the files], -1 where there is none; and the names of the classes."""
    compute = pyarrow(root, ".compute")
    kind = column.type
    if not _is_label(arrow, kind):
        raise ValueError(
            f"data.label_column: column {name} of {root} holds {kind}: labels are whole numbers or"
            " text"
        )
    if arrow.types.is_boolean(kind):
        column = column.cast("int8")
        kind = column.type
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and arrow.types.is_integer(kind):
        labels = column.cast("int64").fill_null(-1).to_numpy()
        if labels.min() < -1 or labels.max() >= len(names):
            raise ValueError(
                f"data.root: {root} has labels beyond its {len(names)} classes ({name}): {_AGAIN}"
            )
        return labels.copy(), tuple(str(each) for each in names)
    values = sorted(each for each in compute.unique(column).to_pylist() if each is not None)
    place = compute.index_in(column, value_set=arrow.array(values, kind))
    labels = place.fill_null(-1).to_numpy().astype(np.int64)
    return labels, tuple(str(each) for each in values)
