"""`python -m fastssl.data index`: tars of others as a store; hostile and damaged ones refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import wds2idx

from fastssl import data, store_heads, tar_file, tar_index
from pipelines.readers import tar
from tests.packing import encoded, files, refused


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "tars"
    root.mkdir()
    return root


def add(path: Path, members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def opened(root: Path) -> tar.Samples:
    options = tar.Options(root=str(root), verify=True)
    return tar.list_samples(options, cache=None, say=pytest.fail)


def contents(samples: tar.Samples) -> list[bytes]:
    return [each.tobytes() for each in samples.content(samples.usable)]


@pytest.mark.parametrize(
    "kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_images_and_labels_of_any_tar_become_rows_in_the_order_of_tars_and_members(
    kind, tars, capsys
):
    images = [encoded(20 + k, 30) for k in range(4)]
    long = "long/" + "0123456789" * (8 if kind == tarfile.USTAR_FORMAT else 30)
    add(tars / "b.tar", {"0.jpg": images[2], "0.cls": b"2\n", "7.txt": b"a cat"}, kind)
    add(
        tars / "a.tar",
        {
            "x.cls": b"10",
            "x.png": encoded(9, 9, "PNG"),
            f"{long}.jpeg": images[1],
            f"{long}.cls": b"2",
        },
        kind,
    )
    before = files(tars)

    assert data.main(["index", str(tars), "--workers", "1"]) == 0
    samples = opened(tars)
    assert contents(samples) == [encoded(9, 9, "PNG"), images[1], images[2]]
    assert samples.classes == ("2", "10")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0, 0]
    assert samples.height.tolist() == [9, 21, 22]
    assert samples.width.tolist() == [9, 30, 30]
    assert [samples.path(row) for row in range(3)] == [
        f"{tars}/a/x.png", f"{tars}/a/{long}.jpeg", f"{tars}/b/0.jpg"
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert f"{tars}: 3 images in 2 tars, 2 classes, 0 left out" in said
    assert "1 other members" in said
    assert {
        name: content for name, content in files(tars).items() if name.endswith("tar")
    } == before
    assert data.main(["verify", str(tars)]) == 0


def test_labels_in_json_are_found_under_their_key(tars):
    add(
        tars / "a.tar",
        {
            **{"0.jpg": encoded(20, 20), "0.json": b'{"species": "cat"}'},
            **{"1.jpg": encoded(20, 21), "1.json": b'{"species": "ant"}'},
        },
    )

    assert data.main(["index", str(tars), "--label-key", "species", "--workers", "1"]) == 0
    samples = opened(tars)
    assert samples.classes == ("ant", "cat")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]


def test_bad_images_and_those_without_a_label_get_no_row_and_are_named(tars, capsys):
    large = encoded(200, 200)
    add(
        tars / "a.tar",
        {
            **{"0.jpg": b"no image", "0.cls": b"0", "1.jpg": large, "1.cls": b"1"},
            **{"2.jpg": encoded(20, 20), "2.cls": b"1", "3.jpg": encoded(20, 20)},
        },
    )

    options = ["--max-pixels", "10000", "--workers", "1"]
    assert data.main(["index", str(tars), *options]) == 0
    assert opened(tars).path(0) == f"{tars}/a/2.jpg"
    assert len(opened(tars)) == 1
    said = json.loads((tars / "manifest.json").read_text())["left_out"]
    assert said == {
        "a/0.jpg": "text, not an image",
        "a/1.jpg": "200 x 200 pixels, over data.max_pixels=10,000",
        "a/3.jpg": "no label, as others have",
    }
    assert "left out: a/0.jpg: text, not an image" in capsys.readouterr().out


def test_the_index_for_dali_is_what_its_own_script_writes(tars, tmp_path):
    add(
        tars / "a.tar",
        {"0.jpg": encoded(20, 20), "0.cls": b"1", "d/1.seg.png": b"1", ".hidden": b"2"},
    )
    assert data.main(["index", str(tars), "--workers", "1"]) == 0

    with wds2idx.IndexCreator(str(tars / "a.tar"), str(tmp_path / "theirs"), False) as creator:
        creator.create_index()
    assert (tars / "a.idx").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_indexed_store_is_unpacked_into_folders_of_its_classes(tars, tmp_path):
    image = encoded(20, 20)
    add(tars / "a.tar", {"d/0.jpg": image, "d/0.cls": b"4"})
    assert data.main(["index", str(tars), "--workers", "1"]) == 0

    assert data.main(["unpack", str(tars), str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == {"4/a/d/0.jpg": image}


def test_verify_names_the_damaged_image_of_an_indexed_tar(tars, capsys):
    add(tars / "a.tar", {"0.jpg": encoded(20, 20), "1.jpg": encoded(20, 21)})
    assert data.main(["index", str(tars), "--workers", "1"]) == 0
    offset = int(np.load(tars / "index" / "offset.npy")[1])
    with (tars / "a.tar").open("r+b") as file:
        file.seek(offset + 40)
        file.write(b"\x55\xaa")
    capsys.readouterr()

    assert data.main(["verify", str(tars)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("damaged: a.tar: has the SHA-256 ")
    assert said[1].startswith("damaged: a.tar, image 1 (a/1.jpg): its bytes are not those")


def test_names_are_kept_as_a_folder_would_have_them(tars, tmp_path):
    one, two = encoded(20, 20), encoded(20, 21)
    add(tars / "a.tar", {"./d//0.jpg": one, "d/0.cls": b"4", "./1.jpg": two, "./1.cls": b"4"})
    assert data.main(["index", str(tars), "--workers", "1"]) == 0

    assert data.main(["verify", str(tars)]) == 0
    assert data.main(["unpack", str(tars), str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == {"4/a/d/0.jpg": one, "4/a/1.jpg": two}


def test_labels_that_no_folder_can_be_called_by_are_none(tars):
    add(
        tars / "a.tar",
        {
            **{"0.jpg": encoded(20, 20), "0.json": b'{"label": "\\ud800"}'},
            **{"1.jpg": encoded(20, 21), "1.json": b'{"label": "a\\u0000"}'},
            **{"2.jpg": encoded(20, 22), "2.json": b'{"label": "cat"}'},
        },
    )

    assert data.main(["index", str(tars), "--workers", "1"]) == 0
    assert opened(tars).classes == ("cat",)
    assert len(opened(tars)) == 1


def test_a_member_that_no_image_can_be_is_left_out_unread(tars):
    add(tars / "a.tar", {"1.jpg": encoded(20, 20)})
    image = (tars / "a.tar").read_bytes()[: 512 + -(-len(encoded(20, 20)) // 512) * 512]
    size = 70_000_000
    (tars / "a.tar").write_bytes(image + sized(tarfile.REGTYPE, size))
    os.truncate(tars / "a.tar", len(image) + 512 + size + -size % 512 + 1024)  # a few kB on disk

    options = ["--max-pixels", "10000", "--workers", "1"]
    assert data.main(["index", str(tars), *options]) == 0
    assert json.loads((tars / "manifest.json").read_text())["left_out"] == {
        "a/0.jpg": "70,000,000 bytes, more than an image of data.max_pixels=10,000 can need"
    }


def test_want_of_memory_is_one_line(tars, monkeypatch):
    def full(*_):
        raise MemoryError

    add(tars / "a.tar", {"0.jpg": encoded(20, 20)})
    monkeypatch.setattr(tar_file, "read", full)

    said = tar_index.look(tars / "a.tar", label_key="label", max_pixels=10_000)
    assert said == (
        "not enough memory for one of its images: give fewer --workers, or less --max-pixels"
    )


def test_an_image_is_read_whole_however_few_bytes_the_kernel_gives_at_a_time(tars, monkeypatch):
    add(tars / "a.tar", {"0.bmp": encoded(40, 40, "BMP"), "0.cls": b"1"})
    whole = tar_index.look(tars / "a.tar", label_key="label", max_pixels=10_000)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 1000), at))

    found = tar_index.look(tars / "a.tar", label_key="label", max_pixels=10_000)
    assert isinstance(found, tar_index.Found)
    assert isinstance(whole, tar_index.Found)
    np.testing.assert_array_equal(found.numbers, whole.numbers)
    with (tars / "a.tar").open("rb") as file:
        content = (tars / "a.tar").read_bytes()
        assert tar_file.read(file.fileno(), 100, 4000) == content[100:4100]
        with pytest.raises(ValueError, match=r"^is cut off: 2,500 of its 4,000 bytes are there$"):
            tar_file.read(file.fileno(), len(content) - 2500, 4000)


# What is refused


def test_two_at_once_leave_the_index_of_the_first(tars, capsys, monkeypatch):
    add(tars / "a.tar", {"0.jpg": encoded(20, 20)})
    write = store_heads.write_manifest
    said: list[str] = []

    def meanwhile(*given) -> None:
        said.append(refused(capsys, "index", tars, "--workers", "1"))
        write(*given)

    monkeypatch.setattr(store_heads, "write_manifest", meanwhile)
    assert data.main(["index", str(tars), "--workers", "1"]) == 0
    assert said == [f"{tars} is being indexed by another process: wait for it"]
    assert data.main(["verify", str(tars)]) == 0


def test_what_another_made_meanwhile_is_not_removed(tars, capsys, monkeypatch):
    add(tars / "a.tar", {"0.jpg": encoded(20, 20)})

    def meanwhile(folder: Path, *_) -> None:
        folder.mkdir()
        (folder / "mine").touch()
        raise FileExistsError(17, "File exists", str(folder))

    monkeypatch.setattr(store_heads, "write_index", meanwhile)
    assert "File exists" in refused(capsys, "index", tars, "--workers", "1")
    assert sorted(files(tars)) == ["a.tar", "index/mine"]


def test_one_number_written_in_two_ways_is_refused(tars, capsys):
    add(
        tars / "a.tar",
        {"0.jpg": encoded(20, 20), "0.cls": b"1", "1.jpg": encoded(20, 20), "1.cls": b"01"},
    )

    assert refused(capsys, "index", tars, "--workers", "1") == (
        "the labels 01 and 1 are the same number: write it in one way in all tars"
    )


def test_what_is_there_is_not_overwritten(tars, capsys):
    add(tars / "a.tar", {"0.jpg": encoded(20, 20)})
    (tars / "a.idx").write_text("mine")
    said = refused(capsys, "index", tars, "--workers", "1")
    assert said == f"{tars}/a.idx is there and is no index of its tar: remove it"
    assert sorted(files(tars)) == ["a.idx", "a.tar"]
    (tars / "a.idx").unlink()
    assert data.main(["index", str(tars), "--workers", "1"]) == 0
    before = files(tars)

    said = refused(capsys, "index", tars)
    assert said == f"{tars}/manifest.json is there already: it has an index, or remove it"
    assert files(tars) == before


def test_folders_without_tars_are_told_what_they_lack(tars, capsys):
    assert refused(capsys, "index", tars / "none") == f"{tars}/none: there is no such folder"
    assert refused(capsys, "index", tars) == f"{tars} holds no tars"
    (tars / "a.tar.gz").write_bytes(b"")
    assert refused(capsys, "index", tars) == (
        f"{tars} holds no tars, but a.tar.gz: a compressed tar has no places, unpack it"
    )
    add(tars / "a.tar", {"0.txt": b"none"})
    assert refused(capsys, "index", tars, "--workers", "1") == f"{tars}: not one image in 1 tar"


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    ("hostile", "called"),
    [
        (member("/etc/cron.d/evil.jpg"), "leads out of the folder that it would be unpacked to"),
        (member("a/../../evil.jpg"), "leads out of the folder that it would be unpacked to"),
        (member("0.jpg", tarfile.SYMTYPE), "0.jpg in it is a link, which is not read"),
        (member("0.jpg", tarfile.LNKTYPE), "0.jpg in it is a hard link, which is not read"),
        (member("0.jpg", tarfile.CHRTYPE), "0.jpg in it is a device, which is not read"),
        (member("0.jpg", tarfile.BLKTYPE), "0.jpg in it is a device, which is not read"),
        (member("0.jpg", tarfile.FIFOTYPE), "0.jpg in it is a pipe, which is not read"),
        (member("0.jpg", size=10**6), "0.jpg in it ends behind the tar's end: cut off"),
        (member("0.jpg", size=8**11 + 10**6), "0.jpg in it ends behind the tar's end: cut off"),
    ],
)
def test_hostile_members_are_refused_and_nothing_is_written(hostile, called, tars, capsys):
    add(tars / "a.tar", {"1.jpg": encoded(20, 20)})
    good = (tars / "a.tar").read_bytes()[: 512 + len(encoded(20, 20)) // 512 * 512 + 512]
    with (tars / "b.tar").open("wb") as file:
        file.write(good + hostile.tobuf(tarfile.GNU_FORMAT) + bytes(1024))

    said = refused(capsys, "index", tars, "--workers", "1")
    assert said.startswith(f"{tars}/b.tar: ")
    assert called in said
    assert sorted(files(tars)) == ["a.tar", "b.tar"]


def sized(kind: bytes, size: int) -> bytes:
    """A header with a size in GNU's base 256."""
    block = bytearray(member("0.jpg", kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % (1 << 96) | (0 if size < 0 else 1 << 95)).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("first", [True, False])
def test_a_size_below_zero_does_not_go_round_in_circles(kind, first, tars):
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as file:
        file.addfile(member("1.jpg"))
    start = b"" if first else good.getvalue()[:512]
    # tarfile of old never ends on it
    (tars / "a.tar").write_bytes(start + sized(kind, -512) + bytes(10240))

    with pytest.raises(ValueError, match="no tar that can be read"):
        list(tar_file.members(tars / "a.tar"))


@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"X", b"S", b"5"])
@pytest.mark.parametrize("size", [1 << 60, 1 << 80, 2 << 20])
def test_sizes_that_no_memory_holds_are_refused(kind, size, tars):
    (tars / "a.tar").write_bytes(sized(kind, size) + bytes(10240))

    if kind == b"5":  # a folder's says nothing
        assert list(tar_file.members(tars / "a.tar")) == []
        return
    with pytest.raises(ValueError, match=r"no tar that can be read|cut off|is a sparse file"):
        list(tar_file.members(tars / "a.tar"))


