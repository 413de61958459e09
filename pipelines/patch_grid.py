"""Cells of an image and the patches cut out of them: what all tasks on patches share.

The geometry is that of Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4): an image
resized to 292 x 292, a random 255 x 255 of it, 3 x 3 cells of 85 and out of each a patch of 64 at a
random place, so that patches of neighbouring cells lie 0 to 42 pixels apart and no edge runs on
from one to the next. (Noroozi & Favaro 2016 write 225 and cells of 75; their code has 255 and 85.)
"""

import math
from typing import Protocol

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import limits, ops
from pipelines.images import Device, Image
from pipelines.permutations import permutation_set


def check_geometry(
    *,
    crop: int,
    grid: int,
    patch: int,
    gap: int = 0,
    channel_shift: int = 0,
    name: str = "crop",
) -> None:
    """Refuses cells and patches that do not fit; all in pixels a side, `grid` in cells a side.

    Args:
        crop: what is cut into cells.
        grid: cells a side.
        patch: cut out of each cell.
        gap: least number of pixels between patches of neighbouring cells.
        channel_shift: room for the colours to be apart.
        name: of the option that `crop` is.

    Raises:
        ValueError: says which numbers clash.
    """
    limits.sides(**{name: crop})
    limits.at_least(2, grid=grid)
    limits.at_least(4, patch=patch)
    limits.at_least(0, gap=gap, channel_shift=channel_shift)
    if grid > 3:
        raise ValueError(f"grid ({grid}) must be 2 or 3: 4 x 4 cells have too many orders to list")
    if crop % grid:
        near = crop - crop % grid
        raise ValueError(
            f"{name} ({crop}) must be a multiple of grid ({grid}): {near} or {near + grid}"
        )
    cell = crop // grid
    spare = cell - patch - channel_shift
    shifted = f" + channel_shift ({channel_shift})" if channel_shift else ""
    if spare < 0:
        raise ValueError(
            f"patch ({patch}){shifted} must fit in a cell ({cell} = {name} {crop} / grid {grid})"
        )
    if gap > spare:
        raise ValueError(
            f"gap ({gap}) must be at most {spare}, what patch ({patch}){shifted} leaves of a cell "
            f"({cell} = {name} {crop} / grid {grid})"
        )


class Square(Protocol):
    """How an image becomes the square that is cut into cells, as a graph's Options say it."""

    @property
    def resize(self) -> int: ...
    @property
    def crop(self) -> int: ...
    @property
    def keep_aspect(self) -> bool: ...
    @property
    def flip(self) -> float: ...
    @property
    def grayscale(self) -> float: ...
    @property
    def grayscale_of(self) -> str: ...


def check_square(options: Square) -> None:
    """Refuses a crop larger than what it is cut from, and what is no probability.

    Raises:
        ValueError: says which numbers.
    """
    if options.crop > options.resize:
        raise ValueError(f"crop ({options.crop}) must fit in resize ({options.resize})")
    limits.probabilities(flip=options.flip, grayscale=options.grayscale)


def random_square(encoded: Image, options: Square, device: Device) -> DataNode:
    """Uint8 [crop, crop, 3]: resized, cut, mirrored; gray where grayscale is of the whole image."""
    image = ops.resized_crop(
        encoded,
        device,
        resize=options.resize,
        crop=options.crop,
        keep_aspect=options.keep_aspect,
        flip=options.flip,
    )
    if options.grayscale_of == "image":
        image = ops.random_grayscale(image, options.grayscale, device)
    return image


def orders_of(grid: int) -> int:
    """How many orders the cells have."""
    return math.factorial(grid * grid)


def random_permutation(cells: int, count: int | None = None) -> DataNode:
    """An order of `cells` cells, int64 [cells], uniform over all cells! of them or over a set.

    Args:
        cells: 9 for a 3 x 3 grid.
        count: draw from the far-apart set of that many; None: from all.
    """
    if count is not None:
        rows = ops.table(permutation_set(cells, count))
        return fn.cast(rows[ops.integers(count)], dtype=DALIDataType.INT64)
    # The ranks of random keys: a table of all 9! rows would cost seconds at every start. The low
    # digit makes keys distinct: two equal draws (once in 500,000 images) still give an order.
    drawn = fn.random.uniform(range=[0.0, 1.0], shape=[cells])
    keys = fn.cast(drawn * float(2**24), dtype=DALIDataType.INT32) * 16
    keys = keys + ops.table(np.arange(cells, dtype=np.int32))
    smaller = fn.reshape(keys, shape=[1, cells]) < fn.reshape(keys, shape=[cells, 1])
    return fn.reductions.sum(fn.cast(smaller, dtype=DALIDataType.INT64), axes=[1])


def cut_patches(
    image: DataNode,
    cells: np.ndarray | DataNode,
    count: int,
    device: Device,
    *,
    crop: int,
    grid: int,
    patch: int,
    gap: int = 0,
    channel_shift: int = 0,
) -> DataNode:
    """One patch out of each of the listed cells: uint8 FHWC, F = `count`.

    Patch k is cut from cell `cells[k]` (counted row by row). A cell has spare = crop / grid - patch
    - channel_shift pixels more than its patch; in both directions the offset is uniform in
    gap // 2 ... spare - (gap - gap // 2). So patches of neighbouring cells lie gap ... 2 * spare -
    gap pixels apart. Order costs nothing: it only moves where patches are cut.

    Args:
        image: uint8 HWC, `crop` pixels a side.
        cells: int [count]: the same for every image, or drawn on the CPU.
        count: how many are listed.
        device: where the image is.
        crop: pixels a side of the image, a multiple of grid.
        grid: cells a side.
        patch: pixels a side.
        gap: 0 ... spare; with spare itself every patch is the middle of its cell.
        channel_shift: each colour of each patch lies its own 0 ... channel_shift pixels further
            down and right, which hides chromatic aberration (Noroozi & Favaro 2016; code: 2).
    """
    cell = crop // grid
    corners = np.array(
        [(cell * row, cell * column) for row in range(grid) for column in range(grid)], np.int32
    )
    if isinstance(cells, np.ndarray):
        corner = ops.table(corners[cells])
    else:
        by_cell = ops.table(corners)
        corner = fn.stack(*[by_cell[cells[k]] for k in range(count)])
    spare = cell - patch - channel_shift
    start = corner + ops.integers(spare - gap + 1, shape=[count, 2]) + gap // 2
    start = fn.reshape(start, shape=[count, 1, 2])
    colors = 1
    if channel_shift:
        colors = 3
        start = start + ops.integers(channel_shift + 1, shape=[count, 3, 2])
    return ops.cut(image, patch, start, count, colors, device)
