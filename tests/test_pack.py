"""`python -m fastssl.data pack`: the same bytes each time, taken up again, read back, bad named."""

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import wds2idx
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image

from fastssl import data, pack_image, pack_part, tar_file, worker_pool
from fastssl.pack_image import Form
from pipelines.readers import headers, tar
from tests.packing import encoded, files, folder_of_classes, names, pack, picture, refused

RUN = [sys.executable, "-m", "fastssl.data"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(demo_images: Path, tmp_path: Path) -> Path:
    """Thirty of the built-in images, in ten classes."""
    root = tmp_path / "images"
    for file in sorted((demo_images / "train").glob("*/0000[0-2].jpg")):
        target = root / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    assert len(list(root.glob("*/*.jpg"))) == 30
    return root


def decoded_by_dali(path: Path) -> np.ndarray:
    """As training from the folder sees a file."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        content = fn.external_source(
            lambda: [np.frombuffer(path.read_bytes(), np.uint8)], dtype=DALIDataType.UINT8, ndim=1
        )
        pipeline.set_outputs(fn.decoders.image(content, output_type=DALIImageType.RGB))
    return np.asarray(pipeline.run()[0].as_tensor())[0]


# What is written


@pytest.mark.parametrize(
    "options", [[], ["--short-side", "90"], ["--form", "raw", "--short-side", "90"]]
)
def test_the_same_source_gives_the_same_bytes_whatever_the_workers(options, images, tmp_path):
    pack(images, tmp_path / "one", *options)
    pack(images, tmp_path / "three", *options, "--workers", "3")

    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert sorted(tmp_path.glob("*.part")) == []


def test_images_shrink_to_the_short_side_and_are_never_enlarged(tmp_path):
    for height, width in ((200, 301), (400, 200), (100, 101), (60, 500)):
        (tmp_path / "images").mkdir(exist_ok=True)
        picture(height, width).save(tmp_path / "images" / f"{height}x{width}.png")

    samples = pack(tmp_path / "images", tmp_path / "store", "--form", "raw", "--short-side", "100")
    sizes = zip(samples.height.tolist(), samples.width.tolist(), strict=True)
    assert dict(zip(names(samples), sizes, strict=True)) == {
        "100x101.png": (100, 101),
        "200x301.png": (100, 150),
        "400x200.png": (200, 100),
        "60x500.png": (60, 500),
    }
    assert samples.classes == ()
    assert samples.labels is None


def test_every_mode_and_orientation_becomes_what_dali_decodes(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    image = picture(48, 64)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image.save(root / f"turned{orientation}.jpg", exif=exif, quality=95)
        image.save(root / f"turned{orientation}.webp", exif=exif, lossless=True)
        image.save(root / f"turned{orientation}.tif", exif=exif)
    whole = exif.tobytes()
    image.save(root / "damaged_exif.jpg", exif=whole[: len(whole) - 9])
    image.save(root / "no_exif.jpg", exif=b"Exif\0\0MM" + bytes(range(90)))
    image.convert("L").save(root / "gray.jpg")
    image.convert("L").save(root / "gray.png")
    image.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("LA").save(root / "gray_alpha.png")
    image.quantize(64).save(root / "palette.png", transparency=b"\0\x80")
    image.convert("1").save(root / "two.png")
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(root / "deep.png")
    image.save(root / "lossless.webp", lossless=True)
    image.save(root / "image.bmp")
    image.save(root / "image.tif")
    image.save(root / "progressive.jpg", progressive=True)

    samples = pack(root, tmp_path / "store", "--form", "raw", "--short-side", "full")
    assert len(samples) == len(list(root.iterdir())) == 38
    for name, pixels in zip(names(samples), samples.content(samples.usable), strict=True):
        expected = decoded_by_dali(root / name).astype(int)
        assert pixels.shape == expected.shape, name
        assert abs(pixels - expected).max() <= 1, name


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_cut_to_their_upper_8_in_little_memory(mode):
    deep = np.random.default_rng(0).integers(0, 65536, (300, 500), np.uint16)
    if mode == "I":
        whole = deep.astype(np.int32)
        whole[0, :3] = -5, 65536, 2**31 - 1
        image, expected = Image.fromarray(whole), (deep >> 8).astype(np.uint8)
        expected[0, :3] = 0, 255, 255
    else:
        kind = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, (500, 300), deep.astype(kind).tobytes())
        expected = (deep >> 8).astype(np.uint8)
    assert image.mode == mode

    tracemalloc.start()
    upright = pack_image.upright_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's and bytes: Pillow's own is its pixels
    tracemalloc.stop()
    np.testing.assert_array_equal(np.asarray(upright), np.repeat(expected[..., None], 3, axis=2))
    assert peak < 4 * deep.size


def test_square_is_the_middle_at_one_size_small_images_enlarged(tmp_path):
    (tmp_path / "images").mkdir()
    for height, width in ((80, 160), (300, 100), (20, 20)):
        picture(height, width).save(tmp_path / "images" / f"{height}.png")

    samples = pack(tmp_path / "images", tmp_path / "store", "--form", "raw", "--square", "40")
    assert (samples.height == 40).all()
    assert (samples.width == 40).all()
    assert len(set(samples.size.tolist())) == 1
    assert (np.diff(samples.offset) == 512 + 128 + 4800 + 192).all()  # up to whole blocks of 512
    assert (samples.offset % 64 == 0).all()
    middle = picture(80, 160).resize((40, 40), Image.Resampling.LANCZOS, box=(40, 0, 120, 80))
    row = names(samples).index("80.png")
    np.testing.assert_array_equal(samples.content(np.array([row]))[0], np.asarray(middle))


def test_a_jpeg_that_would_only_lose_stays_bit_for_bit(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    small = picture(150, 200)
    small.save(root / "small.jpg", quality=40)
    small.save(root / "good.jpg", quality=99)
    small.save(root / "progressive.jpg", quality=40, progressive=True)
    small.convert("L").save(root / "gray.jpg", quality=40)
    picture(480, 640).save(root / "large.jpg", quality=40)

    samples = pack(root, tmp_path / "store", "--short-side", "150")
    stored = dict(zip(names(samples), samples.content(samples.usable), strict=True))
    kept = {name for name, each in stored.items() if each.tobytes() == (root / name).read_bytes()}
    assert kept == {"small.jpg"}
    for content in stored.values():
        with Image.open(io.BytesIO(content.tobytes())) as image:
            assert image.mode == "RGB"
            assert "progressive" not in image.info


def test_what_the_reader_may_be_told_is_given_as_section_key_value(images, tmp_path):
    samples = pack(images, tmp_path / "store", "data.limit=7")

    assert len(samples) == 7


def test_the_manifest_says_what_the_store_is(images, tmp_path):
    before = files(images), {path: path.stat().st_mtime_ns for path in images.rglob("*")}
    pack(images, tmp_path / "store", "--quality", "80", "--short-side", "90")

    said = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (files(images), {path: path.stat().st_mtime_ns for path in images.rglob("*")}) == before
    assert said["format"] == "fastssl tar store"
    assert said["form"] == "jpeg"
    assert (said["short_side"], said["quality"], said["subsampling"]) == (90, 80, "4:2:0")
    assert said["images"] == said["source"]["listed"] == 30
    assert len(said["classes"]) == 10
    assert said["left_out"] == {}


# Bad files


def spoil(root: Path) -> None:
    """Three files that cannot be decoded; the last is known only once it is decoded."""
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_bytes(b"no image")
    file = io.BytesIO()
    picture(100, 100).save(file, "PNG")
    broken = bytearray(file.getvalue())
    broken[200:300] = bytes(100)
    (root / "z_broken.png").write_bytes(broken)


def test_bad_files_are_named_and_left_out_with_their_rows(images, tmp_path, capsys):
    spoil(images / "boat" if (images / "boat").is_dir() else next(images.iterdir()))

    samples = pack(images, tmp_path / "store", "--quality", "90")
    said = capsys.readouterr().out
    assert len(samples) == 30
    assert samples.usable.tolist() == list(range(30))
    assert len(samples.classes) == 10
    assert samples.labels is not None
    assert [samples.classes[label] for label in samples.labels] == [
        name.split("/")[0] for name in names(samples)
    ]
    assert "30 images, 3 left out (named in manifest.json)" in said
    assert re.search(r"pack: leaving out .*/z_broken.png: cannot be decoded: ", said)
    left = json.loads((tmp_path / "store" / "manifest.json").read_text())["left_out"]
    assert [Path(name).name for name in left] == ["empty.jpg", "text.jpg", "z_broken.png"]
    assert "empty file" in left[next(iter(left))]


def test_bad_files_can_be_refused_instead(images, tmp_path, capsys):
    spoil(images)
    assert "empty.jpg (empty file)" in refused(
        capsys, "pack", images, tmp_path / "store", "data.bad=error"
    )
    (images / "empty.jpg").unlink()
    (images / "text.jpg").unlink()

    options = ["data.bad=error", "--workers", "1", "--quality", "90"]
    said = refused(capsys, "pack", images, tmp_path / "store", *options)
    assert f"{images}/z_broken.png: cannot be decoded" in said
    assert "data.bad=skip" in said
    assert not (tmp_path / "store").exists()


def test_no_store_is_made_of_no_image(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    spoil(tmp_path / "images")
    for name in ("empty.jpg", "text.jpg"):
        (tmp_path / "images" / name).unlink()

    options = ["--workers", "1", "--form", "jpeg"]
    said = refused(capsys, "pack", tmp_path / "images", tmp_path / "store", *options)
    assert "not one of its 1 images can be decoded: z_broken.png (" in said


def test_names_that_are_no_text_are_kept_and_shown_on_one_line(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in (b"\xff.png", b"a\nb.png"):
        with open(os.path.join(os.fsencode(tmp_path / "images"), name), "wb") as file:
            picture(20, 20).save(file, "PNG")
    with open(os.path.join(os.fsencode(tmp_path / "images"), b"\xfe.png"), "wb") as file:
        picture(20, 20).save(file, "PNG")
        file.seek(60)
        file.write(bytes(40))

    samples = pack(tmp_path / "images", tmp_path / "store", "--form", "jpeg")
    assert names(samples) == ["a\nb.png", "\udcff.png"]
    assert r"pack: leaving out '\udcfe.png': " in capsys.readouterr().out


def failing_open(monkeypatch, times: int, number: int) -> None:
    """So many times a file cannot be opened to be packed."""
    left = iter(range(times))

    def fails(path: str, mode: str):
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number), path)
        return open(path, mode)

    monkeypatch.setattr(pack_image, "open", fails, raising=False)


def test_a_file_that_cannot_be_read_just_now_is_tried_again_and_never_left_out(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(20, 20))
    for number, remedy in (
        (errno.EIO, "if that stays so, name it in a data.quarantine"),
        (errno.ESTALE, "if that stays so, name it in a data.quarantine"),
        (errno.EACCES, "if that stays so, name it in a data.quarantine"),
        (errno.ENOENT, "it has gone since the source was listed: put it back"),
    ):
        failing_open(monkeypatch, 1, number)
        assert isinstance(pack_image.pack_all([str(path)], Form(), 10_000)[0], pack_image.Packed)
        failing_open(monkeypatch, 2, number)
        with pytest.raises(
            pack_image.MachineFault,
            match=f"^{path} cannot be read: {os.strerror(number)}: {remedy}",
        ):
            pack_image.pack_all([str(path)], Form(), 10_000)


def test_what_could_not_be_read_while_it_was_listed_is_not_left_out_for_ever(
    images, tmp_path, monkeypatch, capsys
):
    (images / "link.jpg").symlink_to("nowhere.jpg")  # never there: left out
    lost = sorted(images.glob("*/*.jpg"))[:5]
    (tmp_path / "elsewhere").mkdir()
    dimensions = headers.dimensions

    def fails(path: bytes) -> tuple[int, int]:
        number = lost.index(Path(os.fsdecode(path))) if Path(os.fsdecode(path)) in lost else 9
        if number < 4:
            raise ValueError(f"cannot be read: {os.strerror(errno.ESTALE)}")
        if number == 4:  # as if by another program
            lost[4].rename(tmp_path / "elsewhere" / "image")
        return dimensions(path)

    monkeypatch.setattr(headers, "dimensions", fails)
    said = refused(capsys, "pack", images, tmp_path / "store")
    few = ", ".join(f"{path} (cannot be read: {os.strerror(errno.ESTALE)})" for path in lost[:3])
    assert f"failed while {images} was listed, or files went away: {few} and 2 more;" in said
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(headers, "dimensions", dimensions)
    (tmp_path / "elsewhere" / "image").rename(lost[4])
    assert len(pack(images, tmp_path / "store")) == 30
    left = json.loads((tmp_path / "store" / "manifest.json").read_text())["left_out"]
    assert left == {"link.jpg": "cannot be read: No such file or directory"}


@pytest.mark.parametrize("form", [Form(form="original", short_side=None), Form()])
def test_want_of_memory_is_not_taken_for_a_bad_file(form, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    (tmp_path / "a.jpg").write_bytes(encoded(20, 20))
    monkeypatch.setattr(pack_image.image_bytes, "check_pixels", full)
    with pytest.raises(pack_image.MachineFault, match="not enough memory to decode it"):
        pack_image.pack_all([str(tmp_path / "a.jpg")], form, 10_000)


def test_a_fault_of_the_machine_ends_a_pack_that_can_be_gone_on_with(
    images, tmp_path, monkeypatch, capsys
):
    def fails(self, future):
        raise pack_image.MachineFault("/a.jpg cannot be read: Input/output error")

    monkeypatch.setattr(worker_pool.Interrupt, "result", fails)
    assert refused(capsys, "pack", images, tmp_path / "store", "--workers", "1") == (
        f"/a.jpg cannot be read: Input/output error; nothing is kept of {tmp_path}/store"
    )


def test_images_of_too_many_pixels_are_left_out_before_they_are_decoded(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "large.jpg").write_bytes(encoded(200, 200))
    (root / "small.jpg").write_bytes(encoded(20, 20))

    samples = pack(root, tmp_path / "store", "data.max_pixels=10000")
    left = json.loads((tmp_path / "store" / "manifest.json").read_text())["left_out"]
    assert names(samples) == ["small.jpg"]
    assert left == {"large.jpg": "200 x 200 pixels, over data.max_pixels=10,000"}


@pytest.mark.parametrize("form", [Form(form="original", short_side=None), Form()])
def test_a_file_that_became_larger_since_it_was_listed_is_refused_too(form, tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(encoded(200, 200))

    with pytest.raises(ValueError, match="200 x 200 pixels, over data"):
        pack_image.pack(str(path), form, 10_000)


def test_quarantined_images_are_left_out_with_their_reason(images, tmp_path):
    name = sorted(files(images))[4]
    bad = tmp_path / "quarantine.jsonl"
    bad.write_text(json.dumps({"name": name, "reason": "a black frame"}) + "\n")

    samples = pack(images, tmp_path / "store", f"data.quarantine={bad}")
    left = json.loads((tmp_path / "store" / "manifest.json").read_text())["left_out"]
    assert len(samples) == 29
    assert left == {name: "quarantined: a black frame"}


# Links


def test_links_that_lead_out_of_the_source_are_named_and_followed_only_when_asked(tmp_path, capsys):
    root, other = folder_of_classes(tmp_path / "images"), folder_of_classes(tmp_path / "other")
    (root / "class0" / "0.jpg").unlink()
    (root / "class0" / "0.jpg").symlink_to(other / "class0" / "1.jpg")
    (root / "class3").symlink_to(other / "class2")
    (root / "class1" / "inside.jpg").symlink_to("../class2/0.jpg")
    before = files(other)

    said = refused(capsys, "pack", root, tmp_path / "store")
    assert said == (
        f"links lead out of {root}: {root}/class0/0.jpg -> {other}/class0/1.jpg,"
        f" {root}/class3 -> {other}/class2; --follow-links packs what they lead to"
    )
    assert not (tmp_path / "store").exists()
    samples = pack(root, tmp_path / "store", "--follow-links")
    assert len(samples) == 22
    assert "class1/inside.jpg" in names(samples)
    assert files(other) == before


# As other programs read it


def test_originals_are_the_files_themselves_under_the_ending_of_their_format(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    kinds = {"a.JPEG": "JPEG", "b.gif.jpg": "PNG", "c": "WEBP", "d.bmp": "BMP", "e.tiff": "TIFF"}
    for name, kind in kinds.items():
        (root / name).write_bytes(encoded(20, 30, kind))

    samples = pack(root, tmp_path / "store")
    stored = [each.tobytes() for each in samples.content(samples.usable)]
    assert stored == [(root / name).read_bytes() for name in kinds]
    with tarfile.open(tmp_path / "store" / "shard-000000.tar") as opened:
        assert opened.getnames() == [
            *("000000000000.jpg", "000000000001.png", "000000000002.webp"),
            *("000000000003.bmp", "000000000004.tif"),
        ]


def test_a_tar_is_plain_ustar_without_owners_and_times_and_says_the_labels(images, tmp_path):
    samples = pack(images, tmp_path / "store", "--shard-mb", "1")

    assert samples.labels is not None
    path = tmp_path / "store" / "shard-000000.tar"
    with tarfile.open(path) as opened:
        members = opened.getmembers()
        for row in (0, 29):
            file = opened.extractfile(f"{row:012d}.cls")
            assert file is not None
            assert int(file.read()) == samples.labels[row]
    assert len(members) == 60
    assert {m.type for m in members} == {tarfile.REGTYPE}
    assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
        (0o644, 0, 0, "", "", 0)
    }
    assert path.read_bytes().endswith(bytes(1024))
    for member in members[:2]:
        block = path.read_bytes()[member.offset : member.offset + 512]
        assert block == tar_file.header(member.name, member.size)


@pytest.mark.parametrize("options", [[], ["--form", "raw"], ["--short-side", "40"]])
def test_the_index_for_dali_is_what_its_own_script_writes(options, images, tmp_path):
    pack(images, tmp_path / "store", *options)

    path = tmp_path / "store" / "shard-000000.tar"
    with wds2idx.IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert path.with_suffix(".idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_dali_reads_the_tars_by_their_indexes_to_the_same_bytes_and_labels(images, tmp_path):
    samples = pack(images, tmp_path / "store")

    tars = sorted(map(str, (tmp_path / "store").glob("*.tar")))
    pipeline = Pipeline(batch_size=30, num_threads=1, device_id=None)
    with pipeline:
        outputs = fn.readers.webdataset(
            paths=tars, index_paths=[f"{each[:-4]}.idx" for each in tars], ext=["jpg", "cls"]
        )
        assert outputs is not None
        pipeline.set_outputs(*outputs)
    contents, labels = pipeline.run()
    assert samples.labels is not None
    expected = samples.content(samples.usable)
    for row in range(30):
        assert np.asarray(contents[row]).tobytes() == expected[row].tobytes()
        assert int(np.asarray(labels[row]).tobytes()) == samples.labels[row]


def test_raw_members_are_arrays_that_numpy_loads(images, tmp_path):
    samples = pack(images, tmp_path / "store", "--form", "raw", "--short-side", "40")

    with tarfile.open(tmp_path / "store" / "shard-000000.tar") as opened:
        for row, pixels in enumerate(samples.content(samples.usable)):
            file = opened.extractfile(f"{row:012d}.npy")
            assert file is not None
            np.testing.assert_array_equal(np.load(io.BytesIO(file.read())), pixels)


def test_a_tar_holds_no_more_than_was_asked_for_and_the_manifest_says_which_rows(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")

    samples = pack(root, tmp_path / "store", "--shard-mb", "1")
    said = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert [(each["first_row"], each["images"]) for each in said["shards"]] == [
        (0, 3), (3, 3), (6, 3), (9, 3)
    ]  # fmt: skip
    assert all(each["bytes"] <= 1_000_000 for each in said["shards"])
    assert samples.shard.tolist() == [row // 3 for row in range(12)]
    for each in said["shards"]:
        path = tmp_path / "store" / each["name"]
        assert path.stat().st_size == each["bytes"]
        assert tar.tar_store.sha256_of(str(path)) == each["sha256"]


# Interruptions


@pytest.fixture
def stop_after(monkeypatch):
    """Lets so many files and folders be forced to the disk; then the disk is full."""
    forced = os.fsync

    def stop(count: int | None) -> None:
        left = iter(range(count)) if count is not None else None

        def fsync(file: int) -> None:
            if left is not None and next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            forced(file)

        monkeypatch.setattr(os, "fsync", fsync)

    return stop


@pytest.fixture
def noise(tmp_path) -> Path:
    """Forty images of 33 kB, three of them bad once they are decoded; 2 x 20 kB in two classes."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "noise" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)).save(file, "PNG")
        content = bytearray(file.getvalue())
        if number in (7, 8, 39):
            content[500:600] = bytes(100)
        path.write_bytes(content)
    return tmp_path / "noise"


def test_a_pack_that_fails_again_and_again_ends_with_the_same_bytes(
    noise, tmp_path, stop_after, capsys
):
    options = ["--workers", "1", "--shard-mb", "1", "--form", "raw", "--short-side", "full"]
    pack(noise, tmp_path / "whole", *options)
    chance = random.Random(7)
    kept: list[int] = []
    while True:
        stop_after(chance.randint(7, 16))
        code = data.main(["pack", str(noise), str(tmp_path / "store"), *options])
        if code == 0:
            break
        assert code == 2
        assert capsys.readouterr().err.startswith(
            f"error: {tmp_path}/store: the disk is full; {tmp_path}/store.part keeps"
        )
        assert not (tmp_path / "store").exists()
        kept.append(pack_part.kept(tmp_path / "store.part")[1])
        if kept[-1] == 37:  # what is left is to be written in one go
            stop_after(None)
            assert data.main(["pack", str(noise), str(tmp_path / "store"), *options]) == 0
            break

    assert len(kept) >= 2
    assert kept == sorted(kept)
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    assert not (tmp_path / "store.part").exists()


def test_a_source_that_goes_away_stops_a_pack_which_goes_on_once_it_is_back(
    noise, tmp_path, capsys
):
    options = ["--workers", "1", "--shard-mb", "1", "--form", "raw", "--short-side", "full"]
    pack(noise, tmp_path / "whole", *options)
    capsys.readouterr()
    result, count = worker_pool.Interrupt.result, iter(range(9))

    def goes_away(self, future):
        packed = result(self, future)
        if next(count) == 1:  # the second of five pieces
            noise.rename(tmp_path / "gone")
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool.Interrupt, "result", goes_away)
        said = refused(capsys, "pack", noise, tmp_path / "store", *options)
    assert "cannot be read: No such file or directory: it has gone since the source was" in said
    assert f"; {tmp_path}/store.part keeps " in said
    assert said.endswith(" images, and the same command goes on from there")
    assert not (tmp_path / "store").exists()

    (tmp_path / "gone").rename(noise)
    (noise / "class0" / "38.png").rename(tmp_path / "deleted.png")
    assert refused(capsys, "pack", noise, tmp_path / "store", *options) == (
        f"{tmp_path}/store.part was begun with another source: have its files (names, sizes, times)"
        " and the command as then to go on, --restart to begin anew, or name another STORE"
    )
    (tmp_path / "deleted.png").rename(noise / "class0" / "38.png")
    pack(noise, tmp_path / "store", *options)
    assert "going on from" in capsys.readouterr().out
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_what_was_begun_otherwise_is_not_gone_on_with_but_can_be_begun_anew(
    noise, tmp_path, stop_after, capsys
):
    options = ["--workers", "1", "--shard-mb", "1", "--form", "raw", "--short-side", "full"]
    stop_after(16)
    assert data.main(["pack", str(noise), str(tmp_path / "store"), *options]) == 2
    stop_after(None)
    capsys.readouterr()

    for other, what in (
        (["--short-side", "100"], "form"),
        (["--shard-mb", "2"], "shard size"),
        (["data.limit=20"], "source"),
    ):
        said = refused(capsys, "pack", noise, tmp_path / "store", *options, *other)
        same = "give the same command as then"
        if what == "source":
            same = "have its files (names, sizes, times) and the command as then"
        assert said == (
            f"{tmp_path}/store.part was begun with another {what}: {same} to go on, --restart to"
            " begin anew, or name another STORE"
        )
    samples = pack(noise, tmp_path / "store", *options, "--restart", "--short-side", "100")
    assert len(samples) == 37
    assert (samples.height == 100).all()


