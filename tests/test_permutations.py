"""Sets of orders: far apart, nested, the same everywhere, kept on file."""

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from fastssl import demo
from fastssl.permutations import main
from pipelines.permutations import cache_folder, distances, file_of, permutation_set

KEPT = 300  # orders of 9 cells: enough to be worth a file


def slow_set(cells: int, count: int, distance: str) -> list[tuple[int, ...]]:
    """The definition, word by word; of equals the first by random numbers from seed 0."""
    candidates = list(permutations(range(cells)))
    chosen = [candidates[0]]
    keys = np.random.Philox(0).random_raw(len(candidates)).tolist()
    candidates = [each for _, each in sorted(zip(keys, candidates, strict=True))]
    while len(chosen) < count:
        best, farthest = None, -1.0
        for each in candidates:
            if each in chosen:
                continue
            apart = [sum(a != b for a, b in zip(each, other, strict=True)) for other in chosen]
            score = sum(apart) / len(apart) if distance == "mean" else min(apart)
            if score > farthest + 1e-9:
                best, farthest = each, score
        assert best is not None
        chosen.append(best)
    return chosen


def slow_distances(orders: np.ndarray) -> tuple[float, int]:
    apart = (orders[:, None] != orders[None]).sum(axis=-1)[~np.eye(len(orders), dtype=bool)]
    return float(apart.mean()), int(apart.min())


@pytest.mark.parametrize("distance", ["mean", "min"])
@pytest.mark.parametrize(("cells", "count"), [(2, 2), (4, 24), (5, 30)])
def test_a_set_is_what_the_slow_definition_gives(cells, count, distance):
    orders = permutation_set(cells, count, distance)

    assert [tuple(order) for order in orders.tolist()] == slow_set(cells, count, distance)
    assert orders.dtype == np.int32


@pytest.mark.parametrize(
    ("distance", "count", "mean", "least"),
    # greedy sets measured elsewhere: 8.32, 8.08 and at least 2; 8.17, 8.02 with 7 and 6
    [("mean", 24, 8.315, 5), ("mean", 100, 8.08, 3), ("min", 24, 8.17, 7), ("min", 100, 8.02, 6)],
)
def test_orders_of_nine_cells_are_far_apart(distance, count, mean, least):
    orders = permutation_set(9, count, distance)

    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (count, 1)))
    assert slow_distances(orders)[0] >= mean
    assert slow_distances(orders)[1] >= least


def test_the_distances_of_a_set_are_those_of_all_its_pairs():
    orders = permutation_set(9, 60, "min")
    mean, least = distances(orders)

    assert (mean, least) == pytest.approx(slow_distances(orders), abs=1e-12)


def test_a_set_begins_a_longer_one():
    np.testing.assert_array_equal(permutation_set(9, 40), permutation_set(9, 24 + 40)[:40])


def test_every_process_finds_the_same_set(checkout, environ):
    code = (
        "from pipelines.permutations import permutation_set;"
        "print(permutation_set(9, 30, 'min').tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environ, capture_output=True, check=True
    )

    assert found.stdout.decode().strip() == str(permutation_set(9, 30, "min").tolist())


def test_a_long_set_is_kept_on_file_and_read_from_there(tmp_path):
    found = permutation_set(9, KEPT, "mean", tmp_path)
    path = file_of(9, "mean", tmp_path)
    assert path is not None
    kept = np.load(path)
    np.testing.assert_array_equal(kept, found)
    np.save(path, kept[::-1])  # a set that only the file can have told

    again = permutation_set(9, KEPT, "mean", tmp_path)
    np.testing.assert_array_equal(again, found[::-1])
    np.testing.assert_array_equal(permutation_set(9, KEPT - 5, "mean", tmp_path), again[:-5])
    assert [each.name for each in path.parent.iterdir()] == ["9-mean.npy"]


def test_a_longer_set_takes_the_place_of_a_shorter(tmp_path):
    permutation_set(9, KEPT, "min", tmp_path)
    longer = permutation_set(9, KEPT + 10, "min", tmp_path)
    path = file_of(9, "min", tmp_path)
    assert path is not None

    np.testing.assert_array_equal(np.load(path), longer)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_order_no_permutation(path: Path) -> None:
    kept = np.load(path)
    kept[17, 3] = kept[17, 4]
    np.save(path, kept)


def one_order_twice(path: Path) -> None:
    kept = np.load(path)
    kept[17] = kept[16]
    np.save(path, kept)


