"""Tuning: halving finds the fastest, a failure is a row, the block is one that a recipe takes."""

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import halving, method, result, tune
from benchmarks.__main__ import main
from benchmarks.halving import Failed, Turn
from benchmarks.tune_loaders import Images, settings_asked_for, short_turn
from benchmarks.tune_verdict import block, judge, overrides
from fastssl import config
from fastssl.loader import Options

# A reader whose images can't be used in one way, as a GPU that lacks memory or a decoder.
READER = """
from pipelines.readers.folder import Options, list_samples
from pipelines.readers import folder

def source(samples, rows, decoding):
    if not decoding.region:
        raise RuntimeError("Error: no room for whole images (a stand-in)")
    return folder.source(samples, rows, decoding)
"""


class Work:
    """Contenders whose speed is the work that an image takes, counted, on a clock of their own."""

    def __init__(self, work: dict[str, int], fails: str | None = None) -> None:
        self.work, self.fails = work, fails
        self.now = 0.0
        self.turns: list[tuple[str, float]] = []

    def measure(self, name: str, seconds: float) -> Turn:
        self.turns.append((name, seconds))
        if name == self.fails:
            raise Failed(name, "out of memory")
        self.now += seconds
        images = int(1000 * seconds / self.work[name])  # a short turn rounds more away
        return Turn(images / seconds, float(self.work[name]))

    def halve(self, until: float = 1e9, **settings) -> halving.Search[str]:
        return halving.halve(
            list(self.work),
            self.measure,
            until=until,
            draw=random.Random(0),
            clock=lambda: self.now,
            **{"keep": 3, "seconds": 1.0, **settings},
        )


def measured(*rates: float) -> method.Measured:
    return method.Measured(list(rates), [1.0] * len(rates), {"p50": 1.0}, 10)


def loading(path: Path | str, *given: str) -> Options:
    return config.load(path, given).loader


# ---- Halving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", ["a", "h", "p"])
def test_halving_finds_the_fastest_wherever_it_stands(fastest):
    work = {name: 20 + number for number, name in enumerate("abcdefghijklmnop")} | {fastest: 11}
    search = Work(work).halve()

    assert search.best == sorted(work, key=work.__getitem__)[:3]
    assert search.best[0] == fastest


def test_each_round_has_the_better_half_and_turns_twice_as_long():
    contenders = Work({name: 10 + number for number, name in enumerate("abcdefghijklmnop")})
    search = contenders.halve()

    assert [len(turns) for turns in search.rounds] == [16, 8, 4]
    assert [seconds for _, seconds in contenders.turns] == [1.0] * 16 + [2.0] * 8 + [4.0] * 4
    assert set(search.rounds[1]) == set("abcdefgh")
    assert [name for name, _ in contenders.turns[:16]] != sorted(contenders.work)


def test_a_candidate_that_fails_is_told_and_the_others_go_on():
    contenders = Work({name: 10 + number for number, name in enumerate("abcdefgh")}, fails="a")
    search = contenders.halve()

    assert search.rounds[0]["a"] == "out of memory"
    assert all("a" not in turns for turns in search.rounds[1:])
    assert search.best == ["b", "c", "d"]


def test_no_turn_begins_after_the_time_and_the_measured_ones_count():
    contenders = Work({name: 10 + number for number, name in enumerate("abcdefgh")})
    search = contenders.halve(until=5.0)

    assert len(contenders.turns) == 5
    assert search.best == sorted(name for name, _ in contenders.turns)[:3]


def test_a_machine_too_slow_for_the_time_still_compares_a_few():
    contenders = Work({name: 10 + number for number, name in enumerate("abcdefgh")})
    search = contenders.halve(until=-1.0)

    assert len(contenders.turns) == 3
    assert search.best == sorted(name for name, _ in contenders.turns)


def test_as_many_are_tried_as_the_time_allows():
    plan = {"keep": 3, "overhead": 0.5, "least": 0.5}

    assert halving.plan(18, 1000, **plan)[0] == 18
    few, turn = halving.plan(18, 20, **plan)
    assert 3 <= few < 18
    assert turn >= 0.5
    assert halving.plan(18, -1, **plan) == (3, 0.5)


