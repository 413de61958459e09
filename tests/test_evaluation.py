"""The evaluation graph prepares an image as torchvision does: pixels, features and answers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import v2

from fastssl import export_formats
from fastssl.backbones import resnet
from pipelines import evaluation

# of photos: usual, wide, tall, odd, and smaller than what they are resized to
SIZES = ((500, 375), (333, 500), (640, 427), (401, 97), (89, 311), (257, 255), (57, 41), (64, 64))


def pil_way(encoded: bytes, resize: int, crop: int, how: str = "bilinear") -> np.ndarray:
    steps = [v2.Resize(resize, v2.InterpolationMode(how)), v2.CenterCrop(crop)]
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(v2.Compose(steps)(image)).astype(int)


def tensor_way(
    encoded: bytes, resize: int, crop: int, how: str = "bilinear", antialias: bool = True
) -> np.ndarray:
    resized = v2.Resize(resize, v2.InterpolationMode(how), antialias=antialias)
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    steps = v2.Compose([v2.PILToTensor(), resized, v2.CenterCrop(crop)])
    return steps(image).permute(1, 2, 0).numpy().astype(int)


def timm_way(encoded: bytes, resize: int, crop: int, how: str = "bilinear") -> np.ndarray:
    part = export_formats.crop_pct(crop, resize)
    steps = transforms_imagenet_eval(crop, part, interpolation=how, normalize=False)
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return steps(image).permute(1, 2, 0).numpy().astype(int)  # pyright: ignore


@pytest.fixture(scope="module")
def jpegs(demo_images) -> list[bytes]:
    """Three JPEGs of each size and shape."""
    files = sorted((demo_images / "val").glob("*/*.jpg"))[::20]
    encoded = []
    for number, file in enumerate(files[: 3 * len(SIZES)]):
        memory = io.BytesIO()
        image = Image.open(file).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
        image.save(memory, "JPEG", quality=90)
        encoded.append(memory.getvalue())
    assert len(encoded) == 3 * len(SIZES)
    return encoded


@pytest.mark.parametrize("theirs", [pil_way, tensor_way])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (72, 64), (64, 64), (33, 29)])
def test_pixels_are_torchvisions_within_a_level_or_two(run_graph, jpegs, resize, crop, theirs):
    options = evaluation.Options(resize=resize, crop=crop)
    ours = run_graph(evaluation, options, jpegs)["image"].astype(int)
    wanted = np.stack([theirs(each, resize, crop) for each in jpegs])
    difference = abs(ours - wanted)

    assert ours.shape == wanted.shape
    assert difference.mean() < 0.5  # of 255
    assert difference.mean((1, 2, 3)).max() < 0.6  # the worst image
    assert difference[:, 1:-1, 1:-1].max() <= 2
    # Where the crop reaches the image's border, the filter reaches beyond it: there ours repeats
    # the last pixel, and torchvision's weighs what is left.
    assert difference.max() <= (2 if crop < resize else 16)
    assert abs((ours - wanted).mean()) < 0.1  # neither brighter nor darker


@pytest.mark.parametrize(("resize", "crop"), [(248, 224), (64, 64), (33, 29)])
def test_bicubic_pixels_are_torchvisions_and_timms_within_the_same_bound(
    run_graph, jpegs, resize, crop
):
    options = evaluation.Options(resize=resize, crop=crop, interpolation="bicubic")
    ours = run_graph(evaluation, options, jpegs)["image"].astype(int)
    bilinear = run_graph(evaluation, evaluation.Options(resize=resize, crop=crop), jpegs)["image"]
    for theirs in (pil_way, tensor_way, timm_way):
        wanted = np.stack([theirs(each, resize, crop, "bicubic") for each in jpegs])
        difference = abs(ours - wanted)

        assert difference.mean() < 0.3  # of 255
        assert difference.mean((1, 2, 3)).max() < 0.4  # the worst image
        # Theirs cut what the filter throws beyond 0 and 255 off twice, between rows and columns.
        assert (difference > 2).mean() < 0.001
        assert difference.max() <= 16
        assert abs((ours - wanted).mean()) < 0.01  # neither brighter nor darker
        assert abs(bilinear.astype(int) - wanted).mean() > 0.6  # the bound tells them apart


def test_the_bound_tells_antialiasing_from_none(run_graph, jpegs):
    ours = run_graph(evaluation, evaluation.Options(resize=72, crop=64), jpegs)["image"]
    without = np.stack([tensor_way(each, 72, 64, antialias=False) for each in jpegs])

    assert abs(ours.astype(int) - without).mean() > 1.0


def test_a_network_answers_the_same_whichever_prepared_its_images(run_graph, jpegs):
    torch.manual_seed(0)
    network = resnet.backbone(resnet.Options(name="resnet10", width=32)).train()
    ours = run_graph(evaluation, evaluation.Options(resize=72, crop=64), jpegs)["image"]
    theirs = np.stack([pil_way(each, 72, 64) for each in jpegs]).astype(np.uint8)
    both = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in (ours, theirs)]
    classify = torch.randn(network.dim, 10)
    with torch.no_grad():
        network(both[0])  # moves the statistics of the batch norms
        mine, other = (network.eval()(each) for each in both)

    relative = (mine - other).norm(dim=1) / mine.norm(dim=1)
    assert relative.median() < 0.01
    assert relative.max() < 0.05
    answers = [((each - mine.mean(0)) @ classify).argmax(1) for each in (mine, other)]
    assert len(set(answers[0].tolist())) > 3
    assert torch.equal(*answers)


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"crop \(300\) must fit in resize \(256\)"):
        evaluation.Options(crop=300)
