"""The graph for images with boxes: what it says of its sizes is where the pixels are."""

import numpy as np
import pytest
import torch

from fastssl import loader
from fastssl.detection import boxes as detection_boxes
from pipelines import detection
from pipelines.readers import folder

SIZES = ((90, 130), (130, 90), (64, 64), (40, 300))  # height, width
BOXES = ((20, 10, 60, 50), (3, 77, 41, 113), (0, 0, 64, 64), (200, 5, 290, 30))
RED = (255, 0, 0)


@pytest.fixture(scope="module")
def encoded(png_of) -> list[bytes]:
    """Blue images with one red rectangle each."""
    files = []
    for (height, width), (left, top, right, bottom) in zip(SIZES, BOXES, strict=True):
        pixels = np.full((height, width, 3), (0, 0, 200), np.uint8)
        pixels[top:bottom, left:right] = RED
        files.append(png_of(pixels))
    return files


def each_image(run_graph, options, encoded) -> list[tuple[np.ndarray, ...]]:
    """Image, size, original, flip and row of all images, eight times; batches differ in shape."""
    batches = [run_graph(detection, options, encoded, seed=seed) for seed in range(8)]
    return [each for batch in batches for each in zip(*batch.values(), strict=True)]


def red_part(image: np.ndarray) -> list[int]:
    """Left, top, right and bottom of what is more red than blue."""
    rows, columns = np.nonzero(image[..., 0] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("flip", [0.0, 1.0, 0.5])
def test_boxes_moved_by_the_numbers_put_out_enclose_what_the_pixels_show(run_graph, encoded, flip):
    options = detection.Options(short_side=(33, 48, 64, 71), long_side=160, flip=flip)
    images = each_image(run_graph, options, encoded)
    flipped = np.mean([mirrored for *_, mirrored, _ in images])
    farthest = 0.0
    for image, size, original, mirrored, index in images:
        box = torch.tensor([BOXES[index[0]]], dtype=torch.float32)
        moved = detection_boxes.moved(
            box, torch.from_numpy(original), torch.from_numpy(size), bool(mirrored)
        )
        farthest = max(farthest, abs(moved[0].numpy() - red_part(image)).max())

    assert farthest <= 1
    assert flipped == flip if flip != 0.5 else 0.2 < flipped < 0.8


def test_a_box_that_is_not_flipped_with_its_image_would_be_noticed(run_graph, encoded):
    outputs = run_graph(detection, detection.Options(short_side=(64,), flip=1.0), encoded)
    left, _, right, _ = red_part(outputs["image"][0])
    size, original = (torch.from_numpy(outputs[name][0]) for name in ("size", "original"))
    moved = detection_boxes.moved(
        torch.tensor([BOXES[0]], dtype=torch.float32), original, size, False
    )

    assert abs(moved[0, 0] - left) > 5
    assert abs(moved[0, 2] - right) > 5


def test_the_way_back_of_a_box_is_the_inverse():
    box = torch.tensor([[3.0, 7.0, 40.0, 90.0], [0.0, 0.0, 60.0, 100.0]])
    original, size = torch.tensor([100, 60]), torch.tensor([333, 201])
    there = detection_boxes.moved(box, original, size, False)

    torch.testing.assert_close(detection_boxes.moved_back(there, original, size), box)
    torch.testing.assert_close(there[1], torch.tensor([0.0, 0.0, 201.0, 333.0]))


def test_the_short_side_is_one_of_those_given_unless_the_long_one_would_be_too_long(
    run_graph, encoded
):
    options = detection.Options(short_side=(40, 56), long_side=120)
    drawn = set()
    for _, size, original, _, index in each_image(run_graph, options, encoded):
        assert tuple(original) == SIZES[index[0]]
        if index[0] == 3:  # 40 x 300
            assert tuple(size) == (16, 120)
            continue
        drawn.add(int(size.min()))
        np.testing.assert_allclose(size / size.min(), original / original.min(), atol=0.02)
    assert drawn == {40, 56}


def test_images_are_padded_with_black_to_the_batch_s_largest_and_a_multiple_of_32(
    run_graph, encoded
):
    outputs = run_graph(detection, detection.Options(short_side=(64,), flip=0.5), encoded)
    *_, rows, columns, _ = outputs["image"].shape
    assert (rows, columns) == (96, 480)  # 92 x 64 and 64 x 480
    for image, (height, width) in zip(outputs["image"], outputs["size"], strict=True):
        assert image[:height, :width].max(axis=2).min() > 90
        assert image[height:].sum() == 0
        assert image[:, width:].sum() == 0


def test_an_image_that_has_the_size_already_keeps_every_pixel(run_graph, png_of):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    options = detection.Options(short_side=(64,), flip=0.0)
    outputs = run_graph(detection, options, [png_of(pixels)])

    np.testing.assert_array_equal(outputs["image"][0], pixels)


def test_a_loader_gives_batches_of_other_shapes_and_goes_on_with_the_same(tmp_path, encoded):
    for number, content in enumerate(encoded):
        (tmp_path / f"{number}.png").write_bytes(content)
    samples = folder.list_samples(folder.Options(root=str(tmp_path)), cache=None, say=print)

    def loading() -> loader.Loader:
        return loader.Loader(
            folder,
            samples,
            detection,
            detection.Options(short_side=(33, 64)),
            lambda step: np.array([step % 4, (step + 1) % 4]),
            batch=2,
            seed=7,
            device=torch.device("cpu"),
            loading=loader.Options(threads=1),
        )

    whole = loading()
    batches = [next(whole) for _ in range(6)]
    half = loading()
    for _ in range(3):
        next(half)
    rest = loading()
    rest.resume(half.state())

    assert len({tuple(batch["image"].shape) for batch in batches}) > 1
    assert batches[0]["size"].shape == (2, 2)
    assert batches[0]["flip"].shape == (2,)
    for batch in batches[3:]:
        again = next(rest)
        assert all(torch.equal(batch[name], again[name]) for name in batch)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"short_side": ()}, "short_side"),
        ({"short_side": (4,)}, "short_side"),
        ({"long_side": 500}, "long_side .500. must be at least short_side .800."),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_options_refuse_what_can_t_be_and_name_it(wrong, named):
    with pytest.raises(ValueError, match=named):
        detection.Options(**wrong)
