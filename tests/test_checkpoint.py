"""Checkpoints: back bit for bit, whole or not there, and never trusted when damaged."""

import contextlib
import errno
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastssl import checkpoint
from fastssl.config import RecipeError

STATE: dict[str, Any] = {
    "step": 3,
    "model": {"weight": torch.linspace(0, 1, 7), "count": torch.tensor(4)},
    "half": torch.arange(4).to(torch.bfloat16),
    "plain": [1, 2.5, None, True, "x", b"\x00\xff", (1, "y")],
    "by number": {5: torch.Size([2, 3])},
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 3, STATE, keep=2)
    loaded = checkpoint.load(path)

    assert path == tmp_path / "run" / "checkpoints" / "step-00000003.pt"
    assert loaded.keys() == STATE.keys()
    assert loaded["plain"] == STATE["plain"]
    assert loaded["by number"] == {5: (2, 3)}
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert loaded["half"].dtype == torch.bfloat16


def test_a_network_and_its_optimizer_come_back(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, state, keep=1))

    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for number, wanted in state["optimizer"]["state"].items():
        found = loaded["optimizer"]["state"][number]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for key, wanted in state["model"].items():
        assert torch.equal(loaded["model"][key], wanted)


def test_a_checkpoint_is_a_zip_file_that_pytorch_reads_without_us(tmp_path):
    path = checkpoint.save(tmp_path, 3, STATE, keep=2)
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment

    assert comment.startswith(b"fastssl crc32 ")
    assert torch.load(path, weights_only=True)["plain"] == STATE["plain"]


def test_the_last_k_are_kept(tmp_path):
    for step in (9, 10, 100, 1000):
        checkpoint.save(tmp_path, step, STATE, keep=2)

    assert names(tmp_path) == ["step-00000100.pt", "step-00001000.pt"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00001000.pt"


def test_a_step_saved_twice_is_one_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 5, STATE, keep=2)
    checkpoint.save(tmp_path, 5, {**STATE, "step": 5}, keep=2)

    assert names(tmp_path) == ["step-00000005.pt"]
    assert checkpoint.load(tmp_path / "step-00000005.pt")["step"] == 5


def test_the_new_checkpoint_is_never_the_one_deleted(tmp_path):
    checkpoint.save(tmp_path, 10, STATE, keep=1)
    checkpoint.save(tmp_path, 5, STATE, keep=1)

    assert names(tmp_path) == ["step-00000005.pt", "step-00000010.pt"]


def test_there_is_no_latest_without_checkpoints(tmp_path):
    (tmp_path / "step-best.pt").touch()

    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path):
    with pytest.raises(
        TypeError, match=r"state\['a'\]\[1\] is a numpy.float64, which a checkpoint"
    ):
        checkpoint.save(tmp_path, 1, {"a": [1.0, np.float64(1)]}, keep=1)
    with pytest.raises(TypeError, match=r"a key of state\['a'\] is a pathlib"):
        checkpoint.save(tmp_path, 1, {"a": {Path("b"): 1}}, keep=1)

    assert not names(tmp_path)


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The error comes at the first byte, within a tensor, in the last bytes that only closing writes.
@pytest.mark.parametrize("size", [0, 100, 5_000, 300_000, 400_000, 401_000])
def test_a_file_that_cannot_grow_fails_in_words_and_leaves_the_former_checkpoint(tmp_path, size):
    former = checkpoint.save(tmp_path, 1, STATE, keep=1)
    big = {"bank": torch.zeros(100_000)}
    with (
        largest_file(size),
        pytest.raises(
            checkpoint.CheckpointError,
            match=r"step-00000002.pt could not be written: File too large \(a checkpoint takes 0.4 "
            r"MB\). Raise the limit on the size of files \(ulimit -f\), or name a "
            r"run folder on another disk \(train.out=...\), then start the run again; "
            r"the checkpoint before, step-00000001.pt, is whole",
        ),
    ):
        checkpoint.save(tmp_path, 2, big, keep=1)

    assert names(tmp_path) == [former.name]
    assert checkpoint.load(former)["plain"] == STATE["plain"]


