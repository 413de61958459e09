"""The jigsaw graph and objective: labels read off the pixels, uniform draws, a loss as defined."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastssl.loader import Loader, Options
from fastssl.objectives import jigsaw as objective
from pipelines import jigsaw
from pipelines.permutations import permutation_set
from pipelines.readers import folder
from tests import tiny_backbone

# Red counts columns, green counts rows: a pixel says where in the image it came from. Encoded
# without loss (PNG), so that positions can be read off exactly.
SIDE = 96


def ramp(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns, rows, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


# The crop is the image itself and nothing changes colours: what is left is cutting and ordering.
BARE = {
    "resize": SIDE,
    "crop": SIDE,
    "patch": 24,
    "grayscale": 0.0,
    "permutations": 24,
    "per_image": 8,
}
PIXELS = {"shuffle": "pixels", "per_image": 1}


TINY = {"resize": 24, "crop": 24, "patch": 6}  # where only labels are looked at


def outputs(run_graph, png, *, runs=1, seed=0, batch=64, **options: Any):
    chosen = jigsaw.Options(**{**BARE, **options})
    return run_graph(jigsaw, chosen, [png] * batch, runs=runs, seed=seed)


def places(patches: np.ndarray) -> np.ndarray:
    """Row and column of each patch's upper left pixel in the ramp: [..., 2]."""
    return np.stack([patches[..., 0, 0, 1], patches[..., 0, 0, 0]], axis=-1).astype(int)


