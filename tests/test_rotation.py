"""The rotation graph and its objective: turns read off the pixels, no shortcut to them."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from fastssl.objectives import rotation as objectives
from pipelines import rotation
from tests import test_gpu_graphs

SIDE = 48
EIGHT = tuple(range(0, 360, 45))
SETS = [(0, 90, 180, 270), (0, 180), (90, 270), EIGHT]

# The image as it is: what is left is turning.
BARE = {"image_size": SIDE, "image_area": (1.0, 1.0), "aspect": (1.0, 1.0), "flip": 0.0}
COLORS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2, "grayscale": 0.3}


def outputs(run_graph, png, runs=1, seed=0, batch=32, threads=2, **options):
    options = rotation.Options(**options)
    return run_graph(rotation, options, [png] * batch, runs=runs, seed=seed, threads=threads)


def ramp(side=SIDE) -> np.ndarray:
    """Red counts columns and green rows, from 10 on: a pixel says where it comes from."""
    rows, columns = np.mgrid[0:side, 0:side]
    return np.stack([10 + columns, 10 + rows, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise(side: int, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def quarters(images: np.ndarray) -> np.ndarray:
    """By how many degrees each image [..., S, S, 3] is turned whose upper left corner was red.

    Turned to the left, that corner comes to lie lower left, lower right, upper right.
    """
    red = images[..., 0].astype(int) - images[..., 2]
    middles = [red[..., 2, 2], red[..., -3, 2], red[..., -3, -3], red[..., 2, -3]]
    return 90 * np.argmax(np.stack(middles, axis=-1), axis=-1)


def red_corner() -> np.ndarray:
    image = np.full((SIDE, SIDE, 3), 60, np.uint8)
    image[:12, :12] = (250, 20, 20)
    return image


def east(side: int) -> np.ndarray:
    """A white disc to the right of the middle."""
    rows, columns = np.mgrid[0:side, 0:side] - (side - 1) / 2
    disc = (rows**2 + (columns - 0.2 * side) ** 2) < (0.07 * side) ** 2
    return np.repeat((255 * disc).astype(np.uint8)[..., None], 3, axis=-1)


def direction(images: np.ndarray) -> np.ndarray:
    """Where the disc lies in each image, in degrees counter-clockwise from the right."""
    weight = images[..., 0].astype(float)
    place = np.arange(images.shape[-2]) - (images.shape[-2] - 1) / 2
    right = (weight * place).sum((-2, -1))
    up = -(weight * place[:, None]).sum((-2, -1))
    return np.degrees(np.arctan2(up, right))


# -- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", ["all", "one"])
@pytest.mark.parametrize("turns", SETS[:3])
def test_the_turn_can_be_read_off_the_corners_of_every_copy(run_graph, png_of, turns, copies):
    out = outputs(run_graph, png_of(red_corner()), **BARE, turns=turns, copies=copies)
    count = len(turns) if copies == "all" else 1

    assert out["turned"].shape == (32, count, SIDE, SIDE, 3)
    np.testing.assert_array_equal(quarters(out["turned"]), out["angle"])
    np.testing.assert_array_equal(np.array(turns)[out["label"]], out["angle"])
    if copies == "all":
        np.testing.assert_array_equal(out["label"], np.tile(np.arange(count), (32, 1)))


@pytest.mark.parametrize("copies", ["all", "one"])
@pytest.mark.parametrize("turns", [EIGHT, (0, 45), (45, 135, 225)])
def test_the_turn_by_45_degrees_can_be_read_off_where_things_lie(run_graph, png_of, turns, copies):
    image = east(rotation.Options(image_size=SIDE, turns=EIGHT).largest_crop)
    out = outputs(run_graph, png_of(image), **BARE, turns=turns, copies=copies)
    off = (direction(out["turned"]) - out["angle"] + 180) % 360 - 180

    assert abs(off).max() < 4  # a shift of half a pixel, 12 from the middle
    np.testing.assert_array_equal(np.array(turns)[out["label"]], out["angle"])
    if copies == "all":
        np.testing.assert_array_equal(out["label"], np.tile(np.arange(len(turns)), (32, 1)))


@pytest.mark.parametrize("turns", SETS)
def test_a_single_turn_is_each_of_the_set_equally_often(run_graph, png_of, turns):
    small = {**BARE, "image_size": 8, "turns": turns, "copies": "one"}
    labels = outputs(run_graph, png_of(noise(8)), batch=64, runs=20, **small)["label"]
    counts = np.bincount(labels.ravel(), minlength=len(turns))
    expected = labels.size / len(turns)

    assert len(counts) == rotation.Options(turns=turns).classes == len(turns)
    assert abs(counts - expected).max() < 4 * math.sqrt(expected)


# -- pixels -------------------------------------------------------------------------------------


def test_four_turns_are_exact_transposes_of_one_augmented_image(run_graph, png_of):
    options = {"image_size": 33, **COLORS}
    turned = outputs(run_graph, png_of(noise(SIDE)), **options)["turned"]

    for copies in turned:
        for quarter, copy in enumerate(copies):
            np.testing.assert_array_equal(copy, np.rot90(copies[0], quarter))
    assert len(np.unique(turned[:, 0], axis=0)) == len(turned)  # each image drawn anew


def test_without_augmentation_nothing_is_resampled(run_graph, png_of):
    image = noise(SIDE)
    for options in (BARE, {**BARE, "crop": "pad", "pad": 0}):
        turned = outputs(run_graph, png_of(image), batch=2, **options)["turned"]
        np.testing.assert_array_equal(turned[1, 0], image)


def test_the_quarters_among_eight_turns_are_exact_transposes_too(run_graph, png_of):
    options = {**BARE, "turns": EIGHT, **COLORS}
    turned = outputs(run_graph, png_of(noise(104)), batch=4, **options)["turned"]

    for copies in turned:
        for number in range(8):
            expected = np.rot90(copies[number % 2], number // 2)
            np.testing.assert_array_equal(copies[number], expected)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_no_copy_has_a_border(run_graph, png_of, size):
    white = np.full((96, 80, 3), 255, np.uint8)
    out = outputs(run_graph, png_of(white), batch=64, image_size=size, turns=EIGHT)

    assert out["turned"].min() == 255


def test_mirrored_before_turning_a_copy_still_shows_its_turn(run_graph, png_of):
    image = red_corner()
    image[:12, -12:] = (20, 20, 250)  # mirrored, red and blue change places
    always = outputs(run_graph, png_of(image), **{**BARE, "flip": 1.0})["turned"]
    sometimes = outputs(run_graph, png_of(image), runs=8, **{**BARE, "flip": 0.25})["turned"]

    for quarter in range(4):
        np.testing.assert_array_equal(always[0, quarter], np.rot90(image[:, ::-1], quarter))
    mirrored = quarters(sometimes[:, 0]) == 270
    assert 0.15 < mirrored.mean() < 0.35


def test_grayscale_has_its_probability_and_is_the_same_for_all_copies(run_graph, png_of):
    options = {**BARE, "grayscale": 0.3}
    turned = outputs(run_graph, png_of(noise(SIDE)), runs=8, **options)["turned"].astype(int)
    gray = np.ptp(turned, axis=-1).max(axis=(2, 3)) == 0

    assert 0.2 < gray[:, 0].mean() < 0.4
    assert (gray == gray[:, :1]).all()


def test_crops_have_their_share_of_the_area_and_their_aspect(run_graph, png_of):
    options = {**BARE, "image_area": (0.25, 1.0), "aspect": (0.5, 2.0)}
    turned = outputs(run_graph, png_of(ramp(96)), runs=8, **options)["turned"].astype(float)
    width = (turned[:, 0, 24, -1, 0] - turned[:, 0, 24, 0, 0]) * SIDE / (SIDE - 1)
    height = (turned[:, 0, -1, 24, 1] - turned[:, 0, 0, 24, 1]) * SIDE / (SIDE - 1)
    share = width * height / 96**2

    assert 0.22 < share.min() < 0.4
    assert 0.85 < share.max() < 1.04
    assert 0.45 < (width / height).min() < 0.7
    assert 1.4 < (width / height).max() < 2.2


# -- RotNet's CIFAR-10 --------------------------------------------------------------------------


def test_a_padded_crop_lies_anywhere_within_a_black_border(run_graph, png_of):
    image = ramp(32)
    options = {"image_size": 32, "crop": "pad", "pad": 4, "flip": 0.0}
    first = outputs(run_graph, png_of(image), batch=64, runs=16, **options)["turned"][:, 0]
    place = first[:, 16, 16, [1, 0]].astype(int) - 10 - 16  # [N, 2], -4 ... 4
    bordered = np.zeros((40, 40, 3), np.uint8)
    bordered[4:36, 4:36] = image

    expected = len(first) / 9
    for axis in (0, 1):
        counts = np.bincount(place[:, axis] + 4, minlength=9)
        assert len(counts) == 9
        assert abs(counts - expected).max() < 4 * math.sqrt(expected)
    for (row, column), crop in zip(place[:200], first, strict=False):
        cut = bordered[row + 4 : row + 36, column + 4 : column + 36]
        np.testing.assert_array_equal(crop, cut)


def test_an_image_of_another_size_is_brought_to_the_crops(run_graph, png_of):
    white = np.full((60, 90, 3), 255, np.uint8)
    options = {"image_size": 32, "crop": "pad", "pad": 4}
    turned = outputs(run_graph, png_of(white), **options)["turned"]
    black = (turned[:, 0] == 0).all(axis=-1)

    assert turned.shape == (32, 4, 32, 32, 3)
    assert set(np.unique(turned)) == {0, 255}
    assert black.any(axis=2).sum(axis=1).max() == 32  # rows that a border to the side reaches
    assert black[:, 4:-4, 4:-4].sum() == 0


# -- no shortcut --------------------------------------------------------------------------------


def sharpness(images: np.ndarray) -> np.ndarray:
    """Mean squared difference of neighbours, for each image [..., S, S, 3]."""
    pixels = images.astype(float)
    across = (np.diff(pixels, axis=-2) ** 2).mean((-3, -2, -1))
    down = (np.diff(pixels, axis=-3) ** 2).mean((-3, -2, -1))
    return (across + down) / 2


def best_guess(one: np.ndarray, other: np.ndarray) -> float:
    """How often a threshold between two sets of numbers is right, at its best."""
    thresholds = np.concatenate([one, other])[:, None]
    right = ((one <= thresholds).mean(1) + (other > thresholds).mean(1)) / 2
    return float(np.maximum(right, 1 - right).max())


def straight_and_slanted(run_graph, png_of) -> tuple[np.ndarray, np.ndarray]:
    """The sharpness of 160 images of white noise in copies turned by 0 and by 45 degrees."""
    options = rotation.Options(**BARE, turns=(0, 45))
    pngs = [png_of(noise(options.largest_crop, seed)) for seed in range(160)]
    turned = run_graph(rotation, options, pngs)["turned"]
    return sharpness(turned[:, 0]), sharpness(turned[:, 1])


def test_slanted_copies_are_as_sharp_as_straight_ones_image_by_image(run_graph, png_of):
    straight, slanted = straight_and_slanted(run_graph, png_of)

    assert straight.mean() / slanted.mean() == pytest.approx(1, abs=0.05)
    assert best_guess(straight, slanted) < 0.66  # 160 equal pairs: up to 0.6


def test_a_random_shift_alone_would_give_the_straight_copies_away(run_graph, png_of, monkeypatch):
    monkeypatch.setattr(rotation, "STEP", (1.0, 1.001))
    straight, slanted = straight_and_slanted(run_graph, png_of)

    assert straight.mean() / slanted.mean() == pytest.approx(1, abs=0.1)  # right on average
    assert best_guess(straight, slanted) > 0.7
    raw = sharpness(noise(SIDE))
    assert raw / slanted.mean() > 1.4  # and not resampled at all they would be sharper still


def test_images_are_cut_large_enough_for_the_corners_to_turn_in():
    assert rotation.Options(image_size=96).largest_crop == 96
    assert rotation.Options(image_size=96, turns=(0, 45)).largest_crop == 206  # 96 * 1.5 * 1.414


# -- seeds, sizes, options ----------------------------------------------------------------------


@pytest.mark.parametrize("copies", ["all", "one"])
def test_one_seed_repeats_and_two_differ(run_graph, png_of, copies):
    png, options = png_of(noise(64)), {"image_size": 32, "turns": EIGHT, "copies": copies}
    first, again, other = (outputs(run_graph, png, seed=k, batch=8, **options) for k in (1, 1, 2))

    np.testing.assert_array_equal(first["turned"], again["turned"])
    np.testing.assert_array_equal(first["label"], again["label"])
    assert (first["turned"] != other["turned"]).any()


@pytest.mark.parametrize("options", [{"turns": EIGHT}, {"crop": "pad"}, {"copies": "one"}])
def test_the_number_of_threads_changes_nothing(run_graph, png_of, options):
    png, options = png_of(noise(64)), {"image_size": 32, **COLORS, **options}
    one, two = (
        outputs(run_graph, png, batch=8, runs=3, threads=threads, **options) for threads in (1, 2)
    )

    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_and_types_are_as_asked(run_graph, png_of, size):
    for turns in (SETS[0], EIGHT):
        out = outputs(run_graph, png_of(noise(64)), batch=2, image_size=size, turns=turns)

        assert out["turned"].shape == (2, len(turns), size, size, 3)
        assert out["turned"].dtype == np.uint8
        for name in ("angle", "label"):
            assert out[name].shape == (2, len(turns))
            assert out[name].dtype == np.int64
        np.testing.assert_array_equal(out["index"], [[0], [1]])


@pytest.mark.parametrize("copies", ["all", "one"])
@pytest.mark.parametrize("options", [{"turns": (0, 180)}, {"turns": EIGHT}, {"crop": "pad"}])
def test_every_choice_has_its_kernels_on_the_gpu(options, copies):
    choice = rotation.Options(**options, hue=0.2, grayscale=0.3, copies=copies)
    pipeline = test_gpu_graphs.on_the_gpu(rotation.graph, choice)

    assert test_gpu_graphs.without_kernel(pipeline) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, r"image_size \(4\) must be at least 8"),
        ({"image_size": 10**9}, r"image_size \(1000000000\) must be at most 16384 pixels"),
        ({"image_area": (0.5, 0.2)}, r"image_area \(\[0.5, 0.2\]\) must be two ascending"),
        ({"aspect": (0.0, 1.0)}, r"aspect \(\[0.0, 1.0\]\) must be two ascending numbers"),
        ({"pad": -1}, r"pad \(-1\) must be at least 0 and below image_size \(224\)"),
        ({"image_size": 8, "pad": 8}, r"pad \(8\) must be .* below image_size \(8\)"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
        ({"saturation": -0.1}, r"saturation \(-0.1\) must be at least 0"),
        ({"hue": 0.7}, r"hue \(0.7\) must be a part of a full turn"),
        ({"turns": (0,)}, r"turns \(\[0\]\) must be at least two ascending multiples of 45"),
        ({"turns": (0, 60)}, r"turns \(\[0, 60\]\) must be at least two ascending"),
        ({"turns": (90, 0)}, r"turns \(\[90, 0\]\) must be at least two ascending"),
        ({"turns": (0, 0, 90)}, r"turns \(\[0, 0, 90\]\) must be at least two ascending"),
        ({"turns": (0, 360)}, r"turns \(\[0, 360\]\) must be .* in 0 ... 315"),
        (
            {"turns": (0, 45), "crop": "pad"},
            r"crop \('pad'\) must be 'inception' with turns \(\[0, 45\]\) .* or pad \(4\) 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        rotation.Options(**options)


# -- the objective ------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim = 12
        self.calls: list[torch.Tensor] = []

    def forward(self, x):
        self.calls.append(x)
        return 4 * adaptive_avg_pool2d(x.float() / 255 - 0.5, 2).flatten(1)


def build(classes=4):
    torch.manual_seed(1)
    options = {"images": 9, "classes": classes, "labels": None, "seed": 0}
    return objectives.Objective(Tiny(), objectives.Options(), **options)


def batch(copies=4, classes=4, count=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, copies, 8, 8, 3), generator=generator)
    label = torch.randint(0, classes, (count, copies), generator=generator)
    return {
        "turned": pixels.to(torch.uint8).permute(0, 1, 4, 2, 3),  # as the loader hands them over
        "angle": 90 * label,
        "label": label,
        "index": torch.arange(count),
    }


def test_loss_is_the_cross_entropy_averaged_over_all_copies():
    objective, inputs = build(), batch()
    loss, metrics = objective(**inputs)
    total, right = 0.0, 0
    for image, labels in zip(inputs["turned"], inputs["label"].tolist(), strict=True):
        for copy, label in zip(image, labels, strict=True):
            scores = objective.head(objective.backbone(copy[None]))[0].tolist()
            total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
            right += scores.index(max(scores)) == label

    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(right / 12)


@pytest.mark.parametrize("classes", [2, 4, 8])
def test_who_knows_nothing_has_a_loss_of_log_of_the_turns(classes):
    objective = build(classes)
    nn.init.zeros_(objective.head.weight)
    nn.init.zeros_(objective.head.bias)
    loss, metrics = objective(**batch(classes, classes))

    assert loss.item() == pytest.approx(math.log(classes))
    assert metrics["chance"].item() == pytest.approx(1 / classes)


def test_all_copies_pass_the_backbone_in_one_call_without_a_copy():
    objective, inputs = build(), batch()
    objective(**inputs)
    assert isinstance(objective.backbone, Tiny)
    (seen,) = objective.backbone.calls

    assert seen.shape == (12, 3, 8, 8)
    assert seen.data_ptr() == inputs["turned"].data_ptr()
    assert seen.is_contiguous(memory_format=torch.channels_last)


def test_a_single_copy_comes_with_labels_without_an_axis_for_it():
    objective, inputs = build(), batch(copies=1)
    flat = {**inputs, "label": inputs["label"][:, 0], "angle": inputs["angle"][:, 0]}

    assert objective(**flat)[0].item() == objective(**inputs)[0].item()


def test_metrics_are_detached_scalars_and_the_loss_is_float32_also_in_half_precision():
    objective = build()
    whole, _ = objective(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, metrics = objective(**batch())

    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.02)
    assert set(metrics) == {"accuracy", "chance"}
    assert all(each.shape == () and not each.requires_grad for each in metrics.values())


def test_a_graph_without_turns_to_tell_apart_is_refused():
    with pytest.raises(ValueError, match=r"classes \(0\) must be at least 2 turns"):
        build(0)
