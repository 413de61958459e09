"""What tests of stores share: images to pack, a pack, and what a folder holds."""

import io
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastssl import data
from pipelines.readers import tar, tar_store

# Workers that need not import these again: a pack takes 0.1 s of CPU in place of 0.4.
multiprocessing.set_forkserver_preload(["pytest", "fastssl.pack_image"])


def picture(height: int, width: int) -> Image.Image:
    """Smooth, with an upper left corner unlike the rest."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(9 * (x + y))], axis=-1)
    pixels[: height // 4, : width // 4] = 250, 20, 20
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(height: int, width: int, kind: str = "JPEG") -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    picture(height, width).save(file, kind)
    return file.getvalue()


def folder_of_classes(root: Path, *, classes: int = 3, images: int = 5) -> Path:
    """Small JPEGs of different sizes, and a PNG, in folders of classes."""
    for number in range(classes):
        (root / f"class{number}").mkdir(parents=True)
        for image in range(images):
            file = root / f"class{number}" / f"{image}.jpg"
            file.write_bytes(encoded(20 + 3 * number, 30 + image))
    (root / "class0" / "more.png").write_bytes(encoded(25, 25, "PNG"))
    return root


def pack(source: Path, store: Path, *more: str) -> tar.Samples:
    """Packs, and opens what was packed."""
    assert data.main(["pack", str(source), str(store), "--workers", "1", *more]) == 0
    options = tar.Options(root=str(store), verify=True)
    return tar.list_samples(options, cache=None, say=pytest.fail)


def write_manifest(store: Path, said: dict[str, Any]) -> None:
    """Has a store say something else, sealed as if it had been written so."""
    text = json.dumps(said | {"sha256": tar_store.seal(said)})
    (store / "manifest.json").write_text(text)


def agree(store: Path) -> None:
    """Has the manifest say what tars and index are now, as one who means harm would."""
    said = json.loads((store / "manifest.json").read_text())
    for shard in said["shards"]:
        shard["bytes"] = (store / shard["name"]).stat().st_size
        shard["sha256"] = tar_store.sha256_of(str(store / shard["name"]))
    for name in said["index"]:
        said["index"][name] = tar_store.sha256_of(str(store / "index" / f"{name}.npy"))
    write_manifest(store, said)


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """The single line that a mistake is answered with."""
    code = data.main([*map(str, arguments)])

    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    return said.removeprefix("error: ").rstrip("\n")


def names(samples: tar.Samples) -> list[str]:
    """Of images, in their source."""
    return [os.path.relpath(samples.path(row), samples.root) for row in range(len(samples))]


def files(root: Path) -> dict[str, bytes]:
    """All files of a folder, by name."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
