"""What may go wrong around a run is injected: it goes on and is right, or says why it can't.

Ends of processes and machines are in test_faults_elastic.py, signals, full disks and mistakes in
test_train.py, a disk that is full and a process that is killed while it writes in
test_checkpoint.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastssl import checkpoint, data, journal, train
from pipelines.readers import quarantine
from tests import few_images
from tests.small_run import SMALL, STEPS, assert_same_run, lines, newest, stop_at

YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def images(tmp_path_factory, demo_images) -> Path:
    """Forty images in 5 classes, and nothing to probe beside them."""
    root = tmp_path_factory.mktemp("data")
    return few_images.copy(demo_images, root, train=(8,) * 5, val=()) / "train"


@pytest.fixture
def own_images(images, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture
def command(recipe, tmp_path) -> Callable[..., list[str]]:
    """The command line of a small run on `root` into tmp_path/run."""

    def line(root: Path, *overrides: str, out: str = "run") -> list[str]:
        return [
            *(str(recipe), f"data.root={root}", *SMALL),
            *(f"train.out={tmp_path / out}", *overrides),
        ]

    return line


@pytest.fixture(scope="module")
def whole(recipe, images, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([str(recipe), f"data.root={images}", *SMALL, f"train.out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def whole_apart(recipe, images, tmp_path_factory, checkout, environ) -> Path:
    """The same in a process of its own, to compare such with: MKL's sums have been seen to differ
    in the last bit in a process that had done much else before."""
    out = tmp_path_factory.mktemp("apart") / "run"
    run(checkout, [str(recipe), f"data.root={images}", *SMALL, f"train.out={out}"], environ)
    return out


def after_step(monkeypatch, step: int, happen: Callable[[], object]) -> None:
    """Has something happen in the midst of a run, right after `step`."""
    usual = journal.Journal.step

    def and_then(self, now: int) -> None:
        usual(self, now)
        if now == step:
            happen()

    monkeypatch.setattr(journal.Journal, "step", and_then)


# ---- Checkpoints -------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b""], ids=["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_gone_on_from(
    whole, images, command, tmp_path, monkeypatch, capsys, damage
):
    stop_at(monkeypatch, 10)
    assert train.main(command(images)) == 75
    monkeypatch.undo()
    last = newest(tmp_path / "run")
    last.write_bytes(damage(last.read_bytes()))
    capsys.readouterr()
    assert train.main(command(images)) == 0
    said = capsys.readouterr().out

    assert last.name == "step-00000010.pt"
    assert "warning: step-00000010.pt in" in said
    assert "going on from the checkpoint before, step-00000008.pt" in said
    assert "step-00000008.pt (step 8)" in said
    assert_same_run(tmp_path / "run", whole)  # lines of the log after step 8 are there once


def test_a_run_stopped_before_a_damaged_checkpoint_s_step_goes_on_from_its_own(
    whole, images, command, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 10)
    assert train.main(command(images)) == 75
    last = newest(tmp_path / "run")
    last.write_bytes(flip(last.read_bytes()))
    monkeypatch.undo()
    stop_at(monkeypatch, 9)
    assert train.main(command(images)) == 75
    monkeypatch.undo()
    assert train.main(command(images)) == 0

    assert_same_run(tmp_path / "run", whole)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert starts[0]["resumed"] is None
    assert [Path(start["resumed"]).stem[-2:] for start in starts[1:]] == ["08", "09"]


def test_without_a_whole_checkpoint_a_run_ends_in_one_line_and_touches_nothing(
    images, command, tmp_path, monkeypatch, capsys
):
    stop_at(monkeypatch, 10)
    assert train.main(command(images)) == 75
    monkeypatch.undo()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(flip(path.read_bytes()))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.name != ".lock"}
    capsys.readouterr()
    assert train.main(command(images)) == 2
    said = capsys.readouterr().err

    assert said.count("\n") == 1
    assert "is whole: step-00000010.pt, step-00000008.pt damaged or cut short; delete that" in said
    assert {p: p.read_bytes() for p in before} == before


# ---- Images ------------------------------------------------------------------------------------


def test_images_deleted_or_replaced_while_training_are_skipped_or_read_as_they_are_now(
    own_images, command, tmp_path, monkeypatch, capsys
):
    gone, garbage, other = sorted(own_images.glob("*/*.jpg"))[::15]

    def meddle() -> None:
        gone.unlink()
        garbage.write_bytes(b"\xff\xd8" + os.urandom(1000))
        shutil.copy(sorted(own_images.glob("*/*.jpg"))[1], other)

    after_step(monkeypatch, 4, meddle)
    code = train.main(command(own_images, "train.epochs=4"))
    said = capsys.readouterr().out
    state = checkpoint.load(newest(tmp_path / "run"))

    assert code == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 21))
    told = [line for line in said.splitlines() if line.startswith("data: skipping")]
    assert sorted(str(gone) in line for line in told) == [False, True]
    assert sorted(str(garbage) in line for line in told) == [False, True]
    assert sorted(state["ranks"][0]["loader"]["skipped"]) == [0, 15]


def test_a_run_whose_image_was_deleted_says_which_file_it_needs_to_go_on(
    own_images, command, tmp_path, monkeypatch, capsys
):
    every = sorted(own_images.glob("*/*.jpg"), key=lambda path: path.stat().st_size)
    victim, other = every[-1], every[0].read_bytes()
    size, row = victim.stat().st_size, sorted(every).index(victim)

    def stop_later(self, now: int) -> None:
        if now == 2:
            victim.unlink()
        if now == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(journal.Journal, "step", stop_later)
    assert train.main(command(own_images)) == 75
    monkeypatch.undo()
    capsys.readouterr()
    assert train.main(command(own_images)) == 2
    said = capsys.readouterr().err

    assert "file list: " in said
    assert "1 that could not be read while training stay skipped" in said
    assert f"    {victim}: " in said
    assert "any smaller JPEG of that name does, made as long by `truncate -s BYTES FILE`" in said

    victim.write_bytes(other)
    os.truncate(victim, size)
    assert train.main(command(own_images)) == 0
    assert "data: skipping" not in capsys.readouterr().out  # that was said
    state = checkpoint.load(newest(tmp_path / "run"))
    assert list(state["ranks"][0]["loader"]["skipped"]) == [row]


def test_a_run_whose_quarantine_names_another_image_now_is_refused_by_name(
    images, command, tmp_path, monkeypatch, capsys
):
    every, listed = sorted(images.glob("*/*.jpg")), tmp_path / "quarantine.jsonl"

    def leave_out(row: int) -> None:
        name = str(every[row].relative_to(images)).encode()
        listed.write_text(quarantine.line(name, "grey"))

    given = command(images, f"data.quarantine={listed}")
    leave_out(2)
    stop_at(monkeypatch, 3, signal.SIGTERM)
    assert train.main(given) == 75
    monkeypatch.undo()
    leave_out(39)
    capsys.readouterr()
    assert train.main(given) == 2
    said = capsys.readouterr().err

    assert "  which images are usable: " in said
    assert "the file of data.quarantine changed since" in said
    assert "file list" not in said


@pytest.fixture
def store(images, tmp_path) -> Path:
    """The forty images in one tar."""
    assert data.main(["pack", str(images), str(tmp_path / "store")]) == 0
    return tmp_path / "store"


def test_a_shard_that_is_replaced_while_training_is_read_on_as_it_was(
    store, command, tmp_path, monkeypatch, capsys
):
    shard = store / "shard-000000.tar"
    aside = store.with_name("new.tar")

    def replace() -> None:  # as rsync and mv do: another file takes the name
        aside.write_bytes(os.urandom(1000))
        aside.replace(shard)

    tar = "data.use=pipelines.readers.tar"
    assert train.main(command(store, tar, out="through")) == 0
    after_step(monkeypatch, 4, replace)
    assert train.main(command(store, tar)) == 0
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", tmp_path / "through")

    capsys.readouterr()
    assert train.main(command(store, tar, out="another")) == 2
    assert f"{shard} has 1,000 bytes, and manifest.json says" in capsys.readouterr().err


def test_images_of_a_shard_that_is_overwritten_while_training_are_skipped_and_named(
    store, command, tmp_path, monkeypatch, capsys
):
    shard = store / "shard-000000.tar"

    def overwrite() -> None:
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size // 8))

    after_step(monkeypatch, 4, overwrite)
    code = train.main(command(store, "data.use=pipelines.readers.tar"))
    said = capsys.readouterr().out
    state = checkpoint.load(newest(tmp_path / "run"))

    assert code == 0
    skipped = state["ranks"][0]["loader"]["skipped"]
    assert 2 <= len(skipped) <= 12
    assert said.count("data: skipping") == len(skipped)


# ---- A slow disk, and a clock that jumps ---------------------------------------------------------


@pytest.fixture(scope="module")
def shim(checkout) -> Iterator[Path]:
    """Comes between a program and libc: see shim.c."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a slow disk and a jumping clock need a C compiler")
    source = checkout / "tests" / "shim.c"
    built = [compiler, "-Wall", "-shared", "-fPIC", source, "-ldl"]
    # LD_PRELOAD is split at blanks and colons, which $TMPDIR may have
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "shim.so"
        subprocess.run([*built, "-o", path], check=True)
        yield path


