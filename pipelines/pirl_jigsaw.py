"""An image and nine shuffled patches of it, for PIRL (Misra & van der Maaten 2020, section 3.2).

The image view: random resized crop, flip, colour jitter, grayscale. The patches: another random
crop of at least 60 % of the area, resized to 255 pixels, cut into 3 x 3 cells of 85, a random
64-pixel patch out of each, colours changed for each patch on its own, in a random order.
"""

from dataclasses import dataclass
from typing import Literal

from nvidia.dali.data_node import DataNode

from pipelines import limits, ops, patch_grid
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side. Where the paper is silent, VISSL's pirl_jigsaw_4node counts."""

    image_size: int = 224
    image_area: tuple[float, float] = (0.08, 1.0)  # VISSL; lemniscate's NPID: 0.2 ... 1
    patches_crop: int = 255  # what is cut into cells
    patches_area: tuple[float, float] = (0.6, 1.0)
    grid: int = 3  # cells a side
    patch: int = 64
    flip: float = 0.5  # probability for the image view, and for the crop that becomes patches
    flip_of: Literal["crop", "patch"] = "crop"  # patch: every patch on its own (VISSL); the crop:
    # PyContrast
    patch_colors: bool = True  # of each patch on its own (VISSL); False: none (PyContrast)
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2  # of a full turn: VISSL; PyContrast: 0.4
    grayscale: float = 0.2  # probability, for the image and for each patch
    permutations: int | None = None  # draw from a far-apart set of that many; None: from all 9!

    def __post_init__(self) -> None:
        """Refuses a geometry that does not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.sides(image_size=self.image_size)
        patch_grid.check_geometry(
            crop=self.patches_crop, grid=self.grid, patch=self.patch, name="patches_crop"
        )
        limits.fractions(image_area=self.image_area, patches_area=self.patches_area)
        limits.probabilities(flip=self.flip)
        limits.colors(self)
        orders = patch_grid.orders_of(self.grid)
        if self.permutations is not None and not 1 <= self.permutations <= orders:
            raise ValueError(
                f"permutations ({self.permutations}) must be in 1 ... {orders}, null for all"
            )

    @property
    def classes(self) -> int:
        """It puts out no label."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return max(self.image_size, self.patches_crop)


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `image` [S, S, 3], `patches` [9, p, p, 3], `permutation` [9] and `index` [1].

    `permutation[k]` is the cell, counted row by row, that patch k was cut from.
    """
    decoded = ops.decode(encoded, device)

    image = ops.random_resized_crop(
        decoded, options.image_size, options.image_area, flip=options.flip
    )
    image = ops.random_colors(image, options, device)

    cells = options.grid**2
    permutation = patch_grid.random_permutation(cells, options.permutations)
    crop = ops.random_resized_crop(
        decoded,
        options.patches_crop,
        options.patches_area,
        flip=options.flip if options.flip_of == "crop" else 0.0,
    )
    patches = patch_grid.cut_patches(
        crop,
        permutation,
        cells,
        device,
        crop=options.patches_crop,
        grid=options.grid,
        patch=options.patch,
    )
    patches = change_patches(patches, options, device)

    return {"image": image, "patches": patches, "permutation": permutation, "index": index}


def change_patches(patches: DataNode, options: Options, device: Device) -> DataNode:
    """What happens to each patch on its own: mirrored, other colours."""
    cells = options.grid**2
    if options.flip_of == "patch":
        patches = ops.random_flip(patches, options.flip, device, cells)
    if options.patch_colors:
        patches = ops.random_colors(patches, options, device, cells)
    return patches
