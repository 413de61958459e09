"""Tar stores as training reads them: the same rows and pixels, nothing copied, damage named."""

import dataclasses
import importlib
import io
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wds2idx
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastssl import config, data, loader, order
from pipelines import evaluation, pirl_jigsaw, single_view
from pipelines.images import Encoded
from pipelines.readers import folder, headers, quarantine, tar, tar_local, tar_store
from tests.packing import agree, write_manifest

CHECKOUT = Path(__file__).resolve().parents[1]
GRAPHS = sorted(
    path.stem
    for path in (CHECKOUT / "pipelines").glob("*.py")
    if "\ndef graph(" in path.read_text()
)
FORMS = ("original", "jpeg", "raw")
KINDS = ("png", "webp", "bmp")  # of one image each, the others are JPEGs
SHARD = {"name": "a.tar", "bytes": 1, "sha256": "0" * 64, "images": 40, "first_row": 0}
SHORT = 80  # pixels: some of the built-in images are smaller, or are stored as they are


@pytest.fixture(scope="module")
def images(demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty of the built-in images in their ten classes, one of them larger than the rest."""
    root = tmp_path_factory.mktemp("tar") / "images"
    for file in sorted((demo_images / "train").glob("*/0000[0-3].jpg")):
        target = root / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for file, kind in zip(sorted(root.glob("*/*.jpg"))[3::5], KINDS, strict=False):
        with Image.open(file) as image:
            image.save(file.with_suffix(f".{kind}"), lossless=True)
        file.unlink()
    assert len(list(root.glob("*/*.*"))) == 40
    return root


@pytest.fixture(scope="module")
def stores(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as a store of each form, each of several shards."""
    root = tmp_path_factory.mktemp("stores")
    found = {}
    for form in FORMS:
        found[form] = root / form
        command = ["pack", str(images), str(found[form]), "--form", form, "--workers", "2"]
        size = [] if form == "original" else ["--short-side", str(SHORT)]
        assert data.main([*command, *size, "--shard-mb", "1"]) == 0
    return found


@pytest.fixture
def copy(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A raw store to be damaged."""
    shutil.copytree(stores["raw"], tmp_path / "store")
    return tmp_path / "store"


def opened(root: Path, **options) -> tuple[tar.Samples, list[str]]:
    """The store, and the lines that were said."""
    lines: list[str] = []
    given = tar.Options(root=str(root), **options)
    return tar.list_samples(given, cache=None, say=lines.append), lines


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
    limit = 10**6 if form == "original" else SHORT
    np.testing.assert_array_equal(short, np.minimum(np.minimum(there.height, there.width), limit))
    longest = np.maximum(there.height, there.width) * short
    before = np.minimum(there.height, there.width)
    np.testing.assert_array_equal(np.maximum(samples.height, samples.width), longest // before)


def test_pixels_begin_at_a_multiple_of_64_bytes_in_one_of_several_files(stores):
    samples, _ = opened(stores["raw"])

    assert len(samples.shards) >= 2
    assert all(pixels.ctypes.data % 64 == 0 for pixels in samples.content(samples.usable))


def test_a_shard_does_not_pass_for_an_image(stores):
    for form in FORMS:
        with pytest.raises(ValueError, match=r"not an image"):
            headers.dimensions(str(stores[form] / "shard-000000.tar"))


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


@pytest.mark.parametrize(
    "value",
    [
        *({"root": ""}, {"bad": "maybe"}, {"limit": 0}, {"shuffle": "maybe"}, {"chunk_mb": 0}),
        *({"window": 0}, {"window": 5, "shuffle": "images"}),
    ],
)
def test_options_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match=next(iter(value))):
        tar.Options(**({"root": "store"} | value))


def test_more_shards_than_files_may_be_open_have_the_limit_raised_or_are_refused(
    stores, monkeypatch
):
    monkeypatch.setattr(tar_local, "OTHER_FILES", 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        count = len(opened(stores["raw"])[0].shards)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (400 + count, hard)
        monkeypatch.setattr(tar_local, "OTHER_FILES", hard)
        found = error(stores["raw"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert f"has {count} tars, and a process may have {hard:,} files open: raise that" in found


# What others read of it


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_s_members_are_the_rows_and_their_labels_and_hold_what_the_index_says(form, stores):
    samples, _ = opened(stores[form])
    kinds = set()
    row = 0
    for shard in samples.files:
        with tarfile.open(stores[form] / shard.name) as file:
            members = file.getmembers()
            assert len(members) == 2 * shard.images
            for image, label in zip(members[::2], members[1::2], strict=True):
                number, kind = image.name.split(".")
                kinds.add(kind)
                assert int(number) == row
                assert label.name == f"{row:012d}.cls"
                assert samples.labels is not None
                assert content_of(file, label) == b"%d" % samples.labels[row]
                content = content_of(file, image)
                if form == "raw":
                    assert len(content) == tar_store.NPY_HEADING + samples.size[row]
                    content = np.load(io.BytesIO(content))
                else:
                    content = np.frombuffer(content, np.uint8)
                np.testing.assert_array_equal(content, samples.content(np.array([row]))[0])
                row += 1

    assert row == len(samples)
    assert kinds == {"original": {"jpg", *KINDS}, "jpeg": {"jpg"}, "raw": {"npy"}}[form]


def content_of(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened_member = file.extractfile(member)
    assert opened_member is not None
    return opened_member.read()


@pytest.mark.parametrize("form", FORMS)
def test_dali_s_webdataset_reader_gives_the_same_bytes_and_labels(form, stores):
    samples, _ = opened(stores[form])
    shards = [stores[form] / shard.name for shard in samples.files]
    pipeline = Pipeline(batch_size=8, num_threads=1, device_id=None)
    with pipeline:
        read: Any = fn.readers.webdataset(
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg;png;webp;bmp;npy", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*read)
    row = 0
    for _ in range(len(samples) // 8):
        images, labels = pipeline.run()
        for place in range(8):
            image, label = (np.asarray(each.at(place)) for each in (images, labels))
            if form == "raw":
                image = np.load(io.BytesIO(image.tobytes()))
            np.testing.assert_array_equal(image, samples.content(np.array([row]))[0])
            assert samples.labels is not None
            assert int(label.tobytes()) == samples.labels[row]
            row += 1

    assert row == 40


@pytest.mark.parametrize("form", FORMS)
def test_dali_s_index_is_what_its_own_script_writes(form, stores, tmp_path):
    for shard in stores[form].glob("*.tar"):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "idx"), verbose=False) as script:
            script.create_index()

        assert shard.with_suffix(".idx").read_bytes() == (tmp_path / "idx").read_bytes()


# Chunks


def test_images_are_read_one_by_one_from_a_disk_and_in_chunks_if_asked_for(stores):
    alone, chunked = (opened(stores["raw"], shuffle=each)[0] for each in ("auto", "chunks"))

    assert alone.chunks is None
    assert alone.window == 1
    assert chunked.chunks is not None
    assert chunked.chunks.dtype == np.int64
    assert alone.fingerprint == chunked.fingerprint  # the same rows mean the same images


@pytest.mark.parametrize("limit", [None, 17])
def test_a_chunk_is_a_run_of_images_within_so_many_bytes_of_one_shard(limit, stores):
    samples, _ = opened(stores["raw"], limit=limit)
    ends = tar._chunks(samples.shard, samples.offset, samples.usable, 100_000)
    runs = np.split(samples.usable, ends[:-1])
    spans = [samples.offset[run[-1]] - samples.offset[run[0]] for run in runs]

    np.testing.assert_array_equal(np.concatenate(runs), samples.usable)
    assert len(runs) > 8
    assert max(map(len, runs)) > 1
    assert all(len(set(samples.shard[run])) == 1 for run in runs)
    assert max(spans) < 100_000
    places = [(samples.shard[run[0]], samples.offset[run[0]] // 100_000) for run in runs]
    assert len(set(places)) == len(runs)  # no run could be longer


def test_about_4096_images_are_shuffled_among_each_other():
    for images, chunks in ((75, 1000), (8, 4000), (5000, 30)):
        ends = np.arange(1, chunks + 1) * images
        window = tar._window(ends, tar.Options(root="store", shuffle="chunks"))

        assert window == max(1, round(4096 / images))
    assert tar._window(ends, tar.Options(root="store", shuffle="chunks", window=3)) == 3


def chunk_plan(samples: tar.Samples, rank: int, world: int, batch: int) -> Any:
    """As train.py orders chunks: small ones, two at a time."""
    ends = tar._chunks(samples.shard, samples.offset, samples.usable, 100_000)
    samples = dataclasses.replace(samples, chunks=ends, window=2)
    steps = order.steps_per_epoch(len(samples.usable), world, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, steps)
        plan = order.by_chunks(ends, 3, epoch, rank, world, batch, samples.window)
        return samples.usable[plan[step]]

    return samples, rows


@pytest.mark.parametrize("world", [1, 2, 7])
def test_ranks_see_each_image_once_an_epoch_also_where_shards_are_fewer(world, stores):
    options = evaluation.Options(resize=32, crop=32)
    store, _ = opened(stores["raw"])
    batch, seen = 5, []
    for rank in range(world):
        samples, rows = chunk_plan(store, rank, world, batch)
        made = batches(tar, samples, evaluation, options, batch=batch, rows=rows)
        for _ in range(order.steps_per_epoch(40, world, batch)):
            seen += next(made)["index"].tolist()

    assert len(store.shards) < 7
    assert set(seen) == set(range(40))
    assert len(seen) < 40 + world * batch


def test_a_run_by_chunks_goes_on_bit_for_bit_where_it_was_stopped(stores):
    options = pirl_jigsaw.Options(image_size=32, patches_crop=48, patch=12)

    def made() -> loader.Loader:
        samples, rows = chunk_plan(opened(stores["jpeg"])[0], 0, 2, 4)
        return batches(tar, samples, pirl_jigsaw, options, batch=4, seed=7, rows=rows)

    through, stopped, resumed = made(), made(), made()
    expected = [next(through) for _ in range(12)]
    for _ in range(5):
        next(stopped)
    resumed.resume(stopped.state())

    for step in range(5, 12):
        found = next(resumed)
        assert all(torch.equal(found[key], expected[step][key]) for key in found)


class Told:
    """In place of a mapped shard: what the kernel is told."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def madvise(self, _: int, start: int, length: int) -> None:
        self.spans.append((start, start + length))


def told_of(samples: tar.Samples, rows: Any, steps: int) -> list[list[tuple[int, int]]]:
    """What is read ahead at each step, in bytes of the only shard."""
    told = Told()
    read = tar_local.reading_ahead(dataclasses.replace(samples, maps=(told,)), rows)
    found = []
    for step in range(steps):
        read(step, len(rows(step)))
        found.append(told.spans)
        told.spans = []
    return found


def in_one_shard(store: tar.Samples, *, chunks: int, window: int) -> tar.Samples:
    """An imagined store: chunks of ten images of a megabyte each."""
    count = 10 * chunks
    return dataclasses.replace(
        store,
        shard=np.zeros(count, np.int32),
        offset=np.arange(count) * 1_000_000,
        size=np.full(count, 900_000),
        usable=np.arange(count),
        chunks=np.arange(1, chunks + 1) * 10,
        window=window,
    )


def test_a_window_s_chunks_are_read_whole_while_the_one_before_it_is_given(stores):
    samples = in_one_shard(opened(stores["raw"], shuffle="chunks")[0], chunks=40, window=4)
    assert samples.chunks is not None
    plan = order.by_chunks(samples.chunks, 0, 0, 0, 1, 5, 4)  # of 8 steps a window
    told = told_of(samples, lambda step: plan[step % len(plan)], len(plan) - 8)

    for window in range(1, 10):
        spans = sorted(span for step in told[8 * window - 8 : 8 * window] for span in step)
        first = {int(row) // 10 * 10 for row in plan[8 * window : 8 * window + 8].reshape(-1)}
        assert spans == [
            (row * 10**6 // 4096 * 4096, row * 10**6 + 9_900_000) for row in sorted(first)
        ]
    assert max(len(step) for step in told) == 1  # not all at once


def test_of_chunks_that_little_is_wanted_of_nothing_is_read_ahead(stores):
    samples = in_one_shard(opened(stores["raw"], shuffle="chunks")[0], chunks=200, window=4)
    plan = order.shuffled(2000, 0, 0, 0, 1, 5)

    assert not any(told_of(samples, lambda step: plan[step % len(plan)], 300))


def test_reading_ahead_ends_with_the_plan(stores):
    samples = in_one_shard(opened(stores["raw"], shuffle="chunks")[0], chunks=8, window=4)

    def rows(step: int) -> np.ndarray:
        if step >= 10:
            raise StopIteration
        return np.arange(5 * step, 5 * step + 5)

    assert [len(step) for step in told_of(samples, rows, 10)] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


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
        image, index = tar.source(samples, lambda step: plan[step % 60], loader.Options())
        assert isinstance(image, Encoded) == (form != "raw")
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
    for form in ("original", "raw"):
        here = next(batches(tar, opened(stores[form])[0], module, options, batch=4))

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
    through = batches(tar, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    expected = [next(through) for _ in range(12)]
    stopped = batches(tar, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    for _ in range(5):
        next(stopped)
    resumed = batches(tar, opened(stores[form])[0], pirl_jigsaw, options, seed=7)
    resumed.resume(stopped.state())

    for step in range(5, 12):
        found = next(resumed)
        assert all(torch.equal(found[key], expected[step][key]) for key in found)


def test_batches_stay_what_they_were_when_the_loader_and_the_store_are_gone(stores):
    options = evaluation.Options(resize=64, crop=64)
    made = batches(tar, opened(stores["raw"])[0], evaluation, options)
    first = next(made)
    before = first["image"].clone()
    for _ in range(10):
        next(made)
    del made

    assert torch.equal(first["image"], before)


def test_a_jpeg_that_is_damaged_inside_is_named_and_left_out_while_training(stores, tmp_path):
    shutil.copytree(stores["jpeg"], tmp_path / "store")
    samples, _ = opened(tmp_path / "store")
    with (tmp_path / "store" / "shard-000000.tar").open("r+b") as file:
        file.seek(int(samples.offset[3]))
        file.write(bytes(100))
    made = batches(
        tar,
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
        ["data.use=pipelines.readers.tar", f"data.root={stores['jpeg']}", "data.verify=true"],
    )

    assert recipe.data.module is tar
    assert recipe.data.options.verify
    assert not recipe.demo


# Damage


def test_a_shard_that_is_cut_off_is_refused_before_it_is_mapped(copy):
    path = copy / "shard-000000.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)

    assert error(copy) == (
        f"{path} has {size - 1:,} bytes, and manifest.json says {size:,}: copy or pack it again"
        " (python -m fastssl.data pack SOURCE STORE)"
    )


def test_a_shard_that_is_missing_is_named(copy):
    (copy / "shard-000001.tar").unlink()

    assert "shard-000001.tar: No such file or directory: copy or pack it again" in error(copy)


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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3, "fastssl": "9.1"}))

    found = error(copy)
    assert "is of a store of version 3, and this fastssl reads version 2: copy or pack" in found
    assert "(9.1)" in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"form": "gif"}, "form 'gif'"),
        ({"shards": [SHARD | {"name": "../shard"}]}, "shard '../shard'"),
        ({"shards": [SHARD | {"name": ".."}]}, "shard '..'"),
        ({"shards": [SHARD | {"bytes": -1}]}, "shard a.tar: bytes, images or first_row"),
        ({"shards": [SHARD | {"images": True}]}, "shard a.tar: bytes, images or first_row"),
        ({"shards": [SHARD, SHARD | {"name": "b"}]}, "shard b: bytes, images or first_row"),
        ({"shards": [{"name": "a.tar", "bytes": 1}]}, "at 'sha256'"),
        ({"classes": [1]}, "classes"),
        ({"index": {}}, "at 'shard'"),
        ({"images": 41}, "40 images in shards, 41 said"),
        ({"images": "40"}, "images '40'"),
        ({"format": "other"}, "not the manifest of a tar store"),
        ({"shards": [SHARD | {"bytes": 10**30}]}, "shard a.tar: bytes, images or first_row"),
        ({"shards": [SHARD | {"bytes": 0}]}, "shard a.tar: bytes, images or first_row"),
        ({"shards": [SHARD | {"first_row": 0.0}]}, "shard a.tar: bytes, images or first_row"),
        ({"shards": [SHARD | {"sha256": 1}]}, "shard a.tar: sha256"),
        ({"shards": [SHARD | {"name": "a\0.tar"}]}, "shard 'a\\x00.tar'"),
        ({"shards": [SHARD | {"name": "a\ud800.tar"}]}, "shard 'a\\ud800.tar'"),
        ({"shards": [SHARD, SHARD | {"first_row": 40}]}, "shard 'a.tar'"),
        ({"shards": {"a.tar": SHARD}}, "at 'shards'"),
        ({"classes": ["a\ud800"]}, "classes"),
        ({"classes": "ab"}, "at 'classes'"),
        ({"index": dict.fromkeys(tar_store.COLUMNS, 1)}, "index"),
        ({"images": 0, "shards": []}, "images 0"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(change, named, copy):
    write_manifest(copy, json.loads((copy / "manifest.json").read_text()) | change)

    assert named in error(copy)


def test_a_manifest_that_was_changed_is_refused(copy):
    path = copy / "manifest.json"
    whole = json.loads(path.read_text())
    for change in ({"classes": whole["classes"][::-1]}, {"quality": 1}, {"left_out": {"a": "b"}}):
        path.write_text(json.dumps(whole | change))

        assert error(copy) == (
            f"{path} is not as it was written (its SHA-256): copy or pack it again (python -m"
            " fastssl.data pack SOURCE STORE)"
        )


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(content, copy):
    (copy / "manifest.json").write_bytes(content)

    assert "not the manifest of a tar store, or is damaged" in error(copy)


def test_a_store_of_the_version_before_is_told_to_be_packed_again(copy):
    path = copy / "manifest.json"
    path.write_text('{"format": "fastssl packed store", "version": 1}')

    assert error(copy) == (
        f"{path} is of a store of version 1, which this fastssl no longer reads: pack its source"
        " again (python -m fastssl.data pack SOURCE STORE)"
    )


def change(store: Path, column: str, row: int, value: int) -> None:
    """Changes an index in a way that its checksums don't tell."""
    path = store / "index" / f"{column}.npy"
    content = np.load(path)
    content[row] = value
    np.save(path, content)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["index"][column] = tar_store.sha256_of(str(path))
    write_manifest(store, manifest)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("shard", -1), ("shard", 99), ("offset", -1), ("offset", 1 << 40), ("size", 0)),
        *(("size", 1 << 40), ("size", 5), ("height", -1), ("width", 7), ("label", -2)),
        *(("label", 10), ("name_end", 1 << 40), ("name_end", 0)),
        ("offset", 128),  # where another is
    ],
)
def test_an_index_that_leads_out_of_its_shards_is_refused(column, value, copy):
    change(copy, column, 21, value)

    assert f"the index in {copy}/index is wrong about image 21: it can't lie" in error(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        b"\x93NUMPY\1\0\x08\0(\x27\x27\x27\n   ",
        b"\x93NUMPY\1\0\x50\0%-79s\n" % b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,)}",
        b"\x93NUMPY\1\0\x50\0%-79s\n" % b"{'descr': '|O', 'fortran_order': False, 'shape': (40,)}",
    ],
)
def test_a_column_that_is_no_array_is_named_with_the_remedy(content, copy):
    path = copy / "index" / "offset.npy"
    path.write_bytes(content.replace(b"%d", b"%d" % 10**22))
    agree(copy)

    said = error(copy)
    assert said.startswith(f"{path} is no array that numpy can map (")
    assert said.endswith("): copy or pack it again (python -m fastssl.data pack SOURCE STORE)")


