"""Quarantine files: any name survives them, and a damaged one is told by its line."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.readers import quarantine

NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name)


def silent(line: str) -> None:
    raise AssertionError(line)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(NAMES, st.text(min_size=1), max_size=8))
def test_names_of_any_bytes_survive_the_file(tmp_path_factory, bad: dict[bytes, str]):
    path = tmp_path_factory.mktemp("quarantine") / "quarantine.jsonl"
    path.write_text("".join(quarantine.line(*each) for each in bad.items()), encoding="ascii")

    listed = quarantine.read(path)

    assert {os.fsencode(name) for name in listed} == set(bad)
    assert all(reason == " ".join(reason.split()) for reason in listed.values())


@settings(deadline=None)
@given(st.lists(NAMES, unique=True, max_size=20), st.sets(st.integers(0, 19)), st.booleans())
def test_exactly_the_listed_images_are_found_in_a_listing(names, chosen, in_order):
    names = sorted(names)
    chosen = sorted(row for row in chosen if row < len(names))
    listed = {os.fsdecode(names[row]): f"reason {row}" for row in chosen}

    found = quarantine.rows(listed, len(names), names.__getitem__, silent, in_order=in_order)

    assert found == {row: f"quarantined: reason {row}" for row in chosen}
    assert list(found) == chosen


@pytest.mark.parametrize("in_order", [False, True])
def test_an_image_that_is_listed_twice_is_left_out_twice(in_order):
    names = [b"a", b"b", b"b", b"c"]

    found = quarantine.rows({"b": "odd"}, 4, names.__getitem__, silent, in_order=in_order)

    assert set(found) == {1, 2}


@pytest.mark.parametrize("in_order", [False, True])
def test_names_that_the_listing_lacks_are_counted_on_a_single_line(in_order):
    said: list[str] = []
    names = [b"a", b"b"]

    listed = {"two\nlines": "x", "a": "x", "zz": "x"}
    found = quarantine.rows(listed, 2, names.__getitem__, said.append, in_order=in_order)

    assert list(found) == [0]
    assert said == [
        "data: 2 of 3 names in data.quarantine are not in the listing, such as 'two\\nlines'"
    ]


def test_the_first_line_of_a_name_counts_and_empty_lines_are_none(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"name": "a", "reason": "1"}\n\n{"name": "a", "reason": "2", "more": 0}\n')

    assert quarantine.read(path) == {"a": "1"}


@pytest.mark.parametrize(
    "damaged",
    [
        b"no json",
        b'["a", "b"]',
        b'{"name": "a"}',
        b'{"name": 1, "reason": "b"}',
        b'{"name": "", "reason": "b"}',
        b'{"name": "\\ud800", "reason": "b"}',  # half of a pair of UTF-16
        b'{"name": "\xff", "reason": "b"}',
        b'{"name": "a", "rea',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_told_by_its_number(tmp_path: Path, damaged: bytes):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"name": "a", "reason": "b"}\n' + damaged + b"\n")

    with pytest.raises(
        ValueError, match=rf"^data\.quarantine: {re.escape(str(path))}, line 2: "
    ) as e:
        quarantine.read(path)

    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300 + len(str(path))


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^data\.quarantine: cannot read .*: No such file"):
        quarantine.read(tmp_path / "none.jsonl")


def test_of_a_folder_that_check_wrote_the_file_of_the_split_is_read(tmp_path: Path):
    for name in ("train", "val"):
        text = quarantine.line(name.encode(), "grey")
        (tmp_path / f"quarantine-{name}.jsonl").write_text(text)

    assert set(quarantine.read(tmp_path, "/data/train/")) == {"train"}
    assert set(quarantine.read(tmp_path, "s3://bucket/val")) == {"val"}
    assert set(quarantine.read(tmp_path, "lists/val.csv")) == {"val"}
    with pytest.raises(ValueError, match=r"holds neither quarantine-test\.jsonl nor quarantine\.j"):
        quarantine.read(tmp_path, "/data/test")
    (tmp_path / "quarantine.jsonl").write_text(quarantine.line(b"all", "grey"))
    assert set(quarantine.read(tmp_path, "/data/photos")) == {"all"}
