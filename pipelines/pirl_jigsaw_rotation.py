"""An image and nine shuffled, turned patches of it (PIRL, Misra & van der Maaten 2020, table 5).

As pipelines.pirl_jigsaw, whose options these are; the crop that becomes patches is first turned by
0, 90, 180 or 270 degrees, so that cells are counted in the turned crop.
"""

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines import ops, patch_grid, pirl_jigsaw
from pipelines.images import Device, Image

Options = pirl_jigsaw.Options


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `image` [S, S, 3], `patches` [9, p, p, 3], `permutation` [9], `angle`, `index` [1].

    `permutation[k]` is the cell, counted row by row in the turned crop, that patch k was cut from;
    `angle` counts degrees counter-clockwise.
    """
    decoded = ops.decode(encoded, device)

    image = ops.random_resized_crop(
        decoded, options.image_size, options.image_area, flip=options.flip
    )
    image = ops.random_colors(image, options, device)

    cells = options.grid**2
    permutation = patch_grid.random_permutation(cells, options.permutations)
    turns = ops.integers(4, shape=[1])
    crop = ops.random_resized_crop(
        decoded,
        options.patches_crop,
        options.patches_area,
        flip=options.flip if options.flip_of == "crop" else 0.0,
    )
    crop = ops.quarter_turn(crop, turns[0], device)
    patches = patch_grid.cut_patches(
        crop,
        permutation,
        cells,
        device,
        crop=options.patches_crop,
        grid=options.grid,
        patch=options.patch,
    )
    patches = pirl_jigsaw.change_patches(patches, options, device)

    return {
        "image": image,
        "patches": patches,
        "permutation": permutation,
        "angle": fn.cast(turns * 90, dtype=DALIDataType.INT64),
        "index": index,
    }
