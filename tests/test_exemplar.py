"""The exemplar graph: crops, warps and colours recovered from the pixels of the views."""

import colorsys
import math

import numpy as np
import pytest

from pipelines import exemplar

SIDE = 120


def ramp(height=SIDE, width=SIDE) -> np.ndarray:
    """Red counts columns and green counts rows: a pixel says where it came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def smooth(height=SIDE, width=SIDE) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / 9 + rows / 17), np.cos(rows / 8), np.sin((columns - rows) / 13)]
    return np.rint(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noise(side=32, low=0, high=256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (side, side, 3), dtype=np.uint8)


PLAIN = {
    "flip": 0.0,
    "grayscale": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}
WHOLE = {**PLAIN, "area": (1.0, 1.0), "aspect": (1.0, 1.0)}  # a view is the image, if square
# A seed of 40 pixels at 40 pixels a view: nothing is resampled but by the warp itself.
WARP = {**PLAIN, "geometry": "warp", "seed_patch": 1 / 3, "size": 40}
DOSOVITSKIY = {
    "components": (0.5, 2.0),
    "powers": (0.25, 4.0),
    "factors": (0.7, 1.4),
    "offsets": 0.1,
}


def views_of(run_graph, png, *, batch=32, runs=1, seed=0, **options) -> np.ndarray:
    """[runs * batch, K, S, S, 3] of one image."""
    return run_graph(exemplar, exemplar.Options(**options), [png] * batch, runs=runs, seed=seed)[
        "views"
    ]


def place(view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine map from a view of the ramp to the ramp, A [2, 2] and b [2]: p = A q + b.

    q and p are x and y in pixels, counted from the corner; q = 0 is the middle of the view.
    """
    size = len(view)
    y, x = np.mgrid[0:size, 0:size] + 0.5 - size / 2
    ones = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)
    where = view[..., :2].reshape(-1, 2) / 2 + 0.5  # the middle of the ramp's pixel
    inside = ((where > 1.6) & (where < SIDE - 1.6)).all(axis=1)  # the border may go on outside
    fit, *_ = np.linalg.lstsq(ones[inside], where[inside], rcond=None)
    assert abs(ones[inside] @ fit - where[inside]).max() < 0.5  # it is affine
    return fit[:2].T, fit[2]


# -- geometry -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(run_graph, png_of):
    """The maps of many warped views: A [N, 2, 2] and b [N, 2]."""
    views = views_of(run_graph, png_of(ramp()), runs=3, **WARP)
    found = [place(view) for view in views.reshape(-1, 40, 40, 3)]
    return np.stack([a for a, _ in found]), np.stack([b for _, b in found])


def test_warps_scale_turn_and_move_and_do_nothing_else(places):
    matrices, _ = places
    scale = np.sqrt(np.linalg.det(matrices))
    turned = matrices / scale[:, None, None]

    assert len(matrices) == 3 * 32 * 8
    np.testing.assert_allclose(turned[:, 0, 0], turned[:, 1, 1], atol=0.01)
    np.testing.assert_allclose(turned[:, 0, 1], -turned[:, 1, 0], atol=0.01)


def test_warps_have_the_ranges_of_the_paper_and_their_full_support(places):
    matrices, centers = places
    scale = np.sqrt(np.linalg.det(matrices))
    angle = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    moved = (centers - SIDE / 2) / 40  # in seeds
    drawn = {
        "scale": (np.log(scale), math.log(0.7), math.log(1.4)),
        "angle": (angle, -20, 20),
        "right": (moved[:, 0], -0.2, 0.2),
        "down": (moved[:, 1], -0.2, 0.2),
    }
    for values, low, high in drawn.values():
        share = (values - low) / (high - low)

        assert -0.01 < share.min() < 0.03
        assert 0.97 < share.max() < 1.01
        tenths = np.histogram(share, bins=10, range=(-0.02, 1.02))[0]
        assert abs(tenths - 76.8).max() < 5 * math.sqrt(76.8)  # uniform
    table = np.corrcoef([values for values, *_ in drawn.values()])
    assert abs(table - np.eye(4)).max() < 0.15  # each on its own