def of_other_cells(path: Path) -> None:
    np.save(path, permutation_set(4, 24).astype(np.uint8))


@pytest.mark.parametrize(
    "damage", [cut_short, emptied, one_order_no_permutation, one_order_twice, of_other_cells]
)
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    found = permutation_set(9, KEPT, "mean", tmp_path)
    path = file_of(9, "mean", tmp_path)
    assert path is not None
    damage(path)

    np.testing.assert_array_equal(permutation_set(9, KEPT, "mean", tmp_path), found)
    np.testing.assert_array_equal(np.load(path), found)


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("in the way")

    assert len(permutation_set(9, KEPT, "mean", tmp_path / "file")) == KEPT
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_short_set_leaves_no_file(tmp_path):
    permutation_set(9, 24, "mean", tmp_path)

    assert not list(tmp_path.iterdir())


def test_processes_at_once_share_one_whole_file(tmp_path, checkout, environ):
    code = (
        "from pathlib import Path; from pipelines.permutations import permutation_set;"
        f"print(permutation_set(9, {KEPT}, 'mean', Path({str(tmp_path)!r}))[-1])"
    )
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, cwd=checkout, env=environ, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    last = {each.communicate()[0] for each in started}
    path = file_of(9, "mean", tmp_path)
    assert path is not None

    assert last == {f"{permutation_set(9, KEPT, 'mean', tmp_path)[-1]}\n".encode()}
    assert [each.returncode for each in started] == [0, 0, 0]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "variables",
    [
        {"FASTSSL_CACHE": "/somewhere"},
        {"FASTSSL_CACHE": "~/elsewhere"},
        {"XDG_CACHE_HOME": "/users"},
        {"FASTSSL_CACHE": "", "XDG_CACHE_HOME": ""},
        {},
    ],
)
def test_the_cache_is_where_the_library_has_its_own(variables, monkeypatch):
    for name in ("FASTSSL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert cache_folder() == demo.cache()


def test_without_a_home_folder_nothing_is_kept(monkeypatch):
    for name in ("FASTSSL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # a user whom the system does not know

    assert cache_folder() is None
    assert file_of(9, "mean") is None
    assert len(permutation_set(9, KEPT)) == KEPT


@pytest.mark.parametrize(
    ("cells", "count", "message"),
    [
        (4, 25, r"permutations \(25\) must be in 1 ... 24"),
        (9, 0, r"permutations \(0\) must be in 1 ... 362880"),
        (16, 10, r"cells \(16\) must be in 2 ... 9"),
    ],
)
def test_a_set_that_does_not_exist_is_refused(cells, count, message):
    with pytest.raises(ValueError, match=message):
        permutation_set(cells, count)


def test_the_command_tells_the_distances_and_where_the_set_lies(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path))
    code = main([str(KEPT), "--distance", "min", "--out", str(tmp_path / "new/set.npy")])
    said = capsys.readouterr().out

    orders = permutation_set(9, KEPT, "min")
    mean, least = slow_distances(orders)
    assert code == 0
    assert f"{KEPT} orders of 9 cells" in said
    assert f"mean {mean:.4f}, least {least}" in said
    assert f"cached in {tmp_path}/permutations-v1/9-min.npy" in said
    np.testing.assert_array_equal(np.load(tmp_path / "new/set.npy"), orders)


def test_the_command_writes_text(capsys, tmp_path):
    code = main(["24", "--cells", "4", "--out", str(tmp_path / "set.txt")])

    assert code == 0
    assert "cached" not in capsys.readouterr().out  # a small set is not worth a file
    np.testing.assert_array_equal(
        np.loadtxt(tmp_path / "set.txt", dtype=int), permutation_set(4, 24)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["25", "--cells", "4"], "permutations (25) must be in 1 ... 24"),
        (["5", "--cells", "10"], "cells (10) must be in 2 ... 9"),
        (["5", "--out", "/proc/no/set.npy"], "/proc/no"),
        (["5", "--out", "set.bin"], "--out set.bin: give a name that ends in .npy or .txt"),
    ],
)
def test_the_command_refuses_on_one_line(arguments, message, capsys):
    code = main(arguments)
    said = capsys.readouterr()

    assert code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out or "orders" in said.out


def test_one_order_is_no_pair(capsys):
    assert main(["1"]) == 0
    assert "distance of two" not in capsys.readouterr().out
