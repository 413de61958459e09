"""The listing that is kept between starts: it is found again, shared, and never out of date."""

import io
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.readers import file_status, folder, headers, quarantine, walk
from pipelines.readers.names import Names, joined


def jpeg(height: int = 4, width: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG")
    return file.getvalue()


IMAGES = [jpeg(height, 6) for height in range(1, 9)]


def write(path: Path, content: bytes = IMAGES[3]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def listed(root: Path, cache: Path | None, **options) -> tuple[folder.Samples, list[str]]:
    lines: list[str] = []
    given = folder.Options(root=str(root), **options)
    return folder.list_samples(given, cache=cache, say=lines.append), lines


def told(samples: folder.Samples) -> dict:
    """All that a listing says, to compare."""
    return {
        "names": [samples.names[row] for row in range(len(samples))],
        "classes": samples.classes,
        "labels": None if samples.labels is None else samples.labels.tolist(),
        "height": samples.height.tolist(),
        "width": samples.width.tolist(),
        "usable": samples.usable.tolist(),
        "bad": samples.bad,
        "fingerprint": samples.fingerprint,
        "written": samples.written,
    }


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are old enough to be believed as soon as they are made."""
    monkeypatch.setattr(walk, "SETTLED_NS", -(10**15))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed."""
    found: list[str] = []
    real = os.scandir

    def scandir(path: bytes):
        found.append(os.fsdecode(path))
        return real(path)

    monkeypatch.setattr(walk.os, "scandir", scandir)
    return found


def tick(folder: Path) -> None:
    """Until the clock of the folder's file system has gone on, which counts in ticks."""
    time.sleep(0.02)
    file = folder / "tick"
    file.touch()
    first = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == first:
        time.sleep(0.002)
        file.touch()


# What is listed again


def test_only_folders_in_which_something_changed_are_listed_again(
    tmp_path: Path, settled: None, scanned: list[str]
):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for name in ("a/1.jpg", "a/in/2.jpg", "b/3.jpg", "b/4.jpg", "c/5.jpg"):
        write(root / name)
    first, _ = listed(root, cache)
    scanned.clear()
    again, _ = listed(root, cache)
    nothing = list(scanned)
    tick(tmp_path)
    write(root / "a/in/0.jpg", IMAGES[6])
    (root / "b/3.jpg").rename(root / "b/6.jpg")
    changed, _ = listed(root, cache)

    assert told(again) == told(first)
    assert nothing == []
    assert scanned == [f"{root}/a/in/", f"{root}/b/"]
    assert changed.height.tolist() == [4, 7, 4, 4, 4, 4]
    assert told(changed) == told(listed(root, None)[0])


def test_a_folder_that_changed_just_before_it_was_listed_is_listed_again(
    tmp_path: Path, scanned: list[str]
):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "1.jpg")
    listed(root, cache)
    listed(root, cache)

    assert scanned == [f"{root}/", f"{root}/"]


def test_a_changed_folder_is_found_though_its_time_of_modification_was_set_back(
    tmp_path: Path, settled: None
):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "a/1.jpg")
    write(root / "a/2.jpg")
    status = (root / "a").stat()
    listed(root, cache)
    tick(tmp_path)
    (root / "a/2.jpg").rename(root / "a/3.jpg")
    os.utime(root / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed, _ = listed(root, cache)

    assert (root / "a").stat().st_mtime_ns == status.st_mtime_ns
    assert [changed.path(row)[-5:] for row in range(2)] == ["1.jpg", "3.jpg"]


def test_files_written_to_in_place_are_found_by_check_and_missed_by_trust(
    tmp_path: Path, settled: None
):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "a/1.jpg")
    write(root / "a/2.jpg")
    listed(root, cache)
    tick(tmp_path)
    (root / "a/2.jpg").write_bytes(IMAGES[7])
    trusted, _ = listed(root, cache, listing="trust")
    checked, _ = listed(root, cache)
    (root / "a/0.jpg").write_bytes(IMAGES[0])
    added, _ = listed(root, cache, listing="trust")

    assert trusted.height.tolist() == [4, 4]
    assert checked.height.tolist() == [4, 8]
    assert added.height.tolist() == [1, 4, 8]


