"""The layout of a tar store, and the reading of all of it but images: manifest and index.

A store is a folder of WebDataset tars and what finds an image in them without a walk:
    manifest.json        what it is: keys in `Manifest`; whoever writes more keys need not ask
    shard-000000.tar     for row k the members `%012d.<ext>` (jpg png webp bmp tif; raw pixels: npy)
                         and, where there are classes, `%012d.cls` (the label, ASCII decimal)
    shard-000000.idx     DALI's index of it, as its script wds2idx writes it
    index/*.npy          one array a column, one entry an image, in the order of rows: `COLUMNS`
A row is the place in the index and the number in its member's name; bad files of the source have
none. Tars that others made have names of their own, and get an index by `fastssl.data index`.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FORMAT = "fastssl tar store"
VERSION = 2  # of the layout: readers refuse every other
MANIFEST = "manifest.json"
INDEX = "index"
FORMS = ("original", "jpeg", "raw")
NPY_HEADING = 128  # bytes, of version 1.0, before raw pixels: uint8 [H, W, 3] in C order
BLOCK = 512  # bytes: members' headers and contents begin at its multiples
COLUMNS = {
    "shard": np.dtype("<i4"),  # number of the file
    "offset": np.dtype("<i8"),  # in it, of the first byte of the image (raw: of its pixels)
    "size": np.dtype("<i8"),  # bytes
    "height": np.dtype("<i4"),  # pixels as decoded, upright
    "width": np.dtype("<i4"),
    "label": np.dtype("<i4"),  # -1 where there are no classes
    "checksum": np.dtype("<u4"),  # CRC-32 of these bytes
    "name_end": np.dtype("<i8"),  # in `name`, of the image's name in the source
    "name": np.dtype("u1"),  # all names one behind the other, as the file system spells them
}
AGAIN = "copy or pack it again (python -m fastssl.data pack SOURCE STORE)"
_OLD = "fastssl packed store"  # the format before
_ROWS = 1 << 20  # looked at at once, so that a check takes no memory worth the name


@dataclass(frozen=True)
class Shard:
    """A tar of the store."""

    name: str  # of the file, in the store's folder
    bytes: int
    sha256: str
    images: int
    first_row: int


@dataclass(frozen=True)
class Manifest:
    """The keys of manifest.json that readers need."""

    form: Literal["original", "jpeg", "raw"]
    images: int
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    index: dict[str, str]  # column: SHA-256 of its file
    digest: str  # of the whole manifest, and so of the index and all shards


def read_manifest(root: str) -> Manifest:
    """What the manifest of a local store says.

    Args:
        root: absolute.

    Raises:
        ValueError: there is no store, or none that this version reads; with the remedy.
    """
    path = os.path.join(root, MANIFEST)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(_not_a_store(root)) from None
    except NotADirectoryError:
        raise ValueError(f"data.root: {root} is a file: give the folder of a tar store") from None
    except OSError as error:
        raise ValueError(f"data.root: cannot read {path}: {error.strerror}") from None
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: str) -> Manifest:
    """What a manifest's bytes say, once it is one that this version reads.

    Args:
        content: of the file.
        path: or url, for messages.

    Raises:
        ValueError: as `read_manifest`.
    """
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("format") not in (FORMAT, _OLD):
        raise ValueError(
            f"data.root: {path} is not the manifest of a tar store, or is damaged: {AGAIN}"
        )
    if said["format"] == _OLD:
        raise ValueError(
            f"data.root: {path} is of a store of version {said.get('version')}, which this fastssl"
            " no longer reads: pack its source again (python -m fastssl.data pack SOURCE STORE)"
        )
    if said.get("version") != VERSION:
        raise ValueError(
            f"data.root: {path} is of a store of version {said.get('version')}, and this fastssl"
            f" reads version {VERSION}: {AGAIN}, or install the fastssl that wrote it"
            f" ({said.get('fastssl', 'not said')})"
        )
    try:
        manifest = Manifest(
            form=said["form"],
            images=said["images"],
            classes=tuple(said["classes"]),
            shards=tuple(_shard(each) for each in said["shards"]),
            index={name: said["index"][name] for name in COLUMNS},
            digest=hashlib.sha256(content).hexdigest(),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"data.root: {path} is damaged (at {error}): {AGAIN}") from None
    found = _impossible(manifest)
    if found:
        raise ValueError(f"data.root: {path} is damaged ({found}): {AGAIN}")
    return manifest


def read_columns(folder: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The index, mapped into memory so that processes share it; its checksums and bounds checked.

    Args:
        folder: that holds the columns, `<column>.npy`.
        manifest: of the store.

    Raises:
        ValueError: a file is missing, damaged, or leads out of its shard; names it and the remedy.
    """
    paths = {name: os.path.join(folder, f"{name}.npy") for name in COLUMNS}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:  # a gigabyte for 1e7 images
        digests = {name: executor.submit(sha256_of, path) for name, path in paths.items()}
    columns: dict[str, np.ndarray] = {}
    for name, dtype in COLUMNS.items():
        path = paths[name]
        try:
            digest = digests[name].result()
            if digest != manifest.index[name]:
                raise ValueError(
                    f"data.root: {path} is not what {MANIFEST} says (SHA-256 {digest[:12]}..., not"
                    f" {manifest.index[name][:12]}...): {AGAIN}"
                )
            # as a plain array: np.memmap takes a microsecond for every indexing
            column = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except OSError as error:
            raise ValueError(f"data.root: cannot read {path}: {error.strerror}: {AGAIN}") from None
        if (
            column.dtype != dtype
            or column.ndim != 1
            or (name != "name" and len(column) != manifest.images)
        ):
            raise ValueError(
                f"data.root: {path} holds {column.dtype} {list(column.shape)}, not {dtype}"
                f" [{manifest.images}]: {AGAIN}"
            )
        columns[name] = column
    _check_bounds(folder, manifest, columns)
    return columns


