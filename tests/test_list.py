"""Lists of images: every way to write one, what is told of it, and what the next start knows."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastssl import labelled, loader
from pipelines import evaluation
from pipelines.readers import entries as entries_module
from pipelines.readers import kept, object_requests, object_store, scan, seen
from pipelines.readers import list as list_reader


def jpeg(height: int = 4, width: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (height % 256, width % 256, 0)).save(file, "JPEG")
    return file.getvalue()


def write(root: Path, *names: str, content: bytes | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg() if content is None else content)


def listed(path: Path, cache: Path | None = None, **options) -> tuple[list_reader.Samples, list]:
    """The listing, and the lines that were said."""
    lines = []
    made = list_reader.Options(root=str(path), **options)
    return list_reader.list_samples(made, cache=cache, say=lines.append), lines


def error(path: Path, **options) -> str:
    with pytest.raises(ValueError, match=r"^data\.\w+") as caught:
        listed(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def places(samples: list_reader.Samples) -> list:
    return [samples.path(row) for row in range(len(samples))]


def labels_of(samples: list_reader.Samples) -> list:
    assert samples.labels is not None
    return samples.labels.tolist()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images, and a folder for lists of them."""
    write(tmp_path / "lists" / "in", "1.jpg", "2.jpg", "3.jpg")
    return tmp_path / "lists"


# How a list is written


def test_a_line_is_a_path_and_its_place_the_row_whatever_the_line_ends(root):
    (root / "l.txt").write_bytes(b"\xef\xbb\xbfin/3.jpg\r\n\r\n  \nin/1.jpg\nin/2.jpg")
    samples, said = listed(root / "l.txt")

    assert places(samples) == [f"{root}/in/{k}.jpg" for k in (3, 1, 2)]
    assert samples.labels is None
    assert samples.classes == ()
    assert said == []


def test_entries_are_absolute_or_relative_to_the_list_or_to_the_base(root, tmp_path):
    write(tmp_path / "other", "in/1.jpg")
    (root / "l.txt").write_text(f"in/1.jpg\n{root}/in/2.jpg\n")
    here, _ = listed(root / "l.txt")
    there, _ = listed(root / "l.txt", base=str(tmp_path / "other"))

    assert places(here) == [f"{root}/in/1.jpg", f"{root}/in/2.jpg"]
    assert places(there) == [f"{tmp_path}/other/in/1.jpg", f"{root}/in/2.jpg"]
    assert error(root / "l.txt", base=str(tmp_path / "no")) == (
        f"data.base: there is no folder {tmp_path}/no"
    )


def test_any_bytes_that_name_a_file_survive_and_are_shown_on_one_line(root):
    odd = [b"a\xff, b.jpg", "\u00e9t\u00e9 \u2028.jpg".encode(), b"# no comment.jpg", b"a\rb.jpg"]
    for name in odd:
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(jpeg())
    (root / "l.txt").write_bytes(b"\n".join([*odd, b"bad\xff.jpg"]))
    samples, said = listed(root / "l.txt")

    assert [os.path.exists(samples.path(row)) for row in range(5)] == [True] * 4 + [False]
    assert len(said) == 1
    assert r"'bad\udcff.jpg' (cannot be read: No such file or directory)" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_columns_are_found_by_their_names_or_named(root, suffix):
    columns = {"n": ["x", "y", "z"], "image": ["in/1.jpg", "in/2.jpg", "in/3.jpg"]}
    columns |= {"class": ["b", "a", "b"], "other": ["in/3.jpg", "in/3.jpg", "in/1.jpg"]}
    path = root / f"l.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    else:
        mark = "," if suffix == "csv" else "\t"
        rows = [columns.keys(), *zip(*columns.values(), strict=True)]
        path.write_text("".join(mark.join(row) + "\n" for row in rows))
    found, _ = listed(path)
    named, _ = listed(path, path_column="other", label_column="n")

    assert places(found) == [f"{root}/in/{k}.jpg" for k in (1, 2, 3)]
    assert (found.classes, labels_of(found)) == (("a", "b"), [1, 0, 1])
    assert places(named) == [f"{root}/in/{k}.jpg" for k in (3, 3, 1)]
    assert named.classes == ("x", "y", "z")
    assert "has no column 'nobody'" in error(path, path_column="nobody")
    assert "n, image, class, other" in error(path, path_column="nobody")
    assert "has no column 'nobody'" in error(path, label_column="nobody")


