"""Relative patch location: which of eight neighbours is it? (Doersch, Gupta & Efros 2015).

By default as in Kolesnikov, Zhai & Beyer 2019 (arXiv:1901.09005, section 4, and the code that they
published): the head of jigsaw over two patches, each standardised, a neighbour and the centre.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastssl.classification import classification
from fastssl.patch_network import Head, check_head, features_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """K19's settings.

    Attributes:
        standardize: each patch by mean and deviation of all its values (joint) or of each colour
            (channel), or by those of the data set (global); see fastssl.patch_network.
        embedding: length of a patch's embedding; null joins the backbone's features, as K19's paper
            has it where their code has 1000.
        embedding_norm: batch norm and ReLU behind it.
        hidden: width of the layer behind the joined embeddings; null for a linear classifier, which
            sees each patch for itself and can only know that a top left corner looks like one.
        dropout: behind the hidden layer.
    """

    standardize: Literal["joint", "channel", "global"] = "joint"
    embedding: int | None = 1000
    embedding_norm: bool = False
    hidden: int | None = 4096
    dropout: float = 0.5

    def __post_init__(self):
        check_head(
            embedding=self.embedding,
            embedding_norm=self.embedding_norm,
            hidden=self.hidden,
            dropout=self.dropout,
        )


class Objective(nn.Module):
    """Cross-entropy over the eight directions."""

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
        """A head for `classes` directions behind `backbone`."""
        del images, labels, seed  # nothing is kept of an image; weights come from torch's generator
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.head = Head(
            features,
            2,
            classes,
            embedding=options.embedding,
            embedding_norm=options.embedding_norm,
            hidden=options.hidden,
            dropout=options.dropout,
        )

    def forward(
        self, patches: Tensor, pair: Tensor, label: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of a batch, and `accuracy` with its `chance`.

        Args:
            patches: [B, F, 3, p, p], uint8.
            pair: [B, N, 2], int64: positions in F of a neighbour and of the centre.
            label: [B, N], or [B] for N = 1, int64: which neighbour.
            index: [B], int64, not used.
        """
        del index
        features = features_of(self.backbone, patches, self.options.standardize)
        return classification(self.head(features, pair), label.flatten())

    def finish_step(self) -> None:
        """Nothing is kept between steps."""
