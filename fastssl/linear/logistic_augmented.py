"""Training of heads on features of augmented images: a pass of the frozen backbone an epoch.

Heads at every depth train at once, on the same images. Images go through a DALI graph of their own;
processes share each batch.
"""

from collections.abc import Callable

import numpy as np
import torch

from fastssl import distributed, loader, order, representation
from fastssl.config import Part
from fastssl.evaluation_task import Task
from fastssl.labelled import Split
from fastssl.linear.head import Head
from fastssl.linear.logistic_sgd import Trainer, check_batch
from fastssl.linear.protocols import Sgd


def train(
    heads: dict[str, Head],
    task: Task,
    split: Split,
    graph: Part,
    sgd: Sgd,
    *,
    seed: int,
    told: Callable[[int, float], None],
) -> None:
    """Trains a head a stage, and leaves them in eval mode.

    Args:
        heads: by stage of the backbone, on the task's device, the same on every process.
        task: the backbone, the device and how batches are made.
        split: the images.
        graph: what augments them.
        sgd: how.
        seed: of the order and the augmentation.
        told: after each epoch, its number (from 1) and its mean loss.

    Raises:
        ValueError: see `logistic_sgd.train`; or images can't be read.
    """
    rank, world, count = distributed.rank(), distributed.world(), len(split.rows)
    check_batch(sgd.batch, count)
    own = sgd.batch // world
    per_epoch = order.steps_per_epoch(count, world, own)

    def rows(step: int) -> np.ndarray:
        epoch, within = divmod(step, per_epoch)
        return split.rows[order.shuffled(count, seed, epoch, rank, world, own)[within]]

    device, backbone = task.accelerator.device, task.trained.backbone
    backbone.to(device).eval()
    pool, size = task.features.pooling
    batches = loader.Loader(
        split.reader,
        split.samples,
        graph.module,
        graph.options,
        rows,
        batch=own,
        seed=(seed * world + rank) % 2**31,
        device=device,
        loading=task.loading,
        say=task.say,
    )
    labels_of = torch.from_numpy(split.samples.labels.astype(np.int64)).to(device)
    trainer = Trainer(list(heads.values()), sgd, steps_per_epoch=per_epoch)
    for head in heads.values():
        head.train()
    for epoch in range(sgd.epochs):
        for _ in range(per_epoch):
            tensors = next(batches)
            with torch.no_grad(), task.accelerator.autocast():
                stages = representation.all_stages(backbone, tensors, task.trained.standardize)
            features = [representation.pooled(stages[name].float(), size, pool) for name in heads]
            trainer.step(features, labels_of[tensors["index"]])
        told(epoch + 1, trainer.end_epoch())
    batches.close()
    for head in heads.values():
        head.eval()
