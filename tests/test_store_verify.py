"""`python -m fastssl.data verify`: every damaged tar and image is named, whatever is damaged."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from fastssl import data, image_bytes, store_verify, tar_file, unpack
from pipelines.readers import tar, tar_store
from tests.packing import agree, encoded, folder_of_classes, pack, write_manifest


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Sixteen originals in three classes."""
    root = tmp_path_factory.mktemp("packed")
    source = folder_of_classes(root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSSL_CACHE", str(root / "cache"))
        pack(source, root / "store")
    return root / "store"


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "store")


def damaged(store: Path, capsys: pytest.CaptureFixture, *more: str) -> list[str]:
    """The lines of damage that a store is answered with."""
    code = data.main(["verify", str(store), *more])

    said = capsys.readouterr()
    assert code == 1
    assert said.err.startswith(f"error: {store}: ")
    lines = said.out.splitlines()
    assert all(line.startswith("damaged: ") for line in lines)
    return [line.removeprefix("damaged: ") for line in lines]


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def columns(store: Path) -> dict[str, np.ndarray]:
    return {name: np.load(store / "index" / f"{name}.npy") for name in tar_store.COLUMNS}


@pytest.mark.parametrize("more", [[], ["--decode", "--workers", "1"]])
def test_a_store_as_it_was_packed_passes(more, store, capsys):
    assert data.main(["verify", str(store), *more]) == 0

    assert capsys.readouterr().out == (f"{store}: 16 images in 1 tar, all as they were packed\n")


def test_a_flipped_bit_in_an_image_names_the_tar_and_the_image(store, capsys):
    offset = int(columns(store)["offset"][3])
    change(store / "shard-000000.tar", offset + 300, b"\x55\xaa")

    first, second = damaged(store, capsys)
    assert first.startswith("shard-000000.tar: has the SHA-256 ")
    assert second == (
        "shard-000000.tar, image 3 (class0/3.jpg): its bytes are not those that were packed"
        " (CRC-32)"
    )


def test_what_is_around_images_is_compared_too_even_when_the_sums_are_forged(store, capsys):
    table = columns(store)
    offset, size = int(table["offset"][5]), int(table["size"][5])
    padded = offset + size + (-size % 512)
    change(store / "shard-000000.tar", padded + 512, b"2")  # the label
    agree(store)

    assert damaged(store, capsys) == [
        "shard-000000.tar, image 5 (class0/more.png): what is around it in the tar is not as it"
        " was packed"
    ]


