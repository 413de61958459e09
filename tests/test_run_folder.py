"""Which run folder is taken, gone on from, or refused with the ways out."""

import copy
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastssl import checkpoint, run_folder
from fastssl.config import FREE_ON_RESUME, RecipeError

VALUES: dict[str, dict[str, Any]] = {
    "backbone": {"use": "fastssl.backbones.resnet", "name": "resnet50"},
    "optim": {"lr": 0.12, "final_lr": 1.2e-4, "milestones": []},
    "train": {"out": None, "resume": "auto", "epochs": 4, "batch": 64, "log_steps": 50},
}


def recipe(**train: Any) -> dict[str, dict[str, Any]]:
    values = copy.deepcopy(VALUES)
    values["train"].update(train)
    return values


def a_run(
    out: Path, *steps: int, values: dict[str, dict[str, Any]] = VALUES, finished: bool = False
) -> Path:
    """A run folder as training leaves it, with checkpoints of these steps."""
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(values))
    (out / "metrics.jsonl").touch()
    (out / ".lock").touch()
    for step in steps:
        checkpoint.save(out / "checkpoints", step, {"step": step}, keep=9)
    if finished:
        (out / "backbone.json").write_text(json.dumps({"step": 800}))
    return out


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("left", [None, [], [".lock"], [".recipe.yaml.tmp"]])
def test_an_absent_or_empty_folder_is_a_fresh_start(tmp_path, resume, left):
    out = tmp_path / "run"
    if left is not None:
        out.mkdir()
        for name in left:
            (out / name).touch()

    assert run_folder.open_run(out, resume, VALUES) is None
    assert out.exists() == (left is not None)


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path):
    out = a_run(tmp_path / "run", 90, 100)

    assert run_folder.open_run(out, "auto", VALUES) == out / "checkpoints" / "step-00000100.pt"


def test_a_run_killed_before_its_first_checkpoint_starts_anew_in_its_folder(tmp_path):
    assert run_folder.open_run(a_run(tmp_path / "run"), "auto", VALUES) is None


def test_keys_that_change_nothing_learnt_may_differ(tmp_path):
    out = a_run(tmp_path / "run", 100)

    assert "train.log_steps" in FREE_ON_RESUME
    assert run_folder.open_run(out, "auto", recipe(log_steps=7)) is not None


@pytest.mark.parametrize("resume", ["auto", "never", "SELF"])
def test_a_finished_run_is_never_written_into(tmp_path, resume):
    out = a_run(tmp_path / "run", 100, finished=True)
    before = contents(out)
    message = re.escape(
        f"{out} holds a finished run (step 800): to train anew name another folder"
        f" (train.out=...), to go on from it give train.resume={out} and another train.out"
    )
    with pytest.raises(RecipeError, match=message):
        run_folder.open_run(out, str(out) if resume == "SELF" else resume, VALUES)
    with pytest.raises(RecipeError, match=message):
        run_folder.lock(out)

    assert contents(out) == before


def test_a_finished_run_is_one_even_if_its_card_is_damaged(tmp_path):
    out = a_run(tmp_path / "run")
    (out / "backbone.json").write_text("{")

    with pytest.raises(RecipeError, match=r"finished run \(with an unreadable backbone.json\)"):
        run_folder.open_run(out, "auto", VALUES)


def test_another_recipe_is_refused_and_every_key_named(tmp_path):
    out = a_run(tmp_path / "run", 100)
    other = recipe(batch=128)
    other["optim"]["lr"] = 0.03

    with pytest.raises(RecipeError, match="holds a run of another recipe") as error:
        run_folder.open_run(out, "auto", other)
    assert str(error.value).splitlines() == [
        f"{out} holds a run of another recipe:",
        "  optim.lr: 0.12 there, 0.03 here",
        "  train.batch: 64 there, 128 here",
        "to train anew name another folder (train.out=...), to go on make these keys equal",
    ]


def test_a_run_from_before_a_key_existed_goes_on_where_it_stands_at_its_default(tmp_path):
    out = a_run(tmp_path / "run", 100)
    newer = recipe(sync_batchnorm=False)
    newer["backbone"]["stem"] = "standard"
    newer["optim"]["layer_decay"] = 1.0

    assert run_folder.open_run(out, "auto", newer) == out / "checkpoints" / "step-00000100.pt"
    newer["optim"]["layer_decay"] = 0.7
    with pytest.raises(
        RecipeError, match=r"another recipe:\n  optim.layer_decay: 1.0 there, 0.7 here"
    ):
        run_folder.open_run(out, "auto", newer)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    message = "is no run folder: it holds thesis.tex and no recipe.yaml; name a new or an empty"
    with pytest.raises(RecipeError, match=message):
        run_folder.open_run(tmp_path, "auto", VALUES)
    with pytest.raises(RecipeError, match=message):
        run_folder.lock(tmp_path)

    assert list(contents(tmp_path)) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "- 1\n", "train: [", "train: 3", "\x00"])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, text):
    out = a_run(tmp_path / "run", 100)
    (out / "recipe.yaml").write_text(text)

    with pytest.raises(RecipeError, match=r"run/recipe.yaml is not the recipe of a run: name ano"):
        run_folder.open_run(out, "auto", VALUES)


