"""Tasks on patches: jigsaw, relative_patch, pirl_jigsaw, pirl_jigsaw_rotation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.plain.pil import honoured, views
from pipelines import jigsaw, pirl_jigsaw, relative_patch
from pipelines.patch_grid import Square
from pipelines.permutations import permutation_set

SQUARE = ("resize", "keep_aspect", "crop", "flip", "grayscale", "grayscale_of")
PIRL = (
    *("image_size", "image_area", "patches_crop", "patches_area", "grid", "patch", "flip"),
    *("flip_of", "patch_colors", "permutations"),
)


@dataclass(frozen=True)
class Cells:
    """How a square becomes patches; sizes in pixels a side, as in pipelines.patch_grid."""

    crop: int
    grid: int
    patch: int
    gap: int = 0

    def cut(self, image: Image.Image, cells: Sequence[int]) -> list[Image.Image]:
        """A patch at a random place of each of `cells`, in their order."""
        cell = self.crop // self.grid
        first, last = self.gap // 2, cell - self.patch - (self.gap - self.gap // 2)
        patches = []
        for number in cells:
            top = number // self.grid * cell + random.randint(first, last)
            left = number % self.grid * cell + random.randint(first, last)
            patches.append(image.crop((left, top, left + self.patch, top + self.patch)))
        return patches


class Jigsaw:
    """`patches` [9, 3, p, p], `permutation` [9], `order` [N, 9] and `label` [N]."""

    def __init__(self, options: jigsaw.Options) -> None:
        honoured.check(
            options,
            *(*SQUARE, "grid", "patch", "gap", "brightness", "contrast", "saturation", "hue"),
            *("permutations", "distance", "shuffle", "per_image"),
        )
        o = options
        self._options = o
        self._cells = Cells(o.crop, o.grid, o.patch, o.gap)
        self._orders = torch.from_numpy(
            permutation_set(o.grid**2, o.permutations, o.distance)
        ).long()
        self._square = square(o)
        change = []
        if o.brightness or o.contrast or o.saturation or o.hue:
            change.append(v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue))
        if o.grayscale and o.grayscale_of == "patch":
            change.append(v2.RandomGrayscale(o.grayscale))
        self._patch = v2.Compose([*change, v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        o = self._options
        label = torch.tensor(random.sample(range(o.permutations), o.per_image))
        in_place = torch.arange(o.grid**2)
        if o.shuffle == "pixels":
            permutation, order = self._orders[label[0]], in_place[None]
        else:
            permutation, order = in_place, self._orders[label]
        cut = self._cells.cut(self._square(image), permutation.tolist())
        return {
            "patches": torch.stack([self._patch(patch) for patch in cut]),
            "permutation": permutation,
            "order": order,
            "label": label.squeeze() if o.per_image == 1 else label,
        }


class RelativePatch:
    """`patches` [F, 3, p, p], `pair` [N, 2] and `label` [N]."""

    def __init__(self, options: relative_patch.Options) -> None:
        honoured.check(options, *SQUARE, "patch", "gap", "pairs")
        o = options
        self._pairs = o.pairs
        self._cells = Cells(o.crop, relative_patch.GRID, o.patch, o.gap)
        self._square = square(o)
        gray = o.grayscale_of == "patch" and o.grayscale
        change = [v2.RandomGrayscale(o.grayscale)] if gray else []
        self._patch = v2.Compose([*change, v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        neighbors, center = relative_patch.NEIGHBORS.tolist(), relative_patch.CENTER
        if self._pairs == "all":
            cells = list(range(relative_patch.GRID**2))
            pair = torch.tensor([[each, center] for each in neighbors])
            label = torch.arange(len(neighbors))
        else:
            label = torch.tensor(random.randrange(len(neighbors)))
            cells, pair = [neighbors[int(label)], center], torch.tensor([[0, 1]])
        cut = self._cells.cut(self._square(image), cells)
        return {
            "patches": torch.stack([self._patch(patch) for patch in cut]),
            "pair": pair,
            "label": label,
        }


class Pirl:
    """`image` [3, S, S], `patches` [9, 3, p, p] and their `permutation` [9]."""

    def __init__(self, options: pirl_jigsaw.Options) -> None:
        honoured.check(options, *PIRL, *views.COLORS)
        o = options
        self._cells = Cells(o.patches_crop, o.grid, o.patch)
        self._orders = None
        if o.permutations is not None:
            self._orders = permutation_set(o.grid**2, o.permutations).tolist()
        self._image = v2.Compose(
            [
                v2.RandomResizedCrop(o.image_size, o.image_area),
                v2.RandomHorizontalFlip(o.flip),
                *views.colors(o),
                v2.PILToTensor(),
            ]
        )
        flip = v2.RandomHorizontalFlip(o.flip)
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(o.patches_crop, o.patches_area),
                *([flip] if o.flip_of == "crop" else []),
            ]
        )
        self._patch = v2.Compose(
            [
                *([flip] if o.flip_of == "patch" else []),
                *(views.colors(o) if o.patch_colors else []),
                v2.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return self.turned(image, 0)

    def turned(self, image: Image.Image, angle: int) -> dict[str, Tensor]:
        """The outputs where the crop is turned by `angle` before it is cut."""
        if self._orders is None:
            cells = random.sample(range(self._cells.grid**2), self._cells.grid**2)
        else:
            cells = random.choice(self._orders)
        cut = self._cells.cut(views.turned(self._crop(image), angle), cells)
        return {
            "image": self._image(image),
            "patches": torch.stack([self._patch(patch) for patch in cut]),
            "permutation": torch.tensor(cells),
        }


class PirlTurned:
    """What `Pirl` puts out, of a turned crop, and its `angle`."""

    def __init__(self, options: pirl_jigsaw.Options) -> None:
        self._pirl = Pirl(options)

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        angle = random.choice([0, *views.TURNS])
        return self._pirl.turned(image, angle) | {"angle": torch.tensor(angle)}


def square(options: Square) -> v2.Compose:
    """The image resized, cut, mirrored; gray where grayscale is of the whole image."""
    o = options
    gray = o.grayscale_of == "image" and o.grayscale
    return v2.Compose(
        [
            v2.Resize(o.resize if o.keep_aspect else (o.resize, o.resize)),
            v2.RandomCrop(o.crop),
            v2.RandomHorizontalFlip(o.flip),
            *([v2.RandomGrayscale(o.grayscale)] if gray else []),
        ]
    )
