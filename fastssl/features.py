"""Frozen features of a split, every depth at once: extracted once, kept on disk, memory-mapped.

    <cache>/features/<fingerprint>/<stage>.npy, features.json (what they are), positions.npy

The fingerprint is of the weights, the files and when they were written, the evaluation graph and
its source, the versions of libraries and all else that the values depend on. Processes write their
own rows of the same files, which must lie where all of them see them; n images give n rows.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import nvidia.dali
import torch
import torch.distributed as dist
from accelerate import Accelerator

from fastssl import distributed, loader, machine, order, representation
from fastssl.config import Part
from fastssl.labelled import Split
from fastssl.representation import all_stages, represent
from fastssl.trained import Trained

__all__ = ["Features", "Options", "all_stages", "extract", "represent"]

_ABOUT = "features.json"
_VERSION = 2  # of what is kept, and of how it is computed
_SECONDS = 10  # between lines of progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which features, how many values of each, and where they are kept."""

    stages: tuple[str, ...] = ()  # of the backbone's, "last" for what forward returns; empty: all
    # Of maps, adaptive; null: as the protocol of `linear` says, elsewhere max (Kolesnikov et al.
    # 2019; VISSL: avg).
    pool: Literal["max", "avg"] | None = None
    # Values of a stage at most: the largest s with C * s * s <= size; null: as the protocol of
    # `linear` says, elsewhere 9000 (K19; VISSL: 9216).
    size: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    batch: int = 128  # images a process and pass
    cache: str | None = None  # folder, seen by all processes; null: the user's cache
    keep: bool = True  # for the next command; false: gone when this one ends

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        for name in ("size", "batch"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.cache == "":
            raise ValueError("cache ('') must name a folder, or be null for the user's cache")

    @property
    def pooling(self) -> tuple[Literal["max", "avg"], int]:
        """`pool` and `size`, K19's where none is given."""
        return self.pool or "max", self.size or 9000


@dataclass(frozen=True)
class Features:
    """What `extract` gives: equal on every process."""

    stages: dict[str, np.ndarray]  # first depth to last: [N, D], read-only, memory-mapped
    labels: np.ndarray  # int64 [N], numbers in `classes`
    rows: np.ndarray  # int64 [N], of the listing, whose order is kept
    classes: tuple[str, ...]
    folder: Path


def extract(
    trained: Trained,
    split: Split,
    graph: Part,
    options: Options,
    *,
    loading: loader.Options,
    accelerator: Accelerator,
    cache: Path,
    say: Callable[[str], None],
    key: str = "features.stages",
) -> Features:
    """The features of every usable image of the split, from the cache where it has them.

    Called by all processes together. Images that turn out not to be decodable are left out, and
    named. The order in which processes and batches take the images changes nothing but the last
    bits of floats.

    Args:
        trained: the backbone; it is moved to the accelerator's device.
        split: its images.
        graph: the evaluation graph.
        options: which, how and where.
        loading: how batches are made.
        accelerator: the device and precision.
        cache: of fastssl; `options.cache` has precedence.
        say: told what the user should know; silent on all but the first process.
        key: what the user calls `options.stages`, for the error.

    Raises:
        ValueError: a stage is unknown, a value is no finite number, the disk is too small, another
            process cannot see the folder, or the images can't be read.
    """
    home = (Path(options.cache) if options.cache else cache / "features").expanduser().absolute()
    # Machines may have other copies of the files, written at other times: the first one's count.
    precision, kind = str(accelerator.mixed_precision), accelerator.device.type
    about = _from_first(depends_on(trained, split, graph, options, loading, kind, precision))
    folder = home / _fingerprint(about, options.stages)
    whole = home / _fingerprint(about, ())  # with every stage, which serves for some
    with _together():
        candidates = [each for each in (folder, whole) if _is_complete(each, about, options.stages)]
    # All processes take the same way: the first one's eyes decide.
    found = _from_first(str(candidates[0]) if candidates else None)
    if found is not None:
        with _together():
            features = _open(Path(found), split, options.stages, key)
        say(f"features: {split.name} of {trained.name} from {found}")
        return features
    part = Path(_from_first(str(home / f".{folder.name}.{secrets.token_hex(4)}.part")))
    with contextlib.ExitStack() as until:  # holds the lock of the folder
        try:
            _fill(
                part, until, about, trained, split, graph, options, loading, accelerator, say, key
            )
            if options.keep:
                with _together():
                    if distributed.rank() == 0:
                        _move(part, folder, about, options.stages)
            with _together():  # the maps stay when the names are gone
                return _open(folder if options.keep else part, split, options.stages, key)
        finally:
            if distributed.rank() == 0:
                shutil.rmtree(part, ignore_errors=True)


def depends_on(
    trained: Trained,
    split: Split,
    graph: Part,
    options: Options,
    loading: loader.Options,
    device: str,
    precision: str,
) -> dict[str, Any]:
    """All that the values depend on, in plain types.

    Of other parts of fastssl than the backbone's module `_VERSION` tells.
    """
    pool, size = options.pooling
    facts = {
        "version": _VERSION,
        "libraries": _versions(trained),
        "source": _source(graph.module, {"pipelines", graph.use.partition(".")[0]}),
        "backbone's source": _source(importlib.import_module(trained.use), set()),
        "weights": trained.weights,
        "backbone": {"use": trained.use, "options": trained.options},
        "standardize": trained.standardize,
        "root": split.samples.root,
        "files": [split.samples.fingerprint, split.samples.written],
        "rows": hashlib.sha256(split.rows.tobytes()).hexdigest(),
        "images": len(split.rows),
        "graph": {"use": graph.use, "options": asdict(graph.options)},
        "decoder": loading.decoder,
        "region": loading.region,
        "device": device,
        "precision": precision,
        "pool": pool,
        "size": size,
        "dtype": options.dtype,
    }
    return json.loads(json.dumps(facts))  # as it is read back: no tuples


def _versions(trained: Trained) -> dict[str, str | None]:
    names = ["torch", "torchvision"]
    if str(trained.options.get("name")).startswith("timm:"):
        names.append("timm")
    return {"dali": nvidia.dali.__version__, **{name: machine.version(name) for name in names}}


def _source(module: ModuleType, packages: set[str]) -> str:
    """SHA-256 of a module's file and of those in `packages` that it imports, and they in turn."""
    sources: dict[str, bytes] = {}
    pending = [module.__name__]
    while pending:
        name = pending.pop()
        found = sys.modules.get(name)  # none: the name of a function, a class or a constant
        if name in sources or found is None or found.__file__ is None:
            continue
        sources[name] = Path(found.__file__).read_bytes()
        if packages:
            pending += [
                each for each in _imported(sources[name]) if each.partition(".")[0] in packages
            ]
    state = hashlib.sha256()
    for name, source in sorted(sources.items()):
        state.update(f"{name} {len(source)} ".encode() + source)
    return state.hexdigest()


def _imported(source: bytes) -> Iterator[str]:
    """Names that may be modules; absolute imports only, as is our style."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _fingerprint(about: dict[str, Any], stages: tuple[str, ...]) -> str:
    text = json.dumps([about, sorted(stages)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# -- extraction ---------------------------------------------------------------------------------


def _fill(
    part: Path,
    until: contextlib.ExitStack,
    about: dict[str, Any],
    trained: Trained,
    split: Split,
    graph: Part,
    options: Options,
    loading: loader.Options,
    accelerator: Accelerator,
    say: Callable[[str], None],
    key: str,
) -> None:
    """Writes a complete folder `part`."""
    rank, world, count = distributed.rank(), distributed.world(), len(split.rows)
    # A small split doesn't fill a whole batch: no more than its share.
    batch = min(options.batch, -(-count // world))
    plan = order.in_order(count, rank, world, batch)
    batches = loader.Loader(
        split.reader,
        split.samples,
        graph.module,
        graph.options,
        lambda step: split.rows[plan[step % len(plan)]],
        batch=batch,
        seed=0,
        device=accelerator.device,
        loading=loading,
        say=say,
    )
    backbone = trained.backbone.to(accelerator.device).eval()
    backbone = backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # not in torch's overloads
    dropped: list[int] = []  # positions whose file cannot be decoded
    depths: list[str] = []  # all that the backbone has

    def values(step: int) -> dict[str, np.ndarray]:
        """The stages of this process's batch; adds to `dropped`."""
        tensors = next(batches)
        with accelerator.autocast():
            stages = all_stages(backbone, tensors, trained.standardize)
        depths[:] = stages
        wanted = _wanted(tuple(stages), options.stages, key)
        # The loader puts the next usable image in the place of one that cannot be decoded.
        other = tensors["index"].cpu().numpy() != split.rows[plan[step]]
        dropped.extend(plan[step][other].tolist())
        dtype = torch.float16 if options.dtype == "float16" else torch.float32
        return {
            name: _pooled(name, stages[name], options).to(dtype).cpu().numpy() for name in wanted
        }

    began = time.monotonic()
    with torch.inference_mode(), contextlib.closing(batches):
        with _together():
            first = values(0)
        widths = {name: each.shape[1] for name, each in first.items()}
        with _together():
            if rank == 0:
                _begin(part, until, widths, count, options, split, trained, say)
        with _together():
            if not part.is_dir():
                raise ValueError(
                    f"rank {rank} on {platform.node()} cannot see {part}, which rank 0 has made: "
                    "give a folder that all machines share: features.cache=PATH"
                )
            files = {name: _File(part / f"{_file(name)}.npy") for name in widths}
        with _together():
            spoken = began
            for step in range(len(plan)):
                begin = (step * world + rank) * batch
                here = min(batch, count - begin)  # less than none in the last step's filling
                block = first if step == 0 else values(step)
                if here > 0:
                    for name, rows in block.items():
                        _check_finite(name, rows[:here], split, begin, dropped, options)
                        files[name].write(begin, rows[:here])
                if time.monotonic() - spoken > _SECONDS:
                    spoken, done = time.monotonic(), min(count, (step + 1) * world * batch)
                    rate = done / (spoken - began)
                    say(f"features: {done:,} of {count:,} images ({rate:,.0f} images/s)")
        with _together():
            for file in files.values():
                file.close()
    gone = sorted({position for each in _from_all(dropped) for position in each})
    with _together():
        if rank == 0:
            _finish(part, about, depths, widths, gone, split, say)


def _wanted(there: tuple[str, ...], asked: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Those asked for, in the order of depth; all, where none is."""
    unknown = [name for name in asked if name not in (*there, "last")]
    if unknown:
        raise ValueError(
            f"{key}: the backbone has no {', '.join(unknown)}; it has {', '.join(there)}"
        )
    last = there[-1:] if "last" in asked else ()
    return tuple(name for name in there if not asked or name in (*asked, *last))


def _pooled(name: str, stage: torch.Tensor, options: Options) -> torch.Tensor:
    try:
        pool, size = options.pooling
        return representation.pooled(stage.float(), size, pool)
    except ValueError as error:
        raise ValueError(f"stage {name} of the backbone: {error}") from error


def _check_finite(
    name: str,
    rows: np.ndarray,
    split: Split,
    begin: int,
    dropped: list[int],
    options: Options,
) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1)) + begin
    bad = np.setdiff1d(bad, dropped)
    if len(bad):
        path = split.samples.path(int(split.rows[bad[0]]))
        remedy = "the weights are of no use"
        if options.dtype == "float16":
            remedy += ", or they overflow float16: give features.dtype=float32"
        raise ValueError(
            f"the features of stage {name} are NaN or infinite, first for {path}: {remedy}"
        )


def _begin(
    part: Path,
    until: contextlib.ExitStack,
    widths: dict[str, int],
    count: int,
    options: Options,
    split: Split,
    trained: Trained,
    say: Callable[[str], None],
) -> None:
    """Makes the folder and the files, still empty, after a look at the disk."""
    home = part.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{home} cannot be made ({error.strerror}): give another: features.cache=PATH"
        ) from error
    _clear(home)
    needed = count * sum(widths.values()) * np.dtype(options.dtype).itemsize
    free = shutil.disk_usage(home).free
    what = f"{count:,} images x {sum(widths.values()):,} values ({', '.join(widths)})"
    if needed > free:
        raise ValueError(
            f"features of {split.name} need {_size(needed)} of disk, {what}, and {home} has "
            f"{_size(free)} free: give features.cache=PATH of a larger disk, "
            "features.dtype=float16 (half), or fewer: features.stages=[pool]"
        )
    say(f"features: {split.name} of {trained.name}, {what}: {_size(needed)} in {home}")
    try:
        part.mkdir()
        lock = until.enter_context((part / ".lock").open("w"))
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        for name, width in widths.items():
            with (part / f"{_file(name)}.npy").open("wb") as file:
                header = {"descr": np.dtype(options.dtype).str, "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, width)})
                bytes_each = width * np.dtype(options.dtype).itemsize
                file.truncate(file.tell() + count * bytes_each)
    except OSError as error:
        raise ValueError(
            f"{part} cannot be written ({error.strerror}): give another: features.cache=PATH"
        ) from error


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _clear(home: Path) -> None:
    """Takes away what killed processes left; the living hold a lock on theirs."""
    for old in home.glob(".*.part"):
        with contextlib.suppress(OSError), (old / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


class _File:
    """Rows of one .npy file, written in place.

    By pwrite: where a disk is full that is an error; in a memory map it would kill the process, and
    on a network disk two machines' maps would overwrite each other's pages.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        self._path = path
        self._file = os.open(path, os.O_WRONLY)

    def write(self, row: int, rows: np.ndarray) -> None:
        """Raises ValueError when the disk is full."""
        data = memoryview(np.ascontiguousarray(rows).tobytes())
        at = self._start + row * data.nbytes // len(rows)
        try:
            while data:
                written = os.pwrite(self._file, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise ValueError(
                f"{self._path} cannot be written: {error.strerror}; give features.cache=PATH of a "
                "larger disk"
            ) from error

    def close(self) -> None:
        os.fsync(self._file)  # other machines read it
        os.close(self._file)


def _finish(
    part: Path,
    about: dict[str, Any],
    depths: list[str],
    widths: dict[str, int],
    gone: list[int],
    split: Split,
    say: Callable[[str], None],
) -> None:
    """Takes out the rows of undecodable images, and writes what makes the folder complete."""
    kept = np.setdiff1d(np.arange(len(split.rows)), gone)
    if gone:
        names = [split.samples.path(int(split.rows[position])) for position in gone[:5]]
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        say(
            f"warning: {len(gone)} of {len(split.rows):,} images of {split.name} can't be decoded "
            f"and are left out: {', '.join(names)}{more}"
        )
        for name in widths:
            _keep_rows(part / f"{_file(name)}.npy", kept)
    np.save(part / "positions.npy", kept)
    whole = {"about": about, "depths": depths, "stages": widths}
    (part / _ABOUT).write_text(json.dumps(whole, indent=1))


def _keep_rows(path: Path, kept: np.ndarray) -> None:
    old = np.load(path, mmap_mode="r")
    fewer = path.with_suffix(".fewer")
    shape = (len(kept), old.shape[1])
    new = np.lib.format.open_memmap(fewer, mode="w+", dtype=old.dtype, shape=shape)
    for begin in range(0, len(kept), 4096):
        new[begin : begin + 4096] = old[kept[begin : begin + 4096]]
    new.flush()
    fewer.replace(path)


def _move(part: Path, folder: Path, about: dict[str, Any], stages: tuple[str, ...]) -> None:
    """Gives the complete folder its name, in the place of one that is damaged."""
    (part / ".lock").unlink(missing_ok=True)
    if folder.exists() and not _is_complete(folder, about, stages):
        aside = part.with_name(f"{part.name}-old")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # another command was faster, with the same features
        part.rename(folder)


# -- a complete folder --------------------------------------------------------------------------


def _is_complete(folder: Path, about: dict[str, Any], stages: tuple[str, ...]) -> bool:
    """Whether it holds these features, no file of them cut off."""
    try:
        known = json.loads((folder / _ABOUT).read_text())
        kept = len(np.load(folder / "positions.npy"))
        wanted = _wanted(tuple(known["depths"]), stages, "")
        if known["about"] != about or not {*wanted} <= {*known["stages"]}:
            return False
        for name in known["stages"]:
            if np.load(folder / f"{_file(name)}.npy", mmap_mode="r").shape != (
                kept,
                known["stages"][name],
            ):
                return False
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return False
    return True


def _open(folder: Path, split: Split, stages: tuple[str, ...], key: str) -> Features:
    try:
        known = json.loads((folder / _ABOUT).read_text())
        kept = np.load(folder / "positions.npy")
        maps = {
            name: np.load(folder / f"{_file(name)}.npy", mmap_mode="r")
            for name in _wanted(tuple(known["depths"]), stages, key)
        }
    except OSError as error:
        raise ValueError(
            f"rank {distributed.rank()} on {platform.node()} cannot read {folder} "
            f"({error.strerror}): give a folder that all machines share: features.cache=PATH"
        ) from error
    return Features(maps, split.labels[kept], split.rows[kept], split.classes, folder)


def _file(stage: str) -> str:
    """A stage as a file's name: timm's have points and slashes."""
    return re.sub(r"[^\w.-]", "_", stage)


# -- processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A mistake that one process finds here is every process's: none waits for one that has gone.

    Raises:
        ValueError: that of the lowest rank, on each.
    """
    mistake = None
    try:
        yield
    except ValueError as error:
        mistake = error
    told = next((each for each in _from_all(mistake and str(mistake)) if each is not None), None)
    if told is not None:
        raise ValueError(told) from mistake


def _from_all(value: Any) -> list[Any]:
    """Every process's value, in rank order."""
    if distributed.world() == 1:
        return [value]
    values: list[Any] = [None] * distributed.world()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: Any) -> Any:
    """Rank 0's value, on every process."""
    return _from_all(value)[0]
