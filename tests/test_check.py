"""`python -m fastssl.data check`: what it finds, and that nothing on a disk stops it."""

import errno
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIImageType
from PIL import Image, ImageOps

from fastssl import check_image, check_report, check_scan, data, loader, worker_pool
from fastssl.check_image import DECODED, RECORD, SAME, SEEN, STRICTLY, Piece
from fastssl.check_progress import Progress
from fastssl.check_scan import Split
from fastssl.recipe_text import read_overrides
from fastssl.work_progress import WorkProgress
from pipelines.readers import folder, headers, quarantine
from tests import deadly_image
from tests.few_images import damage

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))


def encoded(
    kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (160, 120), **how
) -> bytes:
    file = io.BytesIO()
    PICTURE.convert(mode).resize(size).save(file, kind, **how)
    return file.getvalue()


def write(root: Path, contents: Mapping[Any, bytes]) -> Path:
    for name, content in contents.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(content)
    return root


def silent_damage(content: bytes) -> bytes:
    """A JPEG whose lower half is lost, with all its headers and its end."""
    scan = content.index(b"\xff\xda")
    return content[: scan + (len(content) - scan) // 2] + b"\xff\xd9"


def check(root: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Runs the command in this process; gives report.json."""
    assert data.main(["check", str(root), "--out", str(out), "--workers", "1", *arguments]) == 0
    return json.loads((out / "report.json").read_text())


def refused(capsys, *arguments: str) -> str:
    """The single line of an error."""
    assert data.main(["check", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said.removeprefix("error: ").strip()


def look(root: Path, *names: str | bytes, known=None, **how) -> check_image.Looked:
    """One piece, in this process."""
    settings: dict[str, Any] = {"decode": True, "digest": False, "most_pixels": 10**8} | how
    files = tuple(map(os.fsencode, names))
    known = np.zeros(len(files), RECORD) if known is None else known
    return check_image.look(Piece(os.fsencode(root), b"", files, known, **settings))


def written(out: Path) -> dict[str, bytes]:
    """All that a check leaves for people, by name."""
    names = ("quarantine.jsonl", "duplicates.jsonl", "report.json", "recipe.yaml")
    return {name: (out / name).read_bytes() for name in names}


# What is found


def test_the_numbers_are_those_that_pillow_gives_one_image_at_a_time(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    images: dict[str | bytes, bytes] = {
        "a/gray.jpg": encoded(mode="L"),
        "a/cmyk.jpg": encoded(mode="CMYK"),
        "a/scans.jpg": encoded(progressive=True),
        "a/lying.jpg": encoded(exif=exif.tobytes()),
        "a/wide.bmp": encoded("BMP", size=(300, 70)),
        "b/palette.png": encoded("PNG", "P"),
        "b/alpha.png": encoded("PNG", "RGBA", (33, 44)),
        "b/small.webp": encoded("WEBP", size=(20, 20)),
        "b/16.png": encoded("PNG", "I;16"),
        "b/old.tif": encoded("TIFF", "L", (50, 40)),
    }
    root = write(tmp_path / "images", images)
    found = check(root, tmp_path / "out", "--decode")["splits"]["all"]

    opened = [Image.open(io.BytesIO(content)) for content in images.values()]
    sizes = np.array([ImageOps.exif_transpose(image).size for image in opened])
    short, megapixels = sizes.min(1), sizes.prod(1) / 1e6
    assert (found["images"], found["bad"], found["files"]) == (10, 0, 10)
    assert found["formats"] == dict(Counter(image.format for image in opened))
    assert found["modes"] == dict(Counter(image.mode for image in opened))
    assert (found["progressive"], found["turned_by_exif"]) == (1, 1)
    assert found["bytes"] == sum(map(len, images.values()))
    assert found["short_side_below"]["32"] == np.count_nonzero(short < 32)
    assert found["short_side_below"]["128"] == np.count_nonzero(short < 128)
    assert found["aspect_above"] == {"2": 1, "3": 1, "4": 1}
    quantiles = found["quantiles"]
    for key, values in (("short_side", short), ("megapixels", megapixels)):
        ordered = np.sort(values)
        by_rank = [ordered[max(int(np.ceil(each * 10)) - 1, 0)] for each in quantiles["of"]]
        assert np.allclose(quantiles[key], by_rank, atol=1e-4)
    assert found["classes"]["images"] == {"a": 5, "b": 5}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, set[str], set[str]]:
    """Images, those that even their headers betray, and those that only decoding does."""
    root = tmp_path_factory.mktemp("broken") / "images"
    whole = encoded()
    bad: dict[str | bytes, bytes] = {
        "a/empty.jpg": b"",
        "a/text.jpg": b"not found",
        "a/cut.jpg": whole[:-100],
        "a/bomb.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\x01\0\0\0\x01\0\0\x08\2\0\0\0"
        + encoded("PNG")[29:],
    }
    inside = bytearray(encoded("PNG"))
    inside[inside.index(b"IDAT") + 40] ^= 0xFF
    hidden: dict[str | bytes, bytes] = {
        "b/half.jpg": silent_damage(whole),
        "b/half-gray.jpg": silent_damage(encoded(mode="L", progressive=True)),
        "b/inside.png": bytes(inside),
        "b/table.jpg": whole,
    }
    write(root, {"a/good.jpg": whole, "b/good.png": encoded("PNG"), **bad, **hidden})
    damage(root / "b" / "table.jpg")
    return root, set(map(str, bad)), set(map(str, hidden))


def test_headers_betray_some_bad_files_and_decoding_all(broken, tmp_path):
    root, bad, hidden = broken
    check(root, tmp_path / "seen")
    check(root, tmp_path / "decoded", "--decode")

    seen = quarantine.read(tmp_path / "seen" / "quarantine.jsonl")
    decoded = quarantine.read(tmp_path / "decoded" / "quarantine.jsonl")
    assert set(seen) == bad
    assert set(decoded) == bad | hidden
    assert all("\n" not in reason for reason in decoded.values())
    assert decoded["b/half.jpg"].startswith("damaged inside: Corrupt JPEG data: premature end")


def test_the_reader_takes_the_quarantine_and_the_recipe_what_is_advised(broken, tmp_path):
    root, bad, hidden = broken
    check(root, tmp_path / "out", "--decode")
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    sections = yaml.safe_load(recipe)
    told: list[str] = []
    options = folder.Options(bad="skip", **sections["data"])
    samples = folder.list_samples(options, cache=None, say=told.append)
    used = {os.path.relpath(samples.path(row), root) for row in samples.usable.tolist()}

    assert used == {"a/good.jpg", "b/good.png"}
    assert {os.path.relpath(samples.path(row), root) for row in samples.bad} == bad | hidden
    assert len(samples) == 10
    overrides = read_overrides(shlex.split(recipe.splitlines()[2])[1:], ("data", "loader"), [])
    assert {name: set(keys) for name, keys in overrides.items()} == {
        name: set(keys) for name, keys in sections.items()
    }
    assert loader.Options(**sections["loader"]).decoder_width == 160


def test_without_simplejpeg_damage_inside_a_jpeg_passes_and_that_is_said(
    broken, tmp_path, monkeypatch, capsys
):
    root, _, hidden = broken
    monkeypatch.setattr("fastssl.check_image.is_strict", lambda: False)
    monkeypatch.setattr("fastssl.check.is_strict", lambda: False)
    loosely = look(root, *sorted(hidden))
    named = {sorted(hidden)[place] for place in loosely.bad}

    assert named == {"b/inside.png", "b/table.jpg"}
    good = [place for place in range(len(hidden)) if place not in loosely.bad]
    assert (loosely.records["state"][good] == DECODED).all()
    monkeypatch.undo()
    strictly = look(root, *sorted(hidden), known=loosely.records)  # is not taken for granted
    assert len(strictly.bad) == 4


def dali(content: bytes) -> np.ndarray | None:
    """What DALI decodes on the CPU; None: it refuses."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore[reportArgumentType]
    with pipeline:
        source = fn.external_source(lambda: [np.frombuffer(content, np.uint8)])
        pipeline.set_outputs(fn.decoders.image(source, output_type=DALIImageType.RGB))
    try:
        pipeline.build()
        return np.asarray(pipeline.run()[0][0])
    except RuntimeError:
        return None


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "JPEG"},
        {"kind": "JPEG", "progressive": True},
        {"kind": "JPEG", "mode": "L"},
        {"kind": "PNG"},
        {"kind": "WEBP"},
        {"kind": "TIFF", "compression": "tiff_lzw"},
    ],
    ids=str,
)
def test_whatever_passes_dali_decodes_to_the_very_pixels_of_pillow(how, tmp_path, capfd):
    draw = random.Random(str(how))
    whole = encoded(**{"size": (48, 40), **how})
    found = Counter()
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 8))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :][: draw.choice((1, 40))]
        (tmp_path / "image").write_bytes(content)
        try:
            headers.dimensions(str(tmp_path / "image"))
        except ValueError:
            continue
        passes = not look(tmp_path / "", "image").bad
        pixels = dali(bytes(content))
        found[passes] += 1
        if passes:
            assert pixels is not None
            with Image.open(io.BytesIO(content)) as image:
                assert np.array_equal(pixels, np.asarray(image.convert("RGB")))

    assert found[True] + found[False] >= 15


