"""Looks at every image of a folder before training: damage, sizes, classes, duplicates.

    python -m fastssl.data check /data/photos --decode
    python fastssl/train.py recipes/rotation.yaml data.root=... data.quarantine=...

FOLDER holds images as training reads them; a folder with train/ and val/ (or validation/, or test/,
or several of them) is as many such. Every file's header, end, dimensions and colour mode are looked
at, and with --decode all of its pixels. Files are only read. It can be stopped, killed and
repeated: the same command goes on, and looks again at what has changed since. What --decode found
bad stays so without it. Written to DIR (by default NAME-check, here), which is one data set's:

    quarantine.jsonl  bad images with the reason, for data.quarantine; of train/ and val/ one each,
                      quarantine-train.jsonl and quarantine-val.jsonl: data.quarantine=DIR for both
    duplicates.jsonl  groups of files that are the same, byte for byte
    report.json       all numbers of the table that is printed
    recipe.yaml       what a recipe should say: the quarantine, and loader.decoder_* for a GPU
    progress.bin      what was looked at

--decode: JPEGs by libjpeg-turbo in its strict mode if simplejpeg is installed (pip install
simplejpeg): it tells of damage that DALI, Pillow and browsers fill with gray in silence. All else
by Pillow, which decodes to the very pixels that DALI does.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastssl import check_duplicates, check_report, demo, labelled
from fastssl.check_image import SEEN, is_strict
from fastssl.check_progress import Progress
from fastssl.check_scan import Split, scan
from fastssl.reader_options import READER, folder_options
from fastssl.store_verify import local_store
from fastssl.work_progress import WorkProgress

QUARANTINE = "pipelines.readers.quarantine"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` wants to be given."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="of images, or of train/ and val/ (or validation/, test/)"
    )
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="of the reader")
    parser.add_argument("--decode", action="store_true", help="whole images, not headers alone")
    parser.add_argument("--out", metavar="DIR", help="default: NAME-check in this folder")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores allowed)",
    )


def run(given: argparse.Namespace) -> int:
    """Checks a folder; returns 0 whatever was found: that is in the files; 1: some were not read.

    Raises:
        ValueError: there is no such folder, or no image in it; DIR can't be used, or is of other
            images; workers die of any image.
        OSError: DIR can't be written.
    """
    if given.workers < 1:
        raise ValueError(f"--workers ({given.workers}) must be at least 1")
    folder = str(local_store(given.folder))
    options = _options(folder, given.overrides)
    roots = _roots(folder)
    out = _out(given.out, folder)
    try:
        with Progress(out / "progress.bin", _images(folder, options)) as progress:
            splits = _listed(roots, options)
            _check(splits, out, progress, given.decode, options.max_pixels, given.workers)
    except KeyboardInterrupt:
        _say(f"interrupted: the same command goes on from here ({out})")
        return 130
    return int(any(split.unread for split in splits))


def _check(
    splits: list[Split],
    out: Path,
    progress: Progress,
    decode: bool,
    most_pixels: int,
    workers: int,
) -> None:
    decoder = _decoder() if decode else None
    if decode:
        _say(f"check: decoding {decoder}")

    def look(rows: list[np.ndarray], what: str, *, decode: bool, digest: bool) -> int:
        total = sum(len(some) for some in rows)
        with WorkProgress(what, total, "images", say=_say) as bar:
            return scan(
                splits,
                rows,
                progress,
                bar,
                decode=decode,
                digest=digest,
                most_pixels=most_pixels,
                workers=workers,
            )

    unseen = [
        np.setdiff1d(np.flatnonzero(split.records["state"] < SEEN), list(split.unread))
        for split in splits
    ]
    looked_at = look(unseen, "check", decode=decode, digest=False)
    known = sum(map(len, unseen)) - looked_at
    if known:
        _say(f"check: {known:,} images are as they were when last looked at")
    undigested = [
        rows[~split.records["digest"][rows].any(1)]
        for split, rows in zip(splits, check_duplicates.candidates(splits), strict=True)
    ]
    if any(map(len, undigested)):
        look(undigested, "check: reading what may be duplicates", decode=False, digest=True)
    _write_all(splits, out, decoder)


def _write_all(splits: list[Split], out: Path, decoder: str | None) -> None:
    line = importlib.import_module(QUARANTINE).line
    quarantines = [_quarantine(out, split) for split in splits]
    for split, path in zip(splits, quarantines, strict=True):
        with _written(path) as file:
            for row, reason in sorted(split.bad.items()):
                file.write(line(split.samples.names[row], reason))
    with _written(out / "duplicates.jsonl") as file:
        counts = check_duplicates.write(splits, file)
    found = [check_report.statistics(split) for split in splits]
    report = {
        "decoded": decoder,
        "duplicates": vars(counts),
        "splits": {split.name or "all": each for split, each in zip(splits, found, strict=True)},
        "hints": check_report.hints(splits[0]),
    }
    with _written(out / "report.json") as file:
        file.write(json.dumps(report, indent=1) + "\n")
    recipe = out / "recipe.yaml"
    with _written(recipe) as file:
        advised = out if len(splits) > 1 else quarantines[0]
        file.write(check_report.recipe(splits[0], advised, _command(splits, decoder)))
    for split, each in zip(splits, found, strict=True):
        for text in check_report.table(each, split.name or split.samples.root):
            _say(text)
    _say(check_report.duplicates_line(counts, [split.name for split in splits]))
    if any(split.bad for split in splits):
        _say(f"leave the bad ones out with data.quarantine={shlex.quote(str(advised))}")
    _say(f"for a recipe: {recipe}; all numbers: {out / 'report.json'}")


def _options(folder: str, overrides: list[str]) -> Any:
    for key in ("bad", "quarantine"):
        if any(each.startswith(f"data.{key}=") for each in overrides):
            raise ValueError(f"command line: data.{key} is what this is to find out: leave it")
    return folder_options(folder, overrides)


def _out(given: str | None, folder: str) -> Path:
    """The folder to write in, made.

    Raises:
        ValueError: it lies in the images' folder, which is only read.
        OSError: it can't be made.
    """
    out = Path(os.path.abspath(os.path.expanduser(given or f"{os.path.basename(folder)}-check")))
    inside = os.path.realpath(folder)
    if os.path.commonpath([inside, os.path.realpath(out)]) == inside:
        raise ValueError(f"{out} lies in the folder of images {folder}: give another with --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _images(folder: str, options: Any) -> str:
    """Which images these are, for people and for Progress: the folder, and the subset of it."""
    subset = [
        f", data.{each.name}={getattr(options, each.name)}"
        for each in fields(options)
        if each.name in ("limit", "fraction", "per_class", "subset_seed")
        and getattr(options, each.name) != each.default
    ]
    return ascii(os.path.realpath(folder)) + "".join(subset)


def _roots(folder: str) -> dict[str, str]:
    """The folder, or train/ and all that may be its val/ in it, by the names of the splits.

    Raises:
        ValueError: it is a store.
    """
    roots = {name: os.path.join(folder, name) for name in ("train", *labelled.second())}
    roots = {name: root for name, root in roots.items() if os.path.isdir(root)}
    if "train" not in roots or len(roots) < 2:
        roots = {"": folder}
    for root in roots.values():
        if all(os.path.exists(os.path.join(root, name)) for name in ("manifest.json", "index")):
            raise ValueError(
                f"{root} is a tar store: python -m fastssl.data verify {shlex.quote(root)} --decode"
                " looks at its images"
            )
    return roots


def _listed(roots: dict[str, str], options: Any) -> list[Split]:
    """The images of the folder, or of train/ and val/ in it."""
    reader = importlib.import_module(READER)  # pipelines/ is beside us, not beneath
    splits: list[Split] = []
    for name, root in roots.items():
        chosen = replace(options, root=root)
        splits.append(Split(name, reader.list_samples(chosen, cache=demo.cache(), say=_say)))
    return splits


def _quarantine(out: Path, split: Split) -> Path:
    return out / (f"quarantine-{split.name}.jsonl" if split.name else "quarantine.jsonl")


def _decoder() -> str:
    if is_strict():
        return "JPEGs by libjpeg-turbo, strictly (simplejpeg), all else by Pillow"
    return (
        "by Pillow alone, which passes over damage inside JPEGs as DALI does:"
        " pip install simplejpeg finds it"
    )


def _command(splits: list[Split], decoder: str | None) -> str:
    root = splits[0].samples.root
    folder = os.path.dirname(root) if splits[0].name else root
    decode = " --decode" if decoder else ""
    return f"python -m fastssl.data check {shlex.quote(check_report.shown(folder))}{decode}"


@contextlib.contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A text file, UTF-8, that is there when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # which need not have a folder's letters
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