def test_warp_read_off_the_ramp_predicts_the_view_of_another_image(run_graph, png_of):
    on_ramp = views_of(run_graph, png_of(ramp()), batch=4, seed=3, **WARP)
    on_waves = views_of(run_graph, png_of(smooth()), batch=4, seed=3, **WARP)
    source = smooth().astype(float)
    for view, waves in zip(
        on_ramp.reshape(-1, 40, 40, 3), on_waves.reshape(-1, 40, 40, 3), strict=True
    ):
        matrix, center = place(view)
        y, x = np.mgrid[0:40, 0:40] + 0.5 - 20
        x, y = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y])) + center[:, None, None] - 0.5
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        right, down = (x - left)[..., None], (y - top)[..., None]
        above = source[top, left] * (1 - right) + source[top, left + 1] * right
        below = source[top + 1, left] * (1 - right) + source[top + 1, left + 1] * right

        assert abs(above * (1 - down) + below * down - waves).max() < 4


@pytest.mark.parametrize(("height", "width"), [(80, 120), (120, 90)])
def test_seed_is_the_middle_of_an_image_that_is_not_square(run_graph, png_of, height, width):
    still = {**WARP, "translation": 0.0, "scale": (1.0, 1.0), "rotation": 0.0, "views": 2}
    views = views_of(run_graph, png_of(ramp(height, width)), batch=2, **still)
    size = min(height, width) / 3 / 40  # pixels of the ramp in one of a view

    for view in views.reshape(-1, 40, 40, 3):
        matrix, center = place(view)
        np.testing.assert_allclose(matrix, np.eye(2) * size, atol=0.02)
        np.testing.assert_allclose(center, [width / 2, height / 2], atol=0.3)