@pytest.mark.parametrize("left", [None, "sgd", ["sgd"]])
@pytest.mark.parametrize("section", VALUES)
def test_a_saved_recipe_with_a_section_without_keys_is_named(tmp_path, section, left):
    out = a_run(tmp_path / "run", 100, values={**VALUES, section: left})

    with pytest.raises(RecipeError, match=r"run/recipe.yaml is not the recipe of a run: name ano"):
        run_folder.open_run(out, "auto", VALUES)


def test_a_saved_recipe_that_lost_where_its_run_began_is_named(tmp_path):
    values = recipe()
    del values["train"]["resume"]
    out = a_run(tmp_path / "run", 100, values=values)

    with pytest.raises(RecipeError, match=r"run/recipe.yaml is not the recipe of a run: name ano"):
        run_folder.open_run(out, "auto", VALUES)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").touch()

    with pytest.raises(RecipeError, match=r"train.out \(.*/run\) is a file: name a folder"):
        run_folder.open_run(tmp_path / "run", "auto", VALUES)


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: File name too long; name another"):
        run_folder.open_run(tmp_path / ("x" * 300), "auto", VALUES)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(RecipeError, match="cannot be written: Not a directory; name another"):
        run_folder.lock(tmp_path / "file" / "run")


def test_never_takes_only_a_fresh_folder(tmp_path):
    out = a_run(tmp_path / "run", 100)

    with pytest.raises(RecipeError, match=r"is not empty and train.resume is 'never'"):
        run_folder.open_run(out, "never", VALUES)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000090.pt"])
def test_a_path_starts_a_fresh_folder_from_another_run(tmp_path, named, finished):
    source = a_run(tmp_path / "run", 90, 100, finished=finished)
    last = "step-00000100.pt" if named == "run" else "step-00000090.pt"
    found = run_folder.open_run(tmp_path / "new", str(tmp_path / named), VALUES)

    assert found == source / "checkpoints" / last


def test_a_relative_path_names_the_same_run(tmp_path, monkeypatch):
    a_run(tmp_path / "run", 90)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    found = run_folder.open_run(tmp_path / "new", "step-00000090.pt", VALUES)

    assert found == Path("step-00000090.pt")


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000100.pt"])
def test_the_path_of_its_own_last_checkpoint_goes_on_in_place(tmp_path, named):
    out = a_run(tmp_path / "run", 90, 100)
    found = run_folder.open_run(out, str(tmp_path / named), VALUES)

    assert found == out / "checkpoints" / "step-00000100.pt"


def test_an_older_checkpoint_of_the_same_folder_is_refused(tmp_path):
    out = a_run(tmp_path / "run", 90, 100)

    with pytest.raises(RecipeError, match=r"is not the last checkpoint of .*, step-00000100.pt: "):
        run_folder.open_run(out, str(out / "checkpoints" / "step-00000090.pt"), VALUES)


def test_a_run_begun_from_another_goes_on_by_the_same_command(tmp_path):
    source = a_run(tmp_path / "run", 100, finished=True)
    values = recipe(resume=str(source))
    out = a_run(tmp_path / "new", values=values)
    before = [run_folder.open_run(out, resume, values) for resume in ("auto", str(source))]
    mine = checkpoint.save(out / "checkpoints", 150, {"step": 150}, keep=1)
    after = [run_folder.open_run(out, resume, values) for resume in ("auto", str(source))]

    assert before == [source / "checkpoints" / "step-00000100.pt"] * 2
    assert after == [mine] * 2


def test_a_path_does_not_go_on_in_a_folder_that_was_begun_otherwise(tmp_path):
    source = a_run(tmp_path / "run", 100)
    out = a_run(tmp_path / "new", 150)

    with pytest.raises(RecipeError, match=r"holds another run, which was begun with train.resume="):
        run_folder.open_run(out, str(source), VALUES)


def test_a_path_of_another_recipe_is_refused_by_key(tmp_path):
    source = a_run(tmp_path / "run", 100)

    with pytest.raises(RecipeError, match=r"train.epochs: 4 there, 8 here"):
        run_folder.open_run(tmp_path / "new", str(source), recipe(epochs=8))