def change(root: Path, choose: random.Random) -> str:
    """One thing that may happen in a folder of images; says what."""
    files = sorted(path for path in root.rglob("*") if path.is_file() or path.is_symlink())
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    inside, file = choose.choice(folders), choose.choice(files)
    name = choose.choice(["0", "b.c", "m", "x", "z"]) + choose.choice(["", ".jpg", ".txt"])
    image = choose.choice(IMAGES)
    what = choose.randrange(13)
    is_free = not os.path.lexists(inside / name)
    if what == 0 and is_free:
        write(inside / name, image)
    elif what == 1 and len(files) > 3:
        file.unlink()
    elif what == 2 and not file.is_symlink():
        file.rename(file.with_name(f"{choose.randrange(100)}.jpg"))
    elif what == 3 and file.is_file():
        file.write_bytes(image)  # in place
    elif what == 4 and not file.is_symlink():
        part = root / ".part"
        part.write_bytes(image)
        part.replace(file)
    elif what == 5 and is_free:
        write(inside / name / "deep" / "1.jpg", image)
    elif what == 6 and inside != root and len(folders) > 3 and not inside.is_symlink():
        shutil.rmtree(inside)
        inside.write_bytes(image)  # a file in a folder's place
    elif what == 7 and is_free:
        (inside / name).symlink_to(choose.choice(["../away", "gone", ".", "../a", str(file)]))
    elif what == 8:
        away = root.parent / "away"  # where links lead to: nothing in the root changes
        shutil.rmtree(away) if away.is_dir() else away.unlink(missing_ok=True)
        if choose.random() < 0.5:
            write(away / f"{choose.randrange(9)}.jpg", image)
        else:
            write(away, image)
    elif what == 9 and inside != root and not inside.is_symlink():
        if not (other := inside.with_name(f"f{choose.randrange(100)}")).exists():
            inside.rename(other)
    elif what == 10:
        write(inside / ".hidden", b"")
    elif what == 11 and file.is_file():
        file.write_bytes(b"no image")
    elif what == 12 and file.is_file():
        os.utime(file, ns=(0, choose.randrange(-(10**18), 10**18)))
    return f"{what} {inside.name} {file.name} {name}"


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_the_listing_is_what_it_would_be_without_what_was_kept(
    seed: int, tmp_path: Path, settled: None
):
    choose = random.Random(seed)
    root, cache = tmp_path / "place" / "root", tmp_path / "cache"
    for name in ("1.jpg", "a/1.jpg", "a/2.jpg", "a/b/1.jpg", "c/d/e/1.jpg", "c/2.jpg"):
        write(root / name)
    (root / "c" / "away").symlink_to("../../away")
    happened = []
    for _ in range(40):
        tick(tmp_path)
        happened += [change(root, choose) for _ in range(choose.randrange(1, 4))]
        write(root / "keep.jpg") if not (root / "keep.jpg").exists() else None
        kept, lines = listed(root, cache)
        fresh, others = listed(root, None)

        assert told(kept) == told(fresh), happened
        assert lines == others, happened


# What is kept


