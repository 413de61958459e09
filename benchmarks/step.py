"""One process's training step, made as fastssl/train.py makes it, on whatever batch it is given."""

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from fastssl import optim, order, starting
from fastssl.config import Recipe

LEAST = 2  # images: batch norm needs two values of a channel
# What DALI and CUDA's libraries say, in a RuntimeError like any other, when memory is used up.
NO_MEMORY = ("out of memory", "allocation failed", "Can't allocate", "bad_alloc", "ALLOC_FAILED")

Step = Callable[[dict[str, Tensor]], None]


def make(recipe: Recipe, samples: Any) -> Step:
    """Forward, backward, optimizer and `finish_step` of a recipe, at its precision and layout.

    An optimizer step follows every batch, whatever train.accumulate; the learning rate is that of
    the run's first step.

    Args:
        recipe: its objective, backbone, optimizer and train sections.
        samples: the listing: as many rows has a memory bank.

    Raises:
        ValueError: the recipe asks for what can't be.
    """
    options = recipe.train
    on_cpu = not torch.cuda.is_available()
    set_seed(options.seed)
    backbone = recipe.backbone.module.backbone(recipe.backbone.options)
    objective: Any = recipe.objective.module.Objective(
        backbone,
        recipe.objective.options,
        images=len(samples),
        classes=recipe.pipeline.options.classes,
        labels=None if samples.labels is None else torch.from_numpy(samples.labels),
        seed=options.seed,
    )
    precision = starting.mixed_precision(options.precision, on_cpu, key="train.precision")
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    objective = objective.to(device=accelerator.device, memory_format=torch.channels_last)
    if options.compile:
        backbone.compile()
    optimizer = optim.optimizer(recipe.optim, objective)
    steps_per_epoch = order.steps_per_epoch(len(samples.usable), 1, options.batch)
    for group in optimizer.param_groups:
        group["lr"] = optim.learning_rate(
            recipe.optim,
            0,
            steps=options.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            batch=options.batch,
        )
    model, optimizer = accelerator.prepare(objective, optimizer)
    model.train()

    def step(tensors: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        loss, _ = model(**tensors)
        accelerator.backward(loss)
        if options.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        objective.finish_step()

    return step


def fitting(
    step: Step, draw: Callable[[int], dict[str, Tensor]], most: int, seconds: float
) -> tuple[dict[str, Tensor], float]:
    """The largest batch that steps within `seconds` and fits the GPU: the batch, seconds a step.

    Begins with two images, which is also what it comes to where a step takes longer.

    Args:
        step: to be timed; it trains.
        draw: gives a batch of so many images.
        most: images.
        seconds: of a step.

    Raises:
        ValueError: not even two images fit the GPU.
    """
    images = min(LEAST, most)
    while True:
        tried = _tried(step, draw, images)
        if tried is None:
            if images <= LEAST:
                raise ValueError(
                    f"a step of {images} images does not fit the GPU's memory: give a smaller "
                    "network or smaller crops, or free the GPU"
                )
            gc.collect()  # DALI's pipelines are full of cycles
            torch.cuda.empty_cache()
            most = images = images // 2
            continue
        batch, took = tried
        larger = min(most, images * 2 ** int(math.log2(max(1.0, seconds / took))))
        if larger <= images:
            return batch, took
        images = larger


def _tried(
    step: Step, draw: Callable[[int], dict[str, Tensor]], images: int
) -> tuple[dict[str, Tensor], float] | None:
    """A batch and the seconds of its step; None where the memory does not do.

    When this returns, what held the memory is gone: the batch, and the error's frames.
    """
    try:
        batch = draw(images)
        return batch, _seconds(step, batch, warm_up=images == LEAST)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in NO_MEMORY)


def _seconds(step: Step, batch: dict[str, Tensor], *, warm_up: bool) -> float:
    """Of one step; on a GPU of the second one: the first one of a size tries kernels out."""
    on_gpu = next(iter(batch.values())).is_cuda
    if on_gpu or warm_up:
        step(batch)
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began
