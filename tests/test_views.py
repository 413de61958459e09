"""The single view and the two views: where each was cut from, and what was done to its colours."""

import numpy as np
import pytest

from pipelines import single_view, two_views

# Red counts columns and green counts rows, so that a pixel tells where it was cut from; encoded
# without loss (PNG).
SIDE = 96

# Nothing changes colours and the crop is the image: what a test is not about.
BARE = {
    "image_size": SIDE,
    "image_area": (1.0, 1.0),
    "image_aspect": (1.0, 1.0),
    "flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale": 0.0,
}
BARE_TWO = {**BARE, "blur": 0.0}

# graph, its bare options, the views it puts out
SINGLE = (single_view, BARE, ["image"])
TWO = (two_views, BARE_TWO, ["query", "key"])
BOTH = pytest.mark.parametrize(("graph", "bare", "views"), [SINGLE, TWO], ids=["single", "two"])


def ramp() -> np.ndarray:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def flat() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), (120, 90, 60), np.uint8)


@pytest.fixture
def outputs(run_graph, png_of):
    """Runs a graph on one picture, 64 times over: outputs by name."""

    def run(graph, pixels, *, runs=1, batch=64, seed=0, threads=2, prefetch=2, **options):
        encoded = [png_of(pixels)] * batch
        options = graph.Options(**options)
        return run_graph(
            graph, options, encoded, runs=runs, seed=seed, threads=threads, prefetch=prefetch
        )

    return run


