"""A random crop of the resized image, as it is: for linear probes that train on augmented images.

K19 (Kolesnikov et al. 2019) trains its linear models by SGD on these: short side to 256, a random
224 x 224 of it, no flip and no colours (config/evaluation/*.sh: resize_small 256, crop 224).
"""

from dataclasses import dataclass

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side, `flip` as a probability."""

    resize: int = 256  # of the short side
    crop: int = 224
    flip: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.sides(crop=self.crop)
        limits.probabilities(flip=self.flip)
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
    image = ops.resized_crop(
        encoded,
        device,
        resize=options.resize,
        crop=options.crop,
        keep_aspect=True,
        flip=options.flip,
    )
    return {"image": image, "index": index}
