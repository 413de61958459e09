"""Arrays that a reader keeps between starts: a file in the cache, mapped and so shared.

A file begins with a digest of all that follows: a JSON heading padded to a multiple of 64 bytes,
with the reader's note and each array's type, shape and place, then the arrays themselves.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

_DIGEST = 32  # bytes
_LENGTH = 8  # bytes, of the heading
_ALIGNMENT = 64  # bytes


def load(path: Path, say: Callable[[str], None]) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and the note of a file that `save` wrote; None where there is none that is whole.

    Arrays can be written to: what is written stays this process's own.
    """
    try:
        with open(path, "rb") as file:
            written, state = file.read(_DIGEST), _state()
            while block := file.read(1 << 22):  # not through the map, whose pages would count here
                state.update(block)
            if written != state.digest():
                say(f"data: {path} is damaged or of another version; making it again")
                return None
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"data: cannot read {path} ({error.strerror}); making it again")
        return None
    start = _DIGEST + _LENGTH
    heading = json.loads(whole[start : start + int.from_bytes(whole[_DIGEST:start], "little")])
    arrays = {
        name: np.frombuffer(whole, dtype, count, offset)
        for name, (dtype, count, offset) in heading["arrays"].items()
    }
    return arrays, heading["note"]


def save(
    path: Path, arrays: Mapping[str, np.ndarray], note: Any, say: Callable[[str], None]
) -> None:
    """Writes one-dimensional arrays, and a note that JSON can hold; a failure is said, no error."""
    places: dict[str, tuple[str, int, int]] = {}
    # The places are in the heading, whose length they depend on: they get room enough beforehand.
    room = len(json.dumps({"arrays": {}, "note": note})) + 100 * len(arrays)
    end = _padded(_DIGEST + _LENGTH + room)
    for name, array in arrays.items():
        places[name] = (array.dtype.str, len(array), end)
        end = _padded(end + array.nbytes)
    begin = min((offset for _, _, offset in places.values()), default=end)
    heading = json.dumps({"arrays": places, "note": note}).encode()
    heading = heading.ljust(begin - _DIGEST - _LENGTH)
    pieces: list[bytes | memoryview] = [len(heading).to_bytes(_LENGTH, "little"), heading]
    for array in arrays.values():
        pieces += [np.ascontiguousarray(array).data.cast("B"), bytes(-array.nbytes % 64)]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            state = _state()
            for piece in pieces:
                state.update(piece)
            file.write(state.digest())
            file.writelines(pieces)
        part.replace(path)  # at once: who has mapped the old file keeps it
    except OSError as error:
        say(f"data: cannot write {path}: {error.strerror}; the next start does it all again")
        with suppress(OSError):
            part.unlink()


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _state() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=_DIGEST, person=b"kept arrays 1")
