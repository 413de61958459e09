"""The random crop of linear probes: a part of the resized image, at any place, never mirrored."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines import evaluation, random_crop

HEIGHT, WIDTH = 96, 128  # resized to a short side of 48: 48 x 64, each pixel half


def ramp() -> np.ndarray:
    """Red tells the column and green the row."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([columns * 2 - columns // 64, rows * 2, rows * 0], axis=-1).astype(np.uint8)


@pytest.fixture
def crops(run_graph, png_of):
    def run(**options) -> np.ndarray:
        made = random_crop.Options(**options)
        return run_graph(random_crop, made, [png_of(ramp())] * 50, runs=4)["image"]

    return run


def test_a_crop_is_a_part_of_the_resized_image_and_keeps_its_aspect(crops):
    found = crops(resize=48, crop=40).astype(int)

    assert found.shape == (200, 40, 40, 3)
    # From one pixel of the crop to the next it is two of the file, of 2 levels each, both ways.
    across, down = np.diff(found[..., 0], axis=2), np.diff(found[..., 1], axis=1)
    assert abs(across.mean() - 4) < 0.1
    assert abs(down.mean() - 4) < 0.05
    assert across[:, :, 2:-2].min() > 0  # never mirrored
    assert down.min() > 0


def test_every_place_is_drawn(crops):
    found = crops(resize=48, crop=40).astype(int)
    left, top = found[:, 20, 0, 0], found[:, 0, 20, 1]

    # 64 - 40 + 1 and 48 - 40 + 1 places, four levels apart.
    assert len({round(each / 4) for each in left}) >= 23
    assert len({round(each / 4) for each in top}) == 9


def test_half_are_mirrored_where_that_is_asked_for(crops):
    found = crops(resize=48, crop=40, flip=0.5).astype(int)
    mirrored = (found[:, 20, 0, 0] > found[:, 20, -1, 0]).mean()

    assert 0.35 < mirrored < 0.65


def test_a_crop_as_large_as_a_square_image_is_what_the_evaluation_graph_gives(
    run_graph, demo_images
):
    file = next((demo_images / "val").glob("*/*.jpg"))
    file_bytes = file.read_bytes()
    side = min(Image.open(io.BytesIO(file_bytes)).size)
    square = io.BytesIO()
    Image.open(file).crop((0, 0, side, side)).save(square, "PNG")
    random = run_graph(random_crop, random_crop.Options(resize=64, crop=64), [square.getvalue()])
    middle = run_graph(evaluation, evaluation.Options(resize=64, crop=64), [square.getvalue()])

    assert abs(random["image"].astype(int) - middle["image"]).max() <= 1


def test_sizes_and_probabilities_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"crop \(300\) must fit in resize \(256\)"):
        random_crop.Options(crop=300)
    with pytest.raises(ValueError, match=r"crop \(4\) must be at least 8"):
        random_crop.Options(crop=4)
    with pytest.raises(ValueError, match=r"flip \(2.0\) must be a probability"):
        random_crop.Options(flip=2.0)


def test_it_puts_out_no_label_and_resizes_to_its_short_side():
    options = random_crop.Options()

    assert (options.resize, options.crop, options.classes, options.largest_crop) == (
        256,
        224,
        0,
        256,
    )
