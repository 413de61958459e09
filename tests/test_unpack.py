"""`python -m fastssl.data unpack`: the folder that was packed; nothing leads out of the new one."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl import data, part_folder, tar_file, unpack
from tests.packing import (
    agree,
    encoded,
    files,
    folder_of_classes,
    pack,
    refused,
    write_manifest,
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder of sixteen originals, and a store of it."""
    root = tmp_path_factory.mktemp("packed")
    source = folder_of_classes(root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSSL_CACHE", str(root / "cache"))
        pack(source, root / "store")
    return root


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed / "store", tmp_path / "store")


def forge(store: Path, *, names: list[bytes] | None = None, **numbers: dict[int, int]) -> None:
    """Changes the index of a store, and has the manifest agree with it and with the tar."""
    if names is not None:
        column = np.frombuffer(b"".join(names), np.uint8)
        np.save(store / "index" / "name.npy", column)
        np.save(store / "index" / "name_end.npy", np.cumsum([*map(len, names)]).astype("<i8"))
    for name, changes in numbers.items():
        column = np.load(store / "index" / f"{name}.npy").copy()
        for row, value in changes.items():
            column[row] = value
        np.save(store / "index" / f"{name}.npy", column)
    agree(store)


def names_of(packed: Path) -> list[bytes]:
    return [os.fsencode(name) for name in sorted(files(packed / "images"))]


def test_a_store_of_originals_becomes_the_folder_that_was_packed(packed, store, tmp_path):
    assert data.main(["unpack", str(store), str(tmp_path / "again")]) == 0

    assert files(tmp_path / "again") == files(packed / "images")
    assert not (tmp_path / "again.part").exists()


def test_names_that_are_no_text_come_back(tmp_path):
    root = os.fsencode(tmp_path / "images")
    os.mkdir(root)
    for name in (b"\xff.png", b"a\nb.png", b"sp ace.png"):
        with open(os.path.join(root, name), "wb") as file:
            file.write(encoded(20, 20, "PNG"))
    pack(tmp_path / "images", tmp_path / "store")

    assert data.main(["unpack", str(tmp_path / "store"), str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "images")


def test_what_was_converted_says_so_by_its_ending(packed, tmp_path):
    pack(packed / "images", tmp_path / "jpeg", "--short-side", "16")
    pack(packed / "images", tmp_path / "raw", "--form", "raw", "--short-side", "full")
    for form in ("jpeg", "raw"):
        assert data.main(["unpack", str(tmp_path / form), str(tmp_path / f"{form}-again")]) == 0

    originals = set(files(packed / "images"))
    assert set(files(tmp_path / "jpeg-again")) == originals - {"class0/more.png"} | {
        "class0/more.png.jpg"
    }
    pixels = files(tmp_path / "raw-again")
    assert set(pixels) == originals - {"class0/more.png"} - {
        name for name in originals if name.endswith(".jpg")
    } | {f"{name}.png" for name in originals if name.endswith(".jpg")} | {"class0/more.png"}
    with Image.open(tmp_path / "raw-again" / "class1" / "2.jpg.png") as image:
        again = np.asarray(image)
    with Image.open(packed / "images" / "class1" / "2.jpg") as image:
        np.testing.assert_array_equal(again, np.asarray(image))


def test_an_ending_gives_no_image_the_name_of_another_or_of_a_folder(tmp_path):
    sources = {
        "a/x.png": 20, "a/x.png.jpg": 21, "a/x.png.jpg.jpg": 22,
        "a/y.png": 23, "a/y.png.jpg/0.jpg": 24, "b/z.png": 25, "b/z.png.JPG": 26,
    }  # fmt: skip
    for name, side in sources.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        (tmp_path / "images" / name).write_bytes(encoded(side, side, kind))
    pack(tmp_path / "images", tmp_path / "store", "--short-side", "100")

    assert data.main(["unpack", str(tmp_path / "store"), str(tmp_path / "again")]) == 0
    sides: dict[str, int] = {}
    for name in files(tmp_path / "again"):
        with Image.open(tmp_path / "again" / name) as image:
            sides[name] = image.width
    assert sides == {
        "a/x.png.jpg.jpg.jpg": 20, "a/x.png.jpg": 21, "a/x.png.jpg.jpg": 22,
        "a/y.png.jpg.jpg": 23, "a/y.png.jpg/0.jpg": 24, "b/z.png.jpg": 25, "b/z.png.JPG": 26,
    }  # fmt: skip


def test_an_image_is_written_whole_however_few_bytes_the_kernel_gives_at_a_time(
    tmp_path, monkeypatch
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.bmp").write_bytes(encoded(40, 40, "BMP"))
    pack(tmp_path / "images", tmp_path / "store")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 2000), at))

    assert unpack.unpack(tmp_path / "store", tmp_path / "again", max_pixels=10**6, workers=1) == 1
    assert files(tmp_path / "again") == files(tmp_path / "images")