def test_what_is_read_back_otherwise_is_packed_again(noise, tmp_path, stop_after, capsys):
    options = ["--workers", "1", "--shard-mb", "1", "--form", "raw", "--short-side", "full"]
    stop_after(16)
    assert data.main(["pack", str(noise), str(tmp_path / "store"), *options]) == 2
    stop_after(None)
    shard = tmp_path / "store.part" / "store" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[300_000] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()

    said = refused(capsys, "pack", noise, tmp_path / "store", *options)
    assert "what was written is read back otherwise: shard-000001.tar" in said
    assert "the same command packs from there on again" in said
    assert not (tmp_path / "store").exists()
    assert pack_part.kept(tmp_path / "store.part")[0] == 1
    pack(noise, tmp_path / "store", *options)
    pack(noise, tmp_path / "whole", *options)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


@pytest.fixture
def part(tmp_path) -> Path:
    """What a pack has left that ended behind its second whole shard."""
    folder = tmp_path / "store.part"
    folder.mkdir()
    left = pack_part.Part(folder, {"form": "raw"}, restart=False)
    for number in range(2):
        name = f"shard-{number:06d}.tar"
        (left.store / name).write_bytes(b"a tar")
        (left.store / name).with_suffix(".idx").write_bytes(b"an index")
        columns = pack_part.Columns()
        columns.append(b"a.png", **dict.fromkeys(pack_part.OWN[:-1], number))
        left.finish(pack_part.Finished(name, 5, "", 1, number + 1, {}), columns)
    assert pack_part.kept(folder) == (2, 2)
    return folder