def test_a_quoted_path_may_hold_what_separates_others(root):
    write(root, 'a, "b"\n.jpg')
    (root / "l.csv").write_text('path,label\n"a, ""b""\n.jpg",x\nin/1.jpg,y\n')
    samples, _ = listed(root / "l.csv")

    assert samples.path(0) == f'{root}/a, "b"\n.jpg'
    assert samples.usable.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        (["-1", "3", "07"], ("-1", "3", "07"), [0, 1, 2]),
        (["01", "2", "1 "], ("1", "2"), [0, 1, 0]),
        ([" a", "b", "a "], ("a", "b"), [0, 1, 0]),
        (["10", "9", "x"], ("10", "9", "x"), [0, 1, 2]),
        (["b c", "B", "a"], ("B", "a", "b c"), [2, 0, 1]),
    ],
)
def test_classes_are_sorted_by_value_where_all_are_numbers(root, labels, classes, numbers):
    lines = [f"in/{k}.jpg\t{label}\n" for k, label in enumerate(labels, 1)]
    (root / "l.txt").write_text("".join(lines))
    samples, _ = listed(root / "l.txt")

    assert samples.classes == classes
    assert labels_of(samples) == numbers


@pytest.mark.parametrize("kind", [pyarrow.int8(), pyarrow.int64(), pyarrow.string()])
def test_parquet_takes_paths_and_labels_of_several_types(root, kind):
    paths = pyarrow.array(["in/1.jpg", "in/2.jpg", "in/1.jpg"]).dictionary_encode()
    labels = pyarrow.array([10, 9, 10]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), root / "l.parquet")
    samples, _ = listed(root / "l.parquet")

    assert samples.path(1) == f"{root}/in/2.jpg"
    assert (samples.classes, labels_of(samples)) == (("9", "10"), [1, 0, 1])


def test_labels_that_some_lack_are_not_used_and_that_is_said(root):
    (root / "l.txt").write_text("in/1.jpg\ta\nin/2.jpg\nin/3.jpg\tb\n")
    samples, said = listed(root / "l.txt")

    assert samples.labels is None
    assert said == [
        f"data: 1 of 3 lines of {root}/l.txt have no label: the labels of the others are not used"
        " (the first without one: in/2.jpg)"
    ]


def test_labels_of_one_value_are_one_class_and_that_is_said(root):
    (root / "l.txt").write_text("in/1.jpg\t01\nin/2.jpg\t1\n")

    assert listed(root / "l.txt")[1] == [
        "data: the labels 1 and 01 are the same number, and one class"
    ]


def test_a_header_may_be_in_capitals(root):
    (root / "l.csv").write_text("Path, Label\nin/1.jpg,x\n")
    samples, _ = listed(root / "l.csv")

    assert (places(samples), samples.classes) == ([f"{root}/in/1.jpg"], ("x",))


@pytest.mark.parametrize("labels", [[0.5, 1.5], [[1], [2]], [None, None]])
def test_a_column_that_only_looks_like_labels_is_left_out_and_told(root, labels):
    table = pyarrow.table({"path": ["in/1.jpg", "in/2.jpg"], "label": labels})
    pyarrow.parquet.write_table(table, root / "l.parquet")
    samples, said = listed(root / "l.parquet")

    assert samples.labels is None
    assert "column label is of " in said[0]
    assert "it is not used, and data.label_column names another" in said[0]


def test_labels_may_be_true_and_false(root):
    table = pyarrow.table({"path": ["in/1.jpg", "in/2.jpg"], "label": [True, False]})
    pyarrow.parquet.write_table(table, root / "l.parquet")
    samples, _ = listed(root / "l.parquet")

    assert (samples.classes, labels_of(samples)) == (("0", "1"), [1, 0])


def test_two_columns_of_one_name_are_refused(root):
    column = pyarrow.array(["in/1.jpg"])
    table = pyarrow.Table.from_arrays([column, column], names=["path", "path"])
    pyarrow.parquet.write_table(table, root / "l.parquet")

    assert "has several columns called 'path': rename" in error(root / "l.parquet")


