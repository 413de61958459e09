"""One augmented view of an image: for NPID (Wu et al. 2018), and for training with labels.

Random resized crop, flip, colour jitter, grayscale, as NPID's code has them for ImageNet
(lemniscate.pytorch main.py; its cifar.py crops 32 pixels and does not flip).
"""

from dataclasses import dataclass

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side, `flip` and `grayscale` as probabilities."""

    image_size: int = 224
    image_area: tuple[float, float] = (0.2, 1.0)  # VISSL's NPID: 0.08 ... 1
    image_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.4  # of a full turn
    grayscale: float = 0.2  # VISSL's NPID: 0

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: says which number.
        """
        limits.sides(image_size=self.image_size)
        limits.fractions(image_area=self.image_area)
        limits.factors(image_aspect=self.image_aspect)
        limits.probabilities(flip=self.flip)
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
    """Puts out `image` [S, S, 3] and `index` [1]."""
    image = ops.decoded_crop(
        encoded, options.image_size, options.image_area, options.image_aspect, device, options.flip
    )
    return {"image": ops.random_colors(image, options, device), "index": index}
