"""Packs a folder of images into tars, which are read fast from disks and object stores alike.

    python -m fastssl.data pack /data/imagenet/train /fast/train
    python -m fastssl.data pack /data/imagenet/train /fast/train --short-side 292 --quality 90
    python fastssl/train.py recipes/rotation.yaml data.use=pipelines.readers.tar data.root=...

Reads a folder of images as training would (the same order and classes, without the bad files) and
writes them into WebDataset tars, with an index of them for this library and one for DALI. original
keeps the files' bytes. jpeg and raw turn images upright, make them RGB and shrink them to a short
side; raw needs no decoding, and 7 to 9 times the space of JPEG. Nothing is enlarged (but by
--square), and the source is not touched. data.key=value sets what the folder reader may be told,
such as data.limit=1000, data.bad=error or data.quarantine=FILE.

A pack that was interrupted goes on from its last whole tar when the same command is given again.
The same source and options give the same bytes, which are read back before STORE is there.
"""

import argparse
import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from fastssl import demo, pack_part, part_folder, tar_file
from fastssl.check_image import CANNOT_BE_READ, is_passing
from fastssl.pack import Done, pack
from fastssl.pack_image import Form, MachineFault
from fastssl.reader_options import READER, folder_options
from fastssl.source_links import refuse_links_out
from fastssl.store_verify import local_store
from fastssl.worker_pool import WorkerLost