def test_sizes_that_a_parquet_has_are_taken_of_what_is_not_here(root):
    table = {
        "path": ["s3://b/1.jpg", "in/2.jpg", "s3://b/3.jpg", "s3://b/4.jpg"],
        "height": pyarrow.array([30, 31, None, 2**40]),
        "width": [40, 41, 42, 43],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), root / "l.parquet")
    samples, _ = listed(root / "l.parquet")

    assert samples.height.tolist() == [30, 4, 0, 0]
    assert samples.width.tolist() == [40, 6, 42, 43]
    assert samples.usable.tolist() == [0, 1, 2, 3]
    assert samples.is_remote is not None
    assert samples.is_remote.tolist() == [True, False, True, True]


def test_a_base_in_an_object_store_makes_urls_of_relative_entries_alone(root):
    (root / "l.txt").write_text(f"a/1.jpg\n{root}/in/2.jpg\ns3://other/3.jpg\n")
    samples, _ = listed(root / "l.txt", base="s3://bucket/pictures")

    assert places(samples) == [
        *("s3://bucket/pictures/a/1.jpg", f"{root}/in/2.jpg", "s3://other/3.jpg")
    ]
    assert samples.is_remote is not None
    assert samples.is_remote.tolist() == [True, False, True]
    assert samples.height.tolist() == [0, 4, 0]


def test_what_names_no_object_is_found_at_listing(root):
    write(root, "in/a/1.jpg")
    lines = [*("./in/1.jpg", "in//1.jpg", "in/a/../1.jpg", "in/\x7f.jpg", "in/\udcff.jpg", "in/")]
    lines += ["s3://", "s3://b", "s3://b/", "s3:///k", "s3://b/./k", "s3://b/a//k", "s3://b/k.jpg"]
    lines += ["S3://b/k.jpg", "file:///k.jpg", "in/..1/.../%2f~ \u00e9.jpg"]
    (root / "l.txt").write_bytes(os.fsencode("\n".join(lines)))
    remote, said = listed(root / "l.txt", base="s3://b/p")
    here, _ = listed(root / "l.txt")

    assert remote.usable.tolist() == [0, 12, 15]
    assert remote.path(0) == "s3://b/p/in/1.jpg"
    assert remote.path(15) == "s3://b/p/in/..1/.../%2f~ \u00e9.jpg"
    assert here.usable.tolist() == [0, 1, 2, 12]
    assert "in//1.jpg (names no object: s3://bucket/key is wanted" in said[0]
    assert remote.bad[14] == "only paths, without file://, and s3:// urls are read"


NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: (
        not set(name) & set(b"\0\r\n\t\"',") and name.strip() and name[:3] != b"\xef\xbb\xbf"
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from([b"a", b"b b", b"7", b"\xff"])), min_size=1))
def test_text_csv_and_tsv_read_the_same_from_whatever_names(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("names")
    (folder / "l.txt").write_bytes(b"".join(b"%s\t%s\n" % each for each in entries))
    for suffix, mark in (("csv", b","), ("tsv", b"\t")):
        lines = [b"path%slabel\n" % mark, *(b"%s%s%s\n" % (a, mark, b) for a, b in entries)]
        (folder / f"l.{suffix}").write_bytes(b"".join(lines))
    read = [
        entries_module.read(
            str(folder / f"l.{suffix}"),
            path_column=None,
            label_column=None,
            clock=scan.Clock(lambda _: None),
        )
        for suffix in ("txt", "csv", "tsv")
    ]

    for each in read:
        assert each.labels is not None
        assert [each.names[row] for row in range(len(each))] == [name for name, _ in entries]
        assert [os.fsencode(each.classes[k]) for k in each.labels] == [x for _, x in entries]


# What is wrong, in a line


def test_images_that_are_missing_or_none_are_told_and_keep_their_rows(root):
    write(root, "in/none.jpg", content=b"<html>")
    os.mkfifo(root / "in" / "pipe.jpg")
    lines = ["in/1.jpg", "in/gone.jpg", "in/none.jpg", "in/pipe.jpg", "in", "http://a/b.jpg"]
    (root / "l.txt").write_text("\n".join(lines))
    samples, said = listed(root / "l.txt")

    assert samples.usable.tolist() == [0]
    assert samples.bad == {
        1: "cannot be read: No such file or directory",
        2: "HTML page, not an image: a download that failed?",
        3: "no regular file",
        4: "a folder, not an image",
        5: "only paths, without file://, and s3:// urls are read",
    }
    assert len(said) == 1
    assert said[0].startswith("data: skipping 5 of 6 entries: in/gone.jpg (cannot be read: No such")
    assert error(root / "l.txt", bad="error").endswith(
        "take them out, or leave them out with data.bad=skip"
    )


def test_entries_that_repeat_earlier_ones_are_told_and_stay_images(root, tmp_path):
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\nin/1.jpg\nin/1.jpg\n")
    line = (
        f"data: 2 of 4 lines of {root}/l.txt repeat an earlier one, and count as images of their"
        " own: in/1.jpg, in/1.jpg"
    )
    samples, said = listed(root / "l.txt", tmp_path / "cache")
    _, again = listed(root / "l.txt", tmp_path / "cache")

    assert samples.usable.tolist() == [0, 1, 2, 3]
    assert said == again == [line]


def test_where_no_image_is_found_the_message_says_from_where_they_are_looked_for(root):
    (root / "l.txt").write_text("1.jpg 0\n2.jpg 1\n")

    assert error(root / "l.txt") == (
        f"data.root: none of the 2 images that {root}/l.txt lists can be used: 1.jpg 0 (cannot be"
        " read: No such file or directory), 2.jpg 1 (cannot be read: No such file or directory);"
        f" entries are relative to {root}/ (data.base says another place), and a label stands"
        " behind a tab"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"\n \n", "lists no images: it has no line that is not blank"),
        ("l.txt", b"in/1.jpg\ta\tb\n", "line 1: 3 fields, and a line is a path, or a path, a tab"),
        ("l.txt", b"in/1.jpg\n\tcat\n", "l.txt, line 2: there is no path"),
        ("l.txt", b"in/1.jpg\nin/\0.jpg\n", "line 2: a path can't hold a zero byte: is this text?"),
        ("l.csv", b"", "has no column of paths (path, file"),
        ("l.csv", b"in/1.jpg,3\n", "(its first line, or schema, names: in/1.jpg, 3)"),
        ("l.csv", b"in/1.jpg,3\n", "or the line that names the columns, such as path,label"),
        ("l.csv", b"path,label\na\n", "l.csv, line 2: 1 fields, and the first line names 2"),
        ("l.csv", b"path,label\n,b\n", "l.csv, line 2: there is no path"),
        ("l.csv", b'path\n"a\n', "l.csv, line 2: unexpected end of data"),
        ("l.parquet", b"PAR1 and more", "as Parquet: "),
        ("l.list", b"in/1.jpg\n", "its name must end in .txt, .csv, .tsv or .parquet"),
    ],
)
def test_a_list_that_is_none_is_refused_with_the_line(root, name, content, message):
    (root / name).write_bytes(content)

    assert message in error(root / name)


def test_columns_of_other_types_are_refused(root):
    pyarrow.parquet.write_table(pyarrow.table({"path": [1, 2]}), root / "n.parquet")
    table = pyarrow.table({"path": ["in/1.jpg"], "label": [0.5]})
    pyarrow.parquet.write_table(table, root / "f.parquet")
    gaps = pyarrow.table({"path": ["in/1.jpg", None]})
    pyarrow.parquet.write_table(gaps, root / "g.parquet")

    assert "column path is of int64, and paths are text" in error(root / "n.parquet")
    assert "column label is of double, and labels are text or" in error(
        root / "f.parquet", label_column="label"
    )
    assert "row 2: there is no path" in error(root / "g.parquet")


