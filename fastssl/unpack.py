"""Makes a folder of images out of a store again, by the names that they had.

    python -m fastssl.data unpack /fast/train /data/again

Of a store of originals this is the folder that was packed, without the files that were left out.
Images that were converted get the format's ending behind their name where that says otherwise
(again where another image has that name); raw pixels become PNGs. Nothing that the store says can
lead out of the new folder: names with ".." or from the root, links, devices and images over
--max-pixels are refused, before any is written. All is forced to the disk before the folder gets
its name.
"""

import argparse
import importlib
import io
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from fastssl import image_bytes, part_folder, store_heads, store_verify, tar_file
from fastssl.tar_file import shown
from fastssl.work_progress import WorkProgress

_ENDINGS = {"jpg": (".jpg", ".jpeg", ".jpe", ".jfif"), "png": (".png",)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` wants to be given."""
    parser.add_argument("store", metavar="STORE", help="folder of tars with a manifest")
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=image_bytes.MAX_PIXELS,
        metavar="N",
        help=f"an image of more is refused (default: {image_bytes.MAX_PIXELS:,})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tars that are verified at a time (default: the cores allowed)",
    )


def run(given: argparse.Namespace) -> int:
    """Unpacks; returns the exit code."""
    for name, count in (("--workers", given.workers), ("--max-pixels", given.max_pixels)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    store, folder = (store_verify.local_store(each) for each in (given.store, given.folder))
    images = unpack(store, folder, max_pixels=given.max_pixels, workers=given.workers)
    print(f"{folder}: {images:,} images, as {store} has them", flush=True)
    return 0


def unpack(store: Path, folder: Path, *, max_pixels: int, workers: int) -> int:
    """Writes the images of a store into a new folder, whole or not at all.

    Args:
        store: the store's folder.
        folder: to make; written as FOLDER.part until it is whole.
        max_pixels: an image of more is refused.
        workers: tars that are verified at a time, before any is written.

    Returns:
        how many images there are.

    Raises:
        ValueError: the store is damaged or hostile, or the folder is there.
        OSError: the disk is full, or cannot be written.
    """
    part_folder.check_new(folder)
    layout = importlib.import_module(store_heads.LAYOUT)  # pipelines/ is beside us, not beneath
    manifest = layout.read_manifest(str(store))
    heads = [
        layout.MANIFEST,
        layout.INDEX,
        *(f"{layout.INDEX}/{name}.npy" for name in manifest.index),
    ]
    for name in [*heads, *(shard.name for shard in manifest.shards)]:
        if (store / name).is_symlink():
            raise ValueError(f"{store}: {shown(name)} is refused: it is a link")
    columns = layout.read_columns(str(store / layout.INDEX), manifest)
    name_of = _name_of(manifest, columns, layout)
    for row in range(manifest.images):
        name = name_of(row)
        _check(store, row, name)
        _check_size(store, row, name, columns, max_pixels)
    for damage in store_verify.damages(store, layout, workers=workers):
        raise ValueError(f"{store}: {damage}; `python -m fastssl.data verify` names all that is so")
    with part_folder.locked(folder) as part:
        if any(part.iterdir()):
            raise ValueError(f"{part} is left from an unpack that was killed: remove it")
        try:
            _write_all(store, part, manifest, columns, name_of, layout, max_pixels)
            _sync_all(part)
            part.rename(folder)
            part_folder.sync(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return manifest.images


def _write_all(
    store: Path,
    part: Path,
    manifest: Any,
    columns: dict[str, np.ndarray],
    name_of: Callable[[int], bytes],
    layout: ModuleType,
    max_pixels: int,
) -> None:
    keys = ("offset", "size", "height", "width")
    with WorkProgress("unpack", manifest.images, "images") as bar:
        for shard in manifest.shards:
            with layout.open_file(str(store / shard.name)) as file:
                for row in range(shard.first_row, shard.first_row + shard.images):
                    name = name_of(row)
                    offset, size, height, width = (int(columns[key][row]) for key in keys)
                    try:
                        content = tar_file.read(file.fileno(), offset, size)
                        ending, content = _file(content, manifest.form, height, width, max_pixels)
                        own = _with_ending(name, ending, name_of, manifest.images)
                        target = part / os.fsdecode(own)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with target.open("xb") as image:
                            image.write(content)
                    except ValueError as error:
                        raise ValueError(_refused(store, row, name, str(error))) from None
                    except (FileExistsError, NotADirectoryError):
                        reason = "another image has its name, or one of its folders'"
                        raise ValueError(_refused(store, row, name, reason)) from None
                    bar.advance()


def _sync_all(part: Path) -> None:
    """Forces all to the disk; last, when the kernel has written most of it by itself."""
    for folder, _, names in os.walk(part):
        for name in names:
            part_folder.sync(Path(folder, name))
        part_folder.sync(Path(folder))


def _name_of(
    manifest: Any, columns: dict[str, np.ndarray], layout: ModuleType
) -> Callable[[int], bytes]:
    """Where the image of a row is to lie: by its name in the source, in the folder of its class."""
    classes = [os.fsencode(each) for each in manifest.classes]

    def name_of(row: int) -> bytes:
        name = layout.image_name(columns, row)
        label = int(columns["label"][row])
        if label >= 0 and name.partition(b"/")[0] != classes[label]:
            name = classes[label] + b"/" + name  # tars of others know no folders of classes
        return name

    return name_of


def _check(store: Path, row: int, name: bytes) -> None:
    """Refuses a name that leads out of the folder, or is none."""
    parts = name.split(b"/")
    if name.startswith(b"/"):
        raise ValueError(_refused(store, row, name, "its name begins at the root of the disk"))
    if b".." in parts:
        raise ValueError(_refused(store, row, name, 'its name has ".." in it, which leads out'))
    if b"" in parts or b"." in parts or b"\0" in name:
        raise ValueError(_refused(store, row, name, "its name is none of a file"))


def _check_size(
    store: Path, row: int, name: bytes, columns: dict[str, np.ndarray], max_pixels: int
) -> None:
    size, height, width = (int(columns[key][row]) for key in ("size", "height", "width"))
    try:
        image_bytes.check_size(size, max_pixels)
        image_bytes.check_pixels(height, width, max_pixels)
    except ValueError as error:
        raise ValueError(_refused(store, row, name, str(error))) from None


def _file(
    content: bytes, form: str, height: int, width: int, max_pixels: int
) -> tuple[str | None, bytes]:
    """A file's content, and its format where the name may say another."""
    if form == "raw":
        pixels = np.frombuffer(content, np.uint8).reshape(height, width, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return "png", file.getvalue()
    image_bytes.dimensions(content, max_pixels)  # not what the index says: what the image does
    return (None if form == "original" else "jpg"), content


def _with_ending(
    name: bytes, kind: str | None, name_of: Callable[[int], bytes], images: int
) -> bytes:
    """The name of an image of this format: no other image's, and no folder's."""
    if kind is None or Path(os.fsdecode(name)).suffix.lower() in _ENDINGS[kind]:
        return name

    def first_from(wanted: bytes) -> bytes:
        # What was converted was a folder: its names are in the order of their bytes.
        row = bisect_left(range(images), wanted, key=name_of)
        return name_of(row) if row < images else b""

    new = name + b"." + kind.encode()
    while first_from(new) == new or first_from(new + b"/").startswith(new + b"/"):
        new += b"." + kind.encode()
    return new


def _refused(store: Path, row: int, name: bytes, reason: str) -> str:
    return f"{store}: image {row:,} ({shown(os.fsdecode(name))}) is refused: {reason}"