def test_a_full_disk_fails_in_words_and_leaves_the_former_checkpoint(small_disk):
    former = checkpoint.save(small_disk, 1, {"bank": torch.zeros(100_000)}, keep=1)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"No space left on device \(a checkpoint takes 0.8 MB\), 0.6 MB are free",
    ):
        checkpoint.save(small_disk, 2, {"bank": torch.zeros(200_000)}, keep=1)

    assert names(small_disk) == [former.name]
    assert len(checkpoint.load(former)["bank"]) == 100_000


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()

    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"checkpoints/step-00000001.pt could not be written: File exists. See to the folder",
    ):
        checkpoint.save(tmp_path / "checkpoints", 1, STATE, keep=1)


def save_for_long(folder: Path) -> None:
    for step in range(1, 10_000):
        checkpoint.save(folder, step, {"bank": torch.zeros(1_000_000)}, keep=1)


def test_ctrl_c_while_writing_leaves_nothing_behind(tmp_path):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_for_long(tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert not list(tmp_path.glob(".*"))
    assert all(checkpoint.load(path) for path in tmp_path.iterdir())


def test_a_killed_process_leaves_a_whole_checkpoint_and_the_next_save_cleans_up(
    tmp_path, checkout, environ
):
    endless = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from fastssl import checkpoint
        for step in range(1, 10**9):
            path = checkpoint.save(Path(sys.argv[1]), step, {"bank": torch.ones(500_000)}, keep=2)
            print(path, flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", endless, str(tmp_path)],
        cwd=checkout,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        written = [process.stdout.readline().strip() for _ in range(4)]
        process.kill()
    newest = checkpoint.latest(tmp_path)

    assert all(written)
    assert newest is not None
    assert str(newest) >= written[-1]
    assert checkpoint.load(newest)["bank"].sum() == 500_000

    (tmp_path / ".step-99999998.pt.123-0123abcd.tmp").write_bytes(b"half of it")
    checkpoint.save(tmp_path, 99_999_999, STATE, keep=1)

    assert names(tmp_path) == ["step-99999999.pt"]


def test_files_and_folders_of_others_are_left_alone_whatever_their_name(tmp_path):
    (tmp_path / ".mine.tmp").write_bytes(b"of use")
    (tmp_path / ".folder.1-0123abcd.tmp").mkdir()
    checkpoint.save(tmp_path, 1, STATE, keep=1)

    assert names(tmp_path) == [".folder.1-0123abcd.tmp", ".mine.tmp", "step-00000001.pt"]


def test_two_writers_in_one_folder_do_not_meet(tmp_path):
    with checkpoint.whole_file(tmp_path / "a") as one:
        with checkpoint.whole_file(tmp_path / "a") as other, checkpoint.whole_file(tmp_path / "b"):
            other.write(b"other")
        assert (tmp_path / "a").read_bytes() == b"other"
        one.write(b"one")

    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == b"one"


def test_what_another_process_has_checked_is_not_read_again_for_its_check_sum(tmp_path):
    path = checkpoint.save(tmp_path, 1, STATE, keep=1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the seal alone is damaged
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(path)

    assert checkpoint.load(path, checked=True).keys() == STATE.keys()


def test_a_flipped_bit_or_a_missing_end_is_noticed_wherever_it_is(tmp_path):
    path = checkpoint.save(tmp_path, 2, {"bank": torch.arange(20.0)}, keep=2)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 97)]
    for place in [*range(0, len(whole), 13), *range(len(whole) - 30, len(whole))]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(RecipeError, match=r"step-00000002.pt is damaged or cut short"):
            checkpoint.load(path)
    path.write_bytes(whole)

    assert len(damaged) > 100
    assert checkpoint.load(path)["bank"].tolist() == list(range(20))


def test_a_damaged_checkpoint_names_the_one_before(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, STATE, keep=2)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(
        RecipeError,
        match=r"20.pt is damaged or cut short: delete it and start again, which goes on from the "
        r"one before, step-00000010.pt",
    ):
        checkpoint.load(tmp_path / "step-00000020.pt")
    with pytest.raises(RecipeError, match="there is none before it: delete it and start anew"):
        checkpoint.load(tmp_path / "step-00000010.pt")


@pytest.mark.parametrize("damaged", [(), (30,), (30, 20), (20,)])
def test_the_newest_whole_checkpoint_is_loaded_and_each_damaged_one_told(tmp_path, damaged):
    paths = {step: checkpoint.save(tmp_path, step, {"step": step}, keep=3) for step in (9, 20, 30)}
    for step in damaged:
        paths[step].write_bytes(paths[step].read_bytes()[:-1])
    said: list[str] = []
    path, state = checkpoint.load_newest(paths[30], said.append)
    passed = [step for step in damaged if 30 in damaged]
    wanted = {0: 30, 1: 20, 2: 9}[len(passed)]

    assert (path, state["step"]) == (paths[wanted], wanted)
    assert len(said) == bool(passed)
    assert all(paths[step].name in said[0] for step in passed)
    assert all(f"going on from the checkpoint before, {path.name}" in line for line in said)


def test_a_checkpoint_that_is_none_of_ours_is_refused_and_not_passed_over(tmp_path):
    checkpoint.save(tmp_path, 10, {"step": 10}, keep=2)
    path = tmp_path / "step-00000020.pt"
    torch.save(torch.zeros(2), path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x16\x00fastssl crc32 %08x" % zlib.crc32(data))

    with pytest.raises(RecipeError, match="is not a checkpoint of fastssl: it holds Tensor"):
        checkpoint.load_newest(path, print)


def test_a_disk_that_fails_on_the_newest_checkpoint_gives_the_one_before(tmp_path, monkeypatch):
    older, newer = (checkpoint.save(tmp_path, step, {"step": step}, keep=2) for step in (1, 2))
    usual = checkpoint._is_sealed

    def fail(path: Path) -> bool:  # as a bad sector does
        if path == newer:
            raise OSError(errno.EIO, "Input/output error")
        return usual(path)

    monkeypatch.setattr(checkpoint, "_is_sealed", fail)
    with pytest.raises(RecipeError, match=r"00002.pt cannot be read: Input/output error"):
        checkpoint.load(newer)
    said: list[str] = []

    assert checkpoint.load_newest(newer, said.append)[0] == older
    assert len(said) == 1


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere.pt cannot be read: No such file or directory"):
        checkpoint.load(tmp_path / "nowhere.pt")


class Trap:
    """An object that runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run_even_if_its_check_sum_is_right(tmp_path):
    path, sprung = tmp_path / "step-00000001.pt", tmp_path / "sprung"
    torch.save({"model": Trap(sprung)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x16\x00fastssl crc32 %08x" % zlib.crc32(data))

    with pytest.raises(RecipeError, match="is not a checkpoint of fastssl: it holds more than"):
        checkpoint.load(path)
    assert not sprung.exists()

    pickle.loads(pickle.dumps(Trap(sprung)))

    assert sprung.exists()  # the trap works


def test_something_else_with_a_right_check_sum_is_no_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save(torch.zeros(2), path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x16\x00fastssl crc32 %08x" % zlib.crc32(data))

    with pytest.raises(RecipeError, match="is not a checkpoint of fastssl: it holds Tensor"):
        checkpoint.load(path)


def draw() -> list[float]:
    cuda = [torch.rand((), device="cuda").item()] if torch.cuda.is_available() else []
    # gauss and randn keep a second number back
    return [random.gauss(0, 1), np.random.randn(), torch.randn(()).item(), *cuda]


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    draw()
    path = checkpoint.save(tmp_path, 1, checkpoint.rng_state(), keep=1)
    wanted = [draw() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load(path))
    found = [draw() for _ in range(3)]

    assert found == wanted


def test_random_states_of_a_gpu_may_be_missing():
    state = checkpoint.rng_state()
    wanted = draw()[:3]
    checkpoint.set_rng_state({**state, "cuda": None})

    assert draw()[:3] == wanted
