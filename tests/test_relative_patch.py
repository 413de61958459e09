"""The relative patch graph and objective: the neighbour found in the pixels, shortcuts hidden."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastssl.objectives import relative_patch as objective
from pipelines import relative_patch
from tests import tiny_backbone

# Red counts columns, green counts rows: a pixel says where in the image it came from.
SIDE = 96
BARE = {"resize": SIDE, "crop": SIDE, "patch": 24, "grayscale": 0.0}
DIRECTIONS = [  # of label 0 ... 7: rows down and columns right of the centre
    *((-1, -1), (-1, 0), (-1, 1)),
    *((0, -1), (0, 1)),
    *((1, -1), (1, 0), (1, 1)),
]


def ramp(side: int = SIDE) -> np.ndarray:
    rows, columns = np.mgrid[0:side, 0:side]
    return np.stack([columns, rows, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def outputs(run_graph, png, *, runs=1, seed=0, batch=64, **options: Any):
    chosen = relative_patch.Options(**{**BARE, **options})
    return run_graph(relative_patch, chosen, [png] * batch, runs=runs, seed=seed)


def places(patches: np.ndarray) -> np.ndarray:
    """Row and column of each patch's upper left pixel in the ramp: [..., 2]."""
    return np.stack([patches[..., 0, 0, 1], patches[..., 0, 0, 0]], axis=-1).astype(int)


