"""`python -m benchmarks stores` runs end to end, with FFCV's place taken by a stand-in or empty."""

import shutil
from pathlib import Path

import pytest

from benchmarks import result, stores
from benchmarks.__main__ import main
from benchmarks.plain import ffcv
from pipelines.readers import folder

QUICK = ("--quick", "--images", "8", "--batch", "4", "--size", "32", "--threads", "1")


def test_every_store_is_measured_and_without_ffcv_a_line_says_so(
    demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ffcv, "find_spec", lambda name: None)
    out = tmp_path / "out.json"
    code = main(["stores", "--data", str(demo_images / "val"), *QUICK, "--out", str(out)])
    printed = capsys.readouterr().out
    made = result.read(out)

    assert code == 0
    assert printed.startswith("without FFCV: FFCV is not installed: ")
    assert [(row.group, row.name, row.unit) for row in made.rows] == [
        (store, "fastssl", "images/s")
        for store in ("files", "full", "long-400", "jpeg-292", "raw-256")
    ]
    assert all(row.values[0] > 0 and row.cpu_ms[0] > 0 for row in made.rows)
    assert made.settings["ffcv"] is None
    assert result.table(made.rows) in printed
    assert len(made.conclusions) == 4  # each packed form, to the files


def test_ffcv_is_measured_on_the_bytes_of_the_same_stores(
    demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ffcv, "find_spec", lambda name: name)
    monkeypatch.setattr(ffcv, "WORKER", Path(__file__).with_name("ffcv_stand_in.py"))
    out, data = tmp_path / "out.json", str(demo_images / "val")
    options = ["--stores", "jpeg-292", "raw-256", "--scratch", str(tmp_path)]
    code = main(["stores", "--data", data, *QUICK, *options, "--out", str(out)])
    made = result.read(out)

    assert code == 0
    assert [(row.group, row.name) for row in made.rows] == [
        ("jpeg-292", "fastssl"),
        ("jpeg-292", "ffcv"),
        ("raw-256", "fastssl"),
        ("raw-256", "ffcv"),
    ]
    assert "to FFCV" in made.rows[0].extra
    assert made.rows[3].extra["MB"] == pytest.approx(made.rows[2].extra["MB"])
    assert made.settings["ffcv"] == "1.0.2"
    assert made.manifest.machine["versions"]["ffcv"] == "1.0.2"  # pyright: ignore
    assert [line.partition(":")[0] for line in made.conclusions] == ["jpeg-292", "raw-256"]
    assert "times what FFCV makes of the same bytes; the goal, 1.0, is" in made.conclusions[0]
    assert list(tmp_path.iterdir()) == [out]


def test_a_damaged_image_is_left_out_of_what_is_shrunk_and_told(demo_images, tmp_path, capsys):
    source, listing = tmp_path / "images", sorted((demo_images / "val").glob("*/*.jpg"))[:3]
    source.mkdir()
    for path in listing:
        shutil.copy(path, source)
    broken = source / listing[1].name
    content = bytearray(broken.read_bytes())
    table = content.index(b"\xff\xc4") + 5  # of Huffman's codes: sizes and both ends stay whole
    content[table : table + 16] = bytes([255] * 16)
    broken.write_bytes(content)
    found = folder.list_samples(folder.Options(root=str(source)), cache=None, say=print)
    shrunk = stores._shrunk(found, tmp_path / "shrunk", 16)

    assert (len(found.usable), len(shrunk.usable)) == (3, 2)
    assert f"{broken} is left out: cannot be decoded: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "0"], "--batch (0) must be at least 1"),
        (["--scratch", "/nowhere"], "--scratch: there is no folder /nowhere"),
        (["--ffcv-python", "/nowhere"], "--ffcv-python: can't run /nowhere"),
        (["--data", "/nowhere/at/all"], "data.root: there is no folder /nowhere/at/all"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_packed(given, message, capsys, tmp_path):
    code = main(["stores", "--data", str(tmp_path), "--quick", *given])
    told = capsys.readouterr().err

    assert code == 2
    assert told.startswith(f"python -m benchmarks stores: {message}")
    assert told.count("\n") == 1