def test_roots_that_are_no_lists_are_named_with_what_to_do(root):
    assert error(root / "a" / "b.txt") == (
        f"data.root: there is no list {root}/a/b.txt, only {root}"
    )
    assert "data.use=pipelines.readers.folder" in error(root / "in")
    with pytest.raises(ValueError, match=r"copy the list s3://b/l.txt to this machine"):
        list_reader.list_samples(list_reader.Options(root="s3://b/l.txt"), cache=None, say=print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "root must name a list of images"),
        ({"root": "S3://b/l.txt"}, "root (S3://b/l.txt): of urls only s3://bucket/prefix is read"),
        ({"root": "a", "base": "https://b"}, "base (https://b): of urls only s3://bucket/prefix"),
        ({"root": "a", "base": ""}, "base ('') must name a folder, or be null for the list's own"),
        ({"root": "a", "listing": "x"}, "listing ('x') must be 'check' or 'trust'"),
        ({"root": "a", "bad": "x"}, "bad ('x') must be 'skip' or 'error'"),
        ({"root": "a", "retries": -1}, "retries (-1) must be at least 0"),
        ({"root": "a", "requests": 0}, "requests (0) must be in 1 ... 1024"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        list_reader.Options(**options)


def test_how_often_and_how_long_an_object_store_is_asked_is_as_told():
    asked = {"retries": 3, "timeout_s": 2.0, "requests": 4}

    assert vars(list_reader.Options(root="a", **asked).access()) == asked


def test_columns_are_for_tables(root):
    (root / "l.txt").write_text("in/1.jpg\n")

    assert error(root / "l.txt", label_column="x").startswith(
        "data.label_column ('x') is for CSV, TSV and Parquet"
    )


def test_without_pyarrow_a_parquet_names_what_to_install(root, monkeypatch):
    (root / "l.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert error(root / "l.parquet").endswith("not installed: pip install -e '.[hf]'")


# What the next start knows


def spoil(path: Path) -> None:
    """Change a file and nothing that the listing could tell it by."""
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_next_start_reads_the_headers_of_new_and_changed_files_alone(root, tmp_path):
    cache = tmp_path / "cache"
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\nin/3.jpg\n")
    listed(root / "l.txt", cache)
    spoil(root / "in" / "1.jpg")
    write(root, "in/2.jpg", content=jpeg(9, 9))
    write(root, "in/4.jpg", content=jpeg(8, 8))
    (root / "in" / "3.jpg").unlink()
    checked, _ = listed(root / "l.txt", cache)
    (root / "l.txt").write_text("in/4.jpg\nin/2.jpg\nin/1.jpg\nin/3.jpg\n")
    longer, _ = listed(root / "l.txt", cache)
    without, _ = listed(root / "l.txt")

    assert checked.height.tolist() == [4, 9, 0]
    assert list_of_bad(checked) == [2]
    assert longer.height.tolist() == [8, 9, 4, 0]  # by name, wherever it now stands
    assert list_of_bad(without) == [2, 3]


def test_the_headers_of_bad_files_are_read_once_too(root, tmp_path, monkeypatch):
    read: list = []
    whole = seen.headers.dimensions

    def dimensions(path: bytes) -> tuple[int, int]:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(seen.headers, "dimensions", dimensions)
    write(root, "in/2.jpg", content=b"<html>")
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\nin/gone.jpg\n")
    first, said = listed(root / "l.txt", tmp_path / "cache")
    again, too = listed(root / "l.txt", tmp_path / "cache")
    of_both = len(read)
    monkeypatch.setattr(seen, "reasons_made_by", lambda: "another version")
    other, _ = listed(root / "l.txt", tmp_path / "cache")
    write(root, "in/2.jpg")
    write(root, "in/gone.jpg")
    mended, _ = listed(root / "l.txt", tmp_path / "cache")

    assert of_both == 2
    assert len(read) == 5
    assert (first.bad, said) == (again.bad, too)
    assert other.bad == first.bad
    assert list(first.bad) == [1, 2]
    assert mended.bad == {}


def list_of_bad(samples: list_reader.Samples) -> list:
    return sorted(samples.bad)


def test_a_trusted_listing_looks_at_no_file_that_was_found_good(root, tmp_path):
    cache = tmp_path / "cache"
    write(root, "in/3.jpg", content=b"")
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\nin/3.jpg\n")
    listed(root / "l.txt", cache, listing="trust")
    (root / "in" / "1.jpg").unlink()
    write(root, "in/3.jpg")
    trusted, _ = listed(root / "l.txt", cache, listing="trust")
    checked, _ = listed(root / "l.txt", cache, listing="check")

    assert trusted.usable.tolist() == [0, 1, 2]
    assert checked.usable.tolist() == [1, 2]


def test_what_is_kept_is_mapped_and_writing_to_it_changes_no_file(root, tmp_path):
    (root / "l.txt").write_text("in/1.jpg\ta\nin/2.jpg\tb\n")
    for _ in range(2):
        samples, _ = listed(root / "l.txt", tmp_path / "cache")
        mapped = Path("/proc/self/maps").read_text()
        assert samples.labels is not None
        samples.labels[:] = 7
        torch.from_numpy(samples.labels)  # would warn of memory that can't be written

        assert str(tmp_path / "cache" / "lists") in mapped
    assert labels_of(listed(root / "l.txt", tmp_path / "cache")[0]) == [0, 1]


def test_damage_anywhere_in_the_cache_is_said_and_mended(root, tmp_path):
    cache = tmp_path / "cache"
    (root / "l.txt").write_text("in/1.jpg\ta\nin/2.jpg\tb\n")
    whole, _ = listed(root / "l.txt", cache)
    (path,) = (cache / "lists").iterdir()
    content = path.read_bytes()
    flipped = [
        content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1 :]
        for where in range(0, len(content), 41)
    ]
    for damaged in [b"", content[:31], content[:-1], content + b"\0", *flipped]:
        path.write_bytes(damaged)
        samples, said = listed(root / "l.txt", cache)

        assert [line for line in said if f"{path} is damaged" in line]
        assert samples.fingerprint == whole.fingerprint
        assert path.read_bytes() == content


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "text", "z" * 60]),
        st.tuples(st.sampled_from(["u1", "<i4", "<i8", "<f8"]), st.integers(0, 300)),
    ),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
