"""Lab against scikit-image, the 313 bins against their rule, encoding against brute force."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from skimage import color

from fastssl import lab

CORNERS = torch.tensor(list(itertools.product((0, 255), repeat=3)), dtype=torch.uint8)


def colors(count: int, seed: int = 0) -> torch.Tensor:
    """Random pixels and the corners of the RGB cube, [1, 3, count + 8, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3), generator=generator, dtype=torch.uint8)
    return torch.cat([pixels, CORNERS]).T[None, :, :, None]


def surface() -> torch.Tensor:
    """Colours ab [N, 2] on the six faces of the RGB cube, where the gamut has its edge."""
    level = torch.arange(256, dtype=torch.uint8)
    faces = []
    for channel, value in itertools.product(range(3), (0, 255)):
        first, second = torch.meshgrid(level, level, indexing="ij")
        face = [first, second]
        face.insert(channel, torch.full_like(first, value))
        faces.append(torch.stack(face))
    return lab.rgb_to_lab(torch.stack(faces))[:, 1:].movedim(1, -1).reshape(-1, 2)


def test_lab_is_that_of_scikit_image():
    image = colors(5000)
    expected = color.rgb2lab(image.movedim(1, -1).numpy())

    np.testing.assert_allclose(lab.rgb_to_lab(image).movedim(1, -1), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("rgb", "expected"),  # D65, 2 degrees: known values, to a hundredth
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colors(rgb, expected):
    got = lab.rgb_to_lab(torch.tensor(rgb, dtype=torch.uint8).reshape(1, 3, 1, 1))

    torch.testing.assert_close(got.flatten(), torch.tensor(expected), atol=0.011, rtol=0)


def test_there_and_back_gives_the_same_bytes():
    image = colors(5000)

    assert torch.equal(lab.lab_to_rgb(lab.rgb_to_lab(image)), image)


def test_what_no_screen_shows_is_cut_off():
    beyond = torch.tensor([50.0, 120.0, -120.0]).reshape(1, 3, 1, 1)

    assert lab.lab_to_rgb(beyond)[0, 1] == 0


def test_memory_stays_channels_last():
    image = torch.zeros(2, 4, 4, 3, dtype=torch.uint8).movedim(-1, 1)

    assert lab.rgb_to_lab(image).is_contiguous(memory_format=torch.channels_last)


def test_the_gray_of_equal_lightness_has_that_lightness():
    image = colors(5000)
    gray = lab.gray_of_equal_lightness(image)

    assert gray.dtype == torch.uint8
    difference = lab.rgb_to_lab(gray.expand_as(image))[:, 0] - lab.rgb_to_lab(image)[:, 0]
    assert difference.abs().max() < 0.25
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256, 1).expand(1, 3, 256, 1)
    assert torch.equal(lab.gray_of_equal_lightness(every), every[:, :1])


def test_the_bins_are_the_grid_points_within_a_step_of_the_hull_of_all_colors():
    # A point lies in a convex set if it does in every direction. The hull's own edges are among
    # the directions closely enough: at 9.8 to 10.0 the answer is the same.
    turn = torch.arange(0, 2 * torch.pi, torch.pi / 1800, dtype=torch.float64)
    directions = torch.stack([turn.cos(), turn.sin()])
    colors_there = surface().double()
    corners = colors_there[ConvexHull(colors_there.numpy()).vertices]
    reach = (corners @ directions).amax(0) + 9.95 * directions.abs().sum(0)
    grid = torch.cartesian_prod(torch.arange(-150, 151, 10), torch.arange(-150, 151, 10))
    inside = (grid.double() @ directions <= reach).all(1)
    bins = lab.Bins()

    assert torch.equal(bins.centers.long(), grid[inside])
    assert bins.centers.shape == (313, 2)
    assert not bins.state_dict()


def brute_force(bins: lab.Bins, ab: torch.Tensor, neighbours: int, sigma: float) -> torch.Tensor:
    """The dense distribution [N, 313]."""
    squares = (ab.double()[:, None] - bins.centers.double()).square().sum(-1)
    nearest, numbers = squares.topk(neighbours, largest=False)
    weights = torch.exp(-nearest / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)
    return torch.zeros(len(ab), 313, dtype=torch.float64).scatter_(1, numbers, weights)


@pytest.mark.parametrize(
    ("neighbours", "sigma", "tolerance"), [(1, 5.0, 0), (5, 5.0, 1e-5), (5, 2.0, 1e-5)]
)
def test_encoding_is_that_of_brute_force_at_the_gamuts_edge_too(neighbours, sigma, tolerance):
    bins = lab.Bins()
    ab = torch.cat([lab.rgb_to_lab(colors(3000))[0, 1:, :, 0].T, surface()[::97]])
    numbers, weights = bins.soft_encode(ab, neighbours, sigma)
    dense = torch.zeros(len(ab), 313, dtype=torch.float64).scatter_(1, numbers, weights.double())

    assert numbers.shape == weights.shape == (len(ab), neighbours)
    assert (dense - brute_force(bins, ab, neighbours, sigma)).abs().max() <= tolerance
    assert (weights[:, :-1] >= weights[:, 1:]).all()


def test_ten_neighbours_lack_less_than_a_thousandth_at_the_gamuts_edge():
    bins = lab.Bins()
    ab = surface()[::97]
    numbers, weights = bins.soft_encode(ab, 10)
    dense = torch.zeros(len(ab), 313, dtype=torch.float64)
    dense.scatter_add_(1, numbers, weights.double())

    torch.testing.assert_close(weights.sum(1), torch.ones(len(ab)))
    assert (dense - brute_force(bins, ab, 10, 5.0)).abs().sum(1).max() < 1e-3


def test_encoding_of_a_bin_is_known():
    numbers, weights = lab.Bins().soft_encode(torch.tensor([[0.0, 0.0]]))
    side = np.exp(-2)  # 10 away, sigma 5

    expected = [1 / (1 + 4 * side)] + [side / (1 + 4 * side)] * 4
    np.testing.assert_allclose(weights[0], expected, rtol=1e-6)
    assert lab.Bins().centers[numbers[0, 0]].tolist() == [0, 0]


def test_annealed_mean_lies_between_mean_and_mode():
    bins = lab.Bins()
    share = torch.full((313,), 1e-9)
    share[[10, 200]] = torch.tensor([0.7, 0.3])
    logits = share.log().reshape(1, 313, 1, 1)
    mean = 0.7 * bins.centers[10] + 0.3 * bins.centers[200]
    annealed = torch.tensor([0.7, 0.3]).pow(1 / 0.38)
    expected = (annealed / annealed.sum()) @ bins.centers[[10, 200]]

    torch.testing.assert_close(bins.annealed_mean(logits, 1.0).flatten(), mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(bins.annealed_mean(logits).flatten(), expected, rtol=0, atol=1e-3)
    coldest = bins.annealed_mean(logits, 0.01).flatten()
    torch.testing.assert_close(coldest, bins.centers[10], rtol=0, atol=1e-3)
