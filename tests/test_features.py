"""Frozen features: a row an image, equal to a plain loop's, kept, and made anew when damaged."""

import fcntl
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from fastssl import features, labelled, representation
from fastssl.config import Part
from fastssl.loader import Options as Loading
from pipelines import evaluation, evaluation_patches, ops, random_crop
from pipelines.readers import folder
from tests import few_images, tiny_backbone
from tests.few_images import tiny

SMALL = Part("pipelines.evaluation", evaluation, evaluation.Options(resize=36, crop=32))
PATCHES = Part(
    "pipelines.evaluation_patches",
    evaluation_patches,
    evaluation_patches.Options(resize=56, crop=48),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    return few_images.copy(demo_images, tmp_path_factory.mktemp("images"))


def split_of(root: Path, name: str = "train") -> labelled.Split:
    train, val, _ = labelled.splits(
        folder, folder.Options(root=str(root)), cache=None, say=lambda _: None
    )
    return train if name == "train" else val


def extract(
    split,
    cache: Path,
    *,
    trained=None,
    graph=SMALL,
    said=None,
    **options,
):
    return features.extract(
        trained or tiny(),
        split,
        graph,
        features.Options(**{"batch": 4, **options}),
        loading=Loading(threads=1),
        accelerator=Accelerator(cpu=True),
        cache=cache,
        say=lambda _: None if said is None else said.append(_),
    )


def decoded(run_graph, split, graph=SMALL) -> dict[str, torch.Tensor]:
    """The split's images as the graph gives them, channels first."""
    encoded = [Path(split.samples.path(int(row))).read_bytes() for row in split.rows]
    outputs = run_graph(graph.module, graph.options, encoded)
    return {
        key: torch.from_numpy(outputs[key]).movedim(-1, -3)
        for key in ("image", "patches")
        if key in outputs
    }


@pytest.mark.parametrize("batch", [1, 4, 128])
def test_n_images_give_n_rows_equal_to_those_of_a_plain_loop(data, tmp_path, run_graph, batch):
    split, run = split_of(data), tiny()
    found = extract(split, tmp_path, trained=run, batch=batch, size=128)
    with torch.inference_mode():
        stages = representation.all_stages(run.backbone, decoded(run_graph, split), "global")
    pooled = F.adaptive_max_pool2d(stages["first"], 4).flatten(1)  # 8 x 4 x 4 = 128

    assert list(found.stages) == ["first", "pool"]
    assert found.stages["first"].shape == (21, 128)
    np.testing.assert_allclose(found.stages["first"], pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.stages["pool"], stages["pool"], rtol=1e-5, atol=1e-6)
    assert found.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert isinstance(found.stages["pool"], np.memmap)
    assert not found.stages["pool"].flags.writeable


@pytest.mark.parametrize("how", ["joint", "global"])
def test_patches_are_standardised_as_in_training_and_averaged(data, tmp_path, run_graph, how):
    split, run = split_of(data, "val"), tiny(standardize=how)
    found = extract(split, tmp_path, trained=run, graph=PATCHES, stages=("pool",))
    patches = decoded(run_graph, split, PATCHES)["patches"].float()
    expected = []
    for image in patches:  # one after the other, a value after the other
        each = []
        for patch in image:
            if how == "joint":
                here = (patch - patch.mean()) / patch.std(correction=0)
            else:
                here = (patch / 255 - 0.5) / 0.25
            with torch.inference_mode():
                each.append(run.backbone(here[None])[0])
        expected.append(torch.stack(each).mean(dim=0))

    np.testing.assert_allclose(found.stages["pool"], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_second_time_nothing_is_read_again_and_fewer_stages_are_found_in_all(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "images")
    split, said = split_of(root), []
    first = extract(split, tmp_path)
    for file in (root / "train").rglob("*.jpg"):
        file.write_bytes(b"gone")
    again = extract(split, tmp_path, said=said)
    one = extract(split, tmp_path, stages=("last",))

    assert again.folder == first.folder == one.folder
    assert len(said) == 1
    assert "from" in said[0]
    assert list(one.stages) == ["pool"]
    np.testing.assert_array_equal(again.stages["first"], first.stages["first"])


@pytest.mark.parametrize(
    "changed",
    [
        {"trained": tiny(1)},
        {"trained": tiny(standardize="joint")},
        {"trained": replace(tiny(), use="fastssl.backbones.resnet")},
        {"trained": replace(tiny(), options={"width": 8, "name": "timm:none"})},
        {"graph": Part(SMALL.use, evaluation, evaluation.Options(resize=37, crop=32))},
        {"graph": Part(SMALL.use, evaluation, replace(SMALL.options, interpolation="bicubic"))},
        {"graph": Part("pipelines.random_crop", random_crop, SMALL.options)},
        {"loading": Loading(threads=1, decoder="cpu")},
        {"dtype": "float16"},
        {"pool": "avg"},
        {"size": 8},
    ],
    ids=[
        *("weights", "standardize", "backbone", "backbone's options", "graph"),
        *("interpolation", "another graph", "decoder", "dtype", "pool", "size"),
    ],
)
def test_what_changes_the_values_changes_the_folder(data, tmp_path, changed):
    split = split_of(data, "val")

    assert fingerprint(split) != fingerprint(split, **changed)


def fingerprint(split, *, trained=None, graph=SMALL, loading=None, on=("cpu", "no"), **options):
    """Of what would be extracted."""
    how = features.Options(**options), loading or Loading(threads=1), *on
    return json.dumps(features.depends_on(trained or tiny(), split, graph, *how), sort_keys=True)


def test_the_rows_the_device_and_the_precision_change_the_folder(data):
    split = split_of(data, "val")
    fewer = replace(split, rows=split.rows[:-1], labels=split.labels[:-1])
    others = replace(split, rows=np.array([*split.rows[1:], split.rows[0]]))
    found = [
        fingerprint(split),
        fingerprint(fewer),
        fingerprint(others),
        fingerprint(split, on=("cuda", "no")),
        fingerprint(split, on=("cpu", "bf16")),
    ]

    assert len({*found}) == 5
    assert fingerprint(split, pool="max", size=9000, batch=7) == found[0]
    of_timm = replace(tiny(), options={"name": "timm:none"})
    libraries = [
        json.loads(text)["libraries"] for text in (found[0], fingerprint(split, trained=of_timm))
    ]
    assert [{*each} for each in libraries] == [
        {"dali", "torch", "torchvision"},
        {"dali", "torch", "torchvision", "timm"},
    ]
    assert libraries[0]["torch"] == importlib.metadata.version("torch")


GRAPH = """
from drawn_graphs import parts
from pipelines.evaluation import Options, graph
"""


@pytest.mark.parametrize("changed", ["drawn_graphs.crops", "drawn_graphs.parts", "pipelines.ops"])
def test_another_source_of_the_graph_or_of_what_it_imports_is_another_folder(
    data, tmp_path, monkeypatch, changed
):
    package = tmp_path / "drawn_graphs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("LIGHT = 1\n")
    (package / "crops.py").write_text(GRAPH)
    (tmp_path / "ops.py").write_bytes(Path(ops.__file__).read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("drawn_graphs.crops")
    split, graph = split_of(data, "val"), Part("drawn_graphs.crops", module, SMALL.options)
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    before = [fingerprint(split, graph=graph) for _ in range(2)]
    with Path(str(sys.modules[changed].__file__)).open("a") as source:
        source.write("# a change\n")
    after = fingerprint(split, graph=graph)
    for name in ("drawn_graphs.crops", "drawn_graphs.parts", "drawn_graphs"):
        del sys.modules[name]

    assert before[0] == before[1] != after


def test_another_source_of_the_backbone_is_another_folder(data, tmp_path, monkeypatch):
    copy = tmp_path / "tiny_backbone.py"
    copy.write_bytes(Path(tiny_backbone.__file__).read_bytes())
    monkeypatch.setattr(tiny_backbone, "__file__", str(copy))
    split = split_of(data, "val")
    before = fingerprint(split)
    copy.write_text(copy.read_text() + "# a change\n")

    assert fingerprint(split) != before


@pytest.mark.parametrize("limit", [None, 5])
def test_a_file_written_anew_in_the_same_size_is_another_folder(data, tmp_path, limit):
    root = shutil.copytree(data, tmp_path / "images")
    options = folder.Options(root=str(root), limit=limit)

    def now() -> str:
        return fingerprint(labelled.splits(folder, options, cache=None, say=lambda _: None)[1])

    before, same, path = now(), now(), next((root / "val").rglob("*.jpg"))
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))
    for each in (root / "val").rglob("*.jpg"):
        os.utime(each)

    assert before == same != now()


def test_other_files_under_the_same_names_have_another_folder(data, tmp_path, demo_images):
    root = shutil.copytree(data, tmp_path / "images")
    before = extract(split_of(root, "val"), tmp_path).folder
    shutil.copy(next((demo_images / "val").glob("*/00049.jpg")), next((root / "val").glob("*/*")))

    assert extract(split_of(root, "val"), tmp_path).folder != before


@pytest.mark.parametrize("harm", ["cut", "header", "about", "absent"])
def test_a_damaged_cache_is_made_anew(data, tmp_path, harm):
    split = split_of(data, "val")
    whole = extract(split, tmp_path)
    values = np.array(whole.stages["first"])
    path = whole.folder / "first.npy"
    if harm == "cut":
        os.truncate(path, path.stat().st_size - 5)
    elif harm == "header":
        path.write_bytes(b"\x00" * path.stat().st_size)
    elif harm == "about":
        (whole.folder / "features.json").write_text(json.dumps({"about": "another's"}))
    else:
        path.unlink()
    again = extract(split, tmp_path)

    np.testing.assert_array_equal(again.stages["first"], values)
    assert [each.name for each in (tmp_path / "features").iterdir()] == [whole.folder.name]


def test_undecodable_images_are_left_out_and_named(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "images")
    files = sorted((root / "train").rglob("*.jpg"))
    for position in (2, 9, 10):
        few_images.damage(files[position])
    split, said = split_of(root), []
    assert len(split.rows) == 21  # headers could not tell
    whole = extract(split_of(data), tmp_path)
    found = extract(split, tmp_path, said=said)
    kept = [position for position in range(21) if position not in (2, 9, 10)]

    assert found.stages["pool"].shape == (18, 16)
    np.testing.assert_array_equal(found.rows, kept)
    np.testing.assert_array_equal(found.labels, whole.labels[kept])
    np.testing.assert_allclose(found.stages["pool"], whole.stages["pool"][kept], rtol=1e-5)
    assert [text for text in said if "3 of 21" in text and str(files[9]) in text]
    np.testing.assert_array_equal(extract(split, tmp_path).rows, kept)  # from the cache, too


def test_values_that_are_no_number_are_an_error_that_names_stage_and_image(data, tmp_path):
    run, split = tiny(), split_of(data, "val")
    run.backbone.state_dict()["second.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"stage pool are NaN or infinite, first for .*/val/.*jpg"):
        extract(split, tmp_path, trained=run)

    assert list((tmp_path / "features").iterdir()) == []


def test_an_overflow_of_float16_says_what_to_give(data, tmp_path):
    run, split = tiny(), split_of(data, "val")
    run.backbone.state_dict()["second.bias"].add_(1e6)
    with pytest.raises(ValueError, match=r"features.dtype=float32"):
        extract(split, tmp_path, trained=run, dtype="float16")

    assert extract(split, tmp_path, trained=run).stages["pool"].max() > 1e5


def test_float16_is_the_same_rounded(data, tmp_path):
    split = split_of(data, "val")
    whole, half = extract(split, tmp_path), extract(split, tmp_path, dtype="float16")

    np.testing.assert_array_equal(half.stages["pool"], whole.stages["pool"].astype(np.float16))


def test_a_stage_that_is_not_there_is_named_with_those_that_are(data, tmp_path):
    with pytest.raises(ValueError, match="has no layer9; it has first, pool"):
        extract(split_of(data, "val"), tmp_path, stages=("pool", "layer9"))


def test_a_full_disk_is_known_before_anything_is_written(data, small_disk):
    # 21 x (15 x 15 x width + 2 x width) values of 4 bytes: 1.2 MB with 64, of which the disk has 1
    with pytest.raises(ValueError, match=r"need 1.2 MB of disk.*features.stages=\[pool\]"):
        extract(split_of(data), small_disk, trained=tiny(width=64), size=100_000)

    assert list((small_disk / "features").iterdir()) == []
    assert extract(split_of(data), small_disk, stages=("pool",)).stages["pool"].shape == (21, 16)


def test_without_keep_nothing_stays_on_the_disk(data, tmp_path):
    found = extract(split_of(data, "val"), tmp_path, keep=False)

    assert list((tmp_path / "features").iterdir()) == []
    assert np.isfinite(found.stages["first"]).all()


def test_what_a_killed_process_left_is_taken_away_and_a_living_one_s_is_not(data, tmp_path):
    for name in ("dead", "living"):
        (tmp_path / "features" / f".{name}.part").mkdir(parents=True)
        (tmp_path / "features" / f".{name}.part" / ".lock").touch()
    with (tmp_path / "features" / ".living.part" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = extract(split_of(data, "val"), tmp_path)

    left = {each.name for each in (tmp_path / "features").iterdir()}
    assert left == {".living.part", found.folder.name}


@pytest.mark.parametrize(
    ("shape", "size", "result"),
    [
        ((2, 64, 56, 56), 9000, 64 * 11 * 11),  # K19: 11 x 11 x 64 = 7744
        ((2, 2048, 7, 7), 9000, 2048 * 2 * 2),
        ((2, 512, 3, 3), 9000, 512 * 9),  # less than there is room for: as it is
        ((2, 10000, 7, 7), 9000, 10000),  # no map is smaller than 1 x 1
        ((2, 16, 3, 40), 9000, 16 * 3 * 23),
        ((2, 12000), 9000, 12000),  # a vector is taken as it is
    ],
)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_a_stage_is_pooled_to_at_most_so_many_values(shape, size, result, pool):
    stage = torch.randn(shape)
    flat = representation.pooled(stage, size, pool)

    assert flat.shape == (2, result)
    if stage.numel() // 2 == result:
        assert torch.equal(flat, stage.flatten(1))


def test_a_stage_that_is_neither_map_nor_vector_is_refused():
    with pytest.raises(ValueError, match=r"not \[2, 5, 7\]"):
        representation.pooled(torch.zeros(2, 5, 7), 100, "max")


def test_a_graph_without_pixels_is_refused():
    with pytest.raises(ValueError, match="puts out image or patches; this one: views"):
        representation.represent(tiny().backbone, {"views": torch.zeros(1)}, "global")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size \(0\) must be at least 1"),
        ({"batch": 0}, r"batch \(0\)"),
        ({"cache": ""}, r"cache \(''\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        features.Options(**options)
