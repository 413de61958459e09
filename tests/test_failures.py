"""Failures of the machine as one line, and those of this code as a traceback."""

import errno
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastssl import config, evaluate, failures, train
from fastssl.checkpoint import CheckpointError


def raised(make) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError, TypeError)) as error:
        make()
    return error.value


@pytest.mark.parametrize("features", [2**45, 2**62])
def test_torch_s_errors_of_memory_are_known(features):
    error = raised(lambda: nn.Linear(features, 1))

    assert failures.is_of_memory(error)
    said = failures.told(error)
    assert said is not None
    assert "train.accumulate" in said
    assert "\n" not in said


def test_a_gpu_s_error_of_memory_is_known():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 ...")

    assert failures.is_of_memory(error)
    assert "20.00 MiB" in str(failures.told(error))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (CheckpointError("the disk of it all is full"), "the disk of it all is full"),
        (torch.distributed.DistBackendError("nccl"), "the other processes of the run"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] closed"), "other processes of the run"),
    ],
)
def test_disk_and_other_processes_are_told(error, line):
    assert line in str(failures.told(error))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), KeyError("x"), FileNotFoundError(errno.ENOENT, "gone")]
)
def test_what_nobody_foresaw_keeps_its_traceback(error):
    assert failures.told(error) is None


def test_a_head_that_has_no_place_ends_a_run_in_one_line(checkout, tmp_path, capsys):
    recipe = str(checkout / "recipes" / "relative_patch.yaml")
    code = train.start(
        lambda: config.load(recipe, [f"train.out={tmp_path}", f"objective.embedding={2**50}"])
    )

    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is not enough memory: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


DIVERGED = train.Diverged(0, math.nan, np.array([0]), str, is_saved=False)


@pytest.mark.parametrize(
    ("error", "together", "is_told"),
    [
        (ValueError("a file fails here"), True, True),
        (CheckpointError("the disk is full here"), True, True),
        (ValueError("a misspelt key"), False, False),
        (DIVERGED, True, False),  # all processes find that
    ],
)
def test_a_failure_of_one_process_among_others_is_told_by_it(
    monkeypatch, capsys, error, together, is_told
):
    def train_and_fail(recipe, until_the_end) -> int:
        if together:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            until_the_end.callback(dist.destroy_process_group)
        raise error

    monkeypatch.setattr(train, "train", train_and_fail)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    recipe: Any = SimpleNamespace()
    code = train.start(lambda: recipe)
    said = capsys.readouterr().err

    assert code == (2 if isinstance(error, ValueError) else 1)
    assert not dist.is_initialized()
    assert said.count("\n") == is_told
    assert not is_told or (said.startswith("error (rank 3 on ") and str(error) in said)


def test_images_that_are_lost_while_training_are_no_mistake_in_the_recipe(tmp_path):
    lost = train.DataLost(ValueError("s3://b/x: cut"), None)
    gone_on = train.DataLost(ValueError("s3://b/x: cut"), tmp_path / "step-00000004.pt")

    assert not isinstance(lost, ValueError)  # which ends with 2
    assert str(lost).endswith("the same command starts anew: nothing was saved yet)")
    assert str(gone_on).endswith(f"the same command goes on from {tmp_path}/step-00000004.pt)")


def test_a_store_that_went_away_is_no_mistake_however_it_is_told():
    class Away(ValueError, ConnectionError):
        pass

    try:
        try:
            raise Away("s3://b/k: the store answered 503")
        except ValueError as error:
            raise ValueError(f"data.root: {error}") from error
    except ValueError as error:
        told = error

    assert not failures.is_mistake(told)
    assert not failures.is_mistake(Away("503"))
    assert not failures.is_mistake(OSError("full"))
    assert failures.is_mistake(config.RecipeError("no such key"))
    assert evaluate.failed(told) == 1
    assert evaluate.failed(config.RecipeError("no such key")) == 2