def run(checkout: Path, arguments: list[str], environ: dict[str, str]) -> str:
    """What a run in a process of its own says."""
    done = subprocess.run(
        [sys.executable, checkout / "fastssl" / "train.py", *arguments],
        env=environ,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_reads_as_slow_as_a_busy_network_disk_s_change_nothing_but_the_rate_and_are_told(
    whole_apart, images, command, tmp_path, shim, checkout, environ
):
    slow = {"LD_PRELOAD": str(shim), "SLOW_FOLDER": str(images), "SLOW_US": "60000"}
    said = run(checkout, command(images), environ | slow)

    assert_same_run(tmp_path / "run", whole_apart)
    waits = [line["data_wait"] for line in lines(tmp_path / "run")]
    assert sum(waits) / len(waits) > journal.WAITING
    assert said.count("of the time goes by in waiting for images") == 1


def test_a_clock_that_jumps_by_a_year_at_every_look_changes_nothing(
    whole_apart, images, command, tmp_path, shim, checkout, environ
):
    jumping = environ | {"LD_PRELOAD": str(shim), "JUMP": str(-YEAR)}
    look = "import time; some = [time.time() for _ in range(4)]; print(max(some) - min(some))"
    apart = subprocess.check_output([sys.executable, "-c", look], env=jumping, text=True)
    assert float(apart) == pytest.approx(YEAR, rel=0.01)  # it does jump
    run(checkout, command(images), jumping)

    assert_same_run(tmp_path / "run", whole_apart)
    assert all(line["images_per_second"] > 0 for line in lines(tmp_path / "run"))
    assert all(0 <= line["data_wait"] <= 1 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize("when", [-20 * YEAR, 20 * YEAR], ids=["past", "future"])
def test_a_clock_set_between_two_starts_changes_nothing(
    whole, own_images, command, tmp_path, monkeypatch, when
):
    stop_at(monkeypatch, 10)
    assert train.main(command(own_images)) == 75
    monkeypatch.undo()
    files = [path for root in (tmp_path / "run", own_images) for path in root.rglob("*")]
    for number, path in enumerate(reversed(sorted(files))):  # later steps look older, too
        os.utime(path, (time.time() + when + number, time.time() + when + number))
    assert train.main(command(own_images)) == 0

    assert_same_run(tmp_path / "run", whole)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert str(starts[1]["resumed"]).endswith("step-00000010.pt")


# ---- Two runs in one folder ----------------------------------------------------------------------


def test_of_two_runs_started_in_one_folder_one_trains_and_the_other_is_refused(
    whole_apart, images, command, tmp_path, checkout, environ
):
    both = [
        subprocess.Popen(
            [sys.executable, checkout / "fastssl" / "train.py", *command(images)],
            env=environ,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    codes = [process.returncode for process in both]

    assert sorted(codes) == [0, 2], said
    refused = said[codes.index(2)][1]
    # The other was waited for, if it was not through before this one came: either way the folder
    # was not touched.
    assert "holds a finished run" in refused or "is in use by process" in refused
    assert "Traceback" not in refused
    assert_same_run(tmp_path / "run", whole_apart)
    assert len(lines(tmp_path / "run")) == STEPS
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 1


def test_a_run_whose_lock_is_deleted_ends_before_it_writes_where_another_may(
    images, command, tmp_path, monkeypatch, capsys
):
    after_step(monkeypatch, 2, (tmp_path / "run" / ".lock").unlink)
    code = train.main(command(images))
    said = capsys.readouterr().err

    assert code == 1
    assert said.startswith(f"error: {tmp_path / 'run' / '.lock'} was deleted or replaced while")
    assert said.count("\n") == 1
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None
