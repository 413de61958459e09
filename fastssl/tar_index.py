"""Makes an index of WebDataset tars that others made, so that data.use=pipelines.readers.tar reads.

    python -m fastssl.data index /data/tars
    python fastssl/train.py recipes/rotation.yaml data.use=pipelines.readers.tar data.root=...

Writes manifest.json, index/ and an .idx for DALI beside the tars, which stay as they are. Images
are the members named KEY.jpg, .jpeg, .png, .webp, .bmp, .tif or .tiff, in the order of the tars'
names and of members; a label is in KEY.cls, or in KEY.json under --label-key. Images that cannot
be decoded get no row and are named, and so are those without a label where others have one, and
members of more bytes than an image of --max-pixels can need.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import fastssl
from fastssl import image_bytes, part_folder, store_heads, tar_file, worker_pool
from fastssl.store_heads import Shard
from fastssl.store_verify import local_store, row_name
from fastssl.tar_file import shown
from fastssl.work_progress import WorkProgress

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_NUMBERS = ("offset", "size", "height", "width", "checksum")
_LABEL_BYTES = 1 << 20  # a larger file of a label is none


class Found(NamedTuple):
    """What is in a tar."""

    size: int  # bytes
    sha256: str
    numbers: np.ndarray  # int64 [images, 5]: `_NUMBERS`
    names: list[bytes]
    labels: list[str | None]  # as they were written
    left_out: dict[str, str]  # names, with the reason
    passed_over: int  # members that are neither images nor labels
    idx: bytes  # DALI's index


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` wants to be given."""
    parser.add_argument("folder", metavar="FOLDER", help="holds the tars")
    parser.add_argument(
        "--label-key", default="label", metavar="KEY", help="in KEY.json (default: label)"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=image_bytes.MAX_PIXELS,
        metavar="N",
        help=f"an image of more is left out (default: {image_bytes.MAX_PIXELS:,})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores allowed)",
    )


def run(given: argparse.Namespace) -> int:
    """Indexes; returns the exit code."""
    for name, count in (("--workers", given.workers), ("--max-pixels", given.max_pixels)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    folder = local_store(given.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    with _locked(folder):
        _index(folder, given)
    return 0


def _index(folder: Path, given: argparse.Namespace) -> None:
    layout = importlib.import_module(store_heads.LAYOUT)  # pipelines/ is beside us, not beneath
    tars = _tars(folder, layout)
    work = partial(look, label_key=given.label_key, max_pixels=given.max_pixels)
    found: list[Found] = []
    with (
        WorkProgress("index", sum(path.stat().st_size for path in tars), "bytes") as bar,
        contextlib.closing(worker_pool.in_order(work, tars, given.workers)) as results,
    ):
        for path, each in zip(tars, results, strict=True):
            if isinstance(each, str):
                raise ValueError(f"{path}: {each}")
            found.append(each)
            bar.advance(each.size)
    index_of = {path.with_suffix(".idx"): each.idx for path, each in zip(tars, found, strict=True)}
    for path, content in index_of.items():
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content):
            raise ValueError(f"{path} is there and is no index of its tar: remove it")
    said = _write(folder, tars, found, index_of, layout)
    print(said, flush=True)


def look(path: Path, *, label_key: str, max_pixels: int) -> Found | str:
    """In a worker process: what is in a tar, or why it is refused."""
    try:
        return _look(path, label_key, max_pixels)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except MemoryError:
        return "not enough memory for one of its images: give fewer --workers, or less --max-pixels"


def _look(path: Path, label_key: str, max_pixels: int) -> Found:
    listed = list(tar_file.members(path))
    numbers: list[tuple[int, ...]] = []
    images: list[tuple[str, str]] = []  # keys and names
    labels: dict[str, str] = {}
    left_out: dict[str, str] = {}
    names = set[str]()
    passed_over = 0
    with path.open("rb", buffering=0) as file:
        for member in listed:
            refuse_hostile(member.name)
            name = tar_file.plain(member.name)
            key, extension = tar_file.split(name)
            extension = extension.lower()
            if extension in ("cls", "json"):
                size = min(member.size, _LABEL_BYTES)
                content = tar_file.read(file.fileno(), member.offset, size)
                text = _label(content, extension, label_key)
                if text is not None:
                    labels[key] = text
            elif extension not in EXTENSIONS or not key or key.endswith("/"):
                passed_over += 1
            elif name in names:
                left_out[name] = "an image before it has the same name"
            else:
                names.add(name)
                try:
                    image_bytes.check_size(member.size, max_pixels)
                except ValueError as error:
                    left_out[name] = str(error)
                    continue
                content = tar_file.read(file.fileno(), member.offset, member.size)
                try:
                    shape = image_bytes.dimensions(content, max_pixels)
                except ValueError as error:
                    left_out[name] = str(error)
                    continue
                numbers.append((member.offset, member.size, *shape, zlib.crc32(content)))
                images.append((key, name))
    return Found(
        path.stat().st_size,
        _sha256(path),
        np.array(numbers, np.int64).reshape(-1, len(_NUMBERS)),
        [row_name(path, name) for _, name in images],
        [labels.get(key) for key, _ in images],
        left_out,
        passed_over,
        tar_file.index_text(listed),
    )


def refuse_hostile(name: str) -> None:
    """Refuses a member's name that would lead out of a folder, or is none of a file.

    Raises:
        ValueError: the message is the reason, to be put behind the tar's name.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(
            f"{shown(name)} in it leads out of the folder that it would be unpacked to"
        )
    if "\0" in name:
        raise ValueError(f"{shown(name)} in it has a zero byte in its name")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """For this process alone: another would remove what this one has made."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being indexed by another process: wait for it") from None
        yield
    finally:
        os.close(lock)