# Duplicates


def test_copies_are_found_and_nothing_else(tmp_path):
    one, other = encoded(), encoded(quality=50)
    middle = bytearray(encoded("BMP", size=(100, 100)))
    middle[15_000] ^= 1  # same size, same ends
    root = write(
        tmp_path / "images",
        {
            "train/a/1.jpg": one,
            "train/a/2.jpg": one,
            "train/b/3.jpg": other,
            "train/b/4.jpg": one,
            "train/b/5.bmp": encoded("BMP", size=(100, 100)),
            "val/a/6.jpg": other,
            "val/b/7.bmp": bytes(middle),
            "val/b/8.jpg": encoded(quality=20),
        },
    )
    (root / "val" / "b" / "9.jpg").symlink_to(root / "val" / "b" / "8.jpg")
    quick = check(root, tmp_path / "quick")
    whole = check(root, tmp_path / "whole", "--decode", "--workers", "2")
    lines = (tmp_path / "quick" / "duplicates.jsonl").read_text().splitlines()

    assert [json.loads(line)["names"] for line in lines] == [
        ["train/a/1.jpg", "train/a/2.jpg", "train/b/4.jpg"],
        ["train/b/3.jpg", "val/a/6.jpg"],
        ["val/b/8.jpg", "val/b/9.jpg"],
    ]
    assert json.loads(lines[0])["classes"] == ["a", "a", "b"]
    assert json.loads(lines[0])["digest"] == hashlib.blake2b(one, digest_size=16).hexdigest()
    copied = 2 * len(one) + len(other) + len(encoded(quality=20))
    assert quick["duplicates"] == {
        **{"groups": 3, "superfluous": 4, "bytes": copied},
        **{"across": 1, "classes": 2},
    }
    assert whole["duplicates"] == quick["duplicates"]
    assert (tmp_path / "whole" / "duplicates.jsonl").read_text().splitlines() == lines
    assert set(quick["splits"]) == {"train", "val"}
    advised = yaml.safe_load((tmp_path / "quick" / "recipe.yaml").read_text())["data"]["quarantine"]
    assert quarantine.read(advised, str(root / "val")) == {}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("train", "test"), "1 images are both in train and in test"),
        (("train", "validation"), "1 images are both in train and in validation"),
        (("train", "val", "test"), "2 images are in more than one of train, val, test"),
    ],
)
def test_splits_are_those_that_evaluation_takes(tmp_path, names, told, capsys):
    one, other = encoded(), encoded(quality=50)
    root = write(tmp_path / "images", {f"{name}/{name}.jpg": one for name in names})
    write(root, {"train/a.jpg": encoded(quality=60), f"{names[1]}/a.jpg": other})
    if len(names) == 3:
        write(root, {"test/b.jpg": other, "test/bad.jpg": b"bad"})
    found = check(root, tmp_path / "out")
    said = capsys.readouterr().out
    advised = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["data"]

    assert [*found["splits"]] == [*names]
    assert told in said
    assert advised["root"] == str(root / "train")
    assert advised["quarantine"] == str(tmp_path / "out")
    for name in names:
        bad = quarantine.read(tmp_path / "out", str(root / name))
        assert len(bad) == (len(names) == 3 and name == "test")