def test_a_sparse_file_of_pax_is_refused_by_our_own_words(tars):
    with tarfile.open(tars / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        info = member("0.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,x"}
        file.addfile(info)

    with pytest.raises(ValueError, match="no tar that can be read: invalid literal"):
        list(tar_file.members(tars / "a.tar"))


def test_a_zero_byte_in_a_name_is_refused(tars, capsys):
    with tarfile.open(tars / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        info = member("0.jpg")
        info.pax_headers = {"path": "a\0.jpg"}
        file.addfile(info)

    assert "a\\x00.jpg' in it has a zero byte" in refused(capsys, "index", tars, "--workers", "1")


def test_a_pax_size_below_zero_is_refused(tars):
    path = tars / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info = member("0.jpg")
        info.pax_headers = {"size": "-1536"}
        file.addfile(info)

    with pytest.raises(ValueError, match=r"cut off|no tar"):
        list(tar_file.members(path))


def test_damage_in_the_midst_of_a_tar_is_no_end(tars):
    path = tars / "a.tar"
    add(path, {f"{k}.jpg": encoded(20, 20) for k in range(5)})
    with tarfile.open(path) as file:
        third = file.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged at byte {third:,}: no header of a member"):
        list(tar_file.members(path))
    os.truncate(path, third + 100)

    with pytest.raises(ValueError, match=r"damaged at byte|no tar that can be read"):
        list(tar_file.members(path))


def test_no_mutation_of_a_tar_leads_to_anything_but_members_or_a_named_error(tmp_path):
    add(tmp_path / "a.tar", {f"{k}.jpg": b"x" * 700 for k in range(3)}, tarfile.PAX_FORMAT)
    add(tmp_path / "b.tar", {"n" * 200: b"x" * 700, "b.jpg": b"y" * 10})
    rng = np.random.default_rng(0)
    outcomes = set()
    for name in ("a.tar", "b.tar"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(int(rng.integers(1, 6))):
                at = int(rng.integers(0, 4096))
                content[at % len(content)] = int(rng.integers(0, 256))
            if rng.random() < 0.3:
                size = int(rng.choice([-1, 1])) << int(rng.integers(0, 90))
                head = sized(bytes([rng.choice([*b"0LKxgXS5"])]), size)
                at = 512 * int(rng.integers(0, 4))
                content[at : at + 512] = head
            path = tmp_path / "mutated.tar"
            path.write_bytes(content[: int(rng.integers(1, len(content) + 1))])
            try:
                found = list(tar_file.members(path))
                size = path.stat().st_size
                assert all(0 <= each.offset <= each.offset + each.size <= size for each in found)
                outcomes.add("members")
            except ValueError:
                outcomes.add("refused")
    assert outcomes == {"members", "refused"}


def test_an_index_that_cannot_be_written_leaves_the_tars_alone(small_disk, capsys):
    add(small_disk / "a.tar", {f"{k:0200}.jpg": encoded(20, 20) for k in range(100)})
    with (small_disk / "fill").open("wb", buffering=0) as file:
        assert file.write(bytes(1 << 20)) < 1 << 20  # as much as there is room for
    before = sorted(files(small_disk))

    said = refused(capsys, "index", small_disk, "--workers", "1")
    assert "No space left on device" in said
    assert sorted(files(small_disk)) == before
