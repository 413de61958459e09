"""Checkpoints: whole files or none, the last few kept, read back without running pickled code.

A checkpoint is a plain dict of tensors and plain values in PyTorch's own format, which is a zip
file: `torch.load(path, weights_only=True)` reads it anywhere. The zip file's comment holds a CRC-32
of the rest, so that a damaged file is noticed and not trained on: PyTorch looks at no check sum,
and those that it writes for each tensor leave the headers out, where a flipped bit can send it to
another place in the file.
"""

import contextlib
import errno
import os
import pickle
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastssl.config import RecipeError

# What weights_only=True reads back. Saving anything else would only fail at the resumption.
_PLAIN = (str, bytes, int, float, bool, type(None), Tensor, torch.Size, torch.dtype)
_UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # a whole_file's temporary name
_MAPPED = 2**26  # bytes of a tensor from which on it is read only where it is used


class CheckpointError(OSError):
    """A file of the run could not be written; the former ones are as they were.

    The message is the whole of what the user should see.
    """


class DamagedError(RecipeError):
    """A checkpoint is not, byte for byte, what was written, or its disk fails."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`; returns its path.

    Only the main process calls this, under the run folder's lock. The file appears under its name
    once all of it is on the disk; then the checkpoints before it are deleted, all but `keep - 1`.
    What a killed process left unfinished is deleted first.

    Args:
        folder: `checkpoints/` of the run folder; made if it is not there.
        step: optimizer steps done.
        state: dicts, lists, tuples, plain values and tensors (on any device). A tensor that is a
            view takes its whole storage along.
        keep: checkpoints to keep, this one included; at least 1.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written. The checkpoints before
            are untouched.
        TypeError: `state` holds something that could not be read back.
    """
    _check_plain(state, "state")
    path = folder / f"step-{step:08d}.pt"
    sweep(folder)
    with whole_file(path) as file:
        sink = _Sink(file)
        torch.save(state, sink)  # pyright: ignore[reportArgumentType]  # write and flush are all it needs
        sink.finish()
    older = [other for other in _all(folder) if _step(other) < step]
    for other in older[: max(0, len(older) - (keep - 1))]:
        other.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; None if there is none, or no folder."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, *, checked: bool = False) -> dict[str, Any]:
    """The state saved in the checkpoint `path`, its tensors on the CPU.

    The check sum takes one pass over the whole file. After it, large tensors (a memory bank) stay
    in the file until they are looked at: who copies a part holds that part in memory. Writing to
    them changes no file.

    Args:
        path: the file.
        checked: another process of this machine has just loaded it: the check sum is not looked at.

    Raises:
        DamagedError: the file is damaged or cut short.
        RecipeError: it is missing or no checkpoint of fastssl.
    """
    try:
        intact = checked or _is_sealed(path)
    except OSError as error:
        kind = DamagedError if error.errno == errno.EIO else RecipeError
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    if not intact:
        raise DamagedError(f"{path} is damaged or cut short: {_way_out(path)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{path} is not a checkpoint of fastssl: it holds more than tensors and plain values,"
            " which could run code on being read, so it was not"
        ) from error
    if not isinstance(state, dict):
        raise RecipeError(f"{path} is not a checkpoint of fastssl: it holds {type(state).__name__}")
    _read(state)
    return state