def test_copies_in_a_split_without_classes_are_in_no_other_class(tmp_path):
    one, other = encoded(), encoded(quality=50)
    contents = {"train/a/1.jpg": one, "train/b/2.jpg": other, "test/3.jpg": one}
    root = write(tmp_path / "images", contents)
    found = check(root, tmp_path / "out")["duplicates"]

    assert (found["groups"], found["across"], found["classes"]) == (1, 1, 0)


def test_without_decoding_only_what_may_be_a_copy_is_read_as_a_whole(tmp_path):
    root = write(tmp_path / "images", {f"{k}.jpg": encoded(quality=50 + k) for k in range(8)})
    shutil.copy(root / "3.jpg", root / "copy.jpg")
    check(root, tmp_path / "out")
    with Progress(tmp_path / "out" / "progress.bin", ascii(str(root))) as progress:
        keys = {name: check_image.key_of(name) for name in (b"3.jpg", b"copy.jpg", b"4.jpg")}
        found = progress.find(np.array(list(keys.values()), np.uint64))

    assert found["digest"].any(1).tolist() == [True, True, False]


# Anything on a disk


def test_hostile_names_and_files_are_survived_and_named(tmp_path):
    whole = encoded()
    root = tmp_path / "images"
    good = [b"two\nlines.jpg", b"\xff\xfe.jpg", b"-rf.jpg", b'quote".jpg', b"$(halt) *.jpg"]
    write(root, {name: whole for name in good})
    (root / "sparse.jpg").write_bytes(whole)
    with open(root / "sparse.jpg", "r+b") as file:  # an image header before 1 TB of nothing
        file.seek(10**12)
        file.write(b"\xff\xd9")
    os.mkfifo(root / "pipe.jpg")
    (root / "nowhere.jpg").symlink_to("gone")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "endless.jpg").symlink_to("/dev/zero")
    (root / "loop").symlink_to(root)
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.getcwd()
        os.chdir(root)  # a socket's path is short
        listening.bind("socket.jpg")
        os.chdir(before)
        report = check(root, tmp_path / "out", "--decode")
    bad = quarantine.read(tmp_path / "out" / "quarantine.jsonl")

    assert set(bad) == {"sparse.jpg", "nowhere.jpg", "itself.jpg"}
    assert "1,000,000,000,002 bytes, more than" in bad["sparse.jpg"]
    assert report["splits"]["all"]["images"] == len(good)
    line = json.loads((tmp_path / "out" / "duplicates.jsonl").read_text())
    assert sorted(map(os.fsencode, line["names"])) == sorted(good)