# ---- What is tried ------------------------------------------------------------------------------


def test_the_present_settings_come_first_then_those_that_differ_in_one_thing():
    present = Options(threads=2)
    every = tune.candidates(
        present, cores=2, asked={"region"}, engines=False, draw=random.Random(0)
    )

    assert every[0] == present
    assert len(set(every)) == len(every) == 3 * 3 * 2
    assert {each.threads for each in every} == {1, 2, 3}
    assert {each.prefetch for each in every} == {1, 2, 4}
    near = every[1:6]
    assert set(near) == {
        *(replace(present, threads=n) for n in (1, 3)),
        *(replace(present, prefetch=n) for n in (1, 4)),
        replace(present, region=False),
    }


def test_a_gpu_is_asked_who_decodes_and_how_much_its_engines_take():
    asked = {"decoder", "hw_decoder_load"}
    present = Options(threads=16)
    with_engines, without = (
        tune.candidates(present, cores=16, asked=asked, engines=engines, draw=random.Random(0))
        for engines in (True, False)
    )

    assert {each.hw_decoder_load for each in with_engines} == {0.0, 0.35, 0.65, 0.9}
    assert {each.decoder for each in with_engines} == {"auto", "cpu"}
    assert {each.hw_decoder_load for each in without} == {0.65}
    assert {each.threads for each in without} == {1, 2, 4, 8, 12, 15, 16, 17}
    assert len(tune.named(with_engines)) == len(set(tune.named(with_engines).values()))


# ---- Real loaders -------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path, demo_images) -> Path:
    """A dozen images."""
    for number, file in enumerate(sorted((demo_images / "val" / "fish").iterdir())[:12]):
        shutil.copy(file, tmp_path / f"{number:02d}.jpg")
    return tmp_path


def images_of(checkout: Path, name: str, root: Path) -> Images:
    recipe = config.load(checkout / "recipes" / f"{name}.yaml", [f"data.root={root}"])
    return Images(recipe, until=time.perf_counter() + 60)


@pytest.mark.parametrize(("name", "asked"), [("supervised", {"region"}), ("pirl_jigsaw", set())])
def test_only_settings_that_the_graph_looks_at_are_tried(name, asked, few, checkout):
    assert settings_asked_for(images_of(checkout, name, few)) == asked


def test_a_file_that_goes_away_is_told_once_and_left_out(few, checkout, capsys):
    images = images_of(checkout, "supervised", few)
    (few / "05.jpg").unlink()
    turns = [short_turn(images, Options(threads=n), batch=4, seconds=0.01, name="") for n in (1, 2)]

    assert capsys.readouterr().out.count("05.jpg from now on") == 1
    assert sorted(images.rows) == [row for row in range(12) if row != 5]
    assert all(turn.rate > 0 and turn.cpu_ms > 0 for turn in turns)


# ---- The verdict --------------------------------------------------------------------------------

PRESENT, OTHER = Options(threads=2), Options(threads=3)
NAMES = {PRESENT: "threads=2", OTHER: "threads=3"}


def test_a_win_in_all_rounds_is_taken_and_says_by_how_much():
    verdict = judge(
        PRESENT,
        {PRESENT: measured(100, 90, 100, 80, 100), OTHER: measured(110, 99, 120, 88, 105)},
        NAMES,
    )

    assert verdict.recommended == verdict.winner == OTHER
    assert verdict.share == 1
    assert verdict.ratio == pytest.approx((1.1, 1.05, 1.2))
    assert "5 of 5 rounds, with 1.100 (1.050 - 1.200) times their images/s: take it" in (
        verdict.sentence
    )
    assert "up to 1 of 32 finals" in verdict.sentence


def test_the_best_of_three_has_luck_three_times_as_often():
    others = [replace(PRESENT, prefetch=ahead) for ahead in (1, 3, 4)]
    rates = {PRESENT: measured(*[100] * 5)} | {each: measured(*[110] * 5) for each in others}
    verdict = judge(PRESENT, rates, {each: str(each.prefetch) for each in rates})

    assert verdict.recommended in others
    assert "up to 3 of 32 finals" in verdict.sentence


