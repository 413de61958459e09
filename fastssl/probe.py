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

from fastssl import distributed, loader, order


@dataclass(frozen=True, kw_only=True)
class Options:
    """The kNN probe of a run."""

    root: str | None = None  # folder with train/<class>/ and val/<class>/; null: the folder around
    # data.root, where that is called train and has a val beside it
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
        if self.temperature <= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0")
        if min(self.images, self.batch) < 1:
            raise ValueError(f"images ({self.images}) and batch ({self.batch}) must be at least 1")


class Knn:
    """The probe of one run: lists the class folders once, then is asked for accuracies."""

    def __init__(
        self,
        root: Path,
        options: Options,
        *,
        reader: ModuleType,
        data: Any,
        graph: ModuleType,
        evaluation: Any,
        cache: Path,
        loading: loader.Options,
        say: Callable[[str], None],
    ) -> None:
        """Lists `root`/train and `root`/val.

        Args:
            root: the folder of both.
            options: of the probe.
            reader: pipelines/readers/*.
            data: the reader's options; their root is replaced.
            graph: the evaluation graph's file.
            evaluation: its options.
            cache: where the reader keeps listings.
            loading: how batches are made.
            say: told what the user should know.

        Raises:
            ValueError: a split has no classes, or val has a class that train lacks.
        """
        self._reader, self._graph, self._evaluation = reader, graph, evaluation
        self._options, self._loading, self._say = options, loading, say
        self._splits = {}
        for name in ("train", "val"):
            here = replace(data, root=str(root / name), limit=None)
            try:
                self._splits[name] = reader.list_samples(here, cache=cache, say=say)
            except ValueError as error:
                raise ValueError(f"probe.root ({root}): {error}") from error
        for name, samples in self._splits.items():
            if samples.labels is None:
                raise ValueError(
                    f"probe.root: {root / name} has no class folders: the kNN probe needs "
                    f"{name}/<class>/<image>; give another probe.root"
                )
        train, val = self._splits["train"], self._splits["val"]
        unknown = sorted(set(val.classes) - set(train.classes))
        if unknown:
            raise ValueError(
                f"probe.root: {root / 'val'} has classes that {root / 'train'} lacks: "
                f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
            )
        self._classes = len(train.classes)
        to_train = np.array([train.classes.index(name) for name in val.classes], np.int64)
        self._labels = {"train": train.labels, "val": to_train[val.labels]}

    def accuracies(self, backbone: nn.Module, accelerator: Accelerator) -> dict[int, float]:
        """The accuracy (0 ... 1) for each number of neighbours, the same on every process."""
        distributed.copy_from_first(backbone.buffers())  # batch norm saw other images on each rank
        was_training = backbone.training
        backbone.eval()
        train_ND, train_labels_N, _ = self._features("train", backbone, accelerator, shared=True)
        val_MD, val_labels_M, counts_M = self._features("val", backbone, accelerator, shared=False)
        backbone.train(was_training)
        accuracies = {}
        for neighbours in self._options.neighbours:
            predicted_M = knn(
                train_ND,
                train_labels_N,
                val_MD,
                neighbours=min(neighbours, len(train_ND)),
                temperature=self._options.temperature,
                classes=self._classes,
            )
            right = ((predicted_M == val_labels_M) & counts_M).sum()
            both = distributed.gather(torch.stack([right, counts_M.sum()])[None]).sum(dim=0)
            accuracies[neighbours] = (both[0] / both[1]).item()
        return accuracies

    @torch.no_grad()
    def _features(
        self, split: str, backbone: nn.Module, accelerator: Accelerator, *, shared: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features [N, D], labels [N] and which count [N] (the last batch is filled up).

        `shared`: of all processes, on each; otherwise this process's own part.
        """
        samples, options = self._splits[split], self._options
        usable = samples.usable
        if split == "train" and len(usable) > options.images:
            usable = usable[np.linspace(0, len(usable) - 1, options.images).astype(np.int64)]
        rank, world = distributed.rank(), distributed.world()
        # A small split doesn't fill a whole batch: no more than its share.
        batch = min(options.batch, -(-len(usable) // world))
        plan = order.in_order(len(usable), rank, world, batch)
        batches = loader.Loader(
            self._reader,
            samples,
            self._graph,
            self._evaluation,
            lambda step: usable[plan[step % len(plan)]],
            batch=batch,
            seed=0,
            device=accelerator.device,
            loading=self._loading,
            say=self._say,
        )
        labels_of = torch.from_numpy(self._labels[split]).to(accelerator.device)
        features, labels, counts = [], [], []
        for step in range(len(plan)):
            tensors = next(batches)
            with accelerator.autocast():
                output = backbone(tensors["image"])
            feature_BD = F.normalize(output.float(), dim=1)
            label_B = labels_of[tensors["index"]]
            first = (step * world + rank) * batch
            count_B = torch.arange(first, first + batch, device=label_B.device) < len(usable)
            if shared:
                feature_BD = distributed.gather(feature_BD)
                label_B = distributed.gather(label_B)
                count_B = distributed.gather(count_B)
            features.append(feature_BD)
            labels.append(label_B)
            counts.append(count_B)
        feature_ND, label_N, count_N = torch.cat(features), torch.cat(labels), torch.cat(counts)
        if shared:  # listing order, so that what was filled up is the tail
            return feature_ND[: len(usable)], label_N[: len(usable)], count_N[: len(usable)]
        return feature_ND, label_N, count_N


def knn(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    *,
    neighbours: int,
    temperature: float,
    classes: int,
    block: int = 1024,
) -> Tensor:
    """The class [M] of each of `val` [M, D] by its neighbours among `train` [N, D], unit rows.

    In blocks: no more than block x N similarities are held.
    """
    predicted = []
    for val_BD in val.split(block):
        similarity_BK, nearest_BK = (val_BD @ train.T).topk(neighbours, dim=1)
        votes_BC = val.new_zeros((len(val_BD), classes)).scatter_add_(
            1, train_labels[nearest_BK], ((similarity_BK - 1) / temperature).exp()
        )
        predicted.append(votes_BC.argmax(dim=1))
    return torch.cat(predicted)


def folder_of(options: Options, data: Any) -> Path | None:
    """The folder to probe on: as given, or the one around a data.root called train beside a val."""
    if options.root is not None:
        return Path(options.root)
    root = Path(data.root).expanduser()
    has_val = root.name == "train" and (root.parent / "val").is_dir()
    return root.parent if has_val else None