def test_kept_arrays_come_back_as_they_were(tmp_path_factory, shapes, note):
    path = tmp_path_factory.mktemp("kept") / "x.arrays"
    arrays = {name: np.arange(count).astype(kind) for name, (kind, count) in shapes.items()}
    said = []
    kept.save(path, arrays, note, said.append)
    back = kept.load(path, said.append)

    assert said == []
    assert back is not None
    assert back[1] == note
    assert back[0].keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[0][name].dtype == array.dtype
        assert np.array_equal(back[0][name], array)


def test_a_full_disk_costs_the_next_start_its_knowledge_and_nothing_else(root, small_disk):
    (small_disk / "fill").write_bytes(b"x" * 1_000_000)
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\n" * 3000)
    samples, said = listed(root / "l.txt", small_disk)

    assert len(samples.usable) == 6000
    assert [line for line in said if "cannot write" in line and "No space left" in line]


def test_an_interrupted_scan_goes_on_where_it_was(root, tmp_path, monkeypatch):
    names = [f"in/{k:04}.jpg" for k in range(600)]
    write(root, *names)
    (root / "l.txt").write_text("\n".join(names))
    paths: list = []
    whole = seen.headers.dimensions

    def breaks(path: bytes) -> tuple[int, int]:
        paths.append(path)
        if len(paths) == 400:
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(seen.headers, "dimensions", breaks)
    with pytest.raises(KeyboardInterrupt):
        listed(root / "l.txt", tmp_path / "cache")
    first = len(paths)
    samples, _ = listed(root / "l.txt", tmp_path / "cache")

    assert samples.usable.tolist() == [*range(600)]
    assert len(paths) - first < 600


MEASURE = """
import sys
from pathlib import Path
from pipelines.readers import list
options = list.Options(root=sys.argv[1], base="s3://bucket/pictures")
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(("Private", "Shared"))) * 1024
list.list_samples(options, cache=Path(sys.argv[2]), say=lambda _: None)
import gc; gc.collect()
before = private()
samples = list.list_samples(options, cache=Path(sys.argv[2]), say=lambda _: None)
print((private() - before) / len(samples))
"""


