"""Two augmented views of an image, drawn alike, for MoCo v2 (Chen et al. 2020, arXiv:2003.04297).

Random resized crop, colour jitter with a probability, grayscale, Gaussian blur with a probability,
flip, in that order, as in the authors' code (facebookresearch/moco main_moco.py, --aug-plus).
"""

from dataclasses import dataclass

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import limits, ops


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side; what is called a probability is drawn for each view on its own."""

    image_size: int = 224
    image_area: tuple[float, float] = (0.2, 1.0)
    image_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter: float = 0.8  # probability of the four that follow
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # of a full turn
    grayscale: float = 0.2  # probability
    blur: float = 0.5  # probability; on a CPU, half of what the graph costs: 7 of 13 ms at 224
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    flip: float = 0.5  # probability

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: says which number.
        """
        limits.at_least(8, image_size=self.image_size)
        limits.fractions(image_area=self.image_area)
        limits.factors(image_aspect=self.image_aspect, blur_sigma=self.blur_sigma)
        limits.probabilities(jitter=self.jitter, blur=self.blur, flip=self.flip)
        limits.colors(self)

    @property
    def classes(self) -> int:
        """It puts out no label."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.image_size


def graph(
    encoded: DataNode, index: DataNode, options: Options, device: ops.Device
) -> dict[str, DataNode]:
    """Puts out `query` and `key`, both [S, S, 3], and `index` [1]; the image is decoded once."""
    pixels = ops.decode(encoded, device)
    return {
        "query": _view(pixels, options, device),
        "key": _view(pixels, options, device),
        "index": index,
    }


def _view(pixels: DataNode, options: Options, device: ops.Device) -> DataNode:
    view = ops.random_resized_crop(
        pixels, options.image_size, options.image_area, options.image_aspect
    )
    view = _jitter(view, options)
    view = ops.random_grayscale(view, options.grayscale, device)
    view = _blur(view, options)
    return ops.random_flip(view, options.flip)


def _jitter(image: DataNode, options: Options) -> DataNode:
    """Colour jitter as in `ops`, whose factors are those of no change where the coin says so."""
    spreads = (options.brightness, options.contrast, options.saturation, options.hue)
    if options.jitter == 0 or not any(spreads):
        return image
    happens = fn.random.coin_flip(probability=options.jitter)

    def factor(spread: float) -> DataNode | float:
        if spread == 0:  # DALI refuses to draw from an empty range
            return 1.0
        drawn = fn.random.uniform(range=[max(0.0, 1 - spread), 1 + spread])
        return happens * (drawn - 1.0) + 1.0

    brightness, contrast = factor(options.brightness), factor(options.contrast)
    if options.saturation == options.hue == 0:  # the cheaper operator
        return fn.brightness_contrast(image, brightness=brightness, contrast=contrast)
    turn = 360 * options.hue  # degrees
    hue = happens * fn.random.uniform(range=[-turn, turn]) if turn else 0.0
    return fn.color_twist(
        image,
        brightness=brightness,
        contrast=contrast,
        saturation=factor(options.saturation),
        hue=hue,
    )


def _blur(image: DataNode, options: Options) -> DataNode:
    """Gaussian blur of a random width, cut off at three sigma.

    A window of one pixel changes nothing and costs next to nothing: so the part of the views that
    is left sharp is not paid for.
    """
    if options.blur == 0:
        return image
    low, high = options.blur_sigma
    sigma = fn.random.uniform(range=[low, high]) if low < high else high
    sharp = fn.random.coin_flip(probability=1 - options.blur, dtype=DALIDataType.INT32)
    return fn.gaussian_blur(image, sigma=sigma, window_size=sharp)  # 0: as wide as sigma asks
