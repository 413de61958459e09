"""What packing a folder pays, and FFCV from the same bytes: a random crop and flip of each image.

  files     the folder's own files
  full      tars, JPEG of quality 90 at full size (or the file's own bytes, where they are fewer)
  long-400  tars, JPEG of quality 90, long side 400: what FFCV's guides write
  jpeg-292  tars, JPEG of quality 90, short side 292: `python -m fastssl.data pack --quality 90`
  raw-256   tars, pixels, short side 256: nothing to decode
From each, fastssl (pipelines.single_view: 224 x 224 of 8 to 100 % of the area, flip, no colours)
and, where it can be run, FFCV with the same crop and flip, out of a .beton with the very bytes of
the store; all by turns, images in the page cache. FFCV has passed benchmarks.gate before.
The two do not resample alike: fastssl decodes by the exact transform, no more than the crop, and
resizes bilinear with antialiasing; FFCV decodes the whole image by the fast transform and takes
OpenCV's area average. FFCV makes batches on the CPU, fastssl on the GPU where there is one.
benchmarks/plain/ffcv.py says how to build FFCV.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

# As in fastssl/train.py: OpenMP's threads must not spin on cores that the others' need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import gate, method, result, same_files
from benchmarks.__main__ import run_command
from benchmarks.method import Contender, Measured
from benchmarks.plain import ffcv
from benchmarks.result import Row
from fastssl import loader, pack
from fastssl.pack_image import FILTER, Form, upright_rgb
from pipelines import single_view
from pipelines.readers import folder as folder_reader
from pipelines.readers import tar

HELP = "what packing pays, beside FFCV from the same bytes"

GRAPH = "pipelines.single_view"
FORMS = {
    "files": None,
    "full": Form(short_side=None),
    "long-400": Form(short_side=None),  # of images that were shrunk before
    "jpeg-292": Form(short_side=292),
    "raw-256": Form(form="raw", short_side=256),
}
FILES = "fastssl files"
LONG_SIDE = 400
SHARD_MB = 1000
# How many times FFCV's images/s, by the device that fastssl's graph runs on.
Kind = Literal["jpeg", "raw"]
GOALS: dict[str, dict[Kind, float]] = {
    "cpu": {"jpeg": 1.0, "raw": 0.5},
    "cuda": {"jpeg": 5.0, "raw": 5.0},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The images, how they are stored, FFCV's interpreter and the common options."""
    parser.add_argument("--data", required=True, metavar="FOLDER", help="of image files")
    parser.add_argument(
        "--stores", nargs="+", choices=list(FORMS), default=list(FORMS), help="default: all"
    )
    parser.add_argument(
        "--images", type=int, default=1000, metavar="N", help="of the folder (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="default %(default)s")
    parser.add_argument(
        "--size", type=int, default=224, metavar="S", help="pixels a side (default %(default)s)"
    )
    parser.add_argument(
        "--ffcv-python", metavar="PATH", help="an interpreter that has FFCV (default: this one)"
    )
    parser.add_argument(
        "--scratch", metavar="FOLDER", help="where stores are written, and removed at the end"
    )
    method.add_common(parser)


def main(arguments: argparse.Namespace) -> int:
    """Packs, measures, prints the table and what follows from it, writes the JSON.

    Raises:
        ValueError: a number can't be, or there are no images, or no such folder or interpreter.
    """
    for name in ("images", "batch"):
        if vars(arguments)[name] < 1:
            raise ValueError(f"--{name} ({vars(arguments)[name]}) must be at least 1")
    if arguments.scratch is not None and not os.path.isdir(arguments.scratch):
        raise ValueError(f"--scratch: there is no folder {arguments.scratch}")
    options = single_view.Options(
        image_size=arguments.size,
        image_area=(0.08, 1.0),
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grayscale"), 0.0),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_ffcv = True
    try:
        ffcv.interpreter(arguments.ffcv_python)
    except ffcv.Unavailable as reason:
        has_ffcv = False
        _say(f"without FFCV: {reason}")
    listing = folder_reader.list_samples(
        folder_reader.Options(root=arguments.data, limit=arguments.images), cache=None, say=_say
    )
    method.read_into_cache(listing.path(int(row)) for row in listing.usable)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.scratch)))
        stores = [
            _store(name, listing, scratch, arguments.threads)
            for name in dict.fromkeys(arguments.stores)
        ]
        workers = {}
        if has_ffcv:
            workers = _start_ffcv(stores, options, arguments, scratch, stack)
        contenders = []
        for store in stores:
            contenders.append(_fastssl(store, options, arguments, device))
            if store.name in workers:
                worker = workers[store.name]
                name = f"ffcv {store.name}"
                contenders.append(Contender(name, worker.run, queue=worker.queue))
        measured = method.alternate(
            contenders, repeats=arguments.repeats, seconds=arguments.seconds, say=_say
        )
    rows = _rows(stores, measured)
    conclusions = _conclusions(stores, measured, device.type)
    _say(f"\n{result.table(rows)}\n")
    _say("\n".join(conclusions))
    if arguments.out is not None:
        settings = {
            key: vars(arguments)[key]
            for key in ("stores", "batch", "size", "threads", "repeats", "seconds", "quick", "note")
        }
        settings |= {
            "images": len(listing.usable),
            "device": device.type,
            "ffcv": next((worker.version for worker in workers.values()), None),
        }
        root = Path(arguments.data)
        made = result.make(
            "stores",
            rows,
            settings,
            conclusions,
            data=root,
            page_cache="warm",
            versions={"ffcv": settings["ffcv"]} if settings["ffcv"] else None,
        )
        result.write(arguments.out, made)
    return 0