def image_name(columns: dict[str, np.ndarray], row: int) -> bytes:
    """An image's name in the source, of the store's row."""
    ends = columns["name_end"]
    return columns["name"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()


def sha256_of(path: str) -> str:
    """Of a file, in hexadecimal."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _shard(said: Any) -> Shard:
    return Shard(said["name"], said["bytes"], said["sha256"], said["images"], said["first_row"])


def _impossible(manifest: Manifest) -> str | None:
    """What a manifest says that can't be; None: nothing."""
    if manifest.form not in FORMS:
        return f"form {manifest.form!r}"
    if not _is_count(manifest.images):
        return f"images {manifest.images!r}"
    if not all(isinstance(each, str) for each in manifest.classes):
        return "classes"
    row = 0
    for shard in manifest.shards:
        name = shard.name
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            return f"shard {name!r}"
        if not _is_count(shard.bytes) or not _is_count(shard.images) or shard.first_row != row:
            return f"shard {name}: bytes, images or first_row"
        row += shard.images
    return None if row == manifest.images else f"{row:,} images in shards, {manifest.images:,} said"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_bounds(folder: str, manifest: Manifest, columns: dict[str, np.ndarray]) -> None:
    """Where images lie must be within the shards: what follows reads there unasked.

    Raises:
        ValueError: names the first image that doesn't.
    """
    ends = np.cumsum([shard.images for shard in manifest.shards], dtype=np.int64)
    room = np.array([shard.bytes for shard in manifest.shards], np.int64)
    last_name = 0
    for begin in range(0, manifest.images, _ROWS):
        rows = slice(begin, begin + _ROWS)
        part = {name: columns[name][rows] for name in COLUMNS if name != "name"}
        count = len(part["shard"])
        its = np.searchsorted(ends, np.arange(begin, begin + count), side="right")
        offset, size = part["offset"], part["size"]
        wrong = (part["shard"] != its) | (offset < 0) | (size < 1) | (offset > room[its] - size)
        wrong |= (part["height"] < 0) | (part["width"] < 0)
        if manifest.form == "raw":
            wrong |= size != part["height"].astype(np.int64) * part["width"] * 3
        wrong |= (part["label"] < -1) | (part["label"] >= max(0, len(manifest.classes)))
        wrong |= np.diff(part["name_end"], prepend=last_name) < 0
        wrong |= part["name_end"] > len(columns["name"])
        if wrong.any():
            row = begin + int(np.argmax(wrong))
            raise ValueError(
                f"data.root: the index in {folder} is wrong about image {row:,}: it can't lie at"
                f" {int(columns['offset'][row]):,} of shard {int(columns['shard'][row])} with"
                f" {int(columns['size'][row]):,} bytes, or its label or name can't be: {AGAIN}"
            )
        last_name = int(part["name_end"][-1])


def _not_a_store(root: str) -> str:
    if not os.path.isdir(root):
        parent = os.path.dirname(root)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        return f"data.root: there is no folder {root}, only {parent}"
    try:
        has_tars = any(name.endswith(".tar") for name in os.listdir(root))
    except OSError:
        has_tars = False
    if has_tars:
        return (
            f"data.root: {root} holds tars, but no {MANIFEST}: make it with"
            f" python -m fastssl.data index {root}"
        )
    return (
        f"data.root: {root} is no tar store (it has no {MANIFEST}): read a folder of images with"
        f" data.use=pipelines.readers.folder, or pack it (python -m fastssl.data pack {root} STORE)"
    )
