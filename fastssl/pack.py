"""Writes a tar store: images converted by all cores, in order, taken up again where it was ended.

The layout is described and defined in pipelines/readers/tar_store.py. The same source and the same
form give the same bytes, however many workers there are and however often packing was interrupted.
All is written under `STORE.part` (pack_part.py), forced to the disk, read back from it, and becomes
STORE by a rename at the end.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, features

import fastssl
from fastssl import (
    image_bytes,
    pack_image,
    part_folder,
    store_heads,
    store_verify,
    tar_file,
    worker_pool,
)
from fastssl.pack_image import Form, Packed
from fastssl.pack_part import Columns, Finished, Part
from fastssl.store_heads import LAYOUT, Shard
from fastssl.work_progress import WorkProgress

_CHUNK = 8  # images a task of a worker: raw ones of full size are megabytes each


@dataclass(frozen=True)
class Done:
    """What was written."""

    images: int
    left_out: dict[str, str]  # names in the source, with the reason
    bytes: int
    shards: int
    packed: int  # images of this call; the others were there from the one before
    seconds: float


def pack(
    samples: Any,
    store: Path,
    form: Form,
    *,
    shard_mb: int,
    workers: int,
    max_pixels: int = image_bytes.MAX_PIXELS,
    refuse_bad: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> Done:
    """Writes the images of a listing into a new store.

    What is whole of it stays in STORE.part when this fails or is killed, and the same call goes on
    from there.

    Args:
        samples: what a reader's `list_samples` gave; each row a file.
        store: the folder to make.
        form: what images are made into.
        shard_mb: megabytes (1e6 bytes) that a tar has at most, unless an image has more.
        workers: processes.
        max_pixels: an image that turns out to have more is left out.
        refuse_bad: stop at the first file that cannot be decoded, in place of leaving it out.
        restart: forget what STORE.part holds.
        say: is called with single lines for the user.

    Raises:
        ValueError: the store is there already or being written, STORE.part is of another source or
            form, no file can be decoded, or what was written is read back otherwise.
        WorkerLost: a worker was killed; its `pieces` are lists of files.
        MachineFault: a file could not be read, or there is not enough memory to decode it.
        OSError: the disk is full, or cannot be written.
    """
    began = time.monotonic()
    layout = importlib.import_module(LAYOUT)  # pipelines/ is beside us, not beneath
    about = _about(samples, form, layout)
    with part_folder.locked(store) as folder:
        part = Part(folder, _plan(samples, about, shard_mb, max_pixels), restart=restart)
        try:
            before = part.finished[-1].position if part.finished else 0
            if before:
                say(
                    f"pack: going on from {folder}: {tar_file.tars(len(part.finished))} with"
                    f" {before:,} of {len(samples.usable):,} images are done"
                )
            behind = _write_shards(
                part,
                samples,
                form,
                most=shard_mb * 1_000_000,
                workers=workers,
                max_pixels=max_pixels,
                refuse_bad=refuse_bad,
                say=say,
            )
            left_out = {_name(samples, row): reason for row, reason in samples.bad.items()}
            for each in part.finished:
                left_out |= each.left_out
            left_out |= behind
            images = sum(each.images for each in part.finished)
            if images == 0:
                few = [f"{tar_file.shown(k)} ({left_out[k]})" for k in list(left_out)[:5]]
                raise ValueError(
                    f"{samples.root}: not one of its {len(left_out):,} images can be decoded:"
                    f" {', '.join(few)}"
                )
            shards = [Shard(e.name, e.bytes, e.sha256, e.images) for e in part.finished]
            index = store_heads.write_index(part.store / layout.INDEX, part.columns(layout), layout)
            about |= {"left_out": left_out}
            store_heads.write_manifest(part.store / layout.MANIFEST, about, shards, index)
            _read_back(part, layout, workers, say)
            total = sum(file.stat().st_size for file in part.store.rglob("*") if file.is_file())
            part_folder.sync(part.store)
            part.store.rename(store)
            part_folder.sync(store.parent)
            shutil.rmtree(folder, ignore_errors=True)  # the store is whole
        except BaseException:
            if not list(folder.glob("finished/*.json")):
                shutil.rmtree(folder, ignore_errors=True)  # gives a full disk its space back
            raise
    packed = len(samples.usable) - before
    return Done(images, left_out, total, len(shards), packed, time.monotonic() - began)


def _about(samples: Any, form: Form, layout: ModuleType) -> dict[str, Any]:
    """What is known of a store beforehand; no path and no time, so that it is always the same."""
    is_jpeg = form.form == "jpeg"
    is_new = form.form != "original"
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "form": form.form,
        "members": store_heads.NUMBERED,
        "short_side": None if form.square else form.short_side,
        "square": form.square,
        "quality": form.quality if is_jpeg else None,
        "subsampling": pack_image.SUBSAMPLING if is_jpeg else None,
        "filter": pack_image.FILTER.name.lower() if is_new else None,
        "classes": list(samples.classes),
        "source": {"fingerprint": samples.fingerprint, "listed": len(samples)},
        "fastssl": fastssl.__version__,
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }


def _plan(samples: Any, about: dict[str, Any], shard_mb: int, max_pixels: int) -> dict[str, Any]:
    """All that the store's bytes depend on."""
    usable = hashlib.sha256(samples.usable.tobytes()).hexdigest()
    source = [samples.fingerprint, samples.written, usable, max_pixels]
    form = {key: about[key] for key in ("form", "short_side", "square", "quality")}
    versions = {key: about[key] for key in ("version", "fastssl", "pillow", "libjpeg_turbo")}
    return {"source": source, "form": form, "shard size": shard_mb, "version": versions}