def _tars(folder: Path, layout: ModuleType) -> list[Path]:
    for name in (layout.MANIFEST, layout.INDEX):
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is there already: it has an index, or remove it")
    tars = sorted(folder.glob("*.tar"), key=lambda path: os.fsencode(path.name))
    if not tars:
        packed = sorted(path.name for path in folder.glob("*.tar.*") if path.suffix != ".idx")
        raise ValueError(
            f"{folder} holds no tars"
            + (f", but {packed[0]}: a compressed tar has no places, unpack it" if packed else "")
        )
    for path in tars:
        if not path.is_file():
            raise ValueError(f"{path} is no file")
    return tars


def _label(content: bytes, extension: str, key: str) -> str | None:
    """A label as text; None: there is none."""
    try:
        text = content.decode().strip()
        if extension != "cls":
            said: Any = json.loads(text)
            value = said.get(key) if isinstance(said, dict) else None
            text = str(value) if isinstance(value, str | int) else ""
        is_name = b"\0" not in os.fsencode(text)  # JSON knows halves of characters
    except (ValueError, RecursionError):
        return None
    return text if text and is_name else None


def _write(
    folder: Path,
    tars: Sequence[Path],
    found: Sequence[Found],
    index_of: dict[Path, bytes],
    layout: ModuleType,
) -> str:
    """Writes the store's heads, the manifest last; returns what to say."""
    written = [label for each in found for label in each.labels]
    classes = _classes({label for label in written if label is not None})
    kept: list[np.ndarray] = []
    left_out: dict[str, str] = {}
    for path, each in zip(tars, found, strict=True):
        left_out |= {f"{path.stem}/{name}": reason for name, reason in each.left_out.items()}
        has = np.array([not classes or label is not None for label in each.labels], bool)
        for row in np.flatnonzero(~has).tolist():
            left_out[os.fsdecode(each.names[row])] = "no label, as others have"
        kept.append(np.flatnonzero(has))
    images = sum(map(len, kept))
    if not images:
        few = ", ".join(f"{shown(name)} ({left_out[name]})" for name in list(left_out)[:5])
        raise ValueError(
            f"{folder}: not one image in {tar_file.tars(len(tars))}{': ' * bool(few)}{few}"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    names = [
        each.names[row] for each, rows in zip(found, kept, strict=True) for row in rows.tolist()
    ]
    numbers = np.concatenate([each.numbers[rows] for each, rows in zip(found, kept, strict=True)])
    columns = dict(zip(_NUMBERS, numbers.T, strict=True)) | {
        "shard": np.repeat(np.arange(len(tars)), [len(rows) for rows in kept]),
        "label": np.array(
            [
                -1 if label is None else number_of[label]
                for each, rows in zip(found, kept, strict=True)
                for label in (each.labels[row] for row in rows.tolist())
            ]
        ),
        "name_end": np.cumsum([len(name) for name in names]),
        "name": np.frombuffer(b"".join(names), np.uint8),
    }
    columns = {key: columns[key].astype(dtype) for key, dtype in layout.COLUMNS.items()}
    about = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "form": "original",
        "members": store_heads.NAMED,
        "classes": classes,
        "left_out": left_out,
        "fastssl": fastssl.__version__,
    }
    shards = [
        Shard(path.name, each.size, each.sha256, len(rows))
        for path, each, rows in zip(tars, found, kept, strict=True)
    ]
    ours: list[Path] = []
    try:
        for path, content in index_of.items():
            if not path.exists():
                with _making(path, ours):
                    part_folder.write(path, content)
        with _making(folder / layout.INDEX, ours):
            digests = store_heads.write_index(folder / layout.INDEX, columns, layout)
        with _making(folder / layout.MANIFEST, ours):
            store_heads.write_manifest(folder / layout.MANIFEST, about, shards, digests)
        part_folder.sync(folder)
    except BaseException:
        for path in ours:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        raise
    passed_over = sum(each.passed_over for each in found)
    few = "".join(f"left out: {shown(name)}: {left_out[name]}\n" for name in list(left_out)[:20])
    return (
        f"{few}{folder}: {images:,} images in {tar_file.tars(len(tars))}, {len(classes):,} classes,"
        f" {len(left_out):,} left out (named in manifest.json), {passed_over:,} other members\n"
        f"read it with data.use=pipelines.readers.tar data.root={folder}"
    )


@contextlib.contextmanager
def _making(path: Path, ours: list[Path]) -> Iterator[None]:
    """Notes what the block makes, also where it fails half-way, unless it was there before."""
    try:
        yield
    except FileExistsError:
        raise
    except BaseException:
        ours.append(path)
        raise
    ours.append(path)


def _classes(labels: set[str]) -> list[str]:
    """The names of classes: numbers by their value, all others by their text."""
    if not all(re.fullmatch(r"[0-9]{1,18}", label) for label in labels):
        return sorted(labels)
    numbers = sorted(labels, key=lambda label: (int(label), label))
    for one, other in itertools.pairwise(numbers):
        if int(one) == int(other):
            raise ValueError(
                f"the labels {one} and {other} are the same number: write it in one way in all tars"
            )
    return numbers


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