SHARD_MB = 512
SHORT_SIDE = 292  # pixels: the largest that a recipe resizes to
QUALITY = 90
_FEW = 8  # names in a line: what one worker has at a time


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` wants to be given."""
    parser.add_argument("source", metavar="SOURCE", help="folder of images")
    parser.add_argument("store", metavar="STORE", help="folder to make")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="of the reader")
    parser.add_argument(
        "--form",
        choices=["original", "jpeg", "raw"],
        help="default: original; jpeg with --short-side or --quality; raw with --square",
    )
    parser.add_argument(
        "--short-side",
        metavar="N",
        help=f"pixels (default of jpeg and raw: {SHORT_SIDE}, the largest that a recipe resizes"
        " to); full: as they are",
    )
    parser.add_argument("--quality", type=int, metavar="Q", help=f"JPEG's, default: {QUALITY}")
    parser.add_argument(
        "--square", type=int, metavar="N", help="raw only: the middle N x N of every image"
    )
    parser.add_argument(
        "--shard-mb", type=int, default=SHARD_MB, metavar="MB", help=f"default: {SHARD_MB}"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores allowed)",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="also links that lead out of SOURCE"
    )
    parser.add_argument(
        "--restart", action="store_true", help="forget what an interrupted pack has left"
    )


def run(given: argparse.Namespace) -> int:
    """Packs; returns the exit code."""
    store = local_store(given.store)
    try:
        done = _pack(given, store)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{store} cannot be written: {error.strerror} ({error.filename or 'no file'})"
        what = f"{store}: the disk is full" if full else reason
        remedy = ": free some space, or name another disk" if full else ""
        print(f"error: {what}; {_kept(store)}{remedy}", file=sys.stderr)
        return 2
    except MachineFault as error:
        print(f"error: {error}; {_kept(store)}", file=sys.stderr)
        return 2
    except WorkerLost as error:
        print(f"error: {error}{_suspects(error)}; {_kept(store)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {_kept(store)}", file=sys.stderr)
        return 130
    print(_summary(store, _form(given), done), flush=True)
    return 0


def _pack(given: argparse.Namespace, store: Path) -> Done:
    form = _form(given)
    for name, count in (("--workers", given.workers), ("--shard-mb", given.shard_mb)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    part_folder.check_new(store)  # before a listing that may take minutes
    source = str(local_store(given.source))
    options = folder_options(source, given.overrides)
    reader = importlib.import_module(READER)  # pipelines/ is beside us, not beneath
    samples = reader.list_samples(options, cache=demo.cache(), say=_say)
    inside = os.path.realpath(samples.root)
    if os.path.commonpath([inside, os.path.realpath(store)]) == inside:
        raise ValueError(f"{store} lies in the source {samples.root}: name a folder elsewhere")
    _refuse_unread(samples)
    if not given.follow_links:
        refuse_links_out(samples)
    done = pack(
        samples,
        store,
        form,
        shard_mb=given.shard_mb,
        workers=given.workers,
        max_pixels=options.max_pixels,
        refuse_bad=options.bad == "error",
        restart=given.restart,
        say=_say,
    )
    # Whatever was written must be what training accepts.
    tars = importlib.import_module("pipelines.readers.tar")
    tars.list_samples(tars.Options(root=str(store)), cache=None, say=_say)
    return done


def _refuse_unread(samples: Any) -> None:
    """Refuses a listing in which files are bad that the next one may find good.

    Raises:
        ValueError: names three of them.
    """
    gone = CANNOT_BE_READ.format(os.strerror(errno.ENOENT))  # or a link that leads nowhere
    unread = [
        row
        for row, reason in samples.bad.items()
        if is_passing(reason) or (reason == gone and not os.path.lexists(samples.path(row)))
    ]
    if unread:
        few = [f"{tar_file.shown(samples.path(row))} ({samples.bad[row]})" for row in unread[:3]]
        more = f" and {len(unread) - 3:,} more" if len(unread) > 3 else ""
        raise ValueError(
            f"a disk or a network share failed while {samples.root} was listed, or files went away:"
            f" {', '.join(few)}{more}; give the same command again, and if that stays so, name them"
            " in a data.quarantine"
        )


def _form(given: argparse.Namespace) -> Form:
    """What was asked for.

    Raises:
        ValueError: it doesn't go together.
    """
    asked = {"--short-side": given.short_side, "--quality": given.quality, "--square": given.square}
    said = [name for name, value in asked.items() if value is not None]
    form = given.form or ("raw" if given.square else "jpeg" if said else "original")
    if form == "original" and said:
        raise ValueError(f"{said[0]} is not for --form original, which keeps files as they are")
    if form == "raw" and given.quality is not None:
        raise ValueError(f"--quality ({given.quality}) is JPEG's: --form raw has none")
    side = None if form == "original" else _side(given.short_side)
    quality = QUALITY if given.quality is None else given.quality
    return Form(form=form, short_side=side, quality=quality, square=given.square)


def _side(text: str | None) -> int | None:
    if text is None:
        return SHORT_SIDE
    if text == "full":
        return None
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"--short-side ({text}) must be a number of pixels, or full")
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


def _suspects(error: WorkerLost) -> str:
    """The files that a worker was killed at, if it is always the same."""
    paths = [path for piece in error.pieces for path in piece]
    if not paths:
        return ""
    more = f" and {len(paths) - _FEW:,} more" if len(paths) > _FEW else ""
    few = ", ".join(tar_file.shown(path) for path in paths[:_FEW])
    return (
        f"; if that happens again, it is one of {few}{more}:"
        " `python -m fastssl.data check SOURCE --decode` finds out which, for data.quarantine"
    )


def _kept(store: Path) -> str:
    """What there is of a store that was not finished."""
    shards, images = pack_part.kept(part_folder.of(store))
    if not shards:
        return f"nothing is kept of {store}"
    return (
        f"{part_folder.of(store)} keeps {tar_file.tars(shards)} with {images:,} images, and the"
        " same command goes on from there"
    )


def _summary(store: Path, form: Form, done: Done) -> str:
    shape = f"{form.square} x {form.square}" if form.square else f"short side {form.short_side}"
    if form.square is None and form.short_side is None:
        shape = "full size"
    kinds = {"original": "as they were", "raw": f"raw, {shape}"}
    kind = kinds.get(form.form, f"JPEG of quality {form.quality}, {shape}")
    left = f", {len(done.left_out):,} left out (named in manifest.json)" if done.left_out else ""
    return (
        f"{store}: {done.images:,} images{left}, {kind}, {done.bytes / 1e6:,.1f} MB in"
        f" {tar_file.tars(done.shards)}, read back and as they should be;"
        f" {done.packed / done.seconds:,.0f} images/s\n"
        f"read it with data.use=pipelines.readers.tar data.root={store}"
    )
