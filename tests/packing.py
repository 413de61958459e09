"""What tests of stores share: images to pack, a pack, and what a folder holds."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl import data
from pipelines.readers import tar


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
