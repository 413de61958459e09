"""Where a network looks: activations of each stage summed over channels (Gidaris et al. 2018).

A_p = sum_c |A_c|^p for p = 1, 2, 4 (arXiv:1803.07728, section 3.1 and figure 3): large p keeps what
single channels respond to strongly.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastssl.analysis import drawing
from fastssl.patch_network import Standardization, standardize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POWERS = (1, 2, 4)


class NoMaps(ValueError):
    """No stage of the backbone has a height and a width."""


def attention(activation: Tensor, power: int) -> Tensor:
    """Maps [B, h, w] of `activation` [B, C, h, w]; in float64, since powers of 4 are large."""
    return activation.double().abs().pow(power).sum(1)


@torch.no_grad()
def maps(
    backbone: Any, tensors: dict[str, Tensor], how: Standardization
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The images looked at, uint8 [B, H, W, 3], and the maps of each stage [P, B, h, w].

    Args:
        backbone: by the contract of fastssl.backbones, in eval mode, on the tensors' device.
        tensors: what the evaluation graph puts out: `image` [B, 3, S, S], or `patches`
            [B, F, 3, p, p] of a square grid in row order, which are looked at one by one, as such a
            network was trained, and laid side by side again.
        how: patches are standardised, as in training; images are taken as they are.

    Raises:
        NoMaps: no stage has a height and a width.
    """
    grid = 1
    if "image" in tensors:
        pixels = inputs = tensors["image"]
    else:
        grid = round(tensors["patches"].shape[1] ** 0.5)
        pixels = tensors["patches"].flatten(0, 1)
        inputs = standardize(pixels, how)
    stages = {name: each for name, each in backbone.stages(inputs).items() if each.ndim == 4}
    if not stages:
        raise NoMaps("the backbone has no stage with a height and a width to look at")
    found = {
        name: np.stack([_tiled(attention(each, power)[:, None], grid)[:, 0] for power in POWERS])
        for name, each in stages.items()
    }
    return np.moveaxis(_tiled(pixels, grid), 1, 3), found


def draw(images: np.ndarray, found: dict[str, np.ndarray], caption: str) -> "Figure":
    """Each image beside its maps: a column a stage, a row a power, upsampled."""
    columns, rows = 1 + len(found), len(POWERS) * len(images)
    cell = drawing.WIDTH / (columns + 0.4)
    figure = drawing.figure(rows * cell + 0.9)
    grid = figure.add_gridspec(rows, columns)
    for number, image in enumerate(images):
        first = number * len(POWERS)
        axes = figure.add_subplot(grid[first : first + len(POWERS), 0])
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_anchor("N")  # beside the first of its rows
        if number == 0:
            axes.set_title("image", fontsize=9, color=drawing.INK)
        for column, (name, maps) in enumerate(found.items(), start=1):
            for row, power in enumerate(POWERS):
                axes = figure.add_subplot(grid[first + row, column])
                # the picture's corners are the map's: imshow interpolates in between
                axes.imshow(maps[row, number], cmap="viridis", interpolation="bilinear")
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if first + row == 0:
                    size = "x".join(str(side) for side in maps.shape[2:])
                    axes.set_title(f"{name}\n{size}", fontsize=9, color=drawing.INK)
                if column == 1:
                    axes.set_ylabel(f"p = {power}", fontsize=8, color=drawing.INK)
    drawing.caption(figure, caption)
    return figure


def _tiled(each: Tensor, grid: int) -> np.ndarray:
    """[B, C, grid h, grid w] of `each` [B grid^2, C, h, w], laid out row by row."""
    cells = each.unflatten(0, (-1, grid, grid)).permute(0, 3, 1, 4, 2, 5)
    return cells.flatten(2, 3).flatten(3, 4).cpu().numpy()
