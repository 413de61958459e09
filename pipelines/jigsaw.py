"""Nine patches and orders to tell apart: a jigsaw (Noroozi & Favaro 2016; Kolesnikov et al. 2019).

Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4): each image is resized to 292 x 292, a
random 255 x 255 of it cut into 3 x 3 cells, a random 64 x 64 patch cut from each, each patch turned
gray with probability 2/3. The network has to name the order of the patches out of a set of 100.

Either the pixels are shuffled, one order an image, or the patches stay in the order of their cells
and the head joins their features in several orders, which costs next to nothing.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import limits, ops, patch_grid
from pipelines.images import Device, Image
from pipelines.permutations import permutation_set


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side; K19 is Kolesnikov et al. 2019, by their paper unless code is said."""

    resize: int = 292  # what the image is resized to
    keep_aspect: bool = False  # True: resize is the short side's, as Noroozi's and VISSL's code
    # does with 256; False: the image is squeezed to a square (K19's code)
    crop: int = 255  # a random part, cut into cells
    grid: int = 3  # cells a side
    patch: int = 64
    gap: int = 0  # least pixels between patches of neighbouring cells; K19: 0, so 0 ... 42 apart.
    # All that a cell has to spare (85 - 64 = 21): each patch is the middle of its cell
    channel_shift: int = 0  # pixels; Noroozi's code: 2, each colour of each patch on its own
    flip: float = 0.0  # probability, of the whole image; VISSL: 0.5
    grayscale: float = 2 / 3  # probability; VISSL and K19's code: 0.66, Noroozi's code: 0.5
    grayscale_of: Literal["patch", "image"] = "patch"  # each patch on its own; VISSL and K19's
    # code: the whole image
    brightness: float = 0.0  # jitter of each patch, as in ops.color_jitter; nobody's default
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # of a full turn
    permutations: int = 100  # the set's size; VISSL: 2000
    distance: Literal["mean", "min"] = "mean"  # what the set is greedy for, see permutations.py
    shuffle: Literal["features", "pixels"] = "features"  # pixels: Noroozi and VISSL
    per_image: int = 16  # orders an image (K19's supplement; their code: 8); 1 for pixels
    orders_of: Literal["image", "batch"] = "image"  # each image draws its own (K19's supplement);
    # batch: one draw a step for all images of a process (K19's code, jigsaw.py:47-59)

    def __post_init__(self) -> None:
        """Refuses a geometry that does not fit and orders that do not exist.

        Raises:
            ValueError: says which numbers clash.
        """
        patch_grid.check_geometry(
            crop=self.crop,
            grid=self.grid,
            patch=self.patch,
            gap=self.gap,
            channel_shift=self.channel_shift,
        )
        patch_grid.check_square(self)
        limits.colors(self)
        orders = patch_grid.orders_of(self.grid)
        if not 2 <= self.permutations <= orders:
            raise ValueError(f"permutations ({self.permutations}) must be in 2 ... {orders}")
        if self.shuffle == "pixels" and self.per_image != 1:
            raise ValueError(
                f"per_image ({self.per_image}) must be 1 with shuffle 'pixels': patches can be put "
                "in one order only"
            )
        if self.shuffle == "pixels" and self.orders_of == "batch":
            raise ValueError(
                "orders_of ('batch') must be 'image' with shuffle 'pixels': a step would have one "
                "label only"
            )
        if not 1 <= self.per_image <= self.permutations:
            raise ValueError(
                f"per_image ({self.per_image}) must be in 1 ... permutations ({self.permutations})"
            )

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.resize

    @property
    def classes(self) -> int:
        """How many values `label` takes."""
        return self.permutations


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `patches` [9, p, p, 3], `permutation` [9], `order` [N, 9], `label` [N], `index` [1].

    Patch k was cut from cell `permutation[k]`, counted row by row; joined in `order[n]`, the
    patches come in the order of the cells that the set's row `label[n]` lists:
    permutation[order[n]] is that row. The N labels of an image differ; with orders_of "batch" all
    images of a batch have the same.
    """
    cells = options.grid**2
    orders = ops.table(permutation_set(cells, options.permutations, options.distance))
    in_place = np.arange(cells)  # a table of int64 comes out as int32: cast what is put out
    if options.shuffle == "pixels":
        drawn = ops.integers(options.permutations)
        permutation = cut_from = fn.cast(orders[drawn], dtype=DALIDataType.INT64)
        order = fn.cast(ops.table(in_place[None]), dtype=DALIDataType.INT64)
        label = fn.reshape(fn.cast(drawn, dtype=DALIDataType.INT64), shape=[1])
    else:
        permutation = fn.cast(ops.table(in_place), dtype=DALIDataType.INT64)
        cut_from = in_place
        label = _distinct_labels(options.permutations, options.per_image)
        if options.orders_of == "batch":  # all images get what the first one drew
            label = fn.permute_batch(label, indices=ops.table(np.array(0, np.int32)))
        rows = [orders[label[n]] for n in range(options.per_image)]
        order = fn.cast(fn.stack(*rows), dtype=DALIDataType.INT64)

    image = patch_grid.random_square(encoded, options, device)
    patches = patch_grid.cut_patches(
        image,
        cut_from,
        cells,
        device,
        crop=options.crop,
        grid=options.grid,
        patch=options.patch,
        gap=options.gap,
        channel_shift=options.channel_shift,
    )
    patches = ops.color_jitter(
        patches,
        device,
        brightness=options.brightness,
        contrast=options.contrast,
        saturation=options.saturation,
        hue=options.hue,
        grayscale=options.grayscale if options.grayscale_of == "patch" else 0.0,
        patches=cells,
    )

    return {
        "patches": patches,
        "permutation": permutation,
        "order": order,
        "label": label,
        "index": index,
    }


def _distinct_labels(classes: int, count: int) -> DataNode:
    """`count` different labels, int64 [count], each uniform over all `classes`.

    The classes, in a ring, are cut into `count` runs at a random place, and one is drawn from each.
    K19's code shuffles all of them and takes the first: there any subset is as likely as another,
    here one label of each run, whose members have no more in common than any others. Shuffling
    2,000 labels for every image would cost more than its patches.
    """
    edges = classes * np.arange(count + 1) // count
    widths = ops.table(np.diff(edges).astype(np.float32))
    within = fn.random.uniform(range=[0.0, 1.0], shape=[count]) * widths
    # a cast alone would round to the nearest
    position = fn.cast(math.floor(within), dtype=DALIDataType.INT64) + ops.table(edges[:-1])
    position = position + ops.integers(classes)
    return position - classes * fn.cast(position >= classes, dtype=DALIDataType.INT64)
