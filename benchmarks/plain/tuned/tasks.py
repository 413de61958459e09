"""The graphs' tasks, one function a graph file: from a decoded image to all outputs but index.

Sizes, areas, probabilities and strengths are those of the graph's Options. All that is random is
drawn from the generator of `random`, which is the quickest for a few numbers.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.tuned import pixels
from pipelines import (
    colorization,
    exemplar,
    jigsaw,
    pirl_jigsaw,
    pirl_rotation,
    relative_patch,
    rotation,
    single_view,
    two_views,
)
from pipelines.patch_grid import Square
from pipelines.permutations import Distance, permutation_set

Outputs = dict[str, Tensor]


def of_single_view(image: Tensor, options: single_view.Options) -> Outputs:
    view = pixels.random_resized_crop(
        image, options.image_size, options.image_area, options.image_aspect
    )
    view = pixels.random_flip(view, options.flip)
    return {"image": pixels.random_colors(view[None], options, options.grayscale)[0]}


def of_two_views(image: Tensor, options: two_views.Options) -> Outputs:
    return {"query": _moco_view(image, options), "key": _moco_view(image, options)}


def of_pirl_rotation(image: Tensor, options: pirl_rotation.Options) -> Outputs:
    turns = random.randrange(4)
    return {
        "image": _pirl_view(image, options),
        "turned": torch.rot90(_pirl_view(image, options).contiguous(), turns, (1, 2)),
        "angle": torch.tensor(90 * turns),
    }


def of_pirl_jigsaw(image: Tensor, options: pirl_jigsaw.Options) -> Outputs:
    return {"image": _pirl_view(image, options), **_pirl_patches(image, options, turns=0)}


def of_pirl_jigsaw_rotation(image: Tensor, options: pirl_jigsaw.Options) -> Outputs:
    turns = random.randrange(4)
    return {
        "image": _pirl_view(image, options),
        **_pirl_patches(image, options, turns),
        "angle": torch.tensor(90 * turns),
    }


def of_colorization(image: Tensor, options: colorization.Options) -> Outputs:
    if options.crop == "whole":
        view = pixels.resized_crop(image, options.resize, options.image_size, keep_aspect=True)
    else:
        view = pixels.random_resized_crop(image, options.image_size, options.image_area)
    return {"image": pixels.random_flip(view, options.flip)}


def of_rotation(image: Tensor, options: rotation.Options) -> Outputs:
    if options.crop == "pad":
        view = pixels.padded_crop(image, options.image_size, options.pad)
    else:
        view = pixels.random_resized_crop(
            image, options.image_size, options.image_area, options.aspect
        )
    view = pixels.random_flip(view, options.flip)
    view = pixels.random_colors(view[None], options, options.grayscale)[0]
    view = view.contiguous()  # planes turn in half the time
    labels = list(range(len(options.turns)))
    if options.copies == "one":
        labels = [random.choice(labels)]
    angles = [options.turns[label] for label in labels]
    return {
        "turned": torch.stack([torch.rot90(view, angle // 90, (1, 2)) for angle in angles]),
        "angle": _labels(angles),
        "label": _labels(labels),
    }


def of_jigsaw(image: Tensor, options: jigsaw.Options) -> Outputs:
    count = options.grid**2
    orders = _orders(count, options.permutations, options.distance)
    labels = random.sample(range(options.permutations), options.per_image)
    in_place = np.arange(count)
    if options.shuffle == "pixels":
        cells, order = orders[labels[0]], in_place[None]
    else:
        cells, order = in_place, orders[labels]
    patches = cut_patches(
        _square(image, options),
        cells.tolist(),
        grid=options.grid,
        patch=options.patch,
        gap=options.gap,
        channel_shift=options.channel_shift,
    )
    gray = options.grayscale if options.grayscale_of == "patch" else 0.0
    return {
        "patches": pixels.random_colors(patches, options, gray),
        "permutation": torch.from_numpy(cells.astype(np.int64)),
        "order": torch.from_numpy(order.astype(np.int64)),
        "label": _labels(labels),
    }


def of_relative_patch(image: Tensor, options: relative_patch.Options) -> Outputs:
    neighbors, center = relative_patch.NEIGHBORS.tolist(), relative_patch.CENTER
    if options.pairs == "all":
        labels, cells = list(range(len(neighbors))), list(range(relative_patch.GRID**2))
        pairs = [[neighbor, center] for neighbor in neighbors]
    else:
        labels = [random.randrange(len(neighbors))]
        cells, pairs = [neighbors[labels[0]], center], [[0, 1]]
    patches = cut_patches(
        _square(image, options),
        cells,
        grid=relative_patch.GRID,
        patch=options.patch,
        gap=options.gap,
        channel_shift=options.channel_shift,
    )
    gray = options.grayscale if options.grayscale_of == "patch" else 0.0
    return {
        "patches": pixels.random_gray(patches, gray),
        "pair": torch.tensor(pairs),
        "label": _labels(labels),
    }


def of_exemplar(image: Tensor, options: exemplar.Options) -> Outputs:
    gray = random.random() < options.grayscale  # of the whole image: one coin for all views
    matrices, offsets = pixels.jitter(options.views, options)
    stretched = options.components != (1.0, 1.0)
    bent = options.powers != (1.0, 1.0) or options.factors != (1.0, 1.0) or options.offsets != 0
    if gray and (stretched or bent):  # which may give gray pixels a colour
        image, gray = pixels.grayed(image[None], [0])[0], False
    if options.geometry == "crop":
        views = [
            pixels.random_resized_crop(image, options.size, options.area, options.aspect)
            for _ in range(options.views)
        ]
    else:
        views = list(_warped(image, options))
    views = [pixels.random_flip(view, options.flip) for view in views]
    if stretched or bent:
        return {"views": _dosovitskiy_colors(torch.stack(views), options, matrices, offsets)}
    if not (gray or options.brightness or options.contrast or options.saturation or options.hue):
        return {"views": torch.stack(views)}
    changed = [  # one after the other: all together are more than a cache holds
        pixels.recolored(view[None], matrices[k : k + 1], offsets[k : k + 1], [0] if gray else [])
        for k, view in enumerate(views)
    ]
    return {"views": torch.cat(changed)}


def cut_patches(
    image: Tensor,
    cells: Sequence[int],
    *,
    grid: int,
    patch: int,
    gap: int = 0,
    channel_shift: int = 0,
) -> Tensor:
    """One patch out of each listed cell, [F, 3, p, p]; `gap`, `channel_shift` as in patch_grid."""
    cell = image.shape[-1] // grid
    spare = cell - patch - channel_shift
    least, most = gap // 2, spare - (gap - gap // 2)
    cut = []
    for number in cells:
        top = number // grid * cell + random.randint(least, most)
        left = number % grid * cell + random.randint(least, most)
        if not channel_shift:
            cut.append(image[:, top : top + patch, left : left + patch])
            continue
        planes = []
        for plane in image:
            y, x = top + random.randint(0, channel_shift), left + random.randint(0, channel_shift)
            planes.append(plane[y : y + patch, x : x + patch])
        cut.append(torch.stack(planes))
    return torch.stack(cut)


def _pirl_view(image: Tensor, options: pirl_jigsaw.Options | pirl_rotation.Options) -> Tensor:
    view = pixels.random_resized_crop(image, options.image_size, options.image_area)
    view = pixels.random_flip(view, options.flip)
    return pixels.random_colors(view[None], options, options.grayscale)[0]


def _pirl_patches(image: Tensor, options: pirl_jigsaw.Options, turns: int) -> Outputs:
    count = options.grid**2
    if options.permutations is None:
        cells = random.sample(range(count), count)
    else:
        cells = random.choice(_orders(count, options.permutations, "mean")).tolist()
    crop = pixels.random_resized_crop(image, options.patches_crop, options.patches_area)
    if options.flip_of == "crop":
        crop = pixels.random_flip(crop, options.flip)
    crop = torch.rot90(crop, turns, (1, 2))
    patches = cut_patches(crop, cells, grid=options.grid, patch=options.patch)
    if options.flip_of == "patch":
        patches = torch.stack([pixels.random_flip(patch, options.flip) for patch in patches])
    if options.patch_colors:
        patches = pixels.random_colors(patches, options, options.grayscale)
    return {"patches": patches, "permutation": torch.tensor(cells)}


def _moco_view(image: Tensor, options: two_views.Options) -> Tensor:
    view = pixels.random_resized_crop(
        image, options.image_size, options.image_area, options.image_aspect
    )
    if random.random() < options.jitter:
        view = pixels.random_colors(view[None], options, options.grayscale)[0]
    else:
        view = pixels.random_gray(view[None], options.grayscale)[0]
    if random.random() < options.blur:
        view = pixels.blurred(view, random.uniform(*options.blur_sigma))
    return pixels.random_flip(view, options.flip)


def _square(image: Tensor, options: Square) -> Tensor:
    """[3, crop, crop]: resized, cut, mirrored; gray where that is said of the whole image."""
    square = pixels.resized_crop(
        image, options.resize, options.crop, keep_aspect=options.keep_aspect
    )
    square = pixels.random_flip(square, options.flip)
    if options.grayscale_of == "image":
        square = pixels.random_gray(square[None], options.grayscale)[0]
    return square


def _warped(image: Tensor, options: exemplar.Options) -> Tensor:
    """Views [K, 3, S, S] of the square in the middle: the seed moved, scaled and turned."""
    height, width = image.shape[1:]
    seen = round(min(height, width) * options.region)
    top, left = (height - seen) // 2, (width - seen) // 2
    side = round(options.size * options.region / options.seed_patch)
    region = pixels.resized(image[:, top : top + seen, left : left + seen], side, side)
    # affine_grid counts from -1 to 1 over the view, and over the region
    seed, low, high = options.seed_patch / options.region, *np.log(options.scale)
    rows = []
    for _ in range(options.views):
        scale = seed * math.exp(random.uniform(low, high))
        angle = math.radians(random.uniform(-options.rotation, options.rotation))
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        right, down = (2 * seed * options.translation * random.uniform(-1, 1) for _ in range(2))
        rows.append([[cos, -sin, right], [sin, cos, down]])
    shape = [options.views, 3, options.size, options.size]
    grid = functional.affine_grid(torch.tensor(rows), shape, align_corners=False)
    views = functional.grid_sample(
        region.float().expand(options.views, -1, -1, -1),
        grid,
        padding_mode="border",
        align_corners=False,
    )
    return pixels.as_bytes(views.add_(0.5))


def _dosovitskiy_colors(
    views: Tensor, options: exemplar.Options, matrices: np.ndarray, offsets: np.ndarray
) -> Tensor:
    """The two contrasts of pipelines.exemplar, then the jitter that was drawn."""

    def log_uniform(ends: tuple[float, float], *shape: int) -> np.ndarray:
        count, (low, high) = math.prod(shape), np.log(ends)
        drawn = [math.exp(random.uniform(low, high)) for _ in range(count)]
        return np.array(drawn, np.float32).reshape(shape)

    count = len(views)
    if options.components != (1.0, 1.0):
        factors = log_uniform(options.components, count, 3)
        stretch = np.einsum("kc,ci,cj->kij", factors, exemplar.COMPONENTS, exemplar.COMPONENTS)
        views = pixels.recolored(views, stretch, exemplar.MEAN - stretch @ exemplar.MEAN)

    def changed(plane: Tensor) -> Tensor:
        power, factor = (
            torch.from_numpy(log_uniform(ends, count, 1, 1, 1))
            for ends in (options.powers, options.factors)
        )
        offset = [random.uniform(-options.offsets, options.offsets) for _ in range(count)]
        offset = torch.tensor(offset).view(count, 1, 1, 1)
        return (plane.pow(power) * factor + offset).clamp_(0, 1)

    # as in pipelines.exemplar: no hue is computed, because the change leaves it alone
    colors = views.float()
    value, least = colors.amax(1, keepdim=True), colors.amin(1, keepdim=True)
    chroma = value - least
    new_value = changed(value / 255) * 255
    gain = new_value * changed(chroma / value.clamp(min=1)) / chroma.clamp(min=1)
    views = pixels.as_bytes((colors * gain).add_(new_value - gain * value + 0.5))
    return pixels.recolored(views, matrices, offsets)


@lru_cache(maxsize=4)  # long sets are read from a file
def _orders(cells: int, count: int, distance: Distance) -> np.ndarray:
    return permutation_set(cells, count, distance)


def _labels(values: list[int]) -> Tensor:
    """Int64 [N]; a single one is [], as the loader gives it."""
    return torch.tensor(values if len(values) > 1 else values[0])