@pytest.mark.parametrize(
    "rates",
    [
        (110, 110, 110, 110, 99),  # not every round
        (101, 101, 101, 101, 101),  # every round, but by too little
    ],
)
def test_a_difference_within_noise_keeps_the_present_settings(rates):
    verdict = judge(PRESENT, {PRESENT: measured(*[100] * 5), OTHER: measured(*rates)}, NAMES)

    assert (verdict.winner, verdict.recommended) == (OTHER, PRESENT)
    assert "is within noise: keep the present settings" in verdict.sentence


def test_a_few_rounds_show_nothing():
    verdict = judge(PRESENT, {PRESENT: measured(100), OTHER: measured(200)}, NAMES)

    assert verdict.recommended == PRESENT


def test_present_settings_that_win_are_kept():
    verdict = judge(PRESENT, {PRESENT: measured(100), OTHER: measured(90)}, NAMES)

    assert verdict.recommended == PRESENT
    assert "(threads=2) are the fastest of the final: keep them" in verdict.sentence


# ---- The block ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(threads=3, prefetch=4, decoder="cpu", hw_decoder_load=0.0, region=False),
    ],
)
def test_the_block_is_one_that_a_recipe_and_a_command_line_take(recipe, tmp_path, options):
    pasted = tmp_path / "pasted.yaml"
    text = block(options, ["why: because of this", "a long comment " * 20])
    pasted.write_text(recipe.read_text() + "\n" + text)

    assert loading(pasted) == options
    assert loading(recipe, *overrides(options)) == options
    assert max(map(len, text.splitlines())) <= 100


def test_threads_stay_null_where_null_gives_as_many():
    here = tune.threads_per_process(1)
    present = Options(threads=here)
    written = tune.as_written(replace(present, prefetch=4), present, Options())

    assert written == Options(prefetch=4)
    assert tune.as_written(Options(threads=here + 1), present, Options()).threads == here + 1
    assert tune.as_written(present, present, present).threads == here


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(tmp_path_factory, checkout) -> Path:
    """A recipe for the built-in images whose reader refuses to give whole images."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "reader_of_regions.py").write_text(READER)
    text = (checkout / "recipes" / "supervised.yaml").read_text()
    path = folder / "recipe.yaml"
    path.write_text(text.replace("use: pipelines.readers.folder", "use: reader_of_regions"))
    return path


def test_the_command_measures_real_loaders_and_writes_block_and_result(
    supervised, demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(supervised.parent))
    written, out = tmp_path / "loader.yaml", tmp_path / "tune.json"
    options = ["--yaml", str(written), "--out", str(out), "--quick", "--threads", "1"]
    code = main(["tune", str(supervised), "loader.threads=1", *options])
    said = capsys.readouterr().out
    found = result.read(out)

    assert code == 0
    assert "keep" in found.conclusions[0]  # one round of a quick run shows nothing
    assert written.read_text() in said
    assert loading(supervised, *said.split("on the command line: ")[1].split("\n")[0].split())
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(supervised.read_text() + "\n" + written.read_text())
    assert loading(pasted) == loading(supervised, "loader.threads=1")

    assert {row.group for row in found.rows} >= {"round 1", "final", "batch"}
    failed = [row for row in found.rows if "failed" in row.extra]
    assert failed
    assert all(row.extra["region"] is False and row.values == [0] for row in failed)
    assert "no room for whole images (a stand-in)" in said
    running = [row for row in found.rows if row not in failed]
    assert len({row.name for row in running if row.group == "round 1"}) > 1
    assert all(row.unit == "images/s" and min(row.values) > 0 for row in running)
    assert found.settings["present"] == found.settings["recommended"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes (0.0) must be above 0"),
        (["--yaml", "no/such/folder/a.yaml"], "there is no folder"),
        (["loader.threads=0"], "loader: threads (0) must be in 1 ... 1024"),
        (["loader.region=false", "--quick"], "the recipe's own settings can't run here: Error: no"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    given, message, supervised, demo_images, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(supervised.parent))
    code = main(["tune", str(supervised), *given])
    said = capsys.readouterr().err

    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1
