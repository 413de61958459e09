"""The PIRL-jigsaw graph: labels recovered from pixels, uniform draws, sizes as asked."""

import math

import numpy as np
import pytest

from pipelines import pirl_jigsaw
from pipelines.permutations import permutation_set

# Red counts columns, green counts rows: a pixel says where in the crop it came from. Encoded
# without loss (PNG), so that positions can be read off exactly.
SIDE = 96


def ramp() -> np.ndarray:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def outputs(run_graph, png, runs=1, seed=0, batch=64, **options):
    options = pirl_jigsaw.Options(**options)
    return run_graph(pirl_jigsaw, options, [png] * batch, runs=runs, seed=seed)


# The crop is the image itself and nothing changes colours: what is left is cutting and shuffling.
BARE = {
    "image_size": SIDE,
    "image_area": (1.0, 1.0),
    "patches_crop": SIDE,
    "patches_area": (1.0, 1.0),
    "patch": 24,
    "flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale": 0.0,
}


def corners(patches: np.ndarray) -> np.ndarray:
    """Row and column of each patch's upper left pixel in the ramp: [..., 2]."""
    return np.stack([patches[..., 0, 0, 1] // 2, patches[..., 0, 0, 0] // 2], axis=-1)


def test_the_permutation_and_the_offsets_can_be_read_off_the_patches(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=4, **BARE)
    place = corners(out["patches"].astype(int))  # [N, 9, 2]
    cell = place // 32

    np.testing.assert_array_equal(cell[..., 0] * 3 + cell[..., 1], out["permutation"])
    offset = place - cell * 32
    assert set(np.unique(offset)) == set(range(32 - 24 + 1))  # the full support, 0 ... 8
    counts = np.bincount(offset.ravel(), minlength=9)
    assert counts.min() > 0.8 * counts.mean()
    whole = ramp()
    for number in range(9):
        row, column = place[0, number]
        cut = whole[row : row + 24, column : column + 24]
        np.testing.assert_array_equal(out["patches"][0, number], cut)


def test_patches_of_neighbouring_cells_never_overlap(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=2, **BARE)
    place = corners(out["patches"].astype(int))
    in_cell_order = np.take_along_axis(place, np.argsort(out["permutation"])[..., None], axis=1)
    grid = in_cell_order.reshape(-1, 3, 3, 2)

    assert (grid[:, :, 1:, 1] - grid[:, :, :-1, 1] >= 24).all()
    assert (grid[:, 1:, :, 0] - grid[:, :-1, :, 0] >= 24).all()


def test_every_order_is_a_permutation_and_every_cell_comes_first_equally_often(run_graph, png_of):
    orders = outputs(run_graph, png_of(ramp()), runs=40, **BARE)["permutation"]

    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (len(orders), 1)))
    assert len(np.unique(orders, axis=0)) > 0.98 * len(orders)  # of 362,880
    expected = len(orders) / 9
    for position in range(9):
        counts = np.bincount(orders[:, position], minlength=9)
        assert abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_a_set_of_permutations_is_drawn_whole_and_nothing_else(run_graph, png_of):
    orders = outputs(run_graph, png_of(ramp()), runs=8, **BARE, permutations=10)["permutation"]

    drawn = {tuple(row) for row in orders}
    assert drawn == {tuple(row) for row in permutation_set(9, 10)}


def test_a_2_by_2_grid_gives_4_patches(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), batch=8, **{**BARE, "grid": 2, "patch": 40})

    assert out["patches"].shape == (8, 4, 40, 40, 3)
    assert out["permutation"].shape == (8, 4)


def test_grayscale_has_its_probability_and_equal_channels(run_graph, png_of):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    out = outputs(run_graph, png_of(noise), runs=8, **{**BARE, "grayscale": 0.3})
    images, patches = out["image"].astype(int), out["patches"].astype(int)
    spread = images.max(axis=-1) - images.min(axis=-1)
    gray_image = spread.max(axis=(1, 2)) == 0
    spread = patches.max(axis=-1) - patches.min(axis=-1)
    gray_patch = spread.max(axis=(2, 3)) == 0

    assert 0.2 < gray_image.mean() < 0.4
    assert 0.26 < gray_patch.mean() < 0.34
    some = gray_patch.any(axis=1) & ~gray_patch.all(axis=1)
    assert some.mean() > 0.8  # each patch for itself, not all of an image alike
    r, g, b = np.moveaxis(noise.astype(float), -1, 0)
    luma = np.rint(0.299 * r + 0.587 * g + 0.114 * b)
    got = images[gray_image][0, ..., 0]
    assert abs(got - luma).max() <= 1


