"""PIRL's graphs that turn: the rotated view, and patches of a rotated crop."""

import dataclasses
import math

import numpy as np
import pytest

from pipelines import pirl_jigsaw, pirl_jigsaw_rotation, pirl_rotation

SIDE = 96
PATCH, CELL = 24, 32

# The crop is the image itself and nothing changes colours: what is left is turning and cutting.
PLAIN = {
    "image_size": SIDE,
    "image_area": (1.0, 1.0),
    "flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale": 0.0,
}
PATCHES = {"patches_crop": SIDE, "patches_area": (1.0, 1.0), "patch": PATCH}
GRAPHS = [pirl_rotation, pirl_jigsaw_rotation]


def outputs(run_graph, module, png, runs=1, seed=0, batch=64, threads=2, **options):
    if module is pirl_jigsaw_rotation:
        options = {**PATCHES, **options}
    options = module.Options(**options)
    return run_graph(module, options, [png] * batch, runs=runs, seed=seed, threads=threads)


def transformed(module) -> str:
    return "turned" if module is pirl_rotation else "patches"


def ramp() -> np.ndarray:
    """Red counts columns and green rows: a pixel says where it comes from."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def uphill(images: np.ndarray) -> np.ndarray:
    """Where red grows in each image [..., p, p, 3] of a ramp, in degrees, 0 to the right."""
    red = images[..., 0].astype(int)
    right = red[..., 0, -1] - red[..., 0, 0]
    up = red[..., 0, 0] - red[..., -1, 0]
    return np.rint(np.degrees(np.arctan2(up, right))).astype(int) % 360


@pytest.mark.parametrize("module", GRAPHS)
def test_the_angle_can_be_read_off_the_pixels_and_the_image_stays_upright(
    run_graph, png_of, module
):
    out = outputs(run_graph, module, png_of(ramp()), runs=2, **PLAIN)
    angle = uphill(out[transformed(module)])

    assert out["angle"].shape == (128, 1)
    np.testing.assert_array_equal(angle.reshape(128, -1) - out["angle"], 0)
    np.testing.assert_array_equal(out["image"], np.tile(ramp(), (128, 1, 1, 1)))


@pytest.mark.parametrize("module", GRAPHS)
def test_every_angle_comes_equally_often(run_graph, png_of, module):
    small = {"image_size": 8, "patches_crop": 24, "patch": 8}
    small = small if module is pirl_jigsaw_rotation else {"image_size": 8}
    angles = outputs(run_graph, module, png_of(ramp()), runs=20, **small)["angle"]
    values, counts = np.unique(angles, return_counts=True)

    assert values.tolist() == [0, 90, 180, 270]
    assert abs(counts - len(angles) / 4).max() < 4 * math.sqrt(len(angles) / 4)


def test_the_turned_view_is_an_exact_transpose(run_graph, png_of):
    image = noise()
    out = outputs(run_graph, pirl_rotation, png_of(image), **PLAIN)

    for turned, angle in zip(out["turned"], out["angle"][:, 0], strict=True):
        np.testing.assert_array_equal(turned, np.rot90(image, angle // 90))


def test_patches_are_cut_out_of_the_turned_crop_in_the_drawn_order(run_graph, png_of):
    out = outputs(run_graph, pirl_jigsaw_rotation, png_of(ramp()), **PLAIN)
    places = []
    for patches, angle, order in zip(out["patches"], out["angle"], out["permutation"], strict=True):
        crop = np.rot90(ramp(), angle[0] // 90)
        for patch, cell in zip(patches, order, strict=True):
            ((row, column),) = np.argwhere((crop == patch[0, 0]).all(axis=-1))
            np.testing.assert_array_equal(patch, crop[row : row + PATCH, column : column + PATCH])
            assert (row // CELL) * 3 + column // CELL == cell
            places.append((row % CELL, column % CELL))
        assert sorted(order) == list(range(9))

    support = set(range(CELL - PATCH + 1))
    assert set(np.ravel(places).tolist()) == support
    turned_differently = {tuple(order) for order in out["permutation"]}
    assert len(turned_differently) > 60


def test_both_views_are_drawn_on_their_own(run_graph, png_of):
    options = {**PLAIN, "image_area": (0.3, 1.0), "flip": 0.5, "grayscale": 0.5}
    out = outputs(run_graph, pirl_rotation, png_of(ramp()), runs=4, **options)
    image, turned = out["image"].astype(int), out["turned"].astype(int)
    gray = [np.ptp(each, axis=-1).max(axis=(1, 2)) == 0 for each in (image, turned)]
    quarters = out["angle"][:, 0] // 90
    back = [np.rot90(each, -k) for each, k in zip(turned, quarters, strict=True)]
    mirrored = [each[:, 0, 0, 0] > each[:, 0, -1, 0] for each in (image, np.stack(back))]

    for one, other in (gray, mirrored):
        assert 0.4 < one.mean() < 0.6
        assert 0.4 < other.mean() < 0.6
        assert 0.4 < (one == other).mean() < 0.6
    colored = ~gray[0] & ~gray[1]
    # where the middle of either view lies in the image
    middles = [each[colored, 48, 48, 0] for each in (image, np.stack(back))]
    assert abs(np.corrcoef(*middles)[0, 1]) < 0.35


def test_colours_of_each_patch_are_changed_on_their_own(run_graph, png_of):
    flat = np.full((SIDE, SIDE, 3), (120, 90, 60), np.uint8)
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    out = outputs(run_graph, pirl_jigsaw_rotation, png_of(flat), batch=4, **{**PLAIN, **jitter})

    for nine in out["patches"][:, :, 0, 0]:
        assert len(np.unique(nine, axis=0)) == 9


def test_grayscale_has_its_probability_and_equal_channels(run_graph, png_of):
    options = {**PLAIN, "grayscale": 0.3}
    png = png_of(noise())
    turned = outputs(run_graph, pirl_rotation, png, runs=8, **options)["turned"].astype(int)
    patches = outputs(run_graph, pirl_jigsaw_rotation, png, **options)["patches"].astype(int)
    gray = np.ptp(turned, axis=-1).max(axis=(1, 2)) == 0
    gray_patch = np.ptp(patches, axis=-1).max(axis=(2, 3)) == 0

    assert 0.2 < gray.mean() < 0.4
    assert 0.23 < gray_patch.mean() < 0.37


@pytest.mark.parametrize("module", GRAPHS)
def test_one_seed_repeats_whatever_the_threads_and_two_differ(run_graph, png_of, module):
    png, options = png_of(noise()), {"image_size": 32}
    first = outputs(run_graph, module, png, runs=2, batch=8, seed=1, threads=1, **options)
    again = outputs(run_graph, module, png, runs=2, batch=8, seed=1, threads=2, **options)
    other = outputs(run_graph, module, png, runs=2, batch=8, seed=2, threads=2, **options)

    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    for name in ("image", transformed(module), "angle"):
        assert (first[name] != other[name]).any()


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_and_types_are_as_asked(run_graph, png_of, size):
    cell = size // 3
    cut = {"patches_crop": 3 * cell, "patch": cell * 3 // 4}
    turned = outputs(run_graph, pirl_rotation, png_of(ramp()), batch=2, image_size=size)
    patches = outputs(
        run_graph, pirl_jigsaw_rotation, png_of(ramp()), batch=2, image_size=size, **cut
    )

    assert turned["image"].shape == turned["turned"].shape == (2, size, size, 3)
    assert patches["image"].shape == (2, size, size, 3)
    assert patches["patches"].shape == (2, 9, cell * 3 // 4, cell * 3 // 4, 3)
    for out in (turned, patches):
        assert {values.dtype.name for values in out.values()} == {"uint8", "int64"}
        np.testing.assert_array_equal(out["index"], [[0], [1]])


def test_options_are_those_of_pirl_jigsaw_with_the_same_defaults():
    jigsaw = dataclasses.asdict(pirl_jigsaw.Options())
    turned = dataclasses.asdict(pirl_rotation.Options())

    assert pirl_jigsaw_rotation.Options is pirl_jigsaw.Options
    assert turned == {name: jigsaw[name] for name in turned}
    assert pirl_rotation.Options(image_size=96).largest_crop == 96
    assert pirl_rotation.Options().classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, r"image_size \(4\) must be at least 8"),
        ({"image_area": (0.5, 0.2)}, r"image_area \(\[0.5, 0.2\]\) must be two ascending"),
        ({"image_area": (0.5, 1.2)}, r"image_area \(\[0.5, 1.2\]\) must be two ascending"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
        ({"grayscale": -0.5}, r"grayscale \(-0.5\) must be a probability"),
        ({"contrast": -0.1}, r"contrast \(-0.1\) must be at least 0"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        pirl_rotation.Options(**options)
