"""Few labels: which images of each class a reader takes, the same ones whatever it reads from."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl import data
from pipelines.readers import folder, subset, tar

PINNED = ["ant/05.jpg", "bee/09.jpg", "cat/01.jpg"]
SIZES = {"ant": 25, "bee": 10, "cat": 3}  # images of each class


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("subset") / "images"
    for name, count in SIZES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((12, 12, 3), 5 * number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.jpg")
    return root


@pytest.fixture(scope="module")
def store(images, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("store") / "tar"
    assert data.main(["pack", str(images), str(target), "--workers", "1"]) == 0
    return target


def listed(reader, root: Path, **options):
    return reader.list_samples(reader.Options(root=str(root), **options), cache=None, say=print)


def names(samples) -> list[str]:
    return [os.path.relpath(samples.path(row), samples.root) for row in range(len(samples))]


def counts(samples) -> dict[str, int]:
    return dict(Counter(samples.classes[label] for label in samples.labels))


def test_a_fraction_takes_its_part_of_every_class_and_one_image_at_least(images):
    assert counts(listed(folder, images, fraction=0.3)) == {"ant": 8, "bee": 3, "cat": 1}
    assert counts(listed(folder, images, fraction=0.01)) == {"ant": 1, "bee": 1, "cat": 1}
    assert counts(listed(folder, images, fraction=1.0)) == SIZES


def test_k_of_every_class_are_k_of_every_class(images):
    samples = listed(folder, images, per_class=3)

    assert counts(samples) == {"ant": 3, "bee": 3, "cat": 3}
    assert samples.usable.tolist() == list(range(9))  # rows are counted among them
    assert [name.split("/")[0] for name in names(samples)] == sorted(["ant", "bee", "cat"] * 3)


def test_a_folder_and_the_store_packed_from_it_give_the_same_files(images, store):
    for options in ({"fraction": 0.3}, {"per_class": 2, "subset_seed": 5}):
        here, there = listed(folder, images, **options), listed(tar, store, **options)

        assert names(here) == names(there)
        assert here.labels.tolist() == there.labels.tolist()
        assert here.classes == there.classes


def test_the_same_seed_gives_the_same_files_on_every_machine_and_another_others(images):
    # BLAKE2b of the names with the seed as salt: pinned, since a change would move every result
    assert names(listed(folder, images, per_class=1)) == PINNED
    seeds = [names(listed(folder, images, per_class=3, subset_seed=seed)) for seed in range(4)]

    assert len({tuple(each) for each in seeds}) == 4


def test_another_place_gives_the_same_files(images, tmp_path):
    (tmp_path / "elsewhere").symlink_to(images)

    assert names(listed(folder, tmp_path / "elsewhere", fraction=0.3)) == names(
        listed(folder, images, fraction=0.3)
    )


def test_a_small_subset_lies_within_a_greater_one(images):
    few, many = (set(names(listed(folder, images, fraction=each))) for each in (0.1, 0.4))

    assert few < many


def test_every_image_has_the_same_chance():
    taken: Counter[int] = Counter()
    for seed in range(400):
        rows = subset.choose(
            np.arange(20),
            np.zeros(20, np.int64),
            ("one",),
            lambda row: f"one/{row}.jpg".encode(),
            fraction=None,
            per_class=5,
            seed=seed,
            root="",
        )
        assert rows is not None
        taken.update(rows.tolist())

    assert all(60 < taken[row] < 140 for row in range(20))  # 100 +- 8.7: within 4.6 deviations


def test_bad_files_are_not_taken(images, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for file in sorted((images / name).iterdir())[:4]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "broken.jpg").write_bytes(b"no image")
    samples = listed(folder, tmp_path, per_class=4)

    assert counts(samples) == {"ant": 4, "bee": 4}
    assert not samples.bad
    assert listed(folder, tmp_path, fraction=0.5).fingerprint != samples.fingerprint


@pytest.mark.parametrize("reader", [folder, tar])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction \(0.0\) must be above 0 and at most 1"),
        ({"fraction": 1.1}, r"fraction \(1.1\) must be above 0 and at most 1"),
        ({"per_class": 0}, r"per_class \(0\) must be at least 1"),
        ({"per_class": 1, "subset_seed": -1}, r"subset_seed \(-1\) must be in 0 \.\.\."),
        ({"subset_seed": 3}, r"subset_seed \(3\) is not read without fraction or per_class"),
        ({"fraction": 0.1, "limit": 5}, "fraction and limit each take a subset: give one"),
        ({"fraction": 0.1, "per_class": 5}, "fraction and per_class each take a subset"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(reader, options, message):
    with pytest.raises(ValueError, match=message):
        reader.Options(root="somewhere", **options)


def test_too_few_images_name_the_class(images, store):
    for reader, root in ((folder, images), (tar, store)):
        with pytest.raises(ValueError, match=r"data.per_class \(4\): class cat in .* has 3 images"):
            listed(reader, root, per_class=4)


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"per_class": 1}])
def test_a_folder_without_classes_is_refused_with_the_remedy(images, options):
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"data.{key}: .*/ant has no class folders.* data.limit"):
        listed(folder, images / "ant", **options)