def test_colours_of_each_patch_are_changed_on_their_own(run_graph, png_of):
    flat = np.full((SIDE, SIDE, 3), (120, 90, 60), np.uint8)
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    patches = outputs(run_graph, png_of(flat), batch=4, **{**BARE, **jitter})["patches"]

    for nine in patches[:, :, 0, 0]:
        assert len(np.unique(nine, axis=0)) == 9


def test_brightness_and_contrast_stay_in_their_range(run_graph, png_of):
    flat = np.full((SIDE, SIDE, 3), 100, np.uint8)
    out = outputs(run_graph, png_of(flat), runs=8, **{**BARE, "brightness": 0.4})
    factor = out["image"][:, 0, 0, 0] / 100

    assert 0.59 <= factor.min() < 0.65
    assert 1.35 < factor.max() <= 1.41


def test_flip_mirrors_the_image_with_its_probability(run_graph, png_of):
    images = outputs(run_graph, png_of(ramp()), runs=4, **{**BARE, "flip": 0.25})["image"]
    mirrored = images[:, 0, 0, 0] > images[:, 0, -1, 0]

    assert 0.15 < mirrored.mean() < 0.36
    np.testing.assert_array_equal(images[mirrored][0], ramp()[:, ::-1])


def test_crops_have_their_share_of_the_area(run_graph, png_of):
    area = {"image_area": (0.25, 1.0), "patches_area": (0.6, 1.0)}
    images = outputs(run_graph, png_of(ramp()), runs=8, **{**BARE, **area})["image"].astype(float)
    width = (images[:, 40, -1, 0] - images[:, 40, 0, 0]) / 2 + 1
    height = (images[:, -1, 40, 1] - images[:, 0, 40, 1]) / 2 + 1
    share = width * height / SIDE**2

    assert 0.22 < share.min() < 0.4
    assert 0.85 < share.max() <= 1.03
    aspect = width / height
    assert 0.7 < aspect.min() < 0.9
    assert 1.1 < aspect.max() < 1.43


def test_one_seed_repeats_and_two_differ(run_graph, png_of):
    png = png_of(ramp())
    first, again, other = (outputs(run_graph, png, seed=seed, batch=8) for seed in (1, 1, 2))

    for name in ("image", "patches", "permutation"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_threads_and_prefetching_change_nothing(run_graph, png_of):
    png, options = png_of(ramp()), pirl_jigsaw.Options(image_size=64, patches_crop=96, patch=24)
    one = run_graph(pirl_jigsaw, options, [png] * 8, runs=3, threads=1, prefetch=1)
    two = run_graph(pirl_jigsaw, options, [png] * 8, runs=3, threads=2, prefetch=3)

    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked(run_graph, png_of, size):
    cell = size // 3
    options = {"image_size": size, "patches_crop": 3 * cell, "patch": cell * 3 // 4}
    out = outputs(run_graph, png_of(ramp()), batch=2, **options)

    assert out["image"].shape == (2, size, size, 3)
    assert out["patches"].shape == (2, 9, cell * 3 // 4, cell * 3 // 4, 3)
    assert {values.dtype.name for values in out.values()} == {"uint8", "int64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 90}, r"patch \(90\) must fit in a cell \(85 = patches_crop 255 / grid 3\)"),
        (
            {"patches_crop": 256},
            r"patches_crop \(256\) must be a multiple of grid \(3\): 255 or 258",
        ),
        ({"grid": 4}, r"grid \(4\) must be 2 or 3"),
        ({"image_size": 4}, r"image_size \(4\) must be at least 8"),
        ({"image_area": (0.5, 0.2)}, r"image_area \(\[0.5, 0.2\]\) must be two ascending"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
        ({"contrast": -0.1}, r"contrast \(-0.1\) must be at least 0"),
        ({"permutations": 0}, r"permutations \(0\) must be in 1 ... 362880"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        pirl_jigsaw.Options(**options)


def test_each_patch_may_be_mirrored_on_its_own(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), **{**BARE, "flip": 0.5, "flip_of": "patch"})
    columns = out["patches"][..., 0, :, 0].astype(int)  # red counts columns, in steps of 2
    mirrored = columns[..., 0] > columns[..., -1]

    assert 0.4 < mirrored.mean() < 0.6
    assert (mirrored.any(axis=1) & ~mirrored.all(axis=1)).mean() > 0.9  # not all nine together
    left = np.where(mirrored, columns[..., -1], columns[..., 0]) // 2
    np.testing.assert_array_equal(left // 32, out["permutation"] % 3)


def test_patches_may_keep_their_colours(run_graph, png_of):
    strong = {"brightness": 0.9, "grayscale": 0.5}
    out = outputs(run_graph, png_of(ramp()), **{**BARE, **strong, "patch_colors": False})

    assert (out["patches"][..., 2] == 7).all()  # the ramp's blue
    assert (out["image"][..., 2] != 7).any()
