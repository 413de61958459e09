"""Classification by the folders' classes: the upper reference beside every pretext task.

Cross-entropy of a linear head, set as in Goyal et al. 2017 (arXiv:1706.02677, section 5.1).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.classification import classification


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing of Goyal et al. 2017 is to be set here.

    Attributes:
        label_smoothing: how much of the target is spread over all classes (Szegedy et al. 2016,
            section 7: 0.1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 1"
            )


class Objective(nn.Module):
    """The mean cross-entropy over the classes of the listing."""

    labels: Tensor

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
        """A head with one output for each class in `labels`, -1 where a row has none.

        Raises:
            ValueError: the folder has no classes, or only one.
        """
        del images, classes, seed  # those of the graph's own label: it puts out none
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        found = 0 if labels is None or not len(labels) else int(labels.max()) + 1
        if labels is None or found < 2:
            raise ValueError(
                f"objective.use fastssl.objectives.supervised needs at least 2 classes, and the"
                f" listing has {found}: data.root must hold a folder for each class"
                " (root/<class>/<image>.jpg), and no image beside them"
            )
        self.options = options
        self.backbone = backbone
        self.head = nn.Linear(features, found)
        nn.init.normal_(self.head.weight, std=0.01)  # section 5.1
        nn.init.zeros_(self.head.bias)
        # known from the files, so no part of a checkpoint
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, image: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Classify a batch.

        Args:
            image: [B, 3, S, S], as the backbone takes it.
            index: [B], int64: which images.

        Returns:
            The mean loss of the batch, and: `accuracy`, the part of the images whose class has
            the highest score; `chance`, what accuracy would be by luck.
        """
        scores = self.scores(image)
        return classification(scores, self.labels[index], self.options.label_smoothing)

    def scores(self, image: Tensor) -> Tensor:
        """The score of each class [B, classes] for `image` [B, 3, S, S]."""
        return self.head(self.backbone(image))

    def finish_step(self) -> None:
        """Nothing is kept between steps."""
