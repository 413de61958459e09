"""The two labelled splits: one numbering of classes, and folders that can't be used are named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastssl import labelled
from pipelines.readers import folder, quarantine
from tests import few_images


@pytest.fixture
def data(tmp_path, demo_images) -> Path:
    return few_images.copy(demo_images, tmp_path / "data")


def splits(root: Path, said: list[str] | None = None, **options):
    say = [] if said is None else said
    return labelled.splits(
        folder, folder.Options(root=str(root), **options), cache=None, say=say.append
    )


def test_labels_of_both_count_in_train_s_classes_which_val_may_lack_some_of(data):
    said = []
    train, val, classes = splits(data, said)
    folders = [Path(val.samples.path(int(row))).parent.name for row in val.rows]

    assert len(classes) == 3
    assert train.classes == val.classes == classes
    assert np.bincount(train.labels).tolist() == [7, 7, 7]
    assert [classes[label] for label in val.labels] == folders
    assert (train.name, val.name) == ("train", "val")
    assert [text for text in said if f"no image of 1 of 3 classes: {classes[0]}" in text]


def test_images_that_are_none_are_in_no_split(data):
    first = sorted((data / "train").rglob("*.jpg"))[0]
    first.write_bytes(b"none")
    train, _, _ = splits(data)

    assert train.rows.tolist() == list(range(1, 21))
    assert np.bincount(train.labels).tolist() == [6, 7, 7]


def test_test_serves_where_there_is_no_val(data):
    (data / "val").rename(data / "test")
    _, val, _ = splits(data)

    assert val.name == "val"
    assert val.samples.root.endswith("test")
    assert len(val.rows) == 9


def test_a_subset_of_the_labels_is_one_of_train_and_val_stays_whole(data):
    train, val, _ = splits(data, per_class=2)

    assert np.bincount(train.labels).tolist() == [2, 2, 2]
    assert len(val.rows) == 9


def test_a_limit_too_is_of_train_alone(data):
    train, val, _ = splits(data, limit=8)

    assert (len(train.rows), len(val.rows)) == (8, 9)


def test_a_quarantine_is_of_train_and_a_folder_of_them_of_both(data, tmp_path):
    for name in ("train", "val"):
        first = sorted((data / name).rglob("*.jpg"))[0]
        line = quarantine.line(str(first.relative_to(data / name)).encode(), "grey")
        (tmp_path / f"quarantine-{name}.jsonl").write_text(line)
    both = folder.Options(root=str(data), quarantine=str(tmp_path))
    kept = labelled.whole(both, str(data))  # as a probe asks for it

    for file, rows in (("", (20, 8)), ("quarantine-train.jsonl", (20, 9))):
        train, val, _ = splits(data, quarantine=str(tmp_path / file))
        assert (len(train.rows), len(val.rows)) == rows
    assert kept.quarantine == str(tmp_path)
    (tmp_path / "quarantine-val.jsonl").unlink()
    assert labelled.whole(both, str(data)).quarantine is None


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_folder_of_quarantines_holds_whatever_val_is_called(data, tmp_path, name):
    (data / "val").rename(data / name)
    first = sorted((data / name).rglob("*.jpg"))[0]
    line = quarantine.line(str(first.relative_to(data / name)).encode(), "grey")
    (tmp_path / f"quarantine-{name}.jsonl").write_text(line)
    (tmp_path / "quarantine-train.jsonl").write_text("")
    both = folder.Options(root=str(data), quarantine=str(tmp_path))
    train, val, _ = splits(data, quarantine=str(tmp_path))

    assert (len(train.rows), len(val.rows)) == (21, 8)
    assert labelled.whole(both, str(data)).quarantine == str(tmp_path)


def test_no_labels_are_refused(data):
    shutil.copy(next((data / "val").rglob("*.jpg")), data / "val")
    with pytest.raises(ValueError, match="val has no class folders: labels are needed"):
        splits(data)


def test_one_class_is_refused(data):
    for each in sorted((data / "train").iterdir())[:2]:
        shutil.rmtree(each)
    with pytest.raises(ValueError, match=r"train has one class only \(.*: there is nothing to"):
        splits(data)


def test_classes_that_train_lacks_are_named(data):
    (data / "val" / "stranger").mkdir()
    shutil.copy(next((data / "train").rglob("*.jpg")), data / "val" / "stranger")
    with pytest.raises(ValueError, match="lacks: stranger"):
        splits(data)


def test_a_folder_without_the_two_is_refused_and_the_one_above_is_offered(data, tmp_path):
    with pytest.raises(ValueError, match=f"must hold train/<class>/.*did you mean {data}"):
        splits(data / "train")
    shutil.rmtree(data / "val")
    with pytest.raises(ValueError, match=f"there is no folder {data}/val"):
        splits(data)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        splits(tmp_path / "nowhere")