def test_what_is_kept_is_mapped_so_that_processes_share_it(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for name in ("a/1.jpg", "b/2.jpg"):
        write(root / name)
    write(root / "b/bad.jpg", b"")
    first, _ = listed(root, cache)
    again, _ = listed(root, cache)
    (file,) = (cache / "listings").iterdir()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        [int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == str(file)
    ]

    for samples in (first, again):
        arrays = {
            **{"text": samples.names.text, "ends": samples.names.ends, "labels": samples.labels},
            **{"height": samples.height, "width": samples.width, "usable": samples.usable},
        }
        for name, each in arrays.items():
            assert each is not None
            where = each.ctypes.data
            assert any(begin <= where < end for begin, end in ranges), name


def test_what_this_process_writes_into_a_listing_stays_its_own(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "a/1.jpg")
    first, _ = listed(root, cache)
    first.height[0] = 99
    assert first.labels is not None
    first.labels[0] = 99
    again, lines = listed(root, cache)

    assert again.height.tolist() == [4]
    assert again.labels is not None
    assert again.labels.tolist() == [0]
    assert lines == []


def test_nothing_is_written_where_nothing_changed_bad_files_or_not(tmp_path: Path, settled: None):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "a/1.jpg")
    write(root / "a/bad.jpg", b"")
    (root / "a" / "up").symlink_to("..")
    listed(root, cache)
    (file,) = (cache / "listings").iterdir()
    before = file.stat()
    again, _ = listed(root, cache)

    assert again.bad == {1: "empty file"}
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_interrupted_scan_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for number in range(600):
        write(root / f"{number:03}.jpg", IMAGES[number % 8])
    real, read = headers.dimensions, []

    def dimensions(path: bytes) -> tuple[int, int]:
        if len(read) == 300:
            raise KeyboardInterrupt
        read.append(path)
        return real(path)

    monkeypatch.setattr(headers, "dimensions", dimensions)
    with pytest.raises(KeyboardInterrupt):
        listed(root, cache)
    first = set(read)
    read.clear()
    monkeypatch.setattr(headers, "dimensions", lambda path: (read.append(path), real(path))[1])
    samples, _ = listed(root, cache)

    assert len(first) == 300
    assert set(read).isdisjoint(first)
    assert samples.height.tolist() == [1 + number % 8 for number in range(600)]


CHILD = """
import sys
from pathlib import Path
from pipelines.readers import file_status, folder, walk
file_status.FEW, walk.SETTLED_NS = 0, -(10**15)
options = folder.Options(root=sys.argv[1])
samples = folder.list_samples(options, cache=Path(sys.argv[2]), say=print)
print(samples.height.tolist())
"""


