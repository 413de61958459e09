"""Trains a detector: schedule, steps, checkpoints, resume. One run a folder, whatever happens."""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import checkpoint, distributed, journal, stopping
from fastssl.detection.detector import Detector
from fastssl.loader import Loader

FIRST = 0.001  # of the learning rate, where warm-up begins: Detectron2's WARMUP_FACTOR


@dataclass(frozen=True)
class Schedule:
    """Steps of SGD; the learning rate is that of the batch used, nothing is scaled."""

    steps: int
    decay_steps: tuple[int, ...]  # steps after which the rate is a tenth
    warmup_steps: int  # linear, from FIRST of the rate
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4  # none of batch norm's weights: Detectron2's WEIGHT_DECAY_NORM

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0: Detectron2's."""
        rate = self.lr * 0.1 ** sum(step >= after for after in self.decay_steps)
        if step < self.warmup_steps:
            done = step / self.warmup_steps
            rate *= FIRST * (1 - done) + done
        return rate


def train(
    detector: Detector,
    loader: Loader,
    targets: Callable[[dict[str, Tensor]], list[dict[str, Tensor]]],
    schedule: Schedule,
    *,
    accelerator: Accelerator,
    folder: Path,
    settings: dict[str, Any],
    seed: int,
    log_steps: int,
    checkpoint_steps: int,
    say: Callable[[str], None],
) -> None:
    """Trains `detector`, already on its device, in place; goes on where `folder` was left.

    Args:
        detector: fresh heads around the backbone.
        loader: of this process.
        targets: of a batch.
        schedule: of the steps.
        accelerator: precision and processes.
        folder: of this training: metrics.jsonl and checkpoints/, the last of which is kept.
        settings: what must be the same at a resumption, plain values.
        seed: of what is drawn while training.
        log_steps: between lines.
        checkpoint_steps: between checkpoints.
        say: told how it goes.

    Raises:
        ValueError: the folder's checkpoint is of other settings, or the loss is no number.
        SystemExit: code 75, after SIGINT or SIGTERM and a checkpoint.
    """
    rank, world = distributed.rank(), distributed.world()
    # Signals and states are agreed on over the CPU, so that no step waits for a GPU.
    control: Any = dist.new_group(backend="gloo") if world > 1 else None
    optimizer = _optimizer(detector, schedule)
    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers; Accelerate 1.15 does not know the new name yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(detector, optimizer)
    set_seed((seed * 1_000_003 + rank) % 2**31)  # regions are sampled: not alike everywhere
    step = 0
    latest = distributed.object_from_first(checkpoint.latest(folder / "checkpoints"), control)
    if latest is not None:
        saved = checkpoint.load(latest)
        _refuse_others(latest, saved["settings"], settings)
        detector.load_state_dict(saved["detector"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        loader.resume(saved["ranks"][rank]["loader"])
        checkpoint.set_rng_state(saved["ranks"][rank]["rng"])
        step = saved["step"]
        say(f"detect: going on from {latest} (step {step})")
    if rank == 0:
        _cut_back(folder, step)

    def save() -> None:
        here = {"loader": loader.state(), "rng": checkpoint.rng_state()}
        ranks = distributed.objects_to_first(here, control)
        if rank == 0:
            state = {
                "step": step,
                "settings": settings,
                "detector": detector.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "ranks": ranks,
            }
            checkpoint.save(folder / "checkpoints", step, state, 1)

    recent: list[dict[str, Tensor]] = []
    began, begun_at, saved_at = time.perf_counter(), step, step
    model.train()
    with stopping.signals() as stop:
        while step < schedule.steps and not stop.agreed(control):
            lr = schedule.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            tensors = next(loader)
            losses = model(tensors["image"], tensors["size"], targets(tensors))
            accelerator.backward(sum(losses.values()))
            optimizer.step()
            recent.append({name: loss.detach() for name, loss in losses.items()})
            step += 1
            at_end = step == schedule.steps
            to_save = step % checkpoint_steps == 0 or at_end
            if not (to_save or step % log_steps == 0):
                continue
            means = _means(recent)  # waits for the GPU, and before a checkpoint: none of a NaN
            recent.clear()
            if not math.isfinite(means["loss"]):
                raise ValueError(
                    f"detect: the loss is {means['loss']} at one of the steps up to {step}: a "
                    "lower detect.lr, more detect.warmup_steps or evaluate.precision=fp32 may help"
                )
            images = (step - begun_at) * len(tensors["image"]) * world
            line = {"lr": lr, "images_per_second": images / (time.perf_counter() - began), **means}
            if rank == 0:
                _write(folder, {"step": step, **line})
            say(
                f"detect: step {step}/{schedule.steps}  loss {means['loss']:.4g}  lr {lr:.3g}  "
                f"{line['images_per_second']:.3g} images/s"
            )
            if to_save:
                save()
                saved_at = step
            began, begun_at = time.perf_counter(), step
    if step < schedule.steps:
        if saved_at < step and (not recent or math.isfinite(_means(recent)["loss"])):
            save()
        if control is not None:
            dist.barrier(group=control)  # a process that ends early has its launcher end the others
        say(f"detect: stopped at step {step}; the same command goes on from {folder}")
        raise SystemExit(stopping.STOPPED)


def _optimizer(detector: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    norms = [m for m in detector.modules() if isinstance(m, _BatchNorm)]
    undecayed = {id(p) for norm in norms for p in norm.parameters()}
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in undecayed]},
        {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )


def _means(recent: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each loss's mean over steps and processes, and `loss`, that of their sum."""
    names = sorted(recent[0])
    table = torch.stack(
        [torch.stack([losses[name].float() for name in names]) for losses in recent]
    )
    means = distributed.gather(table.mean(dim=0)[None]).mean(dim=0).tolist()
    return {"loss": sum(means), **dict(zip(names, means, strict=True))}


def _refuse_others(path: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    unlike = [
        f"{key} was {saved.get(key)!r} and is {here.get(key)!r}"
        for key in dict.fromkeys([*saved, *here])
        if saved.get(key) != here.get(key)
    ]
    if unlike:
        raise ValueError(
            f"detect: {path} can't be gone on from: {'; '.join(unlike)}; make it equal again, or "
            f"delete {path.parents[1]} to train anew"
        )


def _cut_back(folder: Path, step: int) -> None:
    """Lines from after the checkpoint are written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [line for line in journal.read(folder) if line["step"] <= step]
    with checkpoint.whole_file(folder / "metrics.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def _write(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
