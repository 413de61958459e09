"""Processes and machines that end in the midst of a run, under torchrun, which starts them again.

The spy (spy_faults.py) ends its own process at a given step, as a power cut or the kernel's
out-of-memory killer would: by SIGKILL, in the midst of a step or of a checkpoint.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastssl import checkpoint, data, train
from tests import agents, few_images
from tests.small_run import SMALL, STEPS, assert_same_run, lines, newest, stop_at

SPY = "objective.use=tests.spy_faults"
# Without it torch 2.15's restarted processes look for each other where the former ones were.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory, demo_images) -> Path:
    """Forty images in 5 classes, and nothing to probe beside them."""
    root = tmp_path_factory.mktemp("data")
    return few_images.copy(demo_images, root, train=(8,) * 5, val=()) / "train"


@pytest.fixture(scope="module")
def line(recipe, images) -> Callable[..., list[str]]:
    """The command line of a small run into folder/run, spied on."""

    def command(folder: Path, *overrides: str, root: Path = images) -> list[str]:
        (folder / "spied").mkdir(exist_ok=True, parents=True)
        out = f"train.out={folder / 'run'}"
        return [str(recipe), f"data.root={root}", *SMALL, SPY, out, *overrides]

    return command


@pytest.fixture(scope="module")
def torchrun(checkout, environ) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs train.py under torchrun, spying into folder/spied."""

    def start(
        folder: Path, arguments: list[str], *flags: str, **more: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags]
        return subprocess.run(
            [*launcher, checkout / "fastssl" / "train.py", *arguments],
            env=environ | OWN_STORE | {"SPY_FOLDER": str(folder / "spied")} | more,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    return start


def spied(folder: Path, rank: int) -> list[dict]:
    """What a process saw and held after each step, one a line; steps done twice are there twice."""
    text = (folder / "spied" / f"rank-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# ---- One process ---------------------------------------------------------------------------------


def test_a_process_killed_at_a_random_step_and_while_saving_ends_as_one_that_was_not(
    line, torchrun, tmp_path
):
    step = random.randint(1, STEPS)
    faults = f"0:{random.choice(['forward', 'finish'])}:{step} 0:save:8"
    undisturbed = torchrun(tmp_path / "whole", line(tmp_path / "whole"), "--nproc_per_node=1")
    assert undisturbed.returncode == 0, undisturbed.stdout
    done = torchrun(
        tmp_path, line(tmp_path), "--nproc_per_node=1", "--max-restarts=2", FAULTS=faults
    )

    assert done.returncode == 0, (faults, done.stdout)
    assert len(list((tmp_path / "spied").glob("struck-*"))) == 2, faults
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")


# ---- Two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(line, torchrun, tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes that nothing happens to, which torchrun could not restart: its folder,
    and what it said."""
    folder = tmp_path_factory.mktemp("undisturbed")
    restarting = ["--nproc_per_node=2", "--max-restarts=1"]
    done = torchrun(folder, line(folder), *restarting, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.fixture(scope="module")
def disturbed(line, torchrun, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two processes, one of which is killed; then torchrun is sent a SIGTERM, then the
    same command goes on: its folder, and what the two commands said."""
    folder = tmp_path_factory.mktemp("disturbed")
    restarting = ["--nproc_per_node=2", "--max-restarts=2"]
    first = torchrun(folder, line(folder), *restarting, FAULTS="1:forward:6 0:term:10")
    assert (folder / "spied" / "struck-0:term:10").exists(), first.stdout
    assert newest(folder / "run").name == "step-00000010.pt", first.stdout
    assert not (folder / "run" / "backbone.json").exists()
    second = torchrun(folder, line(folder), *restarting)
    assert second.returncode == 0, second.stdout
    return folder, [first.stdout, second.stdout]


def test_one_of_two_processes_killed_and_torchrun_stopped_end_as_if_nothing_had_been(
    disturbed, undisturbed
):
    folder, _ = disturbed
    other, _ = undisturbed

    assert_same_run(folder / "run", other / "run")
    for rank in (0, 1):
        assert spied(folder, rank)[-1] == spied(other, rank)[-1]  # images, bank, weights
    assert spied(folder, 0)[-1]["weights"] == spied(folder, 1)[-1]["weights"]


def test_the_process_that_is_left_says_in_a_line_that_another_has_ended(disturbed):
    _, (first, _) = disturbed

    assert first.count("the other processes of the run cannot be reached any more") == 1
    assert "going on from" in first
    assert "Traceback" not in first.split("going on from")[0]


def test_torchrun_passes_a_sigterm_on_and_the_run_stops_with_a_checkpoint(disturbed):
    _, (first, second) = disturbed

    assert first.count("stopped by SIGTERM at step 10 of 15") == 1
    assert "step-00000010.pt (step 10)" in second


def test_a_checkpoint_that_comes_too_late_for_the_grace_period_leaves_the_one_before(
    line, torchrun, tmp_path
):
    done = torchrun(
        tmp_path,
        line(tmp_path),
        *("--nproc_per_node=1", "--max-restarts=0"),
        FAULTS="0:term:6 0:late:6",
        PET_SHUTDOWN_TIMEOUT="1",
    )

    assert done.returncode != 0
    assert newest(tmp_path / "run").name == "step-00000004.pt"
    assert checkpoint.load(newest(tmp_path / "run"))["step"] == 4  # whole
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_restarts_that_torchrun_could_not_do_are_warned_of_at_the_start(undisturbed, disturbed):
    _, (able, _) = disturbed
    _, unable = undisturbed
    warning = "unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is in its"

    assert (unable.count(warning), able.count(warning)) == (1, 0)


# ---- Another number of processes -----------------------------------------------------------------

# torchrun, from where another with the other number has been loaded too.
TOGETHER = """
import sys, time
from pathlib import Path
from torch.distributed import run

number = sys.argv.pop(1)
Path(__file__).with_name(f"loaded-{number}").touch()
other = Path(__file__).with_name(f"loaded-{1 - int(number)}")
deadline = time.monotonic() + 300
while not other.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
run.main()
"""


def test_a_run_goes_on_with_more_processes_inside_an_epoch_each_image_once(
    line, torchrun, images, tmp_path, monkeypatch
):
    # Read by chunks, of which each process has its own: what a step sees depends on their number.
    store = tmp_path / "store"
    assert data.main(["pack", str(images), str(store)]) == 0
    reader = ["data.use=pipelines.readers.tar", "data.shuffle=chunks", "data.window=2"]
    small = [*reader, "data.chunk_mb=1", "train.log_steps=5", "train.batch=8"]
    monkeypatch.setenv("SPY_FOLDER", str(tmp_path / "spied"))
    stop_at(monkeypatch, 7)
    assert train.main(line(tmp_path, *small, root=store)) == 75
    monkeypatch.undo()
    alone = [row for step in spied(tmp_path, 0)[5:7] for row in step["images"]]
    done = torchrun(tmp_path, line(tmp_path, *small, root=store), "--nproc_per_node=2")
    after = [spied(tmp_path, rank)[-8:] for rank in (0, 1)]
    seen = [
        [row for rank in after for step in rank[a:b] for row in step["images"]]
        for a, b in ((0, 3), (3, 8))
    ]

    assert done.returncode == 0, done.stdout
    assert "processes: 1 before, 2 now; a pass has 4 images in place of 8" in done.stdout
    assert sorted(alone + seen[0]) == list(range(40))  # the epoch that was under way
    assert sorted(seen[1]) == list(range(40))
    assert [step["weights"] for step in after[0]] == [step["weights"] for step in after[1]]
    assert [each["step"] for each in lines(tmp_path / "run")] == [4, 5, 8, 10, 12, 15]


def test_a_machine_that_is_lost_is_gone_on_without_and_each_image_is_seen_once_an_epoch(
    line, checkout, environ, tmp_path
):
    arguments = line(tmp_path, "train.log_steps=5")
    # Two that come later than last_call_timeout after each other would not be one run.
    (tmp_path / "together.py").write_text(TOGETHER)

    def start(number: int, port: int) -> subprocess.Popen[str]:
        # Silent for 5 s is dead; by default torchrun waits longer, and 600 s for enough machines.
        soon = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=5"
        meeting = [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={1 - number},{soon}"]
        flags = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=machines"]
        script = ["--max-restarts=2", checkout / "fastssl" / "train.py", *arguments]
        own = {"SPY_FOLDER": str(tmp_path / "spied"), "FASTSSL_CACHE": str(tmp_path / str(number))}
        lost = {"FAULTS": "0:machine:7 1:machine:7"} if number == 1 else {}  # whatever its rank
        return subprocess.Popen(
            [sys.executable, tmp_path / "together.py", str(number), *flags, *meeting, *script],
            env=environ | OWN_STORE | own | lost,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    (code, said), (other, last) = agents.two(start)

    assert (code, other) == (0, -9), (said, last)
    assert "step-00000004.pt (step 4)" in said  # within the first epoch of 5 steps
    assert "processes: 2 before, 1 now" in said
    first = [row for rank in (0, 1) for step in spied(tmp_path, rank)[:4] for row in step["images"]]
    rest = [step["images"] for step in spied(tmp_path, 0)[-11:]]  # after step 4, alone
    assert sorted(first + rest[0]) == list(range(40))
    for epoch in (rest[1:6], rest[6:]):
        assert sorted(row for images in epoch for row in images) == list(range(40))
    assert [each["step"] for each in lines(tmp_path / "run")] == [4, 5, 8, 10, 12, 15]