def test_large_image_is_shrunk_without_aliasing(run_graph, png_of):
    board = (np.indices((960, 960)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=-1)
    views = views_of(run_graph, png_of(image), batch=2, **WARP)  # 8 pixels in one of a view

    assert abs(views.astype(int) - 127.5).max() < 3


def test_beyond_the_image_its_border_goes_on(run_graph, png_of):
    flat = np.full((60, 80, 3), (90, 120, 150), np.uint8)
    views = views_of(run_graph, png_of(flat), **{**WARP, "seed_patch": 1.0, "rotation": 180.0})

    assert (views == (90, 120, 150)).all()


def test_crops_have_their_shares_of_the_area_and_their_aspects(run_graph, png_of):
    options = {**PLAIN, "size": 40, "area": (0.1, 1.0)}
    views = views_of(run_graph, png_of(ramp()), runs=2, **options).reshape(-1, 40, 40, 3)
    found = [place(view) for view in views]
    sides = np.stack([np.diag(matrix) for matrix, _ in found]) * 40  # width, height
    centers = np.stack([center for _, center in found])
    area, aspect = sides.prod(axis=1) / SIDE**2, sides[:, 0] / sides[:, 1]

    assert all(abs(np.diag(matrix[::-1])).max() < 0.02 for matrix, _ in found)  # upright
    assert 0.09 < area.min() < 0.13
    assert 0.9 < area.max() < 1.02
    assert 0.73 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.37
    assert (centers - sides / 2).min() > -1
    assert (centers + sides / 2).max() < SIDE + 1


@pytest.mark.parametrize("geometry", ["crop", "warp"])
def test_every_view_is_flipped_on_its_own(run_graph, png_of, geometry):
    options = {**PLAIN, "geometry": geometry, "size": 40, "flip": 0.25}
    views = views_of(run_graph, png_of(ramp()), **options)
    mirrored = views[..., 20, 0, 0] > views[..., 20, -1, 0]

    assert 0.18 < mirrored.mean() < 0.32
    some = mirrored.any(axis=1) & ~mirrored.all(axis=1)
    assert some.mean() > 0.6


# -- colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["crop", "warp"])
def test_all_views_of_an_image_are_gray_or_none_is(run_graph, png_of, geometry):
    options = {**PLAIN, "geometry": geometry, "size": 32, "grayscale": 0.66}
    views = views_of(run_graph, png_of(noise(96)), runs=8, **options)
    views = views.astype(int)
    gray = (views.max(axis=-1) - views.min(axis=-1)).max(axis=(2, 3)) == 0  # [N, K]

    assert (gray.any(axis=1) == gray.all(axis=1)).all()
    assert 0.57 < gray[:, 0].mean() < 0.75


@pytest.mark.parametrize("geometry", ["crop", "warp"])
def test_gray_stays_gray_through_contrast_2(run_graph, png_of, geometry):
    options = {**PLAIN, **DOSOVITSKIY, "geometry": geometry, "size": 32, "grayscale": 1.0}
    options["components"] = (1.0, 1.0)
    views = views_of(run_graph, png_of(noise(96)), batch=8, **options)

    assert (views.max(axis=-1) == views.min(axis=-1)).all()


def test_contrast_1_stretches_along_the_principal_components_of_natural_colours(run_graph, png_of):
    colors = noise(32, 95, 135)  # far enough from 0 and 255 for any factor
    options = {**WHOLE, "size": 32, "components": (0.5, 2.0)}
    views = views_of(run_graph, png_of(colors), **options).reshape(-1, 32 * 32, 3)
    known = np.concatenate([colors.reshape(-1, 3), np.ones((32 * 32, 1))], axis=1)
    factors = []
    for view in views:
        fit, *_ = np.linalg.lstsq(known, view.astype(float), rcond=None)
        matrix, shift = fit[:3].T, fit[3]
        np.testing.assert_allclose(matrix, matrix.T, atol=0.02)
        center = np.array([123.7, 116.3, 103.5])
        np.testing.assert_allclose(matrix @ center + shift, center, atol=1)  # the mean stays
        # ImageNet's components as published with AlexNet's colour changes
        components = np.array(
            [[0.5675, 0.5808, 0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
        )
        along = components @ matrix @ components.T
        assert abs(along - np.diag(np.diag(along))).max() < 0.02
        factors.append(np.diag(along))

    logs = np.log2(factors)  # [N, 3]
    assert -1.02 < logs.min() < -0.95
    assert 0.95 < logs.max() < 1.02
    assert abs(logs.mean(axis=0)).max() < 5 * 2 / math.sqrt(12 * len(logs))
    assert abs(np.corrcoef(logs.T) - np.eye(3)).max() < 0.25  # each component for itself


def slow_contrast_2(pixels, power_s, power_v, factor, offset_s, offset_v):
    changed = np.empty(pixels.shape)
    for at in np.ndindex(pixels.shape[:-1]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[at] / 255))
        saturation = min(max(saturation**power_s * factor + offset_s, 0), 1)
        value = min(max(value**power_v * factor + offset_v, 0), 1)
        changed[at] = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    return changed


def not_gray(side=24) -> np.ndarray:
    """Noise, with some black and saturated pixels, but no gray: colorsys gives gray the hue red."""
    pixels = noise(side)
    pixels[0] = 0
    pixels[1] = (255, 0, 0)
    pixels[2] = (0, 255, 254)
    gray = pixels.max(axis=-1) == pixels.min(axis=-1)
    pixels[gray & (pixels[..., 0] > 0)] = (10, 20, 30)
    return pixels


@pytest.mark.parametrize(("power", "factor"), [(1.0, 1.3), (0.25, 1.0), (4.0, 1.0), (2.5, 0.7)])
def test_contrast_2_is_that_of_hsv(run_graph, png_of, power, factor):
    pixels = not_gray()
    options = {**WHOLE, "size": 24, "powers": (power, power), "factors": (factor, factor)}
    views = views_of(run_graph, png_of(pixels), batch=2, **options)
    expected = slow_contrast_2(pixels, power, power, factor, 0, 0)

    assert abs(views - expected).max() <= 0.51  # rounded to whole numbers, no more


def test_contrast_2_draws_both_powers_and_both_offsets_for_each_view(run_graph, png_of):
    pixels = np.empty((16, 16, 3), np.uint8)
    pixels[:8] = (204, 153, 102)  # value 0.8, saturation 0.5
    pixels[8:] = (51, 128, 90)
    options = {**WHOLE, "size": 16, "powers": (0.25, 4.0)}
    views = views_of(run_graph, png_of(pixels), runs=2, **options).reshape(-1, 16, 16, 3)
    hsv = np.array([colorsys.rgb_to_hsv(*(view[0, 0] / 255)) for view in views])
    power_s = np.log(hsv[:, 1]) / math.log(0.5)
    power_v = np.log(hsv[:, 2]) / math.log(0.8)
    for powers in (np.log(power_s) / math.log(4), np.log(power_v) / math.log(4)):
        assert -1.05 < powers.min() < -0.9
        assert 0.9 < powers.max() < 1.05
        assert abs(powers.mean()) < 5 * 2 / math.sqrt(12 * len(powers))
    assert abs(np.corrcoef(np.log(power_s), np.log(power_v))[0, 1]) < 0.2
    for view, s, v in zip(views[:64], power_s, power_v, strict=False):
        expected = slow_contrast_2(pixels[[0, 8], :1], s, v, 1, 0, 0)
        assert abs(view[[0, 8], :1] - expected).max() < 3  # powers were read off rounded pixels

    shifted = views_of(
        run_graph, png_of(pixels), runs=2, **{**WHOLE, "size": 16, "offsets": 0.1}
    ).reshape(-1, 16, 16, 3)
    hsv = np.array([colorsys.rgb_to_hsv(*(view[0, 0] / 255)) for view in shifted])
    for offset in (hsv[:, 1] - 0.5, hsv[:, 2] - 0.8):
        assert -0.105 < offset.min() < -0.09
        assert 0.09 < offset.max() < 0.105
    assert abs(hsv[:, 0] - colorsys.rgb_to_hsv(204, 153, 102)[0]).max() < 0.01  # hue is left


def test_every_view_has_colours_of_its_own(run_graph, png_of):
    flat = np.full((32, 32, 3), (120, 90, 60), np.uint8)
    jitter = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    for options in (jitter, DOSOVITSKIY):
        views = views_of(run_graph, png_of(flat), batch=4, **{**WHOLE, "size": 32, **options})
        for eight in views[:, :, 0, 0]:
            assert len(np.unique(eight, axis=0)) >= 7


# -- the graph as a whole -----------------------------------------------------------------------

KINDS = [{"geometry": "crop"}, {"geometry": "warp", **DOSOVITSKIY}]


@pytest.mark.parametrize("options", KINDS)
def test_one_seed_repeats_two_differ_and_so_do_the_views(run_graph, png_of, options):
    png = png_of(smooth())
    first, again, other = (
        views_of(run_graph, png, batch=4, size=32, seed=seed, **options) for seed in (1, 1, 2)
    )

    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3, 4)).all()
    for eight in first.reshape(4, 8, -1):
        assert len(np.unique(eight, axis=0)) == 8
    assert (first[0] != first[1]).any()  # the same image twice in a batch


