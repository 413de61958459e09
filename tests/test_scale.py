import math
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import result, scale, scale_points
from benchmarks.__main__ import main
from benchmarks.result import Row
from benchmarks.scale_points import Point
from pipelines.readers import headers

QUICK = Point(size=300, repeats=3, least=0.001)


def rows(name: str, costs: dict[int, float]) -> list[Row]:
    return [
        Row(name=name, group="images", unit="s", values=[cost], extra={"size": size})
        for size, cost in costs.items()
    ]


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2, -1])
def test_the_slope_is_the_exponent(exponent):
    costs = {size: 3e-6 * size**exponent for size in (10, 100, 1000)}

    assert scale.slope(costs) == (pytest.approx(exponent), 10, 1000)


def test_fixed_costs_of_small_sizes_do_not_hide_the_slope():
    costs = {10**k: 1.0 + 1e-3 * 10**k for k in range(1, 9)}
    value, least, most = scale.slope(costs) or (0, 0, 0)

    assert (least, most) == (10**6, 10**8)
    assert value == pytest.approx(1, abs=0.01)


def test_a_cost_at_one_size_or_too_small_to_tell_has_no_slope():
    assert scale.slope({10: 1.0}) is None
    assert scale.slope({10: 0.0, 100: 0.0}) is None
    assert scale.slope({10: 0.0, 100: 1.0}) is None


def test_a_sentence_names_slope_shape_and_the_greatest_cost():
    linear = scale.slopes(rows("order of an epoch", {1000: 0.5, 10_000: 5.0}))
    square = scale.slopes(rows("pairs", {10: 1.0, 100: 100.0}))
    falling = scale.slopes(rows("luck", {10: 1.0, 100: 0.1}))

    assert linear == [
        "images, order of an epoch: slope 1.00 (linear) from 1,000 to 10,000; 5 s at 10,000."
    ]
    assert "(quadratic)" in square[0]
    assert "(falls)" in falling[0]


def test_the_command_measures_what_is_asked_and_writes_it(tmp_path, capsys):
    out = tmp_path / "scale.json"
    what = ["images", "entries", "bank", "negatives", "permutations", "patches"]
    code = main(["scale", *what, "--quick", "--threads=1", f"--out={out}", "--note=a test"])
    written = result.read(out)
    printed = capsys.readouterr().out

    assert code == 0, printed
    assert written.benchmark == "scale"
    assert list(dict.fromkeys(row.group for row in written.rows)) == what
    assert written.settings["what"] == what
    assert written.settings["note"] == "a test"
    keys = [(row.group, row.name, row.extra["size"]) for row in written.rows]
    assert len(set(keys)) == len(keys)
    assert result.table(written.rows) in printed
    assert all(sentence in printed for sentence in written.conclusions)
    names = {row.name for row in written.rows}
    assert {"order of an epoch", "listing, every header read", "lookup and update"} <= names
    assert {"entries, every header read", "entries kept, trust, seconds"} <= names
    assert {"set computed", "draw from all orders", "patches cut and coloured"} <= names


def test_processes_start_together_and_count_as_one(demo_images):
    given = {"size": 2, "repeats": 2, "seconds": 0.05, "least": 0.01, "threads": 2}
    rate, memory = scale._processes(given, [])

    assert (rate["unit"], len(rate["values"])) == ("images/s", 2)
    assert min(rate["values"]) > 0
    assert (memory["unit"], len(memory["values"])) == ("MB", 1)
    assert memory["values"][0] > 200


def test_a_point_that_fails_is_told_and_counts(capsys, monkeypatch):
    broken = scale.Series("permutations", "orders", (25,), (25,))  # no factorial
    monkeypatch.setattr(scale, "SERIES", (*scale.SERIES, broken))
    code = main(["scale", "permutations", "--quick", "--threads=1"])

    assert code == 1
    assert "permutations: 25 failed: " in capsys.readouterr().out