def test_a_folder_that_is_there_is_left_alone(store, tmp_path, capsys):
    (tmp_path / "again").mkdir()
    said = refused(capsys, "unpack", store, tmp_path / "again")
    assert said == f"{tmp_path}/again is there already: remove it, or name another folder"
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("mine")

    said = refused(capsys, "unpack", store, tmp_path / "new")
    assert said == f"{tmp_path}/new.part is left from an unpack that was killed: remove it"
    assert (tmp_path / "new.part" / "mine").read_text() == "mine"


# Stores that mean harm: the manifest agrees with all that they hold


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"/etc/cron.d/evil", "image 4 (class0//etc/cron.d/evil) is refused: its name is none of"),
        (b"../evil.jpg", 'is refused: its name has ".." in it, which leads out'),
        (b"class0/../../evil.jpg", 'is refused: its name has ".." in it, which leads out'),
        (b"class0/..", 'is refused: its name has ".." in it, which leads out'),
        (b"class0//evil.jpg", "is refused: its name is none of a file"),
        (b"class0/.", "is refused: its name is none of a file"),
        (b"class0/a\0b.jpg", "is refused: its name is none of a file"),
        (b"", "is refused: its name is none of a file"),
    ],
)
def test_names_that_lead_out_are_refused_before_anything_is_written(
    name, reason, packed, store, tmp_path, capsys
):
    names = names_of(packed)
    names[4] = name
    forge(store, names=names)

    assert reason in refused(capsys, "unpack", store, tmp_path / "again")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store"]


def test_without_classes_a_name_from_the_root_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encoded(20, 20))
    pack(tmp_path / "images", tmp_path / "store")
    capsys.readouterr()
    forge(tmp_path / "store", names=[b"/a"])

    said = refused(capsys, "unpack", tmp_path / "store", tmp_path / "again")
    assert said.endswith("image 0 (/a) is refused: its name begins at the root of the disk")


