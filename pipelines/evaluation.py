"""The image as probes see it, and as whoever loads the backbone should prepare it.

Resize of the short side, then the middle: torchvision's Resize(resize, interpolation) and
CenterCrop(crop), antialiased. `tests/test_evaluation.py` bounds the difference.
"""

from dataclasses import dataclass

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side, and how pixels are made of others."""

    resize: int = 256  # of the short side
    crop: int = 224
    interpolation: ops.Interpolation = "bilinear"

    def __post_init__(self) -> None:
        """Refuses a crop that does not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.sides(crop=self.crop)
        if self.crop > self.resize:
            raise ValueError(f"crop ({self.crop}) must fit in resize ({self.resize})")
        limits.sides(resize=self.resize)

    @property
    def classes(self) -> int:
        """It puts out no label."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.resize


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `image` [crop, crop, 3] and `index` [1]."""
    decoded = ops.decode(encoded, device)
    image = ops.center_crop(decoded, options.resize, options.crop, options.interpolation)
    return {"image": image, "index": index}
