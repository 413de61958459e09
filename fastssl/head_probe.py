"""How well a head classifies images that it does not learn from: top-1 and top-5."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from fastssl import distributed, loader, order, stopping
from fastssl.config import Part
from fastssl.labelled import Split


class HeadProbe:
    """Of one run: is asked for accuracies as often as the run probes."""

    def __init__(
        self,
        val: Split,
        classes: tuple[str, ...],
        graph: Part,
        *,
        batch: int,
        loading: loader.Options,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            val: images with labels.
            classes: those of the run, in the order of the head's scores.
            graph: the evaluation graph.
            batch: images a process and pass.
            loading: how batches are made.
            say: told what the user should know.

        Raises:
            ValueError: val has images of a class that the run does not know.
        """
        found = [val.classes[number] for number in np.unique(val.labels)]
        unknown = [name for name in found if name not in classes]
        if unknown:
            raise ValueError(
                f"{val.samples.root} has classes that data.root lacks: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''}: the head cannot know them; give a"
                " probe.root with the classes of data.root"
            )
        number_of = {name: number for number, name in enumerate(classes)}
        numbers = np.array([number_of.get(name, -1) for name in val.classes], np.int64)
        # of every row of the listing, though only those of the split are asked for
        self._labels = np.full(len(val.samples), -1, np.int64)
        self._labels[val.rows] = numbers[val.labels]
        self._val, self._graph, self._batch = val, graph, batch
        self._loading, self._say = loading, say

    @property
    def images(self) -> int:
        """That are read each time, over all processes."""
        return len(self._val.rows)

    @torch.no_grad()
    def accuracies(
        self, objective: Any, accelerator: Accelerator, stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, float]:
        """The part of val whose class has the highest score, and is among the five highest.

        Every image counts once over all processes, which all get the same answer; one that can't be
        decoded counts for nothing. The objective is left in training mode if it was.

        Args:
            objective: whose head is asked.
            accelerator: of this process.
            stop: whether to give up, asked before each batch; the same on every process.

        Raises:
            stopping.Stopped: it was given up.
        """
        distributed.copy_from_first(objective.buffers())  # batch norm saw other images on each rank
        was_training = objective.training
        objective.eval()
        rows, rank, world = self._val.rows, distributed.rank(), distributed.world()
        batch = min(self._batch, -(-len(rows) // world))
        plan = order.in_order(len(rows), rank, world, batch)
        batches = loader.Loader(
            self._val.reader,
            self._val.samples,
            self._graph.module,
            self._graph.options,
            lambda step: rows[plan[step % len(plan)]],
            batch=batch,
            seed=0,
            device=accelerator.device,
            loading=self._loading,
            say=self._say,
        )
        labels = torch.from_numpy(self._labels).to(accelerator.device)
        counted = torch.zeros(3, dtype=torch.int64, device=accelerator.device)
        for step in range(len(plan)):
            if stop():
                objective.train(was_training)
                raise stopping.Stopped
            tensors = next(batches)
            if "image" not in tensors:
                raise ValueError(
                    f"evaluation.use {self._graph.use} puts out {sorted(tensors)} and no image: the"
                    " head takes whole images; give pipelines.evaluation"
                )
            with accelerator.autocast():
                scores_BC = objective.scores(tensors["image"]).float()
            label_B = labels[tensors["index"]]
            first = (step * world + rank) * batch  # the last batch is filled up
            counts_B = torch.arange(first, first + batch, device=labels.device) < len(rows)
            # The loader puts another image in the place of one that can't be decoded.
            planned_B = torch.from_numpy(rows[plan[step]]).to(labels.device)
            counts_B &= tensors["index"] == planned_B
            top_B5 = scores_BC.topk(min(5, scores_BC.shape[1]), dim=1).indices
            right_B5 = (top_B5 == label_B[:, None]) & counts_B[:, None]
            counted += torch.stack([counts_B.sum(), right_B5[:, 0].sum(), right_B5.sum()])
        objective.train(was_training)
        images, top1, top5 = distributed.gather(counted[None]).sum(dim=0).tolist()
        return top1 / images, top5 / images