@pytest.mark.parametrize("kind", ["npz", "json"])
@pytest.mark.parametrize("spoilt", ["flipped", "cut"])
def test_a_shard_whose_notes_are_damaged_is_packed_again(part, kind, spoilt):
    note = part / "finished" / f"000001.{kind}"
    content = note.read_bytes()
    for place in range(0, len(content), 7):
        rest = bytes([content[place] ^ 1]) + content[place + 1 :] if spoilt == "flipped" else b""
        note.write_bytes(content[:place] + rest)
        assert pack_part.kept(part) == (1, 1)

    taken_up = pack_part.Part(part, {"form": "raw"}, restart=False)
    assert [each.name for each in taken_up.finished] == ["shard-000000.tar"]
    assert sorted(path.name for path in part.glob("*/*")) == [
        *("000000.json", "000000.npz", "shard-000000.idx", "shard-000000.tar")
    ]


def test_files_of_others_among_the_notes_are_passed_over(part):
    (part / "finished" / ".DS_Store").write_bytes(b"theirs")
    (part / "finished" / ".nfs00000000045c9bd200000001").write_bytes(b"theirs")

    taken_up = pack_part.Part(part, {"form": "raw"}, restart=False)
    assert len(taken_up.finished) == 2


def test_a_folder_that_no_pack_has_left_is_not_emptied(images, tmp_path, capsys):
    (tmp_path / "store.part").mkdir()
    (tmp_path / "store.part" / "thesis.tex").write_text("mine")

    said = refused(capsys, "pack", images, tmp_path / "store", "--restart")
    assert said == f"{tmp_path}/store.part holds what no pack has left there: remove it"
    assert (tmp_path / "store.part" / "thesis.tex").read_text() == "mine"


