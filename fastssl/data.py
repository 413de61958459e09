"""Prepares images for training: decodes and shrinks them once.

    python -m fastssl.data pack /data/imagenet/train /fast/train --form jpeg --short-side 292
    python fastssl/train.py recipes/rotation.yaml data.use=pipelines.readers.packed data.root=...

pack: reads a folder of images as training would (the same order and classes, without the bad
files), turns them upright, makes them RGB, shrinks them to a short side, and writes them into a few
large files: as JPEG, or raw, which needs no decoding and 7 to 9 times the space of JPEG. Nothing is
enlarged (but by --square), and the source is not touched. data.key=value sets what the folder
reader may be told, such as data.limit=1000 or data.bad=error.
"""

import argparse
import errno
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastssl import demo
from fastssl.pack import Done, check_new, pack
from fastssl.pack_image import Form
from fastssl.recipe_check import check, make, schema_of_part
from fastssl.recipe_text import Entry, RecipeError, read_overrides

# Nothing that imports torch may be imported here: every worker process imports this file again.

READER = "pipelines.readers.folder"
SHARD_MB = 1000


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit code: 2 for what the user can mend."""
    given = _parser().parse_intermixed_args(arguments)
    try:
        return _pack(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_failed(error, given.store)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: nothing is kept of {given.store}", file=sys.stderr)
        return 130


def _pack(given: argparse.Namespace) -> int:
    store = Path(os.path.abspath(os.path.expanduser(given.store)))
    form = Form(
        form=given.form, short_side=given.short_side, quality=given.quality, square=given.square
    )
    for name, count in (("--workers", given.workers), ("--shard-mb", given.shard_mb)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    check_new(store)  # before a listing that may take minutes
    options = _reader_options(given.source, given.overrides)
    reader = importlib.import_module(READER)  # pipelines/ is beside us, not beneath
    samples = reader.list_samples(options, cache=demo.cache(), say=_say)
    inside = os.path.realpath(samples.root)
    if os.path.commonpath([inside, os.path.realpath(store)]) == inside:
        raise ValueError(f"{store} lies in the source {samples.root}: name a folder elsewhere")
    done = pack(
        samples,
        store,
        form,
        shard_mb=given.shard_mb,
        workers=given.workers,
        refuse_bad=options.bad == "error",
        say=_say,
    )
    # Whatever was written must be what training accepts.
    layout = importlib.import_module("pipelines.readers.packed")
    layout.list_samples(layout.Options(root=str(store)), cache=None, say=_say)
    _say(_summary(store, form, done))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.data",
        description=inspect.cleandoc(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["pack"], help="what to do")
    parser.add_argument("source", metavar="SOURCE", help="folder of images")
    parser.add_argument("store", metavar="STORE", help="folder to make")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="of the reader")
    parser.add_argument("--form", choices=["jpeg", "raw"], default="jpeg", help="default: jpeg")
    parser.add_argument(
        "--short-side",
        type=_side,
        default=292,
        metavar="N",
        help="pixels (default: 292, the largest that a recipe resizes to); full: as they are",
    )
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="JPEG's, default: 90")
    parser.add_argument(
        "--square", type=int, metavar="N", help="raw only: the middle N x N of every image"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores allowed)",
    )
    parser.add_argument(
        "--shard-mb", type=int, default=SHARD_MB, metavar="MB", help=f"default: {SHARD_MB}"
    )
    return parser


def _side(text: str) -> int | None:
    return None if text == "full" else int(text)


def _reader_options(source: str, overrides: Sequence[str]) -> Any:
    """The reader's Options for a folder.

    Raises:
        RecipeError: all mistakes found, one a line.
    """
    errors: list[str] = []
    layer = read_overrides(overrides, ("data",), errors)["data"]
    if "root" in layer or "use" in layer:
        errors.append("command line: data.root is SOURCE, and data.use the folder reader: leave it")
    node = yaml.ScalarNode("tag:yaml.org,2002:str", source, style="'")
    use = read_overrides([f"data.use={READER}"], ("data",), errors)["data"]["use"]
    entries = {**layer, "root": Entry(node, "command line: SOURCE", "command line")}
    schema = schema_of_part("data", use, ("Options", "list_samples"), READER)
    values = check(entries, schema, errors)
    options = None if errors else make("command line", "data", schema, entries, values, errors)
    if errors:
        raise RecipeError("; ".join(errors))
    return options


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(error: OSError, store: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{store}: the disk is full; nothing is kept: free some space, or name another disk"
    return f"{store} cannot be written: {error.strerror} ({error.filename or 'no file named'})"


def _summary(store: Path, form: Form, done: Done) -> str:
    shape = f"{form.square} x {form.square}" if form.square else f"short side {form.short_side}"
    if form.square is None and form.short_side is None:
        shape = "full size"
    kind = f"JPEG of quality {form.quality}" if form.form == "jpeg" else "raw"
    left = f", {len(done.left_out):,} left out (named in manifest.json)" if done.left_out else ""
    return (
        f"{store}: {done.images:,} images{left}, {kind}, {shape}, {done.bytes / 1e6:,.1f} MB,"
        f" {done.images / done.seconds:,.0f} images/s\n"
        f"read it with data.use=pipelines.readers.packed data.root={store}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