def test_a_path_that_leads_to_no_checkpoint_is_named(tmp_path):
    a_run(tmp_path / "early")
    checkpoint.save(tmp_path / "copies", 5, {}, keep=1)
    (tmp_path / "copies" / "checkpoints").mkdir()

    for named, message in {
        "nowhere": r"nowhere\) does not exist: give auto, never, a run folder or a checkpoint",
        "early": r"early\) has no checkpoint in .*/early/checkpoints",
        "copies/checkpoints": r"is a folder of checkpoints: give the run folder, .*/copies, or one",
        "copies/step-00000005.pt": r"is in no run folder: .*recipe.yaml is not there",
        "long" * 1000: r"train.resume \(\S{200}\) cannot be looked at: File name too long",
    }.items():
        with pytest.raises(RecipeError, match=message):
            run_folder.open_run(tmp_path / "new", str(tmp_path / named), VALUES)


def test_a_file_that_is_in_no_run_s_checkpoints_is_named_however_near_the_root(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/file")
    with pytest.raises(
        RecipeError, match=r"/file\) is in no run folder: /recipe.yaml is not there"
    ):
        run_folder.open_run(tmp_path / "new", "/file", VALUES)


def test_a_second_run_is_told_who_holds_the_folder_and_waits_once(tmp_path):
    said = []
    held = run_folder.lock(tmp_path / "run")
    with held, pytest.raises(RecipeError, match=r"/run is in use by process \d+ on .*: wait for "):
        run_folder.lock(tmp_path / "run", wait=0.3, say=said.append)

    assert len(said) == 1
    assert "waiting up to 0.3 s for its end" in said[0]


def test_a_lock_ends_with_its_file_and_leaves_a_fresh_folder_fresh(tmp_path):
    run_folder.lock(tmp_path / "run").close()
    with run_folder.lock(tmp_path / "run", wait=0.0):
        found = run_folder.open_run(tmp_path / "run", "never", VALUES)

    assert found is None


def test_a_lock_that_was_deleted_keeps_no_one_out_and_its_holder_is_told(tmp_path):
    out = tmp_path / "run"
    with run_folder.lock(out) as first:
        run_folder.check_lock(first, out)
        (out / ".lock").unlink()
        with pytest.raises(run_folder.LockLostError, match="Never delete that file"):
            run_folder.check_lock(first, out)
        with run_folder.lock(out, wait=0.0) as second:
            run_folder.check_lock(second, out)
            with pytest.raises(run_folder.LockLostError, match=r"/run/.lock was deleted or repl"):
                run_folder.check_lock(first, out)


def test_a_lock_that_is_deleted_while_it_is_waited_for_is_taken_anew(tmp_path, monkeypatch):
    usual = fcntl.flock

    def deleted_before(file, how):
        monkeypatch.setattr(fcntl, "flock", usual)
        (tmp_path / ".lock").unlink()
        usual(file, how)

    monkeypatch.setattr(fcntl, "flock", deleted_before)
    with run_folder.lock(tmp_path) as held:
        run_folder.check_lock(held, tmp_path)


def test_what_a_killed_run_left_unfinished_is_deleted_by_the_next_and_nothing_else(tmp_path):
    run = a_run(tmp_path / "run")
    (run / ".backbone.safetensors.12-0123abcd.tmp").touch()
    (run / ".mine.tmp").touch()
    run_folder.lock(run).close()

    assert sorted(path.name for path in run.glob(".*.tmp")) == [".mine.tmp"]


def test_a_home_folder_is_known_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = a_run(tmp_path / "run", 100)

    assert run_folder.open_run(tmp_path / "new", "~/run", VALUES) == newest_of(run)


def newest_of(run: Path) -> Path | None:
    return checkpoint.latest(run / "checkpoints")


def test_a_run_that_is_just_ending_is_waited_for(tmp_path):
    held = run_folder.lock(tmp_path / "run")
    said = []

    def end_it(text: str) -> None:
        said.append(text)
        held.close()

    run_folder.lock(tmp_path / "run", say=end_it).close()

    assert f"in use by process {os.getpid()} on" in said[0]


def test_the_lock_of_a_killed_process_is_no_hindrance(tmp_path):
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        " print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        held = process.stdout.readline()
        said = []

        def kill_it(text: str) -> None:
            said.append(text)
            process.kill()

        run_folder.lock(tmp_path, say=kill_it).close()

    assert held == "held\n"
    assert "is in use by another process; waiting up to 20 s" in said[0]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuse(*_):  # as Lustre does when mounted without flock; none can be had here
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    run_folder.lock(tmp_path / "run", say=said.append).close()

    assert said == [
        f"{tmp_path / 'run'} is on a file system without locks: see that no second run uses it"
    ]


def test_a_start_with_the_same_data_passes():
    run_folder.compare_fingerprint({"file list": "3f", "world": 2}, {"world": 2, "file list": "3f"})


def test_everything_that_differs_from_the_checkpoint_is_named():
    saved = {"file list": "3f", "world": 2, "batch": 64, "graph": "a"}
    here = {"file list": "77", "world": 1, "batch": 64, "reader": "b"}

    with pytest.raises(RecipeError, match="cannot be gone on from") as error:
        run_folder.compare_fingerprint(saved, here)
    assert str(error.value).splitlines()[1:] == [
        "  file list: 3f there, 77 here",
        "  world: 2 there, 1 here",
        "  graph: a there, missing here",
        "  reader: missing there, b here",
        "  a file was added, deleted, renamed or replaced by one of another size since: undo that",
        "make them equal again, or start anew in another folder (train.out=...)",
    ]


def test_other_usable_images_are_refused_with_the_remedy_but_old_checkpoints_say_nothing_of_it():
    before, now = (run_folder.hash_of_rows(np.delete(np.arange(40), row), 40) for row in (2, 39))
    here = {"file list": "3f", "usable images": 39, "which images are usable": now}

    run_folder.compare_fingerprint({"file list": "3f", "usable images": 39}, here)
    run_folder.compare_fingerprint(here, here)
    with pytest.raises(RecipeError, match=r"data\.quarantine changed since") as error:
        run_folder.compare_fingerprint({**here, "which images are usable": before}, here)
    assert f"  which images are usable: {before} there, {now} here\n" in str(error.value)


PARTS = {"processes": 4, "train.accumulate": 1, "train.batch": 64, "file list": "3f"}


def test_another_number_of_processes_may_go_on_and_the_parts_of_a_batch_may_make_up_for_it():
    for processes, parts in ((2, 1), (8, 1), (2, 2), (1, 4)):
        here = {**PARTS, "processes": processes, "train.accumulate": parts}
        run_folder.compare_fingerprint(PARTS, here)
    with pytest.raises(RecipeError, match=r"train.accumulate: 1 there, 2 here"):
        run_folder.compare_fingerprint(PARTS, {**PARTS, "train.accumulate": 2})
    with pytest.raises(RecipeError, match=r"file list: 3f there, 77 here") as error:
        run_folder.compare_fingerprint(PARTS, {**PARTS, "processes": 2, "file list": "77"})
    assert "processes" not in str(error.value)


def test_other_parts_of_a_batch_are_no_other_recipe(tmp_path):
    out = a_run(tmp_path / "run", 100, values=recipe(accumulate=1))

    assert run_folder.open_run(out, "auto", recipe(accumulate=2)) is not None


def test_what_was_skipped_while_training_is_told_where_the_file_list_differs():
    skipped = {number: f"/images/{number}.jpg: gone" for number in range(7)}
    with pytest.raises(RecipeError, match="7 that could not be read while training") as error:
        run_folder.compare_fingerprint(PARTS, {**PARTS, "file list": "77"}, skipped)
    assert str(error.value).count(".jpg: gone") == 5
    with pytest.raises(RecipeError, match=r"train.batch: 64 there, 8 here") as error:
        run_folder.compare_fingerprint(PARTS, {**PARTS, "train.batch": 8}, skipped)
    assert "while training" not in str(error.value)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("resume", ["auto", "FOLDER", "ELSEWHERE"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path, resume):
    run = a_run(tmp_path / "run", 90, 100)
    damage(run / "checkpoints" / "step-00000100.pt")
    out = tmp_path / "new" if resume == "ELSEWHERE" else run
    named = "auto" if resume == "auto" else str(run)
    start = run_folder.open_run(out, named, VALUES)
    assert start is not None
    said: list[str] = []
    path, state = run_folder.load(start, out, named, said.append)

    assert (path.name, state) == ("step-00000090.pt", {"step": 90})
    assert len(said) == 1


def test_a_damaged_checkpoint_that_was_named_is_refused_with_the_one_before(tmp_path):
    run = a_run(tmp_path / "run", 90, 100)
    named = run / "checkpoints" / "step-00000100.pt"
    damage(named)
    for out in (run, tmp_path / "new"):
        start = run_folder.open_run(out, str(named), VALUES)
        assert start is not None
        with pytest.raises(RecipeError, match=r"goes on from the one before, step-00000090.pt"):
            run_folder.load(start, out, str(named), print)
