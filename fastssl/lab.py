"""Lab colours on the training device, and the 313 bins of Zhang et al. (2016) that name them.

Lab is that of scikit-image: sRGB, white D65, observer of 2 degrees. L is 0 ... 100; a (green to
red) and b (blue to yellow) lie within -87 ... 99 and -108 ... 95 for every sRGB colour.

The bins are points of a grid of 10 in the ab plane: all that lie within one step, in a and in b, of
the convex hull of the sRGB colours. So the four grid points around any colour, or mean of colours,
are bins. This gives Zhang's 313, point for point and in his order (resources/pts_in_hull.npy),
which the paper calls "in-gamut". Other rules do not: 261 bins are nearest to some sRGB colour, 234
lie in the hull itself, 309 are corners of a cell that holds a colour.
"""

import zipfile

import numpy as np
import torch
from torch import Tensor, nn

STEP = 10  # of the grid
BINS = 313
RANGES = {  # a: least and greatest b
    **{-90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100)},
    **{-40: (-40, 100), -30: (-50, 100), -20: (-50, 100), -10: (-60, 100), 0: (-70, 100)},
    **{10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90), 50: (-100, 80)},
    **{60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0)},
}
A_CELLS, B_CELLS = (-100, 111), (-120, 111)  # ranges of the cells that may hold a colour
NEAR = (-1, 0, 1, 2)  # grid points around a cell, counted from its lowest corner
XYZ_OF_RGB = (  # of linear red, green and blue; X, Y and Z of the white that L = 100 stands for
    ((0.412453, 0.357580, 0.180423), 0.95047),
    ((0.212671, 0.715160, 0.072169), 1.0),
    ((0.019334, 0.119193, 0.950227), 1.08883),
)


def rgb_to_lab(image: Tensor) -> Tensor:
    """Lab [B, 3, H, W], float32, of `image` [B, 3, H, W], sRGB in uint8.

    Within 1e-3 of skimage.color.rgb2lab. The result lies in memory as the image does: the loader's
    channels-last stays so.
    """
    # No matrix product: a GPU may round it to TF32's 10 bits, which is half a unit of a.
    red, green, blue = _linear(image).unbind(1)
    f = []
    for (of_red, of_green, of_blue), white in XYZ_OF_RGB:
        part = (red * of_red + green * of_green + blue * of_blue) / white
        f.append(torch.where(part > 0.008856, part.pow(1 / 3), 7.787 * part + 16 / 116))
    x, y, z = f
    lab = torch.empty_like(image, dtype=torch.float32)
    lab[:, 0] = 116 * y - 16
    lab[:, 1] = 500 * (x - y)
    lab[:, 2] = 200 * (y - z)
    return lab


def lab_to_rgb(lab: Tensor) -> Tensor:
    """SRGB in uint8 of `lab`, both [B, 3, H, W]; what no screen shows is cut off at 0 and 255."""
    lightness, a, b = lab.float().unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200])
    parts = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    xyz = [part * white for part, (_, white) in zip(parts.clamp_min(0), XYZ_OF_RGB, strict=True)]
    back = torch.linalg.inv_ex(torch.tensor([row for row, _ in XYZ_OF_RGB], dtype=torch.float64))
    rgb = torch.empty_like(lab, dtype=torch.uint8)
    for channel, (of_x, of_y, of_z) in enumerate(back.inverse.tolist()):
        rgb[:, channel] = _bytes(xyz[0] * of_x + xyz[1] * of_y + xyz[2] * of_z)
    return rgb


def gray_of_equal_lightness(image: Tensor) -> Tensor:
    """The uint8 [B, 1, H, W] that, as red, green and blue alike, has the L of `image`.

    To the nearest byte, which is 0.2 of L at most. L depends on the luminance Y alone, so there is
    no need for the rest of Lab.
    """
    red, green, blue = _linear(image).unbind(1)
    (of_red, of_green, of_blue), _ = XYZ_OF_RGB[1]
    return _bytes(red * of_red + green * of_green + blue * of_blue)[:, None]


