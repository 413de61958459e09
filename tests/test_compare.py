"""A result that is worse is told from one that is only noisy, and exit codes say so."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, result
from benchmarks.__main__ import main
from benchmarks.result import Row


@pytest.fixture(scope="module")
def blank() -> result.Result:
    """A result of this machine without a row."""
    return result.make("scale", [], {"batch": 64})


@pytest.fixture
def judged(blank, tmp_path: Path, capsys):
    """Exit code and what was printed, for the rows of A and B."""

    def run(
        a: list[Row],
        b: list[Row],
        *options: str,
        changed: dict | None = None,
        benchmark: str = "scale",
    ):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        result.write(paths[0], blank.model_copy(update={"rows": a, "benchmark": benchmark}))
        result.write(paths[1], blank.model_copy(update={"rows": b, **(changed or {})}))
        code = main(["compare", *map(str, paths), *options])
        return code, capsys.readouterr().out

    return run


def row(values: list[float], unit: str = "images/s", name: str = "loader", **more) -> Row:
    return Row(name=name, unit=unit, values=values, **more)


STEADY = [99.0, 100.0, 101.0]


@pytest.mark.parametrize(
    ("unit", "values", "verdict"),
    [
        ("images/s", [89.0, 90.0, 91.0], "worse"),
        ("images/s", [109.0, 110.0, 111.0], "better"),
        ("images/s", [95.5, 96.0, 96.5], "same"),  # beyond noise, within the threshold
        ("images/s", [60.0, 90.0, 100.0], "same"),  # beyond the threshold, within noise
        ("megapixels/s", [89.0, 90.0, 91.0], "worse"),
        ("s", [109.0, 110.0, 111.0], "worse"),
        ("ms", [109.0, 110.0, 111.0], "worse"),
        ("MB", [109.0, 110.0, 111.0], "worse"),
        ("MB", [89.0, 90.0, 91.0], "better"),
        ("share", [50.0, 50.0, 50.0], "no direction"),
        ("images/s", [50.0, 51.0], "too few repeats"),
        ("MB", [0.0, 0.0, 0.0], "no ratio"),
    ],
)
def test_a_change_counts_beyond_noise_and_threshold_in_the_unit_s_direction(
    judged, unit, values, verdict
):
    code, printed = judged([row(STEADY, unit)], [row(values, unit)])

    assert f"| {verdict} |" in printed
    assert code == int(verdict == "worse")
    assert f"{code} of 1 quantities are worse by more than 5 % and by more than noise" in printed


def test_the_threshold_is_the_user_s(judged):
    slower = [row([89.0, 90.0, 91.0])]

    assert judged([row(STEADY)], slower, "--threshold", "15")[0] == 0
    assert judged([row(STEADY)], slower, "--threshold=0")[0] == 1


def test_cpu_time_is_compared_where_both_have_it(judged):
    cheap, dear = row(STEADY, cpu_ms=[5.0, 5.1, 5.2]), row(STEADY, cpu_ms=[9.0, 9.1, 9.2])
    code, printed = judged([cheap], [dear])

    assert code == 1
    assert "| loader | CPU ms/image | 5.1 (5 - 5.2) | 9.1 (9 - 9.2) | 1.784 (1." in printed
    assert judged([row(STEADY)], [dear])[0] == 0


def test_rows_are_matched_by_group_name_and_size(judged):
    def sized(size: int, seconds: float) -> Row:
        values = [seconds, seconds * 1.01, seconds * 1.02]
        return row(values, "s", name="listing", group="images", extra={"size": size})

    code, printed = judged(
        [sized(10, 1.0), sized(100, 10.0), row(STEADY, name="gone"), row(STEADY, name="unit")],
        [sized(100, 10.0), sized(10, 2.0), row(STEADY, name="new"), row(STEADY, "s", name="unit")],
    )

    assert code == 1
    assert "| images: listing 10 | s | 1.01 (1 - 1.02) | 2.02 (2 - 2.04) | 2.000 (" in printed
    assert "| images: listing 100 | s | 10.1 (10 - 10.2) | 10.1 (10 - 10.2) | 1.000 (" in printed
    assert "missing in B: gone\nnew in B: new\n" in printed
    assert printed.endswith("\nB lacks gone, unit\n")
    assert "not compared: unit is in images/s in A, in s in B" in printed


def test_another_machine_another_version_and_other_work_are_told(judged, blank):
    facts = dict(blank.manifest.machine)
    versions = facts["versions"] | {"torch": "1.0"}
    facts |= {"cpu": "abacus", "cores_allowed": 96, "versions": versions}
    changed = {
        "manifest": blank.manifest.model_copy(update={"machine": facts}),
        "settings": {"batch": 32, "note": "at night"},
    }
    _, printed = judged([row(STEADY)], [row(STEADY)], changed=changed)
    (machines,) = [line for line in printed.splitlines() if "machines" in line]

    assert machines.startswith("WARNING: machines or versions, not only code, are compared: cpu ")
    assert "-> abacus" in machines
    assert "-> 96" in machines
    assert "-> 1.0" in machines
    assert "WARNING: the work was another: batch 64 -> 32\n" in printed
    assert "WARNING" not in judged([row(STEADY)], [row(STEADY)])[1]


FASTER, SLOWER = [129.0, 130.0, 131.0], [69.0, 70.0, 71.0]


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        *(("tasks", name) for name in ("pil", "tuned", "ffcv", "bound", "decode_limit")),
        *(("stages", name) for name in ("decode_limit", "interference", "read_cold")),
        ("stores", "ffcv"),
    ],
)
def test_a_row_of_the_machine_or_of_other_people_s_code_is_told_and_not_judged(
    judged, benchmark, name
):
    ours = row(STEADY, name="fastssl" if benchmark != "stages" else "loader")
    both = [ours, row(STEADY, name=name)]
    slower = [ours, row(SLOWER, name=name)]
    changed = {"benchmark": benchmark}
    code, printed = judged(both, slower, changed=changed, benchmark=benchmark)

    assert f"not judged: {name} x0.70 in images/s\n" in printed
    assert f"| {name} |" not in printed
    if name != "decode_limit":  # of which others are a part
        assert code == 0
        assert "0 of 1 quantities are worse" in printed
    assert judged(both, [ours], changed=changed, benchmark=benchmark)[0] == 0


@pytest.mark.parametrize(
    ("ours", "limit", "verdict"),
    [
        (SLOWER, SLOWER, "same"),  # the machine was slower
        (FASTER, FASTER, "same"),
        (STEADY, FASTER, "worse"),  # the machine made up for it
        (STEADY, SLOWER, "better"),
    ],
)
def test_a_machine_that_is_slower_or_faster_cancels(judged, ours, limit, verdict):
    def rows(values: list[float], limits: list[float], **more) -> list[Row]:
        named = [row(values, name="fastssl", **more), row(limits, name="decode_limit")]
        return [each.model_copy(update={"group": "jigsaw"}) for each in named]

    before, after = rows(STEADY, STEADY), rows(ours, limit)
    code, printed = judged(before, after, changed={"benchmark": "tasks"}, benchmark="tasks")
    on_gpu = {"benchmark": "tasks", "settings": {"device": "cuda:0"}}
    raw = {70: "worse", 130: "better", 100: "same"}[int(ours[1])]

    assert f"| {verdict} |" in printed
    assert code == int(verdict == "worse")
    assert f"jigsaw: decode_limit x{limit[1] / 100:.2f} in images/s" in printed
    # there the limit, which is the CPU's, tells nothing
    assert f"| {raw} |" in judged(before, after, changed=on_gpu, benchmark="tasks")[1]


def test_what_tune_tried_only_once_is_not_missed(judged):
    both = [row(STEADY), row(STEADY, name="threads=2")]

    assert judged(both, [row(STEADY)])[0] == 1
    assert judged(both, [row(STEADY)], changed={"benchmark": "tune"}, benchmark="tune")[0] == 0


def test_many_rows_of_noise_are_called_worse_no_more_often_than_one():
    draw, files, alarms = np.random.default_rng(0), 100, 0
    for _ in range(files):
        rows = np.exp(0.1 * draw.standard_normal((40, 2, 3)))
        alarms += any(compare.holm([compare.chance_of_more(b, a) for a, b in rows]))

    assert alarms <= 0.1 * files  # 5, but for chance


def test_holm_asks_the_more_of_the_least_likely_the_more_there_are():
    assert compare.holm([0.03, 0.01, 0.02]) == [True, True, True]
    assert compare.holm([0.02, 0.02, 0.02]) == [False, False, False]
    assert compare.holm([0.2, 0.001, 0.04]) == [False, True, False]
    assert compare.holm([]) == []


@pytest.mark.parametrize(
    ("quantile", "chance"), [(0.0, 0.5), (2.132, 0.05), (4.604, 0.005), (-2.132, 0.95)]
)
def test_the_chance_is_student_s(quantile, chance):
    a = np.exp([-0.1, 0.0, 0.1])
    b = a * math.exp(quantile * 0.1 * math.sqrt(2 / 3))

    assert compare.chance_of_more(a.tolist(), b.tolist()) == pytest.approx(chance, rel=2e-3)
    assert compare.chance_of_more([2.0] * 3, [2.0] * 3) == 1
    assert compare.chance_of_more([2.0] * 3, [3.0] * 3) == 0
    assert compare.chance_of_more([2.0], [3.0]) == 1


@pytest.mark.parametrize(("a", "b"), [(3, 3), (2, 5), (4, 4), (5, 4), (5, 5), (6, 3)])
def test_noise_alone_is_called_a_change_at_most_once_in_twenty(a, b):
    values = [math.exp(rank) for rank in range(a + b)]
    below, orders = 0, list(combinations(range(a + b), a))
    for order in orders:  # all that chance can deal out, once each
        of_a = [values[place] for place in order]
        of_b = [value for value in values if value not in of_a]
        _, least, most, enough = compare.interval(of_a, of_b)
        below += most < 1

        assert enough == (len(orders) >= 20)
        assert least <= most
    assert below / len(orders) <= 0.05
    assert (below > 0) == (len(orders) >= 20)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (2, 3), (1, 18)])
def test_so_few_repeats_can_tell_nothing(a, b):
    assert not compare.interval([1.0] * a, [2.0] * b)[3]


def test_the_ratio_of_two_files_is_the_median_over_all_pairs():
    assert compare.interval([1.0, 2.0, 4.0], [4.0, 4.0, 8.0]) == (2.0, 1.0, 8.0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "b.json: can't be read (No such file or directory): write one with"),
        ("{", "b.json: Invalid JSON: "),
        ("[1]", "b.json: Input should be an object"),
        ('{"schema_version": 2}', "b.json: schema_version: Input should be 1: not a result of"),
        ('{"benchmark": "tasks"}', "b.json: settings: Field required: not a result of schema 1"),
    ],
)
def test_a_file_that_is_no_result_is_told_in_a_line(blank, text, message, tmp_path, capsys):
    result.write(tmp_path / "a.json", blank)
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    code = main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    (line,) = capsys.readouterr().err.splitlines()

    assert code == 2
    assert line.startswith("python -m benchmarks compare: ")
    assert message in line


@pytest.mark.parametrize(
    ("a", "b", "changed", "message"),
    [
        ([row(STEADY)], [row(STEADY)], {"benchmark": "tune"}, "is of scale, .* of tune: compare"),
        ([row(STEADY)], [row(STEADY, name="step")], {}, "have no row in common"),
        ([row(STEADY)] * 2, [row(STEADY)], {}, "two rows are called loader"),
    ],
)
def test_results_that_can_t_be_compared_are_refused(blank, a, b, changed, message, tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    result.write(paths[0], blank.model_copy(update={"rows": a}))
    result.write(paths[1], blank.model_copy(update={"rows": b, **changed}))
    arguments = compare.argparse.Namespace(a=paths[0], b=paths[1], threshold=5.0)

    with pytest.raises(ValueError, match=message):
        compare.main(arguments)


def test_a_threshold_of_a_hundred_percent_is_refused(tmp_path, capsys):
    assert main(["compare", "a", "b", "--threshold", "100"]) == 2
    assert "--threshold (100.0) must be from 0 to below 100" in capsys.readouterr().err
