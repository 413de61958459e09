"""Packed stores as training reads them: the same rows and pixels, nothing copied, damage named."""

import importlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastssl import config, data, loader, order
from pipelines import evaluation, pirl_jigsaw, single_view
from pipelines.images import Encoded
from pipelines.readers import folder, headers, packed

CHECKOUT = Path(__file__).resolve().parents[1]
GRAPHS = sorted(
    path.stem
    for path in (CHECKOUT / "pipelines").glob("*.py")
    if "\ndef graph(" in path.read_text()
)
FORMS = ("jpeg", "raw")
SHORT = 80  # pixels: some of the built-in images are smaller, or are stored as they are


@pytest.fixture(scope="module")
def images(demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty of the built-in images in their ten classes, one of them larger than the rest."""
    root = tmp_path_factory.mktemp("packed") / "images"
    for file in sorted((demo_images / "train").glob("*/0000[0-3].jpg")):
        target = root / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    assert len(list(root.glob("*/*.jpg"))) == 40
    return root


@pytest.fixture(scope="module")
def stores(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as a store of each form, each of several shards."""
    root = tmp_path_factory.mktemp("stores")
    found = {}
    for form in FORMS:
        found[form] = root / form
        command = ["pack", str(images), str(found[form]), "--form", form, "--workers", "2"]
        limits = ["--short-side", str(SHORT), "--shard-mb", "1"]
        assert data.main([*command, *limits]) == 0
    return found


@pytest.fixture
def copy(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A raw store to be damaged."""
    shutil.copytree(stores["raw"], tmp_path / "store")
    return tmp_path / "store"


def opened(root: Path, **options) -> tuple[packed.Samples, list[str]]:
    """The store, and the lines that were said."""
    lines: list[str] = []
    given = packed.Options(root=str(root), **options)
    return packed.list_samples(given, cache=None, say=lines.append), lines


def error(root: Path, **options) -> str:
    with pytest.raises(ValueError, match=r"^data\.root: ") as caught:
        opened(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("data.root: ")


def listed(root: Path) -> folder.Samples:
    return folder.list_samples(folder.Options(root=str(root)), cache=None, say=print)


def batches(
    reader: Any,
    samples: Any,
    graph: Any,
    options: Any,
    *,
    batch: int = 8,
    seed: int = 0,
    rows: Callable[[int], np.ndarray] | None = None,
) -> loader.Loader:
    """A loader over the usable rows in shuffled order."""

    def shuffled(step: int) -> np.ndarray:
        count = len(samples.usable)
        steps = order.steps_per_epoch(count, 1, batch)
        plan = order.shuffled(count, 3, step // steps, 0, 1, batch)
        return samples.usable[plan[step % steps]]

    return loader.Loader(
        reader,
        samples,
        graph,
        options,
        rows or shuffled,
        batch=batch,
        seed=seed,
        device=torch.device("cpu"),
        loading=loader.Options(threads=2),
    )


# The listing


@pytest.mark.parametrize("form", FORMS)
def test_rows_names_and_classes_are_those_of_the_folder(form, images, stores):
    there = listed(images)
    samples, lines = opened(stores[form])

    assert lines == []
    assert len(samples) == len(there) == 40
    assert samples.classes == there.classes
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.labels, there.labels)
    names = [Path(there.path(row)).relative_to(images) for row in range(40)]
    assert [Path(samples.path(row)).relative_to(stores[form]) for row in range(40)] == names
    assert samples.usable.tolist() == list(range(40))
    assert samples.bad == {}


@pytest.mark.parametrize("form", FORMS)
def test_height_and_width_are_those_of_the_images_as_stored(form, images, stores):
    there = listed(images)
    samples, _ = opened(stores[form])

    short = np.minimum(samples.height, samples.width)
    np.testing.assert_array_equal(short, np.minimum(np.minimum(there.height, there.width), SHORT))
    longest = np.maximum(there.height, there.width) * short
    before = np.minimum(there.height, there.width)
    np.testing.assert_array_equal(np.maximum(samples.height, samples.width), longest // before)


def test_an_image_begins_at_a_multiple_of_64_bytes_in_one_of_several_files(stores):
    samples, _ = opened(stores["raw"])

    assert len(samples.shards) >= 2
    assert (samples.offset % packed.ALIGNMENT == 0).all()
    assert all(pixels.ctypes.data % 64 == 0 for pixels in samples.content(samples.usable))


def test_a_shard_does_not_pass_for_an_image(stores):
    for form in FORMS:
        with pytest.raises(ValueError, match=r"not an image"):
            headers.dimensions(str(stores[form] / "shard-00000.bin"))


def test_content_is_the_mapped_file_itself_and_cannot_be_written(stores):
    for form in FORMS:
        samples, _ = opened(stores[form])

        for row, content in enumerate(samples.content(samples.usable)):
            assert np.shares_memory(content, samples.shards[samples.shard[row]])
            assert not content.flags.writeable


def test_limit_takes_evenly_spaced_rows_and_changes_the_fingerprint(stores):
    whole, _ = opened(stores["raw"])
    fewer, _ = opened(stores["raw"], limit=5)

    kept = [0, 9, 19, 29, 39]
    assert len(fewer) == 5
    assert fewer.usable.tolist() == [0, 1, 2, 3, 4]
    assert [fewer.path(row) for row in range(5)] == [whole.path(row) for row in kept]
    assert fewer.labels is not None
    assert whole.labels is not None
    assert fewer.labels.tolist() == whole.labels[kept].tolist()
    for few, many in zip(fewer.content(fewer.usable), whole.content(np.array(kept)), strict=True):
        np.testing.assert_array_equal(few, many)
    assert fewer.fingerprint != whole.fingerprint
    assert opened(stores["raw"])[0].fingerprint == whole.fingerprint
    assert opened(stores["jpeg"])[0].fingerprint != whole.fingerprint


def test_labels_can_become_a_tensor_without_a_warning(stores):
    samples, _ = opened(stores["jpeg"])

    assert samples.labels is not None
    assert torch.from_numpy(samples.labels).dtype == torch.int64


@pytest.mark.parametrize("value", [{"root": ""}, {"bad": "maybe"}, {"limit": 0}])
def test_options_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match=next(iter(value))):
        packed.Options(**({"root": "store"} | value))


# Pixels


def test_raw_pixels_are_exactly_those_of_the_resized_image(images, stores):
    samples, _ = opened(stores["raw"])
    there = listed(images)

    for row, pixels in enumerate(samples.content(samples.usable)):
        with Image.open(there.path(row)) as opened_image:
            image = opened_image.convert("RGB")
            size = int(samples.width[row]), int(samples.height[row])
            expected = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_stored_jpegs_are_the_resized_image_within_the_error_of_encoding(stores):
    raw, _ = opened(stores["raw"])
    jpeg, _ = opened(stores["jpeg"])
    rows = raw.usable

    for pixels, file in zip(raw.content(rows), jpeg.content(rows), strict=True):
        with Image.open(io.BytesIO(file.tobytes())) as image:
            decoded = np.asarray(image)
        assert decoded.shape == pixels.shape
        # of its luma, which is not subsampled
        weights = np.array([0.299, 0.587, 0.114])
        assert abs((decoded @ weights) - (pixels @ weights)).mean() < 3


@pytest.mark.parametrize("form", FORMS)
def test_each_image_comes_with_its_own_index_however_far_ahead(form, stores):
    samples, _ = opened(stores[form])
    raw, _ = opened(stores["raw"])
    means = np.array([pixels.mean() for pixels in raw.content(raw.usable)])
    pipeline = Pipeline(batch_size=7, num_threads=2, device_id=None, prefetch_queue_depth=4, seed=1)
    generator = np.random.default_rng(0)
    plan = generator.integers(0, 40, (60, 7))
    with pipeline:
        image, index = packed.source(samples, lambda step: plan[step % 60], loader.Options())
        assert isinstance(image, Encoded) == (form == "jpeg")
        outputs = single_view.graph(image, index, plain(single_view), "cpu")
        pipeline.set_outputs(outputs["image"], outputs["index"])
    for step in range(60):
        pixels, index = (np.asarray(each.as_tensor()) for each in pipeline.run())

        np.testing.assert_array_equal(index[:, 0], plan[step])
        # the whole image, squeezed to a square, keeps its mean
        assert abs(pixels.mean(axis=(1, 2, 3)) - means[plan[step]]).max() < 4


def plain(graph: Any) -> Any:
    """One view of the whole image: no crop, no colours."""
    off = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "hue", "grayscale"), 0.0)
    return graph.Options(image_size=64, image_area=(1.0, 1.0), image_aspect=(0.5, 2.0), **off)


# Graphs and runs


def test_there_are_graphs_to_try():
    assert len(GRAPHS) >= 10


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_gives_the_same_kinds_of_output_from_either_form_as_from_the_folder(
    name, images, stores
):
    module, options = settings(name)
    there = next(batches(folder, listed(images), module, options, batch=4))
    for form in FORMS:
        here = next(batches(packed, opened(stores[form])[0], module, options, batch=4))

        assert {key: (each.shape, each.dtype) for key, each in here.items()} == {
            key: (each.shape, each.dtype) for key, each in there.items()
        }
        assert torch.equal(here["index"], there["index"])  # the plan's, whatever the reader
        for key, each in here.items():
            assert each.dtype == torch.int64 or each.float().std() > 5, key


def settings(name: str) -> tuple[Any, Any]:
    """A graph with the options of a recipe's demo section, which are small."""
    module = importlib.import_module(f"pipelines.{name}")
    for path in sorted((CHECKOUT / "recipes").glob("*.yaml")):
        recipe = config.load(path)
        if recipe.pipeline.module is module:
            return module, recipe.pipeline.options
        if recipe.evaluation.module is module:
            return module, recipe.evaluation.options
    return module, module.Options()


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_bit_for_bit_where_it_was_stopped(form, stores):
    options = pirl_jigsaw.Options(image_size=32, patches_crop=48, patch=12)
    through = batches(packed, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    expected = [next(through) for _ in range(12)]
    stopped = batches(packed, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    for _ in range(5):
        next(stopped)
    resumed = batches(packed, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    resumed.resume(stopped.state())

    for step in range(5, 12):
        found = next(resumed)
        assert all(torch.equal(found[key], expected[step][key]) for key in found)


def test_batches_stay_what_they_were_when_the_loader_and_the_store_are_gone(stores):
    options = evaluation.Options(resize=64, crop=64)
    made = batches(packed, opened(stores["raw"])[0], evaluation, options)
    first = next(made)
    before = first["image"].clone()
    for _ in range(10):
        next(made)
    del made

    assert torch.equal(first["image"], before)


def test_a_jpeg_that_is_damaged_inside_is_named_and_left_out_while_training(stores, tmp_path):
    shutil.copytree(stores["jpeg"], tmp_path / "store")
    samples, _ = opened(tmp_path / "store")
    with (tmp_path / "store" / "shard-00000.bin").open("r+b") as file:
        file.seek(int(samples.offset[3]))
        file.write(bytes(100))
    made = batches(
        packed,
        opened(tmp_path / "store")[0],
        evaluation,
        evaluation.Options(resize=64, crop=64),
        rows=lambda step: np.arange(8),
    )

    batch = next(made)
    assert batch["index"].tolist() == [0, 1, 2, 4, 4, 5, 6, 7]
    assert list(made.skipped) == [3]
    assert samples.path(3) in made.skipped[3]


def test_a_recipe_takes_a_store_from_the_command_line(stores):
    recipe = config.load(
        CHECKOUT / "recipes" / "rotation.yaml",
        ["data.use=pipelines.readers.packed", f"data.root={stores['jpeg']}", "data.verify=true"],
    )

    assert recipe.data.module is packed
    assert recipe.data.options.verify
    assert not recipe.demo


# Damage


def test_a_shard_that_is_cut_off_is_refused_before_it_is_mapped(copy):
    path = copy / "shard-00000.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)

    assert error(copy) == (
        f"{path} has {size - 1:,} bytes, and manifest.json says {size:,}: copy or pack it again"
        " (python -m fastssl.data pack SOURCE STORE)"
    )


def test_a_shard_that_is_missing_is_named(copy):
    (copy / "shard-00001.bin").unlink()

    assert "shard-00001.bin: No such file or directory: copy or pack it again" in error(copy)


def test_a_flipped_bit_in_the_index_is_named(copy):
    path = copy / "index" / "offset.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert f"{path} is not what manifest.json says" in error(copy)
    path.unlink()
    assert f"cannot read {path}: No such file or directory" in error(copy)


def test_another_version_is_named_with_who_wrote_it(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2, "fastssl": "9.1"}))

    found = error(copy)
    assert "packed store of version 2, and this fastssl reads version 1: copy or pack" in found
    assert "(9.1)" in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"form": "gif"}, "form 'gif'"),
        ({"shards": [{"name": "../shard", "bytes": 1}]}, "shard '../shard'"),
        ({"index": {}}, "at 'shard'"),
        ({"images": 41}, "index/shard.npy holds int32 [40], not int32 [41]"),
        ({"format": "other"}, "not the manifest of a packed store"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(change, named, copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    assert named in error(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(content, copy):
    (copy / "manifest.json").write_bytes(content)

    assert "not the manifest of a packed store, or is damaged" in error(copy)


def test_keys_that_later_versions_add_to_the_manifest_are_not_minded(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": [1, 2]}))

    assert len(opened(copy)[0]) == 40


def test_a_folder_of_images_is_told_from_a_store(images, tmp_path):
    assert error(images) == (
        f"{images} is no packed store (it has no manifest.json): read a folder of images with"
        f" data.use=pipelines.readers.folder, or pack it (python -m fastssl.data pack {images}"
        " STORE)"
    )
    assert error(tmp_path / "a" / "b") == f"there is no folder {tmp_path}/a/b, only {tmp_path}"
    (tmp_path / "file").touch()
    assert (
        error(tmp_path / "file") == f"{tmp_path}/file is a file: give the folder of a packed store"
    )


def test_what_verify_found_is_remembered_until_a_file_changes(copy, tmp_path, monkeypatch):
    given = packed.Options(root=str(copy), verify=True)
    looked: list[int] = []
    compare = packed._damaged
    monkeypatch.setattr(packed, "_damaged", lambda *x: looked.append(1) or compare(*x))

    def bad() -> list[int]:
        samples = packed.list_samples(given, cache=tmp_path / "cache", say=lambda _: None)
        return list(samples.bad)

    assert bad() == bad() == []
    assert len(looked) == 1
    samples, _ = opened(copy)
    with (copy / f"shard-{samples.shard[7]:05d}.bin").open("r+b") as file:
        file.seek(int(samples.offset[7]))
        file.write(b"\1\2\3\4\5")
    assert bad() == bad() == [7]
    assert len(looked) == 2


def test_the_folder_reader_knows_a_store_too(stores):
    with pytest.raises(ValueError, match=r"is a packed store: read it with data\.use=pipelines"):
        listed(stores["jpeg"])


def test_verify_finds_a_flipped_bit_in_an_image(copy):
    samples, lines = opened(copy, verify=True)
    assert lines == []
    row = 21
    with (copy / f"shard-{samples.shard[row]:05d}.bin").open("r+b") as file:
        file.seek(int(samples.offset[row] + samples.size[row] - 1))
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 4]))

    assert opened(copy)[0].bad == {}  # nothing was looked at
    samples, lines = opened(copy, verify=True)
    assert list(samples.bad) == [row]
    assert samples.usable.tolist() == [each for each in range(40) if each != row]
    assert len(lines) == 1
    assert f"skipping 1 of 40 images: {samples.path(row)} (its bytes" in lines[0]
    assert f"1 of 40 images in {copy} are damaged: {samples.path(row)}" in error(
        copy, verify=True, bad="error"
    )