class Bins(nn.Module):
    """The 313 bins: which are near a colour, and what colour a distribution over them means.

    Its tables are not in state_dict(): they never change.
    """

    centers: Tensor
    around: Tensor

    def __init__(self) -> None:
        """Tables of 70 kilobytes."""
        super().__init__()
        points = [(a, b) for a, (low, high) in RANGES.items() for b in range(low, high + 1, STEP)]
        assert len(points) == BINS
        number = {point: number for number, point in enumerate(points)}
        # The 4 x 4 grid points around each cell: their bins, or -1. A cell is named by its lowest
        # corner; the table goes one cell beyond the bins.
        around = [
            [number.get((a + i * STEP, b + j * STEP), -1) for i in NEAR for j in NEAR]
            for a in range(*A_CELLS, STEP)
            for b in range(*B_CELLS, STEP)
        ]
        self.register_buffer("centers", torch.tensor(points, dtype=torch.float32), persistent=False)
        self.register_buffer("around", torch.tensor(around), persistent=False)

    def soft_encode(
        self, ab: Tensor, neighbours: int = 5, sigma: float = 5.0
    ) -> tuple[Tensor, Tensor]:
        """The nearest bins of each colour and their Gaussian weights (Zhang 2016, section 2.2).

        Candidates are the 16 grid points around a colour, instead of all 313 bins: four of them
        hold it between them, and none outside is nearer than 20. So up to five neighbours of a
        colour in the gamut are exact. With more (Zhang's code takes 10), a colour at the gamut's
        edge can miss some that are 20 or more away: less than 0.001 of its weight.

        Args:
            ab: [..., 2], within the convex hull of the sRGB colours.
            neighbours: how many bins, 1 ... 10; 1 is hard encoding.
            sigma: of the Gaussian, in units of a and b.

        Returns:
            Numbers of the bins [..., neighbours], int64, the nearest first, and weights of the same
            shape that add up to 1.
        """
        # P = pixels, of any shape
        cells_P2 = (ab / STEP).floor()
        near = torch.arange(NEAR[0], NEAR[-1] + 1, device=ab.device)
        squares_P24 = ((cells_P2[..., None] + near) * STEP - ab[..., None]).square()
        squares_P16 = (squares_P24[..., 0, :, None] + squares_P24[..., 1, None, :]).flatten(-2)
        row = cells_P2[..., 0] - A_CELLS[0] // STEP
        column = cells_P2[..., 1] - B_CELLS[0] // STEP
        columns = len(range(*B_CELLS, STEP))
        # clamped: what is no colour must not be read from beyond the table
        cell_P = (row * columns + column).long().clamp(0, len(self.around) - 1)
        numbers_P16 = self.around[cell_P]
        squares_P16 = squares_P16.masked_fill(numbers_P16 < 0, torch.inf)
        nearest, which = squares_P16.topk(neighbours, dim=-1, largest=False)
        # relative to the nearest: far from all bins, exp() of each alone would be 0
        weights = torch.exp((nearest[..., :1] - nearest) / (2 * sigma**2))
        numbers = numbers_P16.gather(-1, which).clamp_min(0)  # a missing one: any, with weight 0
        return numbers, weights / weights.sum(-1, keepdim=True)

    def annealed_mean(self, logits: Tensor, temperature: float = 0.38) -> Tensor:
        """Colours ab [B, 2, H, W] of `logits` [B, 313, H, W] (Zhang 2016, section 2.3).

        Between the mean of the distribution (temperature 1: pale) and its mode (0: patchy).
        """
        share = (logits.float() / temperature).softmax(1)
        return torch.einsum("bqhw,qc->bchw", share, self.centers)


def read_prior(path: str) -> list[float]:
    """The share of each bin in a training set, from a .npy file such as Zhang's prior_probs.npy.

    Raises:
        ValueError: it is not that.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"prior ({path}) must be a .npy file of {BINS} numbers: {error}") from None
    if not isinstance(values, np.ndarray) or values.shape != (BINS,) or values.dtype.kind != "f":
        found = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else "more"
        raise ValueError(f"prior ({path}) must hold floats [{BINS}], it holds {found}")
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"prior ({path}) must hold shares, 0 or more, not all 0")
    return values.tolist()


def _linear(image: Tensor) -> Tensor:
    """Light in 0 ... 1 of sRGB bytes."""
    value = image.float() / 255
    return torch.where(value > 0.04045, ((value + 0.055) / 1.055).pow(2.4), value / 12.92)


def _bytes(light: Tensor) -> Tensor:
    """SRGB bytes of light, which may lie outside of 0 ... 1."""
    light = light.clamp(0, 1)
    value = torch.where(light > 0.0031308, 1.055 * light.pow(1 / 2.4) - 0.055, 12.92 * light)
    return (255 * value).round().to(torch.uint8)