def _write_shards(
    part: Part,
    samples: Any,
    form: Form,
    *,
    most: int,
    workers: int,
    max_pixels: int,
    refuse_bad: bool,
    say: Callable[[str], None],
) -> dict[str, str]:
    """All shards that are not finished yet; returns what is left out and in none of them."""
    begin = part.finished[-1].position if part.finished else 0
    usable = samples.usable[begin:]
    if not len(usable):
        return {}
    row_of_store = sum(each.images for each in part.finished)  # rows are counted among the good
    total = sum(each.bytes for each in part.finished)
    paths = (
        [samples.path(row) for row in usable[first : first + _CHUNK].tolist()]
        for first in range(0, len(usable), _CHUNK)
    )
    work = partial(pack_image.pack_all, form=form, max_pixels=max_pixels)
    left_out: dict[str, str] = {}
    shard = _Tar(part.store, len(part.finished))
    with (
        WorkProgress("pack", len(samples.usable), "images", done=begin, say=say) as bar,
        contextlib.closing(worker_pool.in_order(work, paths, workers)) as pieces,
    ):
        results = (result for piece in pieces for result in piece)
        try:
            for position, result in enumerate(results, start=begin):
                row = int(samples.usable[position])
                name = _name(samples, row)
                if isinstance(result, str):
                    if refuse_bad:
                        raise ValueError(
                            f"{tar_file.shown(samples.path(row))}: {result}; remove it, or leave it"
                            " out with data.bad=skip"
                        )
                    left_out[name] = result
                    say(f"pack: leaving out {tar_file.shown(name)}: {result}")
                else:
                    label = None if samples.labels is None else int(samples.labels[row])
                    members = _members(row_of_store, result, label)
                    if len(shard) and shard.size_with(members) > most:
                        total += shard.size
                        part.finish(shard.finish(position, left_out), shard.columns)
                        shard, left_out = _Tar(part.store, len(part.finished)), {}
                    shard.append(members, result, os.fsencode(name), label)
                    row_of_store += 1
                bar.advance(1, f"{(total + shard.size) / 1e9:.2f} GB")
            if len(shard):
                part.finish(shard.finish(len(samples.usable), left_out), shard.columns)
                left_out = {}
        finally:
            shard.close()
    return left_out


class _Tar:
    """The tar that is being written, and what the index says of its images."""

    def __init__(self, folder: Path, number: int) -> None:
        self.size = 0  # bytes
        self.columns = Columns()
        self._number, self._path = number, folder / f"shard-{number:06d}.tar"
        self._listed: list[tar_file.Member] = []
        self._digest = hashlib.sha256()
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def size_with(self, members: dict[str, bytes]) -> int:
        """Of the whole tar, bytes, if it ended behind these members."""
        blocks = sum(-(-len(each) // tar_file.BLOCK) + 1 for each in members.values())
        return self.size + blocks * tar_file.BLOCK + len(tar_file.END)

    def append(
        self, members: dict[str, bytes], packed: Packed, name: bytes, label: int | None
    ) -> None:
        """Writes the members of an image."""
        start = self.size + tar_file.BLOCK
        for member, content in members.items():
            size = len(content)
            place = tar_file.Member(member, self.size + tar_file.BLOCK, size)
            self._listed.append(place)
            self._write(tar_file.header(member, size) + content + tar_file.padding(size))
        self.columns.append(
            name,
            shard=self._number,
            offset=start + packed.heading,
            size=len(packed.content) - packed.heading,
            height=packed.height,
            width=packed.width,
            label=-1 if label is None else label,
            checksum=packed.checksum,
        )

    def finish(self, position: int, left_out: dict[str, str]) -> Finished:
        """Ends the tar and forces it to the disk, with DALI's index of it."""
        self._write(tar_file.END)
        assert self._file is not None
        os.fsync(self._file)
        # What is read back later is to come from the disk.
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        index = tar_file.index_text(self._listed)
        part_folder.write(self._path.with_suffix(".idx"), index)
        name, digest = self._path.name, self._digest.hexdigest()
        return Finished(name, self.size, digest, len(self), position, dict(left_out))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, content: bytes) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._digest.update(content)
        self.size += len(content)


def _members(row: int, packed: Packed, label: int | None) -> dict[str, bytes]:
    """Of an image, by name: it, and its label."""
    members = {f"{row:012d}.{packed.extension}": packed.content}
    if label is not None:
        members[f"{row:012d}.cls"] = b"%d" % label
    return members


def _read_back(part: Part, layout: ModuleType, workers: int, say: Callable[[str], None]) -> None:
    """Compares what is on the disk with what was to be written.

    Raises:
        ValueError: it is something else; the shards from there on are dropped.
    """
    for damage in store_verify.damages(part.store, layout, workers=workers, say=say):
        part.drop(len(part.finished) if damage.shard is None else damage.shard)
        raise ValueError(
            f"{part.folder}: what was written is read back otherwise: {damage}: the disk or the"
            " memory fails; the same command packs from there on again"
        )


def _name(samples: Any, row: int) -> str:
    """Of an image, from the source's root."""
    return samples.path(row)[len(os.path.join(samples.root, "")) :]
