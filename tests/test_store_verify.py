"""`python -m fastssl.data verify`: every damaged tar and image is named, whatever is damaged."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import data, store_verify, tar_file
from pipelines.readers import tar_store
from tests.packing import encoded, folder_of_classes, pack


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


def sealed(store: Path) -> None:
    """Has the manifest say what the tar and the index are now, as one who means harm would."""
    path = store / "manifest.json"
    said = json.loads(path.read_text())
    for shard in said["shards"]:
        shard["bytes"] = (store / shard["name"]).stat().st_size
        shard["sha256"] = tar_store.sha256_of(str(store / shard["name"]))
    for name in said["index"]:
        said["index"][name] = tar_store.sha256_of(str(store / "index" / f"{name}.npy"))
    path.write_text(json.dumps(said))


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
    sealed(store)

    assert damaged(store, capsys) == [
        "shard-000000.tar, image 5 (class0/more.png): what is around it in the tar is not as it"
        " was packed"
    ]


def test_a_link_in_the_place_of_an_image_is_called_one(store, capsys):
    offset = int(columns(store)["offset"][5])
    link = tarfile.TarInfo("000000000005.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    change(store / "shard-000000.tar", offset - 512, link.tobuf(tarfile.USTAR_FORMAT))
    sealed(store)

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
    sealed(store)

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
    (said,) = damaged(store, capsys)
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


def test_decode_compares_the_dimensions_with_the_index(store, capsys):
    height = columns(store)["height"].copy()
    height[2] += 1
    np.save(store / "index" / "height.npy", height)
    sealed(store)
    assert data.main(["verify", str(store)]) == 0
    capsys.readouterr()

    assert damaged(store, capsys, "--decode", "--workers", "1") == [
        "shard-000000.tar, image 2 (class0/2.jpg): has 32 x 20 pixels, and the index says 32 x 21"
    ]


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), forged=st.booleans())
def test_no_bit_of_a_tar_can_be_flipped_unseen(packed, tmp_path_factory, place, bit, forged):
    store = shutil.copytree(packed, tmp_path_factory.mktemp("flipped") / "store")
    path = store / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    if forged:
        sealed(store)

    found = list(store_verify.damages(store, tar_store, workers=1, say=pytest.fail))
    shutil.rmtree(store.parent)
    assert found
    assert all(each.shard == 0 for each in found)
