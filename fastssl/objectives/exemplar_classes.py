"""Exemplar, classified: every image is a class of its own (Dosovitskiy et al. 2014).

Views of an image, however changed, should be told to be of that image and of no other: softmax
cross-entropy over as many classes as there are images (their "Learning Algorithm"). Beyond
`softmax_images` of them the sum over all classes is estimated from a sample, which the paper, with
at most 32,000 classes, had no need of.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.memory import generator


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the head does.

    Attributes:
        dropout: the part of the features that is dropped in training; the paper says dropout on
            the fully connected layers and no rate, 0.5 is that of Hinton et al. 2012.
        softmax_images: up to that many images the softmax is over all of them.
        negatives: beyond, how many other classes a step draws, shared by the images of the step
            and by all processes. The logits take 4 * views * negatives bytes. Weights, gradients
            and what SGD keeps of them take 12 * images * features bytes either way, and DDP sends
            a third of that at each step: with 1.28 million images and 512 features 7.9 and 2.6 GB.
    """

    dropout: float = 0.5
    softmax_images: int = 100_000
    negatives: int = 8192

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")
        if self.softmax_images < 0:
            raise ValueError(f"softmax_images ({self.softmax_images}) must be at least 0")
        if self.negatives < 1:
            raise ValueError(f"negatives ({self.negatives}) must be at least 1")


class Objective(nn.Module):
    """A linear classifier with one output an image.

    The classes drawn are a function of the seed and the number of steps finished: a resumed run
    draws what the unbroken one would have drawn, and every process draws the same.
    """

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
        """A classifier of `images` outputs; `seed` must not differ between processes."""
        del classes, labels  # an image's class is its row
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(features, images)
        self.seed = seed
        self.steps = 0  # finished: the position in the stream of drawn classes

    def forward(self, views: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell of each view which image it is of.

        Args:
            views: [B, K, 3, S, S], as the backbone takes them.
            index: [B], int64: which images.

        Returns:
            The mean loss, and: `accuracy`, the part of the views whose own class scores above all
            others, or above all drawn; `chance`, what it would be by luck.
        """
        own_V = index.flatten().repeat_interleave(views.shape[1])  # V = B * K views
        # all views in one call; a view of the same memory, as flatten keeps channels-last
        features_VD = self.dropout(self.backbone(views.flatten(0, 1)))
        images = self.head.out_features
        if images <= self.options.softmax_images:
            logits_VC = self.head(features_VD).to(self.head.weight.dtype)  # C = all classes
            with torch.autocast(views.device.type, enabled=False):
                loss = functional.cross_entropy(logits_VC, own_V)
            right_V = logits_VC.detach().argmax(1) == own_V
            others = images - 1
        else:
            drawn_C = self.draw(views.device)
            weight, bias = self.head.weight, self.head.bias
            logits_VC = functional.linear(features_VD, weight[drawn_C], bias[drawn_C])
            with torch.autocast(views.device.type, enabled=False):
                features_VD = features_VD.to(weight.dtype)
                own_logit_V = (features_VD * weight[own_V]).sum(1) + bias[own_V]
                loss_V, right_V = sampled_softmax(
                    own_logit_V, logits_VC.to(weight.dtype), drawn_C == own_V[:, None], images
                )
                loss = loss_V.mean()
            others = min(self.options.negatives, images - 1)
        metrics = {
            "accuracy": right_V.float().mean(),
            "chance": torch.full((), 1 / (1 + others), device=index.device),
        }
        return loss, metrics

    def draw(self, device: torch.device) -> Tensor:
        """Classes to compare with in this step, int64: uniform, with replacement.

        No more classes than `negatives` are given whole, each once.
        """
        images, count = self.head.out_features, self.options.negatives
        if count >= images:
            return torch.arange(images, device=device)
        numbers = generator(device, self.seed, f"classes, step {self.steps}")
        return torch.randint(images, (count,), generator=numbers, device=device)

    def finish_step(self) -> None:
        """The next step draws other classes."""
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        """The steps finished, beside the weights in state_dict(); a tensor as safetensors wants."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after the steps of `state`."""
        self.steps = int(state)


def sampled_softmax(
    own_logit_V: Tensor, drawn_logits_VC: Tensor, own_VC: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the sum over the other classes estimated from drawn ones.

    sum_{c != y} exp(s_c) ~ (classes - 1) / n sum_{drawn c != y} exp(s_c), with n the drawn that
    are not y. The estimate has the sum as its mean, its logarithm comes out a little low, and with
    every other class drawn once it is exact. (TensorFlow's sampled softmax leaves the factor out
    when classes are drawn uniformly, where its correction cancels.)

    Args:
        own_logit_V: s_y of each view's own class.
        drawn_logits_VC: of the drawn classes.
        own_VC: bool, where a drawn class is the own one, which does not count.
        classes: how many there are.

    Returns:
        The loss of each view [V], 0 where nothing else was drawn, and whether its own class scored
        above all drawn [V], bool.
    """
    count_V = (~own_VC).sum(1)
    factor_V = math.log(max(1, classes - 1)) - count_V.clamp_min(1).to(own_logit_V.dtype).log()
    others_VC = drawn_logits_VC.masked_fill(own_VC, -1e30)  # exp gives 0, and sums stay finite
    others_V = others_VC.logsumexp(1) + factor_V
    # -log(exp(s) / (exp(s) + exp(o))) = log(1 + exp(o - s))
    loss_V = functional.softplus(others_V - own_logit_V)
    return loss_V, own_logit_V.detach() > others_VC.detach().amax(1)
