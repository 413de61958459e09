"""The evaluation graph prepares an image as torchvision does, within a stated tolerance."""

import io

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from pipelines import evaluation


def torchvision_way(encoded: bytes, resize: int, crop: int) -> np.ndarray:
    steps = [transforms.Resize(resize, antialias=True), transforms.CenterCrop(crop)]
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(transforms.Compose(steps)(image)).astype(int)


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (72, 64), (64, 64)])
def test_pixels_are_torchvisions_within_a_grey_level_or_two(run_graph, demo_images, resize, crop):
    files = sorted((demo_images / "val").glob("*/*.jpg"))[::37]
    encoded = [file.read_bytes() for file in files]
    options = evaluation.Options(resize=resize, crop=crop)
    ours = run_graph(evaluation, options, encoded)["image"].astype(int)
    theirs = np.stack([torchvision_way(each, resize, crop) for each in encoded])

    assert len(files) >= 10
    assert ours.shape == theirs.shape
    difference = abs(ours - theirs)
    assert difference.mean() < 1.0  # of 255
    assert np.quantile(difference, 0.99) <= 6


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"crop \(300\) must fit in resize \(256\)"):
        evaluation.Options(crop=300)
