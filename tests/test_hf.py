"""Saved datasets of Hugging Face: what `datasets` itself reads of them is the oracle."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from fastssl import labelled, loader
from pipelines import evaluation
from pipelines.readers import hf

COUNT = 7
KINDS = datasets.Features(
    {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "eel"])}
)


@pytest.fixture(autouse=True)
def _silent() -> None:
    datasets.disable_progress_bars()


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 10 + number), (30 * number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def rows(count: int = COUNT) -> dict[str, list[Any]]:
    images = [{"path": None, "bytes": jpeg(number)} for number in range(count)]
    return {"picture": images, "kind": [number % 3 for number in range(count)]}


def save(to: Path, columns: dict[str, list[Any]] | None = None, features: Any = KINDS) -> Path:
    columns = rows() if columns is None else columns
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(to, num_shards=2)
    return to


def listed(root: Path, cache: Path | None = None, **options: Any) -> tuple[hf.Samples, list[str]]:
    lines: list[str] = []
    given = hf.Options(root=str(root), **options)
    return hf.list_samples(given, cache=cache, say=lines.append), lines


def error(root: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"^data\.\w+: ") as caught:
        listed(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels_of(samples: hf.Samples) -> list[int]:
    assert samples.labels is not None
    return samples.labels.tolist()


def bytes_of(samples: hf.Samples) -> list[bytes]:
    content = samples.content(np.arange(len(samples)))
    return [each if isinstance(each, bytes) else each.tobytes() for each in content]


def oracle(root: Path, column: str = "picture") -> list[bytes]:
    """What `datasets` gives as bytes."""
    read = datasets.load_from_disk(str(root))
    assert isinstance(read, datasets.Dataset)
    read = read.cast_column(column, datasets.Image(decode=False))
    return [each["bytes"] for each in read[column]]


def test_rows_labels_and_sizes_are_those_that_datasets_reads(tmp_path):
    root = save(tmp_path / "set")
    samples, said = listed(root)

    assert len(list(root.glob("data-*.arrow"))) == 2
    assert bytes_of(samples) == oracle(root) == [jpeg(number) for number in range(COUNT)]
    assert (samples.classes, labels_of(samples)) == (("cat", "dog", "eel"), [0, 1, 2, 0, 1, 2, 0])
    assert samples.height.tolist() == [10 + number for number in range(COUNT)]
    assert samples.width.tolist() == [20 + number for number in range(COUNT)]
    assert samples.path(3) == f"{root}/3"
    assert said == []


def test_images_lie_in_the_mapped_files_and_are_not_copied(tmp_path):
    root = save(tmp_path / "set")
    samples, _ = listed(root)
    places = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(root) in line
    ]
    for each in samples.content(np.arange(COUNT)):
        assert isinstance(each, np.ndarray)
        address = each.__array_interface__["data"][0]

        assert any(begin <= address and address + each.nbytes <= end for begin, end in places)
        assert not each.flags.owndata


def test_an_indices_mapping_is_honoured(tmp_path):
    """As old versions of `datasets` wrote it; save_to_disk now applies it."""
    root = save(tmp_path / "set")
    order = [5, 0, 0, 6, 2]
    table = pyarrow.table({"indices": pyarrow.array(order, pyarrow.uint64())})
    with pyarrow.ipc.new_stream(root / "indices.arrow", table.schema) as stream:
        stream.write_table(table)
    state = json.loads((root / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (root / "state.json").write_text(json.dumps(state))
    samples, _ = listed(root)

    assert bytes_of(samples) == [jpeg(number) for number in order]
    assert labels_of(samples) == [2, 0, 0, 0, 2]
    assert samples.height.tolist() == [15, 10, 10, 16, 12]


def test_what_select_and_shuffle_save_is_read_in_their_order(tmp_path):
    whole = datasets.Dataset.from_dict(rows(), features=KINDS)
    whole.shuffle(seed=3).select([4, 1, 2]).save_to_disk(tmp_path / "set")
    samples, _ = listed(tmp_path / "set")

    assert bytes_of(samples) == oracle(tmp_path / "set")
    assert len(samples) == 3


def batches(samples: hf.Samples, said: list[str]) -> loader.Loader:
    return loader.Loader(
        hf,
        samples,
        evaluation,
        evaluation.Options(resize=36, crop=32),
        lambda step: samples.usable[np.arange(3) % len(samples.usable)],
        batch=3,
        seed=0,
        device=torch.device("cpu"),
        loading=loader.Options(threads=1),
        say=said.append,
    )


def test_images_of_which_there_is_only_a_path_are_read_from_their_files(tmp_path):
    files = [tmp_path / f"{number}.jpg" for number in range(4)]
    for number, file in enumerate(files):
        file.write_bytes(jpeg(number))
    images: list[dict[str, Any]] = [{"path": str(file), "bytes": None} for file in files]
    images[2]["path"] = "../2.jpg"  # relative to the dataset
    images[1] = {"path": "elsewhere.jpg", "bytes": jpeg(9)}
    arrow = datasets.Dataset.from_dict({"picture": images, "kind": [0, 1, 2, 0]}, features=KINDS)
    root = save(tmp_path / "set")
    # save_to_disk would put the files' bytes into the dataset; older versions did not.
    for each in root.glob("*.arrow"):
        each.unlink()
    table = arrow.data.table
    with pyarrow.ipc.new_stream(root / "data.arrow", table.schema) as stream:
        stream.write_table(table)
    (root / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    files[3].unlink()
    samples, lines = listed(root, tmp_path / "cache")
    again, _ = listed(root, tmp_path / "cache")
    said: list[str] = []
    given = batches(samples, said)
    first = next(given)
    files[0].unlink()
    taken = [next(given) for _ in range(6)]
    given.close()

    assert samples.height.tolist() == again.height.tolist() == [10, 19, 12, 0]
    assert samples.bad == again.bad == {3: "cannot be read: No such file or directory"}
    assert len(lines) == 1
    assert first["index"].tolist() == [0, 1, 2]
    assert taken[-1]["index"].tolist() == [1, 1, 2]
    assert [f"{root}/0" in line for line in said] == [True]


def test_images_that_are_missing_or_none_are_told_and_keep_their_rows(tmp_path):
    columns = rows()
    columns["picture"][2] = None
    columns["picture"][4] = {"path": None, "bytes": b"<html>"}
    root = save(tmp_path / "set", columns)
    samples, said = listed(root)

    assert samples.bad == {2: "no image", 4: "HTML page, not an image: a download that failed?"}
    assert samples.usable.tolist() == [0, 1, 3, 5, 6]
    assert len(said) == 1
    assert said[0].startswith("data: skipping 2 of 7 images: row 2 (no image), row 4 (HTML")
    assert error(root, bad="error").endswith("leave them out with data.bad=skip")


def test_labels_may_be_text_or_numbers_or_none(tmp_path):
    columns = rows(4) | {"word": ["b", "a", "b", "c"], "number": [10, 9, 10, 9]}
    features = datasets.Features(
        {**KINDS, "word": datasets.Value("string"), "number": datasets.Value("int32")}
    )
    columns["kind"] = [0, -1, 2, 0]
    root = save(tmp_path / "set", columns, features)
    unlabelled, said = listed(root)
    words, _ = listed(root, label_column="word")
    numbers, _ = listed(root, label_column="number")

    assert unlabelled.labels is None
    assert said == [
        f"data: 1 of 4 images in {root} have no label (kind): the labels of the others are not used"
        " (the first without one: row 1)"
    ]
    assert (words.classes, labels_of(words)) == (("a", "b", "c"), [1, 0, 1, 2])
    assert (numbers.classes, labels_of(numbers)) == (("9", "10"), [1, 0, 1, 0])
    assert error(root, label_column="picture").startswith("data.label_column: column picture of")


def test_a_column_that_only_looks_like_labels_is_left_out_and_told(tmp_path):
    columns = {"picture": rows(2)["picture"]}
    picture = {"picture": KINDS["picture"]}
    halves, flags = (datasets.Value(kind) for kind in ("float32", "bool"))
    root = save(
        *(tmp_path / "a", columns | {"label": [0.5, 1.5]}),
        datasets.Features({**picture, "label": halves}),
    )
    samples, said = listed(root)
    flagged, _ = listed(
        save(
            *(tmp_path / "b", columns | {"label": [True, False]}),
            datasets.Features({**picture, "label": flags}),
        )
    )

    assert samples.labels is None
    assert [line for line in said if "column label of" in line and "holds float" in line]
    assert error(root, label_column="label").startswith("data.label_column: column label of")
    assert (flagged.classes, labels_of(flagged)) == (("0", "1"), [1, 0])


def test_of_several_columns_one_has_to_be_named(tmp_path):
    kinds = datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features(
        {"a": datasets.Image(), "b": datasets.Image(), "fine": kinds, "coarse": kinds}
    )
    images = [{"path": None, "bytes": jpeg(number)} for number in range(4)]
    columns = {"a": images[:2], "b": images[2:], "fine": [0, 1], "coarse": [1, 0]}
    root = save(tmp_path / "set", columns, features)
    samples, said = listed(root, image_column="b")
    fine, _ = listed(root, image_column="a", label_column="fine")

    assert error(root) == (
        f"data.root: {root} has several columns of images (a, b): give data.image_column"
    )
    assert bytes_of(samples) == [jpeg(2), jpeg(3)]
    assert samples.labels is None
    assert ["fine, coarse" in line for line in said] == [True]
    assert labels_of(fine) == [0, 1]
    assert "has no column 'c' (it has: a, b, fine, coarse)" in error(root, image_column="c")
    assert "holds int64, and no images" in error(root, image_column="fine")


def test_headers_are_read_once_for_as_long_as_the_files_are_the_same(tmp_path, monkeypatch):
    root, cache = save(tmp_path / "set"), tmp_path / "cache"
    seen: list[int] = []
    whole = hf.headers.dimensions_of

    def count(content: memoryview) -> tuple[int, int]:
        seen.append(len(content))
        return whole(content)

    monkeypatch.setattr(hf.headers, "dimensions_of", count)
    first, _ = listed(root, cache)
    second, _ = listed(root, cache)
    of_two = len(seen)
    file = sorted(root.glob("*.arrow"))[0]
    os.utime(file, ns=(0, 0))
    third, _ = listed(root, cache)

    assert of_two == COUNT
    assert len(seen) == 2 * COUNT
    assert first.height.tolist() == second.height.tolist() == third.height.tolist()
    assert first.fingerprint == third.fingerprint
    assert first.written == second.written != third.written


def test_what_is_no_image_is_looked_at_once_too(tmp_path, monkeypatch):
    columns = rows()
    columns["picture"][2] = {"path": None, "bytes": b"<html>"}
    root, cache = save(tmp_path / "set", columns), tmp_path / "cache"
    first, said = listed(root, cache)
    monkeypatch.setattr(hf.headers, "dimensions_of", None)
    second, again = listed(root, cache)

    assert first.bad == second.bad == {2: "HTML page, not an image: a download that failed?"}
    assert said == again


def test_damaged_and_missing_files_are_named_in_a_line(tmp_path):
    root = save(tmp_path / "set")
    arrow = sorted(root.glob("*.arrow"))[1]
    content = arrow.read_bytes()
    for cut in (0, 3, 100, len(content) // 2):
        arrow.write_bytes(content[:cut])
        assert str(arrow) in error(root)
    arrow.unlink()
    assert f"cannot read {arrow}: " in error(root)
    for name in ("state.json", "dataset_info.json"):
        broken = tmp_path / name
        shutil.copytree(save(tmp_path / f"{name}.set"), broken)
        (broken / name).write_text("{")
        assert error(broken).startswith(f"data.root: {broken}/{name} is damaged: ")


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes_of_an_arrow_file_crash_nothing(seed, tmp_path):
    root = save(tmp_path / "set", rows(3))
    dice = np.random.default_rng(seed)
    for file in root.glob("*.arrow"):
        content = bytearray(file.read_bytes())
        for place in dice.integers(0, len(content), 4):
            content[place] ^= 1 << int(dice.integers(8))
        file.write_bytes(content)
    said, samples = "", None
    try:
        samples, _ = listed(root)
    except ValueError as found:
        said = str(found)

    assert "\n" not in said
    assert said or (samples is not None and len(bytes_of(samples)) == len(samples))


@pytest.mark.parametrize("name", ["../data.arrow", "/etc/passwd", "..", ""])
def test_files_elsewhere_are_not_opened(name, tmp_path):
    root = save(tmp_path / "set")
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))

    assert "state.json is damaged (_data_files" in error(root)


def test_roots_that_are_no_saved_split_are_named_with_what_to_do(tmp_path):
    whole = datasets.Dataset.from_dict(rows(), features=KINDS)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "both")
    (tmp_path / "empty").mkdir()

    assert error(tmp_path / "both") == (
        f"data.root: {tmp_path}/both holds several splits (train, test): give one, such as"
        f" data.root={tmp_path}/both/train"
    )
    assert "save_to_disk(FOLDER)" in error(tmp_path / "empty")
    assert error(tmp_path / "no") == f"data.root: there is no folder {tmp_path}/no, only {tmp_path}"
    assert "is a file: give the folder" in error(tmp_path / "both" / "dataset_dict.json")


@pytest.mark.parametrize("second", ["validation", "test"])
def test_the_splits_of_a_dataset_are_those_of_an_evaluation(second, tmp_path):
    train = datasets.Dataset.from_dict(rows(), features=KINDS)
    val = datasets.Dataset.from_dict(rows(3), features=KINDS)
    datasets.DatasetDict({"train": train, second: val}).save_to_disk(tmp_path / "both")
    options = hf.Options(root=str(tmp_path / "both"), limit=None)
    one, other, classes = labelled.splits(hf, options, cache=None, say=lambda _: None)

    assert classes == ("cat", "dog", "eel")
    assert (len(one.rows), len(other.rows)) == (COUNT, 3)
    assert other.samples.root == f"{tmp_path}/both/{second}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "root must name the folder of a dataset"),
        ({"root": "a", "bad": "x"}, "bad ('x') must be 'skip' or 'error'"),
        ({"root": "a", "max_pixels": 0}, "max_pixels (0) must be at least 1"),
        ({"root": "a", "limit": 0}, "limit (0) must be at least 1, or null for all"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hf.Options(**options)


def test_without_pyarrow_what_to_install_is_named(tmp_path, monkeypatch):
    root = save(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert error(root).endswith("not installed: pip install -e '.[hf]'")
