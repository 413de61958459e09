"""Exemplar: views of one image should embed nearer to each other than to views of others.

Dosovitskiy et al. 2014 gave every image a class of its own, which `exemplar_classes` does; here is
the form of Kolesnikov, Zhai & Beyer 2019 (K19): a triplet loss over the views of a batch, so that
no head grows with the data set. For an anchor a, a positive p (another view of the same image) and
a negative n (a view of another image), with d the squared L2 distance of embeddings:

    loss(a, p) = max(0, margin + d(a, p) - d(a, n))

Which n is the mining: K19 take the semi-hard one, as tf.contrib's triplet_semihard_loss does
(Schroff et al. 2015, section 3.2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl import distributed
from fastssl.patch_network import features_of

ANCHORS = 512  # scored at a time: 512 x 4096 views take 42 MB while the negatives are sorted


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of K19's code.

    Attributes:
        margin: by how much a negative must be farther than the positive. Squared distances of unit
            embeddings lie in 0 ... 4.
        dimension: of the embeddings; K19 use the 1000 outputs that ImageNet's classes would have.
        mining: semi_hard takes for every positive pair the nearest negative that is farther than
            the positive, and the farthest of all where none is; the loss is the mean over positive
            pairs. batch_hard takes for every anchor its farthest positive and nearest negative
            (Hermans et al. 2017, equation 5, who found distances that are not squared to train
            more stably); the loss is the mean over anchors.
        normalize: embedding gives each embedding length 1. batch gives each of the dimensions
            length 1 over all views of the batch, as K19's code does (tf.nn.l2_normalize with
            axis=0, self_supervision/exemplar.py:134 of google/revisiting-self-supervised),
            probably by mistake: distances then shrink as the batch grows.
        standardize: each view by mean and deviation of all its values (joint: K19's code, where
            the paper is silent) or of each color (channel), or only as the backbone normalises
            any image (global); see fastssl.patch_network.
    """

    margin: float = 0.5
    dimension: int = 1000
    mining: Literal["semi_hard", "batch_hard"] = "semi_hard"
    normalize: Literal["embedding", "batch"] = "embedding"
    standardize: Literal["joint", "channel", "global"] = "global"

    def __post_init__(self):
        if not self.margin > 0:
            raise ValueError(f"margin ({self.margin}) must be above 0")
        if self.dimension < 2:
            raise ValueError(
                f"dimension ({self.dimension}) must be at least 2: unit vectors of one number are"
                " 1 or -1"
            )


