"""Tasks on whole views: single_view, two_views, colorization, rotation, pirl_rotation."""

import random

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.plain.pil import honoured
from pipelines import colorization, ops, pirl_rotation, rotation, single_view, two_views

COLORS = ("brightness", "contrast", "saturation", "hue", "grayscale")
# counter-clockwise, as Pillow and the graphs count
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class SingleView:
    """`image` [3, S, S]."""

    def __init__(self, options: single_view.Options) -> None:
        honoured.check(options, "image_size", "image_area", "image_aspect", "flip", *COLORS)
        o = options
        self._view = v2.Compose(
            [
                v2.RandomResizedCrop(o.image_size, o.image_area, o.image_aspect),
                v2.RandomHorizontalFlip(o.flip),
                *colors(o),
                v2.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return {"image": self._view(image)}


class TwoViews:
    """`query` and `key` [3, S, S], as facebookresearch/moco writes them (--aug-plus)."""

    def __init__(self, options: two_views.Options) -> None:
        honoured.check(
            options,
            *("image_size", "image_area", "image_aspect", "jitter", "blur", "blur_sigma", "flip"),
            *COLORS,
        )
        o = options
        jitter = v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue)
        self._view = v2.Compose(
            [
                v2.RandomResizedCrop(o.image_size, o.image_area, o.image_aspect),
                v2.RandomApply([jitter], o.jitter),
                v2.RandomGrayscale(o.grayscale),
                v2.RandomApply([Blur(o.blur_sigma)], o.blur),
                v2.RandomHorizontalFlip(o.flip),
                v2.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return {"query": self._view(image), "key": self._view(image)}


class Blur(torch.nn.Module):
    """Gaussian blur of a random width, as moco's loader.py has it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self._sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._sigma)))


class Colorization:
    """`image` [3, S, S], in colour."""

    def __init__(self, options: colorization.Options) -> None:
        honoured.check(options, "image_size", "crop", "resize", "image_area", "flip")
        o = options
        crop = [v2.RandomResizedCrop(o.image_size, o.image_area)]
        if o.crop == "whole":
            crop = [v2.Resize(o.resize), v2.RandomCrop(o.image_size)]
        self._view = v2.Compose([*crop, v2.RandomHorizontalFlip(o.flip), v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return {"image": self._view(image)}


class Rotation:
    """`turned` [F, 3, S, S] with their `angle` and `label`."""

    def __init__(self, options: rotation.Options) -> None:
        honoured.check(
            options,
            *("image_size", "crop", "image_area", "aspect", "pad", "flip", "turns", "copies"),
            *COLORS,
        )
        o = options
        if o.slanted:
            honoured.refuse(o, "turns", "give multiples of 90")
        crop = [v2.RandomResizedCrop(o.image_size, o.image_area, o.aspect)]
        if o.crop == "pad":
            square = [v2.Resize(o.image_size), v2.CenterCrop(o.image_size)]
            crop = [*square, v2.RandomCrop(o.image_size, padding=o.pad)]
        self._view = v2.Compose([*crop, v2.RandomHorizontalFlip(o.flip), *colors(o)])
        self._turns, self._copies = o.turns, o.copies
        self._to_tensor = v2.PILToTensor()

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        view = self._view(image)
        labels = list(range(len(self._turns)))
        if self._copies == "one":
            labels = [random.choice(labels)]
        angles = [self._turns[label] for label in labels]
        # in one number a label, like an index, is []
        label, angle = torch.tensor(labels), torch.tensor(angles)
        return {
            "turned": torch.stack([self._to_tensor(turned(view, each)) for each in angles]),
            "angle": angle.squeeze() if len(labels) == 1 else angle,
            "label": label.squeeze() if len(labels) == 1 else label,
        }


class PirlRotation:
    """`image` and `turned` [3, S, S] with its `angle`."""

    def __init__(self, options: pirl_rotation.Options) -> None:
        honoured.check(options, "image_size", "image_area", "flip", *COLORS)
        o = options
        self._view = v2.Compose(
            [
                v2.RandomResizedCrop(o.image_size, o.image_area),
                v2.RandomHorizontalFlip(o.flip),
                *colors(o),
            ]
        )
        self._to_tensor = v2.PILToTensor()

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        angle = random.choice([0, *TURNS])
        return {
            "image": self._to_tensor(self._view(image)),
            "turned": self._to_tensor(turned(self._view(image), angle)),
            "angle": torch.tensor(angle),
        }


def turned(image: Image.Image, angle: int) -> Image.Image:
    """A square image turned counter-clockwise by a multiple of 90 degrees."""
    return image.transpose(TURNS[angle]) if angle else image


def colors(strengths: ops.Colors) -> list[torch.nn.Module]:
    """Jitter and gray; what is off is left out, as whoever writes a list of transforms does."""
    o = strengths
    found: list[torch.nn.Module] = []
    if o.brightness or o.contrast or o.saturation or o.hue:
        found.append(v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue))
    if o.grayscale:
        found.append(v2.RandomGrayscale(o.grayscale))
    return found