def directions(out: dict[str, np.ndarray]) -> np.ndarray:
    """From the centre of each pair to the other, in cells: [images, N, 2]."""
    place, pair = places(out["patches"]), out["pair"]
    images = np.arange(len(place))[:, None]
    apart = place[images, pair[..., 0]] - place[images, pair[..., 1]]
    return np.rint(apart / 32).astype(int)  # offsets make up to 8 pixels of 32


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_the_label_is_the_direction_that_the_pixels_show(pairs, run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), runs=2, pairs=pairs)

    np.testing.assert_array_equal(directions(out), np.array(DIRECTIONS)[out["label"]])


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_the_second_of_a_pair_is_the_centre(pairs, run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), pairs=pairs)
    place = places(out["patches"])
    centre = place[np.arange(len(place))[:, None], out["pair"][..., 1]]

    assert (centre // 32 == 1).all()


def test_all_pairs_are_the_eight_neighbours_of_nine_patches(run_graph, png_of):
    out = outputs(run_graph, png_of(ramp()), batch=4)
    row, column = np.moveaxis(places(out["patches"]) // 32, -1, 0)

    np.testing.assert_array_equal(row * 3 + column, np.tile(np.arange(9), (4, 1)))
    np.testing.assert_array_equal(out["label"], np.tile(np.arange(8), (4, 1)))
    assert out["pair"].shape == (4, 8, 2)


def test_one_pair_an_image_has_every_neighbour_as_often(run_graph, png_of):
    tiny = {"resize": 24, "crop": 24, "patch": 6}
    out = outputs(run_graph, png_of(ramp(24)), runs=30, pairs="one", **tiny)
    counts = np.bincount(out["label"].ravel(), minlength=8)

    assert len(counts) == 8
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    assert out["patches"].shape[1:] == (2, 6, 6, 3)
    assert out["pair"].shape[1:] == (1, 2)


@pytest.mark.parametrize("pairs", ["all", "one"])
@pytest.mark.parametrize(("gap", "first", "last"), [(0, 0, 8), (3, 1, 6), (6, 3, 5)])
def test_offsets_are_uniform_and_no_pair_touches_when_there_is_a_gap(
    gap, first, last, pairs, run_graph, png_of
):
    out = outputs(run_graph, png_of(ramp()), runs=8, pairs=pairs, gap=gap)
    place = places(out["patches"])
    values, counts = np.unique(place % 32, return_counts=True)
    images = np.arange(len(place))[:, None]
    apart = abs(place[images, out["pair"][..., 0]] - place[images, out["pair"][..., 1]])
    straight = np.isin(out["label"], [1, 3, 4, 6])  # above, left, right, below
    between = apart.max(axis=-1)[straight] - 24

    assert values.tolist() == list(range(first, last + 1))
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    assert (apart.max(axis=-1) >= 24 + gap).all()
    # one of the two axes of a diagonal pair is apart, too; 32 - 24 = 8 pixels to spare
    assert set(between) == set(range(gap, 2 * 8 - gap + 1))


def test_doersch_s_patches_are_48_apart_with_a_jitter_of_7_each(run_graph, png_of):
    coarse = ramp(216)  # every value stands for 2 pixels, so that 432 of them fit in a byte
    doersch = {"resize": 432, "crop": 432, "patch": 96, "gap": 34}
    exact = relative_patch.Options(**{**BARE, **doersch})
    patches = run_graph(relative_patch, exact, [png_of(coarse)] * 32)["patches"]
    offset = 2 * places(patches) - 144 * np.stack(np.divmod(np.arange(9), 3), axis=-1)

    assert offset.min() in (24 - 8, 24 - 7, 24 - 6)  # enlarged: within a pixel
    assert offset.max() in (24 + 6, 24 + 7, 24 + 8)


def test_a_gap_of_all_that_a_cell_has_to_spare_fixes_the_middles(run_graph, png_of):
    place = places(outputs(run_graph, png_of(ramp()), batch=4, gap=8)["patches"])

    np.testing.assert_array_equal(place % 32, 4)


@pytest.mark.parametrize("of", ["patch", "image"])
def test_gray_has_its_probability_and_equal_channels(of, run_graph, png_of):
    options = {"grayscale": 0.5, "grayscale_of": of}
    patches = outputs(run_graph, png_of(noise()), runs=4, **options)["patches"].astype(int)
    gray = (np.ptp(patches, axis=-1) == 0).all(axis=(2, 3))
    alike = gray.all(axis=1) | ~gray.any(axis=1)

    assert 0.38 < gray.mean() < 0.62
    assert alike.all() if of == "image" else alike.mean() < 0.1


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_dropped_channels_become_faint_noise_about_gray(pairs, run_graph, png_of):
    out = outputs(run_graph, png_of(noise()), runs=4, channel_drop=0.5, pairs=pairs)
    values = out["patches"].reshape(-1, 24 * 24, 3).astype(float)
    spread, mean = values.std(axis=1), values.mean(axis=1)
    faint = spread < 3  # of the picture itself: 74
    dropped = faint.any(axis=1)

    assert abs(dropped.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(dropped))
    assert (faint[dropped].sum(axis=1) == 2).all()  # two of three, and all of each
    kept = np.bincount((~faint[dropped]).argmax(axis=1), minlength=3)
    assert abs(kept - kept.mean()).max() < 5 * math.sqrt(kept.mean())
    assert abs(mean[faint] - 128).max() < 0.3
    # a hundredth of 74, and the spread of rounding
    assert math.sqrt(0.74**2 + 1 / 12) == pytest.approx(spread[faint].mean(), rel=0.05)


@pytest.mark.parametrize("option", ["channel_drop", "downsample"])
def test_an_option_leaves_the_pixels_of_other_patches_as_they_are(option, run_graph, png_of):
    png = png_of(noise())
    plain = outputs(run_graph, png, batch=16)["patches"]
    with_it: dict[str, Any] = {option: 0.33}
    changed = outputs(run_graph, png, batch=16, **with_it)["patches"]
    same = (plain == changed).all(axis=(2, 3, 4))

    assert 0.5 < same.mean() < 0.8


def test_a_downsampled_patch_has_lost_its_detail_and_nothing_else(run_graph, png_of):
    stripes = np.zeros((SIDE, SIDE, 3), np.uint8)
    stripes[::2] = 200  # a detail of one pixel,
    stripes[:, 48:] //= 2  # and a broad shape
    out = outputs(run_graph, png_of(stripes), runs=4, downsample=1.0, gap=8)
    detail = out["patches"][:, 0, 1:].astype(float) - out["patches"][:, 0, :-1]
    left = abs(detail).mean(axis=(1, 2, 3)) / 200

    assert left.max() < 0.97  # a side of 23 of 24 keeps most,
    assert left.min() < 0.1  # a side of 2 or 3 nothing
    assert len(np.unique(left.round(3))) > 15  # and all sides between occur
    middle = out["patches"][:, 0].mean(axis=(1, 2, 3))
    assert abs(middle - 100).max() < 8


def test_each_colour_of_each_patch_is_shifted_on_its_own(run_graph, png_of):
    columns = np.repeat(ramp()[..., :1], 3, axis=2)
    patches = outputs(run_graph, png_of(columns), runs=2, channel_shift=2)["patches"].astype(int)
    column = patches[:, :, 0, 0]
    apart = np.ptp(column, axis=-1)

    assert set(apart.ravel()) == {0, 1, 2}
    assert (column % 32 <= 32 - 24).all()


def test_one_seed_repeats_and_two_differ(run_graph, png_of):
    options = {"pairs": "one", "channel_drop": 0.5, "downsample": 0.5}
    first, again, other = (
        outputs(run_graph, png_of(ramp()), batch=8, seed=seed, **options) for seed in (1, 1, 2)
    )

    for name in ("patches", "label"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_threads_and_prefetching_change_nothing(run_graph, png_of):
    hard = {"grayscale": 0.5, "channel_shift": 1, "gap": 3, "channel_drop": 0.5, "downsample": 0.5}
    options = relative_patch.Options(**{**BARE, **hard})
    one = run_graph(relative_patch, options, [png_of(noise())] * 8, runs=3, threads=1, prefetch=1)
    two = run_graph(relative_patch, options, [png_of(noise())] * 8, runs=3, threads=2, prefetch=3)

    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.parametrize("pairs", ["all", "one"])
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked(run_graph, png_of, size, pairs):
    cell = size // 3
    options = {"resize": size, "crop": 3 * cell, "patch": cell * 3 // 4, "pairs": pairs}
    out = outputs(run_graph, png_of(ramp(128)), batch=2, **options)

    patches = 9 if pairs == "all" else 2
    assert out["patches"].shape == (2, patches, cell * 3 // 4, cell * 3 // 4, 3)
    assert {values.dtype.name for values in out.values()} == {"uint8", "int64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 90}, r"patch \(90\) must fit in a cell \(85 = crop 255 / grid 3\)"),
        ({"crop": 254}, r"crop \(254\) must be a multiple of grid \(3\): 252 or 255"),
        ({"resize": 200}, r"crop \(255\) must fit in resize \(200\)"),
        ({"gap": -1}, r"gap \(-1\) must be at least 0"),
        ({"gap": 22}, r"gap \(22\) must be at most 21, what patch \(64\) leaves of a cell \(85"),
        ({"flip": 2.0}, r"flip \(2.0\) must be a probability"),
        ({"grayscale": 1.1}, r"grayscale \(1.1\) must be a probability"),
        ({"channel_drop": 1.1}, r"channel_drop \(1.1\) must be a probability"),
        ({"downsample": -0.1}, r"downsample \(-0.1\) must be a probability"),
        ({"patch": 84, "channel_shift": 2}, r"patch \(84\) \+ channel_shift \(2\) must fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        relative_patch.Options(**options)


def test_options_tell_the_size_and_the_number_of_labels():
    options = relative_patch.Options()

    assert options.largest_crop == 292
    assert options.classes == 8


# -- objective ----------------------------------------------------------------------------------


def build(**options) -> objective.Objective:
    torch.manual_seed(0)
    return objective.Objective(
        tiny_backbone.backbone(tiny_backbone.Options()),
        objective.Options(**{"embedding": 16, "hidden": 32, **options}),
        images=8,
        classes=8,
        labels=None,
        seed=0,
    )


def loaded(out: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """As the loader hands them on."""
    tensors = {name: torch.from_numpy(values) for name, values in out.items()}
    tensors["patches"] = tensors["patches"].movedim(-1, -3)
    for name in ("index", "label"):
        if tensors[name].shape[1] == 1:
            tensors[name] = tensors[name].squeeze(1)
    return tensors


def test_eight_pairs_of_an_image_cost_what_eight_images_of_a_pair_do(run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(noise()), batch=4, grayscale=0.5))
    one = build().eval()
    loss, _ = one(**tensors)

    losses = []
    for n, neighbour in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
        pair = {
            "patches": tensors["patches"][:, [neighbour, 4]],
            "pair": torch.tensor([[0, 1]]).expand(4, 1, 2),
            "label": torch.full((4,), n),
            "index": tensors["index"],
        }
        losses.append(one(**pair)[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_without_a_preference_the_loss_is_the_logarithm_of_eight(pairs, run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(noise()), batch=4, pairs=pairs))
    one = build()
    last = one.head.classify[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)
    loss, metrics = one(**tensors)

    assert loss.item() == pytest.approx(math.log(8), abs=1e-6)
    assert metrics["chance"].item() == pytest.approx(1 / 8)


def test_the_directions_are_learnt(run_graph, png_of):
    tensors = loaded(outputs(run_graph, png_of(ramp()), batch=16))
    one = build(dropout=0.0, standardize="global")
    optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
    for _ in range(40):
        loss, _ = one(**tensors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss, metrics = one(**tensors)

    assert metrics["accuracy"] > 0.9
    assert loss < 0.5


def test_a_head_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"hidden \(0\) must be at least 1, or null"):
        objective.Options(hidden=0)
