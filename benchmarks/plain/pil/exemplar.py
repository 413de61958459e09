"""Several random views of one image: random resized crops, or the warps of Dosovitskiy et al."""

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.plain.pil import honoured
from pipelines import exemplar


class Exemplar:
    """`views` [K, 3, S, S]."""

    def __init__(self, options: exemplar.Options) -> None:
        honoured.check(options, *vars(options))  # all of them
        o = options
        self._options = o
        self._gray = v2.RandomGrayscale(o.grayscale)
        self._crop = v2.RandomResizedCrop(o.size, o.area, o.aspect)
        self._flip = v2.RandomHorizontalFlip(o.flip)
        jitter = []
        if o.brightness or o.contrast or o.saturation or o.hue:
            jitter.append(v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue))
        self._finish = v2.Compose([*jitter, v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        o = self._options
        if o.geometry == "warp":
            image = self._middle(image)
        image = self._gray(image)  # one draw for all views
        views = []
        for _ in range(o.views):
            view = self._warped(image) if o.geometry == "warp" else self._crop(image)
            view = self._flip(view)
            if o.components != (1.0, 1.0):
                view = self._components_scaled(view)
            if o.powers != (1.0, 1.0) or o.factors != (1.0, 1.0) or o.offsets:
                view = self._saturation_and_value_changed(view)
            views.append(self._finish(view))
        return {"views": torch.stack(views)}

    def _middle(self, image: Image.Image) -> Image.Image:
        """The square that warps can see, at the resolution of the views."""
        o = self._options
        width, height = image.size
        half = min(image.size) * o.region / 2
        side = round(o.size * o.region / o.seed_patch)
        box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
        # rounding may leave a box that is larger than the image by a last digit
        box = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
        return image.resize((side, side), Image.Resampling.BILINEAR, box)

    def _warped(self, region: Image.Image) -> Image.Image:
        """One view: the seed moved, scaled and turned; outside the region Pillow puts black."""
        o = self._options
        seed = region.width * o.seed_patch / o.region
        step = _log_uniform(o.scale) * seed / o.size  # pixels of the region in one of the view
        angle = math.radians(random.uniform(-o.rotation, o.rotation))
        cos, sin = step * math.cos(angle), step * math.sin(angle)
        most = o.translation * seed
        x, y = (region.width / 2 + random.uniform(-most, most) for _ in range(2))
        half = o.size / 2
        matrix = (cos, -sin, x - half * (cos - sin), sin, cos, y - half * (sin + cos))
        return region.transform(
            (o.size, o.size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )

    def _components_scaled(self, view: Image.Image) -> Image.Image:
        """Contrast 1: colours stretched about their mean along their principal components."""
        factors = [_log_uniform(self._options.components) for _ in range(3)]
        matrix = exemplar.COMPONENTS.T @ np.diag(factors) @ exemplar.COMPONENTS
        pixels = (np.asarray(view) - exemplar.MEAN) @ matrix.T + exemplar.MEAN
        return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))

    def _saturation_and_value_changed(self, view: Image.Image) -> Image.Image:
        """Contrast 2: S and V of HSV each to a power, times a factor, plus an offset."""
        o = self._options
        hue, saturation, value = view.convert("HSV").split()
        changed = []
        for plane in (saturation, value):
            power, factor = _log_uniform(o.powers), _log_uniform(o.factors)
            offset = random.uniform(-o.offsets, o.offsets)
            levels = (np.arange(256) / 255) ** power * factor + offset
            changed.append(plane.point(np.rint(levels.clip(0, 1) * 255).astype(int).tolist()))
        return Image.merge("HSV", (hue, *changed)).convert("RGB")


def _log_uniform(ends: exemplar.Range) -> float:
    return math.exp(random.uniform(math.log(ends[0]), math.log(ends[1])))
