"""Compares a store with its manifest: every tar, every member, every image.

    python -m fastssl.data verify /fast/train [--decode]

Reads all of it: the SHA-256 of every file, the place and name of every member of a tar, DALI's
index of the tar, and the checksum of every image; --decode also decodes every image. Each damaged
file and image is named, and --quarantine writes the images down for data.quarantine=FILE, which
leaves them out. Exit codes: 0 all is as it was packed, and decodes; 1 something is not.
"""

import argparse
import importlib
import io
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl import image_bytes, store_heads, tar_file, worker_pool
from fastssl.pack_image import npy_heading, upright_rgb
from fastssl.work_progress import WorkProgress

_CHUNK = 64  # images a task of a worker that decodes
_PIECE = 1 << 24  # bytes of an image read at once
_MAGIC = 16  # bytes that tell an image's format


@dataclass(frozen=True)
class Damage:
    """Something that is not as the manifest says; as text, a line."""

    shard: int | None  # None: not within one
    row: int | None
    place: str
    reason: str
    name: bytes = b""  # of an image, in the index
    as_packed: bool = False  # an image whose bytes are right, and cannot be decoded

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` wants to be given."""
    parser.add_argument("store", metavar="STORE", help="folder of tars with a manifest")
    parser.add_argument("--decode", action="store_true", help="decode every image as well")
    parser.add_argument(
        "--quarantine", metavar="FILE", help="to make: the damaged images, for data.quarantine=FILE"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="at a time (default: the cores allowed)",
    )


def run(given: argparse.Namespace) -> int:
    """Verifies; returns the exit code."""
    if given.workers < 1:
        raise ValueError(f"--workers ({given.workers}) must be at least 1")
    if given.quarantine is not None and os.path.lexists(given.quarantine):
        raise ValueError(f"--quarantine: {given.quarantine} is there already: name another file")
    root = local_store(given.store)
    layout = importlib.import_module(store_heads.LAYOUT)  # pipelines/ is beside us, not beneath
    if not (root / layout.MANIFEST).exists():
        layout.read_manifest(str(root))  # raises: says what the folder is
    bad: list[Damage] = []
    for damage in damages(root, layout, workers=given.workers, decode=given.decode):
        bad.append(damage)
        print(f"damaged: {damage}", flush=True)
    if not bad:
        said = layout.read_manifest(str(root))
        print(
            f"{root}: {said.images:,} images in {tar_file.tars(len(said.shards))}, all as they were"
            " packed"
        )
        return 0
    if given.quarantine is not None:
        _write_quarantine(given.quarantine, bad)
    print(f"error: {root}: {_remedy(bad, given.quarantine)}", file=sys.stderr)
    return 1


def _remedy(bad: list[Damage], quarantine: str | None) -> str:
    """What is damaged, counted, and what helps."""
    changed = [each for each in bad if not each.as_packed]
    shards = len({each.shard for each in changed if each.shard is not None})
    images = len({each.row for each in changed if each.row is not None})
    if bad[0].shard is None:  # nothing reads it then
        more = f", and so are {tar_file.tars(shards)}" if shards else ""
        return f"{bad[0].place} is damaged{more}: copy or pack it again"
    said: list[str] = []
    if changed:
        said.append(
            f"{tar_file.tars(shards)} and {images:,} images are damaged: copy or pack it again, or"
            " train without the images named (data.verify=true leaves them out)"
        )
    if len(bad) > len(changed):
        file = quarantine or "FILE"
        writes = "" if quarantine else ", which --quarantine FILE writes"
        said.append(
            f"{len(bad) - len(changed):,} images cannot be decoded, though their bytes are those"
            " that were packed, and are so again if packed again: mend them in the source first, or"
            f" leave them out with data.quarantine={file}{writes}"
        )
    return "; ".join(said)


def _write_quarantine(path: str, bad: list[Damage]) -> None:
    """A line an image; a new file."""
    quarantine = importlib.import_module("pipelines.readers.quarantine")
    reasons: dict[bytes, str] = {}
    for each in bad:
        if each.row is not None:
            reasons.setdefault(each.name, each.reason)
    with open(path, "x", encoding="ascii") as file:
        file.writelines(quarantine.line(name, reason) for name, reason in reasons.items())


def row_name(tar: Path, member: str) -> bytes:
    """What an image is called in the index of a tar that others made."""
    return os.fsencode(f"{tar.stem}/{tar_file.plain(member)}")


def local_store(text: str) -> Path:
    """The folder that was named.

    Raises:
        ValueError: it is a URL.
    """
    if "://" in text:
        raise ValueError(
            f"{text}: these commands work on folders: copy it here first (aws s3 cp --recursive)"
        )
    return Path(os.path.abspath(os.path.expanduser(text)))


def damages(
    root: Path,
    layout: ModuleType,
    *,
    workers: int,
    decode: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[Damage]:
    """All that is not as the manifest says, in the order of tars and rows.

    Args:
        root: the store.
        layout: pipelines.readers.tar_store.
        workers: tars that are read at a time; processes that decode.
        decode: also decode every image.
        say: is called with single lines for the user.
    """
    try:
        manifest = layout.read_manifest(str(root))
    except ValueError as error:
        yield Damage(None, None, layout.MANIFEST, str(error))
        return
    try:
        columns = layout.read_columns(str(root / layout.INDEX), manifest)
    except ValueError as error:
        columns = None
        yield Damage(None, None, layout.INDEX, str(error))
    with layout.open_file(str(root / layout.MANIFEST)) as file:
        members = json.loads(file.read()).get("members")
    stop = threading.Event()
    bad: set[int] = set()
    with WorkProgress("verify", manifest.images, "images", say=say) as bar:
        executor = ThreadPoolExecutor(workers)
        try:
            look = partial(_shard_damages, root, manifest, columns, members, layout, stop)
            found = executor.map(look, range(len(manifest.shards)))
            for shard, its in zip(manifest.shards, found, strict=True):
                bad.update(each.row for each in its if each.row is not None)
                yield from its
                bar.advance(shard.images)
        finally:
            stop.set()  # Ctrl-C: not all the rest first
            executor.shutdown(cancel_futures=True)
    if decode and columns is not None:
        yield from _decoded(root, manifest, columns, layout, bad, workers, say)


def _shard_damages(
    root: Path,
    manifest: Any,
    columns: dict[str, np.ndarray] | None,
    members: Any,
    layout: ModuleType,
    stop: threading.Event,
    number: int,
) -> list[Damage]:
    """Of one tar."""
    shard = manifest.shards[number]
    path, index = root / shard.name, (root / shard.name).with_suffix(".idx")
    place = tar_file.shown(shard.name)
    found: list[Damage] = []
    try:
        with layout.open_file(str(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                reason = f"has {size:,} bytes, and the manifest says {shard.bytes:,}"
                found.append(Damage(number, None, place, reason))
            elif (digest := layout.sha256_of(str(path))) != shard.sha256:
                reason = f"has the SHA-256 {digest[:12]}..., not {shard.sha256[:12]}..."
                found.append(Damage(number, None, place, reason))
            if columns is None or stop.is_set():
                return found
            rows = _Rows(file.fileno(), manifest, number, columns, layout)
            if members == store_heads.NUMBERED:
                found += rows.numbered()
            else:
                found += rows.named(path)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        return [*found, Damage(number, None, place, reason)]
    place = tar_file.shown(index.name)
    try:
        with layout.open_file(str(index)) as file:
            if file.read() != tar_file.index_text(rows.listed):
                found.append(Damage(number, None, place, "is no index of its tar"))
    except OSError as error:
        found.append(Damage(number, None, place, f"cannot be read: {error.strerror}"))
    return found


class _Rows:
    """The images of an open tar, compared with the index."""

    def __init__(
        self,
        file: int,
        manifest: Any,
        number: int,
        columns: dict[str, np.ndarray],
        layout: ModuleType,
    ) -> None:
        self.listed: list[tar_file.Member] = []  # as they were found to be
        self._file, self._manifest, self._number = file, manifest, number
        self._shard = manifest.shards[number]
        self._columns, self._layout = columns, layout

    def numbered(self) -> list[Damage]:
        """Of a tar of ours: its every byte is known but those of images, whose CRC-32 is."""
        found: list[Damage] = []
        is_raw = self._manifest.form == "raw"
        position = 0
        for row in self._rows():
            offset, size, height, width, label = (
                int(self._columns[key][row])
                for key in ("offset", "size", "height", "width", "label")
            )
            heading = npy_heading(height, width) if is_raw else b""
            begin = offset - len(heading) - tar_file.BLOCK
            if begin != position:
                found.append(self._of(row, f"is at byte {begin:,} of its tar, not {position:,}"))
            begun = os.pread(self._file, _MAGIC, offset)
            extension = "npy" if is_raw else image_bytes.extension(begun) or "jpg"
            member, length = f"{row:012d}.{extension}", len(heading) + size
            if length > tar_file.LARGEST:
                found.append(self._of(row, f"cannot have {length:,} bytes: no tar holds that"))
                position = offset + size
                continue
            found += self._checksum(row)
            self.listed.append(tar_file.Member(member, begin + tar_file.BLOCK, length))
            found += self._expect(row, begin, tar_file.header(member, length) + heading)
            position = offset + size
            after = tar_file.padding(length)
            if self._manifest.classes:
                text = b"%d" % label
                after += tar_file.header(f"{row:012d}.cls", len(text))
                labels = tar_file.Member(f"{row:012d}.cls", position + len(after), len(text))
                self.listed.append(labels)
                after += text + tar_file.padding(len(text))
            found += self._expect(row, position, after)
            position += len(after)
        if os.pread(self._file, len(tar_file.END) + 1, position) != tar_file.END:
            reason = f"does not end at byte {position:,}, behind its last image"
            found.append(self._tar(reason))
        return found

    def named(self, path: Path) -> list[Damage]:
        """Of a tar that others made."""
        found: list[Damage] = []
        try:
            self.listed += tar_file.members(path)
        except ValueError as error:
            found.append(self._tar(str(error)))
        names = {(each.offset, each.size): each.name for each in self.listed}
        for row in self._rows():
            place = int(self._columns["offset"][row]), int(self._columns["size"][row])
            name = names.get(place)
            if name is None:
                found.append(self._of(row, f"no member of the tar is at byte {place[0]:,}"))
            elif self._layout.image_name(self._columns, row) != row_name(path, name):
                reason = f"the member of the tar at byte {place[0]:,} is {tar_file.shown(name)}"
                found.append(self._of(row, reason))
            found += self._checksum(row)
        return found

    def _rows(self) -> range:
        return range(self._shard.first_row, self._shard.first_row + self._shard.images)

    def _checksum(self, row: int) -> list[Damage]:
        offset, left = (int(self._columns[key][row]) for key in ("offset", "size"))
        checksum = 0
        while left:  # in pieces: the index may claim any size
            content = os.pread(self._file, min(left, _PIECE), offset)
            if not content:
                return [self._of(row, "is cut off")]
            checksum = zlib.crc32(content, checksum)
            offset, left = offset + len(content), left - len(content)
        if checksum != self._columns["checksum"][row]:
            return [self._of(row, "its bytes are not those that were packed (CRC-32)")]
        return []

    def _expect(self, row: int, offset: int, content: bytes) -> list[Damage]:
        """Whether the tar holds this around an image."""
        found = os.pread(self._file, len(content), max(offset, 0))
        if found == content:
            return []
        kind = tar_file.kind_of(found[: tar_file.BLOCK])
        return [self._of(row, kind or "what is around it in the tar is not as it was packed")]

    def _tar(self, reason: str) -> Damage:
        return Damage(self._number, None, tar_file.shown(self._shard.name), reason)

    def _of(self, row: int, reason: str) -> Damage:
        name = self._layout.image_name(self._columns, row)
        place = _place(self._shard.name, row, name)
        return Damage(self._number, row, place, reason, name)


def _decoded(
    root: Path,
    manifest: Any,
    columns: dict[str, np.ndarray],
    layout: ModuleType,
    known: set[int],
    workers: int,
    say: Callable[[str], None],
) -> Iterator[Damage]:
    """The images that cannot be decoded, or to other dimensions than the index has."""
    keys = ("offset", "size", "height", "width")
    places = (
        (str(root / shard.name), manifest.form, rows, [columns[key][rows] for key in keys])
        for shard in manifest.shards
        for rows in _pieces(shard.first_row, shard.images)
    )
    given = ((path, form, np.stack(parts, axis=1)) for path, form, _, parts in places)
    with (
        WorkProgress("decode", manifest.images, "images", say=say) as bar,
        closing(worker_pool.in_order(_decode, given, workers)) as pieces,
    ):
        row = 0
        for piece in pieces:
            for reason in piece:
                if reason and row not in known:
                    number, name = int(columns["shard"][row]), layout.image_name(columns, row)
                    place = _place(manifest.shards[number].name, row, name)
                    yield Damage(number, row, place, reason, name, as_packed=True)
                row += 1
            bar.advance(len(piece))


def _place(shard: str, row: int, name: bytes) -> str:
    return f"{tar_file.shown(shard)}, image {row:,} ({tar_file.shown(os.fsdecode(name))})"


def _pieces(first: int, count: int) -> Iterator[slice]:
    for begin in range(first, first + count, _CHUNK):
        yield slice(begin, min(begin + _CHUNK, first + count))


def _decode(piece: tuple[str, str, np.ndarray]) -> list[str | None]:
    """In a worker process: for each image of a tar the reason why it is damaged, or None."""
    path, form, places = piece
    Image.MAX_IMAGE_PIXELS = image_bytes.MAX_PIXELS  # and twice that is an error
    layout = importlib.import_module(store_heads.LAYOUT)
    found: list[str | None] = []
    try:
        opened = layout.open_file(path)
    except OSError:  # said of the tar already
        return [None] * len(places)
    with opened as file:
        end = os.fstat(file.fileno()).st_size
        for offset, size, height, width in places.tolist():
            if form == "raw":  # nothing to decode
                whole = size == height * width * 3 and offset + size <= end
                found.append(None if whole else "is cut off")
                continue
            try:
                image_bytes.check_size(size, image_bytes.MAX_PIXELS)
                content = tar_file.read(file.fileno(), offset, size)
            except ValueError as error:
                found.append(str(error))
            else:
                found.append(_decoding(content, height, width))
    return found


def _decoding(content: bytes, height: int, width: int) -> str | None:
    try:
        image_bytes.dimensions(content, image_bytes.MAX_PIXELS)
        with Image.open(io.BytesIO(content), formats=image_bytes.PILLOW_FORMATS) as opened:
            image_bytes.check_pixels(opened.height, opened.width, image_bytes.MAX_PIXELS)
            image = upright_rgb(opened)
    except UnidentifiedImageError:
        return "not an image that Pillow can read"
    except Exception as error:  # whatever a damaged file makes a decoder raise
        return f"cannot be decoded: {' '.join(str(error).split())}"
    if (image.height, image.width) != (height, width):
        return f"has {image.width} x {image.height} pixels, and the index says {width} x {height}"
    return None
