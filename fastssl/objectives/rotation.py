"""Rotation: tell by how much an image was turned (Gidaris et al. 2018; Kolesnikov et al. 2019).

Cross-entropy of a linear layer on the backbone's features, averaged over all turned copies.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.classification import classification


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing to set: the set of turns and the number of copies are the graph's."""


class Objective(nn.Module):
    """The classifier of turns on top of the backbone."""

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
        """A head for `classes` turns.

        Raises:
            ValueError: the graph puts out no label, or one with a single value.
        """
        del images, labels, seed
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes ({classes}) must be at least 2 turns to tell apart")
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.head = nn.Linear(features, classes)

    def forward(
        self, turned: Tensor, angle: Tensor, label: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell the turn of every copy.

        Args:
            turned: [B, F, 3, S, S], as the backbone takes it: F copies of each image.
            angle: [B, F] or, with one copy, [B], int64: degrees; the graph's tests check it.
            label: the same shape: which of the turns.
            index: [B], int64: which images.

        Returns:
            The mean loss over copies, and: `accuracy` over them; `chance`, 1 / turns.
        """
        del angle, index
        # all copies of the batch in one call; a view, as flatten keeps channels-last memory
        return classification(self.head(self.backbone(turned.flatten(0, 1))), label.flatten())

    def finish_step(self) -> None:
        """Nothing is kept from step to step."""
