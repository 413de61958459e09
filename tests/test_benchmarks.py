"""The suite's frame: commands, the schema of results and those kept; soak and demos."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import demos, manifest, result, soak
from benchmarks.__main__ import COMMANDS, main
from benchmarks.result import Row
from fastssl import journal, machine

KEPT = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "results").glob("*.json"))


# ---- Commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_is_for_and_which_options_it_has(name, capsys):
    command = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as exited:
        main([name, "--help"])
    printed = capsys.readouterr().out

    assert exited.value.code == 0
    assert printed.startswith(f"usage: python -m benchmarks {name} ")
    assert command.HELP in printed
    assert "\n" not in command.HELP
    assert "--help" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_module_is_the_command_too(name, capsys, monkeypatch):
    command = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", ["program", "--no-such-option"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(command.__file__), run_name="__main__")

    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: python -m benchmarks {name} ")


def test_without_a_command_those_that_exist_are_named(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["stage"]) == 2
    printed = capsys.readouterr()
    assert ", ".join(COMMANDS) in printed.out
    assert "no command 'stage'; there are stages, tasks" in printed.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--repeats", "2"], "--repeats (2) must be at least 3"),
        (["--seconds", "0"], "--seconds (0.0) must be above 0"),
        (["--threads", "0"], "--threads (0) at least 1"),
    ],
)
def test_too_little_to_measure_is_refused_in_a_line(given, message, capsys):
    assert main(["stages", "recipes/pirl_jigsaw.yaml", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith("python -m benchmarks stages: ")
    assert message in line


# ---- Results ------------------------------------------------------------------------------------


def test_there_are_results_to_look_at():
    assert KEPT


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_result_is_of_the_schema_and_says_where_it_comes_from(path):
    kept = result.read(path)

    assert kept.benchmark in COMMANDS
    assert kept.rows
    assert kept.manifest.machine["cpu"]
    assert kept.manifest.machine["cores_allowed"]
    assert re.match(r"python -m benchmarks[. ]\w+ ", kept.manifest.command)


def made(**changed) -> dict:
    """A result as JSON knows it, with other values."""
    rows = [Row(name="loader", unit="images/s", values=[1.0])]
    return json.loads(result.make("stages", rows, {}).model_dump_json()) | changed


ROW = {"name": "loader", "unit": "images/s", "values": [1.0]}


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"stage": 1}, "stage"),
        ({"rows": [ROW | {"value": 1.0}]}, "rows.0.value"),
        ({"rows": [ROW | {"values": []}]}, "rows.0.values"),
        ({"rows": [ROW | {"values": [float("nan")]}]}, "rows.0.values.0"),
        ({"rows": [ROW | {"cpu_ms": [float("inf")]}]}, "rows.0.cpu_ms.0"),
        ({"rows": [ROW | {"extra": {"a": []}}]}, "rows.0.extra.a"),
        ({"manifest": {}}, "manifest.machine"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_its_key(changed, key, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made(**changed)))

    with pytest.raises(ValueError, match=rf"r.json: {key}.*: not a result of schema 1; write one"):
        result.read(path)


def test_a_result_comes_back_as_it_was_written(tmp_path):
    rows = [
        Row(name="loader", group="jigsaw", unit="images/s", values=[1.5, 2.0], cpu_ms=[3.0, 4.0]),
        Row(name="listing", unit="s", values=[1.0], extra={"size": 10, "x": None, "y": True}),
    ]
    settings = {"out": tmp_path, "sizes": (1, 2), "nested": {"a": None}}
    out = tmp_path / "new" / "r.json"
    first = result.make("stages", rows, settings, ["so"], data=tmp_path, page_cache="cold")
    result.write(out, first)

    assert result.read(out) == first
    assert first.settings == {"out": str(tmp_path), "sizes": [1, 2], "nested": {"a": None}}
    assert first.conclusions == ["so"]
    assert out.read_text().endswith("}\n")


def test_a_result_that_can_t_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/r\.json: can't be written"):
        result.write(tmp_path / "file" / "r.json", result.make("stages", [], {}))


def test_a_manifest_says_what_a_measurement_depends_on(tmp_path, checkout):
    found = manifest.make(tmp_path, "warm")

    assert found.machine == json.loads(json.dumps(machine.facts()))
    assert found.command.startswith("python ")
    assert found.file_system == machine.file_system(tmp_path)
    assert found.page_cache == "warm"
    assert len(found.load or []) == 3
    assert (found.commit is None) == (not (checkout / ".git").exists())
    assert (found.dirty is None) == (found.commit is None)


def test_versions_of_another_interpreter_stand_beside_this_one_s():
    found = manifest.make(versions={"ffcv": "1.0.2"}).machine["versions"]

    assert isinstance(found, dict)
    assert found["ffcv"] == "1.0.2"
    assert {"torch", "nvidia-nvimgcodec-cu12"} <= found.keys()


def test_a_command_is_kept_as_it_would_be_typed():
    typed = manifest.command(["/usr/bin/python3", "-m", "benchmarks", "stages", "a b.yaml"])

    assert typed == "python -m benchmarks stages 'a b.yaml'"


def test_a_table_shows_median_and_spread_and_no_empty_column():
    rows = [
        Row(name="a", unit="images/s", values=[1234.5, 1000.0, 2000.0], cpu_ms=[1.0]),
        Row(name="b", unit="s", values=[0.012345], step_ms={"p50": 1.5}, extra={"size": 10_000}),
    ]

    assert result.table(rows).splitlines() == [
        "| name | value | CPU ms/image | p50 ms | size |",
        "|---|---|---|---|---|",
        "| a | 1,234 (1,000 - 2,000) images/s | 1 |  |  |",
        "| b | 0.0123 s |  | 1.5 | 10,000 |",
    ]


# ---- Demos --------------------------------------------------------------------------------------


@pytest.fixture
def demo(environ, checkout, monkeypatch, tmp_path, capsys):
    """The command in this process; the run that it starts has one of its own."""
    monkeypatch.chdir(checkout)
    for name in set(os.environ).difference(environ):
        if not name.startswith("PYTEST"):  # which it counts on
            monkeypatch.delenv(name)
    for name in ("HF_HOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environ[name])

    def run(*arguments: str, code: int = 0):
        out = tmp_path / "out.json"
        assert main(["demos", *arguments, "--out", str(out)]) == code
        written = result.read(out)
        assert written.benchmark == "demos"
        return capsys.readouterr(), written

    return run


def test_a_demo_s_numbers_are_those_of_its_run(tmp_path, demo):
    quick = ["train.steps=3", "train.log_steps=1", "probe.images=64", f"--runs={tmp_path}"]
    recipe = "recipes/pirl_jigsaw.yaml"
    done, written = demo(recipe, *quick)
    lines = journal.read(tmp_path / "pirl_jigsaw")
    rows = {row.name: row for row in written.rows}

    assert {row.group for row in written.rows} == {"pirl_jigsaw"}
    assert rows["run"].extra == {"exit_code": 0, "steps": 3}
    assert rows["accuracy"].extra["chance"] == pytest.approx(1 / 250)
    logged = [line["accuracy"] for line in lines if "loss" in line]
    assert rows["accuracy"].values == [logged[-1]]
    assert rows["accuracy"].extra["first"] == logged[0]
    before, after = [line["accuracy"] for line in lines if "probe" in line]
    assert (rows["kNN before"].values, rows["kNN after"].values) == ([before], [after])
    assert f"| {100 * before:.1f} % | {100 * after:.1f} % |\n" in done.out


def test_a_demo_that_fails_is_told_and_counts(demo, tmp_path, monkeypatch):
    stub = tmp_path / "python"  # which says what accelerate and train.py would, seconds later
    stub.write_text("#!/bin/sh\necho 'optim: lr (-1.0) must be above 0'\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    done, written = demo("recipes/pirl_jigsaw.yaml", "optim.lr=-1.0", code=1)
    (row,) = written.rows

    assert "| pirl_jigsaw | failed (1) |" in done.out
    assert "optim: lr (-1.0) must be above 0" in done.err
    assert row.extra == {"exit_code": 1}


def test_a_demo_of_no_recipe_is_refused(capsys):
    assert main(["demos", "recipes/pirl.yaml"]) == 2
    assert "there is no recipe recipes/pirl.yaml" in capsys.readouterr().err


def test_a_demo_without_a_probe_has_no_knn():
    shares = dict.fromkeys(("accuracy_first", "accuracy", "chance"), 0.5)
    demo = {"recipe": "r", "exit_code": 0, "seconds": 9.0, "steps": 3, **shares}
    demo |= {"knn_before": None, "knn_after": None}

    assert [row.name for row in demos.rows_of(demo)] == ["run", "accuracy"]
    assert demos.line(demo) == "| r | 9 s | 50.0 % | 50.0 % | - | - |"


# ---- Soak ---------------------------------------------------------------------------------------


def run(out: Path, environ, checkout, command: str, *arguments: str):
    """As users start it, in a process of its own: what it printed and the result."""
    line = [sys.executable, "-m", "benchmarks", command, *arguments, "--out", str(out)]
    done = subprocess.run(line, env=environ, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = result.read(out)
    assert written.benchmark == command
    assert written.manifest.command.startswith(f"python -m benchmarks {command} ")
    return done, written


def test_a_soak_of_seconds_ends_with_a_verdict(demo_images, tmp_path, environ, checkout):
    options = ["--batches", "60", "--images", "12", "--threads", "1", "--note", "a test"]
    folder = str(demo_images / "val")
    done, written = run(tmp_path / "out.json", environ, checkout, "soak", folder, *options)
    rows = {row.name: row for row in written.rows}

    for name in (soak.LOADER, soak.MEMORY, soak.FILES, soak.THREADS, soak.LOAD):
        assert len(rows[name].values) == soak.WINDOWS
        assert min(rows[name].values) > 0 or name == soak.LOAD
    assert min(rows[soak.LOADER].cpu_ms) > 0
    assert rows[soak.EXACT].values == [19]
    assert rows[soak.EXACT].extra == {"of": 19, "states": 60}
    assert len(rows[soak.BESIDE_NEW].values) == soak.ROUNDS
    assert rows[soak.WHOLE].extra == {"skipped": 0}
    kept = written.settings
    assert (kept["batches"], kept["batch"], kept["images"], kept["note"]) == (60, 4, 12, "a test")
    assert written.manifest.file_system == machine.file_system(demo_images)
    assert soak.passed(written.rows, 60)
    assert soak.TABLE in done.stdout
    assert "\n".join(written.conclusions) in done.stdout
    assert "not judged in fewer than 10,000 batches" in done.stdout


def windows(memory: list[float], *, batches: int = 200_000, **last: float) -> list[dict]:
    """A soak's windows with the given memory; the last one with other values."""
    same = {
        "images_per_second": 100.0,
        "cpu_ms_per_image": 2.0,
        "files": 6,
        "threads": 8,
        "load": 1,
    }
    ends = [batches * (number + 1) // len(memory) for number in range(len(memory))]
    made = [{"batches": end, "memory_mb": m, **same} for end, m in zip(ends, memory, strict=True)]
    made[-1] |= last
    return made


GROWING = [800 + 2.0 * number for number in range(20)]  # a window is 10,000 batches
STARTING = [800 + 2.0 * min(number, 9) for number in range(20)]


@pytest.mark.parametrize(
    ("memory", "growth"), [(GROWING, 2.0), (STARTING, 0.0), (GROWING[::-1], -2.0)]
)
def test_a_soak_judges_memory_by_its_second_half(memory, growth):
    judged = soak.judge(windows(memory))

    assert judged["memory_mb_per_10000_batches"] == pytest.approx(growth, abs=1e-6)
    assert judged["memory_flat"] == (growth <= soak.GROWTH)


def test_a_soak_notices_a_file_that_stays_open_and_a_loader_that_tires():
    seen = windows(STARTING, files=7)
    for window in seen[-5:]:
        window["images_per_second"] = 80.0
    judged = soak.judge(seen)

    assert not judged["files_constant"]
    assert judged["threads_constant"]
    assert judged["drift"] == pytest.approx(0.8)
    assert judged["cpu_drift"] == 1


def soaked(
    seen: list[dict], *, exact: float = 19.0, ratio: float = 1.0, skipped: int = 0
) -> list[Row]:
    """A soak's rows."""
    return [
        *soak.rows_of(seen),
        Row(name=soak.BESIDE_NEW, unit="ratio", values=[ratio - 0.1, ratio, ratio + 0.1]),
        Row(name=soak.EXACT, unit="resumes", values=[exact], extra={"of": 19}),
        Row(name=soak.WHOLE, unit="s", values=[90.0], extra={"skipped": skipped}),
    ]


def test_a_verdict_says_what_failed():
    rows = soaked(windows(GROWING, files=7, threads=9), exact=18, ratio=0.79, skipped=2)
    text = "\n".join(soak.verdict(rows, 200_000, 4))

    assert "+2.00 MB per 10,000 batches over the second half: GROWS, more than 1.0 MB" in text
    assert "beside a new loader's: 0.79 (0.69 - 0.89)" in text
    assert "open files: [6, 7]: NOT CONSTANT; threads: [8, 9]; images skipped: 2" in text
    assert "18 of 19 times" in text
    assert (
        "FAILED: 200,000 batches of 4 in 1.5 minutes; memory grows; open files change; threads "
        "become more; a resume gave another batch; slower than 0.8 of a new loader; 2 images "
        "skipped" in text
    )


def test_a_soak_passes_and_fails_for_one_thing_each():
    good = windows(STARTING)
    fewer_threads = windows(STARTING)
    fewer_threads[0]["threads"] = 9  # as some start that then end

    assert soak.passed(soaked(good), 200_000)
    assert soak.passed(soaked(fewer_threads), 200_000)
    assert soak.passed(soaked(good, ratio=0.8), 200_000)
    assert not soak.passed(soaked(windows(GROWING)), 200_000)
    assert not soak.passed(soaked(windows(STARTING, files=7)), 200_000)
    assert not soak.passed(soaked(windows(STARTING, threads=9)), 200_000)
    assert not soak.passed(soaked(good, exact=18), 200_000)
    assert not soak.passed(soaked(good, skipped=1), 200_000)
    assert not soak.passed(soaked(good, ratio=0.79), 200_000)
    assert soak.passed(soaked(good, ratio=0.3), soak.SHORTEST - 1)  # how they start


@pytest.mark.parametrize("path", [each for each in KEPT if each.stem.startswith("soak")])
def test_a_kept_soak_passes_by_the_rules_of_today(path):
    kept = result.read(path)
    batches = kept.settings["batches"]

    assert isinstance(batches, int)
    assert soak.passed(kept.rows, batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "data.root: there is no folder /nowhere/at/all"),
        (["/nowhere", "--batches", "39"], "--batches (39) must be at least 40"),
        (["/nowhere", "--batch", "0"], "--batch (0) must be at least 1"),
        (["/nowhere", "--images", "0"], "--images (0) must be at least 1"),
    ],
)
def test_a_soak_that_cannot_start_says_why(arguments, message, capsys):
    assert main(["soak", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith("python -m benchmarks soak: ")
    assert message in line