def cells_of(patches: np.ndarray, cell: int = 32, grid: int = 3) -> np.ndarray:
    """The cell that each patch lies in, by its pixels."""
    row, column = np.moveaxis(places(patches) // cell, -1, 0)
    return row * grid + column


def orders_by_label(label: np.ndarray, order: np.ndarray) -> dict[int, set[tuple[int, ...]]]:
    seen: dict[int, set[tuple[int, ...]]] = {}
    for one, row in zip(label.reshape(-1), order.reshape(len(label.reshape(-1)), -1), strict=True):
        seen.setdefault(int(one), set()).add(tuple(row.tolist()))
    return seen


def test_shuffled_pixels_are_in_the_order_that_the_label_names(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=6, **PIXELS)
    cells = cells_of(out["patches"])
    seen = orders_by_label(out["label"], cells)

    np.testing.assert_array_equal(cells, out["permutation"])
    assert set(seen) == set(range(24))  # every label occurs,
    assert all(len(orders) == 1 for orders in seen.values())  # names one order
    assert len(set.union(*seen.values())) == 24  # and no other label names it
    np.testing.assert_array_equal(cells, permutation_set(9, 24)[out["label"][:, 0]])
    np.testing.assert_array_equal(out["order"], np.tile(np.arange(9), (len(cells), 1, 1)))


def test_patches_joined_in_an_order_come_as_its_label_says(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=3)
    cells = cells_of(out["patches"])  # [images, 9]
    joined = np.take_along_axis(cells[:, None], out["order"], axis=2)
    seen = orders_by_label(out["label"], joined)

    np.testing.assert_array_equal(cells, np.tile(np.arange(9), (len(cells), 1)))
    np.testing.assert_array_equal(cells, out["permutation"])
    assert set(seen) == set(range(24))
    assert all(len(orders) == 1 for orders in seen.values())
    assert len(set.union(*seen.values())) == 24
    np.testing.assert_array_equal(joined, permutation_set(9, 24)[out["label"]])
    assert out["order"].shape == (len(cells), 8, 9)


@pytest.mark.parametrize(
    "options", [PIXELS, {"per_image": 8}, {"per_image": 5, "permutations": 23}], ids=str
)
def test_every_label_is_as_frequent_as_another(options, run_graph, png_of):
    out = outputs(run_graph, png_of(ramp(24, 24)), runs=40, **TINY, **options)
    classes = options.get("permutations", 24)
    counts = np.bincount(out["label"].ravel(), minlength=classes)
    expected = out["label"].size / classes

    assert len(counts) == classes
    assert abs(counts - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("count", [2, 5, 23, 24])
def test_the_orders_of_an_image_differ(count, run_graph, png_of):
    label = outputs(run_graph, png_of(ramp(24, 24)), runs=4, per_image=count, **TINY)["label"]

    assert all(len(set(row)) == count for row in label.tolist())
    assert len(np.unique(np.sort(label, axis=1), axis=0)) > 20 or count >= 23


def test_a_batch_shares_its_orders_and_the_next_one_has_others(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=5, batch=8, orders_of="batch")
    cells = cells_of(out["patches"])
    joined = np.take_along_axis(cells[:, None], out["order"], axis=2)
    label = out["label"].reshape(5, 8, 8)  # step, image, order

    np.testing.assert_array_equal(joined, permutation_set(9, 24)[out["label"]])
    np.testing.assert_array_equal(label, np.broadcast_to(label[:, :1], label.shape))
    assert len({tuple(row) for row in label[:, 0].tolist()}) == 5
    assert all(len(set(row)) == 8 for row in label[:, 0].tolist())
    assert len(np.unique(places(out["patches"]).reshape(40, -1), axis=0)) == 40  # cut on their own


def test_every_label_is_as_frequent_as_another_where_a_batch_shares_them(run_graph, png_of):
    options: dict[str, Any] = {**TINY, "orders_of": "batch", "batch": 2, "per_image": 4}
    label = outputs(run_graph, png_of(ramp(24, 24)), runs=400, **options)["label"][::2]
    counts = np.bincount(label.ravel(), minlength=24)

    assert len(counts) == 24
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())


@pytest.mark.parametrize("stop", [0, 3])
def test_orders_that_a_batch_shares_are_resumed(stop, demo_images):
    listed = folder.Options(root=str(demo_images / "val"), limit=60)
    samples = folder.list_samples(listed, cache=None, say=lambda _: None)
    options = jigsaw.Options(**{**BARE, "gap": 3, "orders_of": "batch"})

    def loader(threads: int) -> Loader:
        return Loader(
            folder,
            samples,
            jigsaw,
            options,
            lambda step: samples.usable[8 * step : 8 * step + 8],
            batch=8,
            seed=1,
            device=torch.device("cpu"),
            loading=Options(threads=threads),
        )

    through, resumed = loader(2), loader(1)
    for _ in range(stop):
        next(through)
    resumed.resume(through.state())
    for _ in range(3):
        one, other = next(through), next(resumed)

        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (one["label"] == one["label"][0]).all()


def test_any_two_labels_meet_in_some_image(run_graph, png_of):
    label = outputs(run_graph, png_of(ramp(24, 24)), runs=40, per_image=4, **TINY)["label"]
    together = np.zeros((24, 24), bool)
    for row in label:
        together[np.ix_(row, row)] = True

    assert together.all()


@pytest.mark.parametrize(("gap", "first", "last"), [(0, 0, 8), (1, 0, 7), (4, 2, 6), (7, 3, 4)])
def test_offsets_are_uniform_over_all_that_fit(gap, first, last, run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=8, gap=gap)
    place = places(out["patches"])
    offset = place - place // 32 * 32  # 32 - 24 = 8 pixels to spare
    values, counts = np.unique(offset, return_counts=True)

    assert values.tolist() == list(range(first, last + 1))
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    whole = ramp()
    for (row, column), patch in zip(place[0], out["patches"][0], strict=True):
        np.testing.assert_array_equal(patch, whole[row : row + 24, column : column + 24])


def first_and_last(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of patches of a ramp [images, 9, p, p, 3]: the least and greatest value, [images, 3, 3]."""
    values = patches.reshape(-1, 3, 3, patches[0, 0].size).astype(int)
    return values.min(axis=-1), values.max(axis=-1)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("gap", [0, 1, 4])
def test_patches_of_neighbouring_cells_never_touch_when_there_is_a_gap(
    gap, shift, run_graph, png_of
):
    # every colour counts columns, or rows: so all that a patch shows of the image is read off it
    columns, rows = (np.repeat(ramp()[..., [c]], 3, axis=2) for c in (0, 1))
    options = {"gap": gap, "channel_shift": shift, "runs": 4}
    left, right = first_and_last(outputs(run_graph, png_of(columns), **options)["patches"])
    top, bottom = first_and_last(outputs(run_graph, png_of(rows), **options)["patches"])
    beside = left[:, :, 1:] - right[:, :, :-1] - 1  # pixels that neither patch shows
    below = top[:, 1:] - bottom[:, :-1] - 1

    for between in (beside, below):
        assert between.min() == gap
        if not shift:
            assert set(between.ravel()) == set(range(gap, 2 * 8 - gap + 1))


def test_a_gap_of_all_that_a_cell_has_to_spare_fixes_the_middles(run_graph, png_of):
    place = places(outputs(run_graph, png_of(ramp()), batch=4, gap=8)["patches"])

    np.testing.assert_array_equal(place, np.tile(place[0], (4, 1, 1)))
    np.testing.assert_array_equal(place[0] % 32, 4)


def test_the_crop_lies_anywhere_in_the_resized_image(run_graph, png_of):
    png = png_of(ramp(108, 108))
    place = places(outputs(run_graph, png, runs=4, gap=8, resize=108)["patches"])
    start = place[:, 0] - 4  # of the crop

    for axis in (0, 1):
        assert set(start[:, axis]) == set(range(108 - 96 + 1))


def test_the_aspect_is_kept_or_not(run_graph, png_of):
    wide = png_of(np.repeat(ramp(), 2, axis=1))  # 96 x 192, red counts every second column
    squeezed = places(outputs(run_graph, wide, batch=16, gap=8)["patches"])
    kept = places(outputs(run_graph, wide, batch=16, gap=8, keep_aspect=True)["patches"])

    assert abs(squeezed[:, 2, 1] - squeezed[:, 0, 1] - 64).max() <= 1  # two cells on: the whole
    assert abs(kept[:, 2, 1] - kept[:, 0, 1] - 32).max() <= 1  # two cells on: half of the width
    assert np.ptp(kept[:, 0, 1]) > 20


def test_each_patch_is_gray_with_its_probability_and_equal_channels(run_graph, png_of):
    patches = outputs(run_graph, png_of(noise()), runs=4, grayscale=2 / 3)["patches"].astype(int)
    gray = (np.ptp(patches, axis=-1) == 0).all(axis=(2, 3))

    assert 0.63 < gray.mean() < 0.70
    assert (gray.any(axis=1) & ~gray.all(axis=1)).mean() > 0.9  # each patch on its own
    assert (np.ptp(patches, axis=-1)[~gray].mean(axis=(1, 2)) > 50).all()


def test_a_whole_image_is_gray_or_none_of_it(run_graph, png_of):
    options = {"grayscale": 0.5, "grayscale_of": "image"}
    patches = outputs(run_graph, png_of(noise()), runs=4, **options)["patches"].astype(int)
    gray = (np.ptp(patches, axis=-1) == 0).all(axis=(2, 3))

    assert 0.38 < gray.mean() < 0.62
    assert (gray.all(axis=1) | ~gray.any(axis=1)).all()


def test_each_colour_of_each_patch_is_shifted_on_its_own(run_graph, png_of):
    columns, rows = (np.repeat(ramp()[..., [c]], 3, axis=2) for c in (0, 1))
    column = outputs(run_graph, png_of(columns), runs=4, channel_shift=2)["patches"].astype(int)
    row = outputs(run_graph, png_of(rows), runs=4, channel_shift=2)["patches"].astype(int)
    place = np.stack([row[:, :, 0, 0], column[:, :, 0, 0]], axis=-1)  # [images, 9, colors, 2]
    apart = place.max(axis=2) - place.min(axis=2)

    assert set(apart.ravel()) == {0, 1, 2}
    assert (place % 32 <= 32 - 24).all()  # within their cells all the same
    assert (place[..., 0] // 32 * 3 + place[..., 1] // 32 == np.arange(9)[:, None]).all()
    span = np.arange(24)
    np.testing.assert_array_equal(column[:, :, 3, :, :], column[:, :, 0, :, :])
    np.testing.assert_array_equal(
        column[:, :, 0] - column[:, :, :1, 0], np.broadcast_to(span[:, None], (256, 9, 24, 3))
    )


def test_flip_mirrors_the_whole_image(run_graph, png_of):
    patches = outputs(run_graph, png_of(ramp()), runs=4, flip=0.5)["patches"].astype(int)
    mirrored = patches[:, :, 0, 0, 0] > patches[:, :, 0, -1, 0]

    assert 0.38 < mirrored.mean() < 0.62
    assert (mirrored.all(axis=1) | ~mirrored.any(axis=1)).all()
    assert (places(patches)[mirrored.all(axis=1), 0, 1] >= 64).all()  # cell 0 shows the right


def test_colours_of_each_patch_are_jittered_on_their_own(run_graph, png_of):
    flat = np.full((SIDE, SIDE, 3), (120, 90, 60), np.uint8)
    jitter: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    patches = outputs(run_graph, png_of(flat), batch=4, **jitter)["patches"]

    for nine in patches[:, :, 0, 0]:
        assert len(np.unique(nine, axis=0)) == 9


def test_one_seed_repeats_and_two_differ(run_graph, png_of):
    png = png_of(ramp())
    first, again, other = (outputs(run_graph, png, seed=seed, batch=8) for seed in (1, 1, 2))

    for name in ("patches", "order", "label"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


@pytest.mark.parametrize("orders_of", ["image", "batch"])
def test_threads_and_prefetching_change_nothing(orders_of, run_graph, png_of):
    hard = {"grayscale": 0.5, "channel_shift": 1, "gap": 3, "orders_of": orders_of}
    options = jigsaw.Options(**{**BARE, **hard})
    png = png_of(ramp(120, 100))
    one = run_graph(jigsaw, options, [png] * 8, runs=3, threads=1, prefetch=1)
    two = run_graph(jigsaw, options, [png] * 8, runs=3, threads=2, prefetch=3)

    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked(run_graph, png_of, size, grid):
    cell = size // grid
    patch = cell * 3 // 4
    options = {"resize": size, "crop": grid * cell, "grid": grid, "patch": patch}
    out = outputs(run_graph, png_of(ramp()), batch=2, permutations=10, per_image=3, **options)

    assert out["patches"].shape == (2, grid**2, patch, patch, 3)
    assert out["order"].shape == (2, 3, grid**2)
    assert out["permutation"].shape == (2, grid**2)
    assert out["label"].shape == (2, 3)
    assert {values.dtype.name for values in out.values()} == {"uint8", "int64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 90}, r"patch \(90\) must fit in a cell \(85 = crop 255 / grid 3\)"),
        (
            {"patch": 84, "channel_shift": 2},
            r"patch \(84\) \+ channel_shift \(2\) must fit in a cell \(85",
        ),
        ({"crop": 256}, r"crop \(256\) must be a multiple of grid \(3\): 255 or 258"),
        ({"resize": 200}, r"crop \(255\) must fit in resize \(200\)"),
        ({"crop": 6}, r"crop \(6\) must be at least 8"),
        ({"patch": 2}, r"patch \(2\) must be at least 4"),
        ({"grid": 1}, r"grid \(1\) must be at least 2"),
        ({"grid": 4}, r"grid \(4\) must be 2 or 3"),
        ({"gap": -1}, r"gap \(-1\) must be at least 0"),
        (
            {"gap": 22},
            r"gap \(22\) must be at most 21, what patch \(64\) leaves of a cell \(85",
        ),
        (
            {"gap": 20, "channel_shift": 2},
            r"gap \(20\) must be at most 19, what patch \(64\) \+ channel_shift \(2\) leaves",
        ),
        (
            {"shuffle": "pixels", "per_image": 1, "orders_of": "batch"},
            r"orders_of \('batch'\) must be 'image' with shuffle 'pixels'",
        ),
        ({"channel_shift": -1}, r"channel_shift \(-1\) must be at least 0"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
        ({"grayscale": -0.1}, r"grayscale \(-0.1\) must be a probability"),
        ({"saturation": -1.0}, r"saturation \(-1.0\) must be at least 0"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
        ({"permutations": 1}, r"permutations \(1\) must be in 2 ... 362880"),
        ({"grid": 2, "crop": 254, "permutations": 25}, r"permutations \(25\) must be in 2 ... 24"),
        ({"shuffle": "pixels"}, r"per_image \(16\) must be 1 with shuffle 'pixels'"),
        ({"permutations": 10}, r"per_image \(16\) must be in 1 ... permutations \(10\)"),
        ({"per_image": 0}, r"per_image \(0\) must be in 1 ... permutations \(100\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        jigsaw.Options(**options)


def test_options_tell_the_size_and_the_number_of_labels():
    options = jigsaw.Options()

    assert options.largest_crop == 292
    assert options.classes == 100


# -- objective ----------------------------------------------------------------------------------


def build(classes: int = 24, **options) -> objective.Objective:
    torch.manual_seed(0)
    return objective.Objective(
        tiny_backbone.backbone(tiny_backbone.Options()),
        objective.Options(**{"embedding": 16, "hidden": 32, **options}),
        images=8,
        classes=classes,
        labels=None,
        seed=0,
    )


def last_layer(one: objective.Objective) -> torch.nn.Linear:
    last = one.head.classify[-1]
    assert isinstance(last, torch.nn.Linear)
    return last


def loaded(out: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """As the loader hands them on."""
    tensors = {name: torch.from_numpy(values) for name, values in out.items()}
    tensors["patches"] = tensors["patches"].movedim(-1, -3)
    tensors["index"] = tensors["index"].squeeze(1)
    return tensors


@pytest.mark.parametrize("standardize", ["joint", "channel", "global"])
def test_permuting_features_is_permuting_pixels(standardize, run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(noise()), batch=4, grayscale=0.5))
    one = build(standardize=standardize).eval()
    loss, metrics = one(**tensors)

    losses, right = [], []
    for n in range(8):
        order = tensors["order"][:, n]
        shuffled = {
            "patches": torch.stack([p[o] for p, o in zip(tensors["patches"], order, strict=True)]),
            "permutation": order,
            "order": torch.arange(9).expand(4, 1, 9),
            "label": tensors["label"][:, n],  # [B], as the loader squeezes one label an image
            "index": tensors["index"],
        }
        each, its_metrics = one(**shuffled)
        losses.append(each)
        right.append(its_metrics["accuracy"])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["accuracy"], torch.stack(right).mean())


def test_without_a_preference_the_loss_is_the_logarithm_of_the_number_of_orders(run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(noise()), batch=4))
    one = build()
    torch.nn.init.zeros_(last_layer(one).weight)
    loss, metrics = one(**tensors)

    assert loss.item() == pytest.approx(math.log(24), abs=1e-6)
    assert metrics["chance"].item() == pytest.approx(1 / 24)


def test_the_orders_are_learnt(run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(ramp()), batch=16))
    one = build(dropout=0.0, standardize="global")
    optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
    for _ in range(30):
        loss, _ = one(**tensors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss, metrics = one(**tensors)

    assert metrics["accuracy"] > 0.9
    assert loss < 0.5


def test_another_number_of_patches_is_refused(run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(noise()), batch=2))

    with pytest.raises(ValueError, match=r"patches \(4\) must be as many as the pipeline .* 9"):
        build(patches=4)(**tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": 5}, r"patches \(5\) must be 9 or 4"),
        ({"embedding": 0}, r"embedding \(0\) must be at least 1, or null"),
        ({"hidden": -1}, r"hidden \(-1\) must be at least 1, or null"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"hidden": None}, r"dropout \(0.5\) must be 0 without a hidden layer"),
        (
            {"embedding": None, "embedding_norm": True},
            r"embedding_norm \(true\) must be false without an embedding",
        ),
    ],
)
def test_a_head_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objective.Options(**options)
