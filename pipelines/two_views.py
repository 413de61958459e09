"""Two augmented views of an image, drawn alike, for MoCo v2 (Chen et al. 2020, arXiv:2003.04297).

Random resized crop, colour jitter with a probability, grayscale, Gaussian blur with a probability,
flip, in that order, as in the authors' code (facebookresearch/moco main_moco.py, --aug-plus).
"""

from dataclasses import dataclass

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Decoded, Device, Image


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
    blur: float = 0.5  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    flip: float = 0.5  # probability

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: says which number.
        """
        limits.sides(image_size=self.image_size)
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


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `query` and `key`, both [S, S, 3], and `index` [1]; the image is decoded once."""
    decoded = ops.decode(encoded, device)
    return {
        "query": _view(decoded, options, device),
        "key": _view(decoded, options, device),
        "index": index,
    }


def _view(decoded: Decoded, options: Options, device: Device) -> DataNode:
    """Mirrored with the crop: neither colours nor blur know left from right."""
    view = ops.random_resized_crop(
        decoded, options.image_size, options.image_area, options.image_aspect, options.flip
    )
    view = ops.color_jitter(
        view,
        device,
        brightness=options.brightness,
        contrast=options.contrast,
        saturation=options.saturation,
        hue=options.hue,
        grayscale=options.grayscale,
        probability=options.jitter,
    )
    return ops.random_blur(view, options.blur_sigma, options.blur, device)
