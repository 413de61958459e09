"""An image and another, turned view of it, for PIRL (Misra & van der Maaten 2020, section 3.2).

Both views: random resized crop, flip, colour jitter, grayscale. The second is then turned by 0, 90,
180 or 270 degrees.
"""

from dataclasses import dataclass

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import limits, ops
from pipelines.images import Decoded, Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side. Where the paper is silent, VISSL's pirl_jigsaw_4node counts."""

    image_size: int = 224
    image_area: tuple[float, float] = (0.08, 1.0)  # of both views
    flip: float = 0.5  # probability, before turning
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2  # of a full turn
    grayscale: float = 0.2  # probability

    def __post_init__(self) -> None:
        """Refuses what is out of range.

        Raises:
            ValueError: says which number.
        """
        limits.sides(image_size=self.image_size)
        limits.fractions(image_area=self.image_area)
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
    """Puts out `image` and `turned` [S, S, 3], `angle` [1] and `index` [1].

    `angle` counts degrees counter-clockwise.
    """
    decoded = ops.decode(encoded, device)
    turns = ops.integers(4, shape=[1])
    return {
        "image": _view(decoded, options, device),
        "turned": ops.quarter_turn(_view(decoded, options, device), turns[0], device),
        "angle": fn.cast(turns * 90, dtype=DALIDataType.INT64),
        "index": index,
    }


def _view(decoded: Decoded, options: Options, device: Device) -> DataNode:
    """A random part of the image in other colours."""
    view = ops.random_resized_crop(
        decoded, options.image_size, options.image_area, flip=options.flip
    )
    return ops.random_colors(view, options, device)
