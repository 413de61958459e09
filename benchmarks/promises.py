"""What each task promises of its outputs, in the words that `benchmarks.gate` checks it by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines import (
    colorization,
    exemplar,
    jigsaw,
    pirl_jigsaw,
    pirl_rotation,
    relative_patch,
    rotation,
    single_view,
    two_views,
)
from pipelines.permutations import permutation_set

Range = tuple[float, float]


@dataclass(frozen=True)
class Inception:
    """A random part of `area` and `aspect` (width / height) of the image."""

    area: Range
    aspect: Range = (3 / 4, 4 / 3)

    def reference(self, count: int = 20000) -> np.ndarray:
        """Areas drawn as torchvision's RandomResizedCrop draws them of images of 3:4 and 4:3."""
        random = np.random.default_rng(0)
        found: list[np.ndarray] = []
        # what does not fit is drawn again; the tenth failure is too rare to matter here
        narrow, wide = self.aspect
        for _ in range(10):
            area = random.uniform(*self.area, count)
            aspect = np.exp(random.uniform(math.log(narrow), math.log(wide), count))
            # squared, in parts of the sides; by symmetry 3:4 and 4:3 give the same areas
            width, height = area * aspect / (4 / 3), area / aspect * (4 / 3)
            fits = (width <= 1) & (height <= 1)
            found.append(area[fits])
            count -= int(fits.sum())
            if count == 0:
                break
        found.append(np.full(count, self.area[1]))
        return np.concatenate(found)


@dataclass(frozen=True)
class Resized:
    """A square of the image resized whole; sizes in pixels a side."""

    resize: int
    crop: int
    keep_aspect: bool = True  # resize is the short side's
    moves: bool = True  # the square is at a random place

    def extent(self, width: float, height: float) -> tuple[float, float]:
        """What it shows of an image, in its pixels."""
        part = self.crop / self.resize
        short = min(width, height)
        return (part * short, part * short) if self.keep_aspect else (part * width, part * height)


@dataclass(frozen=True)
class Warp:
    """A seed, which is a part of the short side, scaled, turned and moved."""

    seed: float
    scale: Range
    rotation: float
    translation: float