@pytest.mark.parametrize("name", ["manifest.json", "index/size.npy", "shard-000000.tar"])
def test_a_pipe_in_a_store_keeps_nobody_waiting(name, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name)

    reason = "has 0 bytes" if name.endswith("tar") else "it is no regular file"
    assert reason in error(copy)


def test_images_without_a_label_leave_a_store_without_classes(copy):
    change(copy, "label", 21, -1)
    samples, lines = opened(copy)

    assert samples.classes == ()
    assert samples.labels is None
    assert lines == [f"data: 1 of 40 images in {copy} have no label: none is used"]


def test_tars_without_an_index_are_told_how_to_get_one(copy):
    (copy / "manifest.json").unlink()

    assert error(copy) == (
        f"{copy} holds tars, but no manifest.json: make it with python -m fastssl.data index {copy}"
    )


def test_quarantined_images_keep_their_rows_and_are_told_as_bad(stores, tmp_path):
    whole, _ = opened(stores["jpeg"])
    listing = tmp_path / "quarantine.jsonl"
    names = [str(Path(whole.path(row)).relative_to(whole.root)) for row in (3, 30)]
    lines = [quarantine.line(name.encode(), "too dark") for name in [*names, "no/such.jpg"]]
    listing.write_text("".join(lines))
    samples, said = opened(stores["jpeg"], quarantine=str(listing), bad="error")
    few, _ = opened(stores["jpeg"], quarantine=str(listing), per_class=3)

    assert samples.bad == dict.fromkeys((3, 30), "quarantined: too dark")
    assert samples.usable.tolist() == [row for row in range(40) if row not in (3, 30)]
    assert [samples.path(row) for row in range(40)] == [whole.path(row) for row in range(40)]
    assert "1 of 3 names in data.quarantine are not in the listing" in " ".join(said)
    assert not {few.path(row) for row in range(30)} & {whole.path(row) for row in (3, 30)}
    listing.write_text(
        "".join(
            quarantine.line(whole.path(row)[len(whole.root) + 1 :].encode(), "")
            for row in range(40)
        )
    )
    assert "all are quarantined" in error(stores["jpeg"], quarantine=str(listing))


