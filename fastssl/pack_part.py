"""A store that is being packed: what is finished of it outlives a process that is killed.

    STORE.part/plan.json               of what, into what form
    STORE.part/store/                  becomes STORE; while packing, its shards and their .idx
    STORE.part/finished/*.npz, *.json  of every whole shard: its columns; how far the source is read
A shard counts once its .json is there, which is written after all else is on the disk, and ends
with the SHA-256 of both: a shard whose notes are damaged is packed again.
"""

import hashlib
import io
import json
import os
import re
import shutil
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastssl import part_folder

OWN = ("shard", "offset", "size", "height", "width", "label", "checksum", "name_size")
_NUMBER = re.compile("[0-9]{6}")  # a note's name; others may leave files here (.DS_Store, .nfs...)


@dataclass(frozen=True)
class Finished:
    """A whole shard, as its .json says it."""

    name: str
    bytes: int
    sha256: str
    images: int
    position: int  # in the source's usable images: that of the first one behind this shard
    left_out: dict[str, str]  # names before it, and behind the shard before, with the reason


class Columns:
    """Of the images of one shard, in order."""

    def __init__(self) -> None:
        self.numbers: dict[str, array[int]] = {key: array("q") for key in OWN}
        self.names = bytearray()

    def __len__(self) -> int:
        return len(self.numbers["shard"])

    def append(self, name: bytes, **numbers: int) -> None:
        """One image more."""
        self.names += name
        for key in OWN[:-1]:
            self.numbers[key].append(numbers[key])
        self.numbers["name_size"].append(len(name))


class Part:
    """STORE.part, locked by who made this."""

    def __init__(self, folder: Path, plan: dict[str, Any], *, restart: bool) -> None:
        """Takes up what is finished there, and removes what is not.

        Args:
            folder: it.
            plan: all that the bytes of the store depend on, by a name for the user.
            restart: take up nothing.

        Raises:
            ValueError: it was begun by another plan, or is no pack's.
        """
        self.folder, self.store, self._notes = folder, folder / "store", folder / "finished"
        said, new = folder / "plan.json", folder / "plan.json.new"
        new.unlink(missing_ok=True)
        if not said.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds what no pack has left there: remove it")
        self.finished = [] if restart else _finished(self.store, self._notes)
        if not self.finished:  # nobody's loss
            part_folder.clear(folder)
        if said.exists():
            _check_plan(folder, said, plan)
        else:
            part_folder.write(new, json.dumps(plan).encode())
            new.rename(said)
            part_folder.sync(folder)
        self.store.mkdir(exist_ok=True)
        self._notes.mkdir(exist_ok=True)
        self.drop(len(self.finished))

    def finish(self, finished: Finished, columns: Columns) -> None:
        """Notes a shard whose files are on the disk."""
        number = len(self.finished)
        file = io.BytesIO()
        numbers = np.array([columns.numbers[key] for key in OWN], np.int64)
        np.savez(file, numbers=numbers, names=np.frombuffer(bytes(columns.names), np.uint8))
        part_folder.sync(self.store)
        columns_of_it, said = file.getbuffer(), json.dumps(asdict(finished)).encode()
        part_folder.write(self._notes / f"{number:06d}.npz", columns_of_it)
        new = self._notes / f"{number:06d}.new"
        part_folder.write(new, said + b"\n" + _digest(columns_of_it, said))
        new.rename(new.with_suffix(".json"))
        part_folder.sync(self._notes)
        self.finished.append(finished)

    def drop(self, first: int) -> None:
        """Removes the shards from this one on, and all that is no shard's."""
        for gone in range(first, len(self.finished)):
            (self._notes / f"{gone:06d}.json").unlink()
        del self.finished[first:]
        known = {Path(each.name).stem for each in self.finished}
        for left in self.store.iterdir():
            if left.stem not in known:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in self._notes.iterdir():
            ours = _NUMBER.fullmatch(left.stem)
            if ours and (int(left.stem) >= first or left.suffix == ".new"):
                left.unlink()

    def columns(self, layout: ModuleType) -> dict[str, np.ndarray]:
        """The index of all finished shards, as the layout has it."""
        numbers: list[np.ndarray] = []
        names: list[np.ndarray] = []
        for number in range(len(self.finished)):
            with np.load(self._notes / f"{number:06d}.npz", allow_pickle=False) as its:
                numbers.append(its["numbers"])
                names.append(its["names"])
        whole: dict[str, np.ndarray] = dict(zip(OWN, np.concatenate(numbers, axis=1), strict=True))
        whole["name_end"] = np.cumsum(whole.pop("name_size"))
        whole["name"] = np.concatenate(names)
        return {key: whole[key].astype(dtype) for key, dtype in layout.COLUMNS.items()}


def kept(folder: Path) -> tuple[int, int]:
    """How many shards and images are finished in STORE.part."""
    finished = _finished(folder / "store", folder / "finished")
    return len(finished), sum(each.images for each in finished)


def _check_plan(folder: Path, path: Path, plan: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_bytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{path} is damaged: begin anew with --restart")
    other = [key for key in {**before, **plan} if before.get(key) != plan.get(key)]
    if other:
        same = "give the same command as then to go on"
        if "source" in other:
            same = "have its files (names, sizes, times) and the command as then to go on"
        raise ValueError(
            f"{folder} was begun with another {' and another '.join(other)}: {same}, --restart to"
            " begin anew, or name another STORE"
        )


def _finished(store: Path, notes: Path) -> list[Finished]:
    """The shards from the first on whose files are all there, with notes that are whole."""
    found: list[Finished] = []
    while (each := _noted(store, notes / f"{len(found):06d}.json")) is not None:
        found.append(each)
    return found


def _noted(store: Path, note: Path) -> Finished | None:
    try:
        said, _, digest = note.read_bytes().partition(b"\n")
        if digest != _digest(note.with_suffix(".npz").read_bytes(), said):
            return None
        each = Finished(**json.loads(said))
        tar = store / each.name
        whole = tar.with_suffix(".idx").exists() and os.path.getsize(tar) == each.bytes
    except (FileNotFoundError, TypeError):  # TypeError: another version's
        return None
    return each if whole else None


def _digest(columns: bytes | memoryview, said: bytes) -> bytes:
    digest = hashlib.sha256(columns)
    digest.update(said)
    return digest.hexdigest().encode()
