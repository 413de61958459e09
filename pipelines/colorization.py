"""One image in colour, for colorization (Zhang et al. 2016); the objective takes the colour off.

Lab is computed on the training device, from the bytes put out here: on the CPU backend of DALI it
costs 8 ms an image of 224 pixels, in PyTorch a fifth of that, and on a GPU next to nothing.
"""

from dataclasses import dataclass
from typing import Literal

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side.

    Attributes:
        image_size: 176 in models/colorization_train_val_v2.prototxt of richzhang/colorization, the
            paper's network; 180 and 227 in the authors' AlexNets.
        crop: whole takes `image_size` at a random place of the image whose short side is `resize`,
            as the authors do; inception a random part of `image_area`, resized, as others do since
            (Goyal et al. 2019).
        resize: of the short side, for whole; the authors' LMDB holds images of 256.
        image_area: least and greatest fraction of the image, for inception.
        flip: probability of mirroring left and right.
    """

    image_size: int = 176
    crop: Literal["whole", "inception"] = "whole"
    resize: int = 256
    image_area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        """Refuses a geometry that does not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.sides(image_size=self.image_size)
        if self.crop == "whole" and self.image_size > self.resize:
            raise ValueError(f"image_size ({self.image_size}) must fit in resize ({self.resize})")
        limits.fractions(image_area=self.image_area)
        limits.probabilities(flip=self.flip)

    @property
    def classes(self) -> int:
        """It puts out no label: the colours are the label."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.resize if self.crop == "whole" else self.image_size


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `image` [S, S, 3] and `index` [1]."""
    if options.crop == "whole":
        image = ops.resized_crop(
            encoded,
            device,
            resize=options.resize,
            crop=options.image_size,
            keep_aspect=True,
            flip=options.flip,
        )
    else:
        image = ops.decoded_crop(
            encoded, options.image_size, options.image_area, (3 / 4, 4 / 3), device, options.flip
        )
    return {"image": image, "index": index}