def test_a_class_that_leads_out_is_refused(store, tmp_path, capsys):
    said = json.loads((store / "manifest.json").read_text())
    said["classes"][0] = "../../evil"
    write_manifest(store, said)

    assert 'has ".." in it' in refused(capsys, "unpack", store, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(kind, called, store, tmp_path, capsys):
    offset = int(np.load(store / "index" / "offset.npy")[5])
    member = tarfile.TarInfo("000000000005.png")
    member.type, member.linkname = kind, "/etc/passwd"
    with (store / "shard-000000.tar").open("r+b") as file:
        file.seek(offset - 512)
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
    forge(store)

    said = refused(capsys, "unpack", store, tmp_path / "again")
    assert f"shard-000000.tar, image 5 (class0/more.png): {called}" in said
    assert not (tmp_path / "again").exists()


def test_a_member_of_another_size_than_the_index_says_is_refused(store, tmp_path, capsys):
    sizes = np.load(store / "index" / "size.npy")
    with (store / "shard-000000.tar").open("r+b") as file:
        file.seek(int(np.load(store / "index" / "offset.npy")[5]) - 512)
        file.write(tar_file.header("000000000005.png", int(sizes[5]) + 1))
    forge(store)
    assert "image 5 (class0/more.png): what is around it" in refused(
        capsys, "unpack", store, tmp_path / "again"
    )
    forge(store, size={15: 10**6})

    said = refused(capsys, "unpack", store, tmp_path / "again")
    assert "is wrong about image 15" in said
    assert not (tmp_path / "again").exists()


def test_images_over_the_pixel_limit_are_refused_by_index_and_by_their_own_header(
    store, tmp_path, capsys
):
    said = refused(capsys, "unpack", store, tmp_path / "again", "--max-pixels", "700")
    assert said.endswith(
        "image 7 (class1/1.jpg) is refused: 31 x 23 pixels, over data.max_pixels=700"
    )
    forge(store, height=dict.fromkeys(range(16), 1), width=dict.fromkeys(range(16), 1))

    said = refused(capsys, "unpack", store, tmp_path / "again", "--max-pixels", "700")
    assert "pixels, over data.max_pixels=700" in said
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "again.part").exists()


def test_two_images_of_one_name_or_in_the_place_of_a_folder_are_refused(
    packed, store, tmp_path, capsys
):
    for row, name in ((1, b"class0/0.jpg"), (2, b"class0/0.jpg/a.jpg"), (3, b"class0")):
        names = names_of(packed)
        names[row] = name
        forge(store, names=names)
        said = refused(capsys, "unpack", store, tmp_path / "again")
        assert f"image {row} (" in said
        assert "another image has its name, or one of its folders'" in said
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["shard-000000.tar", "manifest.json", "index/size.npy", "index"])
def test_a_link_in_a_store_is_refused(name, store, tmp_path, capsys):
    (store / name).rename(tmp_path / "elsewhere")
    (store / name).symlink_to(tmp_path / "elsewhere")

    said = refused(capsys, "unpack", store, tmp_path / "again")
    assert said.startswith(f"{store}: index" if "index" in name else f"{store}: {name} is refused")
    assert said.endswith("is refused: it is a link")


def test_all_is_forced_to_the_disk_before_the_folder_has_its_name(store, tmp_path, monkeypatch):
    synced: list[str] = []
    sync = part_folder.sync
    monkeypatch.setattr(part_folder, "sync", lambda path: synced.append(str(path)) or sync(path))
    unpack.unpack(store, tmp_path / "again", max_pixels=10**6, workers=1)

    part = f"{tmp_path}/again.part"
    written = [part + str(path)[len(f"{tmp_path}/again") :] for path in each_of(tmp_path / "again")]
    assert sorted(synced[:-1]) == sorted([part, *written])
    assert synced[-1] == str(tmp_path)


def each_of(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


def test_a_damaged_store_is_not_unpacked(store, tmp_path, capsys):
    with (store / "shard-000000.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"\x55\xaa")

    said = refused(capsys, "unpack", store, tmp_path / "again")
    assert "`python -m fastssl.data verify` names all that is so" in said
    assert not (tmp_path / "again").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, tmp_path, capsys):
    source = tmp_path / "images"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    pack(source, tmp_path / "store")
    capsys.readouterr()

    said = refused(capsys, "unpack", tmp_path / "store", small_disk / "again")
    assert "No space left on device" in said
    assert list(small_disk.iterdir()) == []


def test_options_that_cannot_be_are_one_line(store, tmp_path, capsys):
    for option in ("--workers", "--max-pixels"):
        said = refused(capsys, "unpack", store, tmp_path / "again", option, "0")
        assert said == f"{option} (0) must be at least 1"
    assert unpack.unpack(store, tmp_path / "again", max_pixels=10**6, workers=1) == 16