def test_a_file_that_becomes_something_else_after_the_listing_is_bad_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "large.png").write_bytes(encoded("PNG"))
    found = look(tmp_path, "pipe.jpg", "folder.jpg", "gone.jpg", "large.png", most_pixels=19_199)

    assert found.bad == {
        0: "not a regular file",
        1: "not a regular file",
        2: "cannot be read: No such file or directory",
        3: "160 x 120 pixels, over data.max_pixels",
    }


def test_a_file_that_kills_its_decoder_is_bad_and_the_others_are_not(tmp_path):
    root = write(tmp_path / "images", {f"{k}.jpg": encoded() for k in range(6)})
    shutil.copy(root / "0.jpg", root / "3-deadly.jpg")
    samples = folder.list_samples(folder.Options(root=str(root)), cache=None, say=print)
    split = Split("", samples)
    with Progress(tmp_path / "progress", "") as progress, WorkProgress("check", 7, "images") as bar:
        check_scan.scan(
            [split],
            [samples.usable],
            progress,
            bar,
            decode=False,
            digest=False,
            most_pixels=10**8,
            workers=2,
            work=deadly_image.look,
        )

    assert split.bad == {3: "ended the process that decoded it: a crash, or memory"}
    assert os.path.basename(samples.path(3)) == "3-deadly.jpg"
    assert np.count_nonzero(split.good) == 6


@pytest.fixture
def few(tmp_path) -> Split:
    """Forty images that nothing was found of yet."""
    root = write(tmp_path / "images", {f"{k:02}.jpg": encoded() for k in range(40)})
    samples = folder.list_samples(folder.Options(root=str(root)), cache=None, say=print)
    return Split("", samples)


