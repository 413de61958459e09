"""Several random views of one image, which is the class: exemplar learning.

Two geometries. `crop`: random resized crops, flips and colours as Kolesnikov, Zhai & Beyer 2019
(K19) take them from the Inception networks. `warp`: the transformations of Dosovitskiy et al. 2014
("Creating Surrogate Training Data"): translation, scale and rotation around a seed, two kinds of
contrast, and hue.
Dosovitskiy's seeds are 32-pixel patches found by their gradients, many in an image and each a class
of its own. Here the image is the class, as in K19, and its one seed the square in its middle.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import limits, ops
from pipelines.images import Decoded, Device, Image

MOST_VIEWS = 1024  # each is operators of the graph
# Mean colour (0 ... 255) and principal components (rows) of ImageNet's pixels, the ones that
# AlexNet's colour changes are commonly done with. Dosovitskiy computes his own from his patches.
MEAN = np.array([123.7, 116.3, 103.5], np.float32)
COMPONENTS = np.array(
    [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]],
    np.float32,
)
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Options:
    """K19's settings; where the paper is silent those of its code, which uses slim's Inception.

    Attributes:
        views: K, of one image.
        size: pixels a side of a view.
        geometry: crop or warp.
        area: crop: of the image, slim's distorted bounding box.
        aspect: crop: width / height.
        seed_patch: warp: side of the seed as a part of the image's short side; the paper's 32 of
            STL-10's 96 pixels.
        translation: warp: up to that part of the seed's side, in both directions.
        scale: warp: side of what is seen, in seeds; log-uniform.
        rotation: warp: up to that many degrees either way.
        flip: probability, for each view.
        grayscale: probability that the whole image turns gray before views are cut; K19's paper
            does not mention it, the code has 0.66 (config/exemplar/imagenet.sh:32-37), and takes
            the mean of red, green and blue where this takes their luma.
        brightness: factor 1 -+ that, for each view; slim adds up to 32 / 255 instead.
        contrast: likewise; slim's slow mode 0.5 ... 1.5, its fast one, which is K19's, none.
        saturation: likewise, slim's 0.5 ... 1.5 in both modes.
        hue: up to that part of a full turn either way; slim's slow mode 0.2, its fast one none.
        components: contrast 1 of Dosovitskiy, (0.5, 2): factor of each principal component of the
            colours, log-uniform; (1, 1) is off, as all that follow.
        powers: contrast 2, (0.25, 4): saturation and value in 0 ... 1 are raised to it, each to
            its own, log-uniform. A gray pixel stays gray.
        factors: then multiplied, (0.7, 1.4), log-uniform.
        offsets: then added, up to 0.1 either way.
    """

    views: int = 8
    size: int = 224
    geometry: Literal["crop", "warp"] = "crop"
    area: Range = (0.05, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    seed_patch: float = 1 / 3
    translation: float = 0.2
    scale: Range = (0.7, 1.4)
    rotation: float = 20.0
    flip: float = 0.5
    grayscale: float = 0.66
    brightness: float = 32 / 255
    contrast: float = 0.0
    saturation: float = 0.5
    hue: float = 0.0
    components: Range = (1.0, 1.0)
    powers: Range = (1.0, 1.0)
    factors: Range = (1.0, 1.0)
    offsets: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn or does not fit.

        Raises:
            ValueError: names the option and its value.
        """
        limits.at_least(1, views=self.views)
        if self.views > MOST_VIEWS:
            raise ValueError(f"views ({self.views}) must be at most {MOST_VIEWS}")
        limits.sides(size=self.size)
        limits.fractions(area=self.area)
        limits.factors(
            aspect=self.aspect,
            scale=self.scale,
            components=self.components,
            powers=self.powers,
            factors=self.factors,
        )
        if not 0 < self.seed_patch <= 1:
            raise ValueError(f"seed_patch ({self.seed_patch}) must be above 0 and at most 1")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation ({self.rotation}) must be in degrees, 0 ... 180")
        limits.at_least(0, translation=self.translation, offsets=self.offsets)
        limits.probabilities(flip=self.flip)
        limits.colors(self)
        # A key that nobody reads would pass for a setting that was tried.
        unread = ("area", "aspect")
        if self.geometry == "crop":
            unread = ("seed_patch", "translation", "scale", "rotation")
        default: dict[str, Any] = {field.name: field.default for field in fields(self)}
        for name in unread:
            # close to: 1 / 3 cannot be written in a recipe
            if not np.allclose(vars(self)[name], default[name], rtol=1e-5):
                raise ValueError(
                    f"{name} ({vars(self)[name]}) must be left at {default[name]}: it is not read "
                    f"with geometry {self.geometry}"
                )

    @property
    def classes(self) -> int:
        """It puts out no label: the class is the image, `index`."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.size if self.geometry == "crop" else round(self.size / self.seed_patch)

    @property
    def region(self) -> float:
        """What all warps together can see, a square, as a part of the image's short side."""
        turn = math.radians(min(self.rotation, 45.0))
        seen = self.scale[1] * (math.cos(turn) + math.sin(turn)) + 2 * self.translation
        return min(1.0, seen * self.seed_patch)


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `views` [K, S, S, 3], each drawn on its own, and `index` [1]."""
    decoded = ops.decode(encoded, device)
    if options.geometry == "crop":
        # one draw for all views: a gray view among coloured ones is another task
        pixels = ops.random_grayscale(decoded.pixels, options.grayscale, device)
        decoded = replace(decoded, pixels=pixels)
        views = ops.random_resized_crops(
            decoded, options.views, options.size, options.area, options.aspect, options.flip
        )
    else:
        region = ops.random_grayscale(_middle(decoded, options), options.grayscale, device)
        warped = [
            ops.random_flip(_warped(region, options, device), options.flip)
            for _ in range(options.views)
        ]
        views = fn.stack(*warped, axis=0, axis_name="F")
    if options.components != (1.0, 1.0):
        views = _scale_components(views, options)
    if options.powers != (1.0, 1.0) or options.factors != (1.0, 1.0) or options.offsets != 0:
        views = _change_saturation_and_value(views, options, device)
    views = ops.color_jitter(
        views,
        device,
        brightness=options.brightness,
        contrast=options.contrast,
        saturation=options.saturation,
        hue=options.hue,
        patches=options.views,
    )
    return {"views": views, "index": index}


def _middle(image: Decoded, options: Options) -> DataNode:
    """The square that warps can see, at the resolution of the views: a seed is `size` pixels.

    Resized once with antialiasing, so that a warp, which has none, shrinks by the scale at most.
    """
    middle = fn.cast(image.size, dtype=DALIDataType.FLOAT) / 2
    half = fn.reductions.min(middle, axes=[0]) * options.region
    return ops.resize_region(image, _region_pixels(options), middle - half, middle + half)


def _region_pixels(options: Options) -> int:
    return round(options.size * options.region / options.seed_patch)


def _warped(region: DataNode, options: Options, device: Device) -> DataNode:
    """One view: the seed moved, scaled and turned; beyond the region its border goes on."""
    size, side = options.size, _region_pixels(options)
    seed = (
        side * options.seed_patch / options.region
    )  # pixels of the region; `size`, but for rounding
    # From a place in the view to one in the region, both in pixels from the upper left corner.
    matrix = fn.transforms.translation(offset=[-size / 2, -size / 2])
    scale = _log_uniform(options.scale) * (seed / size)
    matrix = fn.transforms.scale(matrix, scale=fn.stack(scale, scale))
    matrix = fn.transforms.rotation(matrix, angle=_uniform(-options.rotation, options.rotation))
    moved = _uniform(-options.translation * seed, options.translation * seed, shape=[2])
    matrix = fn.transforms.translation(matrix, offset=moved + side / 2)
    return fn.warp_affine(region, ops.on(matrix, device), size=[size, size])


def _scale_components(views: DataNode, options: Options) -> DataNode:
    """Contrast 1: colours stretched about their mean along their principal components."""
    factors = _log_uniform(options.components, shape=[options.views, 3])
    outer = ops.table(np.einsum("ci,cj->cij", COMPONENTS, COMPONENTS))
    matrix = fn.reductions.sum(
        fn.reshape(factors, shape=[options.views, 3, 1, 1]) * outer, axes=[1]
    )  # [K, 3, 3]
    kept = (ops.table(np.eye(3, dtype=np.float32)) - matrix) * ops.table(MEAN.reshape(1, 1, 3))
    return fn.coord_transform(
        views,
        M=fn.per_frame(matrix),
        T=fn.per_frame(fn.reductions.sum(kept, axes=[2])),
        dtype=DALIDataType.UINT8,
    )


def _change_saturation_and_value(views: DataNode, options: Options, device: Device) -> DataNode:
    """Contrast 2: S and V of HSV each to a power, times a factor, plus an offset."""

    def draw() -> DataNode:
        count = [options.views]
        return fn.stack(
            _log_uniform(options.powers, count),
            _log_uniform(options.factors, count),
            _uniform(-options.offsets, options.offsets, count),
            axis=1,
        )

    value = draw()
    return ops.change_saturation_and_value(views, draw(), value, options.views, device)


def _uniform(low: float, high: float, shape: list[int] | None = None) -> DataNode:
    """A float32 for each image, or as many as `shape` says."""
    if low == high:  # DALI refuses to draw from an empty range
        return ops.table(np.full(shape or [], low, np.float32))
    if shape is None:
        return fn.random.uniform(range=[low, high])
    return fn.random.uniform(range=[low, high], shape=shape)


def _log_uniform(ends: Range, shape: list[int] | None = None) -> DataNode:
    # the papers give ends only; theirs are as far below 1 as above, counted in factors
    return dali_math.exp(_uniform(math.log(ends[0]), math.log(ends[1]), shape))
