"""How good the features are while the backbone trains: weighted k-nearest-neighbour classification.

Cosine similarity, votes weighted by exp(similarity / temperature) (Wu et al. 2018, section 3.4;
k 200 and temperature 0.07 there). Images go through the evaluation graph; all processes share the
work.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fastssl import distributed, labelled, loader, order, stopping
from fastssl.labelled import Split
from fastssl.neighbours import nearest, votes
from fastssl.patch_network import Standardization
from fastssl.representation import represent


@dataclass(frozen=True, kw_only=True)
class Options:
    """The kNN probe of a run."""

    root: str | None = None  # folder (or s3:// url) with train/<class>/ and val/<class>/, or what
    # else the reader reads; null: the folder around data.root, where that is called train and has a
    # val beside it
    every_epochs: int = 0  # 0: before the first step and after the last only
    neighbours: tuple[int, ...] = (20, 200)  # each capped at the number of training images
    temperature: float = 0.07
    images: int = (
        100_000  # of the training split at most, evenly spaced: their features stay in memory
    )
    batch: int = 128  # images a process and pass

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        if self.every_epochs < 0:
            raise ValueError(f"every_epochs ({self.every_epochs}) must be at least 0")
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours ({list(self.neighbours)}) must be positive numbers")
        if not self.temperature >= 1e-4:  # the nearest one's vote would be no number in float32
            raise ValueError(f"temperature ({self.temperature}) must be above 0, 0.0001 at least")
        if min(self.images, self.batch) < 1:
            raise ValueError(f"images ({self.images}) and batch ({self.batch}) must be at least 1")


class Knn:
    """The probe of one run: lists the class folders once, then is asked for accuracies."""

    def __init__(
        self,
        root: Path | str,
        options: Options,
        *,
        reader: ModuleType,
        data: Any,
        graph: ModuleType,
        evaluation: Any,
        cache: Path,
        loading: loader.Options,
        say: Callable[[str], None],
        standardize: Standardization = "global",
    ) -> None:
        """Lists `root`/train and `root`/val.

        Args:
            root: the folder, or s3:// url, of both.
            options: of the probe.
            reader: pipelines/readers/*.
            data: the reader's options; their root and limit are replaced.
            graph: the evaluation graph's file.
            evaluation: its options.
            cache: where the reader keeps listings.
            loading: how batches are made.
            say: told what the user should know.
            standardize: what the objective does to patches, for a graph that puts out patches.

        Raises:
            ValueError: a split has no classes, or val has a class that train lacks.
        """
        self._graph, self._evaluation = graph, evaluation
        self._standardize: Standardization = standardize
        self._options, self._loading, self._say = options, loading, say
        try:
            # Of training's images a subset may be asked for: it is not the probe's.
            all_of = labelled.whole(data, str(root))
            train, val, classes = labelled.splits(reader, all_of, cache=cache, say=say)
        except ValueError as error:
            what = str(error).removeprefix("data.root: ")  # of the reader, which knows no other key
            raise ValueError(f"probe.root ({root}): {what}") from error
        if len(train.rows) > options.images:
            some = np.linspace(0, len(train.rows) - 1, options.images).astype(np.int64)
            train = replace(train, rows=train.rows[some], labels=train.labels[some])
        self._train, self._val, self._classes = train, val, len(classes)

    @property
    def images(self) -> int:
        """That are read each time, over all processes."""
        return len(self._train.rows) + len(self._val.rows)

    def accuracies(
        self,
        backbone: nn.Module,
        accelerator: Accelerator,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[int, float]:
        """The accuracy (0 ... 1) for each number of neighbours, the same on every process.

        Args:
            backbone: left in training mode if it was.
            accelerator: of this process.
            stop: whether to give up, asked before each batch; the same on every process.

        Raises:
            stopping.Stopped: it was given up.
        """
        distributed.copy_from_first(backbone.buffers())  # batch norm saw other images on each rank
        was_training = backbone.training
        backbone.eval()
        try:
            train_ND, train_label_N, _ = self._features(
                self._train, backbone, accelerator, stop, is_shared=True
            )
            val_MD, val_label_M, is_counted_M = self._features(
                self._val, backbone, accelerator, stop, is_shared=False
            )
        finally:
            backbone.train(was_training)
        counts = [min(each, len(train_ND)) for each in self._options.neighbours]
        similarity, labels = nearest([(train_ND, train_label_N)], val_MD, max(counts))
        given = votes(
            similarity,
            labels,
            neighbours=counts,
            temperature=self._options.temperature,
            classes=self._classes,
        )
        accuracies = {}
        for neighbours, count in zip(self._options.neighbours, counts, strict=True):
            is_right_M = given[count].argmax(dim=1) == val_label_M
            right = (is_right_M & is_counted_M).sum()
            both = distributed.gather(torch.stack([right, is_counted_M.sum()])[None]).sum(dim=0)
            accuracies[neighbours] = (both[0] / both[1]).item()
        return accuracies

    @torch.no_grad()
    def _features(
        self,
        split: Split,
        backbone: nn.Module,
        accelerator: Accelerator,
        stop: Callable[[], bool],
        *,
        is_shared: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features [N, D], labels [N] and which count [N].

        Those don't that fill up the last batch, or stand in for an image that can't be decoded.
        `is_shared`: of all processes, on each, those that count; otherwise this process's own part.
        """
        rank, world, count = distributed.rank(), distributed.world(), len(split.rows)
        # A small split doesn't fill a whole batch: no more than its share.
        batch = min(self._options.batch, -(-count // world))
        plan = order.in_order(count, rank, world, batch)
        batches = loader.Loader(
            split.reader,
            split.samples,
            self._graph,
            self._evaluation,
            lambda step: split.rows[plan[step % len(plan)]],
            batch=batch,
            seed=0,
            device=accelerator.device,
            loading=self._loading,
            say=self._say,
        )
        # By row: the loader puts another image in the place of one that can't be decoded.
        label_of_row = torch.full((len(split.samples),), -1, dtype=torch.int64)
        label_of_row[torch.from_numpy(split.rows)] = torch.from_numpy(split.labels)
        label_of_row = label_of_row.to(accelerator.device)
        features, labels, is_counted = [], [], []
        for step in range(len(plan)):
            if stop():
                raise stopping.Stopped
            tensors = next(batches)
            with accelerator.autocast():
                output = represent(backbone, tensors, self._standardize)
            feature_BD = F.normalize(output.float(), dim=1)
            label_B = label_of_row[tensors["index"]]
            first = (step * world + rank) * batch
            is_counted_B = torch.arange(first, first + batch, device=label_B.device) < count
            planned_B = torch.from_numpy(split.rows[plan[step]]).to(label_B.device)
            is_counted_B &= tensors["index"] == planned_B
            if is_shared:
                feature_BD = distributed.gather(feature_BD)
                label_B = distributed.gather(label_B)
                is_counted_B = distributed.gather(is_counted_B)
            features.append(feature_BD)
            labels.append(label_B)
            is_counted.append(is_counted_B)
        feature_ND, label_N = torch.cat(features), torch.cat(labels)
        is_counted_N = torch.cat(is_counted)
        if is_shared:
            return feature_ND[is_counted_N], label_N[is_counted_N], is_counted_N[is_counted_N]
        return feature_ND, label_N, is_counted_N


def folder_of(options: Options, data: Any) -> str | None:
    """The folder to probe on: as given, or the one around a data.root called train beside a val.

    A list is called train.csv beside a val.csv. In an object store nothing is looked for.
    """
    if options.root is not None or labelled.is_url(data.root):
        return options.root
    root = Path(data.root).expanduser()
    name = root.stem if root.suffix in labelled.LISTS else root.name
    has_val = (
        name == "train" and labelled.place(str(root.parent), labelled.second()[:2]) is not None
    )
    return str(root.parent) if has_val else None