def scan(split: Split, progress: Path) -> None:
    with Progress(progress, "") as kept, WorkProgress("check", 40, "images") as bar:
        check_scan.scan(
            *([split], [split.samples.usable], kept, bar),
            **{"decode": True, "digest": False, "most_pixels": 10**8, "workers": 2},
        )


@pytest.mark.parametrize("sound_ones_pass", [False, True])
def test_workers_that_end_whatever_they_look_at_are_no_fault_of_the_images(
    few, sound_ones_pass, tmp_path, monkeypatch
):
    def in_order(_, pieces, workers):
        for piece in pieces:
            if not (piece.names[0] == b"sound.jpg" and sound_ones_pass):
                raise worker_pool.WorkerLost(workers, [piece])
            yield check_image.look(piece)

    monkeypatch.setattr(worker_pool, "in_order", in_order)
    said = r"17 files one .* '16\.jpg': rather memory"
    with pytest.raises(ValueError, match=said if sound_ones_pass else "end at sound ones too"):
        scan(few, tmp_path / "progress")

    assert few.bad == {}


def test_a_worker_s_own_mistake_is_no_lost_worker(few, tmp_path, monkeypatch):
    def in_order(*_):
        raise ValueError("a mistake")
        yield

    monkeypatch.setattr(worker_pool, "in_order", in_order)
    with pytest.raises(ValueError, match="a mistake"):
        scan(few, tmp_path / "progress")