def test_a_link_in_the_place_of_an_image_is_called_one(store, capsys):
    offset = int(columns(store)["offset"][5])
    link = tarfile.TarInfo("000000000005.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    change(store / "shard-000000.tar", offset - 512, link.tobuf(tarfile.USTAR_FORMAT))
    agree(store)

    assert damaged(store, capsys) == ["shard-000000.tar, image 5 (class0/more.png): a link"]


def test_a_tar_that_is_cut_off_names_what_is_gone(store, capsys):
    path = store / "shard-000000.tar"
    table = columns(store)
    os.truncate(path, int(table["offset"][14]) + 100)

    said = damaged(store, capsys)
    assert f"has {path.stat().st_size:,} bytes, and the manifest says" in said[0]
    assert any("image 14 (class2/3.jpg): is cut off" in line for line in said)
    assert any("image 15 (class2/4.jpg): is cut off" in line for line in said)
    assert not any("image 13 " in line for line in said)


def test_more_behind_the_end_of_a_tar_is_found(store, capsys):
    with (store / "shard-000000.tar").open("ab") as file:
        file.write(tar_file.header("more.sh", 0))
    agree(store)

    (said,) = damaged(store, capsys)
    assert "shard-000000.tar: does not end at byte " in said


def test_a_tar_that_is_gone_and_an_index_of_another_are_named(store, capsys):
    (store / "shard-000000.idx").write_text("v1.2 0\n")
    assert damaged(store, capsys) == ["shard-000000.idx: is no index of its tar"]
    (store / "shard-000000.idx").unlink()
    assert damaged(store, capsys) == ["shard-000000.idx: cannot be read: No such file or directory"]
    (store / "shard-000000.tar").unlink()
    assert damaged(store, capsys) == ["shard-000000.tar: cannot be read: No such file or directory"]


def test_a_damaged_column_or_manifest_is_named(store, capsys):
    change(store / "index" / "offset.npy", 200, b"\1")
    code = data.main(["verify", str(store)])
    told = capsys.readouterr()
    said = told.out.removeprefix("damaged: ")
    assert code == 1
    assert told.err == f"error: {store}: index is damaged: copy or pack it again\n"
    assert said.startswith("index: data.root: ")
    assert "offset.npy is not what manifest.json says" in said
    (store / "manifest.json").write_text('{"format": "fastssl tar st')
    (said,) = damaged(store, capsys)
    assert said.startswith("manifest.json: data.root: ")


def test_decode_finds_what_was_damaged_before_it_was_packed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    source = folder_of_classes(tmp_path / "images")
    broken = bytearray(encoded(90, 90, "PNG"))
    broken[200:300] = bytes(100)
    (source / "class1" / "0.jpg").write_bytes(broken)
    pack(source, tmp_path / "store")
    capsys.readouterr()
    assert data.main(["verify", str(tmp_path / "store")]) == 0
    capsys.readouterr()

    (said,) = damaged(tmp_path / "store", capsys, "--decode", "--workers", "1")
    assert said.startswith("shard-000000.tar, image 6 (class1/0.jpg): cannot be decoded: ")


def test_what_cannot_be_decoded_though_as_it_was_packed_gets_a_remedy_that_works(
    store, tmp_path, capsys
):
    height = columns(store)["height"].copy()
    height[[2, 4]] += 1
    np.save(store / "index" / "height.npy", height)
    agree(store)
    change(store / "shard-000000.tar", int(columns(store)["offset"][4]) + 300, b"\x55\xaa")
    listed = tmp_path / "quarantine.jsonl"
    wanted = ["verify", str(store), "--decode", "--workers", "1"]

    assert data.main(wanted) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "1 tar and 1 images are damaged: copy or pack it again" in said
    assert "; 1 images cannot be decoded, though their bytes are those that were packed" in said
    assert "leave them out with data.quarantine=FILE, which --quarantine FILE writes\n" in said
    assert data.main([*wanted, "--quarantine", str(listed)]) == 1
    assert f"leave them out with data.quarantine={listed}\n" in capsys.readouterr().err
    options = tar.Options(root=str(store), quarantine=str(listed))
    samples = tar.list_samples(options, cache=None, say=lambda _: None)
    assert [*samples.bad] == [2, 4]
    assert samples.bad[2].startswith("quarantined: has 32 x 20 pixels")
    before = listed.read_bytes()
    assert data.main([*wanted, "--quarantine", str(listed)]) == 2
    assert "is there already: name another file" in capsys.readouterr().err
    assert listed.read_bytes() == before


def test_decode_compares_the_dimensions_with_the_index(store, capsys):
    height = columns(store)["height"].copy()
    height[2] += 1
    np.save(store / "index" / "height.npy", height)
    agree(store)
    assert data.main(["verify", str(store)]) == 0
    capsys.readouterr()

    assert damaged(store, capsys, "--decode", "--workers", "1") == [
        "shard-000000.tar, image 2 (class0/2.jpg): has 32 x 20 pixels, and the index says 32 x 21"
    ]


@pytest.mark.parametrize("more", [[], ["--decode", "--workers", "1"]])
@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.tar", "shard-000000.idx"])
def test_a_pipe_keeps_nobody_waiting(name, more, store, capsys):
    (store / name).unlink()
    os.mkfifo(store / name)

    (said,) = damaged(store, capsys, *more)
    assert said.startswith(f"{name}: ")
    assert "it is no regular file" in said


def test_only_the_formats_that_training_reads_are_given_to_pillow():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    gif = io.BytesIO()
    Image.new("L", (9, 9)).save(gif, "GIF")

    for content in (eps, gif.getvalue()):
        assert "cannot be decoded: " in str(store_verify._decoding(content, 9, 9))
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(content), formats=image_bytes.PILLOW_FORMATS)


def indexed(root: Path) -> Path:
    """Three images in a tar that others made."""
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as file:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            content = encoded(20, 20 + number, "PNG")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    assert data.main(["index", str(root), "--workers", "1"]) == 0
    return root