def test_of_processes_started_together_one_asks_for_every_file_and_later_ones_ask_again(
    tmp_path: Path, settled: None
):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root / "1.jpg")
    write(root / "2.jpg")

    def another() -> str:
        command = [sys.executable, "-c", CHILD, str(root), str(cache)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    before = another()
    tick(tmp_path)
    (root / "2.jpg").write_bytes(IMAGES[7])
    here, _ = listed(root, cache)  # started before the other one asked
    later = another()
    now, _ = listed(root, cache)

    assert before == "[4, 4]\n"
    assert here.height.tolist() == [4, 4]
    assert later == "[4, 8]\n"
    assert now.height.tolist() == [4, 8]
    (told_file,) = (cache / "listings").glob("*.checked.json")
    for number, damaged in enumerate(("", "{}", "[]", "null", '{"boot": 1')):
        told_file.write_text(damaged)
        (root / "2.jpg").write_bytes(IMAGES[number])
        os.utime(root / "2.jpg", ns=(0, number))

        assert listed(root, cache)[0].height.tolist() == [4, number + 1]


# Quarantine


def test_quarantined_files_keep_their_rows_and_are_no_reason_to_refuse(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg"):
        write(root / name)
    write(root / "b/4.jpg", b"")
    file = tmp_path / "quarantine.jsonl"
    lines = {b"a/1.jpg": "grey half", b"b/4.jpg": "empty", b"gone.jpg": "was bad"}
    file.write_text("".join(quarantine.line(name, why) for name, why in lines.items()))
    plain, _ = listed(root, cache)
    samples, said = listed(root, cache, quarantine=str(file), bad="error")
    after, _ = listed(root, cache)

    assert samples.bad == {0: "quarantined: grey half", 3: "quarantined: empty"}
    assert samples.usable.tolist() == [1, 2]
    assert samples.classes == ("b",)
    assert samples.labels is not None
    assert samples.labels.tolist() == [-1, 0, 0, 0]
    assert samples.fingerprint == plain.fingerprint == after.fingerprint
    assert told(plain) == told(after)
    assert said[-1] == f"data: leaving out 2 of 4 files, quarantined by {file}"
    assert "1 of 3 names in data.quarantine are not in the listing" in said[0]
    with pytest.raises(ValueError, match=r"1 of 4 files .* cannot be used: b/4\.jpg \(empty file"):
        listed(root, cache, bad="error")


def test_a_quarantine_that_leaves_nothing_is_refused(tmp_path: Path):
    write(tmp_path / "root/1.jpg")
    file = tmp_path / "q.jsonl"
    file.write_text(quarantine.line(b"1.jpg", "x"))
    with pytest.raises(ValueError, match=r"data\.quarantine=.*q\.jsonl names all of 1 files"):
        listed(tmp_path / "root", None, quarantine=str(file))
    with pytest.raises(ValueError, match="cannot read"):
        listed(tmp_path / "root", None, quarantine=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listing": "believe"}, r"listing \('believe'\) must be 'check' or 'trust'"),
        ({"quarantine": ""}, "quarantine must name a file"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        folder.Options(root="a", **options)


# Status


def test_compiled_code_and_python_tell_the_same_of_every_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number, seconds in enumerate([-(10**9), -1, 0, 1, 2**33]):
        write(tmp_path / f"t{number}", b"x" * number)
        os.utime(tmp_path / f"t{number}", ns=(0, seconds * 10**9 + 123_456_789))
    with open(tmp_path / "large", "wb") as file:
        file.truncate(5_000_000_000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "in").mkdir(parents=True)
    write(tmp_path / "folder" / "in" / "1.jpg")
    (tmp_path / "link").symlink_to("large")
    (tmp_path / "broken").symlink_to("gone")
    (tmp_path / "self").symlink_to("self")
    (Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff\n")))).write_bytes(b"odd")
    names = joined(
        [
            *(b"t0", b"t1", b"t2", b"t3", b"t4", b"large", b"pipe", b"folder", b"folder/in/1.jpg"),
            *(b"link", b"broken", b"self", b"\xff\n", b"gone", b"n" * 255, b"n" * 256, b""),
            *(b"a/" * 3000, b"folder/in/1.jpg/x"),
        ]
    )
    rows = np.array([5, 8, 0, 17])
    root = os.fsencode(tmp_path)

    for some in (None, rows):
        (python,) = file_status.each_block(root, names, some)
        with monkeypatch.context() as always:
            always.setattr(file_status, "FEW", 0)
            (compiled,) = file_status.each_block(root, names, some)

        for one, other in zip(python, compiled, strict=True):
            np.testing.assert_array_equal(one, other)
    assert python[1].tolist() == [5_000_000_000, len(IMAGES[3]), 0, 0]
    assert python[3].tolist() == [True, True, True, False]


def test_many_files_come_block_by_block_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for size in range(50):
        write(tmp_path / f"{size:02}", b"x" * size)
    monkeypatch.setattr(file_status, "_BLOCK", 7)
    monkeypatch.setattr(file_status, "_BLOCKS", 3)
    monkeypatch.setattr(file_status, "FEW", 0)
    names = joined([f"{size:02}".encode() for size in range(50)])
    blocks = list(file_status.each_block(os.fsencode(tmp_path), names, None))

    assert [len(rows) for rows, *_ in blocks] == [7] * 7 + [1]
    assert np.concatenate([sizes for _, sizes, *_ in blocks]).tolist() == list(range(50))


# Names


def test_names_are_the_bytes_they_were_made_of():
    given = [b"a", b"", b"\xff/\n", b"long" * 99]
    names = joined(given)

    assert [names[row] for row in range(len(names))] == given
    some = names.only(np.array([3, 0, 0, 1]))
    assert isinstance(some, Names)
    assert [some[row] for row in range(4)] == [given[3], given[0], given[0], given[1]]
    assert len(names.only(np.array([], np.int64))) == 0