@dataclass(frozen=True)
class _Store:
    name: str
    kind: Kind
    reader: ModuleType
    samples: Any  # its listing
    megabytes: float  # 1e6 bytes of images
    paths: list[str]  # the same images one by one, for FFCV: JPEGs, or PNGs of the pixels


def _store(name: str, listing: folder_reader.Samples, scratch: Path, workers: int) -> _Store:
    """Packs the listed images, and lays them out again as files that FFCV's writer reads."""
    form = FORMS[name]
    if form is None:
        paths = [listing.path(int(row)) for row in listing.usable]
        size = sum(os.path.getsize(path) for path in paths)
        return _Store(name, "jpeg", folder_reader, listing, size / 1e6, paths)
    _say(f"packing {name}")
    source = listing
    if name == "long-400":
        source = _shrunk(listing, scratch / "shrunk", LONG_SIDE)
    kind: Kind = "raw" if form.form == "raw" else "jpeg"
    root = scratch / name
    pack.pack(source, root, form, shard_mb=SHARD_MB, workers=workers, say=_say)
    samples = tar.list_samples(tar.Options(root=str(root)), cache=None, say=_say)
    files = scratch / f"{name} files"
    files.mkdir()
    paths = []
    for row, content in enumerate(samples.content(np.arange(len(samples)))):
        if kind == "raw":
            path = files / f"{row:07}.png"
            Image.fromarray(content).save(path, compress_level=1)
        else:
            path = files / f"{row:07}.jpg"
            path.write_bytes(content.tobytes())
        paths.append(str(path))
    return _Store(name, kind, tar, samples, int(samples.size.sum()) / 1e6, paths)


