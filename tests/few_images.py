"""Some built-in images as train/<class>/ and val/<class>/, in numbers that nothing divides."""

import shutil
from pathlib import Path

import torch

from fastssl import trained
from fastssl.patch_network import Standardization
from fastssl.trained import Trained
from tests import tiny_backbone

TRAIN, VAL = (7, 7, 7), (0, 5, 4)  # images of each class: val lacks the first


def copy(images: Path, to: Path, train=TRAIN, val=VAL) -> Path:
    """Copies them into the folder `to`, and returns it."""
    for split, counts in (("train", train), ("val", val)):
        folders = sorted((images / split).iterdir())[: len(counts)]
        for folder, count in zip(folders, counts, strict=True):
            for file in sorted(folder.iterdir())[:count]:
                (to / split / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to / split / folder.name)
    return to


def damage(path: Path) -> None:
    """Leaves a JPEG's header and end as they are and makes nonsense of its Huffman table."""
    whole = bytearray(path.read_bytes())
    table = whole.index(b"\xff\xc4")
    whole[table + 5 : table + 21] = b"\xff" * 16
    path.write_bytes(bytes(whole))


def tiny(seed: int = 0, width: int = 8, standardize: Standardization = "global") -> Trained:
    """A run of the smallest backbone, as `trained.load` gives it."""
    torch.manual_seed(seed)
    backbone = tiny_backbone.backbone(tiny_backbone.Options(width=width)).eval()
    return Trained(
        name=f"tiny-{seed}",
        backbone=backbone,
        folder=None,
        card=None,
        step=7,
        weights=trained.fingerprint(backbone),
        use="tests.tiny_backbone",
        options={"width": width},
        preprocessing=("pipelines.evaluation", {"resize": 36, "crop": 32}),
        standardize=standardize,
    )
