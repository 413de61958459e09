"""Boxes of objects: as PASCAL VOC annotates them, as pixels, and where a graph has moved them.

A box is left, top, right, bottom in pixels, right and bottom being the first pixels outside: pixel
1 alone of VOC's, which counts from 1 and includes both corners, is 0, 0, 1, 1 here. So xmin and
ymin lose 1 and xmax and ymax stay, as in Detectron2.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl import voc


@dataclass(frozen=True)
class Truth:
    """What an image shows, in its own pixels."""

    boxes: np.ndarray  # float32 [N, 4]
    labels: np.ndarray  # int64 [N], numbers of classes from 0
    difficult: np.ndarray  # bool [N]


def read(root: Path, splits: tuple[str, ...]) -> dict[Path, list[voc.Object]]:
    """The objects of every image of some splits, by the image's file, in the splits' order.

    Args:
        root: as voc.folder takes it.
        splits: year and name of each: "2007/trainval".

    Raises:
        ValueError: a split or an annotation is missing or wrong, or an image is in two splits.
    """
    found = {}
    for split in splits:
        year, _, name = split.partition("/")
        for stem in voc.names(root, year, name):
            path = voc.image_path(root, year, stem)
            if path in found:
                raise ValueError(f"{path} is in two of {', '.join(splits)}: name each image once")
            found[path] = voc.objects(root, year, stem)
    return found


def truth(
    objects: list[voc.Object], classes: tuple[str, ...], *, image: Path, height: int, width: int
) -> Truth:
    """The objects as arrays; of a box that leaves its image by a pixel, what lies inside.

    Args:
        objects: as annotated.
        classes: names, by number.
        image: the file, for messages.
        height: of the image, pixels.
        width: likewise.

    Raises:
        ValueError: one is of none of `classes`, or lies outside of the image.
    """
    unknown = sorted({each.name for each in objects} - set(classes))
    if unknown:
        raise ValueError(
            f"objects of class {', '.join(unknown)} are in the test split and in no training "
            f"split, which have {', '.join(classes)}"
        )
    corners = [_inside(each, image, height, width) for each in objects]
    return Truth(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array([classes.index(each.name) for each in objects], np.int64),
        np.array([each.difficult for each in objects], bool),
    )


def _inside(each: voc.Object, image: Path, height: int, width: int) -> tuple[float, ...]:
    """Left, top, right, bottom."""
    box = (each.xmin - 1, each.ymin - 1, each.xmax, each.ymax)
    edges = (width, height, width, height)
    inside = tuple(min(max(0.0, at), edge) for at, edge in zip(box, edges, strict=True))
    outside = max(abs(at - to) for at, to in zip(box, inside, strict=True))
    if outside > 1 or inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(
            f"{image} has {width} x {height} pixels, and its {each.name} is annotated at x "
            f"{each.xmin:g} to {each.xmax:g}, y {each.ymin:g} to {each.ymax:g}: mend the annotation"
        )
    return inside


def moved(boxes: Tensor, original: Tensor, size: Tensor, flip: bool) -> Tensor:
    """`boxes` [N, 4] of a file's image, in the image that the graph made of it.

    Args:
        boxes: float32, in the file's pixels.
        original: height and width of the file's image, int64 [2].
        size: those of the resized one.
        flip: left and right were exchanged after that.
    """
    boxes = boxes * _per_corner(size / original)
    if flip:
        left, top, right, bottom = boxes.unbind(dim=1)
        boxes = torch.stack([size[1] - right, top, size[1] - left, bottom], dim=1)
    return boxes


def moved_back(boxes: Tensor, original: Tensor, size: Tensor) -> Tensor:
    """The inverse of `moved` without a flip."""
    return boxes * _per_corner(original / size)


def _per_corner(of_height_and_width: Tensor) -> Tensor:
    return of_height_and_width[[1, 0, 1, 0]]
