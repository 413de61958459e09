"""Writes what makes a folder of tars a store: the columns of its index, and its manifest."""

import hashlib
import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastssl import part_folder

LAYOUT = "pipelines.readers.tar_store"
# How members are named, in the manifest: by our numbers, or as those who made the tars did.
NUMBERED, NAMED = "numbered", "named"


class Shard(NamedTuple):
    """What the manifest says of a tar."""

    name: str
    bytes: int
    sha256: str
    images: int


def write_index(folder: Path, columns: dict[str, np.ndarray], layout: ModuleType) -> dict[str, str]:
    """Writes the columns into a new folder; returns the SHA-256 of each file."""
    digests: dict[str, str] = {}
    folder.mkdir()
    for name in layout.COLUMNS:
        file = io.BytesIO()
        np.save(file, columns[name], allow_pickle=False)
        part_folder.write(folder / f"{name}.npy", file.getbuffer())
        digests[name] = hashlib.sha256(file.getbuffer()).hexdigest()
    part_folder.sync(folder)
    return digests


def write_manifest(
    path: Path, about: dict[str, Any], shards: list[Shard], digests: dict[str, str]
) -> None:
    """Writes manifest.json: `about`, the shards with their first rows, the index, and its seal."""
    said: list[dict[str, Any]] = []
    row = 0
    for each in shards:
        said.append(each._asdict() | {"first_row": row})
        row += each.images
    manifest = about | {"images": row, "shards": said, "index": digests}
    manifest |= {"sha256": importlib.import_module(LAYOUT).seal(manifest)}
    text = json.dumps(manifest, indent=1) + "\n"  # ASCII: names may be no text at all
    part_folder.write(path, text.encode())
