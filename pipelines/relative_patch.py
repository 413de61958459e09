"""Which neighbour is it? A patch and the one in the centre (Doersch, Gupta & Efros 2015).

The geometry is jigsaw's, as in Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4): 292 x
292, a random 255 x 255 of it, 3 x 3 cells of 85, patches of 64, gray with probability 2/3, and all
8 pairs of an image. Doersch cut one pair of patches of 96, 48 apart with a jitter of up to 7 for
each, from images of 150,000 to 450,000 pixels: crop 432 (cells of 144), patch 96, gap 34.

What a network could read instead of content, edges that run on and the lens's chromatic aberration,
is hidden by the gap, by gray patches, and by three options of Doersch's and Noroozi's.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from pipelines import limits, ops, patch_grid
from pipelines.images import Device, Image

GRID = 3  # cells a side
CENTER = 4
NEIGHBORS = np.array([0, 1, 2, 3, 5, 6, 7, 8])  # the cell of each label, row by row
FEWEST = 10 / 96  # of a side: Doersch shrinks patches of 96 x 96 to as little as 100 pixels


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side; K19 is Kolesnikov et al. 2019, by their paper unless code is said."""

    resize: int = 292  # what the image is resized to
    keep_aspect: bool = False  # True: resize is the short side's; False: the image is squeezed to a
    # square (K19's code)
    crop: int = 255  # a random part, cut into 3 x 3 cells
    patch: int = 64
    gap: int = 0  # least pixels between patches of neighbouring cells; K19: 0, so 0 ... 42 apart.
    # Doersch: 34 (... 62) with patches of 96 in a crop of 432. All that a cell has to spare
    # (85 - 64 = 21): each patch is the middle of its cell
    flip: float = 0.0  # probability, of the whole image
    grayscale: float = 2 / 3  # probability; K19's code: 0.66
    grayscale_of: Literal["patch", "image"] = "patch"  # each patch on its own; K19's code: image
    pairs: Literal["all", "one"] = "all"  # of an image: 8 of K19, or one at random (Doersch)
    channel_shift: int = 0  # pixels, each colour of each patch on its own; Noroozi & Favaro: 2
    channel_drop: float = 0.0  # probability, of each patch, that two of its colours become noise
    # about mid-gray of a hundredth of the third's spread (Doersch et al. 2015, section 4.1)
    downsample: float = 0.0  # probability, of each patch, of being shrunk and enlarged again
    # (Doersch et al. 2015, section 4.1; their code: 0.33)

    def __post_init__(self) -> None:
        """Refuses a geometry that does not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        patch_grid.check_geometry(
            crop=self.crop,
            grid=GRID,
            patch=self.patch,
            gap=self.gap,
            channel_shift=self.channel_shift,
        )
        patch_grid.check_square(self)
        limits.probabilities(channel_drop=self.channel_drop, downsample=self.downsample)

    @property
    def largest_crop(self) -> int:
        """Pixels a side that an image is resized to; smaller images are enlarged."""
        return self.resize

    @property
    def classes(self) -> int:
        """How many values `label` takes."""
        return len(NEIGHBORS)


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `patches` [F, p, p, 3], `pair` [N, 2], `label` [N] and `index` [1].

    `pair[n]` are the positions in `patches` of a neighbour and of the centre; `label[n]` is the
    neighbour's rank, 0 ... 7, row by row. All pairs: F = 9 patches in the order of their cells and
    N = 8. One: the neighbour and the centre, F = 2 and N = 1.
    """
    each_pair = np.stack([NEIGHBORS, np.full_like(NEIGHBORS, CENTER)], axis=1)
    if options.pairs == "all":
        count = GRID**2
        cells = np.arange(count)
        pair, label = ops.table(each_pair), ops.table(np.arange(len(NEIGHBORS)))
    else:
        count = 2
        drawn = ops.integers(len(NEIGHBORS))
        cells = ops.table(each_pair)[drawn]
        pair, label = ops.table(np.array([[0, 1]])), fn.reshape(drawn, shape=[1])

    image = patch_grid.random_square(encoded, options, device)
    patches = patch_grid.cut_patches(
        image,
        cells,
        count,
        device,
        crop=options.crop,
        grid=GRID,
        patch=options.patch,
        gap=options.gap,
        channel_shift=options.channel_shift,
    )
    if options.grayscale_of == "patch":
        patches = ops.random_grayscale(patches, options.grayscale, device, count)
    patches = _drop_channels(patches, options, device, count)
    patches = _downsample(patches, options, count)

    return {
        "patches": patches,
        "pair": fn.cast(pair, dtype=DALIDataType.INT64),
        "label": fn.cast(label, dtype=DALIDataType.INT64),
        "index": index,
    }


def _drop_channels(patches: DataNode, options: Options, device: Device, count: int) -> DataNode:
    """Leaves one colour of a patch and puts noise about mid-gray for the two others, at random."""
    if options.channel_drop == 0:
        return patches
    side = options.patch
    coin = fn.random.coin_flip(probability=options.channel_drop, shape=[count, 1, 1, 1])
    kept = ops.integers(3, shape=[count, 1, 1, 1])
    color = ops.table(np.arange(3, dtype=np.int32).reshape(1, 1, 1, 3))
    is_kept = fn.cast(color == kept, dtype=DALIDataType.FLOAT)
    dropped = ops.on(fn.cast(coin * (color != kept), dtype=DALIDataType.UINT8), device)
    mean = fn.reductions.mean(patches, axes=[1, 2], keep_dims=True)
    spread = fn.reductions.std_dev(patches, mean, axes=[1, 2], keep_dims=True)
    spread = fn.reductions.sum(spread * ops.on(is_kept, device), axes=[3], keep_dims=True)
    # drawn on the CPU like all that is random, so that both backends put out the same; once for all
    # patches of an image, because a million draws for a batch cost more than all else here
    noise = ops.on(fn.random.normal(shape=[1, side, side, 3], dtype=DALIDataType.FLOAT), device)
    noise = fn.cast_like(noise * (spread / 100) + 128.0, patches)
    return patches * (Constant(1).uint8() - dropped) + noise * dropped


def _downsample(patches: DataNode, options: Options, count: int) -> DataNode:
    """Shrinks patches to a random side and enlarges them again, at random; bilinear."""
    if options.downsample == 0:
        return patches
    side = options.patch
    fewest = max(2, round(FEWEST * side))
    coin = fn.random.coin_flip(
        probability=options.downsample, shape=[count], dtype=DALIDataType.INT32
    )
    to = side - coin * (ops.integers(side - fewest, shape=[count]) + 1)  # fewest ... side - 1
    to = fn.cast(to, dtype=DALIDataType.FLOAT)
    shrunk = [_resize(patches[k], fn.stack(to[k], to[k])) for k in range(count)]
    return fn.stack(*[_resize(patch, [side, side]) for patch in shrunk], axis=0, axis_name="F")


def _resize(image: DataNode, size: DataNode | list[int]) -> DataNode:
    resized = fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    assert isinstance(resized, DataNode)  # one image in, one out
    return resized
