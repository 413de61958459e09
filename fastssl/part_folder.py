"""TARGET.part: where a folder is made, that becomes TARGET by a rename once it is whole."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_new(target: Path) -> None:
    """Whether a folder can be made there.

    Raises:
        ValueError: it cannot; says why.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: remove it, or name another folder")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}: make it, or name another")


def of(target: Path) -> Path:
    """The folder beside it to write in."""
    return target.with_name(f"{target.name}.part")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[Path]:
    """`of(target)`, made if need be, for this process alone until the block ends.

    A lock, which the kernel opens when its process ends, tells what was left by a process that was
    killed from what another is writing.

    Raises:
        ValueError: another process writes there, or the target can't be made.
    """
    check_new(target)
    part = of(target)
    try:
        part.mkdir(exist_ok=True)
        lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{part} is there and is no folder of ours: remove it") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{part} is being written by another process: wait for it") from None
        if not part.is_dir() or not os.path.samestat(os.fstat(lock), part.stat()):
            raise ValueError(f"{target} was made by another process just now")
        yield part
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Removes all that is in it."""
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def write(path: Path, content: bytes | memoryview) -> None:
    """A new file, forced to the disk."""
    with path.open("xb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Forces the names in a folder, or what is in a file, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