@dataclass(frozen=True, kw_only=True)
class Frames:
    """An output of images: one for each image [3, S, S], or several [F, 3, S, S]."""

    name: str
    crop: Inception | Resized | Warp
    side: int  # pixels of the square that `crop` becomes: of a frame, or of what patches are cut of
    patches: bool = False  # they are cut of that square
    crop_each: bool = True  # each frame shows a part of its own; False: all are cut of one square
    flip: float = 0.0
    flip_each: bool = True
    gray: float = 0.0
    gray_each: bool = True
    colors: float = 0.0  # the greatest strength with which colours change
    blur: float | None = None  # the probability; None: the graph has no such option
    blur_sigma: Range = (0.0, 0.0)  # its width in pixels of the frame, uniform
    angle: str | None = None  # the output that says how frames are turned
    turns: int = 1  # how many values it can take


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What labels can be recovered from the frames of the output `frames`."""

    kind: Literal["permutation", "jigsaw", "pairs", "turns"]
    frames: str
    grid: int = 3
    cell: int = 0  # pixels a side
    orders: np.ndarray | None = None  # the set that is drawn from; None: all
    shuffled: bool = True
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """All outputs of a graph: their shapes in a batch without its first dimension, and meaning."""

    shapes: dict[str, tuple[int, ...]]
    frames: tuple[Frames, ...]
    labels: tuple[Labels, ...] = ()


def of(graph: str, options: Any) -> Task:
    """What `graph` ("pipelines.pirl_jigsaw") promises with these options.

    Raises:
        ValueError: nothing is written down here for that graph.
    """
    if graph not in _TASKS:
        raise ValueError(
            f"{graph}: nobody has written down what can be checked of its outputs; there are "
            f"{', '.join(_TASKS)}; add it to benchmarks/promises.py"
        )
    return _TASKS[graph](options)


def _single_view(o: single_view.Options) -> Task:
    view = Frames(
        name="image",
        crop=Inception(o.image_area, o.image_aspect),
        side=o.image_size,
        flip=o.flip,
        gray=o.grayscale,
        colors=_strength(o),
    )
    return Task({"image": _square(o.image_size), "index": ()}, (view,))


def _two_views(o: two_views.Options) -> Task:
    views = tuple(
        Frames(
            name=name,
            crop=Inception(o.image_area, o.image_aspect),
            side=o.image_size,
            flip=o.flip,
            gray=o.grayscale,
            colors=_strength(o) if o.jitter > 0.2 else 0.01,
            blur=o.blur,
            blur_sigma=o.blur_sigma,
        )
        for name in ("query", "key")
    )
    shape = _square(o.image_size)
    return Task({"query": shape, "key": shape, "index": ()}, views)


def _colorization(o: colorization.Options) -> Task:
    crop = Inception(o.image_area)
    if o.crop == "whole":
        crop = Resized(o.resize, o.image_size)
    view = Frames(name="image", crop=crop, side=o.image_size, flip=o.flip)
    return Task({"image": _square(o.image_size), "index": ()}, (view,))


def _rotation(o: rotation.Options) -> Task:
    if o.slanted:
        raise ValueError(f"turns ({list(o.turns)}) between the quarters cannot be checked")
    size = o.image_size
    crop = Inception(o.image_area, o.aspect)
    if o.crop == "pad":
        crop = Resized(size, size, moves=o.pad > 0)
    count = len(o.turns) if o.copies == "all" else 1
    turned = Frames(
        name="turned",
        crop=crop,
        side=size,
        crop_each=False,
        flip=o.flip,
        flip_each=False,
        gray=o.grayscale,
        gray_each=False,
        colors=_strength(o),
        angle="angle",
        turns=len(o.turns),
    )
    number = (count,) if count > 1 else ()
    shapes = {"turned": (count, *_square(size)), "angle": number, "label": number, "index": ()}
    return Task(shapes, (turned,), (Labels(kind="turns", frames="turned", turns=o.turns),))


def _pirl_rotation(o: pirl_rotation.Options) -> Task:
    def view(name: str, angle: str | None) -> Frames:
        return Frames(
            name=name,
            crop=Inception(o.image_area),
            side=o.image_size,
            flip=o.flip,
            flip_each=False,
            gray=o.grayscale,
            colors=_strength(o),
            angle=angle,
            turns=4,
        )

    shape = _square(o.image_size)
    shapes = {"image": shape, "turned": shape, "angle": (), "index": ()}
    return Task(shapes, (view("image", None), view("turned", "angle")))


def _pirl_jigsaw(o: pirl_jigsaw.Options) -> Task:
    return _pirl(o, None)


def _pirl_jigsaw_rotation(o: pirl_jigsaw.Options) -> Task:
    return _pirl(o, "angle")


def _pirl(o: pirl_jigsaw.Options, angle: str | None) -> Task:
    cells = o.grid**2
    image = Frames(
        name="image",
        crop=Inception(o.image_area),
        side=o.image_size,
        flip=o.flip,
        gray=o.grayscale,
        colors=_strength(o),
    )
    patches = Frames(
        name="patches",
        crop=Inception(o.patches_area),
        side=o.patches_crop,
        patches=True,
        crop_each=False,
        flip=o.flip,
        flip_each=o.flip_of == "patch",
        gray=o.grayscale if o.patch_colors else 0.0,
        colors=_strength(o) if o.patch_colors else 0.0,
        angle=angle,
        turns=4,
    )
    orders = None if o.permutations is None else permutation_set(cells, o.permutations)
    labels = Labels(
        kind="permutation",
        frames="patches",
        grid=o.grid,
        orders=orders,
        shuffled=o.permutations != 1,
    )
    shapes = {
        "image": _square(o.image_size),
        "patches": (cells, *_square(o.patch)),
        "permutation": (cells,),
        "index": (),
    }
    return Task(shapes | ({} if angle is None else {angle: ()}), (image, patches), (labels,))


def _jigsaw(o: jigsaw.Options) -> Task:
    cells, number = o.grid**2, o.per_image
    patches = Frames(
        name="patches",
        crop=Resized(o.resize, o.crop, o.keep_aspect),
        side=o.crop,
        patches=True,
        crop_each=False,
        flip=o.flip,
        flip_each=False,
        gray=o.grayscale,
        gray_each=o.grayscale_of == "patch",
        colors=_strength(o),
    )
    labels = Labels(
        kind="jigsaw",
        frames="patches",
        grid=o.grid,
        orders=permutation_set(cells, o.permutations, o.distance),
        shuffled=o.shuffle == "pixels",
    )
    shapes = {
        "patches": (cells, *_square(o.patch)),
        "permutation": (cells,),
        "order": (number, cells),
        "label": (number,) if number > 1 else (),
        "index": (),
    }
    return Task(shapes, (patches,), (labels,))


def _relative_patch(o: relative_patch.Options) -> Task:
    count, number = (9, 8) if o.pairs == "all" else (2, 1)
    patches = Frames(
        name="patches",
        crop=Resized(o.resize, o.crop, o.keep_aspect),
        side=o.crop,
        patches=True,
        crop_each=False,
        flip=o.flip,
        flip_each=False,
        gray=o.grayscale,
        gray_each=o.grayscale_of == "patch",
        colors=o.channel_drop,
    )
    labels = Labels(kind="pairs", frames="patches", cell=o.crop // relative_patch.GRID)
    shapes = {
        "patches": (count, *_square(o.patch)),
        "pair": (number, 2),
        "label": (number,) if number > 1 else (),
        "index": (),
    }
    return Task(shapes, (patches,), (labels,))


def _exemplar(o: exemplar.Options) -> Task:
    crop = Inception(o.area, o.aspect)
    if o.geometry == "warp":
        crop = Warp(o.seed_patch, o.scale, o.rotation, o.translation)
    spread = [math.log(ends[1] / ends[0]) for ends in (o.components, o.powers, o.factors)]
    views = Frames(
        name="views",
        crop=crop,
        side=o.size,
        flip=o.flip,
        gray=o.grayscale,
        gray_each=False,
        colors=max(_strength(o), o.offsets, *spread),
    )
    return Task({"views": (o.views, *_square(o.size)), "index": ()}, (views,))


_TASKS: dict[str, Callable[[Any], Task]] = {
    "pipelines.colorization": _colorization,
    "pipelines.exemplar": _exemplar,
    "pipelines.jigsaw": _jigsaw,
    "pipelines.pirl_jigsaw": _pirl_jigsaw,
    "pipelines.pirl_jigsaw_rotation": _pirl_jigsaw_rotation,
    "pipelines.pirl_rotation": _pirl_rotation,
    "pipelines.relative_patch": _relative_patch,
    "pipelines.rotation": _rotation,
    "pipelines.single_view": _single_view,
    "pipelines.two_views": _two_views,
}


def _square(size: int) -> tuple[int, int, int]:
    return (3, size, size)


def _strength(o: Any) -> float:
    return max(o.brightness, o.contrast, o.saturation, o.hue)