def extent(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height in the ramp's pixels of what each image was cut from, to about one."""
    images = images.astype(float)
    last = images.shape[1] - 1
    middle = last // 2
    width = abs(images[:, middle, last, 0] - images[:, middle, 0, 0]) / 2
    height = (images[:, last, middle, 1] - images[:, 0, middle, 1]) / 2
    return width * (last + 1) / last, height * (last + 1) / last


# -- where the pixels are from ------------------------------------------------------------------


@BOTH
def test_nothing_asked_for_leaves_the_pixels_alone(outputs, graph, bare, views):
    out = outputs(graph, noise(), batch=4, **bare)

    for name in views:
        np.testing.assert_array_equal(out[name], np.broadcast_to(noise(), (4, SIDE, SIDE, 3)))
    assert out["index"].tolist() == [[0], [1], [2], [3]]
    assert set(out) == {*views, "index"}


@BOTH
def test_crops_have_the_area_and_the_aspect_asked_for(outputs, graph, bare, views):
    ranges = {"image_area": (0.2, 0.6), "image_aspect": (0.5, 2.0)}
    out = outputs(graph, ramp(), runs=8, **{**bare, **ranges})

    for name in views:
        width, height = extent(out[name])
        area, aspect = width * height / SIDE**2, width / height
        assert 0.17 < area.min() < 0.23
        assert 0.57 < area.max() < 0.63
        assert abs(area.mean() - 0.4) < 0.03  # uniform
        assert 0.47 < aspect.min() < 0.56
        assert 1.8 < aspect.max() < 2.1
        assert abs(np.log(aspect).mean()) < 0.1  # as often upright as wide
        # anywhere in the image
        left = out[name][:, 0, :, 0].min(axis=1) / 2
        top = out[name][:, :, 0, 1].min(axis=1) / 2
        assert left.min() < 2
        assert top.min() < 2
        assert (left + width).max() > SIDE - 2
        assert (top + height).max() > SIDE - 2


@BOTH
def test_flip_mirrors_with_its_probability(outputs, graph, bare, views):
    out = outputs(graph, ramp(), runs=8, **{**bare, "flip": 0.25})
    mirrored = {name: out[name][:, 0, 0, 0] > out[name][:, 0, -1, 0] for name in views}

    for name in views:
        assert 0.18 < mirrored[name].mean() < 0.32
        np.testing.assert_array_equal(out[name][mirrored[name]][0], ramp()[:, ::-1])
    if graph is two_views:  # each view for itself: both in a sixteenth
        both = (mirrored["query"] & mirrored["key"]).mean()
        assert 0.03 < both < 0.10


def test_two_views_are_cut_from_different_places(outputs):
    out = outputs(two_views, ramp(), runs=4, **{**BARE_TWO, "image_area": (0.1, 0.3)})
    query, key = (out[name][:, 0, 0, :2].astype(float) for name in ("query", "key"))

    assert (abs(query - key).max(axis=1) > 4).mean() > 0.9
    # and the place of one tells nothing of the other's
    assert abs(np.corrcoef(query[:, 0], key[:, 0])[0, 1]) < 0.2


# -- colours ------------------------------------------------------------------------------------


@BOTH
def test_grayscale_has_its_probability_and_equal_channels(outputs, graph, bare, views):
    out = outputs(graph, noise(), runs=4, **{**bare, "grayscale": 0.3})
    r, g, b = np.moveaxis(noise().astype(float), -1, 0)
    luma = np.rint(0.299 * r + 0.587 * g + 0.114 * b)

    for name in views:
        images = out[name].astype(int)
        gray = (images.max(axis=-1) == images.min(axis=-1)).all(axis=(1, 2))
        assert 0.2 < gray.mean() < 0.4
        assert abs(images[gray][0, ..., 0] - luma).max() <= 1
        np.testing.assert_array_equal(images[~gray][0], noise())


@BOTH
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_a_factor_is_uniform_in_its_range(outputs, graph, bare, views, name):
    always = {"jitter": 1.0} if graph is two_views else {}
    out = outputs(graph, flat(), runs=8, **{**bare, **always, name: 0.4})
    pivot = {"brightness": 0, "contrast": 128}[name]

    for view in views:
        factor = (out[view][:, 0, 0, 2].astype(float) - pivot) / (60 - pivot)
        assert 0.58 < factor.min() < 0.65
        assert 1.35 < factor.max() < 1.42
        assert abs(factor.mean() - 1) < 0.05


@BOTH
@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_colours_change_and_a_gray_image_does_not(outputs, graph, bare, views, name):
    always = {"jitter": 1.0} if graph is two_views else {}
    out = outputs(graph, flat(), **{**bare, **always, name: 0.4})
    gray = outputs(graph, np.full_like(flat(), 100), batch=8, **{**bare, **always, name: 0.4})

    for view in views:
        assert len(np.unique(out[view][:, 0, 0], axis=0)) > 30
        assert abs(gray[view].astype(int) - 100).max() <= 1


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


@pytest.mark.parametrize("changes", [JITTER, {"brightness": 0.4}, {"hue": 0.1}])
def test_jitter_happens_with_its_probability_and_else_changes_no_pixel(outputs, changes):
    out = outputs(two_views, noise(), runs=8, **{**BARE_TWO, **changes, "jitter": 0.7})
    same = {name: (out[name] == noise()).all(axis=(1, 2, 3)) for name in ("query", "key")}

    for name in same:
        assert 0.24 < same[name].mean() < 0.36
    assert 0.05 < (same["query"] & same["key"]).mean() < 0.14  # each view for itself: 0.09


def test_jitter_of_probability_0_is_none(outputs):
    out = outputs(two_views, noise(), batch=8, **{**BARE_TWO, **JITTER, "jitter": 0.0})

    assert (out["query"] == noise()).all()


# -- blur ---------------------------------------------------------------------------------------


def blurred(sigma: float) -> np.ndarray:
    """The noise under a Gaussian in float64, without the border that it can't know."""
    reach = np.arange(-12, 13)
    weight = np.exp(-(reach**2) / (2 * sigma**2))
    weight /= weight.sum()
    windows = np.lib.stride_tricks.sliding_window_view
    rows = windows(noise().astype(float), 25, axis=0) @ weight
    return windows(rows, 25, axis=1) @ weight


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_blur_is_a_gaussian_of_its_sigma(outputs, sigma):
    options = {**BARE_TWO, "blur": 1.0, "blur_sigma": (sigma, sigma)}
    image = outputs(two_views, noise(), batch=2, **options)["query"][0].astype(float)

    assert abs(image[12:-12, 12:-12] - blurred(sigma)).max() < 2  # cut off at three sigma


def test_blur_has_its_probability_and_its_range_and_else_changes_no_pixel(outputs):
    out = outputs(two_views, noise(), runs=8, **{**BARE_TWO, "blur": 0.4, "blur_sigma": (0.5, 2.0)})
    sharp = (out["query"] == noise()).all(axis=(1, 2, 3))
    assert 0.53 < sharp.mean() < 0.67

    spread = out["query"][~sharp][:, 12:-12, 12:-12].std(axis=(1, 2, 3))
    assert blurred(2.0).std() - 1 < spread.min() < blurred(1.9).std() + 1
    assert blurred(0.6).std() < spread.max() < blurred(0.5).std() + 1
    # one view is blurred and the other not as often as chance says: 0.48
    other = (out["key"] == noise()).all(axis=(1, 2, 3))
    assert 0.4 < (sharp != other).mean() < 0.56


# -- the same again -----------------------------------------------------------------------------


@BOTH
def test_one_seed_repeats_and_two_differ(outputs, graph, bare, views):
    first, again, other = (
        outputs(graph, ramp(), batch=8, image_size=64, seed=seed) for seed in (1, 1, 2)
    )

    for name in views:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


@BOTH
def test_threads_and_prefetching_change_nothing(outputs, graph, bare, views):
    some = {"batch": 8, "runs": 3, "image_size": 64}
    one = outputs(graph, ramp(), threads=1, prefetch=1, **some)
    two = outputs(graph, ramp(), threads=2, prefetch=3, **some)

    for name in views:
        np.testing.assert_array_equal(one[name], two[name])


@BOTH
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked(outputs, graph, bare, views, size):
    out = outputs(graph, ramp(), batch=2, image_size=size)

    for name in views:
        assert out[name].shape == (2, size, size, 3)
        assert out[name].dtype == np.uint8
    assert graph.Options(image_size=size).largest_crop == size
    assert graph.Options(image_size=size).classes == 0


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, r"image_size \(4\) must be at least 8"),
        ({"image_area": (0.5, 0.2)}, r"image_area \(\[0.5, 0.2\]\) must be two ascending"),
        ({"image_area": (0.0, 1.0)}, r"image_area \(\[0.0, 1.0\]\) must be two ascending"),
        ({"image_aspect": (2.0, 0.5)}, r"image_aspect \(\[2.0, 0.5\]\) must be two ascending"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
        ({"grayscale": -0.1}, r"grayscale \(-0.1\) must be a probability"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
        ({"contrast": -0.1}, r"contrast \(-0.1\) must be at least 0"),
        ({"brightness": 1e300}, r"brightness \(1e\+300\) must be at most 100"),
        ({"image_area": (1e-12, 1.0)}, r"image_area \(\[1e-12, 1.0\]\) must be two ascending fr"),
        ({"image_aspect": (1.0, 1e9)}, r"image_aspect \(\[1.0, 1000000000.0\]\) must be two asc"),
    ],
)
def test_what_cannot_be_is_refused_with_the_number(graph, bare, views, options, message):
    with pytest.raises(ValueError, match=message):
        graph.Options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": 2.0}, r"jitter \(2.0\) must be a probability"),
        ({"blur": 2.0}, r"blur \(2.0\) must be a probability"),
        ({"blur_sigma": (0.0, 2.0)}, r"blur_sigma \(\[0.0, 2.0\]\) must be two ascending"),
    ],
)
def test_what_cannot_be_of_two_views_is_refused_with_the_number(options, message):
    with pytest.raises(ValueError, match=message):
        two_views.Options(**options)