def test_keys_that_later_versions_add_to_the_manifest_are_not_minded(copy):
    said = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, said | {"later": [1, 2]})

    assert len(opened(copy)[0]) == 40


def test_a_folder_of_images_is_told_from_a_store(images, tmp_path):
    assert error(images) == (
        f"{images} is no tar store (it has no manifest.json): read a folder of images with"
        f" data.use=pipelines.readers.folder, or pack it (python -m fastssl.data pack {images}"
        " STORE)"
    )
    assert error(tmp_path / "a" / "b") == f"there is no folder {tmp_path}/a/b, only {tmp_path}"
    (tmp_path / "file").touch()
    assert error(tmp_path / "file") == f"{tmp_path}/file is a file: give the folder of a tar store"


def test_what_verify_found_is_remembered_until_a_file_changes(copy, tmp_path, monkeypatch):
    given = tar.Options(root=str(copy), verify=True)
    looked: list[int] = []
    compare = tar_local._compared
    monkeypatch.setattr(tar_local, "_compared", lambda *x: looked.append(1) or compare(*x))

    def bad() -> list[int]:
        samples = tar.list_samples(given, cache=tmp_path / "cache", say=lambda _: None)
        return list(samples.bad)

    assert bad() == bad() == []
    assert len(looked) == 1
    samples, _ = opened(copy)
    with (copy / f"shard-{samples.shard[7]:06d}.tar").open("r+b") as file:
        file.seek(int(samples.offset[7]))
        file.write(b"\1\2\3\4\5")
    assert bad() == bad() == [7]
    assert len(looked) == 2


def test_the_folder_reader_knows_a_store_too(stores):
    with pytest.raises(ValueError, match=r"is a tar store: read it with data\.use=pipelines"):
        listed(stores["jpeg"])


def test_verify_finds_a_flipped_bit_in_an_image(copy):
    samples, lines = opened(copy, verify=True)
    assert lines == []
    row = 21
    with (copy / f"shard-{samples.shard[row]:06d}.tar").open("r+b") as file:
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