def test_300_000_entries_take_less_than_200_bytes_each_when_they_are_known(tmp_path, environ):
    with open(tmp_path / "l.txt", "w") as file:
        for row in range(300_000):
            file.write(f"train/n{row % 1000:08}/n{row % 1000:08}_{row}.JPEG\tn{row % 1000:08}\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "l.txt"), str(tmp_path / "cache")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)

    assert 0 < float(done.stdout) < 200 - 16  # the order of an epoch: two numbers


# While it is read


def batches(samples: list_reader.Samples, said: list, batch: int = 3) -> loader.Loader:
    return loader.Loader(
        list_reader,
        samples,
        evaluation,
        evaluation.Options(resize=36, crop=32),
        lambda step: np.arange(batch) % len(samples),
        batch=batch,
        seed=0,
        device=torch.device("cpu"),
        loading=loader.Options(threads=1),
        say=said.append,
    )


def test_a_file_that_is_deleted_while_training_is_skipped(root):
    (root / "l.txt").write_text("in/1.jpg\nin/2.jpg\nin/3.jpg\n")
    said: list = []
    samples, _ = listed(root / "l.txt")
    given = batches(samples, said)
    next(given)
    (root / "in" / "2.jpg").unlink()
    taken = [next(given) for _ in range(6)]
    given.close()

    assert list_of_skipped(given) == [1]
    assert taken[-1]["index"].tolist() == [0, 2, 2]
    assert len(said) == 1
    assert f"{root}/in/2.jpg" in said[0]


def test_objects_that_are_missing_no_image_or_too_large_are_skipped_and_told(root, monkeypatch):
    objects = {f"s3://b/{k}.jpg": jpeg(4, 6 + k) for k in range(4)}
    objects["s3://b/5.jpg"] = jpeg(90, 100)  # of 9,000 pixels
    objects["s3://b/6.jpg"] = b"<html>"

    def fetch(url: str, *_: object) -> np.ndarray:
        if url not in objects:
            raise object_requests.Missing(f"{url}: there is no such object")
        return np.frombuffer(objects[url], np.uint8)

    monkeypatch.setattr(object_store, "fetch", fetch)
    (root / "l.txt").write_text("".join(f"s3://b/{k}.jpg\n" for k in range(7)))
    said: list = []
    samples, _ = listed(root / "l.txt", max_pixels=8_999)
    given = batches(samples, said, 7)
    taken = next(given)
    given.close()

    assert list_of_skipped(given) == [4, 5, 6]
    assert set(taken["index"].tolist()) == {0, 1, 2, 3}
    for row, why in ((4, "no such object"), (5, "100 x 90 pixels, over data.max_"), (6, "HTML")):
        assert [line for line in said if f"s3://b/{row}.jpg" in line and why in line], said


def test_an_object_store_that_cannot_be_reached_ends_the_run_and_blames_no_image(root, monkeypatch):
    def fetch(url: str, *_: object) -> np.ndarray:
        raise object_requests.Unreachable(f"{url}: the store answered 503")

    monkeypatch.setattr(object_store, "fetch", fetch)
    (root / "l.txt").write_text("s3://b/1.jpg\nin/1.jpg\n")
    given = batches(listed(root / "l.txt")[0], [])
    with pytest.raises(object_requests.Unreachable, match=r"s3://b/1.jpg: the store answered 503"):
        next(given)
    given.close()

    assert given.skipped == {}


def list_of_skipped(given: loader.Loader) -> list:
    return sorted(given.skipped)


# The splits of an evaluation


def test_lists_called_train_and_val_are_the_splits_of_their_folder(root):
    (root / "train.csv").write_text("path,label\nin/1.jpg,a\nin/2.jpg,b\n")
    (root / "val.csv").write_text("path,label\nin/3.jpg,b\n")
    options = list_reader.Options(root=str(root))
    train, val, classes = labelled.splits(list_reader, options, cache=None, say=lambda _: None)

    assert classes == ("a", "b")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [1])
    with pytest.raises(ValueError, match=r"train\.csv is one list: give the folder that holds two"):
        labelled.splits(
            list_reader, list_reader.Options(root=str(root / "train.csv")), cache=None, say=print
        )
    (root / "val.csv").write_text("path\nin/3.jpg\n")
    with pytest.raises(ValueError, match=r"val\.csv has no class folders: labels are needed"):
        labelled.splits(list_reader, options, cache=None, say=print)
    (root / "val.csv").unlink()
    with pytest.raises(ValueError, match=r"there is no folder .*/val: .* train\.csv and val\.csv"):
        labelled.splits(list_reader, options, cache=None, say=print)
