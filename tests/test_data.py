"""`python -m fastssl.data pack`: the same bytes each time, whole or not at all, bad files named."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image

from fastssl import data
from fastssl import pack as pack_module
from pipelines.readers import packed

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


def pack(source: Path, store: Path, *more: str) -> packed.Samples:
    """Packs, and opens what was packed."""
    assert data.main(["pack", str(source), str(store), "--workers", "1", *more]) == 0
    options = packed.Options(root=str(store), verify=True)
    return packed.list_samples(options, cache=None, say=pytest.fail)


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """The single line that a mistake is answered with."""
    code = data.main(["pack", *map(str, arguments)])

    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    return said.removeprefix("error: ").rstrip("\n")


def names(samples: packed.Samples) -> list[str]:
    return [os.path.relpath(samples.path(row), samples.root) for row in range(len(samples))]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def decoded_by_dali(path: Path) -> np.ndarray:
    """As training from the folder sees a file."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        content = fn.external_source(
            lambda: [np.frombuffer(path.read_bytes(), np.uint8)], dtype=DALIDataType.UINT8, ndim=1
        )
        pipeline.set_outputs(fn.decoders.image(content, output_type=DALIImageType.RGB))
    return np.asarray(pipeline.run()[0].as_tensor())[0]


def picture(height: int, width: int) -> Image.Image:
    """Smooth, with an upper left corner unlike the rest."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(9 * (x + y))], axis=-1)
    pixels[: height // 4, : width // 4] = 250, 20, 20
    return Image.fromarray(pixels.astype(np.uint8))


# What is written


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_the_same_source_gives_the_same_bytes_whatever_the_workers(form, images, tmp_path):
    options = ["--form", form, "--short-side", "90"]
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


def test_square_is_the_middle_at_one_size_small_images_enlarged(tmp_path):
    (tmp_path / "images").mkdir()
    for height, width in ((80, 160), (300, 100), (20, 20)):
        picture(height, width).save(tmp_path / "images" / f"{height}.png")

    samples = pack(tmp_path / "images", tmp_path / "store", "--form", "raw", "--square", "40")
    assert (samples.height == 40).all()
    assert (samples.width == 40).all()
    assert len(set(samples.size.tolist())) == 1
    assert (np.diff(samples.offset) == 4800).all()
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
    pack(images, tmp_path / "store", "--quality", "80", "--short-side", "90")

    said = json.loads((tmp_path / "store" / "manifest.json").read_text())
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

    samples = pack(images, tmp_path / "store")
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
    assert "empty.jpg (empty file)" in refused(capsys, images, tmp_path / "store", "data.bad=error")
    (images / "empty.jpg").unlink()
    (images / "text.jpg").unlink()

    said = refused(capsys, images, tmp_path / "store", "data.bad=error", "--workers", "1")
    assert f"{images}/z_broken.png: cannot be decoded" in said
    assert "data.bad=skip" in said
    assert not (tmp_path / "store").exists()


def test_no_store_is_made_of_no_image(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    spoil(tmp_path / "images")
    for name in ("empty.jpg", "text.jpg"):
        (tmp_path / "images" / name).unlink()

    said = refused(capsys, tmp_path / "images", tmp_path / "store", "--workers", "1")
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

    samples = pack(tmp_path / "images", tmp_path / "store")
    assert names(samples) == ["a\nb.png", "\udcff.png"]
    assert r"pack: leaving out '\udcfe.png': " in capsys.readouterr().out


# Mistakes


def test_a_store_that_is_there_is_left_alone(images, tmp_path, capsys):
    pack(images, tmp_path / "store")
    before = files(tmp_path / "store")
    capsys.readouterr()

    said = refused(capsys, images, tmp_path / "store")
    assert said == f"{tmp_path}/store is there already: remove it, or name another folder"
    assert files(tmp_path / "store") == before


def test_folders_that_do_not_do_are_named(images, tmp_path, capsys):
    assert refused(capsys, tmp_path / "none", tmp_path / "store") == (
        f"data.root: there is no folder {tmp_path}/none, only {tmp_path}"
    )
    assert refused(capsys, images, tmp_path / "a" / "b" / "store") == (
        f"{tmp_path}/a/b/store: there is no folder {tmp_path}/a/b: make it, or name another"
    )
    assert refused(capsys, images, images / "store") == (
        f"{images}/store lies in the source {images}: name a folder elsewhere"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quality", "101"], "--quality (101) must be in 1 ... 100"),
        (["--short-side", "4"], "--short-side (4) must be at least 8, or full"),
        (["--square", "40"], "--square is for --form raw"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--shard-mb", "0"], "--shard-mb (0) must be at least 1"),
        (["data.limits=3"], "data.limits: unknown key"),
        (["data.limit=0"], "limit (0) must be at least 1"),
        (["data.root=/a"], "data.root is SOURCE"),
        (["train.epochs=1"], "unknown section 'train'"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, said, images, tmp_path, capsys):
    assert said in refused(capsys, images, tmp_path / "store", *arguments)
    assert not (tmp_path / "store").exists()


def test_a_folder_whose_name_yaml_would_read_otherwise_is_taken_as_it_is(images, tmp_path):
    odd = tmp_path / "it's: 1e4 #1"
    images.rename(odd)

    assert len(pack(odd, tmp_path / "store")) == 30


# Interruptions


def test_a_full_disk_is_one_line_and_leaves_nothing(images, small_disk, capsys):
    options = ["--form", "raw", "--short-side", "full", "--workers", "1"]

    assert refused(capsys, images, small_disk / "store", *options) == (
        f"{small_disk}/store: the disk is full; nothing is kept: free some space, or name another"
        " disk"
    )
    assert list(small_disk.iterdir()) == []


def many(root: Path) -> None:
    """Enough work for seconds: links to one file."""
    file = root / "0.png"
    root.mkdir()
    picture(500, 700).save(file)
    for number in range(1, 1200):
        os.link(file, root / f"{number}.png")


def started(source: Path, store: Path, checkout: Path, environ) -> subprocess.Popen:
    """A pack that has begun to write."""
    environ = environ | {"FASTSSL_CACHE": str(source.parent / "cache")}
    command = [*RUN, "pack", str(source), str(store), "--workers", "2", "--form", "raw"]
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environ,
        stderr=subprocess.PIPE,
        # a shell script's background jobs, as .ci/run's, ignore Ctrl-C, and so do their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    shard = store.with_name(f"{store.name}.part") / "shard-00000.bin"
    deadline = time.monotonic() + 60
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


def test_a_pack_that_is_killed_leaves_no_store_and_no_process_and_can_be_started_anew(
    tmp_path, checkout, environ
):
    many(tmp_path / "images")
    store = tmp_path / "store"
    process = started(tmp_path / "images", store, checkout, environ)
    below = descendants(process.pid)
    process.kill()
    process.communicate()

    assert len(below) >= 2  # workers
    assert not store.exists()
    assert (tmp_path / "store.part").exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{each}").exists() for each in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    samples = pack(tmp_path / "images", store, "--short-side", "32", "data.limit=3")
    assert len(samples) == 3
    assert not (tmp_path / "store.part").exists()


def test_ctrl_c_leaves_nothing(tmp_path, checkout, environ):
    many(tmp_path / "images")
    process = started(tmp_path / "images", tmp_path / "store", checkout, environ)
    process.send_signal(signal.SIGINT)

    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert said == f"interrupted: nothing is kept of {tmp_path}/store\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_ctrl_c_waits_until_no_lock_of_the_executor_can_be_held():
    future: Future = Future()
    future.set_result(["an image"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's: ignored
    interrupt = pack_module._Interrupt()
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


def test_a_worker_that_is_killed_is_one_line_and_leaves_nothing(tmp_path, checkout, environ):
    many(tmp_path / "images")
    process = started(tmp_path / "images", tmp_path / "store", checkout, environ)
    children = descendants(process.pid)
    workers = [each for child in children for each in descendants(child)]
    os.kill(workers[0], signal.SIGKILL)

    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 2
    assert said == (
        "error: a worker process was killed, perhaps for want of memory: give fewer than"
        " --workers 2\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_two_packs_into_the_same_store_do_not_mix(images, tmp_path, capsys):
    part = tmp_path / "store.part"
    part.mkdir()
    (part / "shard-00000.bin").write_bytes(b"being written")
    other = os.open(part, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    said = refused(capsys, images, tmp_path / "store", "--workers", "1")
    assert said == f"{part} is being written by another process: wait for it"
    assert (part / "shard-00000.bin").read_bytes() == b"being written"
    os.close(other)
    assert len(pack(images, tmp_path / "store")) == 30


def test_the_command_runs_as_its_help_says(images, tmp_path, checkout, environ):
    command = [*RUN, "pack", str(images), str(tmp_path / "store"), "--form", "raw"]
    done = subprocess.run(
        command, cwd=checkout, env=environ, check=True, capture_output=True, text=True
    )

    assert done.stderr == ""
    assert f"{tmp_path}/store: 30 images, raw, short side 292, " in done.stdout
    assert done.stdout.endswith(
        f"read it with data.use=pipelines.readers.packed data.root={tmp_path}/store\n"
    )
