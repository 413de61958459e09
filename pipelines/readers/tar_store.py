"""The layout of a tar store, and the reading of all of it but images: manifest and index.

A store is a folder of WebDataset tars and what finds an image in them without a walk:
    manifest.json        what it is: keys in `Manifest`, and sha256: `seal` of the rest; whoever
                         writes more keys need not ask
    shard-000000.tar     for row k the members `%012d.<ext>` (jpg png webp bmp tif; raw pixels: npy)
                         and, where there are classes, `%012d.cls` (the label, ASCII decimal)
    shard-000000.idx     DALI's index of it, as its script wds2idx writes it
    index/*.npy          one array a column, one entry an image, in the order of rows: `COLUMNS`
A row is the place in the index and the number in its member's name; bad files of the source have
none. Tars that others made have names of their own, and get an index by `fastssl.data index`.
"""

import errno
import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

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
_MOST = 1 << 60  # bytes and images: thrice as many still fit int64
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
        with open_file(path) as file:
            content = file.read()
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
        sealed = isinstance(said, dict) and said.get("sha256") == seal(said)
    except (ValueError, RecursionError):
        said, sealed = None, False
    if not isinstance(said, dict) or said.get("format") not in (FORMAT, _OLD):
        raise ValueError(
            f"data.root: {path} is not the manifest of a tar store, or is damaged: {AGAIN}"
        )
    version = _short(said.get("version"))
    if said["format"] == _OLD:
        raise ValueError(
            f"data.root: {path} is of a store of version {version}, which this fastssl"
            " no longer reads: pack its source again (python -m fastssl.data pack SOURCE STORE)"
        )
    if said.get("version") != VERSION:
        raise ValueError(
            f"data.root: {path} is of a store of version {version}, and this fastssl"
            f" reads version {VERSION}: {AGAIN}, or install the fastssl that wrote it"
            f" ({_short(said.get('fastssl', 'not said'))})"
        )
    if not sealed:
        raise ValueError(f"data.root: {path} is not as it was written (its SHA-256): {AGAIN}")
    try:
        manifest = Manifest(
            form=said["form"],
            images=said["images"],
            classes=tuple(_listed(said, "classes")),
            shards=tuple(_shard(each) for each in _listed(said, "shards")),
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
        except OSError as error:
            raise ValueError(f"data.root: cannot read {path}: {error.strerror}: {AGAIN}") from None
        column = _mapped(path)
        if (
            column.dtype != dtype
            or column.ndim != 1
            or (name != "name" and len(column) != manifest.images)
        ):
            raise ValueError(
                f"data.root: {path} holds {_short(column.dtype)} {list(column.shape)}, not"
                f" {dtype} [{manifest.images}]: {AGAIN}"
            )
        columns[name] = column
    _check_bounds(folder, manifest, columns)
    return columns


def image_name(columns: dict[str, np.ndarray], row: int) -> bytes:
    """An image's name in the source, of the store's row."""
    ends = columns["name_end"]
    return columns["name"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()


def seal(said: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of what a manifest says under all keys but "sha256"."""
    rest = {key: value for key, value in said.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))  # ASCII
    return hashlib.sha256(text.encode()).hexdigest()


def open_file(path: str) -> BinaryIO:
    """A file of a store, to be read; unlike a pipe or a device it cannot make us wait for ever.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return open(descriptor, "rb", buffering=0)


def sha256_of(path: str) -> str:
    """Of a file, in hexadecimal.

    Raises:
        OSError: as `open_file`.
    """
    state = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _listed(said: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(said[key], list):
        raise TypeError(repr(key))
    return said[key]


def _shard(said: Any) -> Shard:
    return Shard(said["name"], said["bytes"], said["sha256"], said["images"], said["first_row"])


def _impossible(manifest: Manifest) -> str | None:
    """What a manifest says that can't be; None: nothing."""
    if manifest.form not in FORMS:
        return f"form {manifest.form!r}"
    if not _is_count(manifest.images) or manifest.images < 1:
        return f"images {_short(repr(manifest.images))}"
    if not all(_is_name(each) for each in manifest.classes):
        return "classes"
    if not all(_is_digest(each) for each in manifest.index.values()):
        return "index"
    row = 0
    names = set[str]()
    for shard in manifest.shards:
        name = shard.name
        if (
            not _is_name(name)
            or os.path.basename(name) != name
            or name in ("", ".", "..")
            or name in names  # one tar twice
        ):
            return f"shard {_short(repr(name))}"
        names.add(name)
        if (
            not all(_is_count(each) for each in (shard.bytes, shard.images, shard.first_row))
            or shard.bytes < 1
            or shard.first_row != row
        ):
            return f"shard {_short(name)}: bytes, images or first_row"
        if not _is_digest(shard.sha256):
            return f"shard {_short(name)}: sha256"
        row += shard.images
    return None if row == manifest.images else f"{row:,} images in shards, {manifest.images:,} said"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_name(value: Any) -> bool:
    """Whether a file can be called so."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeError:  # half of a pair of surrogates
        return False


def _short(value: Any) -> str:
    """For a message, whatever a stranger wrote."""
    text = str(value)
    text = text if len(text) < 80 else f"{text[:77]}..."
    return text if text.isprintable() else ascii(text)


def _mapped(path: str) -> np.ndarray:
    """A column, as a plain array: np.memmap takes a microsecond for every indexing.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except Exception as error:  # whatever a damaged header makes numpy and ast raise
        reason = _short(" ".join(str(error).split()))
        raise ValueError(
            f"data.root: {path} is no array that numpy can map ({reason}): {AGAIN}"
        ) from None


def _check_bounds(folder: str, manifest: Manifest, columns: dict[str, np.ndarray]) -> None:
    """Where images lie must be within the shards: what follows reads there unasked.

    Raises:
        ValueError: names the first image that doesn't.
    """
    ends = np.cumsum([shard.images for shard in manifest.shards], dtype=np.int64)
    room = np.array([shard.bytes for shard in manifest.shards], np.int64)
    last_name, last_shard, last_end = 0, -1, 0
    for begin in range(0, manifest.images, _ROWS):
        rows = slice(begin, begin + _ROWS)
        part = {name: columns[name][rows] for name in COLUMNS if name != "name"}
        count = len(part["shard"])
        its = np.searchsorted(ends, np.arange(begin, begin + count), side="right")
        offset, size = part["offset"], part["size"]
        wrong = (part["shard"] != its) | (offset < 0) | (size < 1) | (offset > room[its] - size)
        wrong |= (part["height"] < 0) | (part["width"] < 0)
        if manifest.form == "raw":
            pixels = part["height"].astype(np.int64) * part["width"]
            wrong |= (pixels > size) | (size != pixels * 3)
        # Behind the image before: what lies in a tar once is one image.
        before = np.append(last_end, (offset + size)[:-1])
        wrong |= (offset < before) & (np.diff(its, prepend=last_shard) == 0)
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
        last_name, last_shard = int(part["name_end"][-1]), int(its[-1])
        last_end = int(offset[-1] + size[-1])


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
