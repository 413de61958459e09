"""Fine-tuning: a trained backbone and a fresh head learn the classes of a labelled folder.

All of the network, its last stages, or the head alone: a linear probe (Goyal et al. 2019, section
4: the backbone frozen, its batch norms too). Mixup: Zhang et al. 2018 (arXiv:1710.09412).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from fastssl.classification import classification
from fastssl.depths import depths


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which part learns, by which loss, under which head.

    Attributes:
        train_stages: all; or how many of the backbone's last stages learn with the head: 0 is a
            linear probe. Stages without parameters are not counted; what stands behind the last
            map (a vision transformer's norm, VGG's linear layers) counts to that map's stage.
        label_smoothing: how much of the target is spread over all classes (Szegedy et al. 2016,
            section 7: 0.1).
        mixup: alpha of the Beta distribution that the share of the second image is drawn from, once
            a batch as in the authors' code (paper, section 3.3: 0.1 to 0.4 on ImageNet); 0: none.
        head: linear, or mlp: a hidden layer with ReLU and dropout (K19's linear_eval.py).
        head_norm: batch norm without scale and offset before the head (Goyal et al. 2019).
        hidden: the length of mlp's hidden layer.
        dropout: of mlp's hidden layer.
    """

    train_stages: Literal["all"] | int = "all"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    head: Literal["linear", "mlp"] = "linear"
    head_norm: bool = False
    hidden: int = 1000
    dropout: float = 0.5

    def __post_init__(self):
        if self.train_stages != "all" and self.train_stages < 0:
            raise ValueError(
                f"train_stages ({self.train_stages}) must be all, 0 (the head alone) or how many of"
                " the backbone's last stages learn with it"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 1"
            )
        if self.mixup < 0:
            raise ValueError(f"mixup ({self.mixup}) must be above 0, or 0 for none")
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")


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
        """Freezes the stages that do not learn, and makes the head.

        Raises:
            ValueError: the folder has no classes, or only one, or the backbone fewer stages.
        """
        del images, classes, seed  # those of the graph's own label: it puts out none
        super().__init__()
        found = 0 if labels is None or not len(labels) else int(labels.max()) + 1
        if labels is None or found < 2:
            raise ValueError(
                f"objective.use fastssl.objectives.finetune needs at least 2 classes, and the"
                f" listing has {found}: data.root must hold a folder for each class"
                " (root/<class>/<image>.jpg), and no image beside them"
            )
        self.options = options
        self.backbone = backbone
        self._frozen = _freeze(backbone, options.train_stages)
        self.head = _head(backbone, options, found)
        # known from the files, so no part of a checkpoint
        self.register_buffer("labels", labels, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "Objective":
        """As any module's, but that what is frozen stays as in evaluation."""
        super().train(mode)
        # by name: train.sync_batchnorm puts other modules in the place of norms
        for name in self._frozen:
            self.backbone.get_submodule(name).training = False
        return self

    def forward(self, image: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Classify a batch.

        Args:
            image: [B, 3, S, S], as the backbone takes it.
            index: [B], int64: which images.

        Returns:
            The mean loss of the batch, and: `accuracy`, the part of the images whose class has
            the highest score (with mixup, of both images' classes by their shares); `chance`, what
            accuracy would be by luck.
        """
        label, smoothing = self.labels[index], self.options.label_smoothing
        if not self.options.mixup:
            return classification(self.scores(image), label, smoothing)
        image = self._normalized(image)
        alpha = torch.full((), self.options.mixup, device=image.device)
        share = Beta(alpha, alpha, validate_args=False).sample()  # the part of the first image
        other = torch.randperm(len(image), device=image.device)
        scores = self.scores(torch.lerp(image[other], image, share.to(image.dtype)))
        loss, metrics = classification(scores, label, smoothing)
        loss_other, metrics_other = classification(scores, label[other], smoothing)
        mixed = {name: torch.lerp(metrics_other[name], metrics[name], share) for name in metrics}
        return torch.lerp(loss_other, loss, share.to(loss.dtype)), mixed

    def scores(self, image: Tensor) -> Tensor:
        """The score of each class [B, classes] for `image` [B, 3, S, S], as the backbone takes it.

        Autograd keeps nothing of frozen stages.
        """
        return self.head(self.backbone(image))

    def finish_step(self) -> None:
        """Nothing is kept between steps."""

    def _normalized(self, image: Tensor) -> Tensor:
        """Floats, which can be mixed, of bytes."""
        if image.dtype != torch.uint8:
            return image
        weight = next(self.parameters())
        mean, std = self.backbone.normalization  # pyright: ignore[reportGeneralTypeIssues]  # by contract
        kind = {"dtype": weight.dtype, "device": image.device}
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(each, **kind).reshape(shape) for each in (mean, std))
        return (image.to(weight.dtype) / 255 - mean) / std


def _freeze(backbone: nn.Module, train_stages: Literal["all"] | int) -> list[str]:
    """Takes the gradient from all but the last stages; names what stays as in evaluation."""
    if train_stages == "all":
        return []
    if train_stages == 0:
        backbone.requires_grad_(False)
        return [name for name, _ in backbone.named_modules()]
    found = depths(backbone)
    if train_stages > len(found.stages):
        raise ValueError(
            f"objective.train_stages ({train_stages}): the backbone has {len(found.stages)} stages"
            f" with parameters ({', '.join(found.stages)}): give all, or a smaller number"
        )
    first = len(found.stages) - train_stages
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(found.parameters[name] >= first)
    return [name for name, _ in backbone.named_modules() if found.modules[name] < first]


def _head(backbone: nn.Module, options: Options, classes: int) -> nn.Sequential:
    features = backbone.dim
    assert isinstance(features, int), "a backbone must offer dim, the length of its features"
    layers: list[nn.Module] = []
    if options.head_norm:
        layers.append(nn.BatchNorm1d(features, affine=False))
    if options.head == "mlp":
        layers += [nn.Linear(features, options.hidden), nn.ReLU(), nn.Dropout(options.dropout)]
        features = options.hidden
    last = nn.Linear(features, classes)
    nn.init.normal_(last.weight, std=0.01)  # Goyal et al. 2017, section 5.1
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