def test_a_full_disk_is_one_line_and_keeps_whole_tars_only(noise, small_disk, tmp_path, capsys):
    options = ["--form", "raw", "--short-side", "full", "--workers", "1"]

    assert refused(capsys, "pack", noise, small_disk / "store", *options) == (
        f"{small_disk}/store: the disk is full; nothing is kept of {small_disk}/store: free some"
        " space, or name another disk"
    )
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    options += ["--shard-mb", "1"]
    assert refused(capsys, "pack", noise, small_disk / "store", *options) == (
        f"{small_disk}/store: the disk is full; {small_disk}/store.part keeps 2 tars with 16"
        " images, and the same command goes on from there: free some space, or name another disk"
    )
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    pack(noise, small_disk / "store", *options)
    assert "going on from" in capsys.readouterr().out
    pack(noise, tmp_path / "whole", *options)
    assert files(small_disk / "store") == files(tmp_path / "whole")


def many(root: Path, count: int) -> None:
    """Enough work for seconds: hard links to one file."""
    file = root / "0.png"
    root.mkdir()
    picture(260, 364).save(file)
    for number in range(1, count):
        os.link(file, root / f"{number}.png")


def started(
    source: Path, store: Path, checkout: Path, environ, *more: str, kept: int = 0
) -> subprocess.Popen:
    """A pack that has begun to write, or has finished so many tars."""
    environ = environ | {"FASTSSL_CACHE": str(source.parent / "cache")}
    command = [*RUN, "pack", str(source), str(store), "--workers", "2", "--form", "raw", *more]
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    part = store.with_name(f"{store.name}.part")
    shard = part / "store" / f"shard-{kept:06d}.tar"
    deadline = time.monotonic() + 300
    while not (shard.exists() and shard.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def descendants(parent: int) -> list[int]:
    """All processes below a process, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def test_a_pack_that_is_ended_at_random_places_leaves_no_process_and_goes_on_to_the_same_bytes(
    tmp_path, checkout, environ
):
    many(tmp_path / "images", 600)
    store = tmp_path / "store"
    options = ["--short-side", "120", "--shard-mb", "1"]
    chance, kept = random.Random(5), 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = started(tmp_path / "images", store, checkout, environ, *options, kept=kept + 1)
        below = descendants(process.pid)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(number)
        said = process.communicate(timeout=300)[1].decode()
        deadline = time.monotonic() + 300
        while any(Path(f"/proc/{each}").exists() for each in below):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before, (kept, images) = kept, pack_part.kept(tmp_path / "store.part")
        assert len(below) >= 2  # workers
        assert not store.exists()
        assert kept > before
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert said == (
                f"interrupted: {store}.part keeps {kept} tars with {images} images, and the same"
                " command goes on from there\n"
            )
        else:
            assert process.returncode == -signal.SIGKILL

    options += ["--form", "raw"]
    samples = pack(tmp_path / "images", store, *options)
    pack(tmp_path / "images", tmp_path / "whole", *options)
    assert len(samples.files) > kept
    assert files(store) == files(tmp_path / "whole")


def test_ctrl_c_leaves_nothing_where_nothing_is_whole(images, tmp_path, monkeypatch, capsys):
    def interrupted(self, future):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker_pool.Interrupt, "result", interrupted)
    assert data.main(["pack", str(images), str(tmp_path / "store"), "--workers", "1"]) == 130

    said = capsys.readouterr().err
    assert said == f"interrupted: nothing is kept of {tmp_path}/store\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_a_part_with_nothing_whole_is_begun_anew_in_any_form(images, tmp_path):
    part = tmp_path / "store.part"
    (part / "store").mkdir(parents=True)
    (part / "plan.json").write_text(json.dumps({"form": "another"}))
    (part / "store" / "shard-000000.tar").write_bytes(b"cut o")

    assert len(pack(images, tmp_path / "store", "data.limit=3")) == 3
    assert not part.exists()


def test_ctrl_c_waits_until_no_lock_of_the_executor_can_be_held():
    future: Future = Future()
    future.set_result(["an image"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = worker_pool.Interrupt()
    try:
        assert interrupt.result(future) == ["an image"]
        signal.raise_signal(signal.SIGINT)  # anywhere: nothing is raised there
        with pytest.raises(KeyboardInterrupt):
            interrupt.result(future)
        with pytest.raises(KeyboardInterrupt):
            interrupt.result(Future())  # nor does one wait for what never comes
    finally:
        interrupt.restore()
        restored = signal.signal(signal.SIGINT, before)
    assert restored is signal.default_int_handler


def end_at_five(paths: list[str]) -> list[str]:
    """A worker's work, which the kernel ends at a file."""
    if any(path.endswith("/5.png") for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return paths


def test_a_worker_that_is_killed_is_told_with_what_it_was_busy_with():
    pieces = [[f"/{number}.png"] for number in range(9)]
    done = []

    for workers in (1, 2):
        with (
            contextlib.closing(worker_pool.in_order(end_at_five, pieces, workers)) as results,
            pytest.raises(worker_pool.WorkerLost, match="a worker process was killed") as lost,
        ):
            done += list(results)
        assert ["/5.png"] in lost.value.pieces
        assert len(lost.value.pieces) <= workers
        assert ("fewer than --workers 2" in str(lost.value)) == (workers == 2)


def test_a_pack_whose_worker_is_killed_names_the_files_and_how_to_find_which(
    images, tmp_path, monkeypatch, capsys
):
    def lose(self, future):
        raise BrokenProcessPool

    monkeypatch.setattr(worker_pool.Interrupt, "result", lose)
    said = refused(capsys, "pack", images, tmp_path / "store", "--workers", "1")
    first = sorted(map(str, images.rglob("*.jpg")))[:8]
    assert said == (
        "a worker process was killed, perhaps for want of memory; if that happens again, it is one"
        f" of {', '.join(first)}: `python -m fastssl.data check SOURCE --decode` finds out which,"
        f" for data.quarantine; nothing is kept of {tmp_path}/store"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_two_packs_into_the_same_store_do_not_mix(images, tmp_path, capsys):
    part = tmp_path / "store.part"
    part.mkdir()
    (part / "plan.json").write_bytes(b"being written")
    other = os.open(part, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    said = refused(capsys, "pack", images, tmp_path / "store", "--workers", "1")
    assert said == f"{part} is being written by another process: wait for it"
    assert (part / "plan.json").read_bytes() == b"being written"
    os.close(other)
    assert len(pack(images, tmp_path / "store")) == 30
