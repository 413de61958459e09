"""The tasks in Pillow and torchvision; that they are the tasks is what tests/test_gate.py says."""

import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.plain import pil
from pipelines import (
    exemplar,
    jigsaw,
    pirl_jigsaw,
    relative_patch,
    rotation,
    single_view,
    two_views,
)

SMALL = single_view.Options(image_size=16, image_area=(0.1, 1.0))


@pytest.fixture
def files(demo_images):
    """Eleven JPEGs."""
    return [str(path) for path in sorted((demo_images / "val").glob("*/*.jpg"))[:11]]


@pytest.fixture
def flat(tmp_path):
    """One image of one colour."""
    path = tmp_path / "flat.png"
    Image.new("RGB", (40, 30), (204, 153, 102)).save(path)
    return [str(path)]


def seeded(number: int = 0) -> None:
    torch.manual_seed(number)
    random.seed(number)


def test_an_item_is_the_image_of_its_row_in_bytes(files):
    images = pil.dataset("pipelines.single_view", files, SMALL)
    item = images[3]

    assert len(images) == 11
    assert item.keys() == {"image", "index"}
    assert item["image"].shape == (3, 16, 16)
    assert (item["image"].dtype, item["index"].dtype) == (torch.uint8, torch.int64)
    assert item["index"].item() == 3


def test_a_gray_file_is_read_as_colour(tmp_path):
    Image.new("L", (20, 20), 90).save(tmp_path / "gray.png")
    still = replace(SMALL, brightness=0, contrast=0, saturation=0, hue=0)
    item = pil.dataset("pipelines.single_view", [str(tmp_path / "gray.png")], still)[0]

    assert (item["image"] == 90).all()


def test_batches_are_shuffled_and_whole_and_every_epoch_is_another(files):
    seeded()
    loader = pil.loader(pil.dataset("pipelines.single_view", files, SMALL), batch=4, workers=0)
    first, second = ([batch["index"].tolist() for batch in loader] for _ in range(2))

    assert [len(rows) for rows in first] == [4, 4]
    assert len({*first[0], *first[1]}) == 8
    assert first != second


def test_workers_draw_each_its_own_and_anew_in_every_epoch(files):
    # colours and crops are drawn by torch, the places of patches and their order by random
    options = pirl_jigsaw.Options(image_size=16, patches_crop=48, patch=8)
    images = pil.dataset("pipelines.pirl_jigsaw", files[:1] * 4, options)
    loader = pil.loader(images, batch=1, workers=2)
    batches = [batch for _ in range(2) for batch in loader]

    assert len({tuple(batch["permutation"][0].tolist()) for batch in batches}) == 8
    assert len({batch["image"].numpy().tobytes() for batch in batches}) == 8


def test_a_graph_that_there_is_no_version_of_is_refused(files):
    with pytest.raises(ValueError, match=r"pil: there is no version of tests.odd_task; there are"):
        pil.dataset("tests.odd_task", files, SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (jigsaw.Options(orders_of="batch"), r"orders_of \('batch'\) .* leave it at 'image'"),
        (jigsaw.Options(channel_shift=2), r"channel_shift \(2\) .* leave it at 0"),
        (relative_patch.Options(channel_shift=2), r"channel_shift \(2\)"),
        (relative_patch.Options(channel_drop=0.5), r"channel_drop \(0.5\)"),
        (relative_patch.Options(downsample=0.33), r"downsample \(0.33\)"),
        (rotation.Options(turns=(0, 45)), r"turns \(\(0, 45\)\) .* give multiples of 90"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused(files, options, message):
    graph = type(options).__module__
    with pytest.raises(ValueError, match=rf"pil: {message}" if "turns" in message else message):
        pil.dataset(graph, files, options)


def test_contrast_1_leaves_the_mean_and_stretches_along_the_components(flat):
    still = exemplar.Options(
        views=4, size=8, grayscale=0, brightness=0, saturation=0, components=(1.5, 1.5)
    )
    views = pil.dataset("pipelines.exemplar", flat, still)[0]["views"]
    expected = (np.array([204, 153, 102]) - exemplar.MEAN) * 1.5 + exemplar.MEAN

    assert abs(views.numpy() - expected.clip(0, 255)[:, None, None]).max() <= 1


def test_contrast_2_raises_saturation_and_value_to_a_power(flat):
    still = exemplar.Options(
        views=4, size=8, grayscale=0, brightness=0, saturation=0, powers=(2.0, 2.0)
    )
    view = pil.dataset("pipelines.exemplar", flat, still)[0]["views"][0, :, 0, 0].tolist()
    hue, saturation, value = colorsys.rgb_to_hsv(0.8, 0.6, 0.4)
    expected = np.array(colorsys.hsv_to_rgb(hue, saturation**2, value**2)) * 255

    assert abs(np.array(view) - expected).max() <= 3  # Pillow's HSV is of bytes


def test_blur_has_its_probability(tmp_path):
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    still = two_views.Options(
        image_size=32,
        image_area=(1.0, 1.0),
        image_aspect=(1.0, 1.0),
        jitter=0,
        grayscale=0,
        blur=0.3,
        blur_sigma=(2.0, 2.0),
    )
    seeded()
    images = pil.dataset("pipelines.two_views", [str(tmp_path / "board.png")], still)
    views = [view for _ in range(100) for name, view in images[0].items() if name != "index"]
    blurred = np.array([view.float().std().item() < 60 for view in views])

    assert 0.2 < blurred.mean() < 0.4


@pytest.mark.parametrize("flip_of", ["crop", "patch"])
def test_patches_are_mirrored_together_or_each_on_its_own(tmp_path, flip_of):
    ramp = np.tile(np.arange(96, dtype=np.uint8) * 2, (96, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    options = pirl_jigsaw.Options(
        image_size=16, patches_crop=48, patch=8, flip_of=flip_of, patch_colors=False
    )
    seeded()
    images = pil.dataset("pipelines.pirl_jigsaw", [str(tmp_path / "ramp.png")], options)
    patches = torch.stack([images[0]["patches"] for _ in range(20)]).int()
    mirrored = patches[..., 0, 0, 0] > patches[..., 0, 0, -1]
    mixed = mirrored.any(dim=1) & ~mirrored.all(dim=1)

    assert 0.1 < mirrored.float().mean() < 0.9
    assert mixed.float().mean() > 0.8 if flip_of == "patch" else not mixed.any()