def test_a_process_that_fails_says_how_it_ended():
    with pytest.raises(RuntimeError, match=r"ended with 1: .*StopIteration"):
        scale._children("orders", [{"size": 25}])


@pytest.mark.parametrize(
    ("rounds", "message"), [(1, "not ready after 1 s"), (0, "not done after 1 s")]
)
def test_a_process_that_hangs_is_ended_and_its_files_are_removed(
    rounds, message, tmp_path, monkeypatch
):
    hangs, temporary = tmp_path / "hangs", tmp_path / "temporary"
    hangs.write_text(
        f"#!/bin/sh\ntouch $TMPDIR/left\necho $TMPDIR > {tmp_path}/used\nexec sleep 60"
    )
    hangs.chmod(0o755)
    temporary.mkdir()
    monkeypatch.setattr(scale, "sys", SimpleNamespace(executable=str(hangs)))
    monkeypatch.setattr(scale, "TIMEOUT", 1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(RuntimeError, match=message):
        scale._children("files", [{"size": 9}], rounds=rounds)

    assert (tmp_path / "used").read_text().startswith(f"{temporary}/fastssl-scale-")
    assert not list(temporary.iterdir())


def test_a_bank_that_does_not_fit_is_left_out_with_the_reason():
    assert scale._no_room("bank", 1000, "cpu") is None
    assert "GB needed" in (scale._no_room("bank", 10**13, "cpu") or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imges"], "imges: not of images, entries, bank, negatives"),
        (["processes", "--data=/nowhere/at/all"], "--data (/nowhere/at/all): there is no such"),
        (["images", "--repeats=2"], "--repeats (2) must be at least 3"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, capsys):
    code = main(["scale", *arguments])
    captured = capsys.readouterr()

    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_made_up_listings_have_names_of_their_own_in_sorted_order():
    samples = scale_points.listing(1234)
    names = [samples.names[row] for row in range(len(samples))]

    assert len(set(names)) == 1234
    assert names == sorted(names)
    assert names[-1] == b"n00000000/n00000000_000000001233.JPG"


def test_entries_are_links_of_one_image_and_are_found_again(tmp_path):
    point = Point(size=30, repeats=1, entries=str(tmp_path))
    found = {each.name: each for each in scale_points.entries(point)}
    files = list((tmp_path / "images-30").rglob("*.png"))

    assert len(files) == 30
    assert len({file.stat().st_ino for file in files}) == 1
    assert len(found["entries kept, of two processes, PSS"].values) == 2
    assert found["entries, every header read"].values[0] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache-30", "images-30"]


def test_the_tiny_file_is_a_real_image(tmp_path):
    path = tmp_path / "tiny.png"
    path.write_bytes(scale_points.tiny_png())

    assert headers.dimensions(str(path)) == (8, 8)
    assert np.asarray(Image.open(path)).shape == (8, 8)


def test_memory_is_what_a_call_adds_and_the_peak_what_it_needed_on_the_way(checkout, environ):
    # in a process of its own: the kernel may take from one that has grown large meanwhile
    measure = """
import numpy as np
from benchmarks import scale_points

def work():
    np.ones(25_000_000, np.uint8).sum()
    return np.ones(50_000_000, np.uint8)

(kept, _), peak = scale_points.peaked(lambda: (work(), np.ones(10)))
again, held = scale_points.held(work)
print(kept.nbytes, again.nbytes, peak, held)
"""
    command = [sys.executable, "-c", measure]
    said = subprocess.check_output(command, cwd=checkout, env=environ, text=True)
    kept, again, peak, held = map(float, said.split())

    assert kept == again == 50_000_000
    assert 45 < peak < 110
    assert 45 < held < 60


def test_every_repeat_gives_a_value():
    for what in ("images", "bank", "negatives", "patches"):
        point = Point(size=9, repeats=3, least=0.001) if what == "patches" else QUICK
        found = list(scale_points.POINTS[what](point))

        assert found
        assert all(math.isfinite(value) for each in found for value in each.values)
        assert max(len(each.values) for each in found) == 3
