"""A run of forty images, five steps an epoch and 1,500 weights; and whether two runs are one."""

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastssl import checkpoint, journal

SMALL = [
    "pipeline.image_size=32",
    "pipeline.patches_crop=48",
    "pipeline.patch=12",
    "evaluation.resize=36",
    "evaluation.crop=32",
    "objective.negatives=16",
    "optim.lr=0.05",
    "optim.lr_batch=8",
    "train.batch=8",
    "train.epochs=3",
    "train.log_steps=1",
    "train.checkpoint_steps=4",
    "probe.batch=16",
]
STEPS = 15


def lines(out: Path, probes: bool = False) -> list[dict]:
    return [line for line in journal.read(out) if ("probe" in line) == probes]


def newest(out: Path) -> Path:
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None
    return found


def assert_same_run(out: Path, other: Path) -> None:
    """Losses and weights bit for bit, and everything else that a checkpoint holds."""
    kept = [[(line["step"], line["loss"]) for line in lines(run)] for run in (out, other)]
    assert kept[0] == kept[1]
    weights = [load_file(run / "backbone.safetensors") for run in (out, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}.pt") for run in (out, other)]
    for part in ("objective", "optimizer", "ranks"):
        assert_equal(states[0][part], states[1][part])


def assert_equal(some, other) -> None:
    assert type(some) is type(other)
    if isinstance(some, dict):
        assert some.keys() == other.keys()
        for key in some:
            assert_equal(some[key], other[key])
    elif isinstance(some, list | tuple):
        assert len(some) == len(other)
        for one, two in zip(some, other, strict=True):
            assert_equal(one, two)
    elif isinstance(some, torch.Tensor):
        assert torch.equal(some, other)
    else:
        assert some == other


def stop_at(monkeypatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Has a signal arrive in the middle of a run, right after `step`."""
    usual = journal.Journal.step

    def signalled(self, now: int) -> None:
        usual(self, now)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(journal.Journal, "step", signalled)