def test_an_index_that_gives_a_member_another_name_or_uses_it_twice_is_found(tmp_path, capsys):
    store = indexed(tmp_path / "tars")
    names = columns(store)["name"].copy()
    names[2] = ord("9")  # a/0.png
    np.save(store / "index" / "name.npy", names)
    agree(store)
    capsys.readouterr()
    (said,) = damaged(store, capsys)
    assert said.startswith("a.tar, image 0 (a/9.png): the member of the tar at byte 512 is 0.png")
    for name in ("offset", "size", "checksum", "width", "height"):
        column = columns(store)[name]
        np.save(store / "index" / f"{name}.npy", np.full_like(column, column[0]))
    agree(store)

    (said,) = damaged(store, capsys)
    assert "is wrong about image 1: it can't lie at 512 of shard 0" in said


ODD = (None, True, -1, 0, 0.0, 1e308, 10**30, 1 << 62, 1 << 40, "", "\0", "a\ud800", "../a", "a")
ODD += ([], {}, [[]], {"": 0}, "9" * 64, "manifest.json", ".", "a\nb", [1], ["a"], "\udcff")


def mutate(said: object, rng: np.random.Generator) -> object:
    """A value somewhere in it is another, or is gone."""
    if isinstance(said, dict | list) and said and rng.random() < 0.9:
        places = list(said) if isinstance(said, dict) else range(len(said))
        place = places[int(rng.integers(len(places)))]
        if rng.random() < 0.1:
            del said[place]
        else:
            said[place] = mutate(said[place], rng)
        return said
    return ODD[int(rng.integers(len(ODD)))]


def mutate_column(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    kind = int(rng.integers(5))
    if kind == 0:
        content = content[: int(rng.integers(len(content)))]
    elif kind in (1, 2):
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(128 if kind == 1 else len(content)))] = int(rng.integers(256))
    elif kind == 3:
        column = np.load(path).copy()
        limits = np.iinfo(column.dtype)
        column[int(rng.integers(len(column)))] = rng.choice([limits.min, limits.max, 0, 1])
        np.save(path, column)
        return
    else:
        shape, dtype = b"(%d,)" % 10 ** int(rng.integers(30)), rng.choice([b"|O", b"<f8", b"<i8"])
        said = b"{'descr': '%s', 'fortran_order': False, 'shape': %s}" % (dtype, shape)
        content[10:128] = said.ljust(117) + b"\n"
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["packed", "indexed"])
def test_no_mutation_of_manifest_or_index_leads_to_anything_but_a_named_error(
    kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if kind == "packed":
        pack(folder_of_classes(tmp_path / "images", classes=1, images=2), tmp_path / "whole")
        whole = tmp_path / "whole"
    else:
        whole = indexed(tmp_path / "whole")
    rng = np.random.default_rng(0)
    outcomes = set()
    lines: list[str] = []
    for number in range(100):
        store = shutil.copytree(whole, tmp_path / f"store{number}")
        if number % 2:
            mutate_column(store / "index" / f"{rng.choice([*tar_store.COLUMNS])}.npy", rng)
            agree(store)
        else:
            said = json.loads((store / "manifest.json").read_text())
            key = rng.choice([*said])
            write_manifest(store, said | {key: mutate(said[key], rng)})
        found = list(store_verify.damages(store, tar_store, workers=1, say=pytest.fail))
        assert all(str(each).isprintable() for each in found)
        try:
            tar.list_samples(tar.Options(root=str(store)), cache=None, say=lines.append)
            outcomes.add("read")
        except ValueError as error:
            told = str(error)
            outcomes.add("refused" if told.startswith("data.root: ") else told)
            assert found
        try:
            unpack.unpack(store, tmp_path / f"again{number}", max_pixels=10**6, workers=1)
            assert not found
            outcomes.add("unpacked")
        except ValueError as error:
            outcomes.add("refused" if str(store) in str(error) else str(error))
        shutil.rmtree(store)

    assert outcomes == {"read", "refused", "unpacked"}


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), forged=st.booleans())
def test_no_bit_of_a_tar_can_be_flipped_unseen(packed, tmp_path_factory, place, bit, forged):
    store = shutil.copytree(packed, tmp_path_factory.mktemp("flipped") / "store")
    path = store / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    if forged:
        agree(store)

    found = list(store_verify.damages(store, tar_store, workers=1, say=pytest.fail))
    shutil.rmtree(store.parent)
    assert found
    assert all(each.shard == 0 for each in found)