def test_a_decoder_that_cannot_be_imported_is_no_fault_of_the_images(few, tmp_path, monkeypatch):
    def in_order(_, pieces, workers):
        return map(check_image.look, pieces)

    def broken(name: str):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(worker_pool, "in_order", lambda *given: (yield from in_order(*given)))
    monkeypatch.setattr(check_image.importlib, "import_module", broken)
    with pytest.raises(ValueError, match="a decoder cannot be used: simplejpeg: undefined symbol"):
        scan(few, tmp_path / "progress")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_what_cannot_be_read_for_now_is_not_bad(fault, times, tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": encoded(), "b.jpg": encoded()})
    faults = [fault] * times
    opens = os.open

    def fails(path, *how, **more):
        if os.fsencode(path).endswith(b"b.jpg") and faults:
            raise faults.pop()
        return opens(path, *how, **more)

    monkeypatch.setattr(os, "open", fails)
    found = look(tmp_path, "a.jpg", "b.jpg")

    assert found.bad == {}
    if times == 1 and isinstance(fault, OSError):
        assert found.unread == {}
    else:
        words = "not enough memory" if isinstance(fault, MemoryError) else "Input/output error"
        assert found.unread == {1: f"cannot be read: {words}"}
        assert found.records["state"].tolist() == [STRICTLY, 0]


def test_files_that_could_not_be_read_are_named_and_not_quarantined(tmp_path, monkeypatch, capsys):
    root = write(tmp_path / "images", {f"{k}.jpg": encoded() for k in range(4)})
    dimensions = headers.dimensions

    def fails(path):
        if path.endswith(b"2.jpg"):
            raise ValueError("cannot be read: Stale file handle")
        return dimensions(path)

    monkeypatch.setattr(headers, "dimensions", fails)
    command = ["check", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    code = data.main(command)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["splits"]["all"]
    said = capsys.readouterr().out
    monkeypatch.undo()

    assert code == 1
    assert "1  could not be read, such as 2.jpg (cannot be read: Stale file handle)" in said
    assert (report["images"], report["bad"], report["unread"]) == (3, 0, 1)
    assert report["unread_files"] == {"2.jpg": "cannot be read: Stale file handle"}
    assert quarantine.read(tmp_path / "out" / "quarantine.jsonl") == {}


def test_nothing_of_the_images_is_touched(broken, tmp_path):
    root, _, _ = broken

    def state() -> list[tuple[str, bytes, int]]:
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]

    before = state()
    check(root, tmp_path / "out", "--decode")

    assert state() == before


# Going on


def test_what_was_seen_is_not_looked_at_again_and_what_changed_is(tmp_path, capsys):
    root = write(tmp_path / "images", {f"{k}.jpg": encoded(quality=50 + k) for k in range(9)})
    check(root, tmp_path / "out")
    capsys.readouterr()
    (root / "4.jpg").write_bytes(silent_damage(encoded()))
    (root / "9.jpg").write_bytes(encoded())
    (root / "2.jpg").unlink()
    check(root, tmp_path / "out")
    again = capsys.readouterr().out
    check(root, tmp_path / "out", "--decode")
    decoded = capsys.readouterr().out
    check(root, tmp_path / "out", "--decode")
    once_more = capsys.readouterr().out

    assert "check: 7 images are as they were when last looked at" in again
    assert "as they were" not in decoded  # a look at the headers does not do for decoding
    assert set(quarantine.read(tmp_path / "out" / "quarantine.jsonl")) == {"4.jpg"}
    assert "check: 8 images are as they were when last looked at" in once_more  # the bad one again
    check(root, tmp_path / "fresh", "--decode")
    whole, fresh = written(tmp_path / "out"), written(tmp_path / "fresh")
    recipe, other = whole.pop("recipe.yaml"), fresh.pop("recipe.yaml")
    assert whole == fresh
    assert recipe.replace(b"/out/", b"/fresh/") == other


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_check_that_is_stopped_goes_on_and_finds_the_same(how, tmp_path, checkout, environ):
    images = write(tmp_path / "few", {f"{k}.jpg": encoded(size=(1000, 750)) for k in range(4)})
    write(images, {"damaged.jpg": silent_damage(encoded(size=(400, 300)))})
    root = tmp_path / "images"
    for copy in range(250):  # links: the same images under many names
        (root / f"{copy:03}").mkdir(parents=True)
        for file in images.iterdir():
            os.link(file, root / f"{copy:03}" / file.name)
    command = [sys.executable, "-m", "fastssl.data", "check", str(root), "--decode"]
    command += ["--workers", "1", "--out", str(tmp_path / "out")]
    environment = environ | {"FASTSSL_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(checkout)
    progress = tmp_path / "out" / "progress.bin"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        while not (progress.exists() and progress.stat().st_size > 64 * 150):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        said, _ = process.communicate()
    names = [b"%03d/%d.jpg" % (copy, k) for copy in range(250) for k in range(4)]
    keys = np.array([check_image.key_of(name) for name in names], np.uint64)
    with Progress(progress, ascii(str(root))) as known:
        found = np.count_nonzero(known.find(keys)["state"])

    assert 100 <= found < 1000
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert f"interrupted: the same command goes on from here ({tmp_path}/out)" in said
    assert not (tmp_path / "out" / "report.json").exists()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert f"check: {found:,} images are as they were when last looked at" in done.stdout
    assert len(quarantine.read(tmp_path / "out" / "quarantine.jsonl")) == 250
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["splits"]["all"]["images"] == 1000
    assert report["duplicates"]["groups"] == 1


def test_what_decoding_found_bad_stays_so_without_it_until_the_file_changes(tmp_path):
    root = write(tmp_path / "images", {"good.jpg": encoded(), "bad.jpg": silent_damage(encoded())})
    check(root, tmp_path / "out", "--decode")
    decoded = quarantine.read(tmp_path / "out" / "quarantine.jsonl")
    for _ in range(2):
        check(root, tmp_path / "out")
        assert quarantine.read(tmp_path / "out" / "quarantine.jsonl") == decoded
    (root / "bad.jpg").write_bytes(encoded())
    check(root, tmp_path / "out")

    assert set(decoded) == {"bad.jpg"}
    assert quarantine.read(tmp_path / "out" / "quarantine.jsonl") == {}


def test_what_simplejpeg_found_bad_stays_so_without_it(tmp_path, monkeypatch):
    write(tmp_path, {"bad.jpg": silent_damage(encoded())})
    known = look(tmp_path, "bad.jpg").records
    monkeypatch.setattr("fastssl.check_image.is_strict", lambda: False)

    for decode in (False, True):
        again = look(tmp_path, "bad.jpg", known=known, decode=decode)
        assert again.bad == {0: "damaged inside, as simplejpeg found, which is not installed now"}
        assert again.records["judged"][0] == STRICTLY
    assert look(tmp_path, "bad.jpg").bad == {}


def test_a_folder_of_one_data_set_is_not_written_by_the_check_of_another(tmp_path, capsys):
    contents = {"good.jpg": encoded(), "bad.jpg": silent_damage(encoded())}
    one = write(tmp_path / "a" / "train", contents)
    other = tmp_path / "b" / "train"
    shutil.copytree(one, other)
    out = tmp_path / "train-check"
    check(one, out, "--decode")
    before = written(out)
    copied = refused(capsys, str(other), "--out", str(out))
    limited = refused(capsys, str(one), "--out", str(out), "data.limit=1")

    assert copied == (
        f"{out} holds what a check of '{one}' found, and this is '{other}': give another folder"
        " with --out, or remove that one"
    )
    assert f"a check of '{one}' found, and this is '{one}', data.limit=1: give" in limited
    assert written(out) == before
    (tmp_path / "link").symlink_to(one)
    check(tmp_path / "link", out)


@pytest.mark.parametrize("name", ["\u00e9t\u00e9 \u0444\u043e\u0442\u043e", "\udcff\n"])
def test_folders_of_any_name_are_checked_to_the_end(name, tmp_path):
    root = write(tmp_path / name, {"a.jpg": encoded(), "b.jpg": b""})
    check(root, tmp_path / f"{name}-check", "--decode")
    recipe = (tmp_path / f"{name}-check" / "recipe.yaml").read_text(encoding="utf-8")

    assert len(recipe.splitlines()[0].split()) >= 6
    if name.isprintable():
        assert yaml.safe_load(recipe)["data"]["root"] == str(root)
        assert f"data.root={root}" in recipe


def test_a_store_is_told_what_looks_at_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        (tmp_path / "both" / name / "index").mkdir(parents=True)
        (tmp_path / "both" / name / "manifest.json").write_text("{}")
    store = tmp_path / "both" / "train"
    says = f"{store} is a tar store: python -m fastssl.data verify {store} --decode looks at its"

    assert says in refused(capsys, "both/train")
    assert says in refused(capsys, "both")
    assert "s3://b/x: these commands work on folders: copy it" in refused(capsys, "s3://b/x")
    assert sorted(os.listdir(tmp_path)) == ["both"]  # nothing was made


def test_records_that_a_crash_has_torn_or_zeroed_are_as_good_as_none(tmp_path):
    path = tmp_path / "progress.bin"
    records = np.zeros(50, RECORD)
    records["key"] = [check_image.key_of(b"%d" % k) for k in range(50)]
    records["size"], records["state"] = range(1000, 1050), SEEN
    with Progress(path, "") as progress:
        progress.add(records)
    content = bytearray(path.read_bytes())
    content[64 * 11 : 64 * 12] = bytes(64)  # record 10
    content[64 * 21 + 9] ^= 1  # the size of record 20
    path.write_bytes(content[: 64 * 41 + 30])  # record 40 in half, and no more
    with Progress(path, "") as progress:
        found = progress.find(records["key"])
        progress.add(records[10:11])

    kept = np.array([k for k in range(40) if k not in (10, 20)])
    assert np.flatnonzero(found["state"]).tolist() == kept.tolist()
    assert (found["size"][kept] == 1000 + kept).all()
    with Progress(path, "") as progress:
        assert progress.find(records["key"])["size"][10] == 1010


def test_the_later_record_of_a_name_counts(tmp_path):
    draw = np.random.default_rng(0)
    expected: dict[int, int] = {}
    with Progress(tmp_path / "progress", "") as progress:
        for size in range(1, 30):
            some = np.zeros(20, RECORD)
            some["key"] = draw.choice(100, 20, replace=False)
            some["size"], some["state"] = size, draw.choice([SEEN, DECODED, STRICTLY], 20)
            progress.add(some)
            expected |= {int(key): size for key in some["key"]}
        bad = np.zeros(1, RECORD)
        bad["key"], bad["state"] = 500, SAME
        progress.add(bad)
    with Progress(tmp_path / "progress", "") as progress:
        found = progress.find(np.arange(600, dtype=np.uint64))

    assert {int(key): int(found["size"][key]) for key in np.flatnonzero(found["state"])} == expected


def test_two_checks_into_the_same_folder_are_refused(broken, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with Progress(out / "progress.bin", ascii(str(broken[0]))):
        said = refused(capsys, str(broken[0]), "--out", str(out))

    assert said == (
        f"{out}/progress.bin is being written by another check: wait for it, or give --out"
    )


def fill(path: Path) -> None:
    with open(path, "wb", 0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_told_and_what_was_looked_at_is_kept(broken, small_disk, capsys):
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(1 << 19))
    out = small_disk / "out"
    check(broken[0], out)
    with pytest.raises(OSError, match="No space"):
        fill(small_disk / "more")
    (out / "report.json").unlink()
    capsys.readouterr()
    for name in os.listdir(broken[0] / "a"):
        os.utime(broken[0] / "a" / name)

    said = refused(capsys, str(broken[0]), "--out", str(out), "--decode")
    assert said.startswith("No space left on device (")
    (small_disk / "more").unlink()
    assert check(broken[0], out, "--decode")["splits"]["all"]["images"] == 2


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{images}/none"], "data.root: there is no folder {images}/none, only {images}"),
        (["{images}", "--workers", "0"], "--workers (0) must be at least 1"),
        (["{images}", "--out", "{images}/out"], "{images}/out lies in the folder of images"),
        (["{images}", "data.bad=error"], "data.bad is what this is to find out: leave it"),
        (["{images}", "data.quarantine=q"], "data.quarantine is what this is to find out"),
        (["{images}", "data.limt=3"], "did you mean 'limit'?"),
        (["{images}", "data.root=x"], "leave it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_told_in_a_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = write(tmp_path / "images", {"a.jpg": encoded()})

    found = refused(capsys, *(each.format(images=images) for each in arguments))
    assert said.format(images=images) in found


# Advice


def sized(sizes: list[tuple[int, int]], orientation: int = 1) -> Split:
    """JPEGs of these widths and heights as they are shown, of which nothing else is known."""
    width, height = (np.array(side, np.int32) for side in zip(*sizes, strict=True))

    class Samples:
        bad: dict[int, str]

        def __len__(self) -> int:
            return len(sizes)

    samples: Any = Samples()
    samples.bad, samples.width, samples.height = {}, width, height
    split = Split("", samples)
    split.records["state"], split.records["format"] = SEEN, check_image.FORMATS.index("JPEG")
    split.records["orientation"] = orientation
    return split


def test_room_is_advised_for_999_of_1000_images():
    many = [(500, 375)] * 999
    imagenet = check_report.hints(sized([(5980, 6430)]))

    assert check_report.hints(sized([*many, (9000, 9000)])) == check_report.hints(sized(many))
    assert check_report.hints(sized([*many, (900, 80), (900, 80)]))["decoder_width"] == 900
    # NVIDIA's own figures for ImageNet, up to a whole MiB
    assert imagenet["decoder_device_mib"] == -(-211_025_920 // 2**20)
    assert imagenet["decoder_host_mib"] == -(-140_544_512 // 2**20)
    # never less than DALI takes anyway, and what is coded for what lies on its side
    assert check_report.hints(sized([(64, 32)], orientation=8)) == {
        **{"decoder_width": 32, "decoder_height": 64},
        **{"decoder_device_mib": 16, "decoder_host_mib": 8},
    }
    for sizes in ([(64, 32)], [(65_000, 65_000)]):
        advised: dict[str, Any] = check_report.hints(sized(sizes))
        assert loader.Options(**advised).decoder_width == sizes[0][0]


def test_reasons_are_counted_without_the_numbers_in_them():
    bad = {
        1: "truncated JPEG: it ends at byte 1,024",
        5: "truncated JPEG: it ends at byte 7",
        9: "x",
    }

    assert check_report.reasons(bad) == {"truncated JPEG: it ends at byte N": 2, "x": 1}


def test_the_table_names_classes_of_any_bytes_on_a_line(tmp_path, capsys):
    root = write(tmp_path / "images", {b"\xff\n/1.jpg": encoded(), b"b/1.jpg": encoded("PNG")})
    check(root, tmp_path / "out")

    said = capsys.readouterr().out
    assert "2 classes of 1 (b) to 1 (b) images, median 1" in said
    assert "2 images of 0.00 GB, 0 bad" in said
