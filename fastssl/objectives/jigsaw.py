"""Jigsaw: which order out of a set are an image's patches in? (Noroozi & Favaro 2016).

By default as in Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4, and the code that they
published, "K19's code"): features of nine patches, each standardised, are joined in 16 orders and
each is classified.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastssl.classification import classification
from fastssl.patch_network import Head, check_head, features_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """K19's settings; VISSL's: embedding_norm true, hidden null, dropout 0, standardize global.

    Attributes:
        patches: how many the pipeline cuts from an image.
        standardize: each patch by mean and deviation of all its values (joint) or of each colour
            (channel), or by those of the data set (global); see fastssl.patch_network.
        embedding: length of a patch's embedding; null joins the backbone's features, as K19's paper
            has it where their code has 1000.
        embedding_norm: batch norm and ReLU behind it.
        hidden: width of the layer behind the joined embeddings; null for a linear classifier.
        dropout: behind the hidden layer.
    """

    patches: int = 9
    standardize: Literal["joint", "channel", "global"] = "joint"
    embedding: int | None = 1000
    embedding_norm: bool = False
    hidden: int | None = 4096
    dropout: float = 0.5

    def __post_init__(self):
        if self.patches not in (4, 9):
            raise ValueError(f"patches ({self.patches}) must be 9 or 4: 3 x 3 or 2 x 2 cells")
        check_head(
            embedding=self.embedding,
            embedding_norm=self.embedding_norm,
            hidden=self.hidden,
            dropout=self.dropout,
        )


class Objective(nn.Module):
    """Cross-entropy over a set of orders."""

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
        """A head for `classes` orders behind `backbone`."""
        del images, labels, seed  # nothing is kept of an image; weights come from torch's generator
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.head = Head(
            features,
            options.patches,
            classes,
            embedding=options.embedding,
            embedding_norm=options.embedding_norm,
            hidden=options.hidden,
            dropout=options.dropout,
        )

    def forward(
        self, patches: Tensor, permutation: Tensor, order: Tensor, label: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of a batch, and `accuracy` with its `chance`.

        Args:
            patches: [B, T, 3, p, p], uint8.
            permutation: [B, T], int64: where each was cut; the pipeline's tests check it.
            order: [B, N, T], int64: the orders in which their features are joined.
            label: [B, N], or [B] for N = 1, int64: the number of that order in the set.
            index: [B], int64, not used.

        Raises:
            ValueError: the pipeline puts out another number of patches than the options say.
        """
        del permutation, index
        if patches.shape[1] != self.options.patches:
            raise ValueError(
                f"objective.patches ({self.options.patches}) must be as many as the pipeline puts"
                f" out: {patches.shape[1]}"
            )
        features = features_of(self.backbone, patches, self.options.standardize)
        return classification(self.head(features, order), label.flatten())

    def finish_step(self) -> None:
        """Nothing is kept between steps."""