def _shrunk(listing: folder_reader.Samples, folder: Path, long_side: int) -> folder_reader.Samples:
    """The images with at most that long side, without loss, as a listing of their own."""
    folder.mkdir()
    for row in listing.usable.tolist():
        path = listing.path(row)
        try:
            with Image.open(path) as file:
                image = upright_rgb(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            _say(f"{path} is left out: cannot be decoded: {' '.join(str(error).split())}")
            continue
        image.thumbnail((long_side, long_side), FILTER)
        image.save(folder / f"{row:07}.png", compress_level=1)
    options = folder_reader.Options(root=str(folder))
    return folder_reader.list_samples(options, cache=None, say=_say)


def _start_ffcv(
    stores: Sequence[_Store],
    options: single_view.Options,
    arguments: argparse.Namespace,
    scratch: Path,
    stack: ExitStack,
) -> dict[str, ffcv.Worker]:
    """FFCV for each store, where it starts; else says why not. `stack` closes them."""
    workers: dict[str, ffcv.Worker] = {}
    passed: set[str] = set()

    def start(paths: Sequence[str], form: Kind, batch: int) -> ffcv.Worker:
        return ffcv.start(
            paths,
            graph=GRAPH,
            options=options,
            form=form,
            batch=batch,
            threads=arguments.threads,
            folder=scratch,
            python=arguments.ffcv_python,
        )

    def one_of_each(form: Kind, paths: Sequence[str], _: Any) -> dict[str, Tensor]:
        worker = start(paths, form, len(paths))
        try:
            return worker.sample_batch()
        finally:
            worker.close()

    for store in stores:
        try:
            if store.kind not in passed:
                gate.check("FFCV", GRAPH, options, partial(one_of_each, store.kind))
                passed.add(store.kind)
            _say(f"{store.name}: starting FFCV")
            worker = start(store.paths, store.kind, arguments.batch)
        except (ffcv.Unavailable, gate.UnfitError) as reason:
            _say(f"{store.name}: without FFCV: {reason}")
            continue
        stack.callback(worker.close)
        workers[store.name] = worker
    return workers


def _fastssl(
    store: _Store,
    options: single_view.Options,
    arguments: argparse.Namespace,
    device: torch.device,
) -> Contender:
    loading = loader.Options(threads=arguments.threads)
    batches = loader.Loader(
        store.reader,
        store.samples,
        single_view,
        options,
        same_files.shuffled(store.samples.usable, 0, arguments.batch),
        batch=arguments.batch,
        seed=0,
        device=device,
        loading=loading,
        say=_say,
    )

    def run() -> int:
        images = len(next(batches)["index"])
        if device.type == "cuda":  # DALI gives what it has begun
            torch.cuda.current_stream(device).synchronize()
        return images

    return Contender(f"fastssl {store.name}", run, queue=loading.prefetch)


def _rows(stores: Sequence[_Store], measured: dict[str, Measured]) -> list[Row]:
    rows = []
    for store in stores:
        for name in ("fastssl", "ffcv"):
            if f"{name} {store.name}" not in measured:
                continue
            done = measured[f"{name} {store.name}"]
            extra: dict[str, float | int | str | bool | None] = {"MB": store.megabytes}
            if name == "fastssl":
                for other, against in (("FFCV", f"ffcv {store.name}"), ("files", FILES)):
                    if against in measured:
                        extra[f"to {other}"] = method.ratio(done, measured[against])[0]
            rows.append(method.row(name, store.name, done, extra))
    return rows


def _conclusions(stores: Sequence[_Store], measured: dict[str, Measured], device: str) -> list[str]:
    """The ratios with their spread, a sentence each."""
    said = []
    for store in stores:
        ours = measured[f"fastssl {store.name}"]
        if FILES in measured and store.name != "files":
            times = _spread(method.ratio(ours, measured[FILES]))
            said.append(f"{store.name}: fastssl makes {times} times what it makes from the files")
        if f"ffcv {store.name}" in measured:
            ratio = method.ratio(ours, measured[f"ffcv {store.name}"])
            goal = GOALS[device][store.kind]
            verdict = "reached" if ratio[0] >= goal else "missed"
            said.append(
                f"{store.name}: fastssl makes {_spread(ratio)} times what FFCV makes of the same"
                f" bytes; the goal, {goal:.1f}, is {verdict}"
            )
    return said


def _spread(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} - {ratio[2]:.2f})"


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command("stores")
