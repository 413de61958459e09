"""Nine patches of the image, as probes of networks that were trained on patches see it.

Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4): the short side is resized to 224, the
central 192 x 192 cut into 3 x 3 cells of 64, in colour and without jitter; the representation is
the mean over the nine. All of the crop is seen, where training leaves gaps.
"""

from dataclasses import dataclass

import numpy as np
from nvidia.dali.data_node import DataNode

from pipelines import limits, ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side; a patch is crop / grid."""

    resize: int = 224  # of the short side
    crop: int = 192  # the middle, cut into cells
    grid: int = 3  # cells a side

    def __post_init__(self) -> None:
        """Refuses cells that do not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.at_least(1, grid=self.grid)
        if self.crop % self.grid:
            near = self.crop - self.crop % self.grid
            raise ValueError(
                f"crop ({self.crop}) must be a multiple of grid ({self.grid}): {near} or "
                f"{near + self.grid}"
            )
        if self.crop < 8 * self.grid:
            raise ValueError(f"crop ({self.crop}) must be at least 8 x grid ({8 * self.grid})")
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
    """Puts out `patches` [grid^2, p, p, 3], row by row, `image` [crop, crop, 3] and `index` [1].

    The image is what the patches are cut from, to be looked at.
    """
    image = ops.center_crop(ops.decode(encoded, device), options.resize, options.crop)
    patch, cells = options.crop // options.grid, options.grid**2
    rows, columns = np.divmod(np.arange(cells, dtype=np.int32), options.grid)
    corners = ops.table((np.stack([rows, columns], axis=1) * patch).reshape(cells, 1, 2))
    patches = ops.cut(image, patch, corners, cells, 1, device)
    return {"patches": patches, "image": image, "index": index}