class Objective(nn.Module):
    """A linear head on the backbone, and the triplet loss over the batch of all processes."""

    def __init__(
        self,
        backbone: nn.Module,
        options: Options,
        *,
        images: int,
        classes: int,
        labels: Tensor | None,
        seed: int,
    ):
        """A head for `backbone`."""
        del images, classes, labels, seed  # the batch alone says what is alike
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.head = nn.Linear(features, options.dimension)

    def forward(self, views: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the views of a batch against each other and those of the other processes.

        Args:
            views: [B, K, 3, S, S], as the backbone takes them; K at least 2.
            index: [B], int64: which images. Views of an image that is in the batch twice are no
                negatives of each other; positives are the K - 1 other views beside a view.

        Returns:
            The mean loss, and: `accuracy`, the part of the views whose nearest other view is of the
            same image; `chance`, what it would be by luck, (K - 1) / (N - 1) among N views; `std`,
            the spread of the unit embeddings over the batch, about 1 when in all directions and 0
            when collapsed (one image a process has none).

        Raises:
            ValueError: there is but one view of an image, or one image in the batch.
        """
        count = views.shape[1]
        if count < 2:
            raise ValueError(f"pipeline.views ({count}) must be at least 2: a positive is needed")
        features_AD = features_of(self.backbone, views, self.options.standardize).flatten(0, 1)
        outputs_AD = self.head(features_AD).to(self.head.weight.dtype)
        with torch.autocast(views.device.type, enabled=False):
            # A = views here, the anchors; N = views of all processes; D = dimension
            joined_ND = distributed.gather_with_gradient(outputs_AD)
            axis = 1 if self.options.normalize == "embedding" else 0
            joined_ND = functional.normalize(joined_ND, dim=axis)
            image_N = distributed.gather(index.flatten()).repeat_interleave(count)
            own = torch.arange(len(outputs_AD), device=index.device)
            own += distributed.rank() * len(outputs_AD)
            if len(image_N) < 2 * count:
                raise ValueError("one image has no negatives: give train.batch at least 2 of them")
            blocks = [
                triplets(joined_ND, image_N, anchors, count, self.options)
                for anchors in own.split(ANCHORS)
            ]
            # A mean over own anchors, of which every process has as many: DDP's mean is the whole's
            loss = torch.cat([losses.flatten() for losses, _ in blocks]).mean()

        with torch.no_grad():
            right_A = torch.cat([right for _, right in blocks])
            unit_AD = functional.normalize(outputs_AD.float(), dim=1)
            others = max(1, len(image_N) - 1)
            metrics = {
                "accuracy": right_A.float().mean(),
                "chance": torch.full((), (count - 1) / others, device=index.device),
            }
            if len(views) > 1:  # views of one image alone are to be alike
                spread_D = unit_AD.std(0, correction=0)
                metrics["std"] = self.options.dimension**0.5 * spread_D.mean()
        return loss, metrics

    def finish_step(self) -> None:
        """Nothing is kept from step to step."""


def triplets(
    embeddings_ND: Tensor, image_N: Tensor, anchors_A: Tensor, views: int, options: Options
) -> tuple[Tensor, Tensor]:
    """The losses of some anchors, [A, views - 1] or [A, 1], and who found its image [A], bool.

    Time N log N and memory 20 N bytes an anchor, for the sorted negatives; for the backward pass
    only positions are kept. An anchor without any negative has loss 0 and has found its image.

    Args:
        embeddings_ND: of all views, normalised; those of an image stand together.
        image_N: int64, which image a view is of.
        anchors_A: int64, positions in embeddings_ND.
        views: K, how many stand together.
        options: margin and mining are used.
    """
    device = anchors_A.device
    lengths_N = embeddings_ND.square().sum(1)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b; rounding may leave it a little below 0
    distance_AN = lengths_N[anchors_A, None] + lengths_N
    distance_AN = distance_AN - 2 * embeddings_ND[anchors_A] @ embeddings_ND.T
    steps = torch.arange(1, views, device=device)  # from a view round to the others of its image
    positive_AP = anchors_A[:, None] // views * views + (anchors_A[:, None] + steps) % views
    near_AP = distance_AN.gather(1, positive_AP)
    with torch.no_grad():
        other_AN = image_N[anchors_A, None] != image_N
        negatives_A1 = other_AN.sum(1, keepdim=True)
        far_AN = distance_AN.masked_fill(~other_AN, torch.inf)
        nearest_A1, position_A1 = far_AN.min(1, keepdim=True)
        right_A = (near_AP.min(1, keepdim=True).values < nearest_A1).squeeze(1)
    if options.mining == "batch_hard":
        near_AP = near_AP.max(1, keepdim=True).values
        chosen_AP = position_A1
    else:
        with torch.no_grad():
            ordered_AN, position_AN = far_AN.sort(1)
            # the first that is truly farther, or the last that is a negative
            rank_AP = torch.searchsorted(ordered_AN, near_AP, right=True)
            rank_AP = torch.minimum(rank_AP, negatives_A1 - 1).clamp_min(0)
            chosen_AP = position_AN.gather(1, rank_AP)
    losses = functional.relu(options.margin + near_AP - distance_AN.gather(1, chosen_AP))
    return losses.masked_fill(negatives_A1 == 0, 0), right_A