@pytest.mark.parametrize("options", KINDS)
def test_threads_and_prefetching_change_nothing(run_graph, png_of, options):
    png, options = png_of(smooth()), exemplar.Options(size=32, **options)
    one = run_graph(exemplar, options, [png] * 6, runs=3, threads=1, prefetch=1)
    two = run_graph(exemplar, options, [png] * 6, runs=3, threads=2, prefetch=3)

    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked(run_graph, png_of, size, options):
    options = exemplar.Options(size=size, views=3, **options)
    out = run_graph(exemplar, options, [png_of(smooth(50, 70))] * 2)

    assert out["views"].shape == (2, 3, size, size, 3)
    assert out["views"].dtype == np.uint8
    assert out["index"].tolist() == [[0], [1]]
    assert out["index"].dtype == np.int64


def test_images_are_said_to_be_resized_to_what_the_views_need():
    assert exemplar.Options().largest_crop == 224
    assert exemplar.Options(geometry="warp", size=32).largest_crop == 96
    assert exemplar.Options(geometry="warp", size=32, seed_patch=1.0).region == 1
    assert exemplar.Options().classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, r"views \(0\) must be at least 1"),
        ({"size": 4}, r"size \(4\) must be at least 8"),
        ({"views": 10**9}, r"views \(1000000000\) must be at most 1024"),
        ({"area": (0.5, 0.2)}, r"area \(\[0.5, 0.2\]\) must be two ascending fractions"),
        ({"aspect": (0.0, 1.0)}, r"aspect \(\[0.0, 1.0\]\) must be two ascending numbers above 0"),
        ({"powers": (4.0, 0.25)}, r"powers \(\[4.0, 0.25\]\) must be two ascending numbers"),
        (
            {"geometry": "warp", "seed_patch": 1.5},
            r"seed_patch \(1.5\) must be above 0 and at most 1",
        ),
        ({"geometry": "warp", "rotation": 200.0}, r"rotation \(200.0\) must be in degrees"),
        ({"geometry": "warp", "translation": -1.0}, r"translation \(-1.0\) must be at least 0"),
        ({"grayscale": 1.5}, r"grayscale \(1.5\) must be a probability"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
        (
            {"scale": (0.5, 2.0)},
            r"scale \(\(0.5, 2.0\)\) must be left at \(0.7, 1.4\): it is not read with geometry cr",
        ),
        (
            {"geometry": "warp", "area": (0.5, 1.0)},
            r"area \(\(0.5, 1.0\)\) must be left at .* geometry warp",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        exemplar.Options(**options)