def load_newest(path: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """As `load`; where `path` is damaged, the newest whole checkpoint before it in its folder.

    Args:
        path: the newest checkpoint of a run.
        say: told of each damaged one, and which one is taken in its place.

    Returns:
        The path of the checkpoint that was read, and its state.

    Raises:
        RecipeError: none is whole; or as `load`.
    """
    damaged: list[Path] = []
    before = [other for other in _all(path.parent) if _step(other) < _step(path)]
    for candidate in [path, *reversed(before)]:
        try:
            state = load(candidate)
        except DamagedError:
            damaged.append(candidate)
            continue
        if damaged:
            names = ", ".join(each.name for each in damaged)
            say(
                f"warning: {names} in {path.parent}: damaged or cut short; going on from the "
                f"checkpoint before, {candidate.name}"
            )
        return candidate, state
    names = ", ".join(each.name for each in damaged)
    raise DamagedError(
        f"no checkpoint in {path.parent} is whole: {names} damaged or cut short; delete that folder"
        " to start anew, or name another one (train.out=...)"
    )


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process, as plain values and tensors.

    They are Python's, numpy's global one, and PyTorch's on the CPU and on the current GPU.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator of this process where it was at `rng_state()`.

    A GPU's state is left out where it was saved without a GPU, or where there is none now.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and never if the block fails.

    Written beside it under a temporary name that no other process takes, forced to the disk, then
    renamed. A process that is killed leaves it behind: see `sweep`.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            # On a full disk, closing tries to write the rest and would hide the first error.
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(_not_written(path, error)) from error


def sweep(folder: Path) -> None:
    """Delete what killed processes left of their `whole_file`s in `folder`.

    Only for who holds the run folder's lock: nobody may be writing there. What has another name
    than those files, or cannot be deleted, stays.
    """
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


# A zip file ends with the length of its comment, two bytes, and the comment.
_SEAL = struct.Struct("<H22s")
_NO_COMMENT = b"\0\0"  # how PyTorch ends it


class _Sink:
    """A file for `torch.save` that fails after it, not within it.

    An error raised inside PyTorch's zip writer comes out as an "unexpected pos" without its cause,
    and in some versions ends the process from the writer's destructor. So the first error is kept,
    the rest of the writing goes nowhere, and `finish` raises it. Ctrl-C is kept the same way.

    Attributes:
        size: bytes given to write, those lost to an error included.
        crc32: of the bytes given to write.
        error: the first one met.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = 0
        self.crc32 = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        self.size += len(data)
        if self.error is None:
            try:
                self.file.write(data)
                self.crc32 = zlib.crc32(data, self.crc32)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # finish does

    def finish(self) -> None:
        """Give the zip file its comment; raises the first error there was."""
        if self.error is None:
            try:
                self.file.seek(-len(_NO_COMMENT), os.SEEK_END)
                self.file.write(_seal_of(self.crc32))
                self.file.flush()
            except OSError as error:
                self.error = error
        if isinstance(self.error, OSError):
            reason = f"{self.error.strerror} (a checkpoint takes {self.size / 1e6:.1f} MB)"
            raise OSError(self.error.errno, reason) from self.error
        if self.error is not None:
            raise self.error


def _is_sealed(path: Path) -> bool:
    """Whether the file is, byte for byte, what was written."""
    left = path.stat().st_size - _SEAL.size
    if left < 0:
        return False
    crc32 = 0
    with path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, 2**20))
            crc32 = zlib.crc32(block, crc32)
            left -= len(block)
        return file.read() == _seal_of(zlib.crc32(_NO_COMMENT, crc32))


def _seal_of(crc32: int) -> bytes:
    return _SEAL.pack(_SEAL.size - len(_NO_COMMENT), b"fastssl crc32 %08x" % crc32)


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {place}")
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple, torch.Size):
        for number, item in enumerate(value):
            _check_plain(item, f"{place}[{number}]")
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise TypeError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint"
            " cannot hold: make it a tensor or a plain value"
        )


def _read(value: Any) -> None:
    """Make all but the largest tensors in `value` the caller's own, free of the file."""
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, Tensor):
        if value.nbytes < _MAPPED:
            value.data = value.clone()
        return
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        _read(item)


def _all(folder: Path) -> list[Path]:
    """Every checkpoint in `folder`, by ascending step."""
    named = (path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem))
    return sorted(named, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _sync_folder(folder: Path) -> None:
    # Without this a power cut may undo the rename.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    message = f"{path} could not be written: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        message += f", {shutil.disk_usage(folder).free / 1e6:.1f} MB are free. Free some space,"
    elif error.errno == errno.EFBIG:
        message += ". Raise the limit on the size of files (ulimit -f),"
    else:
        message += ". See to the folder and its disk,"
    message += " or name a run folder on another disk (train.out=...), then start the run again"
    before = latest(path.parent)
    if path.suffix == ".pt" and before is not None:
        message += f"; the checkpoint before, {before.name}, is whole"
    return message


def _way_out(path: Path) -> str:
    before = [other for other in _all(path.parent) if other.name < path.name]
    if before:
        return f"delete it and start again, which goes on from the one before, {before[-1].name}"
    return "there is none before it: delete it and start anew"
