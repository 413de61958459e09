"""The tuned plain alternative does the same tasks as the graphs, and says which it does not do."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gate
from benchmarks.plain import pil, tuned
from benchmarks.plain.tuned import pixels
from fastssl import config
from pipelines import jigsaw, relative_patch, rotation

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (CHECKOUT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def paths(demo_images) -> list[str]:
    """JPEGs of several sizes and aspects."""
    return [str(path) for path in sorted((demo_images / "train").glob("*/*.jpg"))[:6]]


def task(name: str, demo: bool = True):
    """The graph and options of a recipe."""
    arguments = () if demo else ("data.root=/somewhere",)
    part = config.load(CHECKOUT / "recipes" / f"{name}.yaml", arguments).pipeline
    return part.use, part.module, part.options


def make(graph: str):
    def batch(paths, options):
        torch.manual_seed(0)
        dataset = tuned.dataset(graph, paths, options)
        return next(iter(tuned.loader(dataset, batch=len(paths), workers=0)))

    return batch


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_those_of_the_graph(name, paths, run_graph):
    graph, module, options = task(name)
    expected = run_graph(module, options, [Path(path).read_bytes() for path in paths])
    batch = make(graph)(paths, options)

    assert set(batch) == set(expected)
    for key, value in batch.items():
        shape = list(expected[key].shape)
        if expected[key].dtype == np.uint8:
            shape.insert(-2, shape.pop())
        elif shape[1:] == [1]:
            shape.pop()

        assert list(value.shape) == shape, key
        assert str(value.dtype) == f"torch.{expected[key].dtype}", key


@pytest.mark.parametrize("name", RECIPES)
def test_labels_are_recovered_from_the_pixels(name):
    graph, _, options = task(name, demo=False)
    gate.check("tuned", graph, options, make(graph))


def test_workers_draw_their_own_and_give_every_image_once(paths):
    graph, _, options = task("pirl_jigsaw")
    batches = tuned.loader(tuned.dataset(graph, [paths[0]] * 4, options), batch=2, workers=2)
    first, second = batches

    assert sorted(torch.cat([first["index"], second["index"]]).tolist()) == [0, 1, 2, 3]
    images = torch.cat([first["image"], second["image"]])
    assert len({image.numpy().tobytes() for image in images}) == 4


@pytest.mark.parametrize("module", [pil, tuned])
def test_workers_come_from_a_clean_server_and_pages_are_locked_if_asked(module, paths):
    graph, _, options = task("supervised")
    dataset = module.dataset(graph, paths, options)
    plain, pinned = (
        module.loader(dataset, batch=2, workers=2, pinned=pinned) for pinned in (False, True)
    )

    assert plain.multiprocessing_context.get_start_method() == "forkserver"
    assert (plain.pin_memory, pinned.pin_memory) == (False, True)


@pytest.mark.parametrize(
    ("graph", "options", "name"),
    [
        ("pipelines.jigsaw", jigsaw.Options(orders_of="batch"), "orders_of"),
        ("pipelines.relative_patch", relative_patch.Options(channel_drop=0.5), "channel_drop"),
        ("pipelines.relative_patch", relative_patch.Options(downsample=0.3), "downsample"),
        ("pipelines.rotation", rotation.Options(turns=(0, 45)), "turns"),
        ("pipelines.evaluation", None, "no version"),
    ],
)
def test_what_it_has_no_version_of_is_refused_by_name(graph, options, name, paths):
    with pytest.raises(ValueError, match=rf"{graph}.*{name}|{graph}\.{name}"):
        tuned.dataset(graph, paths, options)


# -- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation, tmp_path):
    down, across = np.mgrid[0:48, 0:64].astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes it
    image = Image.fromarray(np.stack([4 * across, 5 * down, 255 - 4 * across], 2))
    stored = image.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else image
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    decoded = pixels.decode(str(tmp_path / "a.jpg")).permute(1, 2, 0).numpy()

    assert decoded.shape == (48, 64, 3)
    assert abs(decoded.astype(int) - np.asarray(image).astype(int)).mean() < 6


@pytest.mark.parametrize(
    ("kind", "mode"), [("png", "P"), ("png", "RGBA"), ("jpeg", "CMYK"), ("jpeg", "L")]
)
def test_what_is_no_plain_jpeg_is_decoded_too(kind, mode, tmp_path):
    path = tmp_path / f"a.{kind}"
    image = Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode)
    image.save(path)
    decoded = pixels.decode(str(path))

    assert decoded.shape == (3, 10, 20)
    expected = image.convert("RGB").getpixel((5, 5))
    assert abs(decoded[:, 5, 5].numpy().astype(int) - expected).max() < 12


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 nothing else", b"\xff\xd8\xff", b""])
def test_a_file_that_is_no_image_is_an_error(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"Truncated|identify"):
        pixels.decode(str(tmp_path / "a.jpg"))


def test_resizing_is_torchs_of_floats_within_a_level(paths):
    image = pixels.decode(paths[0])
    exact = torch.nn.functional.interpolate(
        image[None].float(), (40, 30), mode="bilinear", antialias=True
    )

    assert (pixels.resized(image, 40, 30) - exact[0]).abs().max() <= 1.5


def test_the_square_is_that_of_the_resized_image_within_half_a_pixel(monkeypatch, paths):
    monkeypatch.setattr(pixels.random, "randint", lambda low, high: high // 3)
    image = pixels.decode(paths[0])
    whole = pixels.resized(image, 90, 90).int()
    square = pixels.resized_crop(image, 90, 60, keep_aspect=False).int()

    assert (square - whole[:, 10:70, 10:70]).abs().float().mean() < 4


def test_gray_is_exact_whether_of_one_image_or_of_some_patches(paths):
    graph, _, options = task("pirl_jigsaw")
    options = dataclasses.replace(options, grayscale=1.0)
    every = make(graph)(paths, options)
    images = torch.stack([pixels.decode(paths[0])] * 3).contiguous()
    some = pixels.grayed(images.clone(), [1])

    for key in ("image", "patches"):
        assert (every[key].amax(-3) == every[key].amin(-3)).all()
    assert (some[1].amax(0) == some[1].amin(0)).all()
    assert torch.equal(some[0], images[0])


def test_a_matrix_and_an_offset_change_colours(paths):
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    matrices = np.array([np.eye(3) * 1.5, np.eye(3)[::-1]])
    changed = pixels.recolored(images, matrices, np.array([[0, 10, 200], [1, 2, 3]]))

    assert changed[:, :, 0, 0].tolist() == [[150, 160, 255], [101, 102, 103]]


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(sigma, paths):
    from torchvision.transforms.v2 import functional  # noqa: PLC0415  slow, and for this test only

    image = pixels.decode(paths[0])
    side = 2 * int(np.ceil(3 * sigma)) + 1
    expected = functional.gaussian_blur(image, [side, side], [sigma, sigma])

    assert (pixels.blurred(image, sigma).int() - expected.int()).abs().max() <= 1
